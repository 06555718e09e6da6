# SPDX-License-Identifier: Apache-2.0
"""Rounds: divergences and shifts of a model with choices against their definitions on the whole
model, interactions of errors that are known, and what is kept and refused.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import exports
import family_checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import jqx, refused
from golden import make_families
from hypothesis import given
from hypothesis import strategies as st

import jqx_interop as ji
from jqx.auto import NONE
from jqx.errors import InputError
from jqx.models import block_prefix, forward
from jqx.transforms.interpret import PRODUCTS, Acts, Walk, interpret
from jqx.transforms.primitives import PRIMITIVES
from jqx_interop.auto import Limit, Scoring, chosen, refined, rounds, scored
from jqx_interop.auto.heads import divergence_gradient
from jqx_interop.auto.passes import Passes, Task
from jqx_interop.auto.scoring import EXPERTS
from jqx_interop.checkpoints import Workspace
from jqx_interop.progress import Silent
from jqx_interop.settings import Settings

LIMIT = Limit(most=9.0)
MIXES = {"plain": ("nvfp4", "fp8"), "factors": ("int4_awq", "int8")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint in float32, and beside it llama-ids.npy, [2 batches, 2, 16]."""
    return exports.write_base(tmp_path_factory.mktemp("rounds") / "llama", "llama_f32")


def scores_of(model, ids="llama-ids.npy", mix="plain", name="kept", method="fisher"):
    options = (("block", "32"),) if mix == "factors" else ()
    given = Settings(calib=model.with_name(ids), compute="float32", options=options)
    target = replace(given, target="compressed-tensors") if mix == "factors" else given
    how = Scoring(recipes=MIXES[mix], method=method)
    return scored(model, how, model.with_name(f"{name}-{mix}-{method}"), target, Silent())


def folder_of(model, mix="plain", name="kept"):
    return model.with_name(f"{name}-{mix}-fisher")


def task_of(found, folder):
    return Task(
        job=found.candidates[0].job,
        candidates=found.candidates,
        groups=found.groups,
        data=found.data,
        folder=folder,
        method="kl",
    )


def started(found, folder):
    """Rounds in a new workspace."""
    space = Workspace(folder / "out")
    records = space.begin({"test": 1})
    return rounds._Rounds(task_of(found, space.directory), space, records, Silent()), space


@dataclass
class Between:
    """A linear on its way from what it is to another candidate, roundings straight-through."""

    mine: Any
    others: list[Any]
    t: jax.Array

    def outputs(self, met):
        x, w = met.x, met.w
        if self.mine is not None:
            p = self.mine.pre_quant_scale
            scaled = x if p is None else x * jnp.broadcast_to(p.astype(x.dtype), x.shape)
            x = scaled + jax.lax.stop_gradient(self.mine.inputs(met.x) - scaled)
            w = self.mine.weight.T if met.use.weight_axes == (0,) else self.mine.weight
        y = met.apply(x, w.astype(met.w.dtype))
        plain = met.apply(met.x, met.w)
        ends = [plain if other is None else other.outputs(met) for other in self.others]
        return y + sum(
            t * jax.lax.stop_gradient(end - y) for t, end in zip(self.t, ends, strict=True)
        )


class WholeModel:
    """The divergence of a token with choices, of the model in one piece, and its derivatives."""

    def __init__(self, model, found, folder):
        self.loaded, self.groups = ji.load(model), found.groups
        self.names = [*(c.name for c in found.candidates), NONE]
        passes = Passes(task_of(found, folder))
        self.ids = jnp.asarray(np.concatenate(found.data.batches))
        self.linears = {NONE: dict.fromkeys(p for g in found.groups for p in g)}
        for c in found.candidates:
            self.linears[c.name] = {
                f"{block_prefix(passes.spec, i)}.{member}": row
                for i in range(passes.blocks)
                for member, row in passes.linears(c, i).items()
            }
        self.run = jax.jit(jax.value_and_grad(self.divergence, argnums=1), static_argnums=0)

    def divergence(self, choices, t):
        f = lambda params, ids: jax.nn.log_softmax(forward(self.loaded.spec, params, ids))  # noqa: E731
        between = {
            f"{path}.weight": Between(
                self.linears[name][path], [self.linears[n][path] for n in self.names], t[path]
            )
            for path, name in choices
        }
        mine = f(self.loaded.params, self.ids)

        def change(met, walk):
            linear = between.get(met.use.path)
            return linear.outputs(met) if linear and met.use.op in PRODUCTS else None

        walk = Walk(PRIMITIVES, Acts(change=change))
        other = interpret(f, walk, self.loaded.params, (self.ids,))[0]
        return jnp.sum(jnp.exp(mine) * (mine - other))

    def of(self, choices):
        zeros = {path: jnp.zeros(len(self.names)) for path in choices}
        total, found = self.run(tuple(choices.items()), zeros)
        shifts = {
            group[0]: dict(zip(self.names, map(float, sum(found[p] for p in group)), strict=True))
            for group in self.groups
        }
        return float(total) / self.ids.size, shifts


