# SPDX-License-Identifier: Apache-2.0
"""MXFP4 as GPT-OSS has it: blocks of 32 codes and their exponents, experts in front.

    W[e, r, 32 g + 2 j]     = e2m1(blocks[e, r, g, j] & 15) * 2^(scales[e, r, g] - 127)
    W[e, r, 32 g + 2 j + 1] = e2m1(blocks[e, r, g, j] >> 4) * 2^(scales[e, r, g] - 127)

This is [E, out, in]; the plain tensor is [E, in, out]. A matrix without experts stays [out, in].
"""

import numpy as np

from jqx.config import Choice
from jqx.formats import find_format
from jqx.tensors import QTensor

from .weight import Arrays, Found, Given, Weight, decoded

BLOCKS, SCALES = "_blocks", "_scales"
BYTES = 16  # of a block of 32 codes


def mxfp4_weights(given: Given) -> Found:
    """Every tensor of blocks with its scales, by name."""
    have = given.tensors
    for name, info in have.items():
        if (base := name.removesuffix(SCALES)) != name and base + BLOCKS not in have:
            yield f"tensor {name} scales nothing: {base}{BLOCKS} is missing"
        if (base := name.removesuffix(BLOCKS)) == name:
            continue
        if (scales := base + SCALES) not in have:
            yield f"tensor {scales} is missing"
        elif info.dtype != "U8" or len(info.shape) < 3 or info.shape[-1] != BYTES:
            yield f"tensor {name} is {info.dtype} {info.shape}, it should be U8 [..., {BYTES}]"
        elif (have[scales].dtype, have[scales].shape) != ("U8", info.shape[:-1]):
            yield (
                f"tensor {scales} is {have[scales].dtype} {have[scales].shape}, "
                f"it should be U8 {info.shape[:-1]}"
            )
        else:
            yield _weight(given, base, {"codes": name, "scale": scales}, info.shape)


def _weight(given: Given, base: str, parts: dict[str, str], blocks: tuple[int, ...]) -> Weight:
    *lead, rows, groups, _ = blocks
    columns = 2 * BYTES * groups

    def stored(arrays: Arrays) -> QTensor:
        codes = arrays["codes"]
        return QTensor(
            codes=codes.reshape(*codes.shape[:-2], BYTES * groups),
            scale=arrays["scale"],
            tensor_scale=None,
            format=find_format("mxfp4"),
            dtype=given.dtype,
        )

    def floats(arrays: Arrays, dtype: np.dtype) -> np.ndarray:
        straight = decoded(stored(arrays), dtype)
        return np.ascontiguousarray(np.swapaxes(straight, -1, -2)) if lead else straight

    return Weight(
        name=base,
        shape=(*lead, columns, rows) if lead else (rows, columns),
        parts=parts,
        floats=floats,
        choice=Choice(weight="mxfp4"),
        stored=stored,
        stacked=tuple(parts) if lead else (),
    )
