# SPDX-License-Identifier: Apache-2.0
"""Functions on QTensors inside scan, jit, remat, vmap and grad."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from observing import normal
from storing import DECODE, K, N, by_hand, layer, rounded, run, stacked, store

import jqx


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
