# SPDX-License-Identifier: Apache-2.0
"""The report of a run: its figures are those of the written checkpoint, it changes no byte of it,
survives kills, and opens without a network.
"""

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import reference
from command import jqx, refused, snapshot
from safetensors.numpy import load_file, save_file
from source import MODEL, edit

from jqx_interop import ptq, searched
from jqx_interop.checkpoints import DTYPES, Workspace
from jqx_interop.job import prepare
from jqx_interop.recipe_files import read_recipe
from jqx_interop.report_page import page
from jqx_interop.report_plot import lines, plain, plot_errors
from jqx_interop.report_rows import places_of, totals
from jqx_interop.settings import Settings

AWQ = "extends: int4\nalgorithm: awq_lite\nrules:\n  - {path_glob: '*_proj*', weight: int4_b32}\n"
READERS = {
    "q": "input",
    "k": "input",
    "v": "input",
    "gate": "post_attention",
    "up": "post_attention",
}
FILES = {"report.json", "errors.png", "report.html"}


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(raw, DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape, raw) in exports.read_tensors(folder).items()
    }


def inputs_of(model: Path, path: Path) -> dict[str, np.ndarray]:
    """Inputs drawn for every linear, written to `path`: two batches, some channels far louder."""
    rng, found, recorded = np.random.default_rng(3), {}, {}
    for name, w in arrays(model).items():
        if "_proj" in name:
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            norm = READERS.get(leaf.removesuffix("_proj"), leaf)
            shape = (2, 3, 20, w.shape[1])
            drawn = rng.standard_normal(shape, np.float32)
            drawn[..., ::17] *= 8
            x = recorded.setdefault((parent, norm), drawn)
            for i, batch in enumerate(x):
                found[f"{parent}.{leaf}|{i}"] = batch.astype(w.dtype)
    save_file(found, path)
    paths = dict.fromkeys(key.partition("|")[0] for key in found)
    return {p: np.concatenate([found[f"{p}|0"], found[f"{p}|1"]]) for p in paths}


# --- the figures, from nothing but what was written


