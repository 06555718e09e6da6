# SPDX-License-Identifier: Apache-2.0
"""Bloom, MPT and Falcon: fused queries, keys and values, MLPs that are not gated, and, in most of
them, attention that fades with distance.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jqx import InputError
from jqx.models import Alibi, Attention, BlockKind, ModelSpec, Names, Rope

from .common import four_times
from .family import Family, frozen
from .reader import Reader
from .rope import rope_from_config

_NAMES = Names(
    prefix="transformer.",
    embed="transformer.word_embeddings",
    embed_norm="transformer.word_embeddings_layernorm",
    block="transformer.h.{}",
    final_norm="transformer.ln_f",
    qkv="self_attention.query_key_value",
    k="self_attention.k_proj",
    v="self_attention.v_proj",
    out="self_attention.dense",
    kept_k="self_attention.k",
    kept_v="self_attention.v",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def _bloom_layer(read: Reader, kind: BlockKind, i: int) -> BlockKind:
    normed = bool(read("apply_residual_connection_post_layernorm", False))
    return replace(kind, normed_residual=normed)


BLOOM = Family(
    model_type="bloom",
    title="BLOOM",
    keys=frozen(
        hidden_size=("hidden_size", "n_embed"),
        num_hidden_layers=("n_layer", "num_hidden_layers"),
        num_attention_heads=("n_head", "num_attention_heads"),
        num_key_value_heads=(),
        intermediate_size=(),
        hidden_act=(),
        rms_norm_eps=("layer_norm_epsilon",),
        max_position_embeddings=("seq_length",),
    ),
    defaults=frozen(
        intermediate_size=four_times,
        hidden_act="gelu_new",
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    names=_NAMES,
    norm="layer",
    norm_bias=True,
    qkv="grouped",
    qkv_bias=True,
    out_bias=True,
    mlp="plain",
    mlp_bias=True,
    rope=lambda read: None,
    of_attention=lambda read, row: replace(row, alibi=Alibi()),
    of_layer=_bloom_layer,
    of_model=lambda read, spec: replace(spec, embed_norm=spec.final_norm),
)

_MPT_FIXED: Mapping[str, tuple[Any, ...]] = {
    "alibi": (True, None),
    "qk_ln": (False, None),
    "prefix_lm": (False, None),
    "attn_type": ("multihead_attention", None),
}
"""Keys of `attn_config` -> the values that are defined here."""


def _mpt_attention(read: Reader, row: Attention) -> Attention:
    given = read("attn_config", {})
    for key, values in _MPT_FIXED.items():
        if given.get(key) not in values:
            raise InputError(
                f"config sets {key} = {given[key]!r:.40} in attn_config, not supported for "
                f"model_type 'mpt'; supported: {values[0]!r}"
            )
    return replace(
        row,
        scale=given.get("softmax_scale") or row.scale,
        clip=given.get("clip_qkv") or None,
        alibi=Alibi(most=float(given.get("alibi_bias_max") or 8)),
    )


MPT = Family(
    model_type="mpt",
    title="MPT",
    keys=frozen(
        hidden_size=("d_model",),
        num_hidden_layers=("n_layers",),
        num_attention_heads=("n_heads",),
        num_key_value_heads=(),
        intermediate_size=(),
        hidden_act=(),
        rms_norm_eps=("layer_norm_epsilon",),
        max_position_embeddings=("max_seq_len",),
    ),
    defaults=frozen(
        intermediate_size=four_times,
        hidden_act="gelu",
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    names=replace(
        _NAMES,
        embed="transformer.wte",
        block="transformer.blocks.{}",
        final_norm="transformer.norm_f",
        input_norm="norm_1",
        qkv="attn.Wqkv",
        k="attn.k_proj",
        v="attn.v_proj",
        out="attn.out_proj",
        kept_k="attn.k",
        kept_v="attn.v",
        mlp_norm="norm_2",
        up="ffn.up_proj",
        down="ffn.down_proj",
        prefix="",
    ),
    norm="layer",
    qkv="stacked",
    qkv_bias=False,
    out_bias=False,
    mlp="plain",
    rope=lambda read: None,
    of_attention=_mpt_attention,
)


def _falcon_heads(read: Reader) -> int:
    """Key heads. What the old layout says of their number means nothing."""
    heads, queries_alone = read("num_attention_heads"), read("multi_query")
    if read("new_decoder_architecture"):
        return read("num_kv_heads", heads)
    return 1 if queries_alone else heads


def _falcon_layout(read: Reader) -> str:
    norms, parallel = read("num_ln_in_parallel_attn"), read("parallel_attn")
    if read("new_decoder_architecture"):
        return "parallel" if norms == 1 else "parallel_two"
    return "parallel" if parallel else "pre"


def _falcon_rope(read: Reader) -> Rope | None:
    return None if read("alibi", False) else rope_from_config(read)


def _falcon_attention(read: Reader, row: Attention) -> Attention:
    alibi = Alibi(scaled=True, rounded=True) if read("alibi", False) else None
    return replace(row, alibi=alibi)


def _falcon_model(read: Reader, spec: ModelSpec) -> ModelSpec:
    if spec.blocks[0].layout != "parallel_two":
        return spec
    return replace(spec, names=replace(spec.names, input_norm="ln_attn", mlp_norm="ln_mlp"))


FALCON = Family(
    model_type="falcon",
    title="Falcon 7B, 11B, 40B, 180B, RW",
    keys=frozen(
        hidden_size=("hidden_size", "n_embed"),
        num_hidden_layers=("num_hidden_layers", "n_layer"),
        num_attention_heads=("num_attention_heads", "n_head"),
        num_key_value_heads=(),
        num_kv_heads=("num_kv_heads", "n_head_kv"),
        intermediate_size=("ffn_hidden_size",),
        hidden_act=("activation",),
        rms_norm_eps=("layer_norm_epsilon",),
    ),
    defaults=frozen(
        num_key_value_heads=_falcon_heads,
        intermediate_size=four_times,
        hidden_act="gelu",
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        multi_query=True,
        parallel_attn=True,
        new_decoder_architecture=False,
    ),
    names=_NAMES,
    norm="layer",
    norm_bias=True,
    layout=_falcon_layout,
    qkv="grouped",
    qkv_bias="bias",
    out_bias="bias",
    mlp="plain",
    mlp_bias="bias",
    rope=_falcon_rope,
    of_attention=_falcon_attention,
    of_model=_falcon_model,
)

ROWS = (BLOOM, MPT, FALCON)
