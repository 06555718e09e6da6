# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints as sources: what comes of them is what comes of the floats they mean."""

import json
import shutil
from pathlib import Path

import command
import exports
import foreign
import jax
import numpy as np
import pytest
from foreign import BF16, F8, FP8_BLOCKS
from stored_sources import MXFP4, STORED, content, floats, make

import jqx_interop as ji
from jqx.tensors import QTensor
from jqx.tensors.paths import flatten
from jqx_interop.checkpoints import open_checkpoint
from jqx_interop.job import prepare
from jqx_interop.outlines import open_outline
from jqx_interop.settings import Settings
from jqx_interop.sources import (
    DecodedCheckpoint,
    as_floats,
    title_of,
    without_description,
)
from jqx_interop.sources import weight as decoding


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("sources") / "root")


@pytest.mark.parametrize(
    ("source", "recipe", "more"),
    [
        ("fp8", "nvfp4", ()),
        ("fp8", "int8_smoothquant", ()),
        ("fp8", "nvfp4", ("--low-memory",)),
        ("mxfp4", "fp8", ()),
        ("mxfp4", "nvfp4_awq", ()),
    ],
)
def test_a_source_becomes_what_its_floats_become(
    root: Path, tmp_path: Path, source: str, recipe: str, more: tuple[str, ...]
):
    given = ("--qformat", recipe, "--calib", root / "ids.npy", *more)
    done = command.jqx("quantize", root / source, tmp_path / "a", *given)
    assert done.code == 0, done.err
    assert f"; source: {STORED[source][2]}, decoded" in done.out
    assert command.jqx("quantize", root / f"{source}-floats", tmp_path / "b", *given).code == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert "weight_block_size" not in (tmp_path / "a" / "config.json").read_text()


def test_the_floats_are_the_definition(root: Path):
    for name, array in floats(root / "fp8").items():
        tensors = exports.read_tensors(root / "fp8")
        if f"{name}_scale_inv" in tensors:
            _, shape, raw = tensors[name]
            _, grid, scale = tensors[f"{name}_scale_inv"]
            codes = np.frombuffer(raw, F8).reshape(shape)
            defined = foreign.fp8(codes, np.frombuffer(scale, "f4").reshape(grid), (128, 128))
            np.testing.assert_array_equal(array, defined.astype(BF16))


# --- what a model of it computes


@pytest.mark.parametrize("source", STORED)
def test_a_source_runs_as_its_floats(root: Path, source: str):
    a, b = ji.load(root / source), ji.load(root / f"{source}-floats")
    assert "quantization_config" not in a.config
    left, right = flatten(a.params), flatten(b.params)
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        assert not isinstance(leaf, QTensor)
        np.testing.assert_array_equal(leaf, right[name])
    ids = np.load(root / "ids.npy")[0]
    np.testing.assert_array_equal(
        a.apply({"params": a.params}, ids), b.apply({"params": b.params}, ids)
    )


def test_a_source_is_evaluated(root: Path):
    text = "--text", root / "ids.npy"
    found = [command.jqx("eval", root / n, *text, "--json") for n in ("fp8", "fp8-floats")]
    assert [done.code for done in found] == [0, 0], found[0].err
    a, b = (json.loads(done.out) for done in found)
    assert a["perplexity"] == b["perplexity"]


def test_a_source_is_compressed_while_it_is_read(root: Path):
    a, b = (ji.load(root / n, quantize="w4a16_nvfp4") for n in ("fp8", "fp8-floats"))
    left, right = jax.tree.leaves(a.params), jax.tree.leaves(b.params)
    assert all(np.array_equal(x, y) for x, y in zip(left, right, strict=True))


def test_a_source_is_turned(root: Path, tmp_path: Path):
    for name in ("fp8", "fp8-floats"):
        ji.rotate(root / name, tmp_path / name)
    assert content(tmp_path / "fp8") == content(tmp_path / "fp8-floats")


# --- architectures that are not defined here


def strange() -> foreign.Arrays:
    """A mixture in FP8 blocks with a ragged latent projection, and experts in MXFP4 would be
    elsewhere.
    """
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens": (32, 64),
        "model.layers.0.self_attn.kv_a_proj_with_mqa": (576, 64),
        "model.layers.0.self_attn.o_proj": (64, 64),
        **{
            f"model.layers.0.mlp.experts.{e}.{n}_proj": (96, 64)
            for e in (0, 1)
            for n in ("up", "gate")
        },
        **{f"model.layers.0.mlp.experts.{e}.down_proj": (64, 96) for e in (0, 1)},
        "model.layers.0.mlp.gate": (2, 64),
        "lm_head": (32, 64),
    }
    plain = {
        f"{n}.weight": rng.standard_normal(s, np.float32).astype(BF16) for n, s in shapes.items()
    }
    plain["model.layers.0.mlp.gate.e_score_correction_bias"] = np.arange(2, dtype=np.float32)
    keep = ("embed", "lm_head", "mlp.gate.")
    return foreign.stored_as_fp8(plain, keep)


STRANGE = {
    "model_type": "deepseek_strange",
    "architectures": ["DeepseekStrangeForCausalLM"],
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "quantization_config": FP8_BLOCKS,
}