@pytest.mark.parametrize("mix", MIXES)
def test_divergences_and_shifts_follow_the_definition(model, tmp_path, mix):
    """With linears of every candidate among the choices."""
    found = scores_of(model, mix=mix)
    names = [*MIXES[mix], NONE]
    choices = {p: names[i % 3] for i, group in enumerate(found.groups) for p in group}
    kl, wanted = WholeModel(model, found, tmp_path).of(choices)
    passes, space = started(found, tmp_path)
    with space:
        assert passes.measure(0, choices) == pytest.approx(kl, rel=1e-3)
        shifts = passes.shifts(0, choices)
    largest = max(abs(value) for row in wanted.values() for value in row.values())
    for group, row in wanted.items():
        assert shifts[group][choices[group]] == 0
        for name, value in row.items():
            assert shifts[group][name] == pytest.approx(value, rel=0.02, abs=1e-3 * largest), group


@given(
    st.integers(0, 2**32 - 1), st.lists(st.sampled_from(["a", "b", NONE]), min_size=2, max_size=6)
)
def test_interactions_are_those_of_errors_that_add_up(seed, picked):
    """Of |sum of errors|^2 / 2, with errors of one group's candidates at right angles."""
    rng = np.random.default_rng(seed)
    groups = [str(i) for i in range(len(picked))]
    errors = {}
    for group in groups:
        a, b = np.linalg.qr(rng.standard_normal((8, 2)))[0].T * rng.uniform(0.1, 3, (2, 1))
        errors[group] = {"a": a, "b": b, NONE: np.zeros(8)}
    choices = dict(zip(groups, picked, strict=True))
    scores = {g: {n: float(errors[g][n] @ errors[g][n]) / 2 for n in "ab"} for g in groups}
    whole = sum(errors[g][choices[g]] for g in groups)
    shifts = {
        g: {n: float(whole @ (e - errors[g][choices[g]])) for n, e in errors[g].items()}
        for g in groups
    }
    found = rounds.interactions(scores, choices, shifts)
    for g in groups:
        others = whole - errors[g][choices[g]]
        assert set(found[g]) == {"a", "b"}
        for n in "ab":
            assert found[g][n] == pytest.approx(float(others @ errors[g][n]), abs=1e-9)


def test_the_best_of_all_is_taken(model):
    found = scores_of(model)
    first = chosen(found, LIMIT)
    best = refined(found, LIMIT, 3, folder_of(model), Silent())
    assert best.tried[0].choices == first.choices
    assert min(row.kl for row in best.tried) == next(
        row.kl for row in best.tried if row.choices == best.choices
    )
    assert best.costs["modelopt"] <= LIMIT.most
    assert best.curve == first.curve
    assert best.score == pytest.approx(
        sum({**found.scores[g[0]], NONE: 0.0}[best.choices[g[0]]] for g in found.groups), rel=0.5
    )


