# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with the bytes of ModelOpt's exports, run here, give the logits of ModelOpt's
fake-quantized models (golden/make_logits.py says how these were computed), in float32.

Where a number lies at a tie of two codes, or nearly so, the last bit of a sum decides: the code of
one activation then differs, and the logits by a part of what quantization does to them.
"""

from pathlib import Path

import exports
import numpy as np
import pytest
from exports import EXPORTS, Export
from test_end_to_end import recipe_of, root, settings  # noqa: F401  root is a fixture

import jqx_interop as ji

GOLDEN = dict(np.load(Path(__file__).with_name("golden") / "logits.npz"))
ROWS = [row for row in EXPORTS if row.key in GOLDEN]
OTHERWISE = {
    "w4a8_nvfp4_fp8": "its fake quantization has a tensor scale of 6 * 448, its export of 448",
    "nvfp4_affine": "its fake quantization takes no bias off keys and values in NVFP4",
}
"""Recipe or cache -> how ModelOpt computes otherwise than what it exports says."""

EXACT, TIES = 1e-5, 0.25
"""How far apart logits may be, relative: where all codes are the same, and, as a part of what
quantization does to them, where some are not.
"""


def off(a, b):
    return np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b)


def logits(folder, model):
    loaded = ji.load(folder)
    last = GOLDEN[model].shape[1]
    return np.asarray(loaded.apply({"params": loaded.params}, exports.token_ids(model)[0]))[
        :, -last:
    ]


def test_every_export_of_these_models_has_logits():
    models = set(exports.BATCHES)
    assert {r.key for r in EXPORTS if r.model in models and r.shard == Export.shard} == {
        r.key for r in ROWS
    }


@pytest.mark.parametrize("model", exports.BATCHES)
def test_plain_models_are_those_of_transformers(root: Path, model: str):  # noqa: F811
    assert off(logits(root / model, model), GOLDEN[model]) < EXACT


def test_logits_are_those_of_fake_quantization(root: Path, tmp_path: Path):  # noqa: F811
    found = {}
    for row in ROWS:
        out = tmp_path / row.key
        given = settings(root, row.model)
        ji.ptq(root / row.model, out, recipe_of(root, row), kv_cache=row.kv, **given)
        golden = GOLDEN.get(f"{row.key}|stored", GOLDEN[row.key])
        effect = off(golden, GOLDEN[row.model].astype(np.float64))
        if not {row.recipe, row.kv} & set(OTHERWISE):
            found[row.key] = off(logits(out, row.model), golden), effect
    assert len(found) == len(ROWS) - 2
    assert {k: v for k, v in found.items() if v[0] > TIES * v[1]} == {}
    exact = [key for key, (error, _) in found.items() if error < EXACT]
    assert len(exact) >= 2 / 3 * len(found), found
