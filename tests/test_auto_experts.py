# SPDX-License-Identifier: Apache-2.0
"""Mixed precision of mixtures: scores of experts and of what is beside them against their
definitions, one choice for the experts of a block, budgets, and what is written.
"""

import gc
import json
import math
import re
import weakref
from pathlib import Path

import family_checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import jqx
from golden import make_families
from tiny_families import MIXTURES, ONE_EACH
from whole_mixture import WholeMixture
from whole_model import Whole

import jqx_interop as ji
from jqx.auto import Weighting
from jqx.models import Experts, kinds
from jqx_interop import routed
from jqx_interop.auto import Limit, Scoring, gradients, heads, mixture, refined, scored, scoring
from jqx_interop.auto.candidates import groups_of
from jqx_interop.auto.ways import ways_of
from jqx_interop.calibrate import joined
from jqx_interop.job import prepare
from jqx_interop.progress import Silent
from jqx_interop.settings import Settings
from jqx_interop.stored import open_model

FORMATS = ("nvfp4", "fp8")
CASES = {**ONE_EACH, "mixtral": "mixtral", "arctic": "arctic"}
"""model_type -> a case; those of some send a token to one expert alone, whose weight is 1."""
ALL = [pytest.param(k, marks=() if k == "mixtral" else pytest.mark.slow, id=k) for k in MIXTURES]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """model_type -> a checkpoint, and ids.npy, [2 batches, 2, 12], beside it; made once."""

    def write(folder: Path, kind: str) -> Path:
        made = family_checkpoints.write(folder, CASES[kind])
        ids = np.random.RandomState(5).randint(0, make_families.VOCAB, (2, 2, 12))
        np.save(folder.parent / "ids.npy", ids)
        return made

    return family_checkpoints.made_once(tmp_path_factory, write)


@pytest.fixture(scope="module")
def model(originals):
    return originals("mixtral")


@pytest.fixture(scope="module")
def found(model):
    return scores_of(model, "gradient")


@pytest.fixture(scope="module")
def whole(model):
    return whole_of(model)


def whole_of(model: Path) -> WholeMixture:
    return WholeMixture(model, np.load(model.with_name("ids.npy")))


def settings(model: Path) -> Settings:
    return Settings(calib=model.with_name("ids.npy"), compute="float32")


def scores_of(model: Path, method: str, name: str = "kept"):
    how = Scoring(recipes=FORMATS, method=method)
    return scored(model, how, model.with_name(name), settings(model), Silent())


def of_experts(found):
    """The groups of experts, by block."""
    own = [group for group in found.groups if ".experts." in group[0]]
    return {int(re.search(r"\.(\d+)\.", group[0])[1]): group for group in own}


@pytest.mark.parametrize("kind", ALL)
def test_scores_follow_the_definition(originals, kind):
    source = originals(kind)
    found, whole = scores_of(source, "gradient"), whole_of(source)
    groups = of_experts(found)
    assert groups.keys() == set(whole.mixtures)
    for name in FORMATS:
        wanted = whole.gradient_scores(name)
        for i, group in groups.items():
            assert found.scores[group[0]][name] == pytest.approx(wanted[i], rel=0.02), group[0]


@pytest.mark.parametrize("kind", ALL)
def test_scores_beside_experts_follow_the_definition(originals, kind):
    """Those of attention, and of what all tokens take beside experts: their gradients come through
    experts and router.
    """
    found = scores_of(source := originals(kind), "gradient")
    whole, others = beside(source, found)
    wanted, loss = whole.gradient_scores(others, FORMATS)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    for group in others:
        for name in FORMATS:
            assert found.scores[group[0]][name] == pytest.approx(wanted[group[0]][name], rel=0.05)


def beside(source, found):
    """The model in one piece, and the groups that are no experts."""
    others = [group for group in found.groups if group not in of_experts(found).values()]
    ids = jnp.asarray(np.load(source.with_name("ids.npy")), jnp.int32)
    return Whole(source, ids, others), others


