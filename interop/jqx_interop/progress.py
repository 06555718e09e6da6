# SPDX-License-Identifier: Apache-2.0
"""How long work tells about itself: the functions that do it take a `Progress` and never print."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """What is told while work goes on."""

    def phase(self, title: str, total: float | int) -> None:
        """A new stretch of work of `total` units begins; the last one is over."""
        ...

    def advance(self, amount: float | int) -> None:
        """So many more units of the present phase are done."""
        ...

    def note(self, text: str) -> None:
        """One line worth knowing, such as a decision taken."""
        ...


class Silent:
    """Tells nothing."""

    def phase(self, title: str, total: float | int) -> None:
        """Ignore it."""

    def advance(self, amount: float | int) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""
