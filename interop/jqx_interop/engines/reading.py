# SPDX-License-Identifier: Apache-2.0
"""Reader: values of a description, and what becomes of those of another kind."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Linears that are stored alike: those that `targets` name, `scheme`, and the columns to a
    scale if that is said, -1 for whole rows.
    """

    targets: tuple[str, ...]
    scheme: str
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Reader:
    """Values of a JSON object by kind; those of another kind become problems."""

    said: Mapping[str, Any]
    where: str
    problems: list[tuple[str, str]] = field(default_factory=list)

    def get(self, key: str, kind: type, what: str) -> Any:
        """The value of `key`, None where it is absent or of another kind."""
        value = self.said.get(key)
        if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
            return value
        self.problems.append(("description", f"{self.where} has {key} {value!r:.60}, no {what}"))
        return None

    def names(self, key: str) -> tuple[str, ...]:
        """The strings in the list `key`."""
        found = self.get(key, list, "list of names") or []
        if not all(isinstance(name, str) for name in found):
            self.problems.append(
                ("description", f"{key} of {self.where} has entries that are no names")
            )
        return tuple(name for name in found if isinstance(name, str))

    def patterns(self, patterns: Iterable[str]) -> None:
        """Tell which regular expressions are none."""
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                text = f"{self.where} has {pattern!r:.60}, no regular expression: {error}"
                self.problems.append(("description", text))

    def inside(self, key: str) -> "Reader":
        """The object `key`, empty where there is none."""
        found = self.get(key, dict, "object") or {}
        return Reader(found, f"{key} of {self.where}", self.problems)


def upper(name: str | None) -> str | None:
    """A name in capitals."""
    return None if name is None else name.upper()


def size_of(read: Reader) -> int | None:
    """The columns to a scale, -1 for whole rows."""
    size = read.get("group_size", int, "whole number")
    if size is not None and size != -1 and size < 1:
        read.problems.append(("description", f"{read.where} has group_size {size}"))
        return None
    return size


KV_SCHEMES = {("float", 8): "FP8", ("int", 8): "INT8", ("float", 4): "NVFP4"}


def kv_scheme(read: Reader) -> str | None:
    """What kv_cache_scheme is called."""
    scheme = read.get("kv_cache_scheme", dict, "object")
    if not scheme:
        return None
    kind, bits = scheme.get("type"), scheme.get("num_bits")
    if not isinstance(bits, int) or (str(kind), bits) not in KV_SCHEMES:
        text = f"kv_cache_scheme has type {kind!r:.30} and num_bits {bits!r:.30}"
        read.problems.append(("description", text))
        return None
    return KV_SCHEMES[str(kind), bits]
