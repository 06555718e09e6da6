# SPDX-License-Identifier: Apache-2.0
"""How the experts of a block lie in a checkpoint, and what one of them is.

separate        a tensor for each expert and linear, [n, k]
fused_rows      [e, n, k], the rows of gate and up in one, as "fused_gated" has them
fused_columns   [e, k, n], likewise
flat            [e n, k], experts one below the other; the last linear is [k, n] of each

In memory separate tensors of one linear are a stack [e, n, k] under their name with "{}" in the
place of the number: `mlp.experts.{}.up_proj.weight`. An expert alone is a tree of its linears, each
[n, k], under the fields of Names that MLPS reads: "gate", "up", "gate_up", "down".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .layers import Params, module
from .spec import Experts, Mlp, Names

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Store:
    """`turned`: the linears that are [k, n], by their names in an expert; `flat`: whether experts
    lie along the rows.
    """

    turned: frozenset[str] = frozenset()
    flat: bool = False

    def one(self, tensor: Any, experts: int, e: int, part: tuple[str, str]) -> Any:
        """What expert `e` of so many has of a tensor of all: [n, k] of a weight. `part`: the linear
        and its leaf.
        """
        own = tensor.reshape(experts, -1, *tensor.shape[1:])[e] if self.flat else tensor[e]
        return own.T if part[0] in self.turned and part[1] == "weight" else own


STORES = {
    "separate": Store(),
    "fused_rows": Store(),
    "fused_columns": Store(frozenset(("gate", "up", "gate_up", "down"))),
    "flat": Store(frozenset(("down",)), flat=True),
}
"""Experts.store -> where the parts of an expert are."""

EXPERT = Names(gate="gate", up="up", gate_up="gate_up", down="down")
"""What the linears of an expert alone are called."""


class Part(NamedTuple):
    """A tensor of all experts, or a stack of those of each: `tensor`, its name relative to the
    block; `shape` of one expert's, [n, k], or [n] of a bias; `leaf`: "weight" or "bias".
    """

    linear: str
    leaf: str
    tensor: str
    shape: Shape


def parts(row: Experts, names: Names, hidden: int) -> Iterator[Part]:
    """What experts are made of, in module order."""
    for linear, n, k in linears_of(row.each, hidden):
        tensor = getattr(names, f"expert_{linear}")
        yield Part(linear, "weight", tensor, (n, k))
        if row.each.bias:
            stem = tensor.removesuffix(".weight")
            apart = "." if stem != tensor else "_"
            yield Part(linear, "bias", f"{stem}{apart}bias", (n,))


def linears_of(row: Mlp, hidden: int) -> Iterator[tuple[str, int, int]]:
    """The linears of an MLP as fields of Names, with their rows and columns."""
    for linear, times in MLP_INPUTS[row.form]:
        yield linear, times * row.inner, hidden
    yield "down", hidden, row.inner


MLP_INPUTS: dict[str, tuple[tuple[str, int], ...]] = {
    "gated": (("gate", 1), ("up", 1)),
    "fused_gated": (("gate_up", 2),),
    "plain": (("up", 1),),
    "gegelu": (("gate_up", 2),),
    "gegelu_apart": (("gate", 1), ("up", 1)),
}
"""Mlp.form -> the linears that read its input, as fields of Names, and their rows to a channel."""


def tensor_shapes(row: Experts, names: Names, hidden: int) -> dict[str, Shape]:
    """Name and shape of every tensor of experts, those of each as one stack."""
    store, found = STORES[row.store], {}
    for part in parts(row, names, hidden):
        shape = part.shape
        if part.linear in store.turned and part.leaf == "weight":
            shape = shape[::-1]
        if store.flat:
            found[part.tensor] = (row.number * shape[0], *shape[1:])
        else:
            found[part.tensor] = (row.number, *shape)
    return found


def expert_tensors(row: Experts, names: Names, hidden: int) -> dict[str, str]:
    """Path in the tree of one expert ("down.weight") -> the tensor it is in, with "{}" for its
    number where it has one of its own.
    """
    return {f"{p.linear}.{p.leaf}": p.tensor for p in parts(row, names, hidden)}


def stacks(row: Experts, names: Names, block_params: Params) -> dict[str, Any]:
    """The tree of an expert, whose leaves have those of all experts along a first axis."""
    store, tree = STORES[row.store], {}
    for part in parts(row, names, 0):
        path, _, leaf = part.tensor.rpartition(".")
        w = (module(block_params, path) if path else block_params)[leaf]
        if store.flat:
            w = w.reshape(row.number, -1, *w.shape[1:])
        if part.linear in store.turned and part.leaf == "weight":
            w = jnp.swapaxes(w, 1, 2)
        tree.setdefault(part.linear, {})[part.leaf] = w
    return tree


def member(tree: Any, e: Array) -> Any:
    """The tree of expert `e`, of one of stacks; stacks are not copied."""
    return {
        linear: {leaf: _chosen(stack, e) for leaf, stack in own.items()}
        for linear, own in tree.items()
    }


def _chosen(stack: Float[Array, "e ..."], e: Array) -> Float[Array, "..."]:
    return lax.dynamic_index_in_dim(stack, e, keepdims=False)
