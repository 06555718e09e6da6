# SPDX-License-Identifier: Apache-2.0
"""The pages under docs/: their programs run, and print what the comments beside them say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def programs(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def promised(program):
    """The lines that comments say are printed: beside a print, or alone on a line after one."""
    return re.findall(r"(?:print\(.*\) +|^)# ([\[({\'\w].*)$", program, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_programs_run_and_print_what_they_say(page, tmp_path):
    program = "\n".join(programs(page))  # they are one session
    (tmp_path / "page.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    said = promised(program)
    assert said
    for line in said:
        assert line in lines, f"{line!r} is not printed; printed is\n{done.stdout}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        assert "://" in link or (page.parent / link).exists(), link
