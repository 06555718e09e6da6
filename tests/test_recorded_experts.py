# SPDX-License-Identifier: Apache-2.0
"""Recorded inputs that lack those of experts: refused, or the model is run for these alone."""

from pathlib import Path

import exports
import family_checkpoints
import ml_dtypes
import numpy as np
import pytest
from command import jqx, refused, snapshot
from safetensors.numpy import load_file, save_file
from tiny_families import ONE_EACH

from jqx_interop.job import prepare
from jqx_interop.settings import Settings

FIRST = "model.layers.0.mlp.experts.0.gate_proj"


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A mixture, "ids.npy", inputs drawn for all of its linears, and those but for experts."""
    here = tmp_path_factory.mktemp("recorded")
    model = family_checkpoints.write(here / "model", ONE_EACH["qwen3_moe"])
    job, rng = prepare(model, "fp8", Settings()), np.random.default_rng(5)
    drawn = {
        f"{path}|{i}": (rng.standard_normal((2, 10, job.modules[path].shape[1])) * (i + 1)).astype(
            ml_dtypes.bfloat16
        )
        for path in job.choices
        for i in range(2)
    }
    save_file(drawn, here / "all.safetensors")
    few = {key: x for key, x in drawn.items() if ".experts." not in key}
    save_file(few, here / "few.safetensors")
    save_file({k: x for k, x in few.items() if "o_proj" not in k}, here / "fewer.safetensors")
    return here


def test_what_is_missing_is_told_in_a_line(here: Path, tmp_path: Path):
    words = ("quantize", here / "model", tmp_path / "out", "--qformat", "fp8", "--activations")
    count = sum(key.endswith("|0") for key in load_file(here / "all.safetensors"))
    mine = sum(key.endswith("|0") for key in load_file(here / "few.safetensors"))
    told = (
        f"no inputs of {FIRST} and {count - mine - 1} more, {count - mine} of the {count} linears"
    )
    refused(*words, here / "few.safetensors", saying=(told, "give --calib as well"))
    both = (here / "fewer.safetensors", "--calib", here / "ids.npy")
    other = ("no inputs of model.layers.0.self_attn.o_proj", "in the place of --activations")
    refused(*words, *both, saying=other)
    assert not list(tmp_path.iterdir())


def test_the_model_is_run_for_experts_alone(here: Path, tmp_path: Path):
    found = {}
    for name, data in {
        "recorded": ("--activations", here / "all.safetensors"),
        "run": ("--calib", here / "ids.npy"),
        "both": ("--activations", here / "few.safetensors", "--calib", here / "ids.npy"),
    }.items():
        words = ("--qformat", "fp8", "--kv-cache", "fp8", *data)
        done = jqx("quantize", here / "model", tmp_path / name, *words)
        assert done.code == 0, done.err
        found[name] = exports.read_tensors(tmp_path / name)
        assert ("experts were sent" in done.out) == (name != "recorded")
    for name, tensor in found["both"].items():
        source = "run" if ".experts." in name else "recorded"
        assert tensor == found[source][name]
    for part in (".experts.", ".self_attn."):
        scales = [name for name in found["both"] if part in name and name.endswith("input_scale")]
        assert any(found["run"][name] != found["recorded"][name] for name in scales)


def test_statistics_of_both_are_kept(here: Path, tmp_path: Path):
    data = ("--activations", here / "few.safetensors", "--calib", here / "ids.npy")
    words = ("--qformat", "nvfp4_gptq", "--kv-cache", "fp8")
    for done in (
        jqx("calibrate", here / "model", tmp_path / "stats", *words, *data),
        jqx("quantize", here / "model", tmp_path / "one", *words, "--stats", tmp_path / "stats"),
        jqx("quantize", here / "model", tmp_path / "other", *words, *data),
    ):
        assert done.code == 0, done.err
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "other")
