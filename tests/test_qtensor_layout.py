# SPDX-License-Identifier: Apache-2.0
"""QTensors of arrays with several row, contraction and stack axes in any order: what they store is
what the matrices store, and they move as the array would.
"""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jqx.errors import InputError
from jqx.formats import find_format
from jqx.tensors import QTensor
from jqx.tensors.layout import Layout, from_matrices, layout_of, to_matrices

NAMES = ["fp8", "fp8_block", "int8", "int4", "nvfp4", "mxfp8"]  # every packing, every kind of scale
CASES = {  # shape, contraction axes, stack axes
    "attention": ((128, 3, 2), (0,), ()),
    "output": ((4, 32, 6), (0, 1), ()),
    "convolution": ((2, 2, 32, 6), (0, 1, 2), ()),
    "layers": ((128, 3, 2, 4), (0,), (1,)),
    "experts": ((2, 128, 3, 6), (1,), (0, 2)),
    "apart": ((32, 2, 4, 3), (0, 2), ()),
    "inside": ((4, 2, 32, 3, 2), (0, 2), (1, 3)),
}
DECODE = jax.jit(QTensor.decode)
cases = pytest.mark.parametrize(("shape", "axis", "stack"), CASES.values(), ids=CASES)


def drawn(*shape):
    r = np.random.RandomState(1)
    w = r.standard_normal(shape) * np.exp(r.standard_normal(shape[1:]))
    return w.astype(ml_dtypes.bfloat16)


def rows_of(shape, axis, stack):
    return tuple(a for a in range(len(shape)) if a not in (*axis, *stack))


def members(w, axis, stack):
    """(index, matrix) of every member, the axes moved by hand."""
    rows = rows_of(w.shape, axis, stack)
    n = math.prod(w.shape[a] for a in rows)
    moved = np.transpose(w, (*stack, *rows, *axis))
    for index in np.ndindex(*(w.shape[a] for a in stack)):
        yield index, moved[index].reshape(n, -1)


def put_back(matrices, shape, axis, stack):
    order = (*stack, *rows_of(shape, axis, stack), *axis)
    moved = np.stack(matrices).reshape([shape[a] for a in order])
    return np.transpose(moved, np.argsort(order))


def same_bytes(a, b):
    np.testing.assert_array_equal(np.atleast_1d(a).view(np.uint8), np.atleast_1d(b).view(np.uint8))


@pytest.mark.parametrize("name", NAMES)
@cases
def test_every_member_is_stored_as_its_matrix(name, shape, axis, stack):
    w = drawn(*shape)
    q = jax.jit(lambda w: QTensor.quantize(w, name, axis=axis, stack=stack))(w)
    decoded = []
    for index, matrix in members(w, axis, stack):
        codes, scale, tensor_scale = reference.encode(matrix, name)
        same_bytes(q.codes[index], codes)
        same_bytes(q.scale[index], scale)
        assert tensor_scale is None or q.tensor_scale[index] == tensor_scale
        decoded.append(reference.decode(matrix, name).astype(w.dtype))
    assert (q.shape, q.ndim, q.size) == (w.shape, w.ndim, w.size)
    assert (q.stack, q.rows, q.columns) == (stack, rows_of(shape, axis, stack), axis)
    np.testing.assert_array_equal(DECODE(q), put_back(decoded, shape, axis, stack))


def test_axes_are_folded_with_the_last_fastest():
    w = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    m = to_matrices(jnp.asarray(w), layout_of(w.shape, (0, 2), ()))
    for a, b, c, d in np.ndindex(*w.shape):
        assert m[b * 5 + d, a * 4 + c] == w[a, b, c, d]


def test_axes_may_be_negative_and_in_any_order():
    w = jnp.asarray(drawn(2, 128, 3, 6))
    plain = QTensor.quantize(w, "int8", axis=(1, 3), stack=(0,))
    other = QTensor.quantize(w, "int8", axis=(-1, -3), stack=(-4,))
    assert jax.tree.structure(other) == jax.tree.structure(plain)
    np.testing.assert_array_equal(other.codes, plain.codes)


def test_without_stack_axes_there_is_one_row_axis():
    assert layout_of((5, 4, 3, 2), 0) == layout_of((5, 4, 3, 2), 0, (1, 2))
    assert layout_of((5, 4, 3, 2), (0, 1)) == layout_of((5, 4, 3, 2), (0, 1), (2,))
    assert layout_of((2, 3), -1) == Layout()
    assert layout_of((4, 2, 3), -1) == Layout(), "leading axes are not named"


