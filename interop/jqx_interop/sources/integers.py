# SPDX-License-Identifier: Apache-2.0
"""AutoAWQ and GPTQ: integers that share words, with scales and zero points of blocks.

    W[r, c] = (code[r, c] - zero[r, b]) * scale[r, b]       b = g_idx[c], else c // block

GPTQ packs along the columns, `bits` to a code without gaps: three bits straddle words. Its first
version stores zero - 1.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from jqx.config import Choice
from jqx.errors import InputError
from jqx.tensors import QTensor
from jqx_interop.targets import INDEX, TARGETS, Target, int4_config, int4_layout

from .weight import Arrays, Found, Given, Shape, Weight, bad_index

GPTQ_BITS = (2, 3, 4, 8)
WORD = 32
Integers = Callable[[Arrays], tuple[np.ndarray, np.ndarray]]
"""From arrays to codes [n, k] and zero points [n, blocks]."""


def stream(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes [n, r * 32 / bits] from int32 words [n, r], the lowest bits first."""
    raw = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    codes = raw[:, : raw.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return (codes << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def awq_weights(given: Given) -> Found:
    """AutoAWQ's linears."""
    int4_config.check_said(given.said or given.file)
    layout = int4_layout.AUTOAWQ
    read = partial(_int4, layout)
    yield from _weights(given, "awq", 4, read, lambda shape: (shape[1] * 8, shape[0]))


def gptq_weights(given: Given) -> Found:
    """GPTQ's linears, in both versions and with any order of columns."""
    said = given.said or given.file
    bits = said.get("bits")
    if bits not in GPTQ_BITS:
        known = ", ".join(map(str, GPTQ_BITS))
        raise InputError(f"its codes have {bits!r} bits; those of {known} are read")
    int4_config.check_said({**said, "bits": 4})
    second = int4_config.version_of(said) == int4_config.V2
    layout = int4_layout.GPTQ if second else int4_layout.GPTQ_V1
    read = partial(_int4, layout) if bits == 4 else partial(_other, bits, 0 if second else 1)
    name = "gptq" if second else "gptq-v1"
    yield from _weights(given, name, bits, read, lambda s: (s[1], s[0] * WORD // bits))


def _int4(layout: int4_layout.Int4Layout, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    return layout.codes(arrays), layout.zeros(arrays)


def _other(bits: int, less: int, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    zeros = stream(arrays["qzeros"], bits).astype(np.int32).T
    return stream(arrays["qweight"].T, bits), zeros + less


def _weights(
    given: Given, name: str, bits: int, read: Integers, matrix: Callable[[Shape], Shape]
) -> Found:
    target, have = TARGETS[name], given.tensors
    found = [n.removesuffix(".qweight") for n in have if n.endswith(".qweight")]
    if not found:
        yield "its description says integers, and no linear has a qweight"
    for path in found:
        parts = {leaf: n for leaf in target.leaves if (n := f"{path}.{leaf}") in have}
        shapes = {leaf: have[n].shape for leaf, n in parts.items()}
        dtypes = {have[parts["qweight"]].dtype, have[parts.get("qzeros", parts["qweight"])].dtype}
        if len(shapes["qweight"]) != 2 or dtypes != {"I32"}:
            yield f"{path}: qweight and qzeros should be matrices of I32"
            continue
        shape = matrix(shapes["qweight"])
        problems = list(_problems(path, shapes, shape, bits))
        if (given.said or given.file).get("desc_act") and INDEX not in parts:
            problems.append(f"its columns are in another order (desc_act), and {path} has no g_idx")
        if INDEX in parts and not problems:
            index = bad_index(given, parts[INDEX], shapes["scales"][0])
            problems += [index] if index else []
        yield from problems
        if not problems:
            yield _weight(given, target, path, (parts, shape, bits), read)


def _problems(path: str, shapes: dict[str, Shape], shape: Shape, bits: int) -> Iterator[str]:
    n, k = shape
    for leaf in ("scales", "qzeros"):
        if leaf not in shapes:
            yield f"tensor {path}.{leaf} is missing"
            return
    blocks = shapes["scales"][0] if len(shapes["scales"]) == 2 else 0
    wanted = {
        "scales": (blocks, n),
        "qzeros": (blocks, -(-n * bits // WORD)),
        INDEX: (k,),
    }
    for leaf, needed in wanted.items():
        if leaf in shapes and shapes[leaf] != needed:
            yield f"tensor {path}.{leaf} has shape {shapes[leaf]}, it should have {needed}"
    if not blocks or (k % blocks and INDEX not in shapes):
        yield f"{path} has {blocks} blocks of {k} columns, which is no whole number of columns"


def _weight(
    given: Given,
    target: Target,
    path: str,
    lies: tuple[dict[str, str], Shape, int],
    read: Integers,
) -> Weight:
    parts, shape, bits = lies
    (n, k), blocks = shape, given.tensors[parts["scales"]].shape[0]
    size = k // blocks
    choice = Choice(weight="int4" if size == 128 else f"int4_b{size}")

    def floats(arrays: Arrays, dtype: np.dtype) -> np.ndarray:
        codes, zeros = read(arrays)
        index = arrays[INDEX] if INDEX in arrays else np.arange(k) // size
        whole = codes.astype(np.int16) - zeros[:n].astype(np.int16)[:, index]
        scale = arrays["scales"].astype(np.float32).T
        return (whole * scale[:, index]).astype(dtype)

    def stored(arrays: Arrays) -> QTensor:
        if target.shifted(arrays):
            raise InputError(f"{path} has zero points, for which there are no codes here")
        return target.gathered(arrays, choice, shape, given.dtype)

    whole = bits == 4 and k % blocks == 0
    return Weight(
        name=f"{path}.weight",
        shape=shape,
        parts=parts,
        floats=floats,
        choice=choice if whole else None,
        stored=stored if whole else None,
    )
