# SPDX-License-Identifier: Apache-2.0
"""Every family against another implementation, in float32: logits, a token at a time, padded on the
left, and what tensors are called. The distances are a table at the end of the output.
"""

import itertools
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_families, make_mixtures, make_models
from tiny_families import (
    CONFIGS,
    IDS,
    ONE_EACH,
    RECORDED,
    RESTATED,
    answers,
    distance,
    logits_of,
    params_of,
    saved_config,
    spec_of,
    tensors_of,
)

from jqx import models
from jqx.models import FLOAT32
from jqx.models.generate import Session
from jqx_interop.families import FAMILIES, spec_from_config

FARTHEST = 1e-4
PREFIXES = (13, 20)  # tokens that are read at once, of the two sequences
STEPS = 3


def test_every_family_is_among_the_cases():
    assert set(ONE_EACH) == set(FAMILIES)


@pytest.mark.parametrize("case", CONFIGS)
def test_logits_are_those_of_another_implementation(case, record_property):
    places, wanted = answers(case)
    got = logits_of(case)
    assert got.dtype == np.float32
    far = distance(case, got[:, list(places)], wanted)
    by = "restated" if case in RESTATED else "transformers"
    record_property("told", f"{CONFIGS[case]['model_type']:13} {case:26} {far:.1e}  {by}")
    assert far <= FARTHEST
    lowest = np.finfo(np.float32).min
    assert (got[..., list(spec_of(case).unused)] == lowest).all()


@pytest.mark.parametrize("case", [*make_models.CASES, *RECORDED])
def test_logits_are_those_of_transformers_live(case):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    if case in make_models.CASES:
        wanted = make_models.peer_logits(CONFIGS[case], "float32")
    else:
        made = make_families if case in make_families.CASES else make_mixtures
        wanted = made.peer_logits(CONFIGS[case])
    assert distance(case, logits_of(case), wanted) <= FARTHEST


def length_matters(case: str) -> bool:
    """Whether the length of the text changes how keys turn, within the texts here: kept keys stay
    as they were turned.
    """
    ropes = [k.attention.rope for k in spec_of(case).blocks if hasattr(k.attention, "rope")]
    by_length = ("dynamic", "longrope", "doubling")
    return any(
        r is not None and r.scaling in by_length and r.trained_length < IDS.shape[1] for r in ropes
    )


FIRST = {CONFIGS[case]["model_type"]: case for case in reversed(CONFIGS)}
BY_TOKEN = [
    pytest.param(case, marks=() if case in FIRST.values() else pytest.mark.slow, id=case)
    for case in CONFIGS
    if not length_matters(case)
]
"""One case of every model type; the rest takes minutes."""


@pytest.mark.parametrize("case", BY_TOKEN)
def test_a_token_at_a_time_as_the_whole_text(case):
    """Two texts of different lengths, so one is padded on the left."""
    ids, whole = np.asarray(IDS), logits_of(case)
    session = Session(spec_of(case), params_of(case), FLOAT32, max(PREFIXES) + STEPS)
    session.read([row[:n].tolist() for row, n in zip(ids, PREFIXES, strict=True)])
    for step in range(STEPS):
        at = [n + step for n in PREFIXES]
        wanted = np.stack([row[n - 1] for row, n in zip(whole, at, strict=True)])
        assert distance(case, np.asarray(session.logits()), wanted) <= 1e-5
        session.add(np.array([row[n] for row, n in zip(ids, at, strict=True)], np.int32))


def test_every_family_is_read_a_token_at_a_time():
    kept = {CONFIGS[case]["model_type"] for case in CONFIGS if not length_matters(case)}
    assert kept == set(FAMILIES)


@pytest.mark.parametrize("case", CONFIGS)
def test_padding_on_the_left_changes_nothing_for_the_tokens(case):
    pad, t = 7, IDS.shape[1]
    ids, mask = np.asarray(IDS).copy(), np.ones(IDS.shape, bool)
    ids[0, pad:], ids[0, :pad] = ids[0, : t - pad].copy(), 1
    mask[0, :pad] = False
    positions = models.positions_of(jnp.asarray(mask))
    got = models.forward(spec_of(case), params_of(case), jnp.asarray(ids), FLOAT32, positions)
    got, whole = np.asarray(got), logits_of(case)
    assert distance(case, got[0, pad:], whole[0, : t - pad]) <= 1e-5
    assert distance(case, got[1], whole[1]) <= 1e-5


@pytest.mark.parametrize("case", RECORDED)
def test_what_transformers_writes_of_a_config_means_the_same(case):
    assert spec_from_config(saved_config(case)) == spec_of(case)


def hub_names() -> dict[str, tuple[set[str], set[str]]]:
    """model_type -> names that are always there, and those that may be."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    text = Path(__file__).with_name("hub_names.txt").read_text("utf-8")
    for part in text.split("\n\n")[1:]:
        heading, *lines = part.strip().splitlines()
        always, sometimes = set(), set()
        for line in lines:
            parts = re.split(r"\{([^}]*)\}", line.removesuffix("?"))
            choices = [p.split(",") if i % 2 else [p] for i, p in enumerate(parts)]
            into = sometimes if line.endswith("?") else always
            into |= {"".join(name) for name in itertools.product(*choices)}
        found |= dict.fromkeys(heading.split(), (always, sometimes))
    return found


@pytest.mark.parametrize("case", CONFIGS)
def test_tensors_are_called_as_on_the_hub(case):
    always, sometimes = hub_names()[CONFIGS[case]["model_type"]]
    names = {re.sub(r"\bnorms\.\d+", "norms.J", name) for name in tensors_of(case)}
    names = {re.sub(r"\.\d+\.", ".N.", name) for name in names}
    assert always <= names
    assert names <= always | sometimes


@pytest.mark.parametrize("case", ["gpt2", "bloom", "opt"])
def test_names_without_the_prefix_that_some_files_leave_out(case):
    spec, prefix = spec_of(case), spec_of(case).names.prefix
    bare = [name.removeprefix(prefix) for name in models.param_shapes(spec)]
    assert models.named_as(spec, list(models.param_shapes(spec))) == spec
    assert list(models.param_shapes(models.named_as(spec, bare))) == bare
