# SPDX-License-Identifier: Apache-2.0
"""Calibration data that is loaded, or refused in one line."""

from pathlib import Path

import pytest

from jqx.errors import InputError
from jqx_interop.data import CalibrationSet, load_calibration

WORDS = ["<s>", "?", *"abcdefghij"]
IDS = {word: i for i, word in enumerate(WORDS)}


def load(
    source: object, model: Path | None = None, *, size=4, length=3, vocab=12
) -> CalibrationSet:
    return load_calibration(source, tokenizer_dir=model, vocab_size=vocab, size=size, length=length)


def words(found: CalibrationSet) -> list[str]:
    return ["".join(WORDS[i] for i in row) for batch in found for row in batch]


def refused(source: object, model: Path | None, *phrases: str, vocab: int = 12) -> None:
    with pytest.raises(InputError) as caught:
        load(source, model, vocab=vocab)
    assert "\n" not in str(caught.value)
    for phrase in phrases:
        assert phrase in str(caught.value)
