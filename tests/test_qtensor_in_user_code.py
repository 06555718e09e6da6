# SPDX-License-Identifier: Apache-2.0
"""QTensors among the parameters of other people's code: loops over layers, experts, gradients,
adapters, donation, optimizers, checkpoints.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import reference
from functions import IDS, MEMBERS, MODEL, K, N, config, draw, model, same
from jax import lax
from storing import DECODE

import jqx

CFG = config(weight="nvfp4", input="fp8")


def quantized(f, w, x, cfg=CFG):
    """The weight stored, with the scales of its inputs in `f(w, x)`."""
    return jqx.quantize(w, cfg, jqx.calibrate(f, w, [x], cfg))


def step(h, v):
    return jnp.tanh(h @ v), None


def python_loop(w, x):
    for i in range(w.shape[0]):
        x = step(x, w[i])[0]
    return x


def while_loop(w, x):
    def body(state):
        return state[0] + 1, step(state[1], w[state[0]])[0]

    return lax.while_loop(lambda state: state[0] < w.shape[0], body, (0, x))[1]


LOOPS = {
    "scan": (0, lambda w, x: lax.scan(step, x, w)[0]),
    "scan of axis 1": (1, lambda w, x: lax.scan(step, x, jnp.moveaxis(w, 1, 0))[0]),
    "scan of a jit": (0, lambda w, x: lax.scan(jax.jit(step), x, w)[0]),
    "scan of a remat": (0, lambda w, x: lax.scan(jax.checkpoint(step), x, w)[0]),
    "scan of numbers": (
        0,
        lambda w, x: lax.scan(lambda h, i: step(h, w[i]), x, jnp.arange(w.shape[0]))[0],
    ),
    "python": (0, python_loop),
    "fori": (0, lambda w, x: lax.fori_loop(0, w.shape[0], lambda i, h: step(h, w[i])[0], x)),
    "fori along axis 1": (
        1,
        lambda w, x: lax.fori_loop(0, w.shape[1], lambda i, h: step(h, w[:, i])[0], x),
    ),
    "while": (0, while_loop),
}


@pytest.mark.parametrize(("axis", "f"), LOOPS.values(), ids=LOOPS)
def test_layers_in_a_loop_are_decoded_and_quantize_their_inputs_one_by_one(axis, f):
    layers, x = np.asarray(draw(MEMBERS, K, K)) / 4, draw(4, K)
    w = jnp.asarray(np.moveaxis(layers, 0, axis))
    q = quantized(f, w, x)
    assert (q.stack, q.input_scale.shape) == ((axis,), (MEMBERS,))
    want = np.asarray(x)
    for layer, scale in zip(layers, np.asarray(q.input_scale), strict=True):
        decoded = reference.decode(np.ascontiguousarray(layer.T), "nvfp4").T
        want = np.tanh(reference.activation(want, "fp8", scale) @ decoded)
    np.testing.assert_allclose(jax.jit(jqx.quantized(f))(q, x), want, rtol=1e-4, atol=1e-4)


# Format -> how much memory a program may use beside its arguments, in decoded layers, of 8. XLA's
# CPU, which has no slices of float8, makes a float16 copy of the codes of all of them.
MEMORY = {"nvfp4": 2, "int8": 2, "fp8": 5.5}


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.parametrize("loop", ["scan", "scan of axis 1", "python", "fori", "while"])
def test_one_layer_is_decoded_at_a_time(loop, name):
    (axis, f), x = LOOPS[loop], draw(2, 64)
    w = jnp.moveaxis(draw(8, 64, 64), 0, axis)
    q = jqx.quantize(w, config(weight=name), axes=jqx.axes(f, w, x))
    run = jax.jit(jqx.quantized(f))
    assert not re.findall(r"f32\[(8,64,64|64,8,64)\]", str(jax.make_jaxpr(run)(q, x)))
    used = run.lower(q, x).compile().memory_analysis().temp_size_in_bytes
    assert used < MEMORY[name] * 4 * 64 * 64


def test_experts_inside_and_outside_of_a_function():
    """A batch dimension, vmap inside of the function, and vmap of the quantized function."""
    w, x = draw(MEMBERS, K, N), draw(MEMBERS, 5, K)
    ways = {
        "einsum": lambda w, x: jnp.einsum("ebk,ekn->ebn", x, w),
        "vmap": lambda w, x: jax.vmap(lambda v, y: y @ v)(w, x),
    }
    stored = {name: quantized(f, w, x) for name, f in ways.items()}
    same(stored["einsum"], stored["vmap"])
    q = stored["vmap"]
    assert (q.stack, q.input_scale.shape) == ((0,), (MEMBERS,))
    rounded = [
        reference.activation(np.asarray(one), "fp8", scale)
        for one, scale in zip(x, np.asarray(q.input_scale), strict=True)
    ]
    want = np.einsum("ebk,ekn->ebn", np.stack(rounded), DECODE(q))
    outside = jax.vmap(jqx.quantized(lambda v, y: y @ v))
    for f in (*(jqx.quantized(f) for f in ways.values()), outside):
        np.testing.assert_allclose(jax.jit(f)(q, x), want, rtol=1e-4, atol=1e-4)


def test_every_row_meets_the_same_stored_expert():
    """Weights that are not batched are decoded once."""
    w, x = draw(K, N), draw(6, 5, K)
    f = lambda w, x: x @ w  # noqa: E731
    q = quantized(f, w, x[0], config(weight="nvfp4"))
    many = jax.jit(jax.vmap(jqx.quantized(f), (None, 0)))
    assert "f32[6,32,16]" not in str(jax.make_jaxpr(many)(q, x))
    np.testing.assert_allclose(
        many(q, x), np.asarray(x) @ np.asarray(DECODE(q)), rtol=1e-5, atol=1e-5
    )


ONE = {
    "scan": (lambda w, x: lax.scan(step, x, w)[0], (4, K)),
    "batch": (lambda w, x: jnp.einsum("ebk,ekn->ebn", x, w), (1, 4, K)),
    "ragged": (lambda w, x: lax.ragged_dot(x, w, jnp.full(1, 4, jnp.int32)), (4, K)),
}


@pytest.mark.parametrize(("f", "shape"), ONE.values(), ids=ONE)
def test_a_stack_of_one_member(f, shape):
    w, x = draw(1, K, K) / 4, draw(*shape)
    q = quantized(f, w, x)
    assert q.input_scale.size == 1
    scale = np.asarray(q.input_scale).reshape(())
    y = reference.activation(np.asarray(x), "fp8", scale) @ np.asarray(DECODE(q))[0]
    want = np.tanh(y) if f is ONE["scan"][0] else y
    np.testing.assert_allclose(jax.jit(jqx.quantized(f))(q, x), want, rtol=1e-4, atol=1e-4)


# --- gradients, adapters, optimizers


def adapted(p, x):
    """Two linears; the first has a low-rank adapter beside it."""
    a, b = p["lora"]["a"], p["lora"]["b"]
    h = jnp.tanh(x @ p["up"] + (x @ a) @ b)
    return h @ p["down"]


FROZEN = {"up": draw(K, N), "down": draw(N, K)}
LORA = {"a": draw(K, 4) / 6, "b": draw(4, N) / 6}
BASE = config(
    jqx.Rule(weight="nvfp4", input="fp8"), jqx.Rule(path_glob="lora", weight=None, input=None)
)


def adapter_on_stored_weights(x):
    params = FROZEN | {"lora": LORA}
    q = jqx.quantize(params, BASE, jqx.calibrate(adapted, params, [x], BASE))
    assert all(q["lora"][name] is LORA[name] for name in LORA)
    return {name: q[name] for name in FROZEN}


def test_gradients_reach_inputs_and_adapters_straight_through():
    x, target = draw(5, K), draw(5, K, seed=1)
    frozen = adapter_on_stored_weights(x)

    def loss(lora, x):
        y = jqx.quantized(adapted)(frozen | {"lora": lora}, x)
        return ((y - target) ** 2).sum()

    def rounded(x, q):
        y = reference.activation(np.asarray(x), "fp8", np.asarray(q.input_scale))
        return x + jnp.asarray(y - np.asarray(x))  # a constant away: the gradient is one

    up, down = DECODE(frozen["up"]), DECODE(frozen["down"])
    h = jnp.tanh(rounded(x, frozen["up"]) @ up + (x @ LORA["a"]) @ LORA["b"])

    def by_hand(lora, x):
        mine = jnp.tanh(rounded_x + (x - x0) @ up + (x @ lora["a"]) @ lora["b"])
        return ((rounded_h + (mine - h) @ down - target) ** 2).sum()

    x0, rounded_x = x, rounded(x, frozen["up"]) @ up
    rounded_h = rounded(h, frozen["down"]) @ down
    got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(LORA, x)
    want = jax.jit(jax.value_and_grad(by_hand, argnums=(0, 1)))(LORA, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)


def test_an_adapter_is_trained_beside_stored_weights():
    x, target = draw(16, K), jnp.tanh(draw(16, K, seed=1))
    frozen, optimizer = adapter_on_stored_weights(x), optax.sgd(0.1, momentum=0.9)

    def loss(lora, frozen):
        return ((jqx.quantized(adapted)(frozen | {"lora": lora}, x) - target) ** 2).mean()

    @jax.jit
    def train(lora, state, frozen):
        value, grads = jax.value_and_grad(loss)(lora, frozen)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(lora, updates), state, value

    lora, state, losses = LORA, optimizer.init(LORA), []
    for _ in range(30):
        lora, state, value = train(lora, state, frozen)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]


def test_a_tree_with_stored_weights_is_donated():
    def halved(p):
        dense = jax.tree.map(lambda x: x / 2, jqx.dequantize(p))
        return jqx.quantize(dense, "int8_weight_only", axes=-2)

    bias = {"bias": jnp.ones(K)}
    q = jqx.quantize(FROZEN | bias, "int8_weight_only", axes=-2)
    want = jax.tree.map(np.asarray, jax.jit(halved)(q))
    out = jax.jit(halved, donate_argnums=0)(q)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((q["up"], q["down"])))
    same(jax.tree.map(np.asarray, out), want)


# --- checkpoints


@pytest.mark.parametrize("name", ["nvfp4", "int8"])
def test_orbax_restores_from_shapes_of_what_was_saved_or_will_be_quantized(name, tmp_path):
    stats = jqx.calibrate(model, MODEL, IDS, name)
    q = jqx.quantize(MODEL, name, stats)
    saved, planned = (
        jax.eval_shape(lambda: q),
        jax.eval_shape(lambda p: jqx.quantize(p, name, stats), MODEL),
    )
    assert saved == planned
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "q", q)
        checkpointer.wait_until_finished()
        same(checkpointer.restore(tmp_path / "q", planned), q)
