# SPDX-License-Identifier: Apache-2.0
"""Functions of dense parameters on QTensors: what they compute is what one gets who decodes the
weights, quantizes the inputs by hand, and calls the function.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from observing import dot_uses, f_of, normal
from test_observe import LAYOUTS

import jqx
from jqx import InputError, QTensor
from jqx.formats import FORMATS
from jqx.transforms import uses

ENCODE = jax.jit(QTensor.quantize, static_argnames=("fmt", "axis"))
DECODE = jax.jit(QTensor.decode)
SCALE = np.float32(0.02)
K, N = 32, 16


def store(w, fmt="int8", axis=-1, **fields):
    """`w` as a QTensor; by default its inputs are FP8 with a scale that some of them exceed."""
    fields = {"input_format": "fp8", "input_scale": SCALE, **fields}
    given = {k: jnp.asarray(v) if k.endswith("scale") else v for k, v in fields.items()}
    lead = w.shape[:-2]
    if given["input_scale"].shape != lead:
        given["input_scale"] = jnp.broadcast_to(given["input_scale"], lead)
    return ENCODE(jnp.asarray(w), fmt, axis=axis).replace(**given)


def rounded(x, name="fp8", scale=SCALE):
    return reference.activation(np.asarray(x), name, scale)


def run(f, params, *args):
    params, args = jax.tree.map(jnp.asarray, (params, args))
    return jax.tree.map(np.asarray, jax.jit(jqx.quantized(f))(params, *args))


# --- a linear


def test_a_linear_multiplies_decoded_weights_and_quantized_inputs():
    w, x = {name: normal(16, 128) for name in FORMATS}, normal(3, 128) * 9
    stored = {name: store(w[name], name, input_format=None) for name in FORMATS}
    treated = {name: store(w[name], name) for name in ("int4", "nvfp4")}
    got = run(lambda p, x: [[x @ w.T for w in part.values()] for part in p], (stored, treated), x)
    for part, names, x_in in zip(got, (stored, treated), (x, rounded(x)), strict=True):
        for mine, name in zip(part, sorted(names), strict=True):
            want = x_in @ reference.decode(w[name], name).T
            np.testing.assert_allclose(mine, want, rtol=1e-5, atol=1e-4, err_msg=name)
    assert not np.allclose(x, rounded(x), rtol=1e-2)


def test_every_input_format():
    w, x = normal(N, 64), normal(3, 64) * 9
    static = {name: store(w, input_format=name) for name in reference.INPUTS}
    found = {name: q.replace(input_scale=None) for name, q in static.items()}
    got = run(lambda p, x: [[x @ w.T for w in p[i].values()] for i in (0, 1)], (static, found), x)
    for i, scale in enumerate((SCALE, None)):
        for mine, name in zip(got[i], sorted(static), strict=True):
            want = rounded(x, name, scale) @ reference.decode(w, "int8").T
            np.testing.assert_allclose(mine, want, rtol=1e-5, atol=1e-4, err_msg=name)


LAYOUT_NAMES = ("x @ w", "weight first", "inputs in front", "heads out", "heads in, other order")


@pytest.mark.parametrize("layout", [*LAYOUT_NAMES, "broadcast", "experts"])
def test_layouts_of_a_linear(layout):
    """The activation's channels are quantized wherever they lie; one token's block is another's
    neighbour.
    """
    f, shape, (axis,), _ = LAYOUTS[layout]
    x = normal(2, 3, 8) * 9
    q = ENCODE(jnp.asarray(normal(*shape)), "int8", axis=axis)
    (use,) = dot_uses(f_of(f), {"layer": {"w": DECODE(q)}}, x)
    assert use.weight_axes == (axis,)
    factor = normal(8) if len(shape) == 2 else None  # members of a stack would have their own
    x_in = rounded(x if factor is None else x * factor, "fp8_token", None)
    stored = q.replace(input_format="fp8_token", pre_quant_scale=factor)
    got = run(f_of(f), {"layer": {"w": stored}}, x)
    want = jax.jit(f)(DECODE(q), jnp.asarray(x_in))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_same_without_jit():
    q, x = store(normal(N, K), input_format="int8"), jnp.asarray(normal(3, K) * 9)
    f = jqx.quantized(lambda w, x: x @ w.T)
    np.testing.assert_allclose(f(q, x), jax.jit(f)(q, x), rtol=1e-5, atol=1e-5)


def test_inputs_are_multiplied_before_they_are_quantized():
    w, x, factor = normal(N, K), normal(3, K), np.exp(normal(K))
    q = store(w, pre_quant_scale=factor)
    want = rounded(x * factor) @ reference.decode(w, "int8").T
    np.testing.assert_allclose(
        run(f_of(lambda w, x: x @ w.T), {"layer": {"w": q}}, x), want, 1e-4, 1e-4
    )


def test_quantized_inputs_are_settled_as_the_function_settles_results():
    q, x = store(normal(N, K)), normal(3, K)
    plain = {"b": jnp.asarray(normal(K, K)), "w": q}

    def f(p, x):
        return (x @ p["b"]) @ p["w"].T

    def halved(x):
        return 0.5 * x

    run = jax.jit(jqx.quantized(f, settle=halved))
    want = 0.5 * rounded(x @ np.asarray(plain["b"])) @ np.asarray(DECODE(q)).T
    np.testing.assert_allclose(run(plain, x), want, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_stay(dtype):
    w, x = jnp.asarray(normal(N, K), dtype), jnp.asarray(normal(3, K) * 9, dtype)
    q = store(w, pre_quant_scale=jnp.ones(K, dtype))

    def f(p, x):
        return lax.dot_general(
            x, p["w"], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )

    want = rounded(x).astype(np.float32) @ np.asarray(DECODE(q), np.float32).T
    assert DECODE(q).dtype == dtype
    np.testing.assert_allclose(run(f, {"w": q}, x), want, rtol=1e-5, atol=1e-4)


# --- trees and functions


def test_only_stored_weights_have_quantized_inputs():
    params = {"params": {"a": store(normal(K, K)), "b": normal(K, K), "none": None, "c": normal(K)}}
    x = normal(3, K) * 9

    def f(p, x):
        p = p["params"]
        return jnp.tanh(x @ p["b"] + p["c"][None]) @ p["a"].T

    want = (
        rounded(np.tanh(x @ params["params"]["b"] + params["params"]["c"]))
        @ np.asarray(DECODE(params["params"]["a"])).T
    )
    np.testing.assert_allclose(run(f, params, x), want, rtol=1e-4, atol=1e-4)


def test_without_stored_weights_it_is_the_function():
    params, x = {"w": jnp.asarray(normal(K, K))}, jnp.asarray(normal(2, K))
    called = []

    def f(p, x, flag):
        called.append(p is params and flag)
        return x @ p["w"]

    jqx.quantized(f)(params, x, True)
    assert called == [True]


def test_flags_and_closed_over_batches():
    q, x = store(normal(K, K)), jnp.asarray(normal(2, K))

    def f(p, x, deep):
        return x @ p["w"].T if deep else x

    np.testing.assert_array_equal(jqx.quantized(f)({"w": q}, x, False), x)
    want = rounded(x) @ np.asarray(DECODE(q)).T
    np.testing.assert_allclose(jqx.quantized(f)({"w": q}, x, True), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jqx.quantized(lambda p: x @ p["w"].T)({"w": q}), want, 1e-4, 1e-4)


def test_a_tied_weight_is_looked_up_as_it_is_and_multiplied_with_quantized_inputs():
    q, ids = store(normal(N, K) * 9), jnp.asarray([[3, 1], [15, 0]])

    def f(p, ids):
        return jnp.tanh(p["w"][ids]) @ p["w"].T

    w = np.asarray(DECODE(q))
    np.testing.assert_allclose(run(f, {"w": q}, ids), rounded(np.tanh(w[ids])) @ w.T, 1e-4, 1e-4)


def test_a_weight_that_is_used_twice_quantizes_both_inputs():
    q, x = store(normal(K, K)), normal(2, K) * 9
    w = np.asarray(DECODE(q))
    got = run(lambda p, x: jnp.tanh(x @ p["w"].T) @ p["w"].T, {"w": q}, x)
    np.testing.assert_allclose(got, rounded(np.tanh(rounded(x) @ w.T)) @ w.T, 1e-4, 1e-4)


# --- constructs


def stacked(layers=3, **fields):
    w = normal(layers, K, K)
    scales = np.float32([0.01, 0.02, 0.04])[:layers]
    return store(w, "nvfp4", **{"input_scale": scales, **fields})


def layer(h, w):
    return jnp.tanh(h @ w.T), None


def by_hand(q, x, factors=None):
    for i in range(q.shape[0]):
        x = x if factors is None else x * factors[i]
        x = np.tanh(rounded(x, "fp8", np.asarray(q.input_scale)[i]) @ np.asarray(DECODE(q))[i].T)
    return x


@pytest.mark.parametrize(
    "wrapped", [lambda f: f, jax.checkpoint, jax.jit], ids=["", "remat", "jit"]
)
@pytest.mark.parametrize("unroll", [1, 3])
def test_a_scan_takes_a_stack_apart_with_its_scales(wrapped, unroll):
    factors = np.exp(normal(3, K) * 0.5)
    q, x = stacked(pre_quant_scale=factors), normal(4, K) * 9

    def model(p, x):
        return lax.scan(wrapped(layer), x, p["layers"], unroll=unroll)[0]

    np.testing.assert_allclose(run(model, {"layers": q}, x), by_hand(q, x, factors), 1e-4, 1e-4)


def test_a_scan_may_run_backwards_or_take_groups_apart():
    q, x = stacked(), normal(4, K) * 9
    flipped = jax.tree.map(lambda a: a[::-1], q)
    got = run(lambda p, x: lax.scan(layer, x, p["w"], reverse=True)[0], {"w": q}, x)
    np.testing.assert_allclose(got, by_hand(flipped, x), 1e-4, 1e-4)
    groups = jax.tree.map(lambda a: a[None], q)

    def nested(p, x):
        return lax.scan(lambda h, group: lax.scan(layer, h, group), x, p["w"])[0]

    np.testing.assert_allclose(run(nested, {"w": groups}, x), by_hand(q, x), 1e-4, 1e-4)


def test_a_scan_shares_a_weight_of_all_layers():
    q, x = store(normal(K, K)), normal(2, K)
    got = run(lambda p, x: lax.fori_loop(0, 3, lambda _, h: layer(h, p["w"])[0], x), {"w": q}, x)
    three = jax.tree.map(lambda a: jnp.stack([a] * 3), q)
    np.testing.assert_allclose(got, by_hand(three, x), 1e-4, 1e-4)


@pytest.mark.parametrize("fields", [{}, {"input_format": None}], ids=["w4a8", "w4"])
def test_a_scan_decodes_one_member_at_a_time(fields):
    q, x = stacked(**fields), jnp.asarray(normal(4, K))
    f = jax.jit(jqx.quantized(lambda p, x: lax.scan(layer, x, p)[0]))
    assert not re.findall(r"(?:f32|bf16)\[3,32,32\]", str(jax.make_jaxpr(f)(q, x)))


def test_a_program_holds_few_decoded_weights():
    """On a CPU, whose scheduler would decode them all first."""
    layers, x = [store(normal(128, 128), "fp8") for _ in range(8)], jnp.asarray(normal(4, 128))

    def model(p, x):
        for w in p:
            x = jnp.tanh(x @ w.T)
        return x

    used = jax.jit(jqx.quantized(model)).lower(layers, x).compile().memory_analysis()
    assert used.temp_size_in_bytes < 3 * 4 * 128 * 128


def test_a_batch_decodes_weights_once():
    q, x = store(normal(N, K), "nvfp4"), jnp.asarray(normal(5, 3, K))
    f = jax.jit(jax.vmap(jqx.quantized(lambda w, x: jnp.tanh(x @ w.T) @ w), (None, 0)))
    q = q.replace(input_format=None)
    assert not re.findall(r"f32\[5,16,32\]", str(jax.make_jaxpr(f)(q, x)))


def test_nested_jit_keeps_its_place_and_other_rules_theirs():
    """A custom gradient that no quantized weight enters is kept."""

    @jax.custom_vjp
    def doubled(w, x):
        return x @ w

    doubled.defvjp(lambda w, x: (x @ w, (w, x)), lambda wx, g: (2 * wx[1].T @ g, g @ wx[0].T))
    params = {"a": store(normal(K, K)), "b": jnp.asarray(normal(K, K))}
    x = jnp.asarray(normal(2, K))

    def f(p, x):
        return jax.jit(lambda p, x: doubled(p["b"], x) @ p["a"].T)(p, x).sum()

    def loss(b):
        return jqx.quantized(f)({**params, "b": b}, x)

    g = np.ones((2, K), np.float32) @ np.asarray(DECODE(params["a"]))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(params["b"]), 2 * x.T @ g, 1e-4, 1e-4)


def test_gradients_go_straight_through_to_inputs_and_dense_leaves():
    q, b, x = store(normal(N, K)), jnp.asarray(normal(K)), jnp.asarray(normal(3, K))

    def loss(b, factor, x):
        stored = q.replace(pre_quant_scale=factor)
        return jqx.quantized(lambda p, x: ((x + p["b"][None]) @ p["w"].T).sum())(
            {"w": stored, "b": b}, x
        )

    factor = jnp.asarray(np.exp(normal(K)))
    to_b, to_factor, to_x = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(b, factor, x)
    row = np.asarray(DECODE(q)).sum(0) * np.asarray(factor)
    np.testing.assert_allclose(to_x, np.tile(row, (3, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(to_b, 3 * row, rtol=1e-4, atol=1e-5)
    want = ((np.asarray(x) + np.asarray(b)) * np.asarray(DECODE(q)).sum(0)).sum(0)
    np.testing.assert_allclose(to_factor, want, rtol=1e-4, atol=1e-4)


def test_vmap_over_a_batch_and_over_models():
    w, x = normal(2, N, K), jnp.asarray(normal(2, 3, K) * 9)
    f = jqx.quantized(lambda w, x: x @ w.T)
    many = store(w, input_scale=np.float32([0.01, 0.03]))
    got, single, batch = jax.jit(jax.vmap(f))(many, x), jax.jit(f), jax.jit(jax.vmap(f, (None, 0)))
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[i], many)
        np.testing.assert_allclose(got[i], single(one, x[i]), 1e-5, 1e-4)
        np.testing.assert_allclose(batch(one, x)[i], single(one, x[i]), 1e-5, 1e-4)


def test_a_stack_in_one_product_when_all_members_see_the_same_inputs():
    w, x = normal(3, N, K), normal(2, K) * 9
    q = store(w, input_format="fp8_token")
    got = run(lambda p, x: jnp.einsum("bk,enk->ebn", x, p["w"]), {"w": q}, x)
    want = np.einsum("bk,enk->ebn", rounded(x, "fp8_token", None), np.asarray(DECODE(q)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


# --- named activations


def test_named_activations_are_replaced_and_keep_their_name():
    w, x = jnp.asarray(normal(K, K)), jnp.asarray(normal(2, K))

    def f(p, x):
        h = jax.jit(lambda x: checkpoint_name(x @ p["w"], "h"))(x)
        return checkpoint_name(h, "other") + 1

    g = jqx.quantized(f, {"h": lambda h: 2 * h})
    np.testing.assert_allclose(jax.jit(g)({"w": w}, x), 2 * (x @ w) + 1, 1e-5, 1e-4)
    q = store(w, input_format=None)
    np.testing.assert_allclose(jax.jit(g)({"w": q}, x), 2 * (x @ DECODE(q)) + 1, 1e-5, 1e-4)
    assert [u.path for u in uses(lambda p, x: g({"w": q}, x), {}, x)] == ["h", "other"]


# --- what would be silently wrong is refused

TREATED = store(normal(K, K))
STACK = stacked()
REFUSED = {
    "sliced": (TREATED, lambda w, x: x[:, :8] @ w[:8], "a product as it is"),
    "scaled": (TREATED, lambda w, x: x @ (w * 2).T, "a product as it is"),
    "masked": (TREATED, lambda w, x: (x[None] * w[:, None]).sum(-1), "a product as it is"),
    "of one row": (
        store(normal(1, K)),
        lambda w, x: (x * w.reshape(1, K)).sum(-1),
        "a product as it is",
    ),
    "added to": (TREATED, lambda w, x: x @ (w + jnp.eye(K)).T, "a product as it is"),
    "rotated": (
        TREATED,
        lambda w, x: x @ (jnp.asarray(np.eye(K, dtype=np.float32)) @ w).T,
        "a product as it is",
    ),
    "added": (TREATED, lambda w, x: x @ w.T + w[:2], "a product as it is"),
    "in a branch": (
        TREATED,
        lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w.T, lambda: x),
        "a branch",
    ),
    "in a while loop": (
        TREATED,
        lambda w, x: lax.while_loop(lambda h: h.sum() < 0, lambda h: h @ w.T, x),
        "a branch or a loop",
    ),
    "carried": (
        TREATED,
        lambda w, x: lax.scan(lambda c, _: ((c[0].T, c[1] @ c[0].T), None), (w, x), length=2)[0][1],
        "a product as it is",
    ),
    "convolved": (
        TREATED,
        lambda w, x: lax.conv(x[None, None], w[None, None], (1, 1), "SAME")[0, 0],
        "a product as it is",
    ),
    "the other axis": (TREATED, lambda w, x: x @ w, r"inputs along axis -1 of \(32, 32\)"),
    "a part of the inputs": (
        TREATED,
        lambda w, x: jnp.einsum("bhd,nhd->bhn", x.reshape(-1, 4, 8), w.reshape(K, 4, 8)),
        "8 inputs at once",
    ),
    "a stack at once": (STACK, lambda w, x: jnp.einsum("bk,enk->ebn", x, w), "scan over it"),
    "a stack in vmap": (
        STACK,
        lambda w, x: jax.vmap(lambda w: x @ w.T)(w),
        "scan over it",
    ),
    "a stack indexed": (STACK, lambda w, x: x @ w[0].T, "a product as it is"),
    "a stack turned and scanned": (
        STACK,
        lambda w, x: lax.scan(lambda h, v: (h @ v, None), x, w.swapaxes(1, 2))[0],
        "rearranged first",
    ),
    "a stack scanned and whole": (
        STACK,
        lambda w, x: lax.scan(lambda h, v: (h @ v.T + (x @ w[0].T), None), x, w)[0],
        "scan over it",
    ),
    "a stack scanned within itself": (
        STACK,
        lambda w, x: lax.scan(lambda h, v: (h @ v.T + jnp.einsum("bk,enk->bn", x, w), None), x, w)[
            0
        ],
        "scan over it",
    ),
}


@pytest.mark.parametrize(("q", "f", "message"), REFUSED.values(), ids=REFUSED)
def test_an_input_that_would_not_be_quantized_is_refused(q, f, message):
    x = jnp.asarray(normal(2, K))
    with pytest.raises(InputError, match=rf"^layer\.w .*{message}"):
        jax.eval_shape(jqx.quantized(f_of(f)), {"layer": {"w": q}}, x)


def test_weights_alone_may_be_used_in_any_way():
    """All the ways above, decoded."""
    ways = {name: (q.replace(input_format=None), f) for name, (q, f, _) in REFUSED.items()}
    x = jnp.asarray(normal(2, K))

    def f(p, x):
        return {name: f(p[name], x) for name, (_, f) in ways.items()}

    got = jax.jit(jqx.quantized(f))({name: q for name, (q, _) in ways.items()}, x)
    want = jax.jit(f)({name: DECODE(q) for name, (q, _) in ways.items()}, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


WRONG = {
    "low rank": ({"low_rank": (jnp.ones((N, 2)), jnp.ones((2, K)))}, "has a low-rank part"),
    "a scale too many": ({"input_scale": jnp.ones(2)}, r"input_scale .* shape \(2,\), not \(\)"),
    "a factor too many": ({"pre_quant_scale": jnp.ones(N)}, r"shape \(16,\), not \(32,\)"),
    "no format": ({"input_format": "fp9"}, "unknown input format of layer.w 'fp9'"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_fields_that_do_not_fit_are_refused(fields, message):
    q = dataclasses.replace(store(normal(N, K)), **fields)
    with pytest.raises(InputError, match=message):
        jqx.quantized(f_of(lambda w, x: x @ w.T))({"layer": {"w": q}}, jnp.ones((2, K)))


def test_inputs_that_are_no_whole_blocks_are_refused():
    q = store(normal(N, 24), input_format="nvfp4")
    with pytest.raises(InputError, match="layer.w has 24 inputs, and nvfp4 quantizes 16 together"):
        jqx.quantized(f_of(lambda w, x: x @ w.T))({"layer": {"w": q}}, jnp.ones((2, 24)))


def test_names_that_are_not_given_are_refused():
    def f(p, x):
        h = checkpoint_name(x, "h")
        return lax.cond(x[0, 0] > 0, lambda: checkpoint_name(h, "inside"), lambda: h)

    x = jnp.ones((2, K))
    for name in ("k", "inside"):
        with pytest.raises(InputError, match=f"no activation is called {name}, .* there are h$"):
            jqx.quantized(f, {name: lambda x: x})({}, x)


def test_two_parameters_of_one_name_are_refused():
    tree = {"params": {"w": store(normal(K, K))}, "w": jnp.ones((K, K))}
    with pytest.raises(InputError, match="two parameters are called w"):
        jqx.quantized(lambda p, x: x @ p["params"]["w"].T)(tree, jnp.ones((2, K)))
