# SPDX-License-Identifier: Apache-2.0
"""One small model whose parameters come as every kind of tree: `TREES`, a kind -> the function that
makes it from nested dicts.
"""

import dataclasses
from collections import namedtuple
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import freeze
from zoo import Draws

D, LAYERS = 32, 2


def nested() -> dict[str, Any]:
    """The parameters as dicts."""
    draw = Draws()

    def projection() -> dict[str, Any]:
        return {"kernel": draw.weight(D, D, k=D), "bias": draw(D) / 10}

    def layer() -> dict[str, Any]:
        attn = {"q_proj": projection(), "o_proj": projection()}
        return {"attn": attn, "norm": {"scale": 1 + draw(D) / 10}}

    layers = {str(i): layer() for i in range(LAYERS)}
    return {"layers": layers, "lm_head": {"kernel": draw.weight(D, 8, k=D)}}


def read(params: Any, path: str) -> Any:
    """The leaf at `path`, as a model gets at it."""
    node = params["params"] if isinstance(params, Mapping) and "params" in params else params
    for key in path.split("/"):
        if isinstance(node, list):
            node = node[int(key)]
        elif isinstance(node, nnx.State):
            node = node[int(key) if key.isdecimal() else key]
        else:
            node = node[key] if isinstance(node, Mapping) else getattr(node, key)
    if isinstance(node, nn.Partitioned):
        return node.unbox()
    return node[...] if isinstance(node, nnx.Variable) else node


def model(params: Any, x: jax.Array) -> jax.Array:
    """What every tree is the parameters of."""
    for i in range(LAYERS):
        h = x * read(params, f"layers/{i}/norm/scale")[None]
        for name in ("q_proj", "o_proj"):
            at = f"layers/{i}/attn/{name}"
            h = jnp.tanh(h @ read(params, f"{at}/kernel") + read(params, f"{at}/bias")[None])
        x = x + h
    return x @ read(params, "lm_head/kernel")


def listed(tree: Any) -> Any:
    """Layers in a list."""
    return tree | {"layers": list(tree["layers"].values())}


@cache
def record_of(fields: tuple[str, ...], kind: str) -> type:
    """A class with these fields: a pytree, always the same."""
    if kind == "namedtuple":
        return namedtuple("Node", fields)
    made = dataclasses.make_dataclass("Node", fields, frozen=True)
    return jax.tree_util.register_dataclass(made, fields, ())


def records(tree: Any, kind: str) -> Any:
    """The same with attributes in place of keys."""
    if isinstance(tree, list):
        return [records(x, kind) for x in tree]
    if not isinstance(tree, dict):
        return tree
    made = record_of(tuple(tree), kind)
    return made(**{key: records(x, kind) for key, x in tree.items()})


class Projection(eqx.Module):
    """With a leaf that is a function and one that is a flag."""

    kernel: Any
    bias: Any = None
    activation: Callable[[Any], Any] = jnp.tanh
    frozen: bool = False


class Attention(eqx.Module):
    q_proj: Projection
    o_proj: Projection


class Norm(eqx.Module):
    scale: Any


class Layer(eqx.Module):
    attn: Attention
    norm: Norm


class Module(eqx.Module):
    layers: list[Layer]
    lm_head: Projection
    name: str = eqx.field(static=True, default="small")


def equinox(tree: Any) -> Module:
    layers = [
        Layer(
            Attention(**{name: Projection(**p) for name, p in layer["attn"].items()}),
            Norm(**layer["norm"]),
        )
        for layer in tree["layers"].values()
    ]
    return Module(layers, Projection(**tree["lm_head"]))


def state(tree: Any) -> nnx.State:
    layers = {int(i): layer for i, layer in tree["layers"].items()}
    return nnx.State(jax.tree.map(nnx.Param, tree | {"layers": layers}))


TREES: dict[str, Callable[[Any], Any]] = {
    "dict": lambda tree: tree,
    "params": lambda tree: {"params": tree},
    "boxes": lambda tree: jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), tree),
    "FrozenDict": freeze,
    "nnx.State": state,
    "Equinox module": equinox,
    "dataclass": lambda tree: records(listed(tree), "dataclass"),
    "namedtuple": lambda tree: records(listed(tree), "namedtuple"),
}
