# SPDX-License-Identifier: Apache-2.0
"""The methods "kl" and "fisher" against their definitions on the whole model, and what ModelOpt
scored.
"""

import json
from pathlib import Path

import exports
import jax
import jax.numpy as jnp
import pytest
from whole_model import Whole

from jqx.transforms import probe
from jqx_interop.auto import (
    AutoSettings,
    Limit,
    Scoring,
    auto_quantize,
    divergences,
    gradients,
    heads,
    scored,
    scoring,
)
from jqx_interop.progress import Silent
from jqx_interop.settings import Settings

SHARED = Path(__file__).resolve().parents[2] / "shared" / "golden"
FORMATS = ("nvfp4", "fp8")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint in float32, and beside it llama-ids.npy, [2 batches, 2, 16]."""
    return exports.write_base(tmp_path_factory.mktemp("methods") / "llama", "llama_f32")


def settings(model, **more):
    return Settings(calib=model.with_name("llama-ids.npy"), **more)


def diverged(model, folder):
    return scored(model, Scoring(recipes=FORMATS, method="kl"), folder, settings(model), Silent())


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    """Scores of all groups in one wave."""
    return diverged(model, tmp_path_factory.mktemp("kl"))


def test_waves_change_nothing(model, found, tmp_path, monkeypatch):
    monkeypatch.setattr(divergences, "WAVE_BYTES", 1)
    again = diverged(model, tmp_path)
    for group, row in found.scores.items():
        assert again.scores[group] == pytest.approx(row, rel=1e-4), group


def test_divergences_follow_the_definition(model, found):
    ids = jnp.asarray(exports.token_ids("llama"), jnp.int32)
    whole = Whole(model, ids, found.groups)
    for group in found.groups:
        for kind in FORMATS:
            wanted = 0.0
            for number in range(len(ids)):
                mine = whole.probed(number, {})
                changes = {path: whole.change(number, path, kind) for path in group}
                other = whole.probed(number, changes)
                wanted += float(jnp.sum(jnp.exp(mine) * (mine - other)))
            assert found.scores[group[0]][kind] == pytest.approx(wanted, rel=0.02), group
    assert found.loss is None


def test_fisher_follows_the_definition(model, tmp_path, monkeypatch):
    """With known signs in the place of those that are drawn."""
    jax.clear_caches()
    alternating = lambda n: jnp.where(jnp.arange(n) // 3 % 2 == 0, 1.0, -1.0)[None]  # noqa: E731
    monkeypatch.setattr(heads, "signs", lambda key, shape: alternating(shape[1]))
    monkeypatch.setattr(scoring, "WINDOW", 4)
    assert gradients.MOST_DRAWS > 1, "and the mean of several draws is taken"
    how = Scoring(recipes=FORMATS, method="fisher")
    found = scored(model, how, tmp_path, settings(model), Silent())
    ids = jnp.asarray(exports.token_ids("llama"), jnp.int32)
    whole = Whole(model, ids, found.groups)

    @jax.jit
    @jax.grad
    def gradient(added, ids, row):
        log_p = jax.nn.log_softmax(probe(whole.logits)(whole.loaded.params, added, ids))[row]
        factors = jax.lax.stop_gradient(jnp.sqrt(jnp.exp(log_p[:-1])))
        return jnp.sum(factors * log_p[:-1] * alternating(log_p.shape[1]))

    wanted = {group[0]: dict.fromkeys(FORMATS, 0.0) for group in found.groups}
    for number in range(len(ids)):
        added = whole.added(number)
        for row in range(ids.shape[1]):
            g = gradient(added, whole.ids[number], row)
            for group in found.groups:
                for kind in FORMATS:
                    tokens = sum(
                        jnp.sum(g[f"{p}.weight"][0].reshape(change.shape) * change, axis=-1)
                        for p in group
                        for change in [whole.change(number, p, kind)]
                    ).reshape(ids.shape[1:])
                    windows = [tokens[:, i : i + 4].sum(1) for i in range(0, ids.shape[2], 4)]
                    wanted[group[0]][kind] += float(sum((w**2).sum() for w in windows)) / 2
    jax.clear_caches()
    for group in found.groups:
        for kind in FORMATS:
            assert found.scores[group[0]][kind] == pytest.approx(
                wanted[group[0]][kind], rel=0.05
            ), group


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared exports are not here")
@pytest.mark.parametrize("compute", ["bf16", "float32"])
@pytest.mark.parametrize(
    ("name", "formats", "method"),
    [("mixed_fp8_nvfp4", FORMATS, "gradient"), ("mixed_fp8_w4a8", ("w4a8_awq", "fp8"), "kl_div")],
    ids=["gradient", "kl"],
)
def test_scores_and_choice_of_modelopt(tmp_path, name, formats, method, compute):
    """AWQ is calibrated on a quarter of the batches, as ModelOpt does while it searches."""
    limit = Limit(most=6.0)
    asked = AutoSettings(formats=formats, limit=limit, method=method, scores=tmp_path / "kept")
    given = Settings(calib=SHARED / "calib_ids.npy", compute=compute)
    choice, _ = auto_quantize(SHARED / "base", tmp_path / "out", asked, given)
    golden = json.loads((SHARED / name / "golden.json").read_text())["auto_quantize"]
    kept = json.loads((tmp_path / "kept" / "scores" / "scores.json").read_text())["scores"]
    names = {"W4A8_AWQ_BETA_CFG": "w4a8_awq_beta", "NVFP4_DEFAULT_CFG": "nvfp4"}
    names |= {"FP8_DEFAULT_CFG": "fp8", "NONE": "none"}
    for group, row in golden.items():
        if group not in kept:
            assert row["chosen"].startswith("NONE")
            continue
        assert choice.choices[group] == names[row["chosen"].partition("(")[0]]
        for mine, its in zip(kept[group].values(), row["scores"], strict=False):
            assert mine == pytest.approx(its, rel=TOLERANCES[method, compute])
    for file in ("config.json", "hf_quant_config.json"):
        assert (tmp_path / "out" / file).read_text() == (SHARED / name / file).read_text()


TOLERANCES = {
    ("gradient", "bf16"): 0.05,
    ("gradient", "float32"): 0.1,
    ("kl_div", "bf16"): 0.05,
    ("kl_div", "float32"): 0.16,
}
"""ModelOpt computes in bfloat16. Without that one FP8 score by gradients, of eight, is 9 % lower.
FP8 scores by KL, which is small there, lack what its rounding adds: up to 15 %. (Measured.)
"""
