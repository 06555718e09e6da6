# SPDX-License-Identifier: Apache-2.0
"""Scores of linears in families whose blocks differ from Llama's: fused, kept as [k, n], parallel,
with norms in other places, with positions that are learned or biases of scores.
"""

import family_checkpoints
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_families
from tiny_families import DENSE, ONE_EACH
from whole_model import Whole

from jqx_interop.auto import Scoring, scored
from jqx_interop.progress import Silent
from jqx_interop.settings import Settings

FORMATS = ("nvfp4", "fp8")
SOME = ("gpt2", "opt", "falcon", "gemma2", "phi3")
ALL = [
    pytest.param(kind, marks=() if kind in SOME else pytest.mark.slow, id=kind) for kind in DENSE
]


@pytest.mark.parametrize("kind", ALL)
def test_scores_follow_the_definition(tmp_path, kind):
    """The gradient of the whole model at once, times what becomes different in every linear."""
    case = family_checkpoints.CASES.get(kind, ONE_EACH[kind])
    model = family_checkpoints.write(tmp_path / "model", case)
    ids = np.random.RandomState(5).randint(0, make_families.VOCAB, (2, 2, 12))
    np.save(tmp_path / "ids.npy", ids)
    given = Settings(calib=tmp_path / "ids.npy", compute="float32")
    found = scored(model, Scoring(recipes=FORMATS), tmp_path / "kept", given, Silent())
    whole = Whole(model, jnp.asarray(ids, jnp.int32), found.groups)
    assert found.groups

    wanted, _ = whole.gradient_scores(found.groups, FORMATS)
    for group in found.groups:
        for name in FORMATS:
            assert found.scores[group[0]][name] == pytest.approx(wanted[group[0]][name], rel=0.05)
