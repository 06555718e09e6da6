# SPDX-License-Identifier: Apache-2.0
"""Cases of the zoo in Flax Linen with loops: a decoder whose layers are stacked along axis 1, as in
MaxText, and recurrent cells that are run over time.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from by_hand import Layers, attended, by_path
from zoo import Draws
from zoo_linen import HEADS, C, D, linen


class DecoderLayer(nn.Module):
    """Attention with kernels by head, and a gated MLP."""

    @nn.compact
    def __call__(self, x, mask):
        heads = lambda name: nn.DenseGeneral((HEADS, C), use_bias=False, name=name)  # noqa: E731
        h = nn.RMSNorm(name="before_attention")(x)
        q, k, v = heads("query")(h), heads("key")(h), heads("value")(h)
        mixed = nn.dot_product_attention(q, k, v, mask=mask)
        x = x + nn.DenseGeneral(D, axis=(-2, -1), use_bias=False, name="out")(mixed)
        h = nn.RMSNorm(name="before_mlp")(x)
        gate = nn.Dense(32, use_bias=False, name="wi_0")(h)
        up = nn.Dense(32, use_bias=False, name="wi_1")(h)
        return x + nn.Dense(D, use_bias=False, name="wo")(nn.silu(gate) * up), None


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(12, D, name="embed")
        layer = nn.remat(
            DecoderLayer, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable
        )
        stack = nn.scan(
            layer,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
        )
        x, _ = stack(name="layers")(embed(ids), nn.make_causal_mask(ids, dtype=bool))
        return nn.Dense(12, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


def decoder_by_hand(params, args, at):
    model, (ids,) = Layers(at, by_path(params)), args
    x = model.p["embed.embedding"][ids]
    for i in range(2):
        own = model.of("layers.", i, axis=1)
        h = own.rms_norm("layers.before_attention", x)
        q, k, v = (own.dense(f"layers.{name}", h) for name in ("query", "key", "value"))
        x = x + own.dense("layers.out", attended(q, k, v, causal=True), summed=2)
        h = own.rms_norm("layers.before_mlp", x)
        gate, up = own.dense("layers.wi_0", h), own.dense("layers.wi_1", h)
        x = x + own.dense("layers.wo", jax.nn.silu(gate) * up)
    return model.dense("head", model.rms_norm("norm", x))


def decoder():
    inputs = ("query", "key", "value", "wi_0", "wi_1", "wo")
    stacked = {f"layers.{name}.kernel": (0,) for name in inputs} | {"layers.out.kernel": (0, 2)}
    return linen(
        Decoder(),
        Draws().ids(12, 2, 5),
        by_hand=decoder_by_hand,
        eager=False,
        contracted={"embed.embedding": (1,), "head.kernel": (0,), **stacked},
        stack=dict.fromkeys(stacked, (1,)),
        looked_up=("embed.embedding",),
    )


def lstm_by_hand(params, args, at):
    p, (x,) = by_path(params), args
    c = h = jnp.zeros((x.shape[0], D), x.dtype)
    outs = []
    for t in range(x.shape[1]):
        cell = Layers(at, p, index=(t,))
        i, f, g, o = (
            cell.dense(f"cell.i{gate}", x[:, t]) + cell.dense(f"cell.h{gate}", h) for gate in "ifgo"
        )
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        outs.append(h)
    return jnp.stack(outs, 1)


def gru_by_hand(params, args, at):
    p, (x,) = by_path(params), args
    h = jnp.zeros((x.shape[0], D), x.dtype)
    outs = []
    for t in range(x.shape[1]):
        cell = Layers(at, p, index=(t,))
        of_x = {gate: cell.dense(f"cell.i{gate}", x[:, t]) for gate in "rzn"}
        of_h = {gate: cell.dense(f"cell.h{gate}", h) for gate in "rzn"}
        r, z = (jax.nn.sigmoid(of_x[gate] + of_h[gate]) for gate in "rz")
        h = (1 - z) * jnp.tanh(of_x["n"] + r * of_h["n"]) + z * h
        outs.append(h)
    return jnp.stack(outs, 1)


def recurrent(cell, by_hand, gates):
    contracted = {f"cell.{source}{gate}.kernel": (0,) for source in "ih" for gate in gates}
    return linen(
        nn.RNN(cell), Draws()(2, 4, D), by_hand=by_hand, contracted=contracted, eager=False
    )


CASES = {
    "linen decoder stacked along axis 1": decoder,
    "linen lstm": lambda: recurrent(nn.LSTMCell(D), lstm_by_hand, "ifgo"),
    "linen lstm of joined kernels": lambda: recurrent(
        nn.OptimizedLSTMCell(D), lstm_by_hand, "ifgo"
    ),
    "linen gru": lambda: recurrent(nn.GRUCell(D), gru_by_hand, "rzn"),
}
