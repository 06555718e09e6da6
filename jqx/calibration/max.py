# SPDX-License-Identifier: Apache-2.0
"""Max calibration: the amax of an input is the largest magnitude over all batches, and linears may
have to share it.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .reductions import Number


def input_amax(batches: Iterable[Number]) -> np.float32:
    """The largest of the amaxes of single batches; 0 without batches. NaN if one of them is NaN, in
    any order.
    """
    return np.max(np.array([0, *batches], np.float32))


def unified(amaxes: Mapping[str, Number], groups: Iterable[Sequence[str]]) -> dict[str, np.float32]:
    """Amaxes by path, with the maximum over a group in place of each of its members.

    A group are paths that must share a scale (the query, key and value projections). Members
    without an amax (left unquantized) take no part; paths in no group keep theirs. NaN spreads
    through its group.
    """
    out = {path: np.float32(value) for path, value in amaxes.items()}
    for group in groups:
        members = [path for path in group if path in out]
        shared = input_amax(out[path] for path in members)
        out.update(dict.fromkeys(members, shared))
    return out


def never_met(amaxes: Mapping[str, Number]) -> list[str]:
    """Paths whose amax is 0: calibration gave their linear nothing but zeros, so the scale is a
    guess. To be reported.
    """
    return [path for path, value in amaxes.items() if np.float32(value) == 0]
