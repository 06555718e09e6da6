# SPDX-License-Identifier: Apache-2.0
"""Llama 4: layers that see chunks of the text and turn, between layers that see all and do not, and
experts that read their tokens times a weight.
"""

from dataclasses import replace

from jqx import InputError
from jqx.models import Attention, BlockKind, Mlp, Names, Router

from .experts import mixture, positive
from .family import Family, frozen
from .reader import Reader

_KINDS = ("full_attention", "chunked_attention")
_VISION = ("vision_model.*", "multi_modal_projector.*")


def _sparse(read: Reader, i: int) -> bool:
    """The layers that are listed, else every n-th."""
    listed, step = read("moe_layers"), positive(read, "interleave_moe_layer_step")
    if listed is not None and not isinstance(listed, list):
        raise InputError(f"config has moe_layers {listed!r:.60}, not a list of layers")
    return i in listed if listed is not None else (i + 1) % step == 0


def _layer(read: Reader, kind: BlockKind, i: int) -> BlockKind:
    row, every = kind.attention, positive(read, "no_rope_layer_interval")
    assert isinstance(row, Attention)
    listed = read.layers("no_rope_layers", (0, 1)) if read("no_rope_layers") else None
    turns = bool(listed[i]) if listed is not None else (i + 1) % every != 0
    kinds = read.layers("layer_types", _KINDS)
    chunked = kinds[i] == "chunked_attention" if kinds is not None else turns
    chunk, normed, heated = (
        read(key) for key in ("attention_chunk_size", "use_qk_norm", "attn_temperature_tuning")
    )
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise InputError(f"config has attention_chunk_size {chunk!r:.60}, no positive number")
    heat = float(read("attn_scale")), float(read("floor_scale"))
    row = replace(
        row,
        rope=row.rope if turns else None,
        chunk=chunk if chunked else None,
        unit_eps=kind.norm.eps if normed and turns else None,
        heat=heat if heated and not turns else None,
    )
    return replace(kind, attention=row)


def _dense(read: Reader, row: Mlp) -> Mlp:
    return replace(row, inner=read("intermediate_size_mlp"))


def _shared(read: Reader, each: Mlp) -> Mlp:
    return replace(each, form="gated")


LLAMA4_TEXT = Family(
    model_type="llama4_text",
    title="Llama 4 Scout, Maverick (text)",
    names=Names(
        gate="feed_forward.gate_proj",
        up="feed_forward.up_proj",
        down="feed_forward.down_proj",
        router="feed_forward.router",
        experts="feed_forward.experts",
        expert_gate_up="feed_forward.experts.gate_up_proj",
        expert_down="feed_forward.experts.down_proj",
        shared_gate="feed_forward.shared_expert.gate_proj",
        shared_up="feed_forward.shared_expert.up_proj",
        shared_down="feed_forward.shared_expert.down_proj",
    ),
    defaults=frozen(
        rms_norm_eps=1e-5,
        head_dim=128,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        intermediate_size_mlp=16384,
        num_local_experts=16,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        use_qk_norm=True,
        no_rope_layer_interval=4,
        attention_chunk_size=8192,
        attn_temperature_tuning=True,
        attn_scale=0.1,
        floor_scale=8192,
    ),
    rope_pairs="neighbours",
    of_mlp=_dense,
    experts=mixture(
        lambda read: Router(kind="sigmoid"),
        number="num_local_experts",
        layers=_sparse,
        form="fused_gated",
        store="fused_columns",
        weighs_input=True,
        shared=_shared,
    ),
    of_layer=_layer,
)

LLAMA4 = replace(
    LLAMA4_TEXT,
    model_type="llama4",
    title="Llama 4 Scout, Maverick",
    text="text_config",
    names=replace(
        LLAMA4_TEXT.names,
        embed="language_model.model.embed_tokens",
        block="language_model.model.layers.{}",
        final_norm="language_model.model.norm",
        head="language_model.lm_head",
        carried=_VISION,
    ),
)

ROWS = (LLAMA4_TEXT, LLAMA4)
