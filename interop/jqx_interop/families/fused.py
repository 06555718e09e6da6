# SPDX-License-Identifier: Apache-2.0
"""Relatives of Llama under other names: Qwen of the first generation, Baichuan, InternLM2 and
EXAONE 3.
"""

from dataclasses import replace

from jqx.models import Alibi, Attention, ModelSpec, Names, Rope

from .family import Family, frozen
from .reader import Reader
from .rope import rope_from_config, rotated

_GPT = Names(
    embed="transformer.wte",
    block="transformer.h.{}",
    final_norm="transformer.ln_f",
    input_norm="ln_1",
    qkv="attn.c_attn",
    k="attn.k_proj",
    v="attn.v_proj",
    out="attn.c_proj",
    kept_k="attn.k",
    kept_v="attn.v",
    mlp_norm="ln_2",
    down="mlp.c_proj",
)


def _qwen_rope(read: Reader) -> Rope:
    rope = rope_from_config(read)
    if not read("use_dynamic_ntk", True):
        return rope
    return replace(rope, scaling="doubling", trained_length=read("seq_length", 8192))


def _qwen_attention(read: Reader, row: Attention) -> Attention:
    used, trained = read("use_logn_attn", True), read("seq_length", 8192)
    return replace(row, log_from=trained if used else None)


def _qwen_biased(read: Reader) -> bool:
    return not read("no_bias", True)


# The config counts gate and up together.
QWEN = Family(
    model_type="qwen",
    title="Qwen",
    keys=frozen(
        num_key_value_heads=(),
        head_dim=("kv_channels",),
        hidden_act=(),
        rms_norm_eps=("layer_norm_epsilon",),
        rope_theta=("rotary_emb_base",),
        partial_rotary_factor=("rotary_pct",),
    ),
    defaults=frozen(max_position_embeddings=8192),
    names=replace(_GPT, gate="mlp.w2", up="mlp.w1"),
    qkv="stacked",
    qkv_bias=True,
    out_bias=_qwen_biased,
    rotates=rotated,
    rope=_qwen_rope,
    mlp_bias=_qwen_biased,
    of_attention=_qwen_attention,
    of_mlp=lambda read, row: replace(row, inner=row.inner // 2),
)

BAICHUAN2_VOCAB = 125696


def _baichuan_rope(read: Reader) -> Rope | None:
    """The larger models have no rotary positions; what tells them is their size, or the name of the
    class of the first.
    """
    first = "BaiChuanForCausalLM" in (read("architectures") or ())
    return rope_from_config(read) if first or read("hidden_size") == 4096 else None


def _baichuan_attention(read: Reader, row: Attention) -> Attention:
    return row if row.rope is not None else replace(row, alibi=Alibi())


def _baichuan_model(read: Reader, spec: ModelSpec) -> ModelSpec:
    second = spec.vocab == BAICHUAN2_VOCAB or "z_loss_weight" in read.config
    return replace(spec, unit_head=second)


BAICHUAN = Family(
    model_type="baichuan",
    title="Baichuan, Baichuan2",
    keys=frozen(
        num_key_value_heads=(),
        max_position_embeddings=("max_position_embeddings", "model_max_length"),
    ),
    defaults=frozen(max_position_embeddings=4096),
    names=Names(qkv="self_attn.W_pack"),
    qkv="stacked",
    qkv_bias=False,
    out_bias=False,
    rope=_baichuan_rope,
    of_attention=_baichuan_attention,
    of_model=_baichuan_model,
)

INTERNLM2 = Family(
    model_type="internlm2",
    title="InternLM2",
    names=Names(
        embed="model.tok_embeddings",
        head="output",
        input_norm="attention_norm",
        qkv="attention.wqkv",
        k="attention.k_proj",
        v="attention.v_proj",
        out="attention.wo",
        kept_k="attention.k",
        kept_v="attention.v",
        mlp_norm="ffn_norm",
        gate="feed_forward.w1",
        up="feed_forward.w3",
        down="feed_forward.w2",
    ),
    qkv="grouped",
    qkv_bias="bias",
    out_bias="bias",
)

EXAONE = Family(
    model_type="exaone",
    title="EXAONE 3, 3.5",
    keys=frozen(
        num_hidden_layers=("num_layers", "num_hidden_layers"),
        hidden_act=("activation_function",),
        rms_norm_eps=("layer_norm_epsilon",),
    ),
    defaults=frozen(rms_norm_eps=1e-5),
    names=replace(
        _GPT,
        q="attn.attention.q_proj",
        k="attn.attention.k_proj",
        v="attn.attention.v_proj",
        out="attn.attention.out_proj",
        kept_k="attn.attention.k",
        kept_v="attn.attention.v",
        gate="mlp.c_fc_0",
        up="mlp.c_fc_1",
        buffers=("*.rotary.inv_freq", "*.rotary_emb.inv_freq"),
    ),
    qkv_bias=False,
    out_bias=False,
)

ROWS = (QWEN, BAICHUAN, INTERNLM2, EXAONE)
