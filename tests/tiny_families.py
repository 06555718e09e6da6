# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of every family, and of every odd option of one: configurations, parameters,
and the logits that another implementation has.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import restated
import restated_mixtures
from golden import make_families as golden
from golden import make_mixtures, make_models

from jqx import models
from jqx.tensors.paths import unflatten
from jqx.tensors.stacks import stacked
from jqx_interop.families import spec_from_config

RECORDED = {**golden.CASES, **make_mixtures.CASES}
"""Cases of which a few logits are kept, and the config.json that transformers writes."""

RESTATED = {**restated.CASES, **restated_mixtures.CASES}
"""Cases whose logits are computed again."""

CONFIGS: dict[str, dict[str, Any]] = {**make_models.CASES, **RECORDED, **RESTATED}
"""Name -> config.json."""

ONE_EACH = {config["model_type"]: case for case, config in CONFIGS.items()}
"""model_type -> the last of its cases."""

MIXTURES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe"),
    *(
        "deepseek_v2",
        "deepseek_v3",
        "kimi_k2",
        "llama4_text",
        "llama4",
        "gpt_oss",
        "dbrx",
        "arctic",
    ),
)
"""The model types with experts."""

DENSE = [kind for kind in ONE_EACH if kind not in MIXTURES]
"""Those without."""

IDS = jnp.asarray(golden.token_ids(), jnp.int32)


@cache
def spec_of(case: str) -> models.ModelSpec:
    return spec_from_config(CONFIGS[case])


@cache
def tensors_of(case: str) -> dict[str, np.ndarray]:
    """Float32 tensors by name, as they were drawn when the answers were made."""
    draw = make_models.weight if case in make_models.CASES else make_mixtures.weight
    return {name: draw(name, shape) for name, shape in models.param_shapes(spec_of(case)).items()}


@cache
def params_of(case: str) -> dict[str, Any]:
    leaves = {name: jnp.asarray(a) for name, a in tensors_of(case).items()}
    return unflatten(stacked(leaves, models.leaf_shapes(spec_of(case))))


@cache
def logits_of(case: str) -> np.ndarray:
    return np.asarray(models.forward(spec_of(case), params_of(case), IDS))


@cache
def _recorded(file: Path) -> dict[str, np.ndarray]:
    with np.load(file) as arrays:
        return dict(arrays)


def answers(case: str) -> tuple[tuple[int, ...], np.ndarray]:
    """Places in the sequences, and the logits of another implementation there."""
    if case in make_models.CASES:
        known = _recorded(make_models.FIXTURE)[f"{case}|float32"]
    elif case in RECORDED:
        return golden.PLACES, _recorded(_file(case))[case]
    else:
        known = _restated(CONFIGS[case], tensors_of(case))
    return tuple(range(known.shape[1])), known


def _restated(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Float64 logits of all sequences."""
    run = {**restated.FUNCTIONS, **restated_mixtures.FUNCTIONS}[config["model_type"]]
    return np.stack([run(config, tensors, row) for row in np.asarray(IDS)])


def saved_config(case: str) -> dict[str, Any]:
    """The config.json that transformers writes for a case of RECORDED."""
    return json.loads(str(_recorded(_file(case))[f"{case}|config"]))


def _file(case: str) -> Path:
    return golden.FIXTURE if case in golden.CASES else make_mixtures.FIXTURE


def distance(case: str, got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the spread of the wanted logits, of tokens that are used."""
    used = [i for i in range(wanted.shape[-1]) if i not in spec_of(case).unused]
    got, wanted = np.asarray(got)[..., used], wanted[..., used]
    return float(np.max(np.abs(got - wanted)) / np.std(wanted))