def decoded(arrays: dict[str, np.ndarray], path: str) -> np.ndarray:
    """The matrix that the stored linear `path` stands for, by the layout's own description."""
    packed, scale = arrays[f"{path}.weight"], arrays[f"{path}.weight_scale"].astype(np.float64)
    low, high = packed & 15, packed >> 4
    if f"{path}.weight_scale_2" in arrays:  # nvfp4: neighbours of a row
        codes = np.stack([low, high], -1).reshape(len(packed), -1)
        values = reference.value("e2m1", codes)
        scale = scale * float(arrays[f"{path}.weight_scale_2"])
    else:  # int4: neighbours of a column
        codes = np.stack([low, high], 1).reshape(-1, packed.shape[1])
        values = reference.value("int4", codes)
    return values.astype(np.float64) * np.repeat(scale, values.shape[1] // scale.shape[1], axis=1)


def factor(
    before: dict[str, np.ndarray], after: dict[str, np.ndarray], path: str
) -> np.ndarray | float:
    """What inputs are multiplied by: what is stored, or what became of the gain of the norm."""
    if f"{path}.pre_quant_scale" in after:
        return after[f"{path}.pre_quant_scale"].astype(np.float64)
    layer, leaf = path.rsplit(".", 2)[0], path.rpartition(".")[2].removesuffix("_proj")
    if leaf not in READERS:
        return 1.0
    norm = f"{layer}.{READERS[leaf]}_layernorm.weight"
    return after[norm].astype(np.float64) / before[norm].astype(np.float64)


def squared(x: np.ndarray) -> float:
    return float(np.sum(np.square(x, dtype=np.float64)))


@pytest.mark.parametrize(
    ("model", "recipe"),
    [("llama_f32", AWQ), ("llama", "extends: nvfp4\n")],
    ids=["int4 awq_lite", "nvfp4"],
)
def test_errors_are_those_of_the_written_checkpoint(tmp_path: Path, model: str, recipe: str):
    source = exports.write_base(tmp_path / "model", model)
    inputs = inputs_of(source, tmp_path / "acts.safetensors")
    (tmp_path / "recipe.yaml").write_text(recipe)
    done = ptq(
        source,
        tmp_path / "out",
        read_recipe(tmp_path / "recipe.yaml"),
        activations=tmp_path / "acts.safetensors",
        report=tmp_path / "report",
    )
    assert (done.report, done.errors_of) == (str(tmp_path / "report"), "outputs")
    before, after = arrays(source), arrays(tmp_path / "out")
    rows = {row["path"]: row for row in told(tmp_path / "report")["linears"]}
    assert set(rows) == set(inputs)
    for path, row in rows.items():
        w = before[f"{path}.weight"].astype(np.float64)
        d = decoded(after, path) * factor(before, after, path) - w
        x = inputs[path].reshape(-1, w.shape[1]).astype(np.float64)
        assert row["output_error"] == pytest.approx(squared(x @ d.T) / squared(x @ w.T), rel=1e-4)
        assert row["weight_error"] == pytest.approx(squared(d) / squared(w), rel=1e-4)
        assert row["shape"] == list(w.shape)
        stored = sum(a.nbytes for name, a in after.items() if name.startswith(f"{path}."))
        assert row["bits"] == 8 * stored / w.size
        assert ("alpha" in row) == ("awq" in recipe)
    if "awq" in recipe:  # the case above is none of nothing: factors were stored and folded
        assert any(np.any(factor(before, after, p) != 1) for p in rows if "down" in p)
        assert any(np.any(factor(before, after, p) != 1) for p in rows if "q_proj" in p)


def test_totals_and_kinds():
    rows = [
        {"path": "a", "output_error": 0.5, "weight_error": 2.0},
        {"path": "b", "output_error": 1.5},
        {"path": "c"},
    ]
    assert totals(rows) == {
        "linears": 3,
        "output_error": {"mean": 1.0, "worst": 1.5, "worst_linear": "b", "linears": 2},
        "weight_error": {"mean": 2.0, "worst": 2.0, "worst_linear": "a", "linears": 1},
    }
    assert places_of(("model.layers.3.self_attn.q_proj", "h.w", "model.layers.12.e.7.up")) == {
        "model.layers.3.self_attn.q_proj": ("self_attn.q_proj", 3),
        "h.w": ("h.w", None),
        "model.layers.12.e.7.up": ("e.*.up", 12),
    }
    assert places_of(("vision.0.q", "text.1.q", "stack.5")) == {
        "vision.0.q": ("vision.*.q", 0),
        "text.1.q": ("text.*.q", 1),
        "stack.5": ("stack.*.stack.*", 5),
    }


# --- a report changes nothing but itself

RECIPES = ("fp8", "int8", "nvfp4", "mxfp8", "mxfp4", "int4_blockwise_weight_only", "w4a8_nvfp4_fp8")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_checkpoint_has_the_same_bytes(here: Path, recipe: str):
    words = ("quantize", MODEL, "--qformat", recipe, "--calib", "ids.npy", "--kv-cache", "fp8")
    plain, reported = jqx(*words, "plain"), jqx(*words, "reported", "--report", "report")
    assert (plain.code, reported.code) == (0, 0), reported.err
    assert snapshot(here / "plain") == snapshot(here / "reported")
    assert set(snapshot(here / "report")) == FILES
    assert {f.name for f in here.iterdir()} == {
        *(MODEL, "ids.npy", "acts.safetensors"),
        *("plain", "reported", "report"),
    }
    assert f"report: {Path('report', 'report.html')}\n" in reported.out
    assert "report" not in plain.out
    content = told(here / "report")
    assert content["errors_of"] == "outputs"
    assert content["calibration"] == {"data": "ids.npy", "batches": 2, "tokens": 64}
    assert content["totals"]["output_error"]["linears"] == content["totals"]["linears"] == 14
    assert len(content["kinds"]) == 7


def test_without_a_report_nothing_more_is_collected_or_recorded(here: Path, monkeypatch):
    job = prepare(MODEL, "nvfp4", Settings(calib="ids.npy"))
    assert {job.wanted(path) for path in job.choices} == {("amax",)}
    assert not job.searches
    seen, record = [], Workspace.record
    monkeypatch.setattr(Workspace, "record", lambda self, r: (seen.append(r), record(self, r))[1])
    assert ptq(MODEL, "out", "nvfp4", calib="ids.npy").to_json()["report"] is None
    assert {key for row in seen for key in row} == {"unit"}


def test_json_says_where_the_report_is(here: Path):
    code, out, err = jqx(
        "quantize", MODEL, "out", "--qformat", "mxfp8", "--calib", "ids.npy", "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["report"] is None
    words = ("--qformat", "mxfp8", "--calib", "ids.npy", "--report", "deep/report", "--json")
    code, out, err = jqx("quantize", MODEL, "out2", *words)
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert (said["report"], said["errors_of"]) == ("deep/report", "outputs")
    assert set(snapshot(here / "deep" / "report")) == FILES
    assert told(here / "deep" / "report").items() >= said.items()


def test_the_recipe_is_one_that_can_be_used_again(here: Path):
    words = ("--algorithm", "awq_lite", "--set", "block=32", "--set", "alpha_step=0.5")
    words += ("--qformat", "int4", "--kv-cache", "fp8", "--calib", "ids.npy")
    assert jqx("quantize", MODEL, "out", *words, "--report", "report").code == 0
    content, text = told(here / "report"), (here / "report" / "report.html").read_text()
    assert content["algorithm"] == [{"method": "awq_lite", "alpha_step": 0.5}]
    (here / "again.yaml").write_text(Page(text).inside["pre"][0])
    again = ("--recipe", "again.yaml", "--calib", "ids.npy")
    assert jqx("quantize", MODEL, "again", *again).code == 0
    assert snapshot(here / "again") == snapshot(here / "out")


# --- what cannot be measured


def test_weights_alone_where_inputs_cannot_be_had(here: Path):
    edit(here / MODEL, model_type="unheard")
    code, out, err = jqx("quantize", MODEL, "out", "--qformat", "mxfp8", "--report", "report")
    assert (code, err) == (0, "")
    assert "errors are those of weights alone" in out
    content, text = told(here / "report"), (here / "report" / "report.html").read_text()
    assert content["errors_of"] == "weights"
    assert content["calibration"] is None
    assert set(content["totals"]) == {"linears", "weight_error", "saturated"}
    assert "those of weights alone" in text
    assert "output error" not in text


def test_linears_whose_inputs_were_not_recorded_are_named(here: Path):
    acts = load_file(here / "acts.safetensors")
    save_file({k: v for k, v in acts.items() if "down_proj" not in k}, here / "few.safetensors")
    words = ("--activations", "few.safetensors", "--qformat", "mxfp8", "--report", "report")
    refused("quantize", MODEL, "out", *words, saying=("few.safetensors", "down_proj"))
    assert not (here / "report").exists()


def test_figures_that_are_no_numbers_are_left_out(here: Path, monkeypatch):
    def beyond(*_: Any) -> dict[str, float]:
        return {"output_error": float("inf"), "weight_error": float("nan"), "saturated": 0.5}

    monkeypatch.setattr(searched, "measure", beyond)
    words = ("--qformat", "mxfp8", "--calib", "ids.npy", "--report", "report")
    assert jqx("quantize", MODEL, "out", *words).code == 0
    rows, text = told(here / "report")["linears"], (here / "report" / "report.html").read_text()
    assert all(row["saturated"] == 0.5 for row in rows)
    assert not any({"output_error", "weight_error"} & set(row) for row in rows)
    assert "The worst 10" in text


# --- folders in the way


@pytest.mark.parametrize(
    ("folder", "saying"),
    {
        "full": "full exists",
        "ids.npy": "ids.npy exists",
        "dangling": "dangling exists",
        "ids.npy/report": "ids.npy/report",
        ".": ". exists",
        "out": "neither in the other",
        "out/report": "neither in the other",
        "out.jqx-partial/report": "neither in the other",
        f"{MODEL}/report": "inside the model directory",
    }.items(),
    ids=lambda value: value if "/" not in value else None,
)
def test_a_folder_that_cannot_be_is_refused_before_anything(here: Path, folder: str, saying: str):
    (here / "full").mkdir()
    (here / "full" / "file").write_text("")
    (here / "dangling").symlink_to("nowhere")
    before = snapshot(here)
    words = ("--qformat", "mxfp8", "--calib", "ids.npy", "--report", folder)
    refused("quantize", MODEL, "out", *words, saying=saying)
    assert snapshot(here) == before


def test_out_inside_the_report_is_refused(here: Path):
    words = ("--qformat", "mxfp8", "--calib", "ids.npy", "--report", "all")
    refused("quantize", MODEL, "all/out", *words, saying="neither in the other")
    assert not (here / "all").exists()


def test_an_empty_folder_is_taken(here: Path):
    (here / "report").mkdir()
    words = ("--qformat", "mxfp8", "--calib", "ids.npy", "--report", "report")
    assert jqx("quantize", MODEL, "out", *words).code == 0
    assert set(snapshot(here / "report")) == FILES


def test_a_folder_filled_meanwhile_loses_nothing(here: Path, monkeypatch):
    publish = Workspace.publish

    def fills(self: Workspace) -> Path:
        (here / "report").mkdir()
        (here / "report" / "file").write_text("")
        return publish(self)

    monkeypatch.setattr(Workspace, "publish", fills)
    words = ("--qformat", "mxfp8", "--calib", "ids.npy", "--report", "report")
    line = refused("quantize", MODEL, "out", *words, saying=("report.jqx-report-partial",))
    assert "The checkpoint is complete" in line
    assert set(snapshot(here / "report.jqx-report-partial")) == FILES
    assert (here / "out" / "config.json").exists()


# --- runs that were killed

KILLED = """
import os, signal, sys
import jqx_interop.pipeline as pipeline
from jqx_interop.checkpoints import Workspace
owner = {"record": Workspace, "publish": Workspace, "stage_report": pipeline}[sys.argv[1]]
work, left = getattr(owner, sys.argv[1]), int(sys.argv[2])
def killed(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(*args)
setattr(owner, sys.argv[1], killed)
sys.argv = ["jqx", *sys.argv[3:]]
from jqx_interop.cli import main
main()
"""
RUNS = {
    "calibrated": ("--recipe", "awq.yaml", "--calib", "ids.npy"),
    "recorded": ("--qformat", "nvfp4", "--activations", "acts.safetensors"),
}


def same(one: Path, other: Path) -> bool:
    """Whether two reports say the same, but for times and the names of what was written."""
    rows = [told(folder) for folder in (one, other)]
    for row in rows:
        assert row["seconds"] > 0
        row |= {"seconds": 0, "out": "", "report": ""}
    pictures = [(folder / "errors.png").read_bytes() for folder in (one, other)]
    return rows[0] == rows[1] and pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("step", "count", "run"),
    [("record", 2, "calibrated"), ("publish", 0, "calibrated"), ("stage_report", 0, "recorded")],
)
def test_a_killed_run_goes_on_to_the_same_report(here: Path, step: str, count: int, run: str):
    (here / "awq.yaml").write_text(AWQ)
    words = (*RUNS[run], "--report")
    command = [sys.executable, "-c", KILLED, step, str(count), "quantize", MODEL, "out", *words]
    done = subprocess.run([*command, "report"], env=os.environ, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (here / "out").exists()
    assert not (here / "report").exists()
    lines = (here / "out.jqx-partial" / "journal.jsonl").read_text().splitlines()
    units = [json.loads(line)["record"] for line in lines][1:]
    assert len(units) >= 2
    assert any(unit["facts"] for unit in units)
    assert jqx("quantize", MODEL, "out", *words, "report").code == 0
    assert jqx("quantize", MODEL, "whole", *words, "of-whole").code == 0
    assert snapshot(here / "out") == snapshot(here / "whole")
    assert same(here / "report", here / "of-whole")
    assert not list(here.glob("*-partial"))


def test_a_run_without_a_report_does_not_go_on_with_one(here: Path):
    words = ("quantize", MODEL, "out", "--qformat", "fp8", "--calib", "ids.npy")
    command = [sys.executable, "-c", KILLED, "record", "2", *words]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    refused(*words, "--report", "report", saying=("report was False, now True", "--restart"))
    assert jqx(*words, "--report", "report", "--restart").code == 0
    assert len(told(here / "report")["linears"]) == 14


# --- the page and the picture


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
