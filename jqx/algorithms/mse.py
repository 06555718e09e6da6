# SPDX-License-Identifier: Apache-2.0
"""mse: the scale of every block with the smallest squared error of its weights, as ModelOpt 0.47
searches (`calib/mse.py`).

    amax = max|w| * m        m from start_multiplier to stop_multiplier
    amax = tensor amax * c   c = E4M3 values / 448: every scale that a block can have (the sweep)

The error is that of simulated rounding, sum (w - simulate(w))^2 in float32; the first of equal ones
is taken.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int

from jqx.errors import InputError
from jqx.formats import Format, block_amax
from jqx.formats.elements import E4M3, FLOAT32
from jqx.formats.format import grid_shape
from jqx_kernels.bits import round_to
from jqx_kernels.blocks import to_blocks

from .linear import InputStats, Linear
from .simulate import simulate

Grid = Float32[Array, "..."]
Loss = Callable[[Float32[Array, "n k"]], Grid]
"""What the error of a weight costs, for every scale."""

FOUR_OVER_SIX = 6.0 * 256.0
"""The tensor_bound of the formats whose blocks may end at 4 instead of 6."""
FRACTIONS = np.arange(1, 0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
FRACTIONS = FRACTIONS / np.float32(448)
"""The scales that blocks can have, as fractions of the largest."""
LARGEST = jnp.finfo(jnp.float32).max


@dataclass(frozen=True, kw_only=True, slots=True)
class Mse:
    """The multipliers of the largest magnitudes that are tried, evenly spaced and not more than
    `step_size` apart; or with `fp8_scale_sweep` all scales of blocks below a tensor scale.
    """

    step_size: float = 0.1
    start_multiplier: float = 0.25
    stop_multiplier: float = 4.0
    fp8_scale_sweep: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for values that leave nothing to try."""
        check_multipliers(self.start_multiplier, self.stop_multiplier, self.step_size)


def check_multipliers(start: float, stop: float, step: float) -> None:
    """Raises InputError unless 0 < start <= stop and 0 < step."""
    if not 0 < start <= stop < math.inf:
        raise InputError(
            f"start_multiplier is {start} and stop_multiplier {stop}: take 0 < start <= stop"
        )
    if not 0 < step < math.inf:
        raise InputError(f"step_size is {step}: take a number above 0")


def mse(linear: Linear, fmt: Format, stats: InputStats, params: Mse) -> Linear:
    """`linear` with the amax of every scale that gives the smallest squared error of its weights.

    Formats of one level are searched with the multipliers, E4M3 scales below a tensor scale with
    the sweep, those of four over six with the multipliers too. Whatever else the format, the
    largest magnitudes stay, as in ModelOpt. `tensor_amax` is kept where it is known.
    """
    return searched(linear, fmt, params, squared_error(fmt))


def searched(linear: Linear, fmt: Format, params: Mse, loss: Loss) -> Linear:
    """`mse` with another loss."""
    linear = linear._replace(amax=None)
    if not searches(fmt, params):
        return linear
    if fmt.scale == E4M3:
        linear = with_tensor_amax(linear)
    search = _swept if params.fp8_scale_sweep else _multiplied
    return search(linear, fmt, params, loss)


def searches(fmt: Format, params: Mse) -> bool:
    """Whether there is anything to search in this format with these parameters."""
    if fmt.scale == E4M3:
        return params.fp8_scale_sweep or fmt.tensor_bound == FOUR_OVER_SIX
    return fmt.scale == FLOAT32 and fmt.tensor_bound is None and not params.fp8_scale_sweep


def squared_error(fmt: Format) -> Loss:
    """The sum of squares over what shares a scale."""
    return lambda d: jnp.sum(jnp.square(to_blocks(d, fmt.block)), axis=(1, 3))


def _swept(linear: Linear, fmt: Format, params: Mse, loss: Loss) -> Linear:
    """Of all the block scales below its tensor scale."""
    whole = linear.tensor_amax
    assert whole is not None
    ones = jnp.ones(grid_shape(fmt, linear.weight.shape), jnp.float32)
    return _least(linear, fmt, FRACTIONS, lambda c: ones * (whole * c), loss)


def _multiplied(linear: Linear, fmt: Format, params: Mse, loss: Loss) -> Linear:
    """Of the multiples of every largest magnitude, in the dtype of the weight; those of blocks
    below a tensor scale are float32.
    """
    start, stop = params.start_multiplier, params.stop_multiplier
    count = math.ceil((stop - start) / params.step_size) + 1
    multipliers = np.linspace(start, stop, count, dtype=np.float32)
    dtype = jnp.float32 if fmt.scale == E4M3 else linear.weight.dtype
    # torch multiplies two numbers in float32, and an array with a number in the dtype of the array
    tried_as = jnp.float32 if fmt.block == (None, None) else dtype
    largest = block_amax(linear.weight, fmt.block).reshape(grid_shape(fmt, linear.weight.shape))
    found = _least(linear, fmt, multipliers, lambda m: round_to(largest * m, tried_as), loss)
    assert found.amax is not None
    return found._replace(amax=round_to(found.amax, dtype))


def _least(
    linear: Linear,
    fmt: Format,
    tried: Float32[np.ndarray, "c"],
    amax_of: Callable[[Array], Grid],
    loss: Loss,
) -> Linear:
    """`linear` with the first of the amaxes with the least loss, scale by scale."""
    w = linear.weight.astype(jnp.float32)

    def losses(amax: Grid) -> Grid:
        y = simulate(w, fmt, amax, linear.tensor_amax)
        # without a bound in between, compilers subtract the product that y is before it is rounded
        return loss(w - jnp.clip(y, -LARGEST, LARGEST)).reshape(amax.shape)

    return linear._replace(amax=first_best(tried, amax_of, losses))


def first_best(
    tried: Float32[np.ndarray, "c"] | Int[np.ndarray, "c"],
    amax_of: Callable[[Array], Grid],
    losses: Callable[[Grid], Grid],
) -> Grid:
    """Of the grids `amax_of` each of `tried`, scale by scale the first one with the least loss.

    One grid and its losses are in memory at a time. A loss that is NaN is never the least.
    """

    def step(best: tuple[Grid, Grid], value: Array) -> tuple[tuple[Grid, Grid], None]:
        amax = amax_of(value)
        found = losses(amax)
        better = found < best[1]
        return (jnp.where(better, amax, best[0]), jnp.where(better, found, best[1])), None

    first = amax_of(jnp.asarray(tried[0]))
    start = first, jnp.full_like(first, jnp.inf)
    return lax.scan(step, start, jnp.asarray(tried))[0][0]


def with_tensor_amax(linear: Linear) -> Linear:
    """`linear` with the largest magnitude of its weight for the tensor scale, if none is known."""
    if linear.tensor_amax is not None:
        return linear
    return linear._replace(tensor_amax=jnp.max(block_amax(linear.weight, (None, None))))
