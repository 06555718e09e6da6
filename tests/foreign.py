# SPDX-License-Identifier: Apache-2.0
"""Quantized weights as others store them, in slow NumPy: from codes and scales to the arrays of a
layout, and to the floats that they stand for, one number at a time.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import reference
from checkpoints import write

from jqx_interop.checkpoints import TensorInfo, dtype_name

BF16, F8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
Arrays = dict[str, np.ndarray]

FP8_BLOCKS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}


def infos(arrays: Arrays) -> dict[str, TensorInfo]:
    """Headers of arrays that lie in no file."""
    here = Path("nowhere")
    return {
        n: TensorInfo(n, dtype_name(a.dtype), a.shape, here, 0, a.nbytes) for n, a in arrays.items()
    }


# --- definitions


def fp8(codes: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """One matrix: a code times the scale of its block."""
    values, out = reference.value("e4m3", codes.view(np.uint8)), np.zeros(codes.shape, np.float32)
    for r in range(codes.shape[0]):
        for c in range(codes.shape[1]):
            out[r, c] = np.float32(values[r, c] * scale[r // block[0], c // block[1]])
    return out


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """One matrix [out, in] of blocks [out, groups, 16] and exponents [out, groups]."""
    rows, groups, _ = blocks.shape
    out = np.zeros((rows, 32 * groups), np.float32)
    for r, g, j in np.ndindex(blocks.shape):
        for half in (0, 1):
            code = (int(blocks[r, g, j]) >> (4 * half)) & 15
            sign = -1 if code >= 8 else 1
            step = 2.0 ** (int(scales[r, g]) - 127)
            out[r, 32 * g + 2 * j + half] = sign * reference.E2M1[code & 7] * step
    return out


def integers(
    codes: np.ndarray, zeros: np.ndarray, scale: np.ndarray, index: np.ndarray
) -> np.ndarray:
    """(code - zero) * scale of the block that the index of a column names."""
    out = np.zeros(codes.shape, np.float32)
    for r, c in np.ndindex(codes.shape):
        b = index[c]
        out[r, c] = (int(codes[r, c]) - int(zeros[r, b])) * np.float32(scale[r, b])
    return out


# --- arrays


def fp8_of(w: np.ndarray, block: tuple[int, int] = (128, 128)) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of blocks whose largest magnitude is 448 after it."""
    grid = reference.block_amax(w, *block)
    scale = np.where(grid == 0, 1, grid / 448).astype(np.float32)
    wide = np.repeat(np.repeat(scale, block[0], 0), block[1], 1)[: w.shape[0], : w.shape[1]]
    return (w.astype(np.float32) / wide).astype(F8), scale


def mxfp4_of(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks [out, in / 32, 16] and scales [out, in / 32]."""
    codes, scale, _, _ = reference.quantize(w, "mxfp4")
    packed = reference.pack(codes, "mxfp4")
    return packed.reshape(len(w), -1, 16), scale


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 words [n, k * bits / 32] of codes [n, k], the lowest bits first, bit by bit."""
    out = np.zeros((len(codes), codes.shape[1] * bits // 32), np.uint32)
    for r, c in np.ndindex(codes.shape):
        for bit in range(bits):
            at = c * bits + bit
            out[r, at // 32] |= np.uint32((int(codes[r, c]) >> bit & 1) << (at % 32))
    return out.view(np.int32)


def awq_words(codes: np.ndarray) -> np.ndarray:
    """int32 words [k, n / 8] of codes [k, n] in AutoAWQ's order."""
    out = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for r, c in np.ndindex(codes.shape):
        nibble = (0, 4, 1, 5, 2, 6, 3, 7)[c % 8]
        out[r, c // 8] |= np.uint32(int(codes[r, c]) << (4 * nibble))
    return out.view(np.int32)


def stored_as_fp8(tensors: Arrays, keep: tuple[str, ...] = ("embed", "norm", "head")) -> Arrays:
    """The matrices of a model as blocks of FP8."""
    found: Arrays = {}
    for name, w in tensors.items():
        if any(word in name for word in keep):
            found[name] = w
        else:
            found[name], found[f"{name}_scale_inv"] = fp8_of(w)
    return found


def stored_as_mxfp4(tensors: Arrays, keep: tuple[str, ...] = ("embed", "norm", "head")) -> Arrays:
    """The matrices of a model as blocks of MXFP4, as GPT-OSS names them."""
    found: Arrays = {}
    for name, w in tensors.items():
        if any(word in name for word in keep):
            found[name] = w
        else:
            found[f"{name}_blocks"], found[f"{name}_scales"] = mxfp4_of(w)
    return found


def put(folder: Path, config: dict[str, Any], tensors: Arrays) -> Path:
    """A checkpoint of these tensors."""
    folder.mkdir()
    write(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
