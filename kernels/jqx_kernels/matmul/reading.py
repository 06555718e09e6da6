# SPDX-License-Identifier: Apache-2.0
"""Tiles of matrices in kernels that Triton compiles, which checks no bounds."""

from functools import reduce
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

Limits = tuple[Any, Any]
"""Where a matrix ends, an integer each, None along an axis that whole tiles cover."""


def inside(starts: Any, sizes: tuple[int, int], limits: Limits) -> Array | None:
    """Where a tile lies below the limits of its axes, None for an axis it lies in anyway."""
    masks = [
        lax.broadcasted_iota(jnp.int32, sizes, axis) + start < limit
        for axis, (start, limit) in enumerate(zip(starts, limits, strict=True))
        if limit is not None
    ]
    return reduce(jnp.logical_and, masks) if masks else None


def read_tile(
    ref: Any, starts: Any, sizes: tuple[int, int], limits: Limits, lead: tuple[Any, ...] = ()
) -> Array:
    """A tile of a matrix, zeros beyond its limits. `lead`: which matrix of a stack, if any."""
    at = ref.at[(*lead, *map(pl.ds, starts, sizes))]
    mask = inside(starts, sizes, limits)
    if mask is None:
        return plgpu.load(at)
    return plgpu.load(at, mask=mask, other=jnp.zeros(sizes, ref.dtype))
