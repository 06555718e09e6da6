# SPDX-License-Identifier: Apache-2.0
"""ChatGLM and GLM: neighbouring channels turn together, those of half a head; gate and up are one
linear.
"""

from dataclasses import replace

from jqx.models import BlockKind, ModelSpec, Names, Rope

from .family import Family, frozen
from .reader import Reader
from .rope import head_dim, rotated


def _chatglm_rope(read: Reader) -> Rope:
    return Rope(
        theta=10000.0 * read("rope_ratio", 1.0),
        dims=head_dim(read) // 2,
        pairs="neighbours" if read("original_rope", True) else "halves",
    )


def _chatglm_layer(read: Reader, kind: BlockKind, i: int) -> BlockKind:
    normed = bool(read("apply_residual_connection_post_layernorm", False))
    return replace(kind, normed_residual=normed)


def _chatglm_model(read: Reader, spec: ModelSpec) -> ModelSpec:
    return spec if read("post_layer_norm", True) else replace(spec, final_norm=None)


CHATGLM = Family(
    model_type="chatglm",
    title="ChatGLM2, ChatGLM3, GLM-4 with its own code",
    keys=frozen(
        vocab_size=("padded_vocab_size", "vocab_size"),
        num_hidden_layers=("num_layers", "num_hidden_layers"),
        num_key_value_heads=(),
        intermediate_size=("ffn_hidden_size",),
        head_dim=("kv_channels",),
        hidden_act=(),
        rms_norm_eps=("layernorm_epsilon",),
        max_position_embeddings=("seq_length",),
    ),
    defaults=frozen(
        num_key_value_heads=lambda read: (
            read("multi_query_group_num") if read("multi_query_attention") else None
        ),
        rms_norm_eps=1e-5,
    ),
    names=Names(
        embed="transformer.embedding.word_embeddings",
        block="transformer.encoder.layers.{}",
        final_norm="transformer.encoder.final_layernorm",
        head="transformer.output_layer",
        qkv="self_attention.query_key_value",
        k="self_attention.k_proj",
        v="self_attention.v_proj",
        out="self_attention.dense",
        kept_k="self_attention.k",
        kept_v="self_attention.v",
        gate_up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        buffers=("transformer.rotary_pos_emb.inv_freq",),
    ),
    qkv=lambda read: "stacked" if read("multi_query_attention") else "grouped",
    qkv_bias=lambda read: bool(read("add_qkv_bias")) | bool(read("add_bias_linear")),
    out_bias="add_bias_linear",
    rope=_chatglm_rope,
    mlp="fused_gated",
    mlp_bias="add_bias_linear",
    of_layer=_chatglm_layer,
    of_model=_chatglm_model,
)

GLM = Family(
    model_type="glm",
    title="GLM-4",
    defaults=frozen(
        head_dim=128,
        rms_norm_eps=1.5625e-07,
        max_position_embeddings=131072,
        partial_rotary_factor=0.5,
        attention_bias=True,
    ),
    out_bias=False,
    rope_pairs="neighbours",
    rotates=rotated,
    mlp="fused_gated",
)

GLM4 = replace(
    GLM,
    model_type="glm4",
    title="GLM-4-0414",
    layout="sandwich",
    names=Names(attention_end="post_self_attn_layernorm", mlp_end="post_mlp_layernorm"),
)

ROWS = (CHATGLM, GLM, GLM4)
