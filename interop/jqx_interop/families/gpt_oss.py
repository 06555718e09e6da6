# SPDX-License-Identifier: Apache-2.0
"""GPT-OSS: attention to nothing, every other layer with a window, and experts whose channels are
clipped.
"""

from dataclasses import replace

from jqx.models import Mlp, Names, Router

from .experts import mixture
from .family import Family, frozen
from .reader import Reader


def _clipped(read: Reader, row: Mlp) -> Mlp:
    return replace(row, limit=float(read("swiglu_limit")))


GPT_OSS = Family(
    model_type="gpt_oss",
    title="gpt-oss 20b, 120b",
    keys=frozen(
        num_local_experts=("num_local_experts", "num_experts"),
        num_experts_per_tok=("num_experts_per_tok", "experts_per_token"),
    ),
    defaults=frozen(
        rms_norm_eps=1e-5,
        head_dim=64,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_theta=150000.0,
        sliding_window=128,
        attention_bias=True,
        num_local_experts=128,
        num_experts_per_tok=4,
        swiglu_limit=7.0,
    ),
    names=Names(
        router="mlp.router",
        expert_down="mlp.experts.down_proj",
    ),
    norm="rms_once",
    windows="every_other",
    mlp="gegelu",
    mlp_bias=True,
    of_attention=lambda read, row: replace(row, sinks=True),
    of_mlp=_clipped,
    experts=mixture(
        lambda read: Router(kind="softmax_chosen", bias=True),
        number="num_local_experts",
        store="fused_columns",
    ),
)

ROWS = (GPT_OSS,)
