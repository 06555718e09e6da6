# SPDX-License-Identifier: Apache-2.0
"""percentile, histogram_mse, entropy: the amax of inputs from a histogram of their magnitudes
(ModelOpt 0.47, `calib/histogram.py`).

    percentile      the edge of the first bin up to which there are `percentile` of all values
    histogram_mse   the center c of a bin for which sum counts (x - simulate(x))^2 is smallest
    entropy         the edge for which the clipped histogram and itself in 128 steps differ least,
                    in Kullback-Leibler divergence; the last of equal ones

Bin i reaches from i * width to (i + 1) * width. Bins after the last occupied one do not matter, so
histograms of several linears can be stacked.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from jqx.errors import InputError
from jqx.formats import FORMATS, Format
from jqx_kernels.bits import divide

from .linear import InputStats, Linear, known
from .mse import first_best
from .simulate import simulate

STEPS = 128
"""What an int8 input has on either side of zero."""
INPUTS = {"int8": FORMATS["int8_tensor"], "e4m3": FORMATS["fp8"]}
"""Element of a weight -> format of the inputs it meets."""

Counts = Float32[Array, "n"] | Int[Array, "n"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Percentile:
    """`percentile` of the magnitudes that are not clipped."""

    percentile: float = 99.99

    def __post_init__(self) -> None:
        """Raises InputError for what is no percentile."""
        if not 0 < self.percentile <= 100:
            raise InputError(f"percentile is {self.percentile}: take one above 0, up to 100")


@dataclass(frozen=True, kw_only=True, slots=True)
class FromBin:
    """`start_bin`: the first bin whose amax is tried, of 2048 up to the largest magnitude of the
    first batch.
    """

    start_bin: int = 128

    def __post_init__(self) -> None:
        """Raises InputError for a bin that cannot be the first."""
        if not 1 <= self.start_bin <= 2048:
            raise InputError(f"start_bin is {self.start_bin}: take one from 1 to 2048")


def histogram_needs(fmt: Format, params: Percentile | FromBin) -> tuple[str, ...]:
    """Counts and the width of a bin."""
    return ("histogram", "histogram_width")


def percentile(linear: Linear, fmt: Format, stats: InputStats, params: Percentile) -> Linear:
    """`linear` with the amax of its inputs that clips what is above the percentile."""
    counts, width = _histogram(linear, stats, "percentile")
    return linear._replace(input_amax=percentile_amax(counts, width, params.percentile))


def histogram_mse(linear: Linear, fmt: Format, stats: InputStats, params: FromBin) -> Linear:
    """`linear` with the amax of its inputs of the smallest squared error, for inputs in the element
    of the weight. Raises InputError unless that is int8 or e4m3.
    """
    if fmt.element.name not in INPUTS:
        raise _other(fmt, "histogram_mse")
    counts, width = _histogram(linear, stats, "histogram_mse")
    amax = mse_amax(counts, width, INPUTS[fmt.element.name], params.start_bin)
    return linear._replace(input_amax=amax)


def entropy(linear: Linear, fmt: Format, stats: InputStats, params: FromBin) -> Linear:
    """`linear` with the amax of its inputs that loses least information. Raises InputError for
    inputs that do not have equal steps: other than int8.
    """
    if fmt.element.name != "int8":
        raise _other(fmt, "entropy")
    counts, width = _histogram(linear, stats, "entropy")
    return linear._replace(input_amax=entropy_amax(counts, width, params.start_bin))


def percentile_amax(
    counts: Counts, width: Float32[Array, ""], percentile: float
) -> Float32[Array, ""]:
    """The lower edge of the first bin up to which there are `percentile` of all counts; 0 for no
    counts.
    """
    # counted from the top: float32 sums of the few large values are exact
    from_here = jnp.cumsum(counts.astype(jnp.float32)[::-1])[::-1]
    above = jnp.append(from_here[1:], jnp.float32(0))
    allowed = jnp.float32(1 - percentile / 100) * from_here[0]
    return jnp.sum(above > allowed).astype(jnp.float32) * width


def mse_amax(
    counts: Counts, width: Float32[Array, ""], fmt: Format, start: int = 128
) -> Float32[Array, ""]:
    """The center of the bin from number `start` on, with the smallest squared error of all centers
    in `fmt` if it is the amax; the first of equal ones.
    """
    size = counts.shape[0]
    centers = (jnp.arange(size).astype(jnp.float32) + jnp.float32(0.5)) * width
    last = _occupied(counts) - 1
    weights = counts.astype(jnp.float32)

    def losses(amax: Float32[Array, ""]) -> Float32[Array, ""]:
        d = simulate(centers[None], fmt, amax)[0] - centers
        return jnp.where(amax > centers[last], jnp.inf, jnp.sum(d * d * weights))

    return first_best(np.arange(min(start, size - 1), size), centers.__getitem__, losses)


def entropy_amax(counts: Counts, width: Float32[Array, ""], start: int = 128) -> Float32[Array, ""]:
    """The upper edge of the bin, from number `start` - 1 on, that clips with the least divergence;
    the last of equal ones.
    """
    size = counts.shape[0]
    bins = counts.astype(jnp.float32)
    bins = bins.at[0].set(bins[1])  # zeros are exact in any case
    end = _occupied(counts)

    def losses(edge: Float32[Array, ""]) -> Float32[Array, ""]:
        at = edge.astype(jnp.int32)
        return jnp.where(at > end, jnp.inf, _divergence(bins, at))

    # in descending order the first of equal ones is the last
    tried = np.arange(size, min(start, size) - 1, -1, dtype=np.float32)
    return first_best(tried, lambda edge: edge, losses) * width


def _divergence(bins: Float32[Array, "n"], end: Int32[Array, ""]) -> Float32[Array, ""]:
    """Of the first `end` bins with all others on the last of them, from the same in steps, each
    spread evenly over its occupied bins.
    """
    at = jnp.arange(bins.shape[0], dtype=jnp.int32)
    inside = at < end
    occupied = inside & (bins > 0)
    step = jnp.where(inside, at * STEPS // end, STEPS)  # the last one is thrown away
    kept = jnp.where(occupied, bins, jnp.float32(0))
    none = jnp.zeros(STEPS + 1, jnp.float32)
    mean = divide(none.at[step].add(kept), none.at[step].add(occupied.astype(jnp.float32)))
    q = jnp.where(occupied, mean[step], jnp.float32(0))
    clipped = jnp.sum(jnp.where(inside, jnp.float32(0), bins))
    p = jnp.where(inside, bins, jnp.float32(0)) + jnp.where(at == end - 1, clipped, jnp.float32(0))
    p, q = divide(p, jnp.sum(p)), divide(q, jnp.sum(q))
    safe = jnp.where((p > 0) & (q > 0), divide(p, jnp.where(q > 0, q, jnp.float32(1))), 1.0)
    terms = jnp.where((p > 0) & (q == 0), jnp.inf, p * jnp.log(safe))
    return jnp.sum(terms)


def _occupied(counts: Counts) -> Int32[Array, ""]:
    """The number of bins up to the last one with counts."""
    at = jnp.arange(counts.shape[0], dtype=jnp.int32)
    return jnp.max(jnp.where(counts > 0, at + 1, 1))


def _histogram(
    linear: Linear, stats: InputStats, algorithm: str
) -> tuple[Array, Float32[Array, ""]]:
    refuse_smoothed(linear, algorithm)
    counts = known(stats, "histogram", algorithm)
    return counts, known(stats, "histogram_width", algorithm)


def refuse_smoothed(linear: Linear, algorithm: str) -> None:
    """Raises InputError if inputs are scaled by channel: their histogram is of what they were
    before.
    """
    if linear.pre_quant_scale is not None:
        raise InputError(
            f"{algorithm} looks at inputs as they were met, and a step before it scales their "
            f"channels: leave one of the two out"
        )


def _other(fmt: Format, algorithm: str) -> InputError:
    return InputError(
        f"{algorithm} is not for the inputs of {fmt.name}: take percentile, which is for any"
    )
