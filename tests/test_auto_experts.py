# SPDX-License-Identifier: Apache-2.0
"""Mixed precision of mixtures: scores of experts and of what is beside them against their
definitions, one choice for the experts of a block, budgets, and what is written.
"""

import re
from pathlib import Path

import family_checkpoints
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_families
from tiny_families import MIXTURES, ONE_EACH
from whole_mixture import WholeMixture
from whole_model import Whole

from jqx_interop.auto import Scoring, scored
from jqx_interop.progress import Silent
from jqx_interop.settings import Settings

FORMATS = ("nvfp4", "fp8")
SOME = ("mixtral",)
ALL = [pytest.param(k, marks=() if k in SOME else pytest.mark.slow, id=k) for k in MIXTURES]


def made(folder: Path, kind: str, batches=(2, 2, 12)) -> Path:
    """A checkpoint, and ids.npy beside it."""
    model = family_checkpoints.write(folder / "model", ONE_EACH[kind])
    np.save(folder / "ids.npy", np.random.RandomState(5).randint(0, make_families.VOCAB, batches))
    return model


def scores_of(model: Path, method: str, name: str = "kept", **more):
    given = Settings(calib=model.with_name("ids.npy"), compute="float32", **more)
    how = Scoring(recipes=FORMATS, method=method)
    return scored(model, how, model.with_name(name), given, Silent())


def of_experts(found):
    """The groups of experts, by block."""
    own = [group for group in found.groups if ".experts." in group[0]]
    return {int(re.search(r"\.(\d+)\.", group[0])[1]): group for group in own}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return made(tmp_path_factory.mktemp("experts"), "mixtral")


@pytest.mark.parametrize("kind", ALL)
def test_scores_follow_the_definition(tmp_path, kind):
    source = made(tmp_path, kind)
    ids = np.load(tmp_path / "ids.npy")
    found = scores_of(source, "gradient")
    whole, groups = WholeMixture(source, ids), of_experts(found)
    assert groups.keys() == set(whole.mixtures)
    for name in FORMATS:
        wanted = whole.gradient_scores(name)
        for i, group in groups.items():
            assert found.scores[group[0]][name] == pytest.approx(wanted[i], rel=0.02), group[0]
    others = [group for group in found.groups if group not in groups.values()]
    wanted, loss = Whole(source, jnp.asarray(ids, jnp.int32), others).gradient_scores(
        others, FORMATS
    )
    assert found.loss == pytest.approx(loss, rel=1e-5)
    for group in others:
        for name in FORMATS:
            assert found.scores[group[0]][name] == pytest.approx(wanted[group[0]][name], rel=0.05)
