# SPDX-License-Identifier: Apache-2.0
"""Tensors as read-only views of memory-mapped files: no copy, no anonymous memory."""

import mmap
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jqx.errors import InputError

from .layout import DTYPES, TensorInfo


class MappedTensors:
    """Views of tensors in files that are mapped when first read and stay mapped.

    Resident pages are clean and belong to the file, so the system drops them when it needs
    memory; `release` gives them up at once.
    """

    def __init__(self, tensors: Iterable[TensorInfo]):
        """Takes descriptions that were checked against their files."""
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._maps: dict[Path, mmap.mmap] = {}

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, not writeable. A tensor on an odd address comes as a copy.

        KeyError if there is no such tensor; InputError if the file shrank since it was opened.
        """
        tensor = self._tensors[name]
        dtype = DTYPES[tensor.dtype]
        data = self._map(tensor)
        count = tensor.nbytes // dtype.itemsize
        array = np.frombuffer(data, dtype, count, tensor.start)
        if tensor.start % dtype.itemsize:
            array = array.copy()
            array.flags.writeable = False
        return array.reshape(tensor.shape)

    def release(self, name: str) -> None:
        """Drop the resident pages of `name`. Views stay valid: reading them loads pages again."""
        tensor = self._tensors[name]
        data = self._maps.get(tensor.file)
        start = tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
        if data is not None and tensor.end > start:
            data.madvise(mmap.MADV_DONTNEED, start, tensor.end - start)

    def _map(self, tensor: TensorInfo) -> mmap.mmap:
        data = self._maps.get(tensor.file)
        if data is None:
            with open(tensor.file, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[tensor.file] = data
        if len(data) < tensor.end:
            raise InputError(f"{tensor.file}: changed while it was read, {len(data)} bytes left.")
        return data
