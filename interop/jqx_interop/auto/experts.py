# SPDX-License-Identifier: Apache-2.0
"""How many of its routed experts a token meets, as a config.json or the model says. (The keys are
those of ModelOpt 0.47.)
"""

from collections.abc import Mapping
from typing import Any

from jqx.errors import InputError
from jqx.models import Experts, ModelSpec, kinds

ACTIVE = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "top_k",
    "num_selected_experts",
)
EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)


def active_ratio(config: Mapping[str, Any], spec: ModelSpec | None = None) -> float:
    """The share of routed experts that a token meets, by a config.json, or by the model where that
    has other keys. Raises InputError if neither says.
    """
    for part in (config, *(config.get(k) for k in ("text_config", "language_config"))):
        if not isinstance(part, Mapping):
            continue
        active, total = (next((part[k] for k in ks if k in part), None) for ks in (ACTIVE, EXPERTS))
        if isinstance(active, int) and isinstance(total, int) and active > 0 and total > 0:
            return min(active / total, 1.0)
    rows = [kind.mlp for kind in kinds(spec)] if spec is not None else []
    for row in rows:
        if isinstance(row, Experts):
            return row.top_k / row.number
    raise InputError(
        "config.json does not say how many of how many experts a token meets: give the share "
        "(--expert-ratio), or count all weights (--cost-model weight)"
    )
