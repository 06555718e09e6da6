# SPDX-License-Identifier: Apache-2.0
"""Observing functions of parameters, in every layout and framework; expected statistics are
computed by hand in NumPy.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from observing import by_channel, channel_amax, dot_uses, f_of, normal, observed

from jqx import InputError
from jqx.transforms import Use, observe, untracked, uses

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
