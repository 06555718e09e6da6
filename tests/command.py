# SPDX-License-Identifier: Apache-2.0
"""The command line, called in this process."""

import contextlib
import io
import sys
from pathlib import Path
from typing import NamedTuple

from jqx_interop.cli import main


class Outcome(NamedTuple):
    """The exit code, standard output and standard error of one command."""

    code: int
    out: str
    err: str


def jqx(*words: object) -> Outcome:
    """`jqx words...`, as a shell would call it with its output going into files."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["jqx", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code or 0
    else:
        code = 0
    finally:
        sys.argv = argv
    assert isinstance(code, int)
    return Outcome(code, out.getvalue(), err.getvalue())


def refused(*words: object, saying: tuple[str, ...] | str) -> str:
    """The one line on standard error with which `jqx words...` exits with code 2, and which has all
    the phrases.
    """
    code, out, err = jqx(*words)
    assert (code, out) == (2, ""), err
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    for phrase in (saying,) if isinstance(saying, str) else saying:
        assert phrase in err, err
    return err


def snapshot(folder: Path) -> dict[str, bytes]:
    """Everything below `folder`: name -> content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"<folder>"
        for path in sorted(folder.rglob("*"))
    }
