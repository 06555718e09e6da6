# SPDX-License-Identifier: Apache-2.0
"""OUT appears by one rename, complete, or not at all.

    OUT.jqx-partial/lock            held while a process works here; holds its process id
    OUT.jqx-partial/journal.jsonl   the fingerprint of the run, then what it finished
    OUT.jqx-partial/files/          what becomes OUT

A process killed at any moment leaves this directory, from which the same command goes on, or a
complete OUT (then perhaps with an empty rest of this directory, which the next run removes).
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from jqx.errors import InputError

from .journal import Journal, sync_directory
from .problems import one_line

SUFFIX = ".jqx-partial"
LONGEST = 200  # characters of one difference that are worth reading


class Workspace:
    """Where one run writes before its output appears. A context manager, or call `close`."""

    def __init__(self, out: str | Path, model: str | Path | None = None):
        """Lock the workspace of `out`; directories above it are made as needed.

        `model`: the directory that is read, which `out` must not touch. Raises InputError if
        `out` exists and is no empty directory, overlaps `model`, cannot be made, or is being
        written by another process.
        """
        self.out = Path(out).resolve()
        self.directory = self.out.with_name(self.out.name + SUFFIX)
        self.files = self.directory / "files"
        self._journal: Journal | None = None
        self._lock = -1
        self._complete = False
        _check_apart(self.out, model)
        occupied = _occupied(self.out)
        if occupied and not self.directory.exists():
            raise InputError(one_line(occupied))
        self._acquire()
        occupied = _occupied(self.out)  # another run may have ended while this one came to the lock
        if occupied:
            self.close()  # which removes what a run leaves that is killed after its rename
            raise InputError(one_line(occupied))

    def __enter__(self) -> "Workspace":
        """Return the workspace itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock; unpublished work stays if any of it is recorded."""
        self.close()

    def begin(self, fingerprint: dict[str, Any], restart: bool = False) -> list[dict[str, Any]]:
        """Start, or go on with, the run that `fingerprint` describes; returns its records so far.

        `fingerprint` is JSON: settings, digests, versions, everything that the bytes depend on.
        An empty result means an empty `files` directory. `restart` throws earlier work away;
        without it, work with another fingerprint raises an InputError that names the difference.
        """
        journal = self._open_journal()
        wanted = json.loads(json.dumps(fingerprint))
        if len(journal.records) > 1 and self.files.is_dir() and not restart:
            found = journal.records[0].get("fingerprint")
            if found != wanted:
                raise InputError(one_line(f"{self.directory}: {_difference(found, wanted)}"))
            return journal.records[1:]
        journal.close()
        self._clear()
        self._open_journal().append({"fingerprint": wanted})
        return []

    def record(self, record: dict[str, Any]) -> None:
        """Say durably that something is finished. What it speaks of must be synced before."""
        if self._journal is None:
            raise ValueError("begin() comes before record()")
        self._journal.append(record)

    def publish(self) -> Path:
        """Sync everything, rename it to `out`, remove the rest, and release the lock.

        Raises InputError if something has taken the place of `out` meanwhile; the work stays.
        """
        self._complete = True  # from here on the files are worth keeping, recorded or not
        for folder, _, names in os.walk(self.files):
            for name in names:
                _sync_file(os.path.join(folder, name))
            sync_directory(Path(folder))
        try:
            os.rename(self.files, self.out)
        except OSError as error:
            raise InputError(
                one_line(f"{self.out}: {error.strerror}. The result is in {self.files}.")
            ) from error
        sync_directory(self.out.parent)
        sync_directory(self.directory)
        self._complete = False
        self.close()
        return self.out

    def close(self) -> None:
        """Release the lock. A workspace in which nothing was recorded is removed."""
        if self._lock < 0:
            return
        if self._journal is not None:
            self._journal.close()
            recorded = len(self._journal.records) > 1 or self._complete
        else:
            recorded = self.files.exists()
        if not recorded or not self.files.exists():
            self._remove()
        os.close(self._lock)
        self._lock = -1

    def _open_journal(self) -> Journal:
        if self._journal is not None:
            self._journal.close()
        self._journal = Journal(self.directory / "journal.jsonl")
        return self._journal

    def _acquire(self) -> None:
        try:
            while self._lock < 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._lock = _lock(self.directory / "lock")
        except OSError as error:
            reason = error.strerror or error
            raise InputError(one_line(f"{self.out}: cannot be made ({reason}).")) from error

    def _clear(self) -> None:
        # The journal goes first: without it the files mean nothing.
        (self.directory / "journal.jsonl").unlink(missing_ok=True)
        sync_directory(self.directory)
        if self.files.exists():
            shutil.rmtree(self.files)
        self.files.mkdir()
        sync_directory(self.directory)

    def _remove(self) -> None:
        """Remove the whole directory, journal first and lock last."""
        (self.directory / "journal.jsonl").unlink(missing_ok=True)
        if self.files.exists():
            shutil.rmtree(self.files)
        for file in self.directory.glob("*.bin"):  # states that did not fit into memory
            file.unlink()
        (self.directory / "lock").unlink(missing_ok=True)
        self.directory.rmdir()


def _lock(path: Path) -> int:
    """A descriptor that holds the lock file, or -1 if the file went away in between."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        out = path.parent.with_name(path.parent.name.removesuffix(SUFFIX))
        raise InputError(one_line(f"{out}: is being written by process {holder}.")) from None
    try:
        same = os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        same = False
    if not same:
        os.close(descriptor)
        return -1
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _check_apart(out: Path, model: str | Path | None) -> None:
    if model is None:
        return
    source = Path(model).resolve()
    if out == source:
        raise InputError(one_line(f"{out}: is the model itself. Give another directory."))
    if source in out.parents:
        raise InputError(one_line(f"{out}: is inside the model directory {source}."))
    if out in source.parents:
        raise InputError(one_line(f"{out}: contains the model directory {source}."))


def _occupied(out: Path) -> str | None:
    """Why `out` cannot be the place of a new directory."""
    if os.path.ismount(out):
        return f"{out}: is a mount point, which no rename can replace. Give a directory inside it."
    if not out.exists():
        return None
    if not out.is_dir():
        return f"{out}: exists and is not a directory. Give another OUT."
    if any(out.iterdir()):
        return f"{out}: exists and is not empty. Remove it or give another OUT."
    return None


def _difference(found: object, wanted: dict[str, Any]) -> str:
    """Which fields of two fingerprints differ, and the way out."""
    found = found if isinstance(found, dict) else {}
    fields = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    told = {k: f"{k} was {found.get(k)!r}, now {wanted.get(k)!r}" for k in fields[:3]}
    shown = [text if len(text) <= LONGEST else f"{k} differs" for k, text in told.items()]
    more = f" and {len(fields) - 3} more" if len(fields) > 3 else ""
    return (
        f"unfinished work of another run ({', '.join(shown)}{more}). "
        "Repeat that run to go on with it, or pass --restart to throw it away."
    )


def _sync_file(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
