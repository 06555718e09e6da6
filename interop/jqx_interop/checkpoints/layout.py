# SPDX-License-Identifier: Apache-2.0
"""The safetensors file: header length in eight bytes, a JSON header, the tensors without gaps.

    length (u64) | {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...} | data

Offsets count from the end of the header. Nothing in a file is trusted: a header that promises
other bytes than the file holds is described, never followed.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

MAX_HEADER = 100_000_000  # bytes; the limit of the format's own reader
LARGEST = 2**63  # no size in a file reaches this
LFS_POINTER = b"version https://git-lfs"

# The order in which the format's own writer lays tensors out in a file, first to last.
DTYPES: dict[str, np.dtype] = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `file[start:end]`, counted from the first byte of the file."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """What a file's header promises, in file order, and everything that is wrong with it; `notes`
    are the metadata that are texts.
    """

    tensors: tuple[TensorInfo, ...]
    problems: tuple[str, ...]
    notes: Mapping[str, str] = field(default_factory=dict)


def dtype_name(dtype: np.dtype) -> str:
    """The format's name of a NumPy or ml_dtypes dtype; KeyError if it has none."""
    return {value: name for name, value in DTYPES.items()}[dtype]


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor of this dtype (a key of DTYPES) and shape."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def encode_header(
    entries: Iterable[tuple[str, str, tuple[int, ...]]], notes: Mapping[str, str] | None = None
) -> bytes:
    """Length and header of a file that holds (name, dtype, shape) entries in this order.

    Byte for byte what the format's own writer produces with metadata {"format": "pt"}: compact
    JSON in UTF-8, padded with spaces to a multiple of eight. `notes` are more metadata.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(notes or {})}}
    begin = 0
    for name, dtype, shape in entries:
        end = begin + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_header(path: Path) -> bytes:
    """The header's JSON as it stands in the file. ValueError says why there is none."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        first = file.read(len(LFS_POINTER))
        if first == LFS_POINTER:
            raise ValueError("is a Git LFS pointer, not the weights (run git lfs pull)")
        if len(first) < 8:
            raise ValueError(f"is truncated: {size} bytes cannot hold a safetensors header")
        length = int.from_bytes(first[:8], "little")
        if length > MAX_HEADER:
            raise ValueError(f"is not safetensors: its header would have {length} bytes")
        if length > size - 8:
            raise ValueError(f"is truncated: a header of {length} bytes, a file of {size}")
        file.seek(8)
        return file.read(length)


def read_header(path: Path) -> Header:
    """Parse and check the header of one file without touching its data.

    Tensors come in file order. Every problem is one phrase that begins with the file's name; a
    tensor whose entry makes no sense is left out.
    """
    try:
        size = path.stat().st_size
        raw = raw_header(path)
        entries = _parse(raw)
    except OSError as error:
        return Header((), (f"{path.name} cannot be read: {error.strerror}",))
    except ValueError as error:
        return Header((), (f"{path.name} {error}",))
    base = 8 + len(raw)
    tensors, problems = [], []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        problem = _entry_problem(entry)
        if problem:
            problems.append(f"{path.name} is corrupt: tensor {name!r} {problem}")
        else:
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            where = (path, base + begin, base + end)
            tensors.append(TensorInfo(name, entry["dtype"], shape, *where))
    tensors.sort(key=lambda t: (t.start, t.end))
    if not problems:
        problems += [f"{path.name} {p}" for p in _offset_problems(tensors, base, size)]
    said = entries.get("__metadata__")
    notes = {k: v for k, v in said.items() if isinstance(v, str)} if isinstance(said, dict) else {}
    return Header(tuple(tensors), tuple(problems), notes)


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(raw.decode(), object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise ValueError("is corrupt: its header is nested without end") from error
    except ValueError as error:  # neither UTF-8 nor JSON, or a number of thousands of digits
        raise ValueError(f"is corrupt: its header is not usable JSON ({error})") from error
    if not isinstance(entries, dict):
        raise ValueError("is corrupt: its header is not a JSON object")
    return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"it names {name!r} twice")
        result[name] = value
    return result


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < LARGEST for n in value)


def _entry_problem(entry: object) -> str | None:
    if not isinstance(entry, dict):
        return "has no description"
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has the unknown dtype {_short(dtype)}"
    if not _is_sizes(shape):
        return f"has the shape {_short(shape)}"
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has the offsets {_short(offsets)}"
    need, have = nbytes(dtype, tuple(shape)), offsets[1] - offsets[0]
    if need != have:
        much = need if need < LARGEST else "far too many"
        return f"needs {much} bytes for {dtype} {_short(shape)} but its offsets span {have}"
    return None


def _short(value: object) -> str:
    return text if len(text := repr(value)) <= 60 else text[:57] + "..."


def _offset_problems(tensors: list[TensorInfo], base: int, size: int) -> Iterator[str]:
    position, before = base, "the header"
    for tensor in tensors:
        if tensor.start > position:
            yield f"is corrupt: {tensor.start - position} bytes before {tensor.name!r} are a hole"
        if tensor.start < position:
            yield f"is corrupt: {tensor.name!r} overlaps {before}"
        position, before = max(position, tensor.end), repr(tensor.name)
    if position > size:
        yield f"is truncated: its header promises {position} bytes, the file has {size}"
    elif position < size:
        yield f"is corrupt: {size - position} bytes after the last tensor belong to none"
