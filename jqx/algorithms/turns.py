# SPDX-License-Identifier: Apache-2.0
"""Running algorithms, one after the other."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jqx.config import Algorithm
from jqx.formats import Format, with_float_scales

from .linear import InputStats, Linear
from .quadratic import scaled
from .table import ALGORITHMS, applicable, params_of


@partial(jax.jit, static_argnames=("fmt", "steps"))
def calibrated(
    linear: Linear, stats: InputStats, *, fmt: Format, steps: tuple[Algorithm, ...]
) -> Linear:
    """`linear` after `steps`, one after the other. Raises InputError for statistics that a step
    needs and does not have.

    What scales lose when they are quantized themselves is not searched.
    """
    plain = with_float_scales(fmt)
    for step in applicable(steps, fmt):
        run = ALGORITHMS[step.method].run
        linear = run(linear, plain, _met(linear, stats), params_of(step))
    return linear


@partial(jax.jit, static_argnames=("fmt", "steps"))
def finished(
    linear: Linear, stats: InputStats, *, fmt: Format, steps: tuple[Algorithm, ...]
) -> Linear:
    """`linear` after what `steps` do at the very end, when all is settled that linears share: it is
    stored as it is now, but for that. Raises InputError as `calibrated` does.
    """
    for step in applicable(steps, fmt):
        finish = ALGORITHMS[step.method].finish
        if finish is not None:
            linear = finish(linear, fmt, _met(linear, stats), params_of(step))
    return linear


def _met(linear: Linear, stats: InputStats) -> InputStats:
    """The statistics of the inputs that meet the weight."""
    p = linear.pre_quant_scale
    return stats if p is None else scaled(stats, p.astype(jnp.float32))


@partial(jax.jit, static_argnames=("run", "fmt", "steps", "lanes"))
def of_each(
    linears: Linear,
    stats: InputStats,
    *,
    run: Callable[..., Linear],
    fmt: Format,
    steps: tuple[Algorithm, ...],
    lanes: int = 1,
) -> Linear:
    """`run`, which is `calibrated` or `finished`, of every member of stacked linears: one program.

    All arrays of `linears` and `stats`, and of the result, have the members as their first axis.
    `lanes` of them are computed side by side by vectorized operations, one lot after the other; a
    member comes out the same in any place among any others, as long as `lanes` is the same and
    divides their number. With 1 every operation is as it is for a single linear. Raises ValueError
    if `lanes` does not divide their number, and InputError as `run` does.
    """
    count = linears.weight.shape[0]
    if count % lanes:
        raise ValueError(f"{lanes} lanes do not divide {count} linears: repeat some of them")

    def one(member: tuple[Linear, InputStats]) -> Linear:
        return run(*member, fmt=fmt, steps=steps)

    return lax.map(one, (linears, stats), batch_size=None if lanes == 1 else lanes)


LANE_NUMBERS, MOST_LANES = 1 << 16, 8
"""Numbers of all weights in the lanes, and how many lanes there are at most: with more, what is
computed side by side outgrows a core's cache, and gains nothing over one after the other.
"""


def lanes_for(shape: tuple[int, ...], steps: tuple[Algorithm, ...]) -> int:
    """How many linears of this shape are best computed side by side on a CPU: a power of two. 1
    where no step has loops of small operations, which several linears fill better.
    """
    if not any(ALGORITHMS[step.method].small_loops for step in steps):
        return 1
    most = max(1, min(MOST_LANES, LANE_NUMBERS // (shape[0] * shape[1])))
    return 1 << (most.bit_length() - 1)
