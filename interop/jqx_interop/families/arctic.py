# SPDX-License-Identifier: Apache-2.0
"""Snowflake Arctic: experts read the input of the block, and a small MLP what attention left."""

from dataclasses import replace

from jqx import InputError
from jqx.models import BlockKind, Experts, Mlp, Router

from .experts import mixture, positive
from .family import Family, frozen
from .mixtures import MIXTRAL_NAMES
from .reader import Reader


def _router(read: Reader) -> Router:
    return Router(kind="softmax", power=1.0 if read("num_experts_per_tok") > 1 else None)


def _beside(read: Reader, each: Mlp) -> Mlp | None:
    beside, aside = bool(read("use_residual")), bool(read("parallel_attn_mlp_res"))
    if beside != aside:
        raise InputError(
            f"config sets use_residual = {beside} and parallel_attn_mlp_res = {aside}, which is "
            "not supported for model_type 'arctic'; supported: both or none"
        )
    return replace(each, inner=read("hidden_size")) if beside else None


def _layer(read: Reader, kind: BlockKind, i: int) -> BlockKind:
    aside = isinstance(kind.mlp, Experts) and kind.mlp.residual is not None
    return replace(kind, layout="aside") if aside else kind


ARCTIC = Family(
    model_type="arctic",
    title="Snowflake Arctic",
    names=replace(
        MIXTRAL_NAMES,
        gate="block_sparse_moe.mlp.w1",
        up="block_sparse_moe.mlp.w3",
        down="block_sparse_moe.mlp.w2",
    ),
    defaults=frozen(
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        rope_theta=1000000.0,
        num_local_experts=8,
        num_experts_per_tok=1,
        moe_layer_frequency=2,
        use_residual=False,
        parallel_attn_mlp_res=False,
    ),
    qkv_bias=False,
    out_bias=False,
    experts=mixture(
        _router,
        number="num_local_experts",
        layers=lambda read, i: (i + 1) % positive(read, "moe_layer_frequency") == 0,
        residual=_beside,
    ),
    of_layer=_layer,
)

ROWS = (ARCTIC,)
