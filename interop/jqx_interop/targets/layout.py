# SPDX-License-Identifier: Apache-2.0
"""A quantized linear as the named arrays of ModelOpt's layout, and which arrays those will be.

    weight              codes as the format packs them
    weight_scale        one per channel [n], per block [n, k / block],
                        per 128x128 block [n / 128, 1, k / 128, 1]
    input_scale         what inputs are divided by, float32 []
    weight_scale_2      the tensor scale of formats with two levels, float32 []
    pre_quant_scale     what inputs are multiplied by first, [k] in the model's dtype
    weight_quantizer._svdquant_lora_a, _b    factors [r, k] and [n, r] of what is added

Names and shapes are those of files written by ModelOpt 0.47.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jqx.config import Choice, base_format
from jqx.formats import find_format
from jqx.tensors import QTensor
from jqx_interop.checkpoints import TensorOut, dtype_name

Grid = tuple[int, ...]

INNER, OUTER = "weight_quantizer._svdquant_lora_a", "weight_quantizer._svdquant_lora_b"
LEAVES = (
    *("weight", "weight_scale", "input_scale", "weight_scale_2", "pre_quant_scale"),
    *(INNER, OUTER),
)
"""The names of all arrays a linear may have."""

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
    if q.pre_quant_scale is not None:
        arrays[f"{path}.pre_quant_scale"] = q.pre_quant_scale
    if q.low_rank is not None:
        outer, inner = q.low_rank
        arrays |= {f"{path}.{INNER}": inner, f"{path}.{OUTER}": outer}
    return arrays


def outputs(
    path: str, choice: Choice, shape: tuple[int, ...], dtype: np.dtype, has_input_scale: bool
) -> list[TensorOut]:
    """What `named` will give for a weight of `shape` and `dtype` stored as `choice` says, but for
    `input_factor` and `low_rank_factors`.
    """
    return [
        TensorOut(f"{path}.{leaf}", kind, size)
        for leaf, kind, size in _leaves(choice.weight or "", shape, dtype.name, has_input_scale)
    ]


def input_factor(path: str, shape: tuple[int, ...], dtype: np.dtype) -> TensorOut:
    """The pre_quant_scale of a weight of `shape` in a model of `dtype`."""
    return TensorOut(f"{path}.pre_quant_scale", dtype_name(dtype), shape[-1:])


def low_rank_factors(
    path: str, shape: tuple[int, ...], rank: int, dtype: np.dtype
) -> list[TensorOut]:
    """The two factors beside a weight of `shape` in a model of `dtype`."""
    (n, k), kind = shape, dtype_name(dtype)
    return [
        TensorOut(f"{path}.{INNER}", kind, (rank, k)),
        TensorOut(f"{path}.{OUTER}", kind, (n, rank)),
    ]


@lru_cache(maxsize=256)
def _leaves(
    name: str, shape: tuple[int, ...], dtype: str, has_input_scale: bool
) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    q = abstract(name, shape, dtype)
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


@lru_cache(maxsize=256)
def abstract(name: str, shape: tuple[int, ...], dtype: str) -> QTensor:
    """A weight of `shape` and `dtype` in the format `name`: shapes in place of arrays."""
    return jax.eval_shape(
        lambda w: QTensor.quantize(w, find_format(name)),
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
    )


def module_and_leaf(name: str) -> tuple[str, str]:
    """The module a tensor belongs to, and the name of its leaf there."""
    for leaf in (INNER, OUTER):
        if name.endswith(f".{leaf}"):
            return name.removesuffix(f".{leaf}"), leaf
    path, _, leaf = name.rpartition(".")
    return path, leaf


def shift(scale: np.ndarray, zeros: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray] | None:
    """What signed codes [n, k] with the zero points `zeros` [n, blocks] are more than the same
    codes with the zero point 0, as a part of low rank; None where all are 0.

        scale * (code - zero)  =  scale * code  +  (-scale * zero) * [the block of the column]
    """
    if not np.any(zeros):
        return None
    blocks = scale.shape[1]
    inside = np.arange(blocks)[:, None] == np.arange(k)[None, :] // (k // blocks)
    return scale * -zeros.astype(np.float32), inside.astype(np.float32)


def companions(
    names: Iterable[str], groups: Mapping[str, list[TensorOut]]
) -> dict[str, list[TensorOut]]:
    """Where the tensors of `groups` come among the parameters `names`: parameter -> what follows
    it.

    A group follows the last parameter that lies in the module it is named by.
    """
    last: dict[str, str] = {}
    for name in names:
        last |= {name[:i]: name for i, letter in enumerate(name) if letter == "."}
    after: dict[str, list[TensorOut]] = {}
    for path, tensors in groups.items():
        after.setdefault(last[path], []).extend(tensors)
    return after


def gathered(
    arrays: Mapping[str, np.ndarray], choice: Choice, shape: tuple[int, ...], dtype: np.dtype
) -> QTensor:
    """The QTensor of a weight of `shape` and `dtype` from its stored arrays by leaf name: what
    `named` takes apart. It holds views of them.
    """
    like = abstract(choice.weight or "", shape, dtype.name)

    def leaf(name: str, form: tuple[int, ...]) -> np.ndarray | None:
        return arrays[name].reshape(form) if name in arrays else None

    return QTensor(
        codes=leaf("weight", like.codes.shape),
        scale=leaf("weight_scale", like.scale.shape),
        tensor_scale=leaf("weight_scale_2", ()),
        format=like.format,
        dtype=like.dtype,
        input_scale=leaf("input_scale", ()),
        pre_quant_scale=leaf("pre_quant_scale", shape[-1:]),
        input_format=choice.input,
        low_rank=(arrays[OUTER], arrays[INNER]) if OUTER in arrays else None,
    )
