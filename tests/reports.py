# SPDX-License-Identifier: Apache-2.0
"""Reports of runs: what is in their folder."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

AWQ = "extends: int4\nalgorithm: awq_lite\nrules:\n  - {path_glob: '*_proj*', weight: int4_b32}\n"
FILES = {"report.json", "errors.png", "report.html"}


def told(folder: Path) -> dict[str, Any]:
    """The content of a report."""
    return json.loads((folder / "report.json").read_text())


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text inside tags by name."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.setdefault(tag, []).append("")
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.inside[self._open][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._open = ""
