# SPDX-License-Identifier: Apache-2.0
"""nvfp4_act_headroom: the tensor scale of NVFP4 inputs, with room above what calibration met.

    amax = max(rho * anchor, upper)

`upper` is a high percentile of the largest magnitudes of blocks, `anchor` a low one of those above
upper / 10^6. E4M3 scales span 28672 from the smallest normal one, so `rho` puts the anchor near the
low end and leaves the rest to values that are larger than all that were met. (ModelOpt 0.47,
`calib/nvfp4_act_headroom.py`.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from jqx.calibration.histograms import BINS, EDGES, HIGHEST, LOWEST
from jqx.errors import InputError, nearest
from jqx.formats import Format

from .histogram import refuse_smoothed
from .linear import InputStats, Linear, known
from .local_hessian import LocalHessian, local_hessian, local_hessian_needs
from .max import Max, max_calibrate
from .mse import Mse, mse
from .weighted import Weighted, weighted, weighted_needs

RANGE = 448 / 2.0**-6  # of the normal E4M3 numbers
IGNORED = 1e6  # blocks that much smaller than `upper` say nothing about the anchor
CENTERS = np.exp2(LOWEST + (np.arange(BINS) + 0.5) / BINS * (HIGHEST - LOWEST))

_Needs = Callable[[Format, Any], tuple[str, ...]]
_Run = Callable[[Linear, Format, InputStats, Any], Linear]
WEIGHTS: dict[str, tuple[_Run, Any, _Needs]] = {
    "max": (max_calibrate, Max(), lambda fmt, params: ()),
    "mse": (mse, Mse(fp8_scale_sweep=True), lambda fmt, params: ()),
    "local_hessian": (local_hessian, LocalHessian(), local_hessian_needs),
    "wmse": (weighted, Weighted(), weighted_needs),
}
"""How weights get their scales meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Headroom:
    """Percentiles of the largest magnitudes of blocks, the factor between the lower one and the
    amax, and the algorithm for the weight.
    """

    anchor_percentile: float = 1.0
    upper_percentile: float = 99.99
    rho: float = 16384.0
    weight_scale_algorithm: str = "max"

    def __post_init__(self) -> None:
        """Raises InputError for what is no percentile, no factor or no algorithm."""
        for name in ("anchor_percentile", "upper_percentile"):
            if not 0 <= getattr(self, name) <= 100:
                raise InputError(f"{name} is {getattr(self, name)}: take one from 0 to 100")
        if not 0 < self.rho < RANGE:
            raise InputError(f"rho is {self.rho}: take a number from 0 to {RANGE:.0f}")
        if self.weight_scale_algorithm not in WEIGHTS:
            raise nearest(self.weight_scale_algorithm, WEIGHTS, "weight_scale_algorithm")


def headroom_needs(fmt: Format, params: Headroom) -> tuple[str, ...]:
    """The histogram, the largest magnitude if that is the upper percentile, and what the algorithm
    for the weight needs.
    """
    _, chosen, needs = WEIGHTS[params.weight_scale_algorithm]
    whole = ("amax",) if params.upper_percentile == 100 else ()
    return ("block_log2", *whole, *needs(fmt, chosen))


def headroom(linear: Linear, fmt: Format, stats: InputStats, params: Headroom) -> Linear:
    """`linear` with the amax of its inputs, and the scales of its weight.

    Inputs that were only zeros have an amax of 0. Raises InputError without the statistics of
    `headroom_needs`, and after a step that scales channels of inputs.
    """
    refuse_smoothed(linear, "nvfp4_act_headroom")
    run, chosen, _ = WEIGHTS[params.weight_scale_algorithm]
    counts = known(stats, "block_log2", "nvfp4_act_headroom")
    largest = None
    if params.upper_percentile == 100:
        largest = known(stats, "amax", "nvfp4_act_headroom")
    linear = run(linear, fmt, stats, chosen)
    return linear._replace(input_amax=headroom_amax(counts, params, largest))


def headroom_amax(
    counts: Int32[Array, "512"], params: Headroom, largest: Float32[Array, ""] | None = None
) -> Float32[Array, ""]:
    """The amax of inputs with this histogram of `block_log2`; `largest` in place of the upper
    percentile. Values are the centers of bins. 0 for no counts.
    """
    high = _percentile(counts, params.upper_percentile)
    upper = CENTERS.astype(np.float32)
    first = np.searchsorted(EDGES, (CENTERS / IGNORED).astype(np.float32), side="right") - 1
    ignored = jnp.arange(BINS) < jnp.asarray(np.maximum(first, 0), jnp.int32)[high]
    low = _percentile(jnp.where(ignored, 0, counts), params.anchor_percentile)
    anchored = jnp.asarray((params.rho * CENTERS).astype(np.float32))[low]
    top = jnp.asarray(upper)[high] if largest is None else largest
    return jnp.where(jnp.any(counts > 0), jnp.maximum(anchored, top), jnp.float32(0))


def _percentile(counts: Int32[Array, "512"], percentile: float) -> Int32[Array, ""]:
    """The first bin up to which there is this percentage of the counts."""
    so_far = jnp.cumsum(counts.astype(jnp.float32))
    wanted = jnp.float32(percentile / 100) * so_far[-1]
    return jnp.minimum(jnp.sum(so_far < wanted), BINS - 1).astype(jnp.int32)
