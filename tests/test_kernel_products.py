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


def asked(f, *args, op="matmul", of=products):
    """How often kernels compute a product of `f`."""
    times = []

    def counted(*args, **more):
        times.append(1)
        return kept(*args, **more)

    kept = getattr(of, op)
    setattr(of, op, counted)
    try:
        jax.eval_shape(lambda *args: f(*args), *args)  # traced anew
    finally:
        setattr(of, op, kept)
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


def test_a_matrix_that_is_stored_along_its_other_axis_is_decoded():
    w, x = {"w": stored("int8", (K, K), -1)}, drawn(5, K)
    mine = quantized(lambda p, x: x @ p["w"], implementation="xla")
    near(mine(w, x), x @ w["w"].decode())
    assert asked(mine, w, x) == 0


# rows in groups

E, F, TOKENS, CHOSEN = 5, 64, 7, 2
ragged_dot = jax.lax.ragged_dot
gathered = partial(asked, op="grouped_matmul")


def experts(p, x, chosen, weight):
    """What a mixture of experts does with tokens [t, k]: each meets two of the experts, nobody the
    last.
    """
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=E).astype(jnp.int32)
    rows = jnp.repeat(x, CHOSEN, axis=0)[order]
    h = jax.nn.silu(ragged_dot(rows, p["gate"], sizes)) * ragged_dot(rows, p["up"], sizes)
    y = ragged_dot(h, jnp.swapaxes(p["down"], 1, 2), sizes)  # kept as [e, k, f]
    y = y[jnp.argsort(order)].reshape(*chosen.shape, K)
    return jnp.einsum("tc,tck->tk", weight, y)


def mixture(fmt, dtype=jnp.bfloat16):
    """Parameters and arguments of `experts`."""
    one = partial(QTensor.quantize, fmt=fmt, stack=(0,))
    params = {
        "gate": one(drawn(E, K, F, seed=1, dtype=dtype), axis=1),
        "up": one(drawn(E, K, F, seed=2, dtype=dtype), axis=1),
        "down": one(drawn(E, K, F, seed=3, dtype=dtype), axis=2),
    }
    chosen = jnp.asarray([[0, 1], [3, 1], [0, 3], [1, 0], [3, 0], [2, 3], [3, 1]])
    weight = jnp.abs(drawn(TOKENS, CHOSEN, seed=5, dtype=dtype))
    return params, (drawn(TOKENS, K, seed=4, dtype=dtype), chosen, weight)


def plain(params):
    return {name: q.decode() for name, q in params.items()}


@pytest.mark.parametrize(
    ("fmt", "implementation"),
    [("nvfp4", None), ("fp8", None), ("int4_b64", "xla"), ("nf4_double", "reference")],
)
def test_experts_are_met_by_the_rows_that_chose_them(fmt, implementation):
    """On CPUs too, where nothing is asked for."""
    params, args = mixture(fmt)
    mine = quantized(experts, implementation=implementation)
    near(jax.jit(mine)(params, *args), jax.jit(experts)(plain(params), *args), 2.0**-6)
    assert gathered(mine, params, *args) == 3
    assert asked(mine, params, *args) == 0


@pytest.mark.parametrize("device", [Device("gpu", "", (9, 0)), Device("tpu")])
@pytest.mark.parametrize("fmt", ["nvfp4", "int4_b64"])
def test_experts_by_the_kernels_of_accelerators(fmt, device, monkeypatch):
    monkeypatch.setattr(products, "current_device", lambda: device)
    taken = partial(products.grouped_matmul, interpret=True, device=device)
    monkeypatch.setattr(products, "grouped_matmul", taken)
    params, args = mixture(fmt)
    near(jax.jit(quantized(experts))(params, *args), experts(plain(params), *args), 2.0**-6)
    assert gathered(quantized(experts), params, *args) == 3
    assert gathered(quantized(experts), *_in_float32(fmt)) == 0


def _in_float32(fmt):
    params, args = mixture(fmt, jnp.float32)
    return params, *args


def test_experts_in_float32_are_exact_sums_on_a_cpu():
    params, *args = _in_float32("mxfp8")
    mine = quantized(experts)
    near(jax.jit(mine)(params, *args), jax.jit(experts)(plain(params), *args), 2.0**-18)
    assert gathered(mine, params, *args) == 3


def test_the_gradient_of_tokens_goes_through_their_experts():
    params, (x, *args) = mixture("nvfp4", jnp.float32)

    def loss(f, params, x):
        return jnp.sum(f(params, x, *args) ** 2)

    mine = jax.jit(jax.grad(partial(loss, quantized(experts), params)))(x)
    near(mine, jax.jit(jax.grad(partial(loss, experts, plain(params))))(x), 2.0**-14)


def test_inputs_that_experts_quantize_are_those_of_every_member():
    params, args = mixture("nvfp4")
    scales = jnp.linspace(0.01, 0.02, E)
    params = {n: q.replace(input_format="nvfp4", input_scale=scales) for n, q in params.items()}
    mine, kept = quantized(experts), quantized(experts, product=lambda met: met.apply(met.x, met.w))
    near(jax.jit(mine)(params, *args), jax.jit(kept)(params, *args), 2.0**-5)
    assert gathered(mine, params, *args) == 3


def test_layers_of_experts_are_taken_apart_before():
    def f(p, x, sizes):
        return jax.lax.scan(lambda h, w: (jnp.tanh(ragged_dot(h, w, sizes)), None), x, p["w"])[0]

    params = {"w": QTensor.quantize(drawn(2, 3, K, K), "nvfp4", axis=2)}
    x, sizes = drawn(6, K, seed=3), jnp.asarray([2, 0, 3], jnp.int32)
    mine = quantized(f)
    near(jax.jit(mine)(params, x, sizes), jax.jit(f)(plain(params), x, sizes), 2.0**-5)
    assert gathered(mine, params, x, sizes) == 1


@pytest.mark.parametrize(
    ("shape", "axis", "stack"),
    [((3, K, K), 2, (0,)), ((3, K, K), 0, (1,)), ((3, K, K), 1, ()), ((3, K, 3), 1, (2,))],
    ids=["other axis", "other stack", "no stack", "other stack of as many"],
)
def test_stacks_that_are_stored_in_another_way_are_decoded(shape, axis, stack):
    params = {"w": QTensor.quantize(drawn(*shape), "fp8", axis=axis, stack=stack)}
    x, sizes = drawn(6, K, seed=3), jnp.asarray([2, 0, 3], jnp.int32)

    def f(p, x):
        return ragged_dot(x, p["w"], sizes)

    mine = quantized(f, implementation="xla")
    near(mine(params, x), f(plain(params), x))
    assert gathered(mine, params, x) == 0


def test_what_cannot_compute_groups_is_told():
    params, args = mixture("nvfp4")
    with pytest.raises(InputError, match=r"gate: grouped_matmul .*one of 5 for every.*triton: "):
        quantized(experts, implementation="triton")(params, *args)
