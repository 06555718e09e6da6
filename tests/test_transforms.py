# SPDX-License-Identifier: Apache-2.0
"""Observing functions of parameters; expected statistics are computed by hand in NumPy."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jqx import InputError
from jqx.transforms import Use, observe, untracked, uses, views

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def channel_amax(use, x):
    """The largest magnitude of each channel, in the parameter's order; nothing for lookups."""
    if use.op == "gather":
        return None
    if use.op == "name":
        return jnp.max(jnp.abs(x))
    others = [i for i in range(x.ndim) if i not in use.activation_axes]
    moved = jnp.transpose(x, (*others, *use.activation_axes))
    channels = math.prod(x.shape[i] for i in use.activation_axes)
    return jnp.max(jnp.abs(moved).reshape(-1, channels), axis=0)


def by_channel(x):
    """The definition: x [..., k] -> [k]."""
    return np.abs(np.asarray(x)).reshape(-1, x.shape[-1]).max(0)


def observed(f, params, *args, collect=channel_amax, **kwargs):
    """What is collected, eagerly and under jit, after checking that the outputs are f's own."""
    params, args = jax.tree.map(jnp.asarray, (params, args))
    g = observe(f, collect, **kwargs)
    out, found = g(params, *args)
    np.testing.assert_array_equal(out, f(params, *args))
    out, jitted = jax.jit(g)(params, *args)
    np.testing.assert_array_equal(out, jax.jit(f)(params, *args))
    assert found.keys() == jitted.keys()
    for path, what in found.items():
        np.testing.assert_allclose(what, jitted[path], rtol=1e-6)
    return found


def dot_uses(f, params, *args):
    return [u for u in uses(f, params, *args) if u.op != "elementwise"]


# Every layout of x [2, 3, 8] with a weight of 8 inputs and 4 outputs:
# function, shape of the weight, contracted axes in it and in x.
LAYOUTS = {
    "x @ w": (lambda w, x: x @ w, (8, 4), (0,), (2,)),
    "x @ w.T": (lambda w, x: x @ w.T, (4, 8), (1,), (2,)),
    "weight first": (
        lambda w, x: lax.dot_general(w, x, (([1], [2]), ([], []))),
        (4, 8),
        (1,),
        (2,),
    ),
    "weight first, channels first": (
        lambda w, x: lax.dot_general(w, x, (([0], [2]), ([], []))),
        (8, 4),
        (0,),
        (2,),
    ),
    "inputs in front": (
        lambda w, x: jnp.einsum("kbt,nk->nbt", x.transpose(2, 0, 1), w),
        (4, 8),
        (1,),
        (0,),
    ),
    "heads out": (
        lambda w, x: jnp.einsum("btk,hdk->bthd", x, w.reshape(2, 2, 8)),
        (4, 8),
        (1,),
        (2,),
    ),
    "heads in": (
        lambda w, x: jnp.einsum("bthd,khd->btk", x.reshape(2, 3, 2, 4), w.reshape(4, 2, 4)),
        (4, 8),
        (1,),
        (2, 3),
    ),
    "heads in, other order": (
        lambda w, x: jnp.einsum(
            "btdh,khd->btk", x.reshape(2, 3, 2, 4).swapaxes(2, 3), w.reshape(4, 2, 4)
        ),
        (4, 8),
        (1,),
        (3, 2),
    ),
    "inputs on two axes": (
        lambda w, x: lax.dot_general(x.reshape(6, 2, 4), w, (([1, 2], [0, 1]), ([], []))),
        (2, 4, 4),
        (0, 1),
        (1, 2),
    ),
    "flattened": (lambda w, x: x @ w.reshape(8, 4), (2, 4, 2, 2), (0, 1), (2,)),
    "squeezed": (lambda w, x: x @ jnp.squeeze(w, 1).T, (4, 1, 8), (2,), (2,)),
    "broadcast": (
        lambda w, x: jnp.einsum("btk,bnk->btn", x, jnp.broadcast_to(w, (2, 4, 8))),
        (4, 8),
        (1,),
        (2,),
    ),
    "cast": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16).T, (4, 8), (1,), (2,)),
    "expanded": (lambda w, x: (x[:, :, None] @ w[None].transpose(0, 2, 1))[0], (4, 8), (1,), (3,)),
    "experts": (lambda w, x: jnp.einsum("btk,enk->betn", x, w), (3, 4, 8), (2,), (2,)),
}


@pytest.mark.parametrize(
    ("f", "shape", "weight_axes", "activation_axes"), LAYOUTS.values(), ids=LAYOUTS
)
def test_every_layout_of_a_linear_is_one_use(f, shape, weight_axes, activation_axes):
    params, x = {"layer": {"w": normal(*shape)}}, normal(2, 3, 8)
    (use,) = dot_uses(f_of(f), params, x)
    assert use == Use("layer.w", "dot", activation_axes, weight_axes)
    assert untracked(f_of(f), params, x) == []
    got = observed(f_of(f), params, x)["layer.w"]
    want = by_channel(x.astype(got.dtype).astype(np.float32))
    np.testing.assert_array_equal(got.astype(np.float32), want)


