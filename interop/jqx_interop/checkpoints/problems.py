# SPDX-License-Identifier: Apache-2.0
"""Many problems, one line: everything wrong with an input is collected, then raised once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from jqx.errors import InputError

SHOWN = 4  # problems spelled out before the rest is only counted


def one_line(text: object) -> str:
    """`text` with everything that does not print on one line escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def refuse(subject: object, problems: Sequence[str], way_out: str = "") -> NoReturn:
    """Raise one InputError that names the subject, the first few problems and how many follow.

    `way_out` is appended after the problems. `problems` must not be empty.
    """
    shown = "; ".join(problems[:SHOWN])
    more = len(problems) - SHOWN
    tail = f"; ... and {more} more" if more > 0 else ""
    raise InputError(one_line(f"{subject}: {shown}{tail}{'. ' + way_out if way_out else ''}"))


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Turn what the system refuses while `folder` is written into an InputError that names a
    place.
    """
    try:
        yield
    except OSError as error:
        what = f"{error.filename or folder}: {error.strerror or error}. Nothing was written."
        raise InputError(one_line(what)) from error
