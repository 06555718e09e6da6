# SPDX-License-Identifier: Apache-2.0
"""What Flax needs: the decoder as a module with `init` and `apply`, and QTensors serialized."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import serialization
from flax.core import meta
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int, Key

from jqx.errors import InputError
from jqx.tensors.qtensor import LEAVES, QTensor

from .compute import FLOAT32, Compute
from .decoder import forward
from .layers import GAIN_OFFSETS
from .layout import leaf_shapes
from .spec import ModelSpec


class CausalLM(nn.Module):
    """`apply({"params": tree}, ids)` gives float32 logits; the tree is the checkpoint's,
    unmodified.

    `init(key, ids)` draws a fresh float32 tree: normal weights, zero biases, norms that change
    nothing.
    """

    spec: ModelSpec
    compute: Compute = FLOAT32

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b t"], positions: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t v"]:
        """Logits of every token; see `jqx.models.forward`."""
        roots = {name.split(".")[0]: None for name in leaf_shapes(self.spec)}
        params = {root: self._tensors(root) for root in roots}
        return forward(self.spec, params, ids, self.compute, positions)

    def _tensors(self, root: str) -> Any:
        if self.is_initializing():
            return self.param(root, _draw, self.spec, root)
        # not self.param, which would compare the leaves inside a QTensor
        found = meta.unbox(self.get_variable("params", root))
        for name, shape in leaf_shapes(self.spec).items():
            if name.split(".")[0] == root and (have := _shape_at(found, name)) != shape:
                what = f"{name} is missing" if have is None else f"{name} has the shape {have}"
                raise InputError(f"{what}, and the model needs one of {shape}")
        return found


def _shape_at(tree: Any, name: str) -> tuple[int, ...] | None:
    for part in name.split(".")[1:]:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return None if tree is None else tuple(tree.shape)


def init_params(spec: ModelSpec, key: Key[Array, ""]) -> dict[str, Any]:
    """A fresh float32 parameter tree: what `CausalLM(spec).init` draws, without a batch."""
    return dict(CausalLM(spec).init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def _draw(key: Key[Array, ""], spec: ModelSpec, root: str) -> Any:
    shapes = {name: s for name, s in leaf_shapes(spec).items() if name.split(".")[0] == root}
    keys = jax.random.split(key, len(shapes))
    leaves = {
        name: _leaf(spec, name, s, k) for (name, s), k in zip(shapes.items(), keys, strict=True)
    }
    return unflatten_dict(leaves, sep=".")[root]


def _leaf(spec: ModelSpec, name: str, shape: tuple[int, ...], key: Key[Array, ""]) -> Array:
    if name.endswith(".bias"):
        return jnp.zeros(shape)
    if len(shape) == 1 or name.endswith("norm.weight"):
        return jnp.full(shape, 1.0 - GAIN_OFFSETS[spec.blocks[0].norm.kind])
    return spec.init_range * jax.random.normal(key, shape)


def _state_of(q: QTensor) -> dict[str, Any]:
    return {leaf: serialization.to_state_dict(getattr(q, leaf)) for leaf in LEAVES}


def _with_state(q: QTensor, state: dict[str, Any]) -> QTensor:
    leaves = {
        leaf: serialization.from_state_dict(getattr(q, leaf), state[leaf], leaf) for leaf in LEAVES
    }
    return q.replace(**leaves)


serialization.register_serialization_state(QTensor, _state_of, _with_state)
