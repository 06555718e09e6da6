# SPDX-License-Identifier: Apache-2.0
"""What Pallas kernels for one kind of device are called with, and the exact division of GPUs."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float32

from . import bits


def triton(interpret: bool, warps: int = 4, stages: int = 3) -> dict[str, Any]:
    """Arguments of `pallas_call` for a kernel that Triton compiles."""
    if interpret:
        return {"interpret": True}
    return {"compiler_params": plgpu.CompilerParams(num_warps=warps, num_stages=stages)}


def tpu(interpret: bool, *semantics: Literal["parallel", "arbitrary"]) -> dict[str, Any]:
    """Arguments of `pallas_call` for a kernel that Mosaic compiles for TPUs. `semantics`:
    "parallel" or "arbitrary" for each axis of the grid.
    """
    if interpret:
        return {"interpret": True}
    return {"compiler_params": pltpu.CompilerParams(dimension_semantics=semantics)}


def exact_divide(interpret: bool) -> Callable[[Array, Array], Array]:
    """The IEEE division of float32 for the body of a kernel that Triton compiles, whose own is off
    by up to two ulp; 0 where x is 0.
    """
    return bits.divide if interpret else _divide


def _divide(x: Float32[Array, "..."], d: Float32[Array, "..."]) -> Float32[Array, "..."]:
    x, d = jnp.broadcast_arrays(x, d)
    d = jnp.where(x == 0, jnp.float32(1), d)
    shape = [jax.ShapeDtypeStruct(x.shape, jnp.float32)]
    [quotient] = plgpu.elementwise_inline_asm(
        "div.rn.f32 $0, $1, $2;",
        args=[x, d],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=shape,
    )
    return quotient


def cdiv(a: int, b: int) -> int:
    """How many blocks of `b` cover `a`."""
    return pl.cdiv(a, b)
