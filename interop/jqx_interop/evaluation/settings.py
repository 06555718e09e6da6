# SPDX-License-Identifier: Apache-2.0
"""How an evaluation is made: everything a caller may choose besides the models."""

from dataclasses import dataclass
from pathlib import Path

from jqx.errors import InputError, nearest
from jqx_interop.checkpoints import parse_size
from jqx_interop.device import COMPUTE_NAMES

LEAST = {"window": 2, "stride": 1, "max_tokens": 2, "batch_size": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """Choices of one evaluation.

    `text`: a .txt, .md, .jsonl, .parquet or .npy file (None: the bundled text); `window` tokens are
    run together (None: 512, or as many as the model has positions), every `stride` tokens (None:
    half a window); `max_tokens` of the text are read (None: all); `batch_size` windows at a time
    (0: chosen); `max_memory`, bytes or text such as "4GiB": above it, hidden states live in
    memory-mapped files; `compute`: "auto", "float32" or "bf16".
    """

    text: str | Path | None = None
    window: int | None = None
    stride: int | None = None
    batch_size: int = 0
    max_tokens: int | None = None
    max_memory: int | str = "4GiB"
    compute: str = "auto"

    def check(self) -> None:
        """Raise InputError for numbers, sizes and names that none of these can be."""
        for field, least in LEAST.items():
            value = getattr(self, field)
            if value is not None and value < least:
                raise InputError(f"{field} is {value}; give at least {least}")
        try:
            parse_size(self.max_memory)
        except InputError as error:
            raise InputError(f"max_memory: {error}") from error
        if self.compute not in COMPUTE_NAMES:
            raise nearest(self.compute, COMPUTE_NAMES, "compute")
