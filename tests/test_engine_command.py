# SPDX-License-Identifier: Apache-2.0
"""`jqx inspect --engine`: exit codes, what is printed and its JSON; and what `quantize`, `export`
and `--plan` say of engines.
"""

import json
from pathlib import Path

import exports
import pytest
from checkpoints import write
from command import jqx, refused
from damage import arrays
from served import configured, exported, ignoring, saved

import jqx_interop.cli.engines
from jqx_interop.engines import ENGINES, FaultyOutput, verify_written


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("model") / "nvfp4", "nvfp4")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    folder = saved(tmp_path_factory.mktemp("model") / "faulty", "nvfp4")
    found = arrays(folder)
    lost = "model.layers.0.mlp.up_proj.weight_scale_2"
    write(folder, {name: array for name, array in found.items() if name != lost})
    return folder


def test_exit_codes(nvfp4, faulty):
    assert jqx("inspect", nvfp4, "--engine", "vllm", "--engine", "sglang").code == 0
    assert jqx("inspect", nvfp4, "--engine", "transformers").code == 1
    assert jqx("inspect", nvfp4, "--engine", "all").code == 1
    assert jqx("inspect", nvfp4).code == 0
    assert jqx("inspect", faulty, "--engine", "vllm").code == 1
    refused("inspect", nvfp4, "--engine", "vlm", saying="unknown engine 'vlm'; did you mean vllm")
    refused("inspect", nvfp4.parent / "none", "--engine", "vllm", saying="no such directory")
    refused("inspect", nvfp4.parent, "--engine", "vllm", saying="is no checkpoint")


def test_what_is_printed(nvfp4, faulty):
    code, out, err = jqx("inspect", nvfp4, "--engine", "all")
    assert (code, err) == (1, "")
    for engine in ENGINES.values():
        assert engine.label in out
    assert "compute capability 10.0+, from 7.5 by Marlin" in out
    assert "error: transformers 5.19: accepts: NVFP4" in out
    assert "way out: " in out
    _, out, _ = jqx("inspect", faulty, "--engine", "vllm")
    assert "error: the checkpoint: missing-tensor: model.layers.0.mlp.up_proj.weight_scale_2" in out


PROBLEM = {"rule", "severity", "text", "source", "way_out", "loads"}
VERDICT = {"engine", "label", "evidence", "loads", "problems", "faults", "warnings", "chips"}


def test_json(nvfp4, faulty):
    for folder, good in ((nvfp4, True), (faulty, False)):
        code, out, _ = jqx("inspect", folder, "--engine", "vllm", "--json")
        said = json.loads(out)
        assert (code, said["good"]) == (0 if good else 1, good)
        assert set(said) == {
            *("path", "layout", "schemes", "kv_cache", "good", "faults", "warnings"),
            *("engines", "coverage"),
        }
        assert set(said["engines"]) == {"vllm"}
        verdict = said["engines"]["vllm"]
        assert set(verdict) == VERDICT
        assert verdict["loads"] is good
        for problem in (*said["faults"], *verdict["problems"]):
            assert set(problem) == PROBLEM
        assert {row["kind"] for row in said["coverage"]} >= {"attention", "MLP", "head", "all"}
    assert said["layout"] == "modelopt"
    assert said["schemes"] == {"NVFP4": 14}


def test_what_is_counted_and_what_is_refused(nvfp4, tmp_path):
    refused("inspect", nvfp4, "--engine", "vllm", "--tensors", saying="give one of them")
    folder = saved(tmp_path / "model", "nvfp4")
    up = "model.layers.0.mlp.up_proj"
    names = ["lm_head", "model.embed_tokens", up]
    ignoring(*names)(folder)
    out = jqx("inspect", folder, "--engine", "vllm").out
    assert "not described (1 linear)" in out
    assert "NVFP4 (13 linears)" in out


def test_completion():
    complete = jqx_interop.cli.engines.complete_engines
    assert complete("t") == ["trtllm", "tpu-vllm", "transformers"]
    assert complete("a") == ["all"]


def test_quantize_and_export_tell_it(tmp_path):
    base = exports.write_base(tmp_path / "llama", "llama")
    asked = (base, tmp_path / "out", "--qformat", "int8_weight_only")
    code, out, err = jqx("quantize", *asked)
    assert (code, err) == (0, "")
    assert "\nvLLM 0.32: no: W8A16 in the layout modelopt is not read" in out
    assert "\nTensorRT-LLM (August 2026): loads\n" in out
    ct = tmp_path / "ct"
    code, out, _ = jqx("export", tmp_path / "out", ct, "--target", "compressed-tensors", "--json")
    said = json.loads(out)
    assert code == 0
    assert said["engines"]["vllm"]["loads"]
    assert said["linears"] == 14
    code, out, _ = jqx("export", ct, tmp_path / "back", "--target", "modelopt")
    assert "\nSGLang 0.5.23: no: " in out
    asked = (base, tmp_path / "again", "--qformat", "mxfp8", "--json")
    said = json.loads(jqx("quantize", *asked).out)
    assert set(said["engines"]) == set(ENGINES)
    assert said["coverage"]["linears"] == 14


def test_the_plan_tells_it(tmp_path):
    base = exports.write_base(tmp_path / "llama", "llama")
    code, out, _ = jqx("quantize", base, "--qformat", "mxfp8", "--plan", "--json")
    engines = json.loads(out)["engines"]
    assert code == 0
    assert {name for name, verdict in engines.items() if verdict["loads"]} == {"vllm", "trtllm"}
    _, out, _ = jqx("quantize", base, "--qformat", "mxfp8", "--plan")
    assert "vLLM 0.32, TensorRT-LLM (August 2026)" in out
    _, out, _ = jqx("quantize", base, "--qformat", "mxfp4", "--plan")
    assert "no engine" in out


def test_a_fault_in_what_was_written_is_a_bug_here(faulty, nvfp4, tmp_path, monkeypatch):
    assert verify_written(nvfp4)
    with pytest.raises(FaultyOutput, match="weight_scale_2 is missing"):
        verify_written(faulty)
    (without := exported(tmp_path / "ct", nvfp4)).joinpath("tokenizer.json").unlink()
    assert verify_written(without)  # nor had the model it came from one
    base = exports.write_base(tmp_path / "llama", "llama")
    monkeypatch.setattr("jqx_interop.engines.verify_written", lambda *_: verify_written(faulty))
    code, _, err = jqx("quantize", base, tmp_path / "out", "--qformat", "mxfp8")
    assert code == 1
    assert "internal error: FaultyOutput" in err
    assert err.count("\n") == 1


def test_a_source_without_a_model_type_is_quantized_and_told(tmp_path):
    base = exports.write_base(tmp_path / "llama", "llama")
    configured(model_type=None)(base)
    code, out, err = jqx("quantize", base, tmp_path / "out", "--qformat", "mxfp8")
    assert (code, err) == (0, "")
    assert "vLLM 0.32: no: config.json has model_type None" in out
