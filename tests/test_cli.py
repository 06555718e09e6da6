# SPDX-License-Identifier: Apache-2.0
"""The other commands: inspect, compare, the tables, help and completion; output for programs."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import exports
import ml_dtypes
import numpy as np
import pytest
import yaml
from command import jqx, refused

import jqx_interop as ji
from jqx.config import KV_FORMATS, from_json
from jqx.formats import FORMATS
from jqx.recipes import RECIPES
from jqx_interop import tables
from jqx_interop.cli.console import duration, size
from jqx_interop.families import FAMILIES
from jqx_interop.sources import SOURCES
from jqx_interop.targets import TARGETS


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model, and what becomes of it in FP8 with FP8 keys and values."""
    folder = tmp_path_factory.mktemp("models")
    exports.write_base(folder / "llama", "llama")
    exports.write_activations(folder / "acts.safetensors", "llama")
    given = {"kv_cache": "fp8", "activations": folder / "acts.safetensors"}
    ji.ptq(folder / "llama", folder / "fp8", "fp8", **given)
    return folder


# --- quantize, for programs


def test_a_report_as_json(root: Path, tmp_path: Path):
    code, out, err = jqx(
        "quantize", root / "llama", tmp_path / "out", "--qformat", "mxfp8", "--json"
    )
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["recipe"] == "mxfp8"
    assert said["output_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert said["files"] == ["model.safetensors"]
    assert said["coverage"]["left"] == ["lm_head"]
    assert said["coverage"]["formats"] == {"mxfp8, mxfp8": 14}


def test_a_report_for_people(root: Path, tmp_path: Path):
    code, out, err = jqx("quantize", root / "llama", tmp_path / "out", "--qformat", "mxfp8")
    assert (code, err) == (0, "")
    assert "of 328,320 parameters quantized in 14 linears" in out
    assert "lm_head" in out
    assert str(tmp_path / "out") in out
    assert "bits a parameter" in out


# --- inspect


def test_a_model_is_described(root: Path):
    code, out, err = jqx("inspect", root / "llama")
    assert (code, err) == (0, "")
    for phrase in (
        str(root / "llama"),
        "llama",
        "LlamaForCausalLM",
        "every format",
        "BF16",
        "328,320",
    ):
        assert phrase in out
    assert "quantized" not in out
    said = json.loads(jqx("inspect", root / "llama", "--json").out)
    assert said["quantization"] is None
    assert said["facts"]["hidden size"] == 128
    assert said["facts"]["bytes"] == sum(dtype["bytes"] for dtype in said["dtypes"])
    shapes = {tensor["name"]: tuple(tensor["shape"]) for tensor in said["tensors"]}
    assert shapes == exports.shapes(exports.MODELS["llama"])


def test_an_export_is_described(root: Path):
    code, out, err = jqx("inspect", root / "fp8", "--tensors")
    assert (code, err) == (0, "")
    for phrase in (
        "FP8",
        "float 8",
        "F8_E4M3",
        "model.layers.1.mlp.down_proj.input_scale",
        "[128, 256]",
    ):
        assert phrase in out
    assert "ignored by the quantization: lm_head, model.embed_tokens" in out
    said = json.loads(jqx("inspect", root / "fp8", "--json").out)
    assert said["quantization"] == {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "kv_cache": "float 8",
        "ignore": ["lm_head", "model.embed_tokens"],
    }


@pytest.mark.parametrize(
    ("change", "phrase"),
    [({"model_type": "strange"}, "'strange'"), ({"rope_scaling": {"type": "yarn"}}, "'yarn'")],
)
def test_what_jqx_cannot_run_is_described_too(
    root: Path, tmp_path: Path, change: dict, phrase: str
):
    shutil.copytree(root / "llama", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {
        "rope_parameters": None
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **change}))
    said = json.loads(jqx("inspect", tmp_path / "model", "--json").out)
    assert said["facts"]["calibration here"].startswith("formats without calibration only: ")
    assert phrase in said["facts"]["calibration here"]
    assert jqx("quantize", tmp_path / "model", tmp_path / "out", "--qformat", "mxfp8").code == 0


