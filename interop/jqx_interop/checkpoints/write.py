# SPDX-License-Identifier: Apache-2.0
"""Tensors to disk in any order: files get their full size first, then each tensor its place."""

import errno
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from jqx.errors import InputError

from .journal import sync_directory
from .layout import DTYPES
from .problems import one_line
from .read import INDEX
from .shards import ShardPlan, index_json

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PREALLOCATION = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Part(NamedTuple):
    """What lies at `at` of number `number` of the equal parts of a tensor, which are of `shape`."""

    number: int
    shape: tuple[int, ...]
    at: tuple[slice, ...]


class ShardWriter:
    """Writes the tensors of planned files, each once, whole or in parts, in any order.

    A tensor is durable after the next `sync`. Use it as a context manager, or call `close`.
    """

    def __init__(
        self, directory: Path, plans: Sequence[ShardPlan], finished: Iterable[str] | None = None
    ):
        """Create the files of `plans` in `directory` at full size, with their headers.

        `finished`: None starts over; otherwise the names that a journal says are written, and the
        files must be there as planned. Raises InputError if the disk has no room, or if finished
        files are not as planned.
        """
        self._directory = directory
        self._places = {
            tensor.name: (plan.file, tensor, start)
            for plan in plans
            for tensor, start in zip(plan.tensors, plan.starts, strict=True)
        }
        self._missing = set(self._places) - set(finished or ())
        self._rest = {name: tensor.nbytes for name, (_, tensor, _) in self._places.items()}
        self._parts = Lock()
        self._open: dict[str, int] = {}
        self._dirty: set[str] = set()
        try:
            self._create(plans) if finished is None else self._reopen(plans)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ShardWriter":
        """Return the writer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self.close()

    def write(self, name: str, array: object) -> None:
        """Put one array, NumPy or anything np.asarray takes, at its place.

        KeyError for an unknown name; ValueError unless dtype and shape are the planned ones.
        """
        file, tensor, start = self._places[name]
        data = np.asarray(array)
        if data.dtype != DTYPES[tensor.dtype] or data.shape != tensor.shape:
            raise ValueError(
                f"{name} is planned as {tensor.dtype} {tensor.shape}, got {data.dtype} {data.shape}"
            )
        self._put(file, start, data)
        self._missing.discard(name)

    def write_part(self, name: str, part: Part, array: object) -> None:
        """Put one array at its place in the tensor `name`, of which others are parts too; it is
        complete with the last of them.

        KeyError for an unknown name; ValueError unless dtype and shape are those of the part.
        """
        file, tensor, start = self._places[name]
        data, dtype = np.asarray(array), DTYPES[tensor.dtype]
        size = math.prod(part.shape) * dtype.itemsize
        start += part.number * size
        with self._parts:  # parts of one row are read and written together
            whole = np.frombuffer(os.pread(self._open[file], size, start), dtype)
            whole = whole.reshape(part.shape).copy()
            if data.dtype != dtype or whole[part.at].shape != data.shape:
                raise ValueError(f"{part} of {name} is {dtype}, got {data.dtype} {data.shape}")
            whole[part.at] = data
            self._put(file, start, whole)
            self._rest[name] -= data.nbytes
            if self._rest[name] <= 0:
                self._missing.discard(name)

    def _put(self, file: str, start: int, data: np.ndarray) -> None:
        rest = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        while rest:
            count = os.pwrite(self._open[file], rest, start)
            rest, start = rest[count:], start + count
        self._dirty.add(file)  # after its bytes, so that no sync that misses them takes it away

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        sync = getattr(os, "fdatasync", os.fsync)  # macOS has only the second
        for file in sorted(self._dirty):
            self._dirty.discard(file)  # first: what other threads write from here on is for later
            sync(self._open[file])

    def finish(self) -> None:
        """Sync and close after the last tensor. ValueError if some were never written."""
        if self._missing:
            names = sorted(self._missing)
            raise ValueError(f"{len(names)} tensors were never written: {', '.join(names[:4])}")
        self.sync()
        self.close()

    def close(self) -> None:
        """Close the files, complete or not. May be called again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _create(self, plans: Sequence[ShardPlan]) -> None:
        needed, disk = sum(p.size for p in plans), shutil.disk_usage(self._directory)
        try:
            if needed > disk.free and disk.total:  # some network disks report nothing at all
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for plan in plans:
                path = self._directory / plan.file
                self._open[plan.file] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
                allocate(self._open[plan.file], plan.size)
                os.pwrite(self._open[plan.file], plan.header, 0)
                self._dirty.add(plan.file)
            self._write_index(plans)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            for file in self._open:
                os.unlink(self._directory / file)
            raise InputError(
                one_line(
                    f"{self._directory}: no room for the checkpoint, it needs {needed} bytes and "
                    f"{disk.free} are free ({error.strerror}). Free some, or write to another disk."
                )
            ) from error
        self.sync()
        sync_directory(self._directory)

    def _write_index(self, plans: Sequence[ShardPlan]) -> None:
        if len(plans) > 1:
            with open(self._directory / INDEX, "wb") as file:
                file.write(index_json(plans))
                file.flush()
                os.fsync(file.fileno())

    def _reopen(self, plans: Sequence[ShardPlan]) -> None:
        for plan in plans:
            path = self._directory / plan.file
            try:
                descriptor = self._open[plan.file] = os.open(path, os.O_RDWR)
                same = os.fstat(descriptor).st_size == plan.size
                same = same and os.pread(descriptor, len(plan.header), 0) == plan.header
            except OSError:
                same = False
            if not same:
                raise InputError(
                    one_line(f"{path}: not as this run left it. Pass --restart to start over.")
                )


def allocate(descriptor: int, size: int) -> None:
    """Reserve the bytes of a file, so that the disk cannot run full half way."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in NO_PREALLOCATION:
                raise
    os.ftruncate(descriptor, size)