def f_of(f):
    return lambda params, x: f(params["layer"]["w"], x)


def test_products_of_activations_are_no_uses_and_names_are():
    def attention(params, x):
        q, k, v = (x @ params[name].T for name in ("q", "k", "v"))
        k, v = checkpoint_name(k, "k_cache"), checkpoint_name(v, "v_cache")
        scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k))
        return jnp.einsum("bqk,bkd->bqd", scores, v) @ params["o"].T

    params, x = {name: normal(8, 8) for name in "qkvo"}, normal(2, 5, 8)
    found = observed(attention, params, x)
    assert found.keys() == {"q", "k", "v", "o", "k_cache", "v_cache"}
    for name in "qkv":
        np.testing.assert_array_equal(found[name], by_channel(x))
    np.testing.assert_allclose(found["k_cache"], np.abs(x @ params["k"].T).max(), rtol=1e-5)
    q, k, v = (np.float64(x @ params[name].T) for name in "qkv")
    e = np.exp(q @ k.swapaxes(1, 2))
    np.testing.assert_allclose(found["o"], by_channel(e / e.sum(-1, keepdims=True) @ v), rtol=1e-4)


def test_a_tied_embedding_is_seen_twice():
    def lm(params, ids):
        h = jnp.take(params["embed"], ids, axis=0)
        return jnp.tanh(h) @ params["embed"].T

    params, ids = {"embed": normal(10, 8)}, np.array([[1, 3], [9, 0]])
    assert uses(lm, params, ids) == [
        Use("embed", "gather", (), (0,)),
        Use("embed", "dot", (2,), (1,)),
    ]
    np.testing.assert_allclose(
        observed(lm, params, ids)["embed"], by_channel(np.tanh(params["embed"][ids])), rtol=1e-5
    )

    indices = observed(lm, params, ids, collect=lambda u, x: x if u.op == "gather" else None)
    np.testing.assert_array_equal(np.asarray(indices["embed"])[..., 0], ids)


class Block(nn.Module):
    @nn.compact
    def __call__(self, ids):
        h = nn.Embed(10, 8, name="embed")(ids)
        h = nn.LayerNorm(name="norm")(h)
        h = jax.nn.silu(nn.remat(nn.Dense)(6, name="up")(h))
        h = nn.DenseGeneral((2, 3), name="heads")(h)
        return nn.DenseGeneral(8, axis=(-2, -1), name="down")(h)


def test_linen_with_remat():
    ids = jnp.array([[1, 2, 3], [4, 5, 6]])
    variables = Block().init(jax.random.key(0), ids)
    p = jax.tree.map(np.asarray, variables["params"])
    found = observed(Block().apply, variables, ids)
    assert found.keys() == {"up.kernel", "heads.kernel", "down.kernel"}
    h = p["embed"]["embedding"][ids]
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found["up.kernel"], by_channel(h), rtol=1e-4)
    h = h @ p["up"]["kernel"]
    h = h / (1 + np.exp(-h))
    np.testing.assert_allclose(found["heads.kernel"], by_channel(h), rtol=1e-4)
    h = np.einsum("btk,khd->bthd", h, p["heads"]["kernel"]).reshape(2, 3, 6)
    np.testing.assert_allclose(found["down.kernel"], by_channel(h), rtol=1e-4)
    assert Use("down.kernel", "dot", (2, 3), (0, 1)) in uses(Block().apply, variables, ids)
    elementwise = {u.path for u in uses(Block().apply, variables, ids) if u.op == "elementwise"}
    assert elementwise == {"norm.scale", "norm.bias", "up.bias", "heads.bias", "down.bias"}
    assert untracked(Block().apply, variables, ids) == []


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 4, rngs=rngs)
        self.down = nnx.Linear(4, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def test_nnx():
    graph, state = nnx.split(Mlp(nnx.Rngs(0)))
    x = normal(2, 8)
    found = observed(lambda s, x: nnx.merge(graph, s)(x), state, x)
    np.testing.assert_array_equal(found["up.kernel"], by_channel(x))
    up = np.asarray(state["up"]["kernel"][...])
    np.testing.assert_allclose(found["down.kernel"], by_channel(np.maximum(x @ up, 0)), rtol=1e-5)


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
        Use("own", "dot", (1,), (2,)),
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


W = (8, 8)
UNTRACKED = {
    "scaled": (lambda w, x: x @ (w * 2), True),
    "scaled by an activation": (lambda w, x: x @ (w * x[0, 0]), True),
    "sliced": (lambda w, x: x[:, :4] @ w[:4], True),
    "indexed": (lambda w, x: x[:, :1] @ w[None, 3], True),
    "concatenated": (lambda w, x: x @ jnp.concatenate([w, w], 1), True),
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
        True,
    ),
    "in a branch": (lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x), True),
    "carried": (
        lambda w, x: lax.scan(lambda c, _: ((c[0].T, c[1] @ c[0]), None), (w, x), length=2)[0][1],
        True,
    ),
    "scaled in a scan": (
        lambda w, x: lax.scan(lambda h, row: (h @ jnp.outer(row, row), None), x, w)[0],
        True,
    ),
    "convolved": (lambda w, x: lax.conv(x[None, None], w[None, None], (1, 1), "SAME")[0, 0], True),
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
        return lax.cond(x[0, 0] > 0, lambda: checkpoint_name(x @ p["w"], "h"), lambda: x)

    assert untracked(f, {"w": normal(8, 8)}, normal(8, 8)) == ["h", "w"]


