# SPDX-License-Identifier: Apache-2.0
"""The text of an evaluation becomes windows of token ids.

A text is one stream: its documents are joined, with an empty line between those of .jsonl and
.parquet files, and the special tokens that the tokenizer puts before a text come once, at the very
start. Token ids in a .npy file are taken as they are: [tokens] is a stream, the rows of [sequences,
length] and of [batches, batch, length] are windows.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32

from jqx.errors import InputError
from jqx_interop.checkpoints import one_line
from jqx_interop.data.chat import Chat
from jqx_interop.data.documents import BETWEEN, READERS
from jqx_interop.data.files import find_file, read_ids
from jqx_interop.data.tokens import load_tokenizer, stream

from .settings import EvalSettings
from .windows import Windows, separate, slide

BUNDLED = "evaluation.txt"
SHAPES = {1: "[tokens]", 2: "[sequences, length]", 3: "[batches, batch, length]"}


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids, a stream or rows, where they came from, and whether there were more."""

    source: str
    ids: Int32[np.ndarray, "*shape"]
    cut: bool


def read_tokens(settings: EvalSettings, directory: Path, vocab: int) -> Tokens:
    """The ids of the text, by the tokenizer in `directory`, at most `settings.max_tokens`.

    Raises InputError for text that cannot be used and for ids outside of `vocab`.
    """
    name, path = find_file(settings.text, BUNDLED)
    most = settings.max_tokens
    if path.suffix.lower() == ".npy":
        ids = read_ids(path, SHAPES)
        ids = ids.reshape(-1, ids.shape[-1]) if ids.ndim > 1 else ids
        whole = len(ids)
        if most is not None:
            ids = ids[: max(1, most // ids.shape[1]) if ids.ndim > 1 else most]
        cut = len(ids) < whole
    else:
        documents = READERS[path.suffix.lower()](path, Chat(directory))
        between = BETWEEN[path.suffix.lower()]
        ids = stream(
            documents, load_tokenizer(directory), between, None if most is None else most + 1
        )
        cut = most is not None and len(ids) > most
        ids = ids[:most]
        if not len(ids):
            raise InputError(one_line(f"{path}: is empty, there is no text to evaluate on."))
    _check_ids(ids, vocab, name, directory)
    return Tokens(name, ids.astype(np.int32), cut)


def _check_ids(ids: Int[np.ndarray, "*s"], vocab: int, name: str, directory: Path) -> None:
    outside = (ids < 0) | (ids >= vocab)
    if outside.any():
        where = tuple(int(i) for i in np.argwhere(outside)[0])
        raise InputError(
            one_line(
                f"{name}: token id {ids[where]} at position {', '.join(map(str, where))} is "
                f"outside the vocabulary of {vocab}. The tokenizer, or the file of ids, belongs to "
                f"another model than {directory}."
            )
        )


def check_same_tokens(
    settings: EvalSettings, directory: Path, reference: Path, tokens: Tokens, vocab: int
) -> None:
    """Raise InputError if the tokenizers in two directories make different ids of the text. A
    reference without a tokenizer is taken to have the model's.
    """
    ours, theirs = (path / "tokenizer.json" for path in (directory, reference))
    if not (ours.is_file() and theirs.is_file()) or ours.read_bytes() == theirs.read_bytes():
        return
    other = read_tokens(settings, reference, vocab).ids
    if not np.array_equal(tokens.ids, other):
        raise InputError(
            one_line(
                f"{reference}: its tokenizer makes {other.size} tokens of {tokens.source}, that of "
                f"{directory} other ones ({tokens.ids.size}). Only models with the same tokens can "
                "be compared: leave the reference out, or give token ids (.npy) as the text."
            )
        )


def windows_of(tokens: Tokens, settings: EvalSettings, longest: int) -> tuple[Windows, int, int]:
    """The windows of an evaluation, their length and stride.

    `longest`: the window where settings name none. Raises InputError if they do not fit the text.
    """
    if tokens.ids.ndim > 1:
        length = tokens.ids.shape[1]
        if length < 2:
            raise InputError(
                one_line(f"{tokens.source}: rows of {length} tokens; at least 2 are needed")
            )
        if settings.window not in (None, length) or settings.stride not in (None, length):
            raise InputError(
                one_line(
                    f"{tokens.source}: its rows of {length} tokens are the windows. Leave window "
                    "and stride out, or give the ids as one stream, an array of one axis."
                )
            )
        return separate(tokens.ids), length, length
    window = settings.window or longest
    stride = settings.stride or window // 2
    try:
        return slide(tokens.ids, window, stride), window, stride
    except InputError as error:
        raise InputError(one_line(f"{tokens.source}: {error}")) from error
