# SPDX-License-Identifier: Apache-2.0
"""GPT-2, GPT-J, GPT-NeoX (Pythia) and OPT: layer norms with biases and MLPs that are not gated."""

from dataclasses import replace

from jqx.models import Attention, BlockKind, ModelSpec, Names

from .common import four_times
from .family import Family, frozen
from .reader import Reader
from .rope import channels, rotated

_SIZES = {
    "hidden_size": ("n_embd", "hidden_size"),
    "num_hidden_layers": ("n_layer", "num_hidden_layers"),
    "num_attention_heads": ("n_head", "num_attention_heads"),
    "num_key_value_heads": (),
    "intermediate_size": ("n_inner",),
    "hidden_act": ("activation_function",),
    "rms_norm_eps": ("layer_norm_epsilon",),
    "max_position_embeddings": ("n_positions",),
}
_DEFAULTS = {
    "intermediate_size": four_times,
    "hidden_act": "gelu_new",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
_GPT = Names(
    embed="transformer.wte",
    positions="transformer.wpe",
    block="transformer.h.{}",
    final_norm="transformer.ln_f",
    input_norm="ln_1",
    qkv="attn.c_attn",
    q="attn.q_proj",
    k="attn.k_proj",
    v="attn.v_proj",
    out="attn.c_proj",
    kept_k="attn.k",
    kept_v="attn.v",
    mlp_norm="ln_2",
    up="mlp.c_fc",
    down="mlp.c_proj",
    buffers=("*.attn.bias", "*.attn.masked_bias"),
)


def _gpt2_layer(read: Reader, kind: BlockKind, i: int) -> BlockKind:
    row = kind.attention
    assert isinstance(row, Attention)
    scale = row.scale if read("scale_attn_weights", True) else 1.0
    by_layer = read("scale_attn_by_inverse_layer_idx", False)
    return replace(kind, attention=replace(row, scale=scale / (i + 1) if by_layer else scale))


def _gpt2_model(read: Reader, spec: ModelSpec) -> ModelSpec:
    return replace(spec, positions=(read("max_position_embeddings"), 0))


GPT2 = Family(
    model_type="gpt2",
    title="GPT-2",
    keys=frozen(**_SIZES),
    defaults=frozen(**_DEFAULTS),
    names=replace(_GPT, prefix="transformer."),
    norm="layer",
    norm_bias=True,
    qkv="stacked",
    qkv_bias=True,
    out_bias=True,
    mlp="plain",
    mlp_bias=True,
    rope=lambda read: None,
    transposed=True,
    of_layer=_gpt2_layer,
    of_model=_gpt2_model,
)

GPTJ = Family(
    model_type="gptj",
    title="GPT-J",
    keys=frozen(**_SIZES),
    defaults=frozen(
        **_DEFAULTS | {"max_position_embeddings": 2048, "tie_word_embeddings": False},
        rotary_dim=64,
    ),
    names=replace(_GPT, out="attn.out_proj", up="mlp.fc_in", down="mlp.fc_out"),
    norm="layer",
    norm_bias=True,
    layout="parallel",
    qkv_bias=False,
    out_bias=False,
    mlp="plain",
    mlp_bias=True,
    rope_pairs="neighbours",
    rotates=lambda read: channels(read, read("rotary_dim"), "rotary_dim"),
    head_bias=True,
)

GPT_NEOX = Family(
    model_type="gpt_neox",
    title="GPT-NeoX, Pythia",
    keys=frozen(
        num_key_value_heads=(),
        rms_norm_eps=("layer_norm_eps",),
        rope_theta=("rotary_emb_base", "rope_theta"),
        partial_rotary_factor=("rotary_pct", "partial_rotary_factor"),
    ),
    defaults=frozen(
        hidden_act="gelu",
        rms_norm_eps=1e-5,
        attention_bias=True,
        partial_rotary_factor=0.25,
        use_parallel_residual=True,
    ),
    names=Names(
        embed="gpt_neox.embed_in",
        block="gpt_neox.layers.{}",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
        qkv="attention.query_key_value",
        k="attention.k_proj",
        v="attention.v_proj",
        out="attention.dense",
        kept_k="attention.k",
        kept_v="attention.v",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        buffers=("*.rotary_emb.inv_freq", "*.attention.bias", "*.attention.masked_bias"),
    ),
    norm="layer",
    norm_bias=True,
    layout=lambda read: "parallel_two" if read("use_parallel_residual") else "pre",
    qkv="grouped",
    mlp="plain",
    mlp_bias=True,
    rotates=rotated,
)


def _opt_model(read: Reader, spec: ModelSpec) -> ModelSpec:
    """A table whose first two rows are no positions; the smallest post-norm model projects."""
    width = read("word_embed_proj_dim") or spec.hidden
    last = read("do_layer_norm_before") and not read("_remove_final_layer_norm", False)
    return replace(
        spec,
        positions=(read("max_position_embeddings") + 2, 2),
        embed_width=None if width == spec.hidden else width,
        final_norm=spec.final_norm if last else None,
    )


OPT = Family(
    model_type="opt",
    title="OPT",
    keys=frozen(
        num_key_value_heads=(),
        intermediate_size=("ffn_dim",),
        hidden_act=("activation_function",),
        initializer_range=("init_std",),
        rms_norm_eps=(),
    ),
    defaults=frozen(
        hidden_act="relu",
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        enable_bias=True,
        do_layer_norm_before=True,
    ),
    names=Names(
        prefix="model.",
        embed="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        project_in="model.decoder.project_in",
        project_out="model.decoder.project_out",
        block="model.decoder.layers.{}",
        final_norm="model.decoder.final_layer_norm",
        input_norm="self_attn_layer_norm",
        attention_end="self_attn_layer_norm",
        out="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        mlp_end="final_layer_norm",
        up="fc1",
        down="fc2",
    ),
    norm="layer",
    norm_bias=True,
    layout=lambda read: "pre" if read("do_layer_norm_before") else "summed",
    qkv_bias="enable_bias",
    out_bias="enable_bias",
    mlp="plain",
    mlp_bias="enable_bias",
    rope=lambda read: None,
    of_model=_opt_model,
)

ROWS = (GPT2, GPTJ, GPT_NEOX, OPT)
