# SPDX-License-Identifier: Apache-2.0
"""The attention of every block, as what stores its keys and values needs to know it."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jqx import models
from jqx.models import ModelSpec, block_prefix, kinds

from .checkpoints import TensorOut, dtype_name
from .inventory import Inventory
from .targets import Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """The attention of one block: its path, the unit it is in, its key and value linears, and its
    sizes.
    """

    path: str
    unit: int
    k: str
    v: str
    kv_heads: int
    head_dim: int
    value_dim: int

    def outputs(self, target: Target, affine: bool, dtype: np.dtype) -> list[TensorOut]:
        """The tensors of its stored keys and values in a layout; biases, of `affine` formats, have
        the dtype of the model.
        """
        found = []
        for linear, letter in ((self.k, "k"), (self.v, "v")):
            name = target.kv_name(linear, f"{letter}_scale")
            found.append(TensorOut(name, "F32", target.kv_shape))
            if affine:
                name = target.kv_name(linear, f"{letter}_bias")
                size = self.head_dim if letter == "k" else self.value_dim
                shape = (1, self.kv_heads, 1, size)
                found.append(TensorOut(name, dtype_name(dtype), shape))
        return found


def attentions_of(spec: ModelSpec, inventory: Inventory) -> Iterable[Attention]:
    """The attention of every block that has one, in order."""
    names = spec.names
    for i, (unit, kind) in enumerate(zip(inventory.blocks, kinds(spec), strict=True)):
        prefix, row = block_prefix(spec, i), kind.attention
        if not isinstance(row, models.Attention):
            continue
        yield Attention(
            path=f"{prefix}.{names.k.rpartition('.')[0]}",
            unit=unit,
            k=f"{prefix}.{names.k}",
            v=f"{prefix}.{names.v}",
            kv_heads=row.kv_heads,
            head_dim=row.head_dim,
            value_dim=row.values,
        )
