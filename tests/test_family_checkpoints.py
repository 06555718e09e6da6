# SPDX-License-Identifier: Apache-2.0
"""What checkpoints of a family may hold besides parameters, and names without their prefix."""

from pathlib import Path

import family_checkpoints
import ml_dtypes
import numpy as np
import pytest
from command import jqx, refused
from safetensors.numpy import load_file, save_file
from tiny_families import DENSE, IDS, ONE_EACH

import jqx_interop as ji

FP8 = ("--qformat", "fp8", "--calib")
BUFFERS = {
    "gpt2": "transformer.h.0.attn.bias",
    "gptj": "transformer.h.1.attn.masked_bias",
    "gpt_neox": "gpt_neox.layers.0.attention.bias",
    "llama": "model.layers.0.self_attn.rotary_emb.inv_freq",
    "chatglm": "transformer.rotary_pos_emb.inv_freq",
    "phi3small": "model.layers.0.self_attn.rotary_emb.long_factor",
}
"""Tensors of old files that are no parameters."""


def written(folder: Path, kind: str) -> Path:
    return family_checkpoints.write(folder, family_checkpoints.CASES.get(kind, ONE_EACH[kind]))


def change(model: Path, drop: str = "", prefix: str = "", **more: np.ndarray) -> None:
    """Take a tensor away, or a prefix of all names, or add tensors."""
    file = model / "model.safetensors"
    tensors = {name.removeprefix(prefix): a for name, a in load_file(file).items() if name != drop}
    save_file(tensors | more, file, {"format": "pt"})


def in_fp8(model: Path) -> tuple[object, ...]:
    """The command that quantizes it, to "out" beside it."""
    ids, out = model.with_name("ids.npy"), model.with_name("out")
    return "quantize", model, out, "--qformat", "fp8", "--calib", ids


@pytest.mark.parametrize("kind", DENSE)
def test_a_tensor_that_no_row_claims_is_refused_by_name(kind: str, tmp_path: Path):
    model = written(tmp_path / "model", kind)
    strange = "model.layers.0.mlp.experts.3.weight"
    change(model, **{strange: np.ones((2, 2), ml_dtypes.bfloat16)})
    refused(*in_fp8(model), saying=f"tensor {strange} is not part of the model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", DENSE)
def test_a_missing_tensor_is_named(kind: str, tmp_path: Path):
    model = written(tmp_path / "model", kind)
    last = list(load_file(model / "model.safetensors"))[-1]
    change(model, drop=last)
    refused(*in_fp8(model), saying=f"tensor {last} is missing")


@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_of_old_files_are_left_out(kind: str, tmp_path: Path):
    model = written(tmp_path / "model", kind)
    change(model, **{BUFFERS[kind]: np.ones((1, 1, 4, 4), np.float32)})
    ji.ptq(model, tmp_path / "out", "fp8_per_channel_per_token")
    names = load_names(tmp_path / "out")
    assert BUFFERS[kind] not in names
    assert names


def load_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(str(folder / "model.safetensors"), "np") as file:
        return list(file.keys())


@pytest.mark.parametrize(
    ("kind", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model.")]
)
def test_names_without_their_prefix_stay_so(kind: str, prefix: str, tmp_path: Path):
    """Published files of some families lack the first part of names that others of them have."""
    model, bare = written(tmp_path / "model", kind), written(tmp_path / "bare" / "model", kind)
    change(bare, prefix=prefix)
    ids = tmp_path / "ids.npy"
    for source, out in ((model, tmp_path / "out"), (bare, tmp_path / "bare" / "out")):
        done = jqx("quantize", source, out, "--qformat", "fp8", "--calib", ids)
        assert done.code == 0, done.err
    names, short = (load_names(f) for f in (tmp_path / "out", tmp_path / "bare" / "out"))
    assert sorted(short) == sorted(name.removeprefix(prefix) for name in names)
    found = [ji.load(folder) for folder in (tmp_path / "out", tmp_path / "bare" / "out")]
    logits = [np.asarray(m.apply({"params": m.params}, IDS)) for m in found]
    np.testing.assert_array_equal(*logits)