def test_names_are_printed_as_they_are(root: Path, tmp_path: Path):
    shutil.copytree(root / "llama", tmp_path / "[red]model[/red]")
    assert "[red]model[/red]" in jqx("inspect", tmp_path / "[red]model[/red]").out


# --- compare


def test_a_checkpoint_equals_itself(root: Path):
    code, out, err = jqx("compare", root / "fp8", root / "fp8")
    assert (code, out, err) == (0, "53 of 53 tensors are equal\n", "")
    out = jqx("compare", root / "fp8", root / "fp8", "--all").out
    assert "model.layers.0.self_attn.k_proj.k_scale" in out
    assert "hf_quant_config.json" in out


def changed(root: Path, tmp_path: Path, **tensors: np.ndarray | None) -> Path:
    """The model with other tensors; None takes one away."""
    shutil.copytree(root / "llama", tmp_path / "changed")
    found = exports.tensors("llama") | {name.replace("__", "."): a for name, a in tensors.items()}
    kept = {name: a for name, a in found.items() if a is not None}
    exports.save_file(kept, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
    return tmp_path / "changed"


def test_differences_are_named_and_measured(root: Path, tmp_path: Path):
    norm = exports.tensors("llama")["model.norm.weight"].copy()
    norm[5] += ml_dtypes.bfloat16(2.0)
    distance = float(norm[5]) - float(exports.tensors("llama")["model.norm.weight"][5])
    other = changed(
        *(root, tmp_path),
        model__norm__weight=norm,
        lm_head__weight=np.zeros((128, 128), np.float32),
        model__embed_tokens__weight=None,
        more=np.zeros(3, np.float32),
    )
    code, out, err = jqx("compare", root / "llama", other)
    assert (code, err) == (1, "")
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith("│")}
    assert set(rows) == {"model.norm.weight", "lm_head.weight", "model.embed_tokens.weight", "more"}
    assert re.search(r"differs .*BF16 \[128\] .*1 of 128 ", rows["model.norm.weight"])
    assert f" {distance:.3g} " in rows["model.norm.weight"]
    assert "BF16 [128, 128] and F32 [128, 128]" in rows["lm_head.weight"]
    assert "only in A" in rows["model.embed_tokens.weight"]
    assert "only in B" in rows["more"]
    assert "18 of 22 tensors are equal" in out
    code, out, _ = jqx("compare", root / "llama", other, "--json")
    said = json.loads(out)
    assert code == 1
    assert said["equal"] is False
    found = {row["name"]: row for row in said["tensors"]}["model.norm.weight"]
    assert (found["different"], found["values"], found["largest"]) == (1, 128, distance)


def test_numbers_that_are_none_are_json_too(root: Path, tmp_path: Path):
    norm = exports.tensors("llama")["model.norm.weight"].copy()
    norm[:2] = np.nan, np.inf
    out = jqx(
        "compare", root / "llama", changed(root, tmp_path, model__norm__weight=norm), "--json"
    ).out
    rows = json.loads(out, parse_constant=lambda name: pytest.fail(name))["tensors"]
    found = {row["name"]: row for row in rows}["model.norm.weight"]
    assert (found["different"], found["largest"]) == (2, None)


def test_descriptions_are_compared_but_for_their_producer(root: Path, tmp_path: Path):
    shutil.copytree(root / "fp8", tmp_path / "other")
    file = tmp_path / "other" / "hf_quant_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"producer": {"name": "another"}}))
    assert jqx("compare", root / "fp8", tmp_path / "other").code == 0
    said["quantization"]["quant_algo"] = "FP9"
    file.write_text(json.dumps(said))
    code, out, _ = jqx("compare", root / "fp8", tmp_path / "other")
    assert code == 1
    assert "hf_quant_config.json" in out
    file.unlink()
    assert "only in A" in jqx("compare", root / "fp8", tmp_path / "other").out
    file.write_text("{")
    refused(
        "compare", root / "fp8", tmp_path / "other", saying=("hf_quant_config.json", "not JSON")
    )


