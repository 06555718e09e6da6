# SPDX-License-Identifier: Apache-2.0
"""Quantized sources whose codes go on without an error, or as they are."""

import json
from pathlib import Path
from typing import Any

import command
import exports
import foreign
import numpy as np
import pytest
import small_model
from foreign import F8
from stored_sources import MXFP4, content, floats, make

import jqx
import jqx_interop as ji
from jqx.models import linear_shapes
from jqx.tensors.paths import flatten
from jqx_interop.settings import Settings


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("sources") / "root")


# --- MXFP4 without an error


@pytest.mark.parametrize("report", [False, True], ids=["", "report"])
def test_mxfp4_becomes_nvfp4_exactly(root: Path, tmp_path: Path, report: bool):
    page = ("--report", tmp_path / "page", "--calib", root / "ids.npy") if report else ()
    given = ("--qformat", "w4a16_nvfp4", *page)
    done = command.jqx("quantize", root / "mxfp4", tmp_path / "out", *given)
    assert done.code == 0, done.err
    assert "blocks of MXFP4 became NVFP4, every one exactly" in done.out
    wanted, got = floats(root / "mxfp4"), floats(tmp_path / "out")
    assert wanted.keys() == got.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array)
    stored = exports.read_tensors(tmp_path / "out")
    name = "model.layers.0.self_attn.{}_proj.weight_scale_2"
    (shared,) = {stored[name.format(letter)][2] for letter in "qkv"}
    assert np.frexp(np.frombuffer(shared, "f4"))[0] == 0.5  # a power of two


