# SPDX-License-Identifier: Apache-2.0
"""Prompts become token ids: texts, ids as they are, and conversations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jqx.errors import InputError
from jqx_interop.checkpoints import one_line
from jqx_interop.data.chat import Chat
from jqx_interop.data.tokens import load_tokenizer

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | np.ndarray | Sequence[Message]
"""A text; token ids; or a conversation, a list of {"role": ..., "content": ...}."""


def listed(prompts: Any) -> list[Any]:
    """One prompt, or several, as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    one = bool(items) and (_is_id(items[0]) or isinstance(items[0], Mapping))
    return [items] if one else items


def open_tokenizer(path: Path | None, needed: bool) -> Any:
    """The `tokenizers.Tokenizer` in the directory `path`; None if there is none and none is
    `needed`. Raises InputError otherwise.
    """
    if path is not None and (path / "tokenizer.json").is_file():
        return load_tokenizer(path)
    if needed:
        where = "the model, which came from no directory," if path is None else str(path)
        raise InputError(one_line(f"{where} has no tokenizer.json: give prompts as token ids"))
    return None


def token_ids(prompts: list[Any], tokenizer: Any, path: Path | None, vocab: int) -> list[Any]:
    """The ids of every prompt, a list each, as the model expects them.

    A text gets the special tokens that the tokenizer puts around one; a conversation those of its
    chat template, and the beginning of an answer. Raises InputError for a prompt of no tokens, of
    ids outside of the vocabulary, or of another kind, and for a conversation without template.
    """
    if not prompts:
        raise InputError("there is no prompt: give at least one")
    chat = Chat(path)
    found = []
    for number, prompt in enumerate(prompts, 1):
        where = f"prompt {number}"
        ids = _ids(prompt, where, tokenizer, chat)
        if not ids:
            raise InputError(f"{where} is empty: give at least one token")
        if outside := [i for i in ids if not 0 <= i < vocab]:
            raise InputError(
                f"{where} has the token id {outside[0]}, and the model's vocabulary has {vocab}: "
                "the tokenizer is that of another model"
            )
        found.append(ids)
    return found


def _ids(prompt: Any, where: str, tokenizer: Any, chat: Chat) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt).ids) if prompt else []
    items: list[Any] = list(prompt) if isinstance(prompt, Sequence | np.ndarray) else [None]
    if all(isinstance(item, Mapping) for item in items) and items:
        text = chat.render([dict(item) for item in items], where, answer=True)
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    if not all(map(_is_id, items)):
        raise InputError(
            f"{where} is no text, no list of token ids, "
            "and no list of messages with role and content"
        )
    return [int(item) for item in items]


def is_text(prompt: Any) -> bool:
    """Whether a tokenizer is needed to read `prompt`."""
    return isinstance(prompt, str) or any(isinstance(item, Mapping) for item in prompt)


def _is_id(item: Any) -> bool:
    return isinstance(item, int | np.integer) and not isinstance(item, bool)
