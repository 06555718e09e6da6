# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant: what is hard to quantize in inputs is moved into the weight.

    p = w^(1 - alpha) / x^alpha        x: largest magnitude of an input channel, w: of a column
    y = (x p) (W / p)^T

(Xiao et al. 2022, arXiv 2211.10438; the limits and roundings of ModelOpt 0.47, which takes the
power of w in the dtype of the weight.)
"""

from dataclasses import dataclass

import jax.numpy as jnp

from jqx.errors import InputError
from jqx.formats import Format, block_amax
from jqx_kernels.bits import divide, round_to

from .linear import InputStats, Linear, known, smoothed, tied
from .power import power

NONE = 2.0**-31  # the magnitude up to which a channel counts as never met
LEAST, MOST = 1e-4, 1e4


@dataclass(frozen=True, kw_only=True, slots=True)
class SmoothQuant:
    """`alpha`: 1 moves all of it, 0 nothing."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        """Raise InputError for an alpha that is no share."""
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha is {self.alpha}; give a number from 0 to 1")


def smoothquant_needs(fmt: Format, params: SmoothQuant) -> tuple[str, ...]:
    """The largest magnitude of every input channel."""
    return ("channel_amax",)


def smoothquant(linear: Linear, fmt: Format, stats: InputStats, params: SmoothQuant) -> Linear:
    """`linear` with inputs scaled by channel. Raises InputError for formats of other than 8 bits,
    and without statistics.
    """
    if fmt.element.bits != 8:
        raise InputError(
            f"smoothquant is for weights and inputs of 8 bits, and {fmt.name} has "
            f"{fmt.element.bits}: take awq_lite"
        )
    x, w = known(stats, "channel_amax", "smoothquant"), linear.weight
    x = tied(x, stats, jnp.max)
    columns = tied(block_amax(w, (None, 1))[0], stats, jnp.max)
    top = round_to(power(columns, jnp.float32(1 - params.alpha)), w.dtype)
    s = divide(top, power(x, jnp.float32(params.alpha)))
    s = jnp.where((jnp.min(s) <= NONE) & (x <= NONE), jnp.float32(1), s)
    s = jnp.clip(s, jnp.float32(LEAST), jnp.float32(MOST))
    return smoothed(linear, s, stats["channel_amax"]).told(alpha=jnp.float32(params.alpha))
