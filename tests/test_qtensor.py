# SPDX-License-Identifier: Apache-2.0
"""QTensor as a pytree: through every transformation, to disk and back, with the same bytes."""

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import reference

import jqx.models.linen  # noqa: F401  teaches flax.serialization what a QTensor is
from jqx.errors import InputError
from jqx.formats import FORMATS
from jqx.tensors import QTensor

NAMES = ["fp8", "fp8_block", "int8", "int4", "nvfp4", "mxfp8"]  # every packing, every kind of scale


def stack(*lead, n=6, k=128, dtype=ml_dtypes.bfloat16):
    r = np.random.RandomState(1)
    return (r.standard_normal((*lead, n, k)) * np.exp(r.standard_normal((*lead, 1, 1)))).astype(
        dtype
    )


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def reshaped(leaf):
    return leaf[None] if leaf.ndim == 0 else leaf


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_is_stored_member_by_member(name):
    w = stack(3)
    q = jax.jit(lambda w: QTensor.quantize(w, name))(w)
    assert (q.shape, q.ndim, q.size, q.dtype) == (w.shape, 3, w.size, jnp.bfloat16)
    assert (q.stack, q.rows, q.columns) == ((0,), (1,), (2,))
    back = np.asarray(jax.jit(QTensor.decode)(q))
    for i in range(3):
        codes, scale, tensor_scale = reference.encode(w[i], name)
        np.testing.assert_array_equal(np.asarray(q.codes[i]).view(np.uint8), codes)
        np.testing.assert_array_equal(
            np.asarray(reshaped(q.scale[i])).view(np.uint8), reshaped(scale).view(np.uint8)
        )
        if tensor_scale is not None:
            assert q.tensor_scale[i] == tensor_scale
        np.testing.assert_array_equal(back[i], reference.decode(w[i], name).astype(w.dtype))


@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_the_contraction_axis_may_be_anywhere(name):
    w = stack(2)
    q = QTensor.quantize(jnp.asarray(w), name)
    for axis in (0, -2):
        turned = jnp.moveaxis(jnp.asarray(w), -1, axis)
        other = QTensor.quantize(turned, FORMATS[name], axis=axis)
        assert other.shape == turned.shape
        assert other.columns == (axis % 3,)
        np.testing.assert_array_equal(np.asarray(other.codes), np.asarray(q.codes))
        np.testing.assert_array_equal(
            np.asarray(other.decode()), np.asarray(jnp.moveaxis(q.decode(), -1, axis))
        )
    assert q.decode(jnp.float32).dtype == jnp.float32


def test_what_it_weighs():
    q = QTensor.quantize(jnp.asarray(stack(2, n=8)), "nvfp4")
    assert q.nbytes == 2 * (8 * 64 + 8 * 8 + 4)
    assert q.bits == 8 * q.nbytes / (2 * 8 * 128)
    more = q.replace(input_scale=jnp.ones(2), low_rank=(jnp.ones((2, 8, 3)), jnp.ones((2, 3, 128))))
    assert more.bits == q.bits
    assert more.nbytes == q.nbytes + 4 * 2 * (1 + 8 * 3 + 3 * 128)


def test_one_amax_for_a_stack_and_one_for_each_member():
    w = jnp.asarray(stack(2))
    shared = QTensor.quantize(w, "nvfp4", jnp.float32(9.0))
    assert shared.tensor_scale.tolist() == [np.float32(9) / np.float32(2688)] * 2
    each = QTensor.quantize(w, "nvfp4", jnp.float32([9.0, 4.0]))
    assert each.tensor_scale.tolist() == [
        np.float32(9) / np.float32(2688),
        np.float32(4) / np.float32(2688),
    ]
    np.testing.assert_array_equal(np.asarray(each.codes[0]), np.asarray(shared.codes[0]))


def test_shapes_and_axes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"has no axis 2"):
        QTensor.quantize(jnp.zeros((4, 128)), "fp8", axis=2)
    with pytest.raises(InputError, match="nvfp4 shares one scale over 16"):
        QTensor.quantize(jnp.zeros((128, 3)), "nvfp4")
    with pytest.raises(InputError, match="no format 'fp9'"):
        QTensor.quantize(jnp.zeros((4, 128)), "fp9")


@pytest.mark.parametrize("name", NAMES)
def test_scan_and_vmap_meet_members(name):
    w = stack(3, n=128)
    q = QTensor.quantize(jnp.asarray(w), name)
    x = jnp.asarray(stack(n=4))
    decoded = q.decode(jnp.float32)

    def layer(x, q):
        assert q.shape == (128, 128)
        return jnp.tanh(x @ q.decode(jnp.float32).T), None

    loop = x.astype(jnp.float32)
    for i in range(3):
        loop = jnp.tanh(loop @ decoded[i].T)
    np.testing.assert_allclose(
        jax.jit(lambda q: jax.lax.scan(layer, x.astype(jnp.float32), q)[0])(q), loop, rtol=1e-5
    )
    np.testing.assert_array_equal(jax.vmap(lambda q: q.decode(jnp.float32))(q), decoded)
    same(jax.vmap(lambda w: QTensor.quantize(w, name))(jnp.asarray(w)), q)


def test_the_input_format_is_static_and_stays():
    q = QTensor.quantize(jnp.asarray(stack(2)), "int8")
    assert q.input_format is None
    q = q.replace(input_format="mxfp8")
    assert jax.tree.structure(q) != jax.tree.structure(q.replace(input_format=None))
    seen = [
        jax.jit(lambda q: q)(q),
        jax.vmap(lambda q: q)(q),
        jax.lax.scan(lambda c, q: (c, q), 0, q)[1],
        jax.eval_shape(lambda q: q, q),
        jax.tree.map(lambda a: a[0], q),
    ]
    assert [s.input_format for s in seen] == ["mxfp8"] * 5


def test_abstract_values_have_the_same_structure():
    w = jnp.asarray(stack(2))
    for name in FORMATS:
        q = jax.eval_shape(lambda w, name=name: QTensor.quantize(w, name), w)
        assert q.shape == w.shape
        assert q.bits == 8 * q.nbytes / w.size >= FORMATS[name].bits
        assert jax.eval_shape(lambda q: q.decode(), q).shape == w.shape
    q = jax.eval_shape(lambda w: QTensor.quantize(w, "nf4"), w)
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path({"w": q})[0]
    ]
    assert paths == ["['w'].codes", "['w'].scale"]


def test_a_gradient_reaches_the_scales():
    q = QTensor.quantize(jnp.asarray(stack()), "int8")
    grads = jax.jit(jax.grad(lambda s: q.replace(scale=s).decode(jnp.float32).sum()))(q.scale)
    np.testing.assert_allclose(
        grads[:, 0], np.asarray(q.codes).astype(np.float32).sum(1), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "shape", "axis"), [("fp8", (2, 6, 128), -1), ("int4", (32, 4, 2, 6), (0, 1))]
)
def test_orbax_and_flax_bring_back_the_same_bytes(name, shape, axis, tmp_path):
    q = QTensor.quantize(jnp.asarray(stack(*shape[:-2], n=shape[-2], k=shape[-1])), name, axis=axis)
    q = q.replace(input_scale=jnp.ones(2), input_format="fp8")
    tree = {"model": {"0": {"weight": q, "bias": jnp.ones(3)}}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", tree)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "saved", jax.eval_shape(lambda: tree))
    same(back, tree)
    same(flax.serialization.from_bytes(tree, flax.serialization.to_bytes(tree)), tree)