class Told(Silent):
    """Phases, their totals, and what was told of them."""

    def __init__(self):
        self.phases = []

    def phase(self, title, total):
        self.phases.append([title, total, 0.0, 0])

    def advance(self, amount):
        self.phases[-1][2] += amount
        self.phases[-1][3] += 1


@pytest.mark.parametrize("method", ["fisher", "kl"])
def test_progress_is_told_expert_by_expert(model, method):
    """And so in rounds."""
    told, folder = Told(), model.with_name(f"told-{method}")
    found = scored(model, Scoring(recipes=FORMATS, method=method), folder, settings(model), told)
    refined(found, Limit(most=9.0), 1, folder, told)
    names = [title for title, *_ in told.phases]
    assert {"forward", "scoring", "choice 1: forward", "choice 1: backward"} <= set(names)
    for title, total, amount, steps in told.phases:
        assert amount == pytest.approx(total), title
        if title in ("forward", "scoring", "choice 1: forward", "choice 1: backward"):
            assert steps >= 2 * 5, title


def test_one_expert_is_in_memory_at_a_time(model, monkeypatch):
    """Of all whose parameters were read, the last and the one before it."""
    read, load = [], mixture.load_expert

    def loading(*args):
        params = load(*args)
        gc.collect()
        assert sum(ref() is not None for ref in read) <= 1
        read.append(weakref.ref(jax.tree.leaves(params)[0]))
        return params

    monkeypatch.setattr(mixture, "load_expert", loading)
    scores_of(model, "gradient", "watched")
    assert len(read) == 3 * 2 * 5  # forward, and then forward and back: two blocks of five


def test_experts_of_a_block_are_one_choice(found):
    """All of them, by module, and what is beside them is not among them."""
    own = of_experts(found)
    assert [len(group) for group in own.values()] == [15, 15]
    for i, group in own.items():
        stem = f"model.layers.{i}.block_sparse_moe.experts"
        wanted = {f"{stem}.{e}.{name}" for e in range(5) for name in ("w1", "w2", "w3")}
        assert set(group) == wanted
    assert not any("gate" in path for group in found.groups for path in group)


def test_an_expert_that_stays_keeps_all_of_its_block(model):
    plans = [prepare(model, name, settings(model)) for name in FORMATS]
    groups = groups_of(joined(plans), plans, ("*layers.0.*experts.2.w3",))
    left = {path.split(".")[2] for group in groups for path in group if ".experts." in path}
    assert left == {"1"}


def test_divergences_follow_the_definition(model, whole):
    found = scores_of(model, "kl", "kl")
    wanted = whole.divergences("nvfp4")
    for i, group in of_experts(found).items():
        assert found.scores[group[0]]["nvfp4"] == pytest.approx(wanted[i], rel=0.02), group[0]


def test_divergences_beside_experts_follow_the_definition(model):
    """Other rows reach experts then, and other experts."""
    found = scores_of(model, "kl", "kl")
    whole, others = beside(model, found)
    for group in others:
        wanted = 0.0
        for number, plain in enumerate(whole.probed(n, {}) for n in range(len(whole.ids))):
            changes = {path: whole.change(number, path, "nvfp4") for path in group}
            other = whole.probed(number, changes)
            wanted += float(jnp.sum(jnp.exp(plain) * (plain - other)))
        assert found.scores[group[0]]["nvfp4"] == pytest.approx(wanted, rel=0.02), group[0]


def test_files_change_nothing(model, found, monkeypatch):
    """What experts read and what becomes of their sums, in memory or not."""
    monkeypatch.setattr(routed, "IN_MEMORY", 0)
    again = scores_of(model, "gradient", "files")
    assert again.scores == found.scores
    assert {path.name for path in model.with_name("files").iterdir()} == {"scores", "stats"}


def test_a_run_that_was_stopped_goes_on(model, found, monkeypatch):
    """In the middle of a block whose experts' changes lie in files."""
    monkeypatch.setattr(routed, "IN_MEMORY", 0)
    score, calls = gradients.block_scores, []

    def stopping(*args, **more):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args, **more)

    monkeypatch.setattr(gradients, "block_scores", stopping)
    with pytest.raises(KeyboardInterrupt):
        scores_of(model, "gradient", "stopped")
    assert scores_of(model, "gradient", "stopped").scores == found.scores
    assert len(calls) == 3


