# SPDX-License-Identifier: Apache-2.0
"""What a format costs, in bits a weight, and how much the weights of a linear count."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from jqx.config import INPUT_FORMATS, Choice
from jqx.errors import InputError
from jqx.formats import FORMATS, find_format

PLAIN_BITS = 16.0  # of a weight that is left alone, whatever its dtype: what ModelOpt counts
DYNAMIC_NVFP4 = 4.5  # what ModelOpt counts for a weight in NVFP4
ROUTED = re.compile(r"(^|\.)experts(\.|$)")


def bits_of(choice: Choice, *, scales: bool) -> float:
    """Bits of a weight: those that ModelOpt 0.47 counts, or with `scales` those that are stored."""
    fmt = find_format(choice.weight or "")
    if scales:
        return fmt.bits
    if choice.weight == "nvfp4":
        return DYNAMIC_NVFP4
    inputs = FORMATS[INPUT_FORMATS[choice.input].format].nominal_bits if choice.input else 16
    return float(min(fmt.nominal_bits, inputs))


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighting:
    """How much a linear's weights count where bits are counted: those of routed experts `experts`
    times (the share of them that a token meets), and groups all of whose members match one of the
    globs `excluded` not at all. (ModelOpt 0.47, the cost models "weight" and "active_moe".)
    """

    experts: float = 1.0
    excluded: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        """Raise InputError for a share that is none."""
        if not 0 < self.experts <= 1:
            raise InputError(f"the share of experts is {self.experts:g}; give a number in (0, 1]")

    def of(self, paths: Iterable[str]) -> float:
        """The factor of linears that choose together."""
        paths = tuple(paths)
        if self.excluded and all(any(fnmatchcase(p, g) for g in self.excluded) for p in paths):
            return 0.0
        return self.experts if any(map(_is_routed, paths)) else 1.0


def _is_routed(path: str) -> bool:
    return "shared_expert" not in path and ROUTED.search(path) is not None
