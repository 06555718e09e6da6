# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: scores against their definition on the whole model, budgets, what is kept, and
what is refused.
"""

import json
import shutil
from pathlib import Path

import exports
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write
from command import jqx, refused
from damage import arrays
from whole_model import Whole

import jqx_interop as ji
from jqx.auto import BIT_COUNTS
from jqx.errors import InputError
from jqx_interop.auto import AutoSettings, Limit, Scoring, auto_quantize, chosen, scored
from jqx_interop.auto import gradients as auto_gradients
from jqx_interop.auto import run as auto_run
from jqx_interop.progress import Silent
from jqx_interop.settings import Settings
from jqx_interop.stored import open_model

FORMATS = ("nvfp4", "fp8")
SCORING = Scoring(recipes=FORMATS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint in float32, and beside it llama-ids.npy, [2 batches, 2, 16]."""
    return exports.write_base(tmp_path_factory.mktemp("auto") / "llama", "llama_f32")


def settings(model, **more):
    return Settings(calib=model.with_name("llama-ids.npy"), **more)


@pytest.fixture(scope="module")
def found(model):
    return scored(model, SCORING, model.with_name("scores"), settings(model), Silent())


def test_scores_follow_the_definition(model, found):
    """The gradient of the whole model at once, and the change of each linear's outputs."""
    assert sum(len(group) for group in found.groups) == 14
    whole = Whole(model, jnp.asarray(exports.token_ids("llama"), jnp.int32), found.groups)
    wanted, loss = whole.gradient_scores(found.groups, FORMATS)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert set(found.scores) == {group[0] for group in found.groups}
    for group in found.groups:
        for kind in FORMATS:
            mine = found.scores[group[0]][kind]
            assert mine == pytest.approx(wanted[group[0]][kind], rel=0.02), group


@pytest.mark.parametrize("count", BIT_COUNTS)
@pytest.mark.parametrize("bits", [5.5, 7.0, 9.0, 16.0])
def test_a_choice_keeps_to_its_budget(found, count, bits):
    choice = chosen(found, Limit(most=bits, count=count))
    assert choice.costs[count] <= bits * (1 + 1e-9)
    assert set(choice.choices) == {path for group in found.groups for path in group}
    for group in found.groups:
        assert len({choice.choices[path] for path in group}) == 1
    points = list(choice.curve)
    assert points == sorted(points)
    assert [score for _, score in points] == sorted((s for _, s in points), reverse=True)
    if bits == 16.0:
        assert choice.score == 0


def test_more_bits_lose_no_more(found):
    scores = [chosen(found, Limit(most=bits)).score for bits in np.linspace(6.0, 16.0, 21)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]


def test_the_command_writes_what_was_chosen(model, tmp_path):
    ids = model.with_name("llama-ids.npy")
    asked = ("--formats", "nvfp4, fp8", "--calib", ids, "--scores", tmp_path / "kept", "--json")
    code, out, err = jqx("auto", model, tmp_path / "out", "--bits", "6.6", *asked)
    assert code == 0, err
    said = json.loads(out)
    assert said["auto"]["costs"]["modelopt"] <= 6.6
    assert said["engines"]["vllm"]["loads"] is True
    stored = open_model(tmp_path / "out").choices
    picked = {p: c for p, c in said["auto"]["choices"].items() if c != "none"}
    assert {path: choice.weight for path, choice in stored.items()} == picked
    assert set(picked.values()) == {"nvfp4", "fp8"}
    described = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert described["quantization"]["quant_algo"] == "MIXED_PRECISION"
    code, out, _ = jqx("auto", model, tmp_path / "more", "--bits", "8", *asked)
    assert code == 0
    assert json.loads(out)["auto"]["score"] <= said["auto"]["score"]
    ji.load(tmp_path / "more")


def test_kept_scores_are_taken(model, found, monkeypatch):
    def never(*_):
        raise AssertionError("scored again")

    monkeypatch.setattr(auto_run, "_score", never)
    again = scored(model, SCORING, model.with_name("scores"), settings(model), Silent())
    assert again.scores == found.scores


def test_a_run_that_was_stopped_goes_on(model, found, tmp_path, monkeypatch):
    backward, calls = auto_gradients._Backward.backward, []

    def stopping(self, i, progress):
        calls.append(i)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return backward(self, i, progress)

    monkeypatch.setattr(auto_gradients._Backward, "backward", stopping)
    with pytest.raises(KeyboardInterrupt):
        scored(model, SCORING, tmp_path / "kept", settings(model), Silent())
    again = scored(model, SCORING, tmp_path / "kept", settings(model), Silent())
    assert calls == [1, 0, 0]
    assert again.scores == found.scores
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {"scores", "stats"}


def test_scores_of_something_else_are_refused(model, found, tmp_path):
    kept = model.with_name("scores")
    with pytest.raises(InputError, match="has scores of another formats than is asked for"):
        scored(model, Scoring(recipes=("fp8",)), kept, settings(model), Silent())
    np.save(tmp_path / "other.npy", exports.token_ids("llama")[:1])
    with pytest.raises(InputError, match="has scores of another calibration"):
        scored(model, SCORING, kept, Settings(calib=tmp_path / "other.npy"), Silent())
    other = exports.write_base(tmp_path / "llama", "llama")
    with pytest.raises(InputError, match="has scores of another model"):
        scored(other, SCORING, kept, settings(model), Silent())
    (kept / "scores" / "scores.json").rename(tmp_path / "kept.json")
    (kept / "scores" / "scores.json").write_text("{")
    with pytest.raises(InputError, match="scores.json is not JSON"):
        scored(model, SCORING, kept, settings(model), Silent())
    (tmp_path / "kept.json").replace(kept / "scores" / "scores.json")


def test_awq_is_a_candidate(model, tmp_path):
    asked = AutoSettings(
        formats=("int4_awq", "int8"), limit=Limit(most=9.0), scores=tmp_path / "kept"
    )
    given = settings(model, target="compressed-tensors")
    choice, report = auto_quantize(model, tmp_path / "out", asked, given)
    assert set(choice.choices.values()) >= {"int8"}
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept >= {"stats", "stats-awq"}, "AWQ is calibrated on a part of the data"
    assert report.coverage.linears == len([c for c in choice.choices.values() if c != "none"])
    ji.load(tmp_path / "out")


WRONG = {
    "too few": (("--bits", "3"), ("3 bits a weight cannot be reached", "the least is ")),
    "none at all": (("--bits", "0"), "the budget is 0 bits a weight; give a number in (0, 16]"),
    "another way": (("--count", "quantisable"), ("unknown way to count bits", "quantizable")),
    "no formats": (("--formats", " , "), "--formats names none"),
    "another format": (("--formats", "nvfp5"), "unknown format 'nvfp5'"),
    "the other way": (("--bits", "5"), "count another way: --count quantizable, by which"),
}


@pytest.mark.parametrize(("asked", "told"), WRONG.values(), ids=WRONG)
def test_what_is_refused(model, found, tmp_path, asked, told):
    kept = ("--scores", model.with_name("scores"), "--calib", model.with_name("llama-ids.npy"))
    refused("auto", model, tmp_path / "out", *kept, *asked, saying=told)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number(model, tmp_path):
    base = Path(shutil.copytree(model, tmp_path / "llama"))
    changed = arrays(base)
    changed["lm_head.weight"] = np.full_like(changed["lm_head.weight"], 3e38)
    write(base, changed)
    ids = model.with_name("llama-ids.npy")
    refused("auto", base, tmp_path / "out", "--calib", ids, saying="the loss on these data is")
