# SPDX-License-Identifier: Apache-2.0
"""Cases of the zoo in Equinox: the module is the parameters, functions and flags in it too."""

import equinox as eqx
import jax
import jax.numpy as jnp
from by_hand import Layers, attended, by_path, drawn
from jax import lax
from zoo import Case, Draws

D, HEADS = 16, 2


def case(f, make, *args, **fields):
    """A case of the module that `make` makes from a key."""
    params = drawn(eqx.filter_eval_shape(make, jax.random.key(0)))
    return Case(f=f, params=params, args=args, **fields)


@eqx.filter_jit
def each_token(model, x):
    return jax.vmap(model)(x)


def make_mlp(key):
    return eqx.nn.MLP(D, 8, 32, depth=2, key=key)


def mlp_by_hand(layers, x):
    for i in range(2):
        x = jax.nn.relu(layers.linear(f"layers.{i}", x))
    return layers.linear("layers.2", x)


def mlp():
    return case(
        each_token,
        make_mlp,
        Draws()(5, D),
        by_hand=lambda params, args, at: mlp_by_hand(Layers(at, by_path(params)), *args),
        contracted={f"layers.{i}.weight": (1,) for i in range(3)},
    )


class Block(eqx.Module):
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    drop: eqx.nn.Dropout
    scale: float = 0.5

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.norm = eqx.nn.LayerNorm(D)
        self.attention = eqx.nn.MultiheadAttention(HEADS, D, key=keys[0])
        self.up = eqx.nn.Linear(D, 32, key=keys[1])
        self.down = eqx.nn.Linear(32, D, use_bias=False, key=keys[2])
        self.drop = eqx.nn.Dropout(0.5, inference=True)

    def __call__(self, x):  # [t, D]
        h = jax.vmap(self.norm)(x)
        x = x + self.scale * self.attention(h, h, h)
        h = jax.nn.gelu(jax.vmap(self.up)(x))
        return x + jax.vmap(self.down)(self.drop(h))


BLOCK = [f"attention.{name}_proj" for name in ("query", "key", "value", "output")] + ["up", "down"]


def block_by_hand(layers, path, x):
    h = layers.layer_norm(f"{path}norm", x, gain="weight", eps=1e-5)
    heads = [
        layers.linear(f"{path}attention.{name}_proj", h).reshape(1, len(x), HEADS, -1)
        for name in ("query", "key", "value")
    ]
    mixed = attended(*heads).reshape(len(x), -1)
    x = x + 0.5 * layers.linear(f"{path}attention.output_proj", mixed)
    return x + layers.linear(f"{path}down", jax.nn.gelu(layers.linear(f"{path}up", x)))


class Stacked(eqx.Module):
    layers: Block

    def __init__(self, key):
        self.layers = eqx.filter_vmap(Block)(jax.random.split(key, 2))

    def __call__(self, x):
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def step(x, own):
            return eqx.combine(own, static)(x), None

        return lax.scan(step, x, arrays)[0]


def stacked_by_hand(params, args, at):
    layers, (x,) = Layers(at, by_path(params)), args
    for i in range(2):
        x = block_by_hand(layers.of("layers.", i), "layers.", x)
    return x


def stacked():
    contracted = {f"layers.{path}.weight": (2,) for path in BLOCK}
    return case(
        eqx.filter_jit(lambda model, x: model(x)),
        Stacked,
        Draws()(5, D),
        by_hand=stacked_by_hand,
        eager=False,
        contracted=contracted,
        stack=dict.fromkeys(contracted, (0,)),
    )


def ensemble_by_hand(params, args, at):
    layers, (xs,) = Layers(at, by_path(params)), args
    return jnp.stack([mlp_by_hand(layers.of("", i), x) for i, x in enumerate(xs)])


def ensemble():
    """Models side by side, each with its own inputs."""
    contracted = {f"layers.{i}.weight": (2,) for i in range(3)}
    return case(
        eqx.filter_vmap(each_token),
        lambda key: eqx.filter_vmap(make_mlp)(jax.random.split(key, 2)),
        Draws()(2, 5, D),
        by_hand=ensemble_by_hand,
        contracted=contracted,
        stack=dict.fromkeys(contracted, (0,)),
    )


CASES = {
    "equinox mlp": mlp,
    "equinox stacked layers": stacked,
    "equinox ensemble": ensemble,
}
