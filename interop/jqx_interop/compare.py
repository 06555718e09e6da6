# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints, tensor by tensor: the same bytes, how far apart, or only in one of them."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jqx.errors import InputError

from .checkpoints import DTYPES, Checkpoint, open_checkpoint

CODES = frozenset({"U8", "I8", "BOOL"})
CHUNK = 1 << 22
DESCRIPTIONS = ("config.json", "hf_quant_config.json", "generation_config.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One tensor or description. `verdict` is "equal", "differs", "only in A" or "only in B".

    `different`: stored values that differ; `values`: how many there are; `largest`: the largest
    absolute difference of numbers (None for codes and for other shapes).
    """

    name: str
    verdict: str
    detail: str = ""
    different: int = 0
    values: int = 0
    largest: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All tensors and descriptions of two checkpoints."""

    tensors: tuple[Difference, ...]
    descriptions: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs; producers of the descriptions aside."""
        return all(row.verdict == "equal" for row in (*self.tensors, *self.descriptions))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a largest difference that is infinite or NaN is null."""
        data = asdict(self)
        for row in data["tensors"]:
            if row["largest"] is not None and not math.isfinite(row["largest"]):
                row["largest"] = None
        return {"equal": self.equal, **data}


def compare_checkpoints(a: str | Path, b: str | Path) -> Comparison:
    """Compare the checkpoints `a` and `b`. Raises InputError if one cannot be read."""
    left, right = open_checkpoint(a), open_checkpoint(b)
    names = sorted({*left.tensors, *right.tensors})
    return Comparison(
        tensors=tuple(_compare(left, right, name) for name in names),
        descriptions=tuple(_describe(left.path, right.path)),
    )


def _compare(a: Checkpoint, b: Checkpoint, name: str) -> Difference:
    if name not in a.tensors or name not in b.tensors:
        return Difference(name=name, verdict="only in A" if name in a.tensors else "only in B")
    first, second = a.tensors[name], b.tensors[name]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        detail = f"{first.dtype} {list(first.shape)} and {second.dtype} {list(second.shape)}"
        return Difference(name=name, verdict="differs", detail=detail)
    x, y = a.read(name).reshape(-1), b.read(name).reshape(-1)
    different, largest = 0, 0.0
    for start in range(0, x.size, CHUNK):
        count, distance = _distance(x[start : start + CHUNK], y[start : start + CHUNK], first.dtype)
        different, largest = different + count, max(largest, distance)
    a.release(name)
    b.release(name)
    return Difference(
        name=name,
        verdict="differs" if different else "equal",
        detail=f"{first.dtype} {list(first.shape)}",
        different=different,
        values=x.size,
        largest=None if first.dtype in CODES else largest,
    )


def _distance(x: np.ndarray, y: np.ndarray, dtype: str) -> tuple[int, float]:
    raw = np.dtype(f"u{DTYPES[dtype].itemsize}")
    apart = x.view(raw) != y.view(raw)
    count = int(apart.sum())
    if not count or dtype in CODES:
        return count, 0.0
    far = np.abs(x[apart].astype(np.float64) - y[apart].astype(np.float64))
    return count, float(np.nan_to_num(far, nan=np.inf, posinf=np.inf).max())


def _describe(a: Path, b: Path) -> Iterator[Difference]:
    for name in DESCRIPTIONS:
        found = [_without_producer(path / name) for path in (a, b)]
        if found == [None, None]:
            continue
        if None in found:
            yield Difference(name=name, verdict="only in B" if found[0] is None else "only in A")
        else:
            yield Difference(name=name, verdict="equal" if found[0] == found[1] else "differs")


def _without_producer(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    for part in (data, data.get("quantization_config") if isinstance(data, dict) else None):
        if isinstance(part, dict):
            part.pop("producer", None)
    return data