def test_names_are_found_in_constructs_that_no_parameter_enters():
    def f(p, x):
        h = jax.jit(lambda h: jax.nn.relu(checkpoint_name(2 * h, "inside")))(x)
        return h @ p["w"]

    params, x = {"w": normal(8, 8)}, normal(3, 8)
    assert observed(f, params, x)["inside"] == 2 * np.abs(x).max()


def test_even_a_gain_is_listed_in_a_construct_that_is_not_walked():
    def f(p, x):
        return lax.cond(x[0, 0] > 0, lambda: x * p["gain"][None], lambda: x)

    assert untracked(f, {"gain": normal(8)}, normal(3, 8)) == ["gain"]


def test_several_uses_are_merged_as_asked():
    def f(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"]

    params, x = {"w": normal(8, 8)}, normal(3, 8)
    a, b = by_channel(x), by_channel(np.tanh(x @ params["w"]))
    np.testing.assert_allclose(observed(f, params, x)["w"], np.maximum(a, b), rtol=1e-5)
    np.testing.assert_allclose(observed(f, params, x, merge=jnp.add)["w"], a + b, rtol=1e-5)
    with pytest.raises(InputError, match=r"w is used in ways.*\(3, 8\).*\(2, 8\)"):
        observe(lambda p, x: (x @ p["w"], x[:2] @ p["w"]), lambda u, x: x)(params, x)


def test_a_batch_may_be_closed_over_and_flags_stay_python():
    x = normal(2, 8)
    params = {"a": normal(8, 8), "b": normal(8, 8)}

    def f(p):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    assert observed(f, params).keys() == {"a", "b"}
    assert untracked(f, params) == []

    def flagged(p, x, deep):
        return x @ p["a"] @ p["b"] if deep else x @ p["a"]

    assert observe(flagged, channel_amax)(params, x, False)[1].keys() == {"a"}
    assert [u.path for u in uses(flagged, params, x, True)] == ["a", "b"]


def test_collecting_nothing_costs_no_entry():
    found = observed(
        f_of(lambda w, x: x @ w),
        {"layer": {"w": normal(8, 4)}},
        normal(2, 8),
        collect=lambda u, x: None,
    )
    assert found == {}


def test_pytrees_can_be_collected():
    def both(use, x):
        return {"amax": jnp.max(jnp.abs(x)), "tokens": jnp.int32(x.shape[0])}

    x = normal(3, 8)
    _, found = observe(f_of(lambda w, x: x @ w), both)({"layer": {"w": normal(8, 4)}}, x)
    assert float(found["layer.w"]["amax"]) == np.abs(x).max()
    assert int(found["layer.w"]["tokens"]) == 3


@st.composite
def rearrangements(draw):
    """A shape, and steps of numpy that rearrange an array of it."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3))
    steps, current = [], list(shape)
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            order = draw(st.permutations(range(len(current))))
            steps.append(("transpose", tuple(order)))
            current = [current[i] for i in order]
        else:
            size, new = math.prod(current), []
            while size > 1:
                new.append(draw(st.sampled_from([d for d in range(2, size + 1) if size % d == 0])))
                size //= new[-1]
            steps.append(("reshape", tuple(new)))
            current = new
    return shape, steps


@given(rearrangements())
def test_a_view_says_where_each_of_its_elements_lies(case):
    shape, steps = case
    data = np.arange(math.prod(shape)).reshape(shape)
    axes = views.parameter("w", shape).axes
    step = {"transpose": views.transposed, "reshape": views.reshaped}
    for name, argument in steps:
        data = getattr(np, name)(data, argument)
        axes = step[name](axes, argument)
        if axes is None:  # no box of the parameter any more: nothing is claimed
            return
    for index in np.ndindex(data.shape):
        place = dict.fromkeys(range(len(shape)), 0)
        for i, pieces in zip(index, axes, strict=True):
            sizes = [p.size for p in pieces]
            for piece, j in zip(pieces, np.unravel_index(i, sizes) if sizes else (), strict=True):
                place[piece.axis] += int(j) * piece.stride
        assert np.ravel_multi_index(tuple(place.values()), shape) == data[index]


def test_a_reshape_that_cuts_across_axes_is_not_a_view():
    axes = views.parameter("w", (4, 6)).axes
    assert views.reshaped(axes, (6, 4)) is None
    assert views.reshaped(axes, (2, 12)) is not None
