# SPDX-License-Identifier: Apache-2.0
"""What jqx and others write is read as a source, one weight at a time."""

import gc
import time
import weakref
from pathlib import Path

import command
import exports
import foreign
import numpy as np
import pytest
import small_model
from checkpoints import write
from damage import arrays
from foreign import BF16
from stored_sources import content, floats, make

import jqx_interop as ji
from jqx.tensors import QTensor
from jqx.tensors.paths import flatten
from jqx_interop.checkpoints import MappedTensors, open_checkpoint
from jqx_interop.job import prepare
from jqx_interop.settings import Settings
from jqx_interop.sources import (
    SOURCES,
    DecodedCheckpoint,
    as_floats,
)
from jqx_interop.targets import TARGETS
from jqx_interop.weights import linear_groups, stored_group

INEXACT = float.fromhex("0x1.d7dbf4p-11")
"""A float32 that the reciprocal of its reciprocal is not."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("sources") / "root")


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


# --- memory


def test_one_weight_is_decoded_at_a_time(root: Path, monkeypatch):
    """Linears that share a scale are read twice, and never held together."""
    job = prepare(root / "fp8", "w4a16_nvfp4", Settings())
    plain, alive, most = DecodedCheckpoint._floats, weakref.WeakSet(), []

    def floats(self, weight, arrays):
        let_go(alive)
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


def let_go(alive: weakref.WeakSet) -> None:
    """Wait until a program that still runs has returned the array that it was given."""
    for _ in range(200):
        gc.collect()
        if not alive:
            return
        time.sleep(0.05)


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
