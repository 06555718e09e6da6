# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints as sources: what comes of them is what comes of the floats they mean."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import command
import exports
import foreign
import jax
import numpy as np
import pytest
import small_model
from checkpoints import write
from damage import arrays
from foreign import BF16, F8, FP8_BLOCKS

import jqx
import jqx_interop as ji
from jqx.models import linear_shapes
from jqx.tensors import QTensor
from jqx.tensors.paths import flatten
from jqx_interop.checkpoints import MappedTensors, open_checkpoint
from jqx_interop.job import prepare
from jqx_interop.outlines import open_outline
from jqx_interop.settings import Settings
from jqx_interop.sources import (
    SOURCES,
    DecodedCheckpoint,
    as_floats,
    title_of,
    without_description,
)
from jqx_interop.sources import weight as decoding
from jqx_interop.targets import TARGETS
from jqx_interop.weights import linear_groups, stored_group

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
INEXACT = float.fromhex("0x1.d7dbf4p-11")
"""A float32 that the reciprocal of its reciprocal is not."""

STORED = {
    "fp8": (foreign.stored_as_fp8, FP8_BLOCKS, "FP8, 128x128 blocks"),
    "mxfp4": (foreign.stored_as_mxfp4, MXFP4, "MXFP4"),
}


def floats(path: Path) -> foreign.Arrays:
    """Every tensor of a checkpoint, decoded."""
    checkpoint = as_floats(open_checkpoint(path))
    return {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model in every kind of source, "fp8" and "mxfp4", and what each decodes to in "fp8-floats"
    and "mxfp4-floats".
    """
    root = small_model.write(tmp_path_factory.mktemp("sources") / "root")
    plain = {n: np.array(a) for n, a in floats(root / "model").items()}
    plain["model.layers.0.self_attn.k_proj.weight"] *= 8  # what shares a scale is not alike
    for name, (stored, said, _) in STORED.items():
        config = {**small_model.CONFIG, "quantization_config": said}
        foreign.put(root / name, config, stored(plain))
        foreign.put(root / f"{name}-floats", small_model.CONFIG, floats(root / name))
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


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


# --- what jqx writes is a source


WRITTEN = [
    *(("modelopt", r, ()) for r in ("fp8", "fp8_pb_wo", "fp8_pc_pt", "nvfp4", "w4a8_nvfp4_fp8")),
    *(("modelopt", r, ()) for r in ("mxfp4", "mxfp8", "int8", "int8_sq", "nvfp4_mlp_wo")),
    ("modelopt", "int4", (("block", "32"),)),
    ("modelopt", "w4a8_awq", (("block", "32"),)),
    ("modelopt", "nvfp4_awq", ()),
    ("modelopt", "nvfp4_svdquant", (("lowrank", "4"),)),
    *(("compressed-tensors", r, ()) for r in ("fp8", "fp8_pb_wo", "nvfp4", "mxfp4", "mxfp8")),
    *(("compressed-tensors", r, ()) for r in ("int8", "int8_wo", "fp8_pc_pt")),
    *((t, "int4", (("block", "32"),)) for t in ("compressed-tensors", "awq", "gptq", "gptq-v1")),
]


@pytest.fixture(scope="module")
def stats(root: Path) -> Path:
    """Statistics for all of them."""
    done = command.jqx("calibrate", root / "model", root / "stats", "--calib", root / "ids.npy")
    assert done.code == 0, done.err
    return root / "stats"


@pytest.mark.parametrize(("target", "recipe", "options"), WRITTEN)
def test_what_is_written_is_read_as_its_floats(
    root: Path, stats: Path, tmp_path: Path, target: str, recipe: str, options: tuple
):
    out = tmp_path / "out"
    ji.ptq(root / "model", out, recipe, stats=stats, target=target, options=options)
    source = as_floats(open_checkpoint(out))
    assert isinstance(source, DecodedCheckpoint)
    found = {name: source.read(name) for name in source.tensors}
    loaded = flatten(ji.load(out).params)
    assert found.keys() == loaded.keys()
    for name, leaf in loaded.items():
        assert (found[name].shape, found[name].dtype) == (leaf.shape, BF16)
        assert source.tensors[name].shape == leaf.shape
        wanted = leaf
        if isinstance(leaf, QTensor):
            wanted = np.asarray(leaf.decode(np.float32))
            if leaf.low_rank is not None:
                outer, inner = (np.asarray(x, np.float32) for x in leaf.low_rank)
                wanted = wanted + outer @ inner
            if leaf.pre_quant_scale is not None:
                wanted = wanted * np.asarray(leaf.pre_quant_scale, np.float32)
        np.testing.assert_array_equal(found[name], np.asarray(wanted).astype(BF16))


@pytest.mark.parametrize("target", ["modelopt", "compressed-tensors"])
def test_scales_of_the_cache_are_left_behind(root: Path, tmp_path: Path, target: str):
    given = {"calib": root / "ids.npy", "kv_cache": "fp8", "target": target}
    ji.ptq(root / "model", tmp_path / "out", "fp8", **given)
    assert any(name.endswith("k_scale") for name in exports.read_tensors(tmp_path / "out"))
    assert floats(tmp_path / "out").keys() == floats(root / "model").keys()


def test_tensor_scales_that_a_note_keeps_are_exact(root: Path, tmp_path: Path):
    ji.ptq(root / "model", tmp_path / "a", "w4a16_nvfp4")
    change = arrays(tmp_path / "a")
    for name in [n for n in change if n.endswith("weight_scale_2")]:
        change[name] = np.float32(INEXACT).reshape(())
    write(tmp_path / "a", change)
    assert ji.export(tmp_path / "a", tmp_path / "b", "compressed-tensors").notes == 14
    source = as_floats(open_checkpoint(tmp_path / "b"))
    assert isinstance(source, DecodedCheckpoint)
    assert {float(source.stored(name).tensor_scale) for name in source.weights} == {INEXACT}


def test_every_layout_of_a_target_is_a_source():
    assert {row.target for row in SOURCES.values()} - {None} == {
        target.method for target in TARGETS.values()
    }


def test_a_quantized_checkpoint_is_quantized_again(root: Path, tmp_path: Path):
    given = ("--calib", root / "ids.npy")
    assert (
        command.jqx("quantize", root / "model", tmp_path / "a", "--qformat", "fp8", *given)[0] == 0
    )
    done = command.jqx("quantize", tmp_path / "a", tmp_path / "b", "--qformat", "mxfp8")
    assert done.code == 0, done.err
    assert "; source: ModelOpt FP8, decoded" in done.out
    foreign.put(tmp_path / "floats", small_model.CONFIG, floats(tmp_path / "a"))
    assert (
        command.jqx("quantize", tmp_path / "floats", tmp_path / "c", "--qformat", "mxfp8")[0] == 0
    )
    assert content(tmp_path / "b") == content(tmp_path / "c")


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


# --- memory


def test_one_weight_is_decoded_at_a_time(root: Path, monkeypatch):
    """Linears that share a scale are read twice, and never held together."""
    job = prepare(root / "fp8", "w4a16_nvfp4", Settings())
    plain, alive, most = DecodedCheckpoint._floats, weakref.WeakSet(), []

    def floats(self, weight, arrays):
        found = np.array(plain(self, weight, arrays)).view(Watched)
        alive.add(found)
        most.append(len(alive))
        return found

    monkeypatch.setattr(DecodedCheckpoint, "_floats", floats)
    for group in linear_groups(job, job.inventory.tensors):
        for _ in stored_group(job, group):
            pass
    assert len(most) == 2 * (2 * 5 + 2)  # q, k, v, gate and up twice
    assert max(most) == 1


class Watched(np.ndarray):
    """An array that may be referred to weakly, and hashed."""

    def __hash__(self) -> int:
        return id(self)


def test_pages_of_all_parts_are_let_go(root: Path, monkeypatch):
    released = []
    monkeypatch.setattr(MappedTensors, "release", lambda self, name: released.append(name))
    source = as_floats(open_checkpoint(root / "fp8"))
    name = "model.layers.0.mlp.up_proj.weight"
    source.release(name)
    source.release("model.norm.weight")
    assert released == [name, f"{name}_scale_inv", "model.norm.weight"]


# --- integers that QTensors do not hold


@pytest.mark.parametrize(("bits", "ordered"), [(8, True), (4, False)], ids=["8 bits", "desc_act"])
def test_gptq_that_is_decoded_to_be_run(root: Path, tmp_path: Path, bits: int, ordered: bool):
    tensors = floats(root / "model")
    index = np.random.default_rng(0).permutation(np.arange(64, dtype=np.int32) // 32)
    path = "model.layers.0.self_attn.q_proj"
    rng = np.random.default_rng(1)
    codes, zeros = (rng.integers(1, 1 << bits, s).astype(np.uint8) for s in ((64, 64), (64, 2)))
    scale = (rng.random((64, 2)) * 0.01).astype(np.float16)
    del tensors[f"{path}.weight"]
    tensors |= {
        f"{path}.qweight": foreign.stream(codes, bits).T.copy(),
        f"{path}.qzeros": foreign.stream((zeros - 1).T, bits),
        f"{path}.scales": scale.T.copy(),
        f"{path}.g_idx": np.arange(64, dtype=np.int32) // 32 if ordered else index,
    }
    said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": not ordered}
    config = {**small_model.CONFIG, "quantization_config": said}
    foreign.put(tmp_path / "model", config, tensors)
    index = tensors[f"{path}.g_idx"]
    wanted = foreign.integers(codes, zeros, scale, index).astype(BF16)
    params = flatten(ji.load(tmp_path / "model").params)
    np.testing.assert_array_equal(params[f"{path}.weight"], wanted)
    saying = (f"is GPTQ INT{bits}", "jqx quantize --target compressed-tensors")
    given = ("export", tmp_path / "model", tmp_path / "out", "--target", "compressed-tensors")
    command.refused(*given, saying=saying)
