# SPDX-License-Identifier: Apache-2.0
"""How much of a stored model is quantized, by kind of layer."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from .facts import Facts, Linear, kind_of
from .schemes import LEAVES


@dataclass(frozen=True, kw_only=True, slots=True)
class Covered:
    """The parameters of one kind of layer, and how many of them are codes."""

    kind: str
    parameters: int
    quantized: int

    @property
    def share(self) -> float:
        """The quantized share, 0 to 1."""
        return self.quantized / max(self.parameters, 1)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "share": self.share}


def covered(facts: Facts) -> tuple[Covered, ...]:
    """Every kind of layer there is, and "all" last."""
    sums: dict[str, list[int]] = {}

    def add(kind: str, parameters: int, quantized: int) -> None:
        for name in (kind, "all"):
            row = sums.setdefault(name, [0, 0])
            row[0] += parameters
            row[1] += quantized

    for linear in facts.linears.values():
        size = _parameters(linear)
        add(linear.kind, size, size if linear.quantized else 0)
    for name, info in facts.rest.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in LEAVES or leaf == "weight":
            kind = kind_of(path) if len(info.shape) > 1 else "other"
            add(kind, math.prod(info.shape), 0)
    total = sums.pop("all", [0, 0])
    rows = sorted(sums.items(), key=lambda item: -item[1][0])
    return tuple(
        Covered(kind=kind, parameters=row[0], quantized=row[1])
        for kind, row in (*rows, ("all", total))
    )


def _parameters(linear: Linear) -> int:
    """Values of the matrix that a linear stands for."""
    weight = linear.leaves.get("weight")
    if linear.quantized and linear.dims is not None:
        return linear.dims.n * linear.dims.k
    return math.prod(weight.shape) if weight is not None else 0
