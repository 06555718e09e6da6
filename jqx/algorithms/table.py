# SPDX-License-Identifier: Apache-2.0
"""ALGORITHMS, as rows, and running several in turn."""

from functools import partial

import jax

from jqx.config import Algorithm
from jqx.errors import InputError, nearest
from jqx.formats import Format

from .linear import InputStats, Linear
from .max import Max, max_calibrate
from .row import AlgorithmRow

ALGORITHMS = {
    row.name: row
    for row in (
        AlgorithmRow(
            name="max",
            run=max_calibrate,
            params=Max,
            about="scales reach the largest magnitudes",
        ),
    )
}


def params_of(step: Algorithm) -> object:
    """The parameters of a step. Raises InputError for another name or parameter, with the nearest
    ones, and for a value that is out of range.
    """
    if step.method not in ALGORITHMS:
        raise nearest(step.method, ALGORITHMS, "algorithm")
    kind = ALGORITHMS[step.method].params
    allowed = list(kind.__dataclass_fields__)
    for key, _ in step.params:
        if key not in allowed:
            if not allowed:
                raise InputError(f"{step.method} has no parameters, and {key} is given")
            raise nearest(key, allowed, f"parameter of {step.method}")
    return kind(**dict(step.params))


def needed(steps: tuple[Algorithm, ...], fmt: Format) -> tuple[str, ...]:
    """The kinds of statistics of inputs without which `steps` cannot store a weight in `fmt`."""
    found: dict[str, None] = {}
    for step in steps:
        found |= dict.fromkeys(ALGORITHMS[step.method].needs(fmt, params_of(step)))
    return tuple(found)


@partial(jax.jit, static_argnames=("fmt", "steps"))
def calibrated(
    linear: Linear, stats: InputStats, *, fmt: Format, steps: tuple[Algorithm, ...]
) -> Linear:
    """`linear` after `steps`, one after the other. Raises InputError for statistics that a step
    needs and does not have.
    """
    for step in steps:
        linear = ALGORITHMS[step.method].run(linear, fmt, stats, params_of(step))
    return linear
