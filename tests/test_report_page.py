# SPDX-License-Identifier: Apache-2.0
"""The page of a report opens without a network and runs nothing; its picture shows the errors."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import jqx
from reports import Page, told
from safetensors.numpy import save_file
from source import MODEL, edit

from jqx_interop.report_page import page
from jqx_interop.report_plot import lines, plain, plot_errors
from jqx_interop.report_rows import totals

# --- the page and the picture


HOSTILE = "</script><script>alert(1)</script>\"' onload=x {{ 7 * 7 }} $x^$"


def fake(path: str = "a", **more: Any) -> dict[str, Any]:
    """The content of a report of one linear."""
    row = {"path": path, "kind": path, "layer": None, "shape": [4, 8], "weight": "int4"}
    rows = [row | {"input": None, "bits": 4.0, "output_error": 0.1, **more}]
    names = ("model", "out", "recipe", "kv_cache", "target", "device")
    numbers = {"source_bytes": 10, "output_bytes": 5, "bits": 4.5, "seconds": 1.0}
    reach = {"parameters": 9, "quantized": 8, "linears": 1, "left": [path], "formats": {}}
    return {
        **dict.fromkeys(names, path),
        **numbers,
        "coverage": {**reach, "share": 0.8},
        "errors_of": "outputs",
        "algorithm": [{"method": path, "x": path}],
        "calibration": {"data": path},
        "versions": {path: path},
        "recipe_rules": {"name": path},
        "totals": totals(rows),
        "kinds": {path: totals(rows)},
        "linears": rows,
    }


def test_what_comes_from_a_checkpoint_cannot_run():
    text = page(fake(HOSTILE, **{HOSTILE: 1.0}), b"png")
    found = Page(text)
    (script,) = found.inside["script"]
    assert "alert" not in script
    assert not any("onload" in attrs or "on" in attrs for _, attrs in found.tags)
    assert "<script>alert" not in text
    assert HOSTILE in found.inside["td"]  # as text
    assert any(attrs.get("data-key") == HOSTILE for _, attrs in found.tags)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for _, a in found.tags if "http-equiv" in a]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_a_hostile_path_of_a_checkpoint(here: Path):
    path = "layers.0.<script>alert(1)</script>$"
    weights = {f"{path}.weight": np.ones((8, 32), np.float32)}
    save_file(weights, here / MODEL / "model.safetensors", {"format": "pt"})
    edit(here / MODEL, model_type="unheard")
    words = ("quantize", MODEL, "out", "--qformat", "mxfp8", "--report", "report")
    assert jqx(*words).code == 0
    assert [row["path"] for row in told(here / "report")["linears"]] == [path]
    found = Page((here / "report" / "report.html").read_text())
    assert path in found.inside["td"]
    assert len(found.inside["script"]) == 1


def test_the_page_needs_nothing_else(here: Path):
    words = ("--qformat", "nvfp4", "--calib", "ids.npy", "--report", "report")
    assert jqx("quantize", MODEL, "out", *words).code == 0
    text, content = (here / "report" / "report.html").read_text(), told(here / "report")
    found = Page(text)
    sources = [a[key] or "" for _, a in found.tags for key in ("src", "href", "data") if key in a]
    picture = base64.b64encode((here / "report" / "errors.png").read_bytes()).decode()
    assert sources == [f"data:image/png;base64,{picture}"]
    assert not re.search(r"@import|url\(|https?:", text)
    assert {tag for tag, _ in found.tags}.isdisjoint({"link", "iframe", "object", "base"})
    cells = [a["data-key"] for tag, a in found.tags if tag == "td" and "data-key" in a]
    errors = sorted((row["output_error"] for row in content["linears"]), reverse=True)
    shown = [float(key) for key in cells if key and key in {repr(e) for e in errors}]
    assert shown[:10] == errors[:10]  # the ten worst
    assert sorted(shown[10:], reverse=True) == errors  # all of them
    mean = content["totals"]["output_error"]["mean"]
    assert f"{mean:.3g}" in found.inside["b"]


def test_the_picture(tmp_path: Path):
    rows = [
        {"path": f"{k}{n}", "kind": f"_{k}$x^$\u4e2d", "layer": n, "output_error": 10.0 ** -(n + 1)}
        for k in map(str, range(30))
        for n in range(3)
    ]
    rows.append({"path": "head", "kind": "head", "layer": None, "output_error": 0.5})
    plot_errors(rows, "$a^$ \u4e2d", tmp_path / "errors.png")
    head = (tmp_path / "errors.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) == (1350, 720)
    assert plain("\u4e2d$") == "\\u4e2d$"


@pytest.mark.parametrize("errors", [[], [0.0], [0.0, 0.25]], ids=str)
def test_a_picture_of_no_errors(tmp_path: Path, errors: list[float]):
    rows = [
        {"path": f"a.{i}.b", "kind": "b", "layer": i, "weight_error": e}
        for i, e in enumerate(errors)
    ]
    plot_errors(rows, "none", tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 1000


def test_points_of_the_picture():
    rows = [
        {"kind": "up", "layer": 1, "output_error": 0.25},
        {"kind": "up", "layer": 1, "output_error": 0.75},
        {"kind": "up", "layer": 0, "output_error": 0.125},
        {"kind": "up", "layer": 2},
        {"kind": "down", "layer": 0, "output_error": 0.0},
        {"kind": "head", "layer": None, "output_error": 1.0},
    ]
    assert lines(rows, "output_error") == {"up": [(0, 0.125), (1, 0.5)], "head": [(None, 1.0)]}
