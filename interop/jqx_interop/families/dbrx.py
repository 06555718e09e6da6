# SPDX-License-Identifier: Apache-2.0
"""DBRX: what it says of attention and of experts is in configs of their own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jqx import InputError
from jqx.models import Attention, Experts, Mlp, Names, Rope, Router

from .family import Family, frozen
from .reader import Reader

_FIXED: Mapping[str, tuple[Any, ...]] = {"ffn_act_fn": ({"name": "silu"}, None)}
"""Keys of `ffn_config` -> the values that are defined here."""


def _inside(read: Reader, name: str, key: str, default: Any) -> Any:
    """The value of `key` in the config inside called `name`."""
    given = read(name) or {}
    if not isinstance(given, Mapping):
        raise InputError(f"{name} is a {type(given).__name__}, not an object")
    return given.get(key, default)


def _size(read: Reader, name: str, key: str, default: int) -> int:
    value = _inside(read, name, key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config needs positive integers, but has {name} {key} = {value!r:.60}")
    return value


def _attention(read: Reader, row: Attention) -> Attention:
    clip = _inside(read, "attn_config", "clip_qkv", None)
    return replace(row, clip=None if clip is None else float(clip))


def _experts(read: Reader, mlp: Mlp, i: int) -> Experts:
    for key, known in _FIXED.items():
        if (value := _inside(read, "ffn_config", key, None)) not in known:
            raise InputError(
                f"config sets {key} = {value!r:.60} in ffn_config, not supported for model_type "
                f"'dbrx'; supported: {known[0]!r}"
            )
    power = _inside(read, "ffn_config", "moe_normalize_expert_weights", 1.0)
    return Experts(
        number=_size(read, "ffn_config", "moe_num_experts", 4),
        top_k=_size(read, "ffn_config", "moe_top_k", 1),
        each=mlp,
        router=Router(kind="softmax", power=None if power is None else float(power)),
        store="flat",
    )


DBRX = Family(
    model_type="dbrx",
    title="DBRX",
    keys=frozen(
        hidden_size=("d_model",),
        num_hidden_layers=("n_layers",),
        num_attention_heads=("n_heads",),
        num_key_value_heads=(),
        intermediate_size=(),
        hidden_act=(),
        rms_norm_eps=(),
        max_position_embeddings=("max_seq_len",),
    ),
    defaults=frozen(
        num_key_value_heads=lambda read: _size(read, "attn_config", "kv_n_heads", 1),
        intermediate_size=lambda read: _size(read, "ffn_config", "ffn_hidden_size", 3584),
        rms_norm_eps=1e-5,
    ),
    names=Names(
        embed="transformer.wte",
        block="transformer.blocks.{}",
        final_norm="transformer.norm_f",
        input_norm="norm_attn_norm.norm_1",
        mlp_norm="norm_attn_norm.norm_2",
        qkv="norm_attn_norm.attn.Wqkv",
        k="norm_attn_norm.attn.k_proj",
        v="norm_attn_norm.attn.v_proj",
        out="norm_attn_norm.attn.out_proj",
        kept_k="norm_attn_norm.attn.k",
        kept_v="norm_attn_norm.attn.v",
        router="ffn.router.layer",
        experts="ffn.experts",
        expert_gate="ffn.experts.mlp.w1",
        expert_up="ffn.experts.mlp.v1",
        expert_down="ffn.experts.mlp.w2",
    ),
    norm="layer",
    qkv="stacked",
    qkv_bias=False,
    out_bias=False,
    rope=lambda read: Rope(theta=float(_inside(read, "attn_config", "rope_theta", 10000.0))),
    of_attention=_attention,
    experts=_experts,
)

ROWS = (DBRX,)
