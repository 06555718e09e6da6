# SPDX-License-Identifier: Apache-2.0
"""A quantized linear as the named arrays of ModelOpt's layout, and which arrays those will be.

    weight              codes as the format packs them
    weight_scale        one per channel [n], per block [n, k / block],
                        per 128x128 block [n / 128, 1, k / 128, 1]
    input_scale         what inputs are divided by, float32 []
    weight_scale_2      the tensor scale of formats with two levels, float32 []

Names and shapes are those of files written by ModelOpt 0.47.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jqx.config import base_format
from jqx.formats import find_format
from jqx.tensors import QTensor
from jqx_interop.checkpoints import TensorOut, dtype_name

Grid = tuple[int, ...]

SCALE_SHAPES: Mapping[str, Callable[[Grid], Grid]] = {
    "fp8_channel": lambda grid: grid[:-1],
    "int8": lambda grid: grid[:-1],
    "fp8_block": lambda grid: (grid[0], 1, grid[1], 1),
}


def named(path: str, q: QTensor) -> dict[str, ArrayLike]:
    """The arrays of the linear `path`, in the order of the layout."""
    reshape = SCALE_SHAPES.get(base_format(q.format.name), lambda grid: grid)
    arrays: dict[str, ArrayLike] = {f"{path}.weight": q.codes}
    arrays[f"{path}.weight_scale"] = np.reshape(q.scale, reshape(q.scale.shape))
    if q.input_scale is not None:
        arrays[f"{path}.input_scale"] = q.input_scale
    if q.tensor_scale is not None:
        arrays[f"{path}.weight_scale_2"] = q.tensor_scale
    return arrays


def outputs(
    path: str, name: str, shape: tuple[int, ...], dtype: np.dtype, has_input_scale: bool
) -> list[TensorOut]:
    """What `named` will give for a weight of `shape` and `dtype` stored in the format `name`."""
    return [
        TensorOut(f"{path}.{leaf}", kind, size)
        for leaf, kind, size in _leaves(name, shape, dtype.name, has_input_scale)
    ]


@lru_cache(maxsize=256)
def _leaves(
    name: str, shape: tuple[int, ...], dtype: str, has_input_scale: bool
) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    q = jax.eval_shape(
        lambda w: QTensor.quantize(w, find_format(name)),
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
    )
    reshape = SCALE_SHAPES.get(base_format(name), lambda grid: grid)
    leaves = [
        ("weight", dtype_name(np.dtype(q.codes.dtype)), tuple(q.codes.shape)),
        ("weight_scale", dtype_name(np.dtype(q.scale.dtype)), reshape(tuple(q.scale.shape))),
    ]
    if has_input_scale:
        leaves.append(("input_scale", "F32", ()))
    if q.tensor_scale is not None:
        leaves.append(("weight_scale_2", "F32", ()))
    return tuple(leaves)
