# SPDX-License-Identifier: Apache-2.0
"""Cases of the zoo whose parameters are trees of several kinds of nodes."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from by_hand import Layers, along_last, by_path
from flax.core import freeze
from zoo import Case, Draws

D, RANK, LAYERS = 16, 8, 2


class Linear(NamedTuple):
    weight: Any  # [out, in]
    bias: Any


@partial(jax.tree_util.register_dataclass, data_fields=("inner", "out"), meta_fields=("residual",))
@dataclass(frozen=True)
class Layer:
    inner: Linear
    out: Linear
    residual: float


def linear(draw, n, k):
    return Linear(draw.weight(n, k, k=k), draw(n) / 10)


def several_kinds(params, x):
    for layer in params["layers"]:
        h = jax.nn.gelu(x @ layer.inner.weight.T + layer.inner.bias[None])
        x = x * layer.residual + h @ layer.out.weight.T + layer.out.bias[None]
    return x


def several_kinds_by_hand(params, args, at):
    layers, (x,) = Layers(at, by_path(params)), args

    def linear_by_hand(path, x):
        y = layers.product(f"{path}.weight", x, layers.p[f"{path}.weight"].T)
        return y + along_last(layers.p[f"{path}.bias"], y)

    for i in range(LAYERS):
        h = jax.nn.gelu(linear_by_hand(f"layers.{i}.inner", x))
        x = x * 0.5 + linear_by_hand(f"layers.{i}.out", h)
    return x


def kinds_of_nodes():
    """A frozen dict of a list of dataclasses of named tuples."""
    draw = Draws()
    layers = [Layer(linear(draw, 32, D), linear(draw, D, 32), 0.5) for _ in range(LAYERS)]
    paths = [f"layers.{i}.{name}.weight" for i in range(LAYERS) for name in ("inner", "out")]
    return Case(
        f=several_kinds,
        params=freeze({"layers": layers}),
        args=(Draws(1)(5, D),),
        by_hand=several_kinds_by_hand,
        contracted=dict.fromkeys(paths, (1,)),
    )


def adapted(params, x):
    """A frozen base, and a pair of small matrices that change it."""
    base, pair = jax.lax.stop_gradient(params["base"]), params["pair"]
    for i in range(LAYERS):
        kernel, (a, b) = base[f"layer_{i}"]["kernel"], pair[f"layer_{i}"]
        x = jnp.tanh(x @ kernel + 2 * ((x @ a) @ b))
    return x


def adapted_by_hand(params, args, at):
    layers, (x,) = Layers(at, by_path(params)), args
    base = {k: jax.lax.stop_gradient(v) for k, v in layers.p.items() if k.startswith("base")}
    for i in range(LAYERS):
        kernel, pair = f"base.layer_{i}.kernel", f"pair.layer_{i}"
        small = layers.product(f"{pair}.0", x, layers.p[f"{pair}.0"])
        y = layers.product(kernel, x, base[kernel])
        x = jnp.tanh(y + 2 * layers.product(f"{pair}.1", small, layers.p[f"{pair}.1"]))
    return x


def low_rank():
    draw = Draws()
    names = [f"layer_{i}" for i in range(LAYERS)]
    base = {name: {"kernel": draw.weight(D, D)} for name in names}
    pair = {name: (draw.weight(D, RANK), draw.weight(RANK, D)) for name in names}
    inner = ("base.{}.kernel", "pair.{}.0", "pair.{}.1")
    return Case(
        f=adapted,
        params={"base": base, "pair": pair},
        args=(Draws(1)(5, D),),
        by_hand=adapted_by_hand,
        contracted={path.format(name): (0,) for name in names for path in inner},
    )


CASES = {"several kinds of nodes": kinds_of_nodes, "low-rank pair": low_rank}
