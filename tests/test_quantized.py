# SPDX-License-Identifier: Apache-2.0
"""Functions of dense parameters on QTensors: what they compute is what one gets who decodes the
weights, quantizes the inputs by hand, and calls the function.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from observing import dot_uses, f_of, normal
from storing import DECODE, ENCODE, SCALE, K, N, rounded, run, store
from test_observe import LAYOUTS

import jqx
from jqx.formats import FORMATS
from jqx.transforms import uses
from jqx.transforms.decoding import decoded_after

# --- a linear


def test_a_linear_multiplies_decoded_weights_and_quantized_inputs():
    w, x = {name: normal(16, 128) for name in reference.ROWS}, normal(3, 128) * 9
    stored = {name: store(w[name], name, input_format=None) for name in reference.ROWS}
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


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_not_decoded_before_the_activation_is_there(name):
    """What a program does not use it does not take."""
    q, latest = store(normal(4, 128), name), jax.ShapeDtypeStruct((3, 77), jnp.float32)
    assert "3x77xf32" in jax.jit(decoded_after).lower(latest, q).as_text()


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