def test_rounds_are_kept_and_go_on(model, tmp_path, monkeypatch):
    """Stopped within the way forward, and within the way back: the same numbers come out."""
    found, folder = scores_of(model, name="again"), folder_of(model, name="again")
    wanted = refined(found, LIMIT, 2, folder, Silent())
    place = next(folder.glob("rounds-*"))
    told = (place / "rounds.json").read_bytes()
    monkeypatch.setattr(rounds, "_run", None)
    assert refined(found, LIMIT, 2, folder, Silent()).tried == wanted.tried
    monkeypatch.undo()
    for name in ("chosen_block", "block_shifts"):
        for at in (1, 2):
            (place / "rounds.json").unlink()
            place.rmdir()
            calls, run = [], getattr(rounds, name)

            def stopping(*args, calls=calls, run=run, at=at, **more):
                calls.append(1)
                if len(calls) == at:
                    raise KeyboardInterrupt
                return run(*args, **more)

            monkeypatch.setattr(rounds, name, stopping)
            with pytest.raises(KeyboardInterrupt):
                refined(found, LIMIT, 2, folder, Silent())
            monkeypatch.undo()
            assert refined(found, LIMIT, 2, folder, Silent()).tried == wanted.tried
            assert (place / "rounds.json").read_bytes() == told
    assert {p.name for p in folder.iterdir()} == {"scores", "stats", place.name}


def test_sums_of_experts_shift(tmp_path):
    """Those of the last block go to its states as they are, and so to first order what they
    become with another candidate is the gradient there times the difference of the states.
    """
    model = family_checkpoints.write(tmp_path / "mixtral", "mixtral")
    ids = np.random.RandomState(5).randint(0, make_families.VOCAB, (2, 2, 12))
    np.save(tmp_path / "ids.npy", ids)
    found = scores_of(model, "ids.npy")
    choices = {p: "nvfp4" for group in found.groups for p in group}
    passes, space = started(found, tmp_path)
    with space:
        passes.measure(0, choices)
        last = passes.blocks - 1
        experts = next(g for g, m in passes.groups_of(last).items() if m == (EXPERTS,))
        gradients = [passes._gradients.get(last + 1 & 1, n) for n in range(passes.count)]
        before = [passes.states.get(last + 1, n) for n in range(passes.count)]
        shift = passes.shifts(0, choices)[experts]
        for name in ("fp8", NONE):
            others = choices | {p: name for g in found.groups if g[0] == experts for p in g}
            passes._done.kl.clear()
            passes.measure(1, others)
            after = [passes.states.get(last + 1, n) for n in range(passes.count)]
            wanted = sum(
                float(np.sum(g * (b - a))) for g, a, b in zip(gradients, before, after, strict=True)
            )
            assert shift[name] == pytest.approx(wanted, rel=1e-3)
            assert wanted != 0


def test_the_gradient_of_a_divergence(model, tmp_path):
    """Against differences; tokens without a share count nothing."""
    found = scores_of(model)
    passes = Passes(task_of(found, tmp_path))
    params, program = passes.head_params(), passes.program(passes.blocks - 1)
    params = jax.tree.map(lambda a: 4 * a, params)  # so that differences are no roundings
    r = np.random.default_rng(0)
    h, changed, way = (
        jnp.asarray(r.standard_normal((4, passes.spec.hidden)), jnp.float32) for _ in "abc"
    )
    share = jnp.asarray([1, 2, 0, 1], jnp.float32)

    def value(t):
        return float(divergence_gradient(params, h, changed + t * way, share, program=program)[1])

    g, _ = divergence_gradient(params, h, changed, share, program=program)
    assert not np.any(np.asarray(g[2]))
    assert float(jnp.sum(g * way)) == pytest.approx((value(0.01) - value(-0.01)) / 0.02, rel=1e-2)
    assert value(0) > 0
    assert divergence_gradient(params, h, h, share, program=program)[1] == pytest.approx(
        0, abs=1e-6
    )


def test_the_command_tells_what_it_measured(model, tmp_path):
    words = ("auto", str(model), str(tmp_path / "out"), "--bits", "9", "--method", "fisher")
    words += ("--rounds", "1", "--calib", str(model.with_name("llama-ids.npy")))
    told = jqx(*words, "--json")
    tried = json.loads(told.out)["auto"]["tried"]
    assert len(tried) in (1, 2)
    assert all(row["kl"] > 0 for row in tried)


def test_scores_in_no_unit_have_no_rounds(model, tmp_path):
    words = ("auto", str(model), str(tmp_path / "out"), "--bits", "9", "--rounds", "1")
    refused(*words, "--calib", model.with_name("llama-ids.npy"), saying="--method fisher or kl")
    with pytest.raises(InputError, match="-1 rounds are asked for: give 0 or more"):
        refined(scores_of(model), LIMIT, -1, folder_of(model), Silent())
    assert not (tmp_path / "out").exists()
