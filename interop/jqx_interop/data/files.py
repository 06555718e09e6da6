# SPDX-License-Identifier: Apache-2.0
"""Where data comes from: a file of text or of token ids, or a text of this package."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from jqx.errors import InputError
from jqx_interop.checkpoints.problems import one_line

from .documents import READERS

KNOWN = (*READERS, ".npy")


def find_file(source: str | Path | None, bundled: str) -> tuple[str, Path]:
    """What to call a source, and its file; None is the text `bundled` of this package.

    Raises InputError if there is no such file, it is of no known kind, or empty.
    """
    if source is None:
        return "bundled text", Path(str(files("jqx_interop.data").joinpath(bundled)))
    path, known = Path(source), ", ".join(KNOWN)
    if not path.exists():
        raise InputError(
            one_line(
                f"{path}: no such file. A Hub dataset needs the extra 'data' and is not available "
                f"offline; save its text as a file ({known}) and give that."
            )
        )
    if not path.is_file():
        raise InputError(one_line(f"{path}: is not a file. Give one of {known}."))
    if path.suffix.lower() not in KNOWN:
        raise InputError(one_line(f"{path}: unknown kind of file. Give one of {known}."))
    if path.stat().st_size == 0:
        raise InputError(one_line(f"{path}: is empty, there is nothing in it to use."))
    return str(source), path


def read_ids(path: Path, shapes: Mapping[int, str]) -> Integer[np.ndarray, "..."]:
    """The integers of a .npy file. `shapes`: number of axes -> their names, for those allowed.

    Raises InputError for a file that holds something else.
    """
    try:
        ids = np.lib.format.open_memmap(path, mode="r")  # refuses objects, so nothing is unpickled
    except Exception as error:  # whatever NumPy's header parser meets in a file that is no .npy
        raise InputError(one_line(f"{path}: is not a usable .npy file ({error}).")) from error
    way_out = f"Give integer token ids, {' or '.join(shapes.values())}."
    if not np.issubdtype(ids.dtype, np.integer):
        raise InputError(one_line(f"{path}: holds {ids.dtype}, not integers. {way_out}"))
    if ids.ndim not in shapes or ids.size == 0:
        raise InputError(one_line(f"{path}: has the shape {ids.shape}. {way_out}"))
    return ids
