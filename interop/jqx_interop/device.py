# SPDX-License-Identifier: Apache-2.0
"""Which arithmetic the device at hand is good at."""

import os
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jqx.errors import nearest
from jqx.models import COMPUTES, Compute

CPU_FLAGS = Path("/proc/cpuinfo")
BF16_UNITS = "amx_bf16"
COMPUTE_NAMES = ("auto", "float32", "bf16")


@cache
def device_kind() -> str:
    """The second half of the keys of COMPUTES for JAX's default device."""
    if jax.default_backend() != "cpu":
        return "accelerator"
    flags = CPU_FLAGS.read_text() if CPU_FLAGS.is_file() else ""
    return "cpu with bf16 units" if BF16_UNITS in flags.split() else "cpu"


def callers() -> int:
    """How many calls of a compiled program to have under way: a CPU's cores idle in one alone,
    where its small operations run on a single core.
    """
    return min(processors(), 4) if jax.default_backend() == "cpu" else 1


def processors() -> int:
    """The processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compute_of(name: str, dtype: np.dtype) -> Compute:
    """The arithmetic called "float32" or "bf16"; "auto" is bf16 for a bfloat16 model on a device
    with matrix units for it, else float32. `dtype`: the model's.

    Raises InputError for another name.
    """
    if name not in COMPUTE_NAMES:
        raise nearest(name, COMPUTE_NAMES, "compute")
    device = device_kind()
    if name == "auto":
        units = device != "cpu" and dtype == jnp.bfloat16
        name = "bf16" if units else "float32"
    return COMPUTES[name, device]
