# SPDX-License-Identifier: Apache-2.0
"""Documents become sequences of token ids.

Each document is tokenized with the special tokens that the tokenizer itself puts around a text
(a chat template writes its own), the ids of all documents are joined in order, and the stream is
cut into sequences. No padding, no truncation of documents.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from jqx.errors import InputError
from jqx_interop.checkpoints.problems import one_line

from .documents import Document


def load_tokenizer(directory: Path | None) -> Any:
    """The `tokenizers.Tokenizer` of tokenizer.json. Raises InputError if there is none."""
    import tokenizers

    path = None if directory is None else directory / "tokenizer.json"
    if path is None or not path.is_file():
        raise InputError(
            one_line(
                f"{directory}: no tokenizer.json, so text cannot become token ids. "
                "Give the ids themselves as a .npy file of shape [batches, batch, length]."
            )
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise InputError(one_line(f"{path}: is not a tokenizer ({error}).")) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def sequences(
    documents: Iterable[Document], tokenizer: Any, size: int, length: int
) -> list[np.ndarray]:
    """The first `size` sequences of `length` ids (int64), fewer if the text ends before.

    A last shorter piece is dropped unless it is all there is. Reads no more documents than it
    needs. An empty list means that there was no text.
    """
    found: list[np.ndarray] = []
    rest: list[int] = []
    for ids in _encoded(documents, tokenizer):
        rest += ids
        whole = len(rest) // length * length
        found += [np.array(rest[i : i + length], np.int64) for i in range(0, whole, length)]
        rest = rest[whole:]
        if len(found) >= size:
            return found[:size]
    return found or ([np.array(rest, np.int64)] if rest else [])


def stream(
    documents: Iterable[Document], tokenizer: Any, between: str, size: int | None = None
) -> Int64[np.ndarray, " n"]:
    """The first `size` ids of all documents as one text (None: all), with `between` before each but
    the first.

    The special tokens that the tokenizer puts before a text come once, before the first document;
    those it puts after one are left out. Reads no more documents than it needs.
    """
    found: list[int] = []
    for text, special in documents:
        if not text or text.isspace():
            continue
        if special and found:
            text = between + text
        elif special:
            found += _opening(tokenizer)
        found += tokenizer.encode(text, add_special_tokens=False).ids
        if size is not None and len(found) >= size:
            break
    return np.array(found[:size], np.int64)


def _opening(tokenizer: Any) -> list[int]:
    """The special tokens before a text."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    own = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
    return encoding.ids[: own[0]] if own else []


def _encoded(documents: Iterable[Document], tokenizer: Any) -> Iterator[list[int]]:
    for text, special in documents:
        if text and not text.isspace():
            yield tokenizer.encode(text, add_special_tokens=special).ids