def test_experts_of_another_architecture(tmp_path: Path):
    foreign.put(tmp_path / "model", STRANGE, strange())
    given = ("--qformat", "w4a16_nvfp4", "--recipe", tmp_path / "experts.yaml", "--keep-source")
    (tmp_path / "experts.yaml").write_text(
        "rules: [{path_glob: '*.experts.*', weight: nvfp4, kind: linear}]\n"
    )
    done = command.jqx("quantize", tmp_path / "model", tmp_path / "out", *given[2:])
    assert done.code == 0, done.err
    old, new = exports.read_tensors(tmp_path / "model"), exports.read_tensors(tmp_path / "out")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert new[name] == old[name]
    assert new[f"{name}_scale"][1:] == ([5, 1, 1, 1], old[f"{name}_scale_inv"][2])
    bias = "model.layers.0.mlp.gate.e_score_correction_bias"
    assert new[bias] == old[bias]
    assert new["model.layers.0.mlp.experts.1.down_proj.weight"][:2] == ("U8", [64, 48])


def test_the_tensors_of_gpt_oss(tmp_path: Path, monkeypatch):
    """Fused experts have the names and the shapes of the checkpoint in bfloat16, and one of them
    is read without the others.
    """
    rng = np.random.default_rng(1)
    at, shape = "model.layers.0.mlp.experts", (3, 8, 2)
    tensors = {
        f"{at}.gate_up_proj_blocks": rng.integers(0, 256, (*shape, 16)).astype(np.uint8),
        f"{at}.gate_up_proj_scales": rng.integers(118, 130, shape).astype(np.uint8),
        f"{at}.gate_up_proj_bias": rng.standard_normal((3, 8), np.float32).astype(BF16),
        "model.layers.0.self_attn.sinks": np.zeros(4, BF16),
    }
    config = {"model_type": "gpt_oss", "torch_dtype": "bfloat16", "quantization_config": MXFP4}
    foreign.put(tmp_path / "model", config, tensors)
    source = as_floats(open_checkpoint(tmp_path / "model"))
    assert isinstance(source, DecodedCheckpoint)
    assert {n: (t.dtype, t.shape, t.nbytes) for n, t in source.tensors.items()} == {
        f"{at}.gate_up_proj": ("BF16", (3, 64, 8), 3 * 64 * 8 * 2),
        f"{at}.gate_up_proj_bias": ("BF16", (3, 8), 48),
        "model.layers.0.self_attn.sinks": ("BF16", (4,), 8),
    }
    whole, shapes, plain = source.read(f"{at}.gate_up_proj"), [], decoding._decode

    def decode(q, dtype):
        shapes.append(q.shape)
        return plain(q, dtype)

    monkeypatch.setattr(decoding, "_decode", decode)
    for e in range(3):
        np.testing.assert_array_equal(source.read_member(f"{at}.gate_up_proj", e), whole[e])
    assert shapes == [(1, 8, 64)] * 3
    with pytest.raises(ValueError, match="read-only"):
        whole[0, 0, 0] = 1


def test_experts_of_modelopt_are_decoded_to_be_run(tmp_path: Path):
    name, rng = "model.layers.0.mlp.experts.down_proj", np.random.default_rng(2)
    tensors = {
        name: rng.integers(0, 256, (2, 16, 4)).astype(np.uint8),
        f"{name}_weight_scale": np.ones((2, 2, 4), F8),
        f"{name}_weight_scale_2": np.asarray(np.float32(0.5)),
        f"{name}_input_scale": np.asarray(np.float32(0.5)),
        "model.norm.weight": np.ones(4, BF16),
    }
    said = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []}
    config = {"model_type": "gpt_oss", "torch_dtype": "bfloat16", "quantization_config": said}
    foreign.put(tmp_path / "model", config, tensors)
    source = as_floats(open_checkpoint(tmp_path / "model"), run=True)
    assert {n: t.shape for n, t in source.tensors.items()} == {
        name: (2, 32, 4),
        "model.norm.weight": (4,),
    }


def test_the_description_of_a_text_model_counts():
    said = {"text_config": {"quantization_config": FP8_BLOCKS, "hidden_size": 4}, "model_type": "a"}
    assert title_of(said) == "FP8, 128x128 blocks"
    assert without_description(said) == {"text_config": {"hidden_size": 4}, "model_type": "a"}
    assert title_of(without_description(said)) is None


# --- plans and inspection


def test_a_plan_by_config_and_index(root: Path, tmp_path: Path):
    (tmp_path / "model").mkdir()
    shutil.copy(root / "fp8" / "config.json", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    given = ("--plan", "--qformat", "nvfp4")
    done = command.jqx("quantize", tmp_path / "model", *given)
    assert done.code == 0, done.err
    assert "; source: FP8, 128x128 blocks, decoded" in done.out
    whole = command.jqx("quantize", root / "fp8", *given, "--calib", root / "ids.npy")
    assert "; source: FP8, 128x128 blocks, decoded" in whole.out
    assert open_outline(tmp_path / "model").tensors.keys() == floats(root / "fp8").keys()


@pytest.mark.parametrize("source", STORED)
def test_inspection_says_what_a_source_is(root: Path, source: str):
    found = ji.inspect_checkpoint(root / source)
    assert found.facts["as a source"] == f"{STORED[source][2]}, decoded"
    assert ji.inspect_checkpoint(root / "model").facts["as a source"] is None
    assert STORED[source][2] in command.jqx("inspect", root / source).out


def test_only_scales_are_read_before_the_work(root: Path, monkeypatch):
    def refuse(*_: object):
        raise AssertionError("a weight is decoded")

    monkeypatch.setattr(decoding, "_decode", refuse)
    prepare(root / "fp8", "mxfp8", Settings())
    prepare(root / "mxfp4", "mxfp8", Settings())
