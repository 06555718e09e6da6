# SPDX-License-Identifier: Apache-2.0
"""Tiles that were measured, by operation and kind of device: JSON files in the folder `tuned`, one
a device, which `jqx tune` writes. Nothing needs them.
"""

import json
import re
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from .tiles import DEFAULTS, Table, Tiles

FOLDER = Path(__file__).parent.parent / "tuned"
"""Where they lie."""


def file_of(kind: str, folder: Path | None = None) -> Path:
    """The file of a kind of device, in FOLDER if None."""
    name = re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_") + ".json"
    return (FOLDER if folder is None else folder) / name


@cache
def tiles_of(op: str, kind: str, default: str = "gpu") -> Table:
    """The tiles of `op` on devices of this kind: those of DEFAULTS[default], and in their place
    what was measured. Raises ValueError for a file that holds something else.
    """
    path = file_of(kind)
    if not kind or not path.is_file():
        return DEFAULTS[default]
    try:
        rows = [row for row in json.loads(path.read_text())["tiles"] if row["op"] == op]
        found = {(row["element"], row["size"]): Tiles(**row["tiles"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no tiles: {error}. Remove it, or run jqx tune.") from error
    return {**DEFAULTS[default], **found}


def to_row(op: str, key: tuple[str, str], tiles: Tiles) -> dict[str, Any]:
    """What a file lists for one of them."""
    return {"op": op, "element": key[0], "size": key[1], "tiles": asdict(tiles)}
