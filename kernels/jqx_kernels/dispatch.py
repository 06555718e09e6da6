# SPDX-License-Identifier: Apache-2.0
"""One operation, several implementations: the first that can do it on this device is taken.

An operation has an immutable table of rows, in the order in which they are tried. The first is the
fastest where it works; the last is plain jnp, which works everywhere and is the definition.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax


class Unsupported(ValueError):
    """No implementation can do it; the message says what each of them lacks."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a program will run on. `platform`: "cpu", "gpu" or "tpu"; `kind`: the name of the device
    ("NVIDIA H100 80GB HBM3", "TPU v5e"); `capability`: that of CUDA, (9, 0) for an H100.
    """

    platform: str
    kind: str = ""
    capability: tuple[int, int] | None = None


CPU = Device("cpu", "cpu")


def device_of(device: Any) -> Device:
    """The description of a `jax.Device`."""
    told = str(getattr(device, "compute_capability", "") or "")
    major, _, minor = told.partition(".")
    capability = (int(major), int(minor or 0)) if major.isdecimal() else None
    return Device(device.platform, device.device_kind, capability)


def current_device() -> Device:
    """The device on which JAX would compute now, where nothing else is said."""
    chosen = getattr(jax.config, "jax_default_device", None)
    if chosen is None:
        return device_of(jax.devices()[0])
    return device_of(jax.devices(chosen)[0] if isinstance(chosen, str) else chosen)


Lacks = Callable[[Device, Any], str | None]


def nothing(device: Device, request: Any) -> str | None:
    """What an implementation lacks that works everywhere."""
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Implementation:
    """One way to compute an operation. `run`: a function of its arguments, for jit. `lacks`: why it
    cannot do a request, static facts about the arguments, on a device; None where it can.
    """

    name: str
    run: Callable[..., Any]
    lacks: Lacks = nothing


Table = tuple[Implementation, ...]


def find_implementation(
    op: str, table: Table, request: Any, device: Device | None = None, name: str | None = None
) -> Implementation:
    """The first row of `table` that can do `request` on `device` (the current one if None), or the
    one called `name`.

    Raises Unsupported where there is none, with what each lacks, and for a `name` that is not there
    or cannot do it.
    """
    device = current_device() if device is None else device
    rows = table if name is None else tuple(row for row in table if row.name == name)
    if not rows:
        raise Unsupported(f"{op} has no implementation '{name}'; there are {_names(table)}")
    reasons = []
    for row in rows:
        lacks = row.lacks(device, request)
        if lacks is None:
            return row
        reasons.append(f"{row.name}: {lacks}")
    where = device.kind or device.platform
    raise Unsupported(f"{op} of {request} cannot be computed on {where}. {'; '.join(reasons)}")


def _names(table: Iterable[Implementation]) -> str:
    return ", ".join(row.name for row in table)
