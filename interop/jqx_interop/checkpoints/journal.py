# SPDX-License-Identifier: Apache-2.0
"""What a run has finished: JSON lines that survive a kill at any byte.

    {"crc32":"5d3a91c2","record":{...}}

The checksum covers the record's bytes as they stand in the line.
"""

import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

LINE = re.compile(rb'\{"crc32":"([0-9a-f]{8})","record":(\{.*\})\}\n', re.DOTALL)


class Journal:
    """An append-only list of records (JSON objects) in a file; one process at a time."""

    def __init__(self, path: Path):
        """Open or create the file and load the good records.

        Loading stops at the first line that is torn or does not fit its checksum; that line and
        what follows are cut off, since nothing after it can be trusted to be in order.
        """
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self.records: list[dict[str, Any]] = []
        good = 0
        for line in path.read_bytes().splitlines(keepends=True):
            record = _decode(line)
            if record is None:
                break
            self.records.append(record)
            good += len(line)
        os.ftruncate(self._descriptor, good)
        os.fsync(self._descriptor)
        sync_directory(path.parent)

    def append(self, record: dict[str, Any]) -> None:
        """Add one record; it is on the disk when this returns."""
        body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
        line = b'{"crc32":"%08x","record":%s}\n' % (zlib.crc32(body), body)
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)
        self.records.append(json.loads(body))

    def close(self) -> None:
        """Close the file. May be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _decode(line: bytes) -> dict[str, Any] | None:
    match = LINE.fullmatch(line)
    if match is None or int(match[1], 16) != zlib.crc32(match[2]):
        return None
    return json.loads(match[2])


def sync_directory(directory: Path) -> None:
    """Return when the names in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
