# SPDX-License-Identifier: Apache-2.0
"""Decoders like Llama with experts in the place of the MLP: Mixtral, Qwen2 and Qwen3, OLMoE,
Granite and Phi-3.5.
"""

from dataclasses import replace

from jqx import InputError
from jqx.models import Mlp, ModelSpec, Names, Router

from .experts import mixture, positive
from .family import Family, frozen
from .llama import GRANITE, LLAMA, MISTRAL, QWEN2, QWEN3
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
    only, step = read("mlp_only_layers", []) or [], positive(read, "decoder_sparse_step")
    if not isinstance(only, list):
        raise InputError(f"config has mlp_only_layers {only!r:.60}, not a list of layers")
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
        decoder_sparse_step=1,
    ),
    experts=mixture(_normed, inner="moe_intermediate_size", layers=_sparse),
)


def _shared(read: Reader, each: Mlp) -> Mlp:
    return replace(each, inner=positive(read, "shared_expert_intermediate_size"))


QWEN2_MOE = replace(
    QWEN2,
    model_type="qwen2_moe",
    title="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    keys=QWEN3_MOE.keys,
    qkv_bias="qkv_bias",
    windows="typed",
    defaults=frozen(
        **QWEN2.defaults,
        qkv_bias=True,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        shared_expert_intermediate_size=5632,
    ),
    experts=mixture(
        _normed, inner="moe_intermediate_size", layers=_sparse, shared=_shared, shared_gate=True
    ),
)

OLMOE = Family(
    model_type="olmoe",
    title="OLMoE 1B-7B",
    keys=QWEN3_MOE.keys,
    defaults=frozen(
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        num_experts_per_tok=8,
        norm_topk_prob=False,
    ),
    qk_norm="all",
    of_attention=lambda read, row: replace(row, clip=read("clip_qkv")),
    experts=mixture(_normed),
)

GRANITE_MOE = replace(
    GRANITE,
    model_type="granitemoe",
    title="Granite 3 1B-A400M, 3B-A800M",
    names=Names(
        router="block_sparse_moe.router.layer",
        experts="block_sparse_moe.experts",
        expert_gate_up="block_sparse_moe.input_linear.weight",
        expert_down="block_sparse_moe.output_linear.weight",
    ),
    mlp="fused_gated",
    mlp_bias=False,
    defaults=frozen(num_local_experts=8, num_experts_per_tok=2),
    experts=mixture(
        lambda read: Router(kind="softmax_chosen"), number="num_local_experts", store="fused_rows"
    ),
)


def _sparsemixer(read: Reader) -> Router:
    if read("num_experts_per_tok") != 2:
        raise InputError(
            f"config sets num_experts_per_tok = {read('num_experts_per_tok')!r:.60}, which is not "
            "supported for model_type 'phimoe'; supported: 2"
        )
    return Router(kind="sparsemixer", threshold=float(read("router_jitter_noise")))


def _biased_head(read: Reader, spec: ModelSpec) -> ModelSpec:
    return replace(spec, head_bias=bool(read("lm_head_bias")))


PHI_MOE = replace(
    LLAMA,
    model_type="phimoe",
    title="Phi-3.5-MoE",
    names=MIXTRAL_NAMES,
    norm="layer",
    norm_bias=True,
    mlp_bias=False,
    windows="every_layer",
    folds_rows=False,
    defaults=frozen(
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope_theta=1000000.0,
        num_key_value_heads=8,
        num_local_experts=16,
        num_experts_per_tok=2,
        router_jitter_noise=0.01,
        lm_head_bias=False,
    ),
    experts=mixture(_sparsemixer, number="num_local_experts"),
    of_model=_biased_head,
)

ROWS = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GRANITE_MOE, PHI_MOE)
