# SPDX-License-Identifier: Apache-2.0
"""Inputs of linears recorded elsewhere: safetensors with keys "<module>|<batch>", one file."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jqx_interop.checkpoints.layout import TensorInfo, raw_header, read_header
from jqx_interop.checkpoints.mapped import MappedTensors
from jqx_interop.checkpoints.problems import refuse

KEY = re.compile(r"([^|]+)\|(\d{1,9})", re.ASCII)
DIGITS = re.compile(r"(\d+)")
FLOATS = ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")


class Activations:
    """The recorded inputs, memory-mapped: nothing is read before it is asked for."""

    def __init__(self, path: str | Path):
        """Check the header of the file `path`.

        Raises one InputError that lists what is wrong: no or a corrupt file, keys of another
        form, a batch recorded twice, integers, scalars, or batches of one module that differ in
        their last axis.
        """
        self.path = Path(path)
        header = read_header(self.path)
        problems = list(header.problems)
        found: dict[str, dict[int, TensorInfo]] = {}
        for tensor in header.tensors:
            problem = _problem(tensor)
            if problem:
                problems.append(f"key {tensor.name!r} {problem}")
            else:
                module, batch = tensor.name.split("|")
                problems += _add(found.setdefault(module, {}), int(batch), tensor)
        if not header.tensors and not problems:
            problems.append("holds no tensors")
        if problems:
            refuse(self.path, problems)
        self._batches = {module: dict(sorted(found[module].items())) for module in found}
        self._mapped = MappedTensors(header.tensors)

    def modules(self) -> tuple[str, ...]:
        """Paths of the recorded linears; numbers in them sort as numbers, layer 10 after 9."""
        return tuple(sorted(self._batches, key=_natural))

    def width(self, module: str) -> int:
        """Input channels of a module."""
        return next(iter(self._batches[module].values())).shape[-1]

    def batches(self, module: str) -> Iterator[np.ndarray]:
        """The inputs of a module, [..., width] in their stored dtype, in the order of batches.

        Each is a read-only view; its pages are given up when the next one is asked for. KeyError
        for a module that was not recorded.
        """
        for tensor in self._batches[module].values():
            yield self._mapped.read(tensor.name)
            self._mapped.release(tensor.name)

    @property
    def digest(self) -> str:
        """Cheap identity of the file: sha256 of its size, modification time and header."""
        stat = self.path.stat()
        facts = f"{stat.st_size} {stat.st_mtime_ns} ".encode()
        return hashlib.sha256(facts + raw_header(self.path)).hexdigest()


def _problem(tensor: TensorInfo) -> str | None:
    if not KEY.fullmatch(tensor.name):
        return "is not <module>|<batch>"
    if tensor.dtype not in FLOATS:
        return f"holds {tensor.dtype}, not floating-point inputs"
    if not tensor.shape or 0 in tensor.shape:
        return f"has the shape {tensor.shape}, no inputs"
    return None


def _add(batches: dict[int, TensorInfo], number: int, tensor: TensorInfo) -> Iterator[str]:
    """Put a tensor into its module's batches; yields what speaks against it."""
    first = next(iter(batches.values()), tensor)
    if number in batches:
        yield f"key {tensor.name!r} repeats batch {number} of {batches[number].name!r}"
    elif first.shape[-1] != tensor.shape[-1]:
        widths = f"{tensor.shape[-1]} channels, {first.name!r} has {first.shape[-1]}"
        yield f"key {tensor.name!r} has {widths}"
    batches.setdefault(number, tensor)


def _natural(path: str) -> list[tuple[int, str]]:
    parts = DIGITS.split(path)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