# --- tables


@pytest.mark.parametrize(
    ("command", "rows", "names"),
    [
        ("formats", tables.format_rows, FORMATS),
        ("recipes", tables.recipe_rows, RECIPES),
        ("families", tables.family_rows, FAMILIES),
        ("targets", tables.target_rows, TARGETS),
        ("sources", tables.stored_rows, SOURCES),
    ],
    ids=["formats", "recipes", "families", "targets", "sources"],
)
def test_a_table_has_a_row_for_every_name(command: str, rows, names: dict):
    code, out, err = jqx(command)
    assert (code, err) == (0, "")
    for name in names:
        assert re.search(rf"│ {re.escape(name)} +│", out)
    said = json.loads(jqx(command, "--json").out)
    assert said == rows()
    key = "model_type" if "model_type" in said[0] else next(iter(said[0]))
    assert [row[key] for row in said] == list(names)
    lines = tables.markdown(rows()).splitlines()
    assert len(lines) == 2 + len(names)
    assert len({line.count(" | ") for line in lines}) == 1


def test_a_recipe_is_shown_as_it_is_read():
    out = jqx("recipes", "NVFP4_MLP_ONLY_CFG").out
    said = yaml.safe_load(out)
    assert said.pop("name") == "nvfp4_mlp_only"
    assert from_json(said) == RECIPES["nvfp4_mlp_only"].config


# --- help and completion


def test_help_names_every_command_and_option():
    for words in ((), ("--help",)):
        code, out, err = jqx(*words)
        assert (code, err) == (0, "")
        for name in ("quantize", "inspect", "compare", "tune", "formats", "recipes", "kernels"):
            assert re.search(rf"│ {name} ", out)
        assert "--debug" in out
    out = jqx("quantize", "--help").out
    for option in (
        "--qformat",
        "--kv-cache",
        "--recipe",
        "--algorithm",
        "--set",
        "--calib",
        "--calib-size",
    ):
        assert option in out
    for option in (
        "--calib-seq",
        "--activations",
        "--batch-size",
        "--max-memory",
        "--max-shard-size",
    ):
        assert option in out
    for option in ("--compute", "--target", "--restart", "--plan", "--json"):
        assert option in out


def test_the_version():
    assert jqx("--version") == (0, f"jqx {version('jqx')}\n", "")


def completed(*words: str) -> list[str]:
    """What a shell would offer for the last word."""
    asked = {"_JQX_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("jqx", *words))}
    done = subprocess.run(
        [Path(sys.executable).with_name("jqx")],
        env={**os.environ, **asked, "COMP_CWORD": str(len(words))},
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout.split()


def test_names_are_completed():
    assert {"mxfp4", "mxfp4_mlp_weight_only", "mxfp8"} <= set(
        completed("quantize", "--qformat", "mx")
    )
    assert completed("quantize", "--kv-cache", "nv") == [
        n for n in KV_FORMATS if n.startswith("nv")
    ]


def test_help_imports_no_other_framework_and_no_tokenizer():
    script = "import sys; from jqx_interop.cli import main; sys.argv = ['jqx', '--help']\n"
    script += "try: main()\nexcept SystemExit: pass\n"
    script += "heavy = ('torch', 'transformers', 'tokenizers', 'huggingface_hub')\n"
    script += "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == "[]\n"


# --- numbers for people


def test_sizes_and_times_for_people():
    sizes = {0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 5 * 2**20: "5.0 MiB", 3 * 2**40: "3.0 TiB"}
    assert {count: size(count) for count in sizes} == sizes
    times = {4.4: "4 s", 89.0: "89 s", 125.0: "2 min 5 s", 7200.0: "2.0 h", 3000.0: "50 min 0 s"}
    assert {seconds: duration(seconds) for seconds in times} == times
