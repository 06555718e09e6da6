# SPDX-License-Identifier: Apache-2.0
"""Cases of the zoo in Flax NNX: the state is the parameters, the graph is closed over."""

import jax
import jax.numpy as jnp
from by_hand import Layers, by_path, drawn
from flax import nnx
from zoo import Case, Draws
from zoo_linen import ATTENTION, HEADS, D


def split(model, *args, **fields):
    """A case of a model that is merged inside of the function."""
    graph, state = nnx.split(model)
    f = lambda state, *args: nnx.merge(graph, state)(*args)  # noqa: E731
    return Case(f=f, params=drawn(state), args=args, **fields)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.up = nnx.Linear(D, 32, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.down = nnx.Linear(32, D, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.gelu(self.up(self.norm(x)))))


def mlp_by_hand(layers, path, x):
    h = layers.dense(f"{path}up", layers.layer_norm(f"{path}norm", x))
    return layers.dense(f"{path}down", jax.nn.gelu(h))


def mlp():
    return split(
        MLP(nnx.Rngs(0)),
        Draws()(2, 5, D),
        by_hand=lambda params, args, at: mlp_by_hand(Layers(at, by_path(params)), "", *args),
        contracted={"up.kernel": (0,), "down.kernel": (0,)},
    )


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)
        self.mlp = MLP(rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


BLOCK = {
    **{f"attention.{path}": axes for path, axes in ATTENTION.items()},
    "mlp.up.kernel": (0,),
    "mlp.down.kernel": (0,),
}


def block_by_hand(layers, path, x):
    h = layers.rms_norm(f"{path}norm", x)
    x = x + layers.attention(f"{path}attention.", h, h)
    return x + mlp_by_hand(layers, f"{path}mlp.", x)


def block():
    return split(
        Block(nnx.Rngs(0)),
        Draws()(2, 5, D),
        by_hand=lambda params, args, at: block_by_hand(Layers(at, by_path(params)), "", *args),
        contracted=BLOCK,
        eager=False,
    )


def stack_of(kind, rngs):
    """Two modules as one, their parameters stacked along a new first axis."""
    return nnx.split_rngs(splits=2)(nnx.vmap(kind, in_axes=0, out_axes=0))(rngs)


class Scanned(nnx.Module):
    def __init__(self, rngs):
        self.layers = stack_of(Block, rngs)

    def __call__(self, x):
        step = nnx.scan(
            nnx.remat(lambda x, layer: layer(x)),
            in_axes=(nnx.Carry, 0),
            out_axes=nnx.Carry,
        )
        return step(x, self.layers)


def scanned_by_hand(params, args, at):
    layers, (x,) = Layers(at, by_path(params)), args
    for i in range(2):
        x = block_by_hand(layers.of("layers.", i), "layers.", x)
    return x


def scanned():
    contracted = {f"layers.{k}": tuple(a + 1 for a in v) for k, v in BLOCK.items()}
    return split(
        Scanned(nnx.Rngs(0)),
        Draws()(2, 5, D),
        by_hand=scanned_by_hand,
        eager=False,
        contracted=contracted,
        stack=dict.fromkeys(contracted, (0,)),
    )


class Experts(nnx.Module):
    """MLPs side by side, each with its own inputs."""

    def __init__(self, rngs):
        self.up = stack_of(lambda rngs: nnx.Linear(D, 32, rngs=rngs), rngs)
        self.down = stack_of(lambda rngs: nnx.Linear(32, D, rngs=rngs), rngs)

    def __call__(self, x):
        @nnx.vmap
        def each(up, down, x):
            return down(nnx.gelu(up(x)))

        return each(self.up, self.down, x)


def experts_by_hand(params, args, at):
    layers, (xs,) = Layers(at, by_path(params)), args
    each = [(layers.of("", i), xs[i]) for i in range(2)]
    return jnp.stack([one.dense("down", jax.nn.gelu(one.dense("up", x))) for one, x in each])


def experts():
    contracted = {"up.kernel": (1,), "down.kernel": (1,)}
    return split(
        Experts(nnx.Rngs(0)),
        Draws()(2, 5, D),
        by_hand=experts_by_hand,
        contracted=contracted,
        stack=dict.fromkeys(contracted, (0,)),
    )


CASES = {
    "nnx mlp": mlp,
    "nnx transformer block": block,
    "nnx scan and remat": scanned,
    "nnx vmap": experts,
}
