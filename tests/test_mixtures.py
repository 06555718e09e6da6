# SPDX-License-Identifier: Apache-2.0
"""Experts in the streaming run: their statistics against NumPy, batches and files that change no
byte, experts without tokens, all tokens for all experts, and what is refused.
"""

import base64
import json
from pathlib import Path

import exports
import family_checkpoints
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reports
from command import jqx, refused, snapshot
from matplotlib import image
from matplotlib.colors import to_rgb
from safetensors.numpy import load_file, save_file
from tiny_families import ONE_EACH

import jqx_interop as ji
from jqx import models
from jqx.models import Experts, kinds
from jqx_interop.report_plot import FEW_TOKENS, NO_TOKENS, plot_tokens, token_counts, token_marks

KINDS = ("qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """model_type -> its checkpoint, made once."""
    return family_checkpoints.made_once(
        tmp_path_factory, lambda folder, kind: family_checkpoints.write(folder, ONE_EACH[kind])
    )


def routed(source: Path) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Layer -> what its experts read [t, k], and which experts [t, c] with what weights, by the
    model in memory.
    """
    model = ji.load(source)
    ids = np.load(source.parent / "ids.npy")
    ids = jnp.asarray(ids.reshape(-1, ids.shape[-1]), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    h, found = models.embed(model.spec, model.params, ids), {}
    for i, kind in enumerate(kinds(model.spec)):
        tree = model.params
        for part in models.block_prefix(model.spec, i).split("."):
            tree = tree[part]
        if isinstance(kind.mlp, Experts):
            given = models.front(model.spec, kind, tree, h, positions).given
            found[i] = tuple(np.asarray(a) for a in given)
        h = models.block(model.spec, kind, tree, h, positions)
    return found


def stats_of(folder: Path, source: Path, *options: str) -> dict[str, np.ndarray]:
    """All statistics that `jqx calibrate` keeps for AWQ, which needs much."""
    done = jqx(
        *("calibrate", source, folder, "--qformat", "nvfp4_awq", "--kv-cache", "none"),
        *("--calib", source.parent / "ids.npy", *options),
    )
    assert done.code == 0, done.err
    return load_file(folder / "stats.safetensors")


@pytest.mark.parametrize("options", [(), ("--all-experts",)])
def test_statistics_are_those_of_the_tokens_of_an_expert(originals, tmp_path: Path, options):
    source = originals("qwen3_moe")
    stats = stats_of(tmp_path / "stats", source, *options)
    checked = 0
    for i, (x, ids, _) in routed(source).items():
        for e in range(ids.max() + 1):
            mine = x if options else x[(ids == e).any(1)]
            if len(mine) < 32:  # then those of all experts stand in
                mine = np.concatenate([x[(ids == n).any(1)] for n in range(ids.max() + 1)])
            name = f"model.layers.{i}.mlp.experts.{e}.gate_proj"
            wide = np.abs(mine).max(0)
            got = stats[f"{name}|channel_amax"]
            np.testing.assert_allclose(got, wide.astype(ml_dtypes.bfloat16), rtol=2e-2)
            mean = np.abs(mine).mean(0)
            np.testing.assert_allclose(stats[f"{name}|channel_mean"], mean, rtol=2e-2)
            checked += 1
    assert checked > 6


def quantized(source: Path, out: Path, *options) -> str:
    """Quantize `source`; returns what was told."""
    done = jqx("quantize", source, out, "--calib", source.parent / "ids.npy", *options)
    assert done.code == 0, done.err
    return done.out


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:3]]


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3], *SLOW])
def test_batches_and_files_change_no_byte(originals, tmp_path: Path, kind: str):
    """Second moments are sums, whose last bits do change with batches; files change nothing."""
    found = {}
    for name, options in {
        "one": ("--batch-size", "1"),
        "three": ("--batch-size", "3"),
        "gptq": ("--algorithm", "gptq"),
        "files": ("--algorithm", "gptq", "--max-memory", "1KB"),
    }.items():
        quantized(originals(kind), tmp_path / name, "--qformat", "nvfp4", *options)
        found[name] = exports.digests(tmp_path / name)
    assert found["one"] == found["three"] != found["gptq"] == found["files"]


@pytest.fixture
def lonely(originals, tmp_path: Path) -> Path:
    """A checkpoint whose router never chooses but three of its experts."""
    source, here = originals("deepseek_v3"), tmp_path / "lonely"
    here.mkdir()
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = np.where(np.arange(len(tensors[name])) < 3, 0, -100).astype(np.float32)
    save_file(tensors, here / "model.safetensors", {"format": "pt"})
    (here / "config.json").write_text((source / "config.json").read_text())
    (tmp_path / "ids.npy").write_bytes((source.parent / "ids.npy").read_bytes())
    return here


@pytest.mark.parametrize(
    "options",
    [
        ("--qformat", "nvfp4"),
        ("--qformat", "nvfp4_awq"),
        ("--qformat", "int4_awq", "--set", "block=32"),
        ("--qformat", "nvfp4", "--algorithm", "gptq"),
        ("--qformat", "int8_sq"),
    ],
)
def test_experts_without_tokens_take_statistics_of_the_others(lonely, tmp_path: Path, options):
    told = quantized(lonely, tmp_path / "out", *options, "--report", tmp_path / "report")
    assert "10 of 16 experts were sent fewer than 32 tokens, 10 none" in told
    assert "stand in for theirs" in told
    model = ji.load(tmp_path / "out")
    ids = jnp.asarray(np.load(tmp_path / "ids.npy")[0], jnp.int32)
    assert np.isfinite(np.asarray(model.apply({"params": model.params}, ids))).all()
    scales = exports.calibrated(tmp_path / "out")
    assert all(0 < value < np.inf for row in scales.values() for value in row)
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["linears"]
    tokens = {row["path"]: row["tokens"] for row in rows if "tokens" in row}
    assert tokens["model.layers.1.mlp.experts.7.up_proj"] == 0
    assert sum(n for path, n in tokens.items() if ".1.mlp" in path and "up" in path) == 3 * 64