def cost_of(found, choices, share):
    """Bits a weight as ModelOpt counts them, experts times `share`."""
    bits = {"nvfp4": 4.5, "fp8": 8.0, "none": 16.0}
    job, total, cost = found.candidates[0].job, 0.0, 0.0
    numel = {m.path: math.prod(m.shape) for m in job.inventory.modules if m.kind == "linear"}
    numel |= dict.fromkeys(job.inventory.absent, job.spec.vocab * job.spec.hidden)
    for path, count in numel.items():
        factor = share if ".experts." in path else 1.0
        total += factor * count
        cost += factor * count * bits[choices.get(path, "none")]
    return cost / total


@pytest.mark.parametrize("kind", ALL)
def test_a_choice_is_written(originals, tmp_path, kind):
    """Under a budget for the experts that a token meets, which some linears in FP8 fit."""
    source = originals(kind)
    found = scores_of(source, "gradient")
    spec = found.candidates[0].job.spec
    row = next(k.mlp for k in kinds(spec) if isinstance(k.mlp, Experts))
    share = row.top_k / row.number
    way = ways_of(found, Weighting(experts=share))["modelopt"]
    most = (
        way.least
        + 0.6
        * (sum(g.costs[1] for g in way.groups) - sum(g.costs[0] for g in way.groups))
        / way.per
    )
    given = ("--calib", source.with_name("ids.npy"), "--compute", "float32", "--json")
    kept = ("--scores", source.with_name("kept"))
    asked = ("--bits", most, "--cost-model", "active_moe")
    done = jqx("auto", source, tmp_path / "out", *given, *kept, *asked)
    assert done.code == 0, done.err
    said = json.loads(done.out)
    choices = said["auto"]["choices"]
    assert said["auto"]["costs"]["modelopt"] == pytest.approx(cost_of(found, choices, share))
    assert said["auto"]["costs"]["modelopt"] <= most * (1 + 1e-9)
    assert {choices[path] for path in choices} >= set(FORMATS)
    for group in found.groups:
        assert len({choices[path] for path in group}) == 1
    described = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert described["quant_algo"] == "MIXED_PRECISION"
    picked = {path: name for path, name in choices.items() if name != "none"}
    layers = described["quantized_layers"]
    assert {p: row["quant_algo"].lower() for p, row in layers.items()} == picked
    assert {p: c.weight for p, c in open_model(tmp_path / "out").choices.items()} == picked
    assert any(row["loads"] for row in said["engines"].values())
    loaded = ji.load(tmp_path / "out")
    ids = jnp.asarray(np.load(source.with_name("ids.npy"))[0], jnp.int32)
    assert np.isfinite(np.asarray(loaded.apply({"params": loaded.params}, ids))).all()


@pytest.mark.slow
def test_fisher_follows_the_definition(model, whole, monkeypatch):
    """With known signs in the place of those that are drawn."""
    jax.clear_caches()
    alternating = lambda n: jnp.where(jnp.arange(n) // 3 % 2 == 0, 1.0, -1.0)[None]  # noqa: E731
    monkeypatch.setattr(heads, "signs", lambda key, shape: alternating(shape[1]))
    monkeypatch.setattr(scoring, "WINDOW", 4)
    found = scores_of(model, "fisher", "fisher")
    jax.clear_caches()
    for name in FORMATS:
        wanted = whole.fisher_scores(name, alternating, 4)
        for i, group in of_experts(found).items():
            assert found.scores[group[0]][name] == pytest.approx(wanted[i], rel=0.02), group[0]


@pytest.mark.slow
def test_awq_of_experts_is_a_candidate(model, tmp_path):
    """Its factors of inputs are those of each expert."""
    words = ("--formats", "int4_awq,int8", "--set", "block=32", "--target", "compressed-tensors")
    given = ("--calib", model.with_name("ids.npy"), "--bits", 7, "--count", "quantizable")
    done = jqx("auto", model, tmp_path / "out", *words, *given, "--scores", tmp_path / "kept")
    assert done.code == 0, done.err
    ji.load(tmp_path / "out")
