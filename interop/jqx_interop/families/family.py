# SPDX-License-Identifier: Apache-2.0
"""What a family row says: how a config.json of one model_type is read, and what it fixes without
being asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from jqx.models import Names

Flag = bool | str
"""A fact of the family, or the meaning of the config key that decides."""


def _frozen(**pairs: Any) -> Mapping[str, Any]:
    return MappingProxyType(pairs)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model_type. Meanings are the keys of `DEFAULTS`; all rows share them and the tensor names
    of `Names`.

    `keys` renames a meaning to the config keys that carry it here, the first non-null one wins;
    `defaults` are values of absent keys. `windows` is a key of WINDOWS: which layers slide.
    `activations` replaces what a config file says by what the weights were trained with.
    `embedding_scale` is a key of EMBEDDING_SCALES. `folds_rows`: ModelOpt moves the NVFP4 AWQ
    factors of o_proj and down_proj into the rows of the linear before them.
    """

    model_type: str
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=_frozen)
    defaults: Mapping[str, Any] = field(default_factory=_frozen)
    names: Names = field(default_factory=Names)
    norm: str = "rms"
    qk_norm: bool = False
    qkv_bias: Flag = "attention_bias"
    out_bias: Flag = "attention_bias"
    mlp_bias: Flag = False
    windows: str = "never"
    activations: Mapping[str, str] = field(default_factory=_frozen)
    embedding_scale: str = "none"
    folds_rows: bool = False


DEFAULTS: Mapping[str, Any] = _frozen(
    num_key_value_heads=None,  # as many as query heads
    head_dim=None,  # hidden_size / num_attention_heads
    hidden_act="silu",
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    initializer_range=0.02,
    attention_bias=False,
    mlp_bias=False,
    sliding_window=None,
    use_sliding_window=False,
    max_window_layers=28,
    layer_types=None,
)
"""Values of keys a config file may leave out, where the row says nothing else. A null means None
only where None stands here.
"""

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

NEUTRAL: Mapping[str, tuple[Any, ...]] = _frozen(
    alibi=(None, False),
    attention_bias=(None, False),
    attention_multiplier=(None,),
    attn_config=(None,),
    attn_logit_softcapping=(None,),
    block_configs=(None,),
    clip_qkv=(None,),
    embedding_multiplier=(None, 1, 1.0),
    final_logit_softcapping=(None,),
    kv_lora_rank=(None,),
    layer_types=(None,),  # full attention everywhere is let through too
    logit_scale=(None, 1, 1.0),
    logits_scaling=(None, 1, 1.0),
    mlp_bias=(None, False),
    moe_intermediate_size=(None,),
    n_routed_experts=(None,),
    no_rope_layers=(None,),
    num_experts=(None,),
    num_local_experts=(None,),
    parallel_attn=(None, False),
    partial_rotary_factor=(None, 1, 1.0),
    q_lora_rank=(None,),
    qk_layernorm=(None, False),
    quantization_config=(None,),
    query_pre_attn_scalar=(None,),
    residual_multiplier=(None, 1, 1.0),
    rope_local_base_freq=(None,),
    rotary_dim=(None,),
    rotary_pct=(None, 1, 1.0),
    sliding_window=(None,),
    sliding_window_pattern=(None,),
    text_config=(None,),
    use_bidirectional_attention=(None, False),
    use_parallel_residual=(None, False),
    use_qk_norm=(None, False),
    use_sliding_window=(None, False),
    vision_config=(None,),
)
"""Keys that change the arithmetic of some family, and the values that do not. A row that does not
read a key refuses others.
"""