def test_a_picture_of_the_tokens_of_experts(originals, tmp_path: Path):
    source = originals("qwen3_moe")
    said = quantized(source, tmp_path / "out", "--qformat", "nvfp4", "--report", tmp_path / "live")
    content = reports.told(tmp_path / "live")
    sent = {i: np.bincount(ids.ravel(), minlength=6) for i, (_, ids, _) in routed(source).items()}
    few, every = (sum(int((n < most).sum()) for n in sent.values()) for most in (32, np.inf))
    assert f"{few} of {every} experts were sent fewer than 32 tokens" in content["experts"] in said
    found = {block["layer"]: block["tokens"] for block in content["expert_tokens"]}
    assert found == {i: counts.tolist() for i, counts in sent.items()}
    assert set(snapshot(tmp_path / "live")) == {*reports.FILES, "experts.png"}
    picture = base64.b64encode((tmp_path / "live" / "experts.png").read_bytes()).decode()
    text = (tmp_path / "live" / "report.html").read_text()
    page = reports.Page(text)
    assert f"data:image/png;base64,{picture}" in [tag.get("src") for _, tag in page.tags]
    assert any(content["experts"] in said for said in page.inside["p"])


def test_saved_statistics_know_the_tokens_of_experts(originals, tmp_path: Path):
    source, made = originals("qwen3_moe"), {}
    stats_of(tmp_path / "stats", source)
    for name, data in {
        "live": ("--calib", source.parent / "ids.npy"),
        "saved": ("--stats", tmp_path / "stats"),
    }.items():
        words = ("--qformat", "nvfp4", "--report", tmp_path / name)
        done = jqx("quantize", source, tmp_path / f"{name}-out", *words, *data)
        assert done.code == 0, done.err
        content = reports.told(tmp_path / name)
        rows = {row["path"]: row["tokens"] for row in content["linears"] if "tokens" in row}
        picture = (tmp_path / name / "experts.png").read_bytes()
        made[name] = (content["expert_tokens"], content["experts"], rows, picture)
    assert made["live"] == made["saved"]
    facts = tmp_path / "stats" / "stats.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"experts": [{"layer": 0}]}))
    words = ("--qformat", "nvfp4", "--stats", tmp_path / "stats")
    refused("quantize", source, tmp_path / "more", *words, saying="describes no statistics")


def test_marks_in_a_picture_of_tokens(tmp_path: Path):
    blocks = [{"layer": 3, "tokens": [0, 31, 32]}, {"layer": 7, "tokens": [500]}]
    counts = token_counts(blocks)
    np.testing.assert_array_equal(counts, [[0, 31, 32], [500, np.nan, np.nan]])
    few, none, absent = token_marks(counts).values()
    assert few.tolist() == [[True, True, False], [False] * 3]
    assert none.tolist() == [[True, False, False], [False] * 3]
    assert absent.tolist() == [[False] * 3, [False, True, True]]
    plot_tokens(blocks, "2 of 4 $x^$", tmp_path / "experts.png")
    drawn = image.imread(tmp_path / "experts.png")
    for color in (FEW_TOKENS, NO_TOKENS):
        assert (np.abs(drawn[..., :3] - to_rgb(color)).max(-1) < 0.01).sum() > 10_000


def test_all_experts_is_refused_where_routing_scales_inputs(originals, tmp_path: Path):
    source = originals("llama4_text")
    done = jqx(
        *("quantize", source, tmp_path / "out", "--qformat", "nvfp4", "--all-experts"),
        *("--calib", source.parent / "ids.npy"),
    )
    assert done.code == 2
    assert "leave --all-experts out" in done.err


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("qwen3_moe", ("nvfp4", "--expert-coverage", "1.5"), "give a share from 0 to 1"),
        ("qwen3_moe", ("nvfp4", "--expert-coverage", "1"), None),
        ("gpt_oss", ("fp8", "--expert-coverage", "1"), None),
    ],
)
def test_coverage_of_experts(originals, tmp_path: Path, kind, options, message):
    source = originals(kind)
    done = jqx(
        *("quantize", source, tmp_path / "out", "--qformat", *options),
        *("--calib", source.parent / "ids.npy"),
    )
    assert (done.code, message is None or message in done.err) == (2 if message else 0, True)


def test_too_little_coverage_of_experts(originals, tmp_path: Path):
    recipe = tmp_path / "half.yaml"
    recipe.write_text(
        "extends: fp8\nrules:\n  - path_glob: '*experts.0.*'\n    weight: null\n    input: null\n"
    )
    source = originals("qwen3_moe")
    given = ("--recipe", recipe, "--calib", source.parent / "ids.npy")
    done = jqx("quantize", source, tmp_path / "out", *given, "--expert-coverage", "0.95")
    assert done.code == 2
    assert "83.33% of the weights of experts would be quantized" in done.err
    assert not (tmp_path / "out").exists()
