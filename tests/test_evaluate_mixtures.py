# SPDX-License-Identifier: Apache-2.0
"""Evaluations of mixtures, whose experts are read one at a time: against the logits of whole
models, as they are and quantized, stored one by one and in one tensor.
"""

import gc
import math
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

import jqx_interop as ji
from jqx_interop import chain, routed
from jqx_interop.evaluation import mixture
from jqx_interop.progress import Silent

WINDOW = 12
CASES = {**ONE_EACH, "mixtral": "mixtral"}
RECIPES = {"mixtral": "nvfp4", "qwen2_moe": "int4_awq", "gpt_oss": "fp8", "llama4_text": "nvfp4"}
FAST = ("mixtral", "gpt_oss")
ALL = [pytest.param(k, marks=() if k in FAST else pytest.mark.slow, id=k) for k in MIXTURES]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """model_type -> a checkpoint, and ids.npy beside it; made once."""

    def write(folder: Path, kind: str) -> Path:
        made = family_checkpoints.write(folder, CASES[kind])
        ids = np.random.RandomState(7).randint(0, make_families.VOCAB, 5 * WINDOW - 3)
        np.save(folder.parent / "ids.npy", ids.astype(np.int32))
        return made

    return family_checkpoints.made_once(tmp_path_factory, write)


def settings(model: Path, **other) -> ji.EvalSettings:
    own = {
        "text": model.with_name("ids.npy"),
        "window": WINDOW,
        "stride": WINDOW,
        "compute": "float32",
    }
    return ji.EvalSettings(**(own | other))


def perplexity(model: Path) -> float:
    """Of the whole model at once, window by window; the last one ends with the text."""
    ids, loaded, nll, done = np.load(model.with_name("ids.npy")), ji.load(model), [], 1
    apply = jax.jit(lambda params, ids: jax.nn.log_softmax(loaded.apply({"params": params}, ids)))
    for begin in [*range(0, len(ids) - WINDOW, WINDOW), len(ids) - WINDOW]:
        part = ids[begin : begin + WINDOW]
        log_p = np.asarray(apply(loaded.params, jnp.asarray(part[None]))[0])
        own = range(max(done - begin, 1), WINDOW)
        nll += [-log_p[i - 1, part[i]] for i in own]
        done = begin + WINDOW
    return math.exp(np.mean(nll))


@pytest.mark.parametrize("kind", ALL)
def test_perplexity_is_that_of_the_whole_model(originals, kind):
    model = originals(kind)
    found = ji.evaluate(model, settings=settings(model))
    assert found.perplexity == pytest.approx(perplexity(model), rel=1e-5)


@pytest.mark.parametrize("kind", RECIPES)
def test_quantized_experts_are_as_in_the_whole_model(originals, kind):
    """Those of gpt-oss and Llama 4 lie in one tensor."""
    model = originals(kind)
    out, more = model.with_name("quantized"), ()
    if RECIPES[kind] == "int4_awq":
        more = ("--set", "block=32", "--fold")
    calib = model.with_name("calib.npy")
    np.save(calib, np.load(model.with_name("ids.npy"))[:48].reshape(1, 4, 12))
    given = ("--calib", calib, "--qformat", RECIPES[kind], *more)
    done = jqx("quantize", model, out, *given)
    assert done.code == 0, done.err
    found = ji.evaluate(out, model, settings=settings(out))
    assert found.perplexity == pytest.approx(perplexity(out), rel=1e-5)
    assert found.kl > 0


def test_files_change_nothing(originals, monkeypatch):
    model = originals("mixtral")
    known = ji.evaluate(model, settings=settings(model))
    bytes_of_states = 5 * WINDOW * 64 * 4
    made, states = [], routed.RoutedStates.states

    def noting(self, *args):
        made.append(states(self, *args))
        return made[-1]

    monkeypatch.setattr(routed.RoutedStates, "states", noting)
    for most, kind in ((4 * bytes_of_states, np.ndarray), (4 * bytes_of_states - 1, np.memmap)):
        made.clear()
        found = ji.evaluate(model, settings=settings(model, max_memory=str(most)))
        assert found.perplexity == known.perplexity
        assert {type(array) for array in made} == {kind}


def test_one_expert_is_in_memory_at_a_time(originals, monkeypatch):
    """For every thread that computes, of which there is one here."""
    model = originals("mixtral")
    read, load = [], mixture.read_expert

    def reading(*args):
        gc.collect()
        assert not any(ref() is not None for ref in read)
        params = load(*args)
        read.append(weakref.ref(jax.tree.leaves(params)[0]))
        return params

    monkeypatch.setattr(mixture, "read_expert", reading)
    for module in (routed, chain):
        monkeypatch.setattr(module, "callers", lambda: 1)
    ji.evaluate(model, settings=settings(model))
    assert len(read) == 10  # two blocks of five


def test_progress_is_told_expert_by_expert(originals):
    model = originals("mixtral")
    phases = []

    class Told(Silent):
        def phase(self, title, total):
            phases.append([total])

        def advance(self, amount):
            phases[-1].append(amount)

    ji.evaluate(model, settings=settings(model, batch_size=2), progress=Told())
    for total, *told in phases:
        assert sum(told) == pytest.approx(total)
    assert len(phases[0]) > 2 * (3 + 5 + 3)  # fronts, experts, ends of two blocks
