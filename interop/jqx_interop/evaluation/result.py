# SPDX-License-Identifier: Apache-2.0
"""The outcome of an evaluation."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from jqx.models import param_shapes
from jqx_interop.stored import Source
from jqx_interop.targets import INNER, OUTER

from .metrics import COMPARED, Sums

STORED = (
    *("weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale"),
    *(INNER, OUTER),
)
"""The leaves of a quantized linear that stand for its weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What was found: means over `tokens` scored tokens, each with its standard error (None where
    there is one window).

    `nll` and `kl` are in nats, `top1` and `top5` are shares. What needs a reference is None without
    one: `kl` of the model's probabilities from the reference's; `top1`, how often the reference's
    most likely token is the model's too; `top5`, how often it is among the model's five most
    likely; `perplexity_ratio`, the model's perplexity over the reference's, whose error is that of
    the paired difference. `bits_per_weight` is that of the quantized linears, scales included; None
    if there are none. `cut`: the text was longer.
    """

    model: str
    reference: str | None
    text: str
    cut: bool
    tokens: int
    windows: int
    window: int
    stride: int
    compute: str
    bits_per_weight: float | None
    nll: float
    nll_se: float | None
    perplexity: float
    perplexity_se: float | None
    reference_perplexity: float | None = None
    reference_perplexity_se: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    top1: float | None = None
    top1_se: float | None = None
    top5: float | None = None
    top5_se: float | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; null for what is not finite."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def estimates(sums: Sums) -> dict[str, Any]:
    """The fields of `Evaluation` that are means of scores, and their errors."""
    nll = sums.mean(sums["nll"])
    found = {"nll": nll, "perplexity": nll.exp()}
    if sums.columns == COMPARED:
        found["reference_perplexity"] = sums.mean(sums["reference_nll"]).exp()
        found["perplexity_ratio"] = sums.mean(sums["nll"] - sums["reference_nll"]).exp()
        found |= {name: sums.mean(sums[name]) for name in ("kl", "top1", "top5")}
    values = {name: estimate.value for name, estimate in found.items()}
    return values | {f"{name}_se": estimate.se for name, estimate in found.items()}


def bits_per_weight(source: Source) -> float | None:
    """Stored bits per weight of the quantized linears, scales included; None if there are none."""
    tensors, shapes = source.checkpoint.tensors, param_shapes(source.spec)
    names = [f"{p}.{leaf}" for p in source.choices for leaf in STORED if f"{p}.{leaf}" in tensors]
    size = sum(tensors[name].nbytes for name in names)
    values = sum(math.prod(shapes[f"{path}.weight"]) for path in source.choices)
    return 8 * size / values if values else None