@pytest.mark.parametrize(
    ("axis", "stack", "says"),
    [
        (3, (), r"shape \(4, 2, 3\) has no axis 3"),
        (0, (-4,), r"shape \(4, 2, 3\) has no axis -4"),
        ((0, -3), (), r"\(0, -3\) of an array of shape \(4, 2, 3\) name one of them twice"),
        (0, (1, 1), "twice"),
        ((0, 1), (-2,), r"Axis 1 of \(4, 2, 3\) is named as a contraction axis and as a stack"),
        ((0, 1, 2), (), "has no row axis"),
        ((0, 1, 2), None, "has no row axis"),
        (0, (1, 2), r"contraction axes \(0,\) and the stack axes \(1, 2\) has no row axis"),
        ((), (1,), "has no contraction axis"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axis, stack, says):
    with pytest.raises(InputError, match=says):
        QTensor.quantize(jnp.zeros((4, 2, 3)), "int8", axis=axis, stack=stack)


@st.composite
def arrays(draw):
    """Shape, contraction axes and stack axes of an array that has a row axis too."""
    shape = draw(st.lists(st.integers(1, 3), min_size=2, max_size=5))
    order = draw(st.permutations(range(len(shape))))
    columns = draw(st.integers(1, len(shape) - 1))
    rows = draw(st.integers(1, len(shape) - columns))
    return tuple(shape), tuple(order[:columns]), tuple(order[columns + rows :])


def stored(array):
    """A QTensor of that array with all the parts there are; no two numbers of a part are alike."""
    shape, axis, stack = array
    lead = tuple(shape[a] for a in sorted(stack))
    n = math.prod(shape[a] for a in rows_of(shape, axis, stack))
    k = math.prod(shape[a] for a in axis)
    numbers = lambda *s: np.arange(1, 1 + math.prod((*lead, *s))).reshape((*lead, *s))  # noqa: E731
    scale = lambda *s: jnp.asarray(numbers(*s), jnp.float32)  # noqa: E731
    return QTensor(
        codes=jnp.asarray(numbers(n, k) % 251 - 125, jnp.int8),
        scale=scale(n, 1),
        tensor_scale=None,
        format=find_format("int8"),
        dtype=jnp.dtype(jnp.float32),
        layout=layout_of(shape, axis, stack),
        input_scale=scale(),
        pre_quant_scale=scale(k),
        low_rank=(scale(n, 2), scale(2, k)),
    )


def dense(q):
    """Everything there is in it, by the member it belongs to: arrays that begin with the stack."""
    moved = jnp.transpose(DECODE(q), (*q.stack, *q.rows, *q.columns))
    return [moved, q.input_scale, q.pre_quant_scale, *q.low_rank]


def same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=40)
@given(array=arrays(), data=st.data())
def test_it_is_transposed_as_its_array(array, data):
    q = stored(array)
    to = data.draw(st.permutations(range(q.ndim)))
    turned = q.transpose(to)
    orders = [[to.index(a) for a in axes] for axes in (q.rows, q.columns)]
    if any(order != sorted(order) for order in orders):
        assert turned is None
        return
    assert turned.shape == tuple(q.shape[a] for a in to)
    np.testing.assert_array_equal(DECODE(turned), np.transpose(DECODE(q), to))
    stack = np.argsort([to.index(a) for a in q.stack]).tolist()
    lead = lambda a: np.transpose(a, (*stack, *range(len(stack), a.ndim)))  # noqa: E731
    same(dense(turned), map(lead, map(np.asarray, dense(q))))
    assert turned.transpose(np.argsort(to).tolist()).layout == q.layout


@settings(max_examples=20)
@example(array=((2, 3, 1, 2, 3), (0,), (1, 3)), index=1)
@given(array=arrays(), index=st.integers(-4, 4))
def test_a_member_is_a_piece_of_its_array(array, index):
    q = stored(array)
    for axis in (*q.rows, *q.columns):
        assert q.member(axis, index) is q.part(axis, index, 1) is None

    @jax.jit
    def pieces(q, i):
        found = [(q.member(a - q.ndim, i), q.part(a, i, q.shape[a] - 1)) for a in q.stack]
        return [(one, dense(one), some, DECODE(some)) for one, some in found]

    decoded, parts = np.asarray(DECODE(q)), [np.asarray(a) for a in dense(q)]
    found = zip(q.stack, pieces(q, jnp.int32(index)), strict=True)
    for lead, (axis, (one, of_one, some, of_some)) in enumerate(found):
        size = q.shape[axis]
        at = int(np.clip(index + size if index < 0 else index, 0, size - 1))  # as JAX clamps it
        assert one.shape == (*q.shape[:axis], *q.shape[axis + 1 :])
        np.testing.assert_array_equal(DECODE(one), np.take(decoded, at, axis))
        same(of_one, [np.take(a, at, lead) for a in parts])
        first = int(np.clip(index + size if index < 0 else index, 0, 1))
        wanted = np.take(decoded, range(first, first + size - 1), axis)
        np.testing.assert_array_equal(of_some, wanted)
        assert (some.layout, some.input_scale.shape[lead]) == (q.layout, size - 1)


def test_an_index_may_be_any_integer():
    q = QTensor.quantize(jnp.asarray(drawn(32, 3, 2)), "int8", axis=0)
    for index in (1, np.int64(1), np.uint8(1), np.array(1), jnp.uint32(1)):
        np.testing.assert_array_equal(q.member(1, index).codes, q.codes[1])
    with pytest.raises(IndexError):
        q.member(3, 0)


@settings(max_examples=20)
@example(array=((2, 3, 1, 2, 3), (0,), (1, 3)))
@given(array=arrays())
def test_leading_axes_go_as_transformations_take_them(array):
    q = stored(array)
    if not q.stack:
        return
    first = q.stack[0]
    members = jnp.moveaxis(DECODE(q), first, 0)

    def one(q):
        assert q.shape == members.shape[1:]
        return DECODE(q)

    np.testing.assert_array_equal(jax.vmap(one)(q), members)
    np.testing.assert_array_equal(jax.lax.scan(lambda c, q: (c, one(q)), 0, q)[1], members)
    np.testing.assert_array_equal(one(jax.tree.map(lambda a: a[-1], q)), members[-1])
    for back in (jax.vmap(lambda q: q)(q), jax.lax.scan(lambda c, q: (c, q), 0, q)[1]):
        assert (back.shape, back.layout) == (q.shape, q.layout)


@settings(max_examples=20)
@given(array=arrays())
def test_new_leading_axes_lie_in_front(array):
    q = stored(array)
    more = jax.tree.map(lambda a: np.stack([a, a]), q)
    assert (more.shape, more.stack) == ((2, *q.shape), (0, *(a + 1 for a in q.stack)))
    np.testing.assert_array_equal(DECODE(more), np.stack([DECODE(q)] * 2))


@cases
def test_quantize_is_mapped_over_any_axis(shape, axis, stack):
    w = jnp.asarray(drawn(2, *shape))
    store = lambda w: QTensor.quantize(w, "int8", axis=axis, stack=stack)  # noqa: E731
    wanted = [store(member) for member in w]
    moved = jnp.moveaxis(w, 0, 2)
    q = jax.jit(jax.vmap(store, in_axes=2))(moved)
    assert (q.shape, q.layout) == (w.shape, wanted[0].layout)
    np.testing.assert_array_equal(q.codes, np.stack([one.codes for one in wanted]))
    np.testing.assert_array_equal(DECODE(q), np.stack([DECODE(one) for one in wanted]))


@settings(max_examples=20)
@given(array=arrays())
def test_matrices_and_arrays_are_each_others_inverse(array):
    q = stored(array)
    m = jnp.arange(q.size).reshape(q.codes.shape)
    w = from_matrices(m, q.layout)
    assert w.shape == q.shape
    np.testing.assert_array_equal(to_matrices(w, q.layout), m)
    assert layout_of(q.shape, q.columns, q.stack) == q.layout


def test_a_gradient_reaches_the_activation():
    w = jnp.asarray(drawn(4, 32, 6)).astype(jnp.float32)
    q = QTensor.quantize(w, "nvfp4", axis=(0, 1), stack=())
    loss = lambda x, w: jnp.sum(jnp.tanh(jnp.einsum("bhk,hkd->bd", x, w)))  # noqa: E731
    x = jnp.asarray(drawn(3, 4, 32)).astype(jnp.float32)
    got = jax.jit(jax.grad(lambda x, q: loss(x, DECODE(q))))(x, q)
    np.testing.assert_allclose(got, jax.grad(loss)(x, DECODE(q)), rtol=1e-5)


def test_scales_of_another_matrix_are_refused():
    q = QTensor.quantize(jnp.asarray(drawn(256, 64)), "fp8_block")
    half = q.replace(codes=q.codes[:64])  # as in a shard that begins within a block
    with pytest.raises(InputError, match=r"fp8_block has scales \(1, 1\) .* there are \(2, 1\)"):
        half.decode()
