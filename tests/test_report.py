# SPDX-License-Identifier: Apache-2.0
"""The report of a run: its figures are those of the written checkpoint, and it changes no byte of
it.
"""

import json
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import reference
from command import jqx, refused, snapshot
from reports import AWQ, FILES, Page, told
from safetensors.numpy import load_file, save_file
from source import MODEL, edit

from jqx_interop import ptq, searched
from jqx_interop.checkpoints import DTYPES, Workspace
from jqx_interop.job import prepare
from jqx_interop.recipe_files import read_recipe
from jqx_interop.report_rows import places_of, totals
from jqx_interop.settings import Settings

READERS = {
    "q": "input",
    "k": "input",
    "v": "input",
    "gate": "post_attention",
    "up": "post_attention",
}


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
    assert said.pop("engines")["vllm"]["loads"] is True
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
