# SPDX-License-Identifier: Apache-2.0
"""Text files of several kinds as a stream of documents, read no further than is asked for."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jqx.errors import InputError
from jqx_interop.checkpoints.problems import one_line

from .chat import Chat

PIECE = 1 << 18  # characters of a text file that are tokenized together


class Document(NamedTuple):
    """A text, and whether the tokenizer's own special tokens go around it."""

    text: str
    special: bool = True


def text_documents(path: Path, chat: Chat) -> Iterator[Document]:
    """A text file is one document, a long one several, each ending with a line."""
    del chat
    lines: list[str] = []
    length = 0
    for _, line in _lines(path):
        lines.append(line)
        length += len(line)
        if length >= PIECE:
            yield Document("".join(lines))
            lines, length = [], 0
    if lines:
        yield Document("".join(lines))


def jsonl_documents(path: Path, chat: Chat) -> Iterator[Document]:
    """One JSON object a line: "text" is taken as it is, "messages" through the chat template."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(one_line(f"{where} is not JSON ({error}).")) from error
        if not isinstance(row, dict):
            raise InputError(one_line(f"{where} is not a JSON object."))
        yield _row_document(row, where, chat)


def _row_document(row: dict[str, Any], where: str, chat: Chat) -> Document:
    text, messages = row.get("text"), row.get("messages")
    if isinstance(text, str):
        return Document(text)
    if isinstance(messages, list) and messages:
        return Document(chat.render(messages, where), special=False)
    keys = ", ".join(sorted(map(str, row))[:8])
    raise InputError(
        one_line(f'{where} has neither a "text" string nor a "messages" list; it has: {keys}.')
    )


def parquet_documents(path: Path, chat: Chat) -> Iterator[Document]:
    """The column "text" of a table, or its only column of strings. Nulls are no documents."""
    del chat
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            one_line(f'{path}: a .parquet file needs pyarrow: pip install "jqx[data]".')
        ) from error
    try:
        with pq.ParquetFile(path) as table:
            schema = table.schema_arrow
            strings = [
                field.name
                for field in schema
                if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
            ]
            column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
            if column is None:
                found = ", ".join(f"{field.name} ({field.type})" for field in schema)
                problem = f'no "text" column and not one column of strings; it has: {found}.'
                raise InputError(one_line(f"{path}: {problem}"))
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                yield from (Document(t) for t in batch.column(0).to_pylist() if t is not None)
    except (pa.ArrowException, OSError) as error:
        raise InputError(one_line(f"{path}: is not a readable .parquet file ({error}).")) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, line ends kept as they are."""
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                where = f"{path}: line {number}"
                if b"\0" in raw:
                    raise InputError(one_line(f"{where} has NUL bytes, so this is not text."))
                try:
                    line = raw.decode()
                except UnicodeDecodeError as error:
                    problem = f"is not UTF-8 text ({error.reason} at byte {error.start})."
                    raise InputError(one_line(f"{where} {problem}")) from error
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except OSError as error:
        raise InputError(one_line(f"{path}: cannot be read ({error.strerror}).")) from error


READERS: dict[str, Callable[[Path, Chat], Iterator[Document]]] = {
    ".txt": text_documents,
    ".md": text_documents,
    ".jsonl": jsonl_documents,
    ".parquet": parquet_documents,
}

BETWEEN = {".txt": "", ".md": "", ".jsonl": "\n\n", ".parquet": "\n\n"}
"""What stands between two documents where they are read as one text; a .txt file is one document,
which comes in pieces.
"""
