# SPDX-License-Identifier: Apache-2.0
"""`jqx.quantized` with the kernels: which products they take, and that these mean the same."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqx import InputError, QTensor, quantized
from jqx.transforms import products
from jqx_kernels.dispatch import Device

FORMATS = (
    *("nvfp4", "nvfp4_b32", "int4_b64", "int4_fp8", "fp8", "fp8_channel", "fp8_block", "int8"),
    *("int8_tensor", "mxfp4", "mxfp8", "nf4", "nf4_double"),
)
K, N = 128, 48


def drawn(*shape, seed=0, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


WAYS = {
    "rows": (lambda p, x: x @ p["w"].T, (N, K), -1),
    "columns": (lambda p, x: jnp.einsum("btk,kn->btn", x, p["w"]), (K, N), 0),
    "first": (lambda p, x: jnp.einsum("nk,btk->nbt", p["w"], x), (N, K), -1),
    "wide": (
        lambda p, x: jnp.einsum("btk,nk->btn", x, p["w"], preferred_element_type=jnp.float32),
        (N, K),
        -1,
    ),
    "heads": (lambda p, x: jnp.einsum("btk,khd->bthd", x, p["w"]), (K, 4, N // 4), 0),
    "two axes": (
        lambda p, x: jnp.einsum("bthd,hdn->btn", x.reshape(2, 3, 4, K // 4), p["w"]),
        (4, K // 4, N),
        (0, 1),
    ),
}
"""Name -> function of one parameter, its shape, the axes it is contracted over."""


def stored(fmt, shape, axis):
    stack = () if isinstance(axis, tuple) or len(shape) == 3 else None
    return QTensor.quantize(drawn(*shape), fmt, axis=axis, stack=stack)


def near(got, wanted, eps=2.0**-7):
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    a, b = (np.asarray(y.astype(jnp.float32)) for y in (got, wanted))
    np.testing.assert_allclose(a, b, rtol=eps, atol=eps * np.abs(b).max())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fmt", ["nvfp4", "int4_b64", "fp8"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_products_of_every_form(way, fmt, implementation):
    f, shape, axis = WAYS[way]
    params, x = {"w": stored(fmt, shape, axis)}, drawn(2, 3, K, seed=1)
    mine = quantized(f, implementation=implementation)
    near(jax.jit(mine)(params, x), jax.jit(quantized(f))(params, x))
    assert asked(mine, params, x) == 1

    def loss(g, x):
        return jnp.sum(g(params, x).astype(jnp.float32) ** 2)

    near(jax.grad(partial(loss, mine))(x), jax.grad(partial(loss, quantized(f)))(x), 2.0**-5)


def asked(f, *args):
    """How often kernels compute a product of `f`."""
    times = []

    def counted(*args, **more):
        times.append(1)
        return kept(*args, **more)

    kept, products.matmul = products.matmul, counted
    try:
        jax.eval_shape(lambda *args: f(*args), *args)  # traced anew
    finally:
        products.matmul = kept
    return len(times)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format(fmt):
    f, shape, axis = WAYS["rows"]
    params, x = {"w": stored(fmt, shape, axis)}, drawn(5, K, seed=2)
    mine = quantized(f, implementation="xla")
    near(jax.jit(mine)(params, x), jax.jit(quantized(f))(params, x))
    assert asked(mine, params, x) == 1


@pytest.mark.parametrize("device", [Device("gpu", "", (9, 0)), Device("tpu")])
@pytest.mark.parametrize("fmt", ["nvfp4", "int4_b64", "int8"])
def test_kernels_of_accelerators(fmt, device, monkeypatch):
    """As on such a device, but interpreted."""
    monkeypatch.setattr(products, "current_device", lambda: device)
    taken = partial(products.matmul, interpret=True, device=device)
    monkeypatch.setattr(products, "matmul", taken)
    f, shape, axis = WAYS["rows"]
    params, x = {"w": stored(fmt, shape, axis)}, drawn(5, K, seed=2)
    plain = jnp.einsum("bk,nk->bn", x, params["w"].decode(), preferred_element_type=jnp.float32)
    near(jax.jit(quantized(f))(params, x), plain.astype(x.dtype))
    assert asked(quantized(f), params, x) == 1
    wide = {"w": params["w"].replace(dtype=jnp.dtype("float32"))}
    assert asked(quantized(f), wide, x.astype(jnp.float32)) == 0


def test_stacks_that_are_scanned_are_multiplied_member_by_member():
    def f(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    params = {"w": QTensor.quantize(drawn(3, K, K), "nvfp4", axis=1)}
    x, mine = drawn(4, K, seed=3), quantized(f, implementation="xla")
    near(jax.jit(mine)(params, x), jax.jit(quantized(f))(params, x), 2.0**-5)
    assert asked(mine, params, x) == 1
    near(jax.vmap(partial(mine, params))(x[None]), mine(params, x)[None], 2.0**-5)


def test_a_product_of_a_whole_stack_is_left_alone():
    def f(p, x):
        return jnp.einsum("etk,enk->etn", x, p["w"])

    params = {"w": QTensor.quantize(drawn(3, N, K), "nvfp4", stack=(0,))}
    x = drawn(3, 5, K, seed=4)
    mine = quantized(f, implementation="xla")
    near(mine(params, x), quantized(f)(params, x))
    assert asked(mine, params, x) == 0


def test_quantized_inputs_and_low_rank_parts_go_with_it():
    f, shape, axis = WAYS["rows"]
    q = stored("nvfp4", shape, axis)
    low = (drawn(N, 4, seed=7), drawn(4, K, seed=8))
    q = q.replace(
        low_rank=low,
        pre_quant_scale=drawn(K, seed=9) ** 2 + 1,
        input_format="nvfp4",
        input_scale=jnp.float32(0.01),
    )
    x = drawn(5, K, seed=2)
    mine = jax.jit(quantized(f, implementation="xla"))({"w": q}, x)
    near(mine, jax.jit(quantized(f))({"w": q}, x))


def test_on_a_cpu_the_decoded_matrix_is_multiplied():
    f, shape, axis = WAYS["rows"]
    assert asked(quantized(f), {"w": stored("nvfp4", shape, axis)}, drawn(5, K)) == 0


def test_what_cannot_compute_it_is_told():
    f, shape, axis = WAYS["rows"]
    params, x = {"w": stored("nvfp4", shape, axis)}, drawn(5, K)
    for name, words in (("triton", r"w: matmul .*\(5, 128\).*triton: "), ("cuda", "no implement")):
        with pytest.raises(InputError, match=words):
            quantized(f, implementation=name)(params, x)
