# SPDX-License-Identifier: Apache-2.0
"""DeepSeek V2, V3 and R1: keys and values made of few channels, experts in groups, and experts that
all tokens take.
"""

import math
from dataclasses import replace

from jqx import InputError
from jqx.models import Attention, Latent, Mlp, ModelSpec, Names, Norm, Router
from jqx.models.spec import BlockKind

from .experts import mixture, positive
from .family import Family, frozen
from .reader import Reader
from .rope import given_rope

_NORM_EPS = 1e-6  # of the norms inside attention, whatever the config says of others


def _head_dim(read: Reader) -> int:
    return positive(read, "qk_nope_head_dim") + positive(read, "qk_rope_head_dim")


def _latent(read: Reader, row: Attention) -> Attention:
    return replace(
        row,
        kv_heads=row.heads,
        scale=row.scale * _stretched(read),
        qkv="latent",
        value_dim=positive(read, "v_head_dim"),
        latent=Latent(
            kv_rank=positive(read, "kv_lora_rank"),
            q_rank=None if read("q_lora_rank") is None else positive(read, "q_lora_rank"),
            rotating=positive(read, "qk_rope_head_dim"),
            norm=Norm(kind=read.row.norm, eps=_NORM_EPS),
        ),
    )


def _stretched(read: Reader) -> float:
    """What the scale of scores is multiplied by for long contexts."""
    _, given = given_rope(read)
    all_dims, factor = given.get("mscale_all_dim"), given.get("factor") or 1.0
    kind = given.get("rope_type") or given.get("type")
    if kind != "yarn" or not all_dims or factor <= 1:
        return 1.0
    return (0.1 * all_dims * math.log(factor) + 1.0) ** 2


def _sparse(read: Reader, i: int) -> bool:
    """The first layers have none, nor have those between every n-th."""
    dense, every = read("first_k_dense_replace") or 0, positive(read, "moe_layer_freq")
    return i >= dense and i % every == 0


def _shared(read: Reader, each: Mlp) -> Mlp | None:
    count = read("n_shared_experts")
    return replace(each, inner=each.inner * positive(read, "n_shared_experts")) if count else None


def _checked(read: Reader, key: str, known: tuple[str, ...]) -> str:
    value = read(key, known[0])
    if value not in known:
        raise InputError(
            f"config sets {key} = {value!r:.60}, which is not supported for model_type "
            f"{read.row.model_type!r}; supported: {', '.join(known)}"
        )
    return value


def _v2_router(read: Reader) -> Router:
    _checked(read, "scoring_func", ("softmax",))
    grouped = _checked(read, "topk_method", ("greedy", "group_limited_greedy")) != "greedy"
    groups, top_groups = read("n_group"), read("topk_group")
    return Router(
        kind="softmax",
        groups=positive(read, "n_group") if grouped and groups is not None else 1,
        top_groups=positive(read, "topk_group") if grouped and top_groups is not None else 1,
        scale=float(read("routed_scaling_factor")),
        exact=True,
    )


def _v3_router(read: Reader) -> Router:
    _checked(read, "scoring_func", ("sigmoid",))
    _checked(read, "topk_method", ("noaux_tc",))
    return Router(
        kind="corrected",
        groups=positive(read, "n_group"),
        top_groups=positive(read, "topk_group"),
        power=1.0 if read("norm_topk_prob") else None,
        scale=float(read("routed_scaling_factor")),
        corrected=True,
        exact=True,
    )


def _pairs(read: Reader, kind: BlockKind, i: int) -> BlockKind:
    row = kind.attention
    assert isinstance(row, Attention)
    assert row.rope is not None
    pairs = "neighbours" if read("rope_interleave") in (None, True) else "halves"
    return replace(kind, attention=replace(row, rope=replace(row.rope, pairs=pairs)))


_MOST_PREDICTING = 4


def _predicting(read: Reader, spec: ModelSpec) -> ModelSpec:
    """Layers after the last predict further tokens: they are kept as they are."""
    numbers = range(len(spec.blocks), len(spec.blocks) + _MOST_PREDICTING)
    more = tuple(f"{spec.names.block.format(i)}.*" for i in numbers)
    return replace(spec, names=replace(spec.names, carried=more))


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    title="DeepSeek-V2, V2-Lite, V2.5, Coder-V2",
    keys=frozen(
        head_dim=(), n_routed_experts=("n_routed_experts", "num_experts", "num_local_experts")
    ),
    defaults=frozen(
        head_dim=_head_dim,
        q_lora_rank=None,
        num_experts_per_tok=6,
        routed_scaling_factor=1.0,
        first_k_dense_replace=0,
        moe_layer_freq=1,
    ),
    names=Names(
        shared_gate="mlp.shared_experts.gate_proj",
        shared_up="mlp.shared_experts.up_proj",
        shared_down="mlp.shared_experts.down_proj",
    ),
    rope_pairs="neighbours",
    rotates=lambda read: positive(read, "qk_rope_head_dim"),
    of_attention=_latent,
    experts=mixture(
        _v2_router,
        number="n_routed_experts",
        inner="moe_intermediate_size",
        layers=_sparse,
        shared=_shared,
    ),
)

DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    model_type="deepseek_v3",
    title="DeepSeek-V3, R1, V3.1",
    defaults=frozen(
        **{**DEEPSEEK_V2.defaults, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5},
        n_group=8,
        topk_group=4,
        norm_topk_prob=True,
        max_position_embeddings=4096,
    ),
    experts=mixture(
        _v3_router,
        number="n_routed_experts",
        inner="moe_intermediate_size",
        layers=_sparse,
        shared=_shared,
    ),
    of_layer=_pairs,
    of_model=_predicting,
)

KIMI_K2 = replace(DEEPSEEK_V3, model_type="kimi_k2", title="Kimi K2")

ROWS = (DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2)
