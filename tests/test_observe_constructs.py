# SPDX-License-Identifier: Apache-2.0
"""Observing through loops, nested jit and custom rules, and the list of what is not observed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from observing import by_channel, f_of, normal, observed

from jqx.transforms import Use, untracked, uses

# --- constructs that are walked


def stack(params, x):
    """Three layers of their own weights and gains, and a projection they share."""

    def layer(h, own):
        weight, gain = own
        h = jax.nn.silu((h * gain[None]) @ weight.T)
        return checkpoint_name(h, "act") @ params["shared"], None

    return lax.scan(layer, x, (params["own"], params["gains"]))[0]


def test_scan_stacks_what_it_takes_apart_and_merges_what_is_shared():
    params = {"own": normal(3, 5, 8), "gains": normal(3, 8), "shared": normal(5, 8)}
    x = normal(2, 8)
    found = observed(stack, params, x)
    own, act, h = [], [], np.float64(x)
    for weight, gain in zip(params["own"], params["gains"], strict=True):
        own.append(by_channel(h * gain))
        h = (h * gain) @ weight.T
        act.append(h / (1 + np.exp(-h)))
        h = act[-1] @ params["shared"]
    np.testing.assert_allclose(found["own"], own, rtol=1e-4)
    np.testing.assert_allclose(found["act"], [np.abs(a).max() for a in act], rtol=1e-4)
    np.testing.assert_allclose(found["shared"], np.max([by_channel(a) for a in act], 0), rtol=1e-4)
    assert uses(stack, params, x) == [
        Use("gains", "elementwise"),
        Use("own", "dot", (1,), (2,), (0,)),
        Use("act", "name"),
        Use("shared", "dot", (1,), (0,)),
    ]
    assert untracked(stack, params, x) == []
    total = observed(stack, params, x, merge=jnp.add)
    np.testing.assert_allclose(total["shared"], np.sum([by_channel(a) for a in act], 0), rtol=1e-4)


def test_scan_in_scan_merges_inner_iterations_of_an_outer_slice():
    def recurrent(params, xs):
        def layer(h, w):
            return lax.scan(lambda c, x: (jnp.tanh(c + x @ w), None), h, xs)[0], None

        return lax.scan(layer, jnp.zeros(8), params["w"])[0]

    params, xs = {"w": normal(2, 8, 8)}, normal(4, 8)
    found = observed(recurrent, params, xs)
    np.testing.assert_array_equal(found["w"], [by_channel(xs)] * 2)


def test_fori_loop_merges_its_iterations():
    def power(params, x):
        return lax.fori_loop(0, 3, lambda _, h: h @ params["w"], x)

    params, x = {"w": normal(8, 8)}, normal(2, 8)
    h = [x, x @ params["w"], x @ params["w"] @ params["w"]]
    want = np.max([by_channel(a) for a in h], 0)
    np.testing.assert_allclose(observed(power, params, x)["w"], want, rtol=1e-5)


def test_nested_jit_and_custom_rules_around_a_weight():
    @jax.custom_jvp
    def forward(w, x):
        return x @ w

    forward.defjvp(lambda p, t: (forward(*p), forward(p[0], t[1])))

    @jax.custom_vjp
    def straight(w, x):
        return x @ w

    straight.defvjp(lambda w, x: (x @ w, w), lambda w, g: (None, g @ w.T))

    @jax.jit
    def inner(p, x):
        return jax.checkpoint(lambda p, x: straight(p["c"], jax.nn.relu(forward(p["b"], x))))(p, x)

    def f(p, x):
        return inner(p, jax.nn.gelu(jax.jit(lambda a, x: x @ a)(p["a"], x)))

    params, x = {name: normal(8, 8) for name in "abc"}, normal(3, 8)
    found = observed(f, params, x)
    h = jax.nn.gelu(x @ params["a"])
    np.testing.assert_array_equal(found["a"], by_channel(x))
    np.testing.assert_allclose(found["b"], by_channel(h), rtol=1e-5)
    np.testing.assert_allclose(
        found["c"], by_channel(np.maximum(h @ params["b"], 0)), rtol=1e-4, atol=1e-6
    )


def test_names_are_found_in_constructs_that_no_parameter_enters():
    def f(p, x):
        h = jax.jit(lambda h: jax.nn.relu(checkpoint_name(2 * h, "inside")))(x)
        return h @ p["w"]

    params, x = {"w": normal(8, 8)}, normal(3, 8)
    assert observed(f, params, x)["inside"] == 2 * np.abs(x).max()


# --- what is not observed

W = (8, 8)


def unwalked(f, x):
    """A construct without a rule."""
    return lax.custom_linear_solve(lambda y: y, x, lambda _, b: f(b))


UNTRACKED = {
    "scaled": (lambda w, x: x @ (w * 2), True),
    "scaled by an activation": (lambda w, x: x @ (w * x[0, 0]), True),
    "sliced": (lambda w, x: x[:, :4] @ w[:4], False),
    "indexed": (lambda w, x: x[:, :1] @ w[None, 3], False),
    "every other row": (lambda w, x: x[:, :4] @ w[::2], False),
    "sliced across": (lambda w, x: x[:, :6] @ w.reshape(64)[3:51].reshape(6, 8), True),
    "concatenated": (lambda w, x: x @ jnp.concatenate([w, w], 1), False),
    "concatenated with zeros": (lambda w, x: x @ jnp.concatenate([w, jnp.zeros_like(w)], 1), True),
    "concatenated with an activation": (lambda w, x: x @ jnp.concatenate([w, x], 1), True),
    "times another": (lambda w, x: x @ (w @ w.T), True),
    "plus a product": (lambda w, x: x @ (w + w @ w), True),
    "rotated by a constant": (lambda w, x: x @ (w @ np.eye(8, dtype=np.float32)), True),
    "multiplied into": (lambda w, x: x * w, True),
    "mixed by a reshape": (
        lambda w, x: x[:, :6] @ jnp.pad(w, ((0, 1), (0, 0))).reshape(6, 12),
        True,
    ),
    "in a while loop": (
        lambda w, x: lax.while_loop(lambda h: h.sum() < 0, lambda h: h @ w, x),
        False,
    ),
    "in the test of a while loop": (
        lambda w, x: lax.while_loop(lambda h: (h @ w).sum() < 0, lambda h: h + 1, x),
        True,
    ),
    "in a branch": (lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x), False),
    "chosen by a branch": (lambda w, x: x @ lax.cond(x[0, 0] > 0, lambda: w, lambda: w.T), True),
    "a branch or an activation": (
        lambda w, x: x @ lax.cond(x[0, 0] > 0, lambda: w, lambda: x),
        True,
    ),
    "looked up by number": (lambda w, x: x @ jnp.take(w, jnp.array([3, 1]), 0).T, True),
    "carried": (
        lambda w, x: lax.scan(lambda c, _: ((c[0].T, c[1] @ c[0]), None), (w, x), length=2)[0][1],
        True,
    ),
    "scaled in a scan": (
        lambda w, x: lax.scan(lambda h, row: (h @ jnp.outer(row, row), None), x, w)[0],
        True,
    ),
    "convolved": (lambda w, x: lax.conv(x[None, None], w[None, None], (1, 1), "SAME")[0, 0], False),
    "used and scaled": (lambda w, x: x @ w + x @ (2 * w), True),
    "a bias": (lambda w, x: x + w, False),
    "a broadcast gain": (lambda w, x: x * (1 + w[:, :1]).reshape(1, 8), False),
    "a penalty": (lambda w, x: jnp.sum(x @ w) + 0.1 * jnp.sum(w**2), False),
    "not used": (lambda w, x: x, False),
    "fenced": (lambda w, x: lax.optimization_barrier((x, w))[0] @ lax.stop_gradient(w), False),
}


@pytest.mark.parametrize(("f", "escapes"), UNTRACKED.values(), ids=UNTRACKED)
def test_what_is_not_observed_is_listed(f, escapes):
    params, x = {"layer": {"w": jax.ShapeDtypeStruct(W, jnp.float32)}}, normal(8, 8)
    assert untracked(f_of(f), params, x) == (["layer.w"] if escapes else [])


def test_a_parameter_can_be_observed_in_one_place_and_untracked_in_another():
    def f(p, x):
        return x @ p["w"] + x @ (2 * p["w"])

    params, x = {"w": normal(8, 8)}, normal(2, 8)
    np.testing.assert_array_equal(observed(f, params, x)["w"], by_channel(x))
    assert untracked(f, params, x) == ["w"]


def test_a_name_in_a_construct_that_is_not_walked_is_listed():
    def f(p, x):
        return unwalked(lambda x: checkpoint_name(x @ p["w"], "h"), x)

    assert untracked(f, {"w": normal(8, 8)}, normal(8, 8)) == ["h", "w"]


def test_even_a_gain_is_listed_in_a_construct_that_is_not_walked():
    def f(p, x):
        return unwalked(lambda x: x * p["gain"][None], x)

    assert untracked(f, {"gain": normal(8)}, normal(3, 8)) == ["gain"]
