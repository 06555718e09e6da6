# SPDX-License-Identifier: Apache-2.0
"""Notes in the metadata of files: scales that a layout stores by their reciprocal, as they were."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from jqx.errors import InputError

from .checkpoints import Checkpoint
from .targets import RECIPROCALS

NOTE = "jqx:"
"""What the names of notes begin with."""

SCALARS = (*RECIPROCALS, *RECIPROCALS.values())
"""Scales of a whole tensor, of all layouts, that a note may keep."""


@lru_cache(maxsize=4)
def exact_notes(checkpoint: Checkpoint) -> Mapping[str, np.ndarray]:
    """Scales that a note keeps: name in the layout where a number lies as it is -> float32 []."""
    found = {}
    for name, text in checkpoint.notes.items():
        if name.startswith(NOTE):
            try:
                value = np.float32(float.fromhex(text))
            except (ValueError, OverflowError):
                raise InputError(f"its note {name} is {text[:40]!r}, not a number") from None
            found[name.removeprefix(NOTE)] = np.asarray(value)
    return found
