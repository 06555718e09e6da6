# SPDX-License-Identifier: Apache-2.0
"""All trials on the device that is here, and what a file of tiles says of them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jqx_kernels.dispatch import Device
from jqx_kernels.matmul.tiles import DEFAULTS, Tiles
from jqx_kernels.matmul.tuned import to_row

from .search import MOST, descend, sizes_for
from .timing import READ, copies_for, seconds
from .trials import (
    ROWS,
    TRIALS,
    Trial,
    bfloat16_operands,
    bfloat16_run,
    copy_run,
    lacking,
    operands,
    run_of,
    stored_bytes,
)

Told = Callable[[str], None]
Clock = Callable[[Callable[[Any], Any], Sequence[Any]], float]
"""How long a function takes for one of several arguments, in seconds."""


class Tuning(NamedTuple):
    """What was measured. `copied`: bytes a second, read and written, of a copy; `bfloat16`: size ->
    seconds of a product with a bfloat16 matrix; `rows`: what a file lists; `left_out`: trial -> why
    the device has no kernel for it.
    """

    device: Device
    shape: tuple[int, int]
    copied: float
    bfloat16: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]
    left_out: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """What a file of tiles holds."""
        return {
            "device": self.device.kind,
            "jax": jax.__version__,
            "shape": list(self.shape),
            "copied_bytes_per_second": self.copied,
            "bfloat16_seconds": dict(self.bfloat16),
            "tiles": list(self.rows),
        }


def not_tunable(device: Device) -> str | None:
    """Why there is nothing to measure on a device; None if there is."""
    if device.platform in DEFAULTS:
        return None
    return f"kernels with tiles are for GPUs and TPUs, and JAX computes on {device.kind} here"


def tune(
    device: Device,
    shape: tuple[int, int] = (8192, 8192),
    trials: Sequence[Trial] = TRIALS,
    told: Told = lambda text: None,
    clock: Clock = seconds,
) -> Tuning:
    """The fastest tiles of `trials` for a matrix of this shape on `device`, the current one.

    `told` hears of each trial when it begins. Raises ValueError where `not_tunable` says so.
    """
    if (reason := not_tunable(device)) is not None:
        raise ValueError(reason)
    told("copy and bfloat16")
    copied = jnp.zeros(READ // 2, jnp.uint8)
    rate = 2 * copied.size / clock(copy_run, [copied])
    wide = {size: clock(bfloat16_run, bfloat16_operands(size, shape, 2)) for size in ROWS}
    rows, left_out = [], {}
    for trial in trials:
        told(str(trial))
        if (reason := lacking(trial, device, shape)) is None:
            rows.append(_tuned(trial, device, shape, clock))
        else:
            left_out[str(trial)] = reason
    return Tuning(device, shape, rate, wide, rows, left_out)


def _tuned(trial: Trial, device: Device, shape: tuple[int, int], clock: Clock) -> dict[str, Any]:
    size = stored_bytes(trial, shape)
    given = operands(trial, shape, copies_for(size))
    start = DEFAULTS[device.platform][trial.element, trial.size]
    sizes, most = sizes_for(device.platform, trial.size), MOST[device.platform]
    found = descend(start, sizes, most, partial(_cost, trial, device, given, clock))
    facts = {"seconds": found.cost, "default_seconds": found.first, "tried": found.tried}
    rate = None if found.cost is None else size / found.cost
    row = to_row(trial.op, (trial.element, trial.size), found.tiles)
    return {**row, **facts, "bytes_per_second": rate}


def _cost(
    trial: Trial, device: Device, given: Sequence[Any], clock: Clock, tiles: Tiles
) -> float | None:
    """Seconds with these tiles; None where they do not compile or fit."""
    try:
        return clock(run_of(trial, device.platform, tiles), given)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError):
        return None
