# SPDX-License-Identifier: Apache-2.0
"""Decoders like Llama with experts in the place of the MLP: Mixtral, Qwen2 and Qwen3, OLMoE,
Granite and Phi-3.5.
"""

from dataclasses import replace

from jqx.models import Names, Router

from .experts import mixture
from .family import frozen
from .llama import MISTRAL, QWEN3
from .reader import Reader


def _normed(read: Reader) -> Router:
    """The largest probabilities, made to sum to one if the config says so."""
    return Router(kind="softmax", power=1.0 if read("norm_topk_prob") else None)


MIXTRAL_NAMES = Names(
    router="block_sparse_moe.gate",
    expert_gate="block_sparse_moe.experts.{}.w1.weight",
    expert_up="block_sparse_moe.experts.{}.w3.weight",
    expert_down="block_sparse_moe.experts.{}.w2.weight",
)

MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    title="Mixtral 8x7B, 8x22B",
    names=MIXTRAL_NAMES,
    defaults=frozen(
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope_theta=1000000.0,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    experts=mixture(lambda read: Router(kind="softmax", power=1.0), number="num_local_experts"),
)


def _sparse(read: Reader, i: int) -> bool:
    """Every n-th layer, but those that are listed."""
    only, step = read("mlp_only_layers", []) or [], read("decoder_sparse_step", 1)
    return i not in only and (i + 1) % step == 0


QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    title="Qwen3 30B-A3B, 235B-A22B, Qwen3-Coder",
    folds_rows=False,
    windows="every_layer_if_used",
    keys=frozen(num_experts=("num_experts", "num_local_experts")),
    defaults=frozen(
        **{**QWEN3.defaults, "head_dim": None},
        num_experts_per_tok=8,
        norm_topk_prob=False,
    ),
    experts=mixture(_normed, inner="moe_intermediate_size", layers=_sparse),
)

ROWS = (MIXTRAL, QWEN3_MOE)
