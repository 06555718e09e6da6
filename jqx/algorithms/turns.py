# SPDX-License-Identifier: Apache-2.0
"""Running algorithms, one after the other."""

from functools import partial

import jax
import jax.numpy as jnp

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
