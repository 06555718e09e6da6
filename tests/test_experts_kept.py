# SPDX-License-Identifier: Apache-2.0
"""Quantized experts that a recipe leaves alone, with --keep-source: as they lie where the layout
has a place for that, else one by one with the same codes and scales.
"""

import json
from pathlib import Path

import exports
import family_checkpoints
import foreign
import jax.numpy as jnp
import numpy as np
import pytest
from command import jqx as run
from command import refused
from damage import arrays
from stored_sources import MXFP4, floats
from test_sources_fused import ROWS, stored
from tiny_families import ONE_EACH

import jqx
import jqx_interop as ji
from jqx.tensors.paths import flatten

IDS = jnp.asarray([[1, 5, 9, 2, 7, 7, 3, 4]], jnp.int32)
FP8 = {"rules": [{"path_glob": "*self_attn*", "kind": "linear", "weight": "fp8", "input": "fp8"}]}
INT4 = {"rules": [{"path_glob": "*self_attn*", "kind": "linear", "weight": "int4_b32"}]}
DOWN = {"path_glob": "*experts*down_proj", "kind": "linear", "weight": "nvfp4", "input": "nvfp4"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """ "<model_type> <format>" -> a checkpoint with such experts, made once."""

    def write(folder: Path, name: str) -> Path:
        kind, fmt, *more = name.split()
        plain = family_checkpoints.write(folder.with_name("plain"), ONE_EACH[kind])
        if fmt == "mxfp4":
            config = json.loads((plain / "config.json").read_text())
            foreign.put(folder, {**config, "quantization_config": MXFP4}, stored(arrays(plain)))
            return folder
        words = ("--qformat", fmt, *more, "--calib", plain.with_name("ids.npy"))
        assert run("quantize", plain, folder, *words).code == 0
        return folder

    return family_checkpoints.made_once(tmp_path_factory, write)


def kept(source: Path, folder: Path, recipe: dict = FP8, target: str = "modelopt") -> Path:
    """What `source` becomes by a recipe."""
    done = run(*words_for(source, folder, recipe, target))
    assert done.code == 0, done.err
    assert "kept as stored" in done.out
    return folder / "out"


def words_for(source: Path, folder: Path, recipe: dict, target: str) -> tuple:
    (folder / "recipe.json").write_text(json.dumps(recipe))
    words = ("quantize", source, folder / "out", "--recipe", folder / "recipe.json", "--target")
    return (*words, target, "--keep-source", "--calib", source.with_name("ids.npy"))


def logits(model: ji.Model) -> np.ndarray:
    return np.asarray(model.apply({"params": model.params}, IDS))


def of_experts(tensors: dict) -> dict:
    return {name: found for name, found in tensors.items() if ".experts." in name}


def same_weights(folder: Path, source: Path) -> None:
    """What experts stand for has not changed."""
    mine, other = (flatten(jqx.dequantize(ji.load(f).params)) for f in (folder, source))
    assert of_experts(mine).keys() == of_experts(other).keys()
    for name, array in of_experts(other).items():
        np.testing.assert_array_equal(mine[name], array)


IN_ONE = {
    "llama4_text fp8": {"vllm": False, "sglang": None, "trtllm": None},
    "gpt_oss nvfp4": {"vllm": False, "sglang": None, "trtllm": None},
    "gpt_oss w4a16_nvfp4": {"vllm": False, "sglang": None, "trtllm": None},
    "llama4 fp8": {"vllm": True, "sglang": True, "trtllm": True},
    "llama4 nvfp4": {"vllm": True, "sglang": False, "trtllm": True},
}
"""Source -> the engines that read experts of one tensor in it."""


def check_as_they_lie(source: Path, folder: Path, engines: dict) -> None:
    out = kept(source, folder)
    old, new = (of_experts(exports.read_tensors(path)) for path in (source, out))
    assert old
    assert new == old
    same_weights(out, source)
    model = ji.load(out)
    ji.save(model, folder / "saved")
    assert exports.digests(folder / "saved") == exports.digests(out)
    said = json.loads(run("inspect", out, "--engine", "all", "--json").out)
    assert [p for p in said["faults"] if p["rule"] != "tokenizer"] == []
    assert {name: said["engines"][name]["loads"] for name in engines} == engines


@pytest.mark.parametrize("name", list(IN_ONE)[:2])
def test_experts_in_one_tensor_stay_as_they_lie(sources, tmp_path: Path, name: str):
    check_as_they_lie(sources(name), tmp_path, IN_ONE[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(IN_ONE)[2:])
def test_all_experts_in_one_tensor_stay_as_they_lie(sources, tmp_path: Path, name: str):
    check_as_they_lie(sources(name), tmp_path, IN_ONE[name])


def test_what_is_searched_elsewhere_leaves_them(sources, tmp_path: Path):
    source = sources("gpt_oss fp8")
    rule = {"path_glob": "*self_attn*", "kind": "linear", "weight": "int8"}
    out = kept(source, tmp_path, {"rules": [rule], "algorithm": "mse"})
    assert of_experts(exports.read_tensors(out)) == of_experts(exports.read_tensors(source))


def test_descriptions_name_their_linears(sources, tmp_path: Path):
    out = kept(sources("gpt_oss nvfp4"), tmp_path)
    said = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    layers = said["quantized_layers"]
    assert layers["model.layers.0.self_attn.q_proj"] == {"quant_algo": "FP8"}
    wanted = {"quant_algo": "NVFP4", "group_size": 16}
    assert layers["model.layers.1.mlp.experts.4.up_proj"] == wanted


@pytest.mark.parametrize("more", ["some linears", "--no-fuse-experts"])
def test_they_are_written_one_by_one_beside_others(sources, tmp_path: Path, more: str):
    source = sources("gpt_oss fp8")
    if more == "some linears":
        out = kept(source, tmp_path, {"rules": [*FP8["rules"], DOWN]})
    else:
        assert run(*words_for(source, tmp_path, FP8, "modelopt"), more).code == 0
        out = tmp_path / "out"
    old, new = arrays(source), arrays(out)
    assert not any("gate_up_proj" in name for name in new)
    base = "model.layers.1.mlp.experts"
    for linear in ("gate_proj", "up_proj"):
        codes = old[f"{base}.gate_up_proj"][3].T[ROWS[linear]]
        name = f"{base}.3.{linear}"
        np.testing.assert_array_equal(new[f"{name}.weight"].view("u1"), codes.view("u1"))
        for leaf in ("weight_scale", "input_scale"):
            assert new[f"{name}.{leaf}"] == old[f"{base}.gate_up_proj_{leaf}"]
    assert np.isfinite(logits(ji.load(out))).all()


def test_experts_that_each_have_a_scale_keep_it(sources, tmp_path: Path):
    """Their format is that of the rest, which would be written in one tensor with one scale."""
    source = sources("llama4_text nvfp4 --no-fuse-experts")
    fmt = {**FP8["rules"][0], "weight": "nvfp4", "input": "nvfp4"}
    out = kept(source, tmp_path, {"rules": [fmt]})
    assert of_experts(exports.read_tensors(out)) == of_experts(exports.read_tensors(source))
    same_weights(out, source)


def test_half_of_a_tensor_does_not_stay_in_it(sources, tmp_path: Path):
    """All formats are alike, and what is quantized anew has another scale."""
    source = sources("gpt_oss nvfp4")
    rules = [{**DOWN, "path_glob": glob} for glob in ("*self_attn*", "*experts*up_proj")]
    out = kept(source, tmp_path, {"rules": rules})
    mine, other = (flatten(jqx.dequantize(ji.load(f).params)) for f in (out, source))
    for linear in ("gate", "down"):
        name = f"model.layers.1.mlp.experts.{{}}.{linear}_proj.weight"
        np.testing.assert_array_equal(mine[name], other[name])
    assert any(name.endswith("experts.3.gate_proj.weight_scale_2") for name in arrays(out))


CODES = {"modelopt": "weight", "compressed-tensors": "weight_packed"}


@pytest.mark.parametrize("target", CODES)
def test_blocks_of_mxfp4_stay_as_they_are_one_by_one(sources, tmp_path: Path, target: str):
    """No layout has a name for them in one tensor."""
    source = sources("gpt_oss mxfp4")
    out = kept(source, tmp_path, FP8, target)
    old, new = arrays(source), arrays(out)
    checked = 0
    for name, blocks in old.items():
        if not name.endswith("_proj_blocks"):
            continue
        base, whole = name.removesuffix("_blocks").rsplit(".", 1)
        scales = old[f"{base}.{whole}_scales"]
        for linear in [n for n in ROWS if (n == "down_proj") == (whole == "down_proj")]:
            for e in range(len(blocks)):
                leaves = (CODES[target], "weight_scale")
                mine = [new[f"{base}.{e}.{linear}.{leaf}"] for leaf in leaves]
                rows = ROWS[linear]
                assert mine[0].tobytes() == np.ascontiguousarray(blocks[e, rows]).tobytes()
                assert mine[1].tobytes() == np.ascontiguousarray(scales[e, rows]).tobytes()
                checked += 1
    assert checked == 30
    mine, other = floats(out), floats(source)
    for name in (n for n in mine if n.endswith("experts.2.up_proj.weight")):
        whole = other[name.replace("2.up_proj.weight", "gate_up_proj")]
        np.testing.assert_array_equal(mine[name], whole[2].T[ROWS["up_proj"]])
    said = json.loads(run("inspect", out, "--engine", "all", "--json").out)
    reads = {name for name, verdict in said["engines"].items() if verdict["loads"]}
    assert reads == ({"vllm", "transformers"} if target == "compressed-tensors" else set())
    assert np.isfinite(logits(ji.load(out))).all()


@pytest.mark.parametrize("name", ["gpt_oss mxfp4", "llama4_text fp8"])
def test_layouts_without_a_name_for_them_are_refused(sources, tmp_path: Path, name: str):
    fmt = name.split()[1]
    saying = (f"experts.0.gate_proj: awq has no name for {fmt} with", "Leave --keep-source out")
    refused(*words_for(sources(name), tmp_path, INT4, "awq"), saying=saying)
    assert not (tmp_path / "out").exists()
