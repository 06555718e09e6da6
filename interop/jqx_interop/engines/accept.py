# SPDX-License-Identifier: Apache-2.0
"""Accept: what one engine does with one scheme, the row of ACCEPTS."""

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Accept:
    """What one engine does with one scheme. `loads`: None where it is not known. `native`: the
    least compute capability with kernels for it; `least`: the least at all, by `means` then; both
    None where that was not read. `note`: the reason, or what it computes otherwise; `differs`: that
    this is not what was calibrated. `size`: the only columns to a scale it takes. `takes`: leaves
    beyond those that the layout always has; `needs`: those it cannot do without on linears that are
    not fused.
    """

    engine: str
    layout: str
    scheme: str
    loads: bool | None
    source: str
    native: int | None = None
    least: int | None = None
    means: str = ""
    note: str = ""
    differs: bool = False
    size: int | None = None
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def chips(self) -> str:
        """Where it runs, for people; empty where that was not read."""
        if self.least is None and self.native is None:
            return ""
        if self.native is None or self.native == self.least:
            return f"{_version(self.least)}+" + (f" by {self.means}" if self.means else "")
        if self.least is None:
            return f"{_version(self.native)}+"
        return f"{_version(self.native)}+, from {_version(self.least)} by {self.means}"


def _version(capability: int | None) -> str:
    return f"{(capability or 0) // 10}.{(capability or 0) % 10}"


def each(row: Accept, *schemes: str) -> Iterator[Accept]:
    """The row for each of several schemes."""
    return (replace(row, scheme=scheme) for scheme in schemes)
