# SPDX-License-Identifier: Apache-2.0
"""Statistics that are collected once: every recipe that they suffice for ends with the bytes of a
run of its own, and what they do not suffice for is refused.
"""

import json
import shutil
from pathlib import Path

import exports
import numpy as np
import pytest
import small_model
from command import jqx, refused, snapshot
from outputs import read
from simulated import rounded

from jqx_interop import calibrate, runner
from jqx_interop.checkpoints import Workspace

FACTS, FILE = "stats.json", "stats.safetensors"
IDS = ("--calib", "ids.npy")
PERCENTILE = "extends: int8\nalgorithm: {method: percentile}\n"
RECIPES = (
    ("nvfp4_awq",),
    ("int4_awq", "--set", "block=32", "--algorithm", "awq_clip"),
    ("int4", "--set", "block=32", "--algorithm", "wmse"),
    ("nvfp4_local_hessian", "--kv-cache", "fp8"),
    ("int8_sq", "--set", "alpha=0.5"),
)


def made(words: tuple, out: str, *more: object) -> dict[str, bytes]:
    done = jqx("quantize", "model", out, "--qformat", *words, *more)
    assert done.code == 0, done.err
    return snapshot(Path(out))


def collect(out: str, *words: object) -> None:
    done = jqx("calibrate", "model", out, *words)
    assert done.code == 0, done.err


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """The model, and what any algorithm but those of histograms needs."""
    folder = small_model.write(tmp_path_factory.mktemp("kept"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        collect("stats", *IDS)
    return folder


@pytest.fixture
def place(kept: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of it all, the current directory."""
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_model(monkeypatch):
    """From here on no block may run. Returns a function that turns this on."""

    def fails(*_, **__):
        raise AssertionError("a block ran")

    return lambda: monkeypatch.setattr(runner, "block_step", fails)


@pytest.mark.parametrize("words", RECIPES, ids=lambda words: words[0])
def test_recipes_end_with_the_bytes_of_their_own_runs(place: Path, words: tuple, no_model):
    own = made(words, "own", *IDS)
    no_model()
    assert made(words, "again", "--stats", "stats") == own


def test_what_is_kept_is_said(kept: Path):
    facts = json.loads((kept / "stats" / FACTS).read_text())
    assert facts["tokens"] == np.prod(small_model.BATCHES)
    assert facts["kv"] == "fp8"
    assert facts["readers"]["model.layers.1.self_attn.v_proj"].endswith("q_proj")
    assert sorted(file.name for file in (kept / "stats").iterdir()) == [FACTS, FILE]
    kinds = {name.rpartition("|")[2] for name in exports.read_tensors(kept / "stats")}
    wanted = {"root" if k == "gram" else k for k in calibrate.EVERYTHING} | {"gram", "tokens"}
    assert kinds == wanted  # "root" where tokens are fewer than channels


def test_statistics_of_one_recipe(place: Path, no_model):
    """Less is kept, and other recipes are refused by name with the command that collects it."""
    collect("some", "--qformat", "int8_sq", *IDS, "--kv-cache", "none")
    kinds = {name.rpartition("|")[2] for name in exports.read_tensors(place / "some")}
    assert kinds == {"amax", "channel_amax", "tokens"}
    own = made(("int8_sq",), "own", *IDS)
    no_model()
    assert made(("int8_sq",), "again", "--stats", "some") == own
    before = snapshot(place)
    words = ("quantize", "model", "new", "--stats", "some", "--qformat")
    path = "model.layers.0.self_attn.q_proj"
    calibrates = "jqx calibrate model STATS --qformat nvfp4_awq_lite"
    refused(*words, "nvfp4_awq", saying=("'channel_mean'", path, "awq_lite", calibrates))
    other = ("--algorithm", "percentile")
    saying = ("'histogram'", path, "percentile", "--recipe FILE, which says algorithm: percentile")
    refused(*words, "int8", *other, saying=saying)
    refused(*words, "int8", "--kv-cache", "fp8", saying=("some", "--kv-cache fp8", "jqx calibrate"))
    assert snapshot(place) == before
    assert made(("int8_sq",), "third", "--kv-cache", "fp8_cast", "--stats", "some")


def test_histograms_are_collected_for_a_recipe_file(place: Path, no_model):
    (place / "clipped.yaml").write_text(PERCENTILE)
    collect("some", "--recipe", "clipped.yaml", "--qformat", "nvfp4_wmse", *IDS)
    kinds = {name.rpartition("|")[2] for name in exports.read_tensors(place / "some")}
    assert kinds == {"histogram", "histogram_width", "square", "amax", "tokens"}
    words = (("int8", "--algorithm", "percentile"), ("int8", "--algorithm", "entropy"))
    words = (*words, ("nvfp4_wmse",))
    own = [made(w, f"own {i}", *IDS) for i, w in enumerate(words)]
    no_model()
    for i, w in enumerate(words):
        assert made(w, f"again {i}", "--stats", "some") == own[i]
    refused(
        *("quantize", "model", "new", "--stats", "stats", "--recipe", "clipped.yaml"),
        saying=("stats has no 'histogram'", "--recipe FILE"),
    )


def test_blocks_wider_than_what_is_kept_together(place: Path, no_model):
    """Their moments are among those of all channels."""
    words = ("int8", "--algorithm", "local_hessian", "--set", "fp8_scale_sweep=false")
    own = made(words, "own", *IDS)
    no_model()
    assert made(words, "again", "--stats", "stats") == own


def test_blocks_of_wide_inputs_are_kept_beside_all_moments(tmp_path: Path, monkeypatch, no_model):
    """Where 128 channels are looked at together, and there are more."""
    exports.write_base(tmp_path / "model", "llama")
    (tmp_path / "model-ids.npy").rename(tmp_path / "ids.npy")
    monkeypatch.chdir(tmp_path)
    collect("stats", *IDS)
    found = read(tmp_path / "stats")
    assert found["model.layers.0.mlp.down_proj|block_gram"].shape == (2, 128, 128)
    own = made(("nvfp4_local_hessian",), "own", *IDS)
    no_model()
    assert made(("nvfp4_local_hessian",), "again", "--stats", "stats") == own


def test_means_are_those_of_batches(place: Path):
    """Each rounded as the model does."""
    collect("some", "--qformat", "nvfp4_awq", *("--activations", "acts.safetensors"))
    acts, found = small_model.activations(), read(place / "some")
    for leader, wide in (("self_attn.q_proj", 64), ("mlp.down_proj", 128)):
        path = f"model.layers.1.{leader}"
        batches = [acts[f"{path}|{i}"] for i in range(small_model.BATCHES[0])]
        means = [np.abs(x.astype(np.float64)).reshape(-1, wide).mean(0) for x in batches]
        wanted = np.sum([rounded(m, x.dtype) for m, x in zip(means, batches, strict=True)], axis=0)
        np.testing.assert_array_equal(found[f"{path}|channel_mean"], wanted / np.float32(3))
        assert found[f"{path}|tokens"] == np.prod(small_model.BATCHES)


def test_recorded_inputs_are_collected_too(place: Path):
    recorded = ("--activations", "acts.safetensors", "--kv-cache", "fp8_affine")
    collect("some", *recorded)
    for i, words in enumerate(RECIPES[2:4]):
        words = (*words[:5], "--kv-cache", "fp8_affine")
        own = made(words, f"own {i}", *recorded[:2])
        assert any(name.endswith("k_bias") for name in exports.read_tensors(place / f"own {i}"))
        assert made(words, f"again {i}", "--stats", "some") == own


def test_affine_keys_come_from_their_own_statistics(place: Path, no_model):
    words = ("nvfp4", "--kv-cache", "fp8_affine")
    own = made(words, "own", *IDS)
    collect("affine", "--qformat", "nvfp4", "--kv-cache", "fp8_affine", *IDS)
    no_model()
    assert made(words, "again", "--stats", "affine") == own
    refused(
        *("quantize", "model", "new", "--qformat", *words, "--stats", "stats"),
        saying=("no statistics for --kv-cache fp8_affine", "it has fp8", "--kv-cache fp8_affine"),
    )


def test_another_model_is_refused(place: Path):
    drawn = exports.load_file(place / "model" / "model.safetensors")
    drawn = {name: array.copy() for name, array in drawn.items()}
    drawn["model.layers.0.mlp.up_proj.weight"][0, 0] = 1
    exports.save_file(drawn, place / "model" / "model.safetensors", {"format": "pt"})
    before = snapshot(place)
    refused(
        *("quantize", "model", "new", "--qformat", "int8", "--stats", "stats"),
        saying=("stats: statistics of another model than model", "jqx calibrate model STATS"),
    )
    assert snapshot(place) == before


def spoil(folder: Path, how: str) -> tuple[str, ...]:
    """What is said of statistics that are spoilt like that."""
    file, facts = folder / FILE, folder / FACTS
    raw = file.read_bytes()
    if how == "truncated":
        file.write_bytes(raw[:-10])
    elif how == "no header":
        file.write_bytes(b"\0" * 7)
    elif how == "damaged header":
        file.write_bytes(raw[:20] + b"\xff\xff" + raw[22:])
    elif how == "NaN":
        found = {n: a.copy() for n, a in exports.load_file(file).items()}
        found["model.layers.0.self_attn.q_proj|channel_amax"][3] = np.nan
        exports.save_file(found, file)
        return (str(file), "model.layers.0.self_attn.q_proj|channel_amax", "not finite")
    elif how == "no file":
        file.unlink()
        return ("holds no statistics", FACTS, FILE, "jqx calibrate")
    elif how == "not JSON":
        facts.write_text("{")
        return (str(facts), "is not JSON")
    elif how == "not text":
        facts.write_bytes(b"\xff\xfe")
        return (str(facts), "is not JSON")
    elif how == "another layout":
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "jqx_stats": 99}))
        return (str(facts), "layout")
    elif how == "a list":
        facts.write_text("[]")
        return (str(facts), "layout")
    else:
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "readers": 3}))
        return (str(facts), "layout")
    return (FILE,)


SPOILT = ("truncated", "no header", "damaged header", "NaN", "no file", "not JSON", "not text")


@pytest.mark.parametrize("how", [*SPOILT, "another layout", "a list", "wrong readers"])
def test_damaged_statistics_are_refused(place: Path, how: str):
    said = spoil(Path("stats"), how)
    refused("quantize", "model", "new", "--qformat", "int8_sq", "--stats", "stats", saying=said)
    assert not (place / "new").exists()


def test_a_directory_that_is_none(place: Path):
    saying = ("holds no statistics", "jqx calibrate")
    for folder in ("model", "nowhere"):
        refused("quantize", "model", "new", "--stats", folder, saying=(folder, *saying))


# --- collecting


@pytest.mark.parametrize("memory", ["4GiB", "1KiB"])
def test_collecting_goes_on_where_it_was_stopped(place: Path, memory: str, monkeypatch):
    record, wanted = Workspace.record, snapshot(place / "stats")
    for kept in (0, 1, 2, 3):
        left = [kept]

        def stops(self: Workspace, what: dict, left=left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            record(self, what)

        words = ("calibrate", "model", "again", *IDS, "--max-memory", memory)
        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "record", stops)
            assert jqx(*words).code == 130
        assert not (place / "again").exists()
        done = jqx(*words)
        assert done.code == 0, done.err
        assert snapshot(place / "again") == wanted
        shutil.rmtree(place / "again")


def test_an_unfinished_one_is_not_taken_for_another(place: Path, monkeypatch):
    """Both recipes have the same tensors in the same places, but for one kind."""
    record, left = Workspace.record, [2]

    def stops(self: Workspace, what: dict) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        record(self, what)

    words = ("calibrate", "model", "again", *IDS, "--qformat", "int8", "--qformat")
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "record", stops)
        assert jqx(*words, "int8_sq").code == 130
    refused(*words, "nvfp4_local_hessian", saying=("another run", "--restart"))
    assert jqx(*words, "nvfp4_local_hessian", "--restart").code == 0


def test_batches_change_only_the_last_bits_of_sums(place: Path):
    """Magnitudes are rounded as in the model; products of other sizes differ in float32."""
    wanted = read(place / "stats")
    for rows in (1, 4):
        collect(f"by {rows}", *IDS, "--batch-size", rows)
        assert (place / f"by {rows}" / FACTS).read_bytes() == (place / "stats" / FACTS).read_bytes()
        for name, array in read(place / f"by {rows}").items():
            if name.rpartition("|")[2] in ("gram", "block_gram", "square", "root"):
                near = 1e-6 * np.abs(wanted[name]).max()
                np.testing.assert_allclose(array, wanted[name], rtol=1e-6, atol=near)
            else:
                np.testing.assert_array_equal(array, wanted[name])


def test_what_cannot_be_collected_is_refused(place: Path):
    before = snapshot(place)
    words = ("calibrate", "model", "new", *IDS)
    refused(*words, "--qformat", "mxfp8", "--kv-cache", "none", saying="need no statistics")
    refused(*words, "--qformat", "fp9", saying=("fp9", "fp8"))
    refused(*words, "--recipe", "none.yaml", saying="none.yaml: no such recipe file")
    refused("calibrate", "model", "new", "--calib", "none.txt", saying="none.txt")
    refused("calibrate", "model", "stats", *IDS, saying="stats")
    assert snapshot(place) == before


def test_json(place: Path):
    done = jqx("calibrate", "model", "new", *IDS, "--qformat", "int8", "--json")
    facts = json.loads(done.out)
    assert facts["bytes"] == (place / "new" / FILE).stat().st_size
    assert facts["tokens"] == np.prod(small_model.BATCHES)
