# SPDX-License-Identifier: Apache-2.0
"""Tiles that are measured: the search, what is measured, the files, and `jqx tune`."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import jqx, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from matmul_cases import H200, TPU

from jqx_kernels import dispatch, tuning
from jqx_kernels.dispatch import Device
from jqx_kernels.matmul import gpu as matmul_gpu
from jqx_kernels.matmul import matmul, tuned
from jqx_kernels.matmul.reference import stored_matrix
from jqx_kernels.matmul.tiles import DEFAULTS, TILES, Tiles
from jqx_kernels.matmul.tuned import file_of, tiles_of
from jqx_kernels.tuning import TRIALS, Trial, run, timing
from jqx_kernels.tuning.search import HEIGHTS, MOST, SIZES, descend, neighbours, sizes_for
from jqx_kernels.tuning.trials import ROWS, STORAGES, lacking, operands, run_of, stored_bytes

SHAPE = (256, 256)
START = TILES["int4", "tile"]
GPU = sizes_for("gpu", "tile"), MOST["gpu"]


# --- the search


@settings(max_examples=50, deadline=None)
@given(st.tuples(*(st.sampled_from(v) for v in sizes_for("gpu", "tile").values())))
def test_the_best_is_found_where_each_size_counts_by_itself(wanted):
    best = replace(START, **dict(zip(sizes_for("gpu", "tile"), wanted, strict=True)))
    if best.columns * best.depth > MOST["gpu"]:
        return
    seen = []

    def cost(tiles):
        seen.append(tiles)
        fields = ("rows", "columns", "depth", "warps", "stages", "splits")
        off = [abs(np.log2(getattr(tiles, f) / getattr(best, f))) for f in fields]
        return 1.0 + float(sum(off))

    found = descend(START, *GPU, cost)
    assert found.tiles == best
    assert found.cost == 1.0
    assert found.first == cost(START)
    assert found.tried == len(set(seen[:-1])) == len(seen) - 1
    assert all(t.columns * t.depth <= MOST["gpu"] for t in seen)


def test_tiles_that_do_not_compile_are_left():
    def cost(tiles):
        return None if tiles.warps != 8 else float(tiles.depth)

    found = descend(START, *GPU, cost)
    assert (found.tiles.warps, found.tiles.depth, found.first) == (8, 32, None)
    nothing = descend(START, *GPU, lambda tiles: None)
    assert (nothing.tiles, nothing.cost) == (START, None)


def test_of_few_rows_there_is_one_tile():
    assert set(sizes_for("gpu", "tile")) - set(sizes_for("gpu", "decode")) == {"rows"}
    assert {t.rows for t in neighbours(START, SIZES["gpu"], MOST["gpu"])} == {START.rows}
    assert set(HEIGHTS) == set(SIZES) == set(MOST) == set(DEFAULTS)


# --- what is measured


@pytest.mark.parametrize("trial", TRIALS, ids=str)
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_products_that_are_timed_are_right(platform, trial):
    tiles = Tiles(32, 64, 128 if platform == "tpu" else 32, 4, 2, 2)
    [at] = operands(trial, SHAPE, 1)
    y = jax.jit(run_of(trial, platform, tiles, interpret=True))(at)
    storage = STORAGES[trial.element]
    codes, scale = at.stored
    w = stored_matrix(codes, scale, jnp.float32(1), storage)
    assert w.shape == SHAPE
    assert 0 < np.abs(w).max() < np.inf
    expected = np.broadcast_to(np.asarray(w, np.float64).sum(axis=1), y.shape)
    size = np.abs(np.asarray(w, np.float64)).sum(axis=1)
    assert y.shape == (ROWS[trial.size], SHAPE[0])
    assert (np.abs(np.asarray(y, np.float64) - expected) <= 2.0**-8 * size).all()


def test_bytes_that_are_read():
    assert stored_bytes(Trial("matmul", "e2m1", "decode"), (64, 256)) == 64 * 128 + 64 * 16
    assert stored_bytes(Trial("matmul", "int4", "tile"), (64, 256)) == 32 * 256 + 64 * 2 * 4


def test_every_table_entry_has_a_trial():
    assert {(t.element, t.size) for t in TRIALS if t.op == "matmul"} == set(TILES)
    assert all(lacking(t, H200, SHAPE) is None for t in TRIALS)
    old = Device("gpu", "NVIDIA A100", (8, 0))
    assert {t.element for t in TRIALS if lacking(t, old, SHAPE)} == {"e4m3"}


def test_seconds_are_those_of_one_product():
    ticks = iter(np.cumsum([0, 60, 5, 40, 5, 50, 5, 70, 5, 90]))
    calls = []

    def f(x):
        calls.append(1)  # while it is traced
        return x + 1

    found = timing.seconds(f, [jnp.ones(3), jnp.ones(3)], clock=lambda: float(next(ticks)))
    assert found == 40 / (timing.CALLS * 2)
    assert len(calls) == 2
    assert timing.copies_for(1) == 16
    assert timing.copies_for(1 << 40) == 2


def test_a_real_clock():
    small = Trial("matmul", "e2m1", "decode")
    at = operands(small, SHAPE, 2)
    assert 0 < timing.seconds(run_of(small, "gpu", START, interpret=True), at) < 10


# --- files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where files of tiles are looked for."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tiles_of.cache_clear()
    yield tmp_path
    tiles_of.cache_clear()


ROW = {"op": "matmul", "element": "int4", "size": "decode"}
OTHER = {"rows": 16, "columns": 32, "depth": 64, "warps": 2, "stages": 2, "splits": 1}


def test_files_that_come_with_the_package_hold_tiles():
    for path in tuned.FOLDER.glob("*.json"):
        kind = json.loads(path.read_text())["device"]
        assert file_of(kind) == path
        for op in ("matmul", "scaled_matmul"):
            assert set(tiles_of(op, kind)) == set(TILES)


def test_a_file_takes_the_place_of_what_it_lists(folder):
    file_of("NVIDIA H200").write_text(json.dumps({"tiles": [{**ROW, "tiles": OTHER}]}))
    assert file_of("NVIDIA H200").name == "nvidia_h200.json"
    assert tiles_of("matmul", "NVIDIA H200") == {**TILES, ("int4", "decode"): Tiles(**OTHER)}
    assert tiles_of("scaled_matmul", "NVIDIA H200") == TILES
    assert tiles_of("matmul", "NVIDIA H100") == tiles_of("matmul", "") == TILES
    assert tiles_of("matmul", "TPU v5e", "tpu") == DEFAULTS["tpu"]


@pytest.mark.parametrize("text", ["{", "[]", '{"tiles": [{"op": "matmul"}]}', '{"tiles": 3}'])
def test_a_file_of_something_else(folder, text):
    file_of("cpu").write_text(text)
    with pytest.raises(ValueError, match=r"cpu\.json holds no tiles: .* Remove it, or run jqx tun"):
        tiles_of("matmul", "cpu")


def test_kernels_take_the_tiles_of_their_device(folder, monkeypatch):
    seen = []
    plain = matmul_gpu.tiles_for
    monkeypatch.setattr(
        matmul_gpu, "tiles_for", lambda *args: seen.append(plain(*args)) or seen[-1]
    )
    file_of(H200.kind).write_text(json.dumps({"tiles": [{**ROW, "tiles": OTHER}]}))
    [at] = operands(Trial("matmul", "int4", "decode"), SHAPE, 1)
    how = {"storage": STORAGES["int4"], "weight_dtype": "bfloat16", "interpret": True}
    how["implementation"] = "triton"
    for kind in (H200.kind, "NVIDIA B200"):
        device = Device("gpu", kind, (9, 0))
        jax.eval_shape(
            lambda x, *a, d=device: matmul(x, *a, None, device=d, **how), at.x, *at.stored
        )
    assert [t.columns for t in seen] == [32, 64]


# --- the command


@pytest.fixture
def measured(monkeypatch, folder):
    """A device that is not here, on which tiles take as long as they are deep."""
    monkeypatch.setattr(dispatch, "current_device", lambda: H200)
    monkeypatch.setattr(run, "run_of", lambda trial, platform, tiles: tiles)
    plain = tuning.tune

    def clock(f, arguments):
        return f.depth * 1e-6 if isinstance(f, Tiles) else 1e-3

    monkeypatch.setattr(tuning, "tune", lambda d, s, t, told: plain(d, s, t, told, clock=clock))
    return folder


def test_a_device_is_added(measured):
    code, out, err = jqx("tune", "--shape", "256x256", "--only", "int4")
    assert code == 0, err
    data = json.loads(file_of(H200.kind).read_text())
    assert (data["device"], data["shape"]) == ("NVIDIA H200", [256, 256])
    assert [(r["op"], r["size"], r["tiles"]["depth"]) for r in data["tiles"]] == [
        ("matmul", "decode", 32),
        ("matmul", "tile", 32),
    ]
    assert [round(r["default_seconds"] / r["seconds"], 6) for r in data["tiles"]] == [4, 2]
    assert "4.00" in out
    assert str(file_of(H200.kind)) in out
    assert tiles_of("matmul", H200.kind)["int4", "decode"].depth == 32


def test_other_elements_are_added_to_a_file(measured, tmp_path):
    there = tmp_path / "mine"
    for only in ("int4", "e4m3,int8", "int4"):
        code, out, err = jqx("tune", "--shape", "256x256", "--only", only, "--out", there, "--json")
        assert code == 0, err
    data = json.loads((there / "nvidia_h200.json").read_text())
    found = [(r["op"], r["element"]) for r in data["tiles"]]
    assert sorted(set(found)) == sorted(
        [("matmul", "int4"), ("matmul", "e4m3"), ("matmul", "int8")]
        + [("scaled_matmul", "e4m3"), ("scaled_matmul", "int8")]
    )
    assert len(found) == 10
    assert [r["element"] for r in json.loads(out)["tiles"]] == ["int4", "int4"]
    assert [p.name for p in there.iterdir()] == ["nvidia_h200.json"]
    assert not file_of(H200.kind).exists()


def test_what_does_not_run_or_has_no_kernel_is_told(measured, monkeypatch):
    monkeypatch.setattr(dispatch, "current_device", lambda: Device("gpu", "NVIDIA A100", (8, 0)))
    code, out, err = jqx("tune", "--shape", "256x256", "--only", "e4m3")
    assert code == 0
    assert "left out: matmul e4m3 decode: needs compute capability 8.9, not 8.0" in err
    monkeypatch.setattr(run, "_cost", lambda *args: None)
    code, out, err = jqx("tune", "--shape", "256x256", "--only", "int4")
    assert code == 0
    assert out.count("does not run") == 2
    data = json.loads((measured / "nvidia_a100.json").read_text())
    assert all(row["tiles"] == TILES_OF[row["size"]] for row in data["tiles"])


TILES_OF = {
    size: {f: getattr(TILES["int4", size], f) for f in OTHER} for size in ("decode", "tile")
}


def test_what_cannot_be_measured(tmp_path, monkeypatch):
    refused("tune", saying="kernels with tiles are for GPUs and TPUs, and JAX computes on cpu here")
    refused("tune", "--shape", "100x128", saying="give rows and columns, multiples of 128")
    monkeypatch.setattr(dispatch, "current_device", lambda: TPU)
    refused("tune", "--only", "int3", saying="there is no 'int3' among e2m1, e2m1_down, e3m2")
    (tmp_path / "file").write_text("")
    refused("tune", "--out", tmp_path / "file", saying="exists")
