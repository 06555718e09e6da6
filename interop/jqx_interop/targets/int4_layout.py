# SPDX-License-Identifier: Apache-2.0
"""A linear with INT4 weights as the named arrays of AutoAWQ and of GPTQ, and back.

    qweight    codes + 8, eight to an int32: AutoAWQ [k, n / 8], GPTQ [k / 8, n]
    qzeros     the code that decodes to 0, int32 [k / block, n / 8]; GPTQ's first version has 1 less
    scales     float16 [k / block, n]
    g_idx      the block of every column, int32 [k], of GPTQ alone

AutoAWQ has the rows 0 2 4 6 1 3 5 7 of eight from the lowest bits up, GPTQ has them in order. Codes
with other zeros than 8 become symmetric ones and a part of low rank (`layout.shift`).
(AutoAWQ 0.2 `WQLinear_GEMM`; GPTQModel 4, `checkpoint_format` gptq and gptq_v2.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jqx.config import Choice, base_format
from jqx.errors import InputError
from jqx.tensors import QTensor
from jqx_interop.checkpoints import TensorOut

from .ct_schemes import block_of
from .layout import abstract, shift

EIGHT = 8  # codes in a word
ZERO = 8  # the code that decodes to 0
LEAVES = ("qweight", "qzeros", "scales", "g_idx")
"""The names of all arrays a linear may have."""

INDEX = "g_idx"


@dataclass(frozen=True, kw_only=True, slots=True)
class Int4Layout:
    """`order`: the rows of eight from the lowest bits up; `by_rows`: whether a word has codes of
    eight rows, not of eight columns; `zero`: what is stored for codes that decode to 0 at 8;
    `indexed`: whether there is a g_idx.
    """

    order: tuple[int, ...] = tuple(range(EIGHT))
    by_rows: bool = False
    zero: int = ZERO
    indexed: bool = True

    def named(self, path: str, q: QTensor) -> dict[str, Any]:
        """The arrays of the linear `path`; scales are rounded to float16 (`halved`)."""
        n, k = q.shape
        scales = np.ascontiguousarray(halved(np.asarray(q.scale).T))
        zeros = np.full((scales.shape[0], n), self.zero, np.uint8)
        codes = _columns(np.asarray(q.codes)).T
        arrays = {"qweight": self._packed(codes), "qzeros": _words(zeros, self.order)}
        arrays["scales"] = scales
        if self.indexed:
            arrays[INDEX] = np.arange(k, dtype=np.int32) // (k // scales.shape[0])
        return {f"{path}.{leaf}": array for leaf, array in arrays.items()}

    def outputs(
        self,
        path: str,
        choice: Choice,
        shape: tuple[int, ...],
        dtype: np.dtype,
        has_input_scale: bool,
    ) -> list[TensorOut]:
        """What `named` will give for a weight of `shape` stored as `choice` says."""
        (n, k), blocks = shape, shape[1] // (block_of(choice.weight or "") or shape[1])
        codes = (k, n // EIGHT) if self.by_rows else (k // EIGHT, n)
        found = [
            TensorOut(f"{path}.qweight", "I32", codes),
            TensorOut(f"{path}.qzeros", "I32", (blocks, n // EIGHT)),
            TensorOut(f"{path}.scales", "F16", (blocks, n)),
        ]
        return [*found, TensorOut(f"{path}.{INDEX}", "I32", (k,))] if self.indexed else found

    def gathered(
        self,
        arrays: Mapping[str, np.ndarray],
        choice: Choice,
        shape: tuple[int, ...],
        dtype: np.dtype,
    ) -> QTensor:
        """The QTensor of a weight of `shape` and `dtype` from its stored arrays by leaf name; with
        a low-rank part where zeros are not 8. Raises InputError for columns in another order.
        """
        like = abstract(choice.weight or "", shape, dtype.name)
        scale = arrays["scales"].astype(np.float32).T
        if (problem := unread(arrays)) is not None:
            raise InputError(problem)
        return QTensor(
            codes=_pairs(self.codes(arrays)).reshape(like.codes.shape),
            scale=np.ascontiguousarray(scale).reshape(like.scale.shape),
            tensor_scale=None,
            format=like.format,
            dtype=like.dtype,
            low_rank=shift(scale, self.zeros(arrays) - ZERO, shape[1]),
        )

    def codes(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Codes [n, k], 0 to 15."""
        return self._unpacked(arrays["qweight"]).T

    def zeros(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The code that decodes to 0, of every block [n, blocks]."""
        found = _nibbles(arrays["qzeros"], self.order).astype(np.int32)
        return found.T + (ZERO - self.zero)

    def shifted(self, arrays: Mapping[str, np.ndarray]) -> bool:
        """Whether codes have other zeros than 8."""
        return bool(np.any(_nibbles(arrays["qzeros"], self.order) != self.zero))

    def _packed(self, codes: np.ndarray) -> np.ndarray:
        """Words of codes [k, n] of four bits."""
        if self.by_rows:
            return _words(codes, self.order)
        k, n = codes.shape
        eights = codes.reshape(k // EIGHT, EIGHT, n).transpose(0, 2, 1)
        return _words(eights.reshape(k // EIGHT, n * EIGHT), self.order)

    def _unpacked(self, words: np.ndarray) -> np.ndarray:
        codes = _nibbles(words, self.order)
        if self.by_rows:
            return codes
        eights = codes.reshape(*words.shape, EIGHT).transpose(0, 2, 1)
        return eights.reshape(-1, words.shape[1])


AUTOAWQ = Int4Layout(order=(0, 2, 4, 6, 1, 3, 5, 7), by_rows=True, indexed=False)
GPTQ = Int4Layout()
GPTQ_V1 = Int4Layout(zero=ZERO - 1)


def is_int4(choice: Choice) -> bool:
    """Whether a choice is INT4 weights alone, which is all that these layouts hold."""
    plain = choice.input is None and choice.variant is None
    return plain and base_format(choice.weight or "") == "int4"


def halved(scale: np.ndarray) -> np.ndarray:
    """Scales in float16: none becomes zero or infinite, what is out of reach is clipped."""
    limits = np.finfo(np.float16)
    least, most = np.float32(limits.smallest_subnormal), np.float32(limits.max)
    wide = np.abs(scale.astype(np.float32))
    return np.copysign(np.clip(wide, least, most), scale).astype(np.float16)


def holds(scale: np.ndarray) -> bool:
    """Whether float16 holds scales as they are."""
    wide = scale.astype(np.float32)
    with np.errstate(over="ignore"):
        return np.array_equal(wide.astype(np.float16).astype(np.float32), wide)


def unread(arrays: Mapping[str, np.ndarray]) -> str | None:
    """Why the codes of a linear cannot be read; None if they can."""
    if INDEX in arrays:
        index, blocks = arrays[INDEX], arrays["qzeros"].shape[0]
        if np.any(index != np.arange(index.shape[0]) // (index.shape[0] // blocks)):
            return "its columns are in another order (desc_act), which is not read"
    return None


def zero_biases(path: str, choice: Choice, shape: tuple[int, ...]) -> list[TensorOut]:
    """The bias that AutoGPTQ gave every linear; zeros where the model has none."""
    return [TensorOut(f"{path}.bias", "", shape[:1])]


def _columns(codes: np.ndarray) -> np.ndarray:
    """Codes + 8 [n, k] from signed ones whose rows share bytes [n / 2, k]."""
    return np.stack([codes & 15, codes >> 4], 1).reshape(-1, codes.shape[1]) ^ np.uint8(ZERO)


def _pairs(codes: np.ndarray) -> np.ndarray:
    """Signed codes whose rows share bytes [n / 2, k] from codes + 8 [n, k]."""
    pairs = (codes ^ np.uint8(ZERO)).reshape(-1, 2, codes.shape[1])
    return pairs[:, 0] | pairs[:, 1] << 4


def _words(codes: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """int32 [r, c / 8] of codes [r, c] of four bits."""
    eights = codes.reshape(codes.shape[0], -1, EIGHT)[:, :, list(order)]
    found = eights[:, :, 0::2] | eights[:, :, 1::2] << 4
    return np.ascontiguousarray(found).view("<i4")[:, :, 0]


def _nibbles(words: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    found = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, EIGHT // 2)
    eights = np.stack([found & 15, found >> 4], -1).reshape(*words.shape, EIGHT)
    return eights[:, :, np.argsort(order)].reshape(words.shape[0], -1)