def test_what_a_block_scale_does_not_reach_is_counted(root: Path, tmp_path: Path):
    tensors = foreign.stored_as_mxfp4(floats(root / "model"))
    name = "model.layers.1.mlp.down_proj.weight"
    scales = tensors[f"{name}_scales"].copy()
    scales[3, 1], scales[4, 2] = scales.max() - 18, scales.max() - 30
    tensors[f"{name}_scales"] = scales
    tensors[f"{name}_blocks"][4, 2] = 0x80  # zeros, of either sign
    config = {**small_model.CONFIG, "quantization_config": MXFP4}
    foreign.put(tmp_path / "model", config, tensors)
    given = ("--qformat", "w4a16_nvfp4", "--json")
    done = command.jqx("quantize", tmp_path / "model", tmp_path / "out", *given)
    assert json.loads(done.out)["carried"].endswith("became NVFP4, 1 of them rounded")
    wanted, got = (floats(tmp_path / n)[name].astype(np.float32) for n in ("model", "out"))
    wrong = np.argwhere(wanted != got)
    assert {(r, c // 32) for r, c in wrong} <= {(3, 1)}
    assert np.abs(wanted - got).max() <= 2.0 ** (int(scales.max()) - 127 - 17) / 2


@pytest.mark.parametrize("report", [False, True], ids=["", "report"])
def test_mxfp4_stays_as_it_is(root: Path, tmp_path: Path, report: bool):
    page = ("--report", tmp_path / "page", "--calib", root / "ids.npy") if report else ()
    given = ("--qformat", "mxfp4", *page)
    assert command.jqx("quantize", root / "mxfp4", tmp_path / "out", *given).code == 0
    old, new = exports.read_tensors(root / "mxfp4"), exports.read_tensors(tmp_path / "out")
    linears = [name for name in new if f"{name}_blocks" in old]
    assert len(linears) == 14
    for name in linears:
        assert new[name][2] == old[f"{name}_blocks"][2]
        assert new[f"{name}_scale"][2] == old[f"{name}_scales"][2]


# --- what stays as it is


def test_what_the_recipe_leaves_alone_is_kept(root: Path, tmp_path: Path):
    given = ("--qformat", "nvfp4_mlp_only", "--calib", root / "ids.npy", "--keep-source")
    done = command.jqx("quantize", root / "fp8", tmp_path / "out", *given)
    assert done.code == 0, done.err
    assert "decoded, 8 linears kept as stored" in done.out
    old, new = exports.read_tensors(root / "fp8"), exports.read_tensors(tmp_path / "out")
    for layer in range(2):
        for letter in "qkvo":
            name = f"model.layers.{layer}.self_attn.{letter}_proj.weight"
            assert new[name] == old[name]
            assert new[f"{name}_scale"][1:] == ([1, 1, 1, 1], old[f"{name}_scale_inv"][2])
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == "MIXED_PRECISION"
    assert said["quantized_layers"]["model.layers.0.self_attn.q_proj"] == {
        "quant_algo": "fp8_pb_wo"
    }
    assert list(said["quantized_layers"]) == list(linear_shapes(ji.load(root / "fp8").spec))[:14]
    model = flatten(jqx.dequantize(ji.load(tmp_path / "out").params))
    wanted = floats(root / "fp8")
    assert all(np.array_equal(model[n], wanted[n]) for n in wanted if "self_attn" in n)
    assert {n: a.tobytes() for n, a in floats(tmp_path / "out").items() if "self_attn" in n} == {
        n: a.tobytes() for n, a in wanted.items() if "self_attn" in n
    }


PLAIN_FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
KEPT = {
    "tensor, static": ((), True, {"quant_algo": "FP8"}, []),
    "rows, dynamic": ((64, 1), False, {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, [64]),
}


@pytest.mark.parametrize(("shape", "static", "algo", "stored"), KEPT.values(), ids=KEPT)
def test_fp8_of_vllm_is_kept(root: Path, tmp_path: Path, shape, static: bool, algo, stored):
    tensors = floats(root / "model")
    path = "model.layers.0.self_attn.q_proj"
    w = tensors[f"{path}.weight"].astype(np.float32)
    scale = np.full(shape, np.abs(w).max() / 448, np.float32)
    tensors[f"{path}.weight"] = (w / scale).astype(F8)
    tensors[f"{path}.weight_scale"] = scale
    if static:
        tensors[f"{path}.input_scale"] = np.asarray(np.float32(0.25))
    config = {**small_model.CONFIG, "quantization_config": PLAIN_FP8}
    foreign.put(tmp_path / "model", config, tensors)
    given = ("--qformat", "nvfp4_mlp_only", "--calib", root / "ids.npy", "--keep-source")
    done = command.jqx("quantize", tmp_path / "model", tmp_path / "out", *given)
    assert done.code == 0, done.err
    assert "; source: FP8, scales of tensors or rows, decoded, 1 linear kept" in done.out
    old, new = exports.read_tensors(tmp_path / "model"), exports.read_tensors(tmp_path / "out")
    assert new[f"{path}.weight"] == old[f"{path}.weight"]
    assert new[f"{path}.weight_scale"][1:] == (stored, old[f"{path}.weight_scale"][2])
    assert (f"{path}.input_scale" in new) == static
    if static:
        assert new[f"{path}.input_scale"] == old[f"{path}.input_scale"]
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert said["quantized_layers"][path] == algo


def test_a_run_that_was_killed_keeps_the_rest(root: Path, tmp_path: Path, monkeypatch):
    from jqx_interop import units

    settings = Settings(calib=root / "ids.npy", keep_source=True)
    plain, left = units.Finisher._keep, []

    def keep(self, path):
        if "layers.1." in path and not left:
            left.append(path)
            raise RuntimeError("killed")
        plain(self, path)

    monkeypatch.setattr(units.Finisher, "_keep", keep)
    for out in ("whole", "whole"):
        try:
            ji.ptq(root / "fp8", tmp_path / out, "nvfp4_mlp_only", **settings_of(settings))
        except RuntimeError:
            assert left
    ji.ptq(root / "fp8", tmp_path / "once", "nvfp4_mlp_only", **settings_of(settings))
    assert content(tmp_path / "whole") == content(tmp_path / "once")


def settings_of(settings: Settings) -> dict[str, Any]:
    return {"calib": settings.calib, "keep_source": settings.keep_source}
