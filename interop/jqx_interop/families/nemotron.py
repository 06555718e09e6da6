# SPDX-License-Identifier: Apache-2.0
"""Nemotron and Minitron, and the pruned Llamas of Nemotron Super and Ultra, whose layers differ."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jqx import InputError
from jqx.models import Attention, BlockKind, Mlp, Replaced

from .family import Family, frozen
from .llama import LLAMA
from .reader import Reader
from .rope import rotated

NEMOTRON = Family(
    model_type="nemotron",
    title="Nemotron, Minitron",
    keys=frozen(rms_norm_eps=("norm_eps",)),
    defaults=frozen(
        hidden_act="relu2",
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        partial_rotary_factor=0.5,
        initializer_range=0.0134,
    ),
    norm="layer_plus_one",
    norm_bias=True,
    rotates=rotated,
    mlp="plain",
    mlp_bias="mlp_bias",
)

_READ = {
    "attention": ("no_op", "replace_with_linear", "n_heads_in_group"),
    "ffn": ("no_op", "replace_with_linear", "ffn_mult", "intermediate_size", "hidden_act"),
}
_MULTIPLE = 256  # of which inner sizes are


def _part(read: Reader, i: int, name: str) -> Mapping[str, Any]:
    """What the config says of one half of layer `i`. Raises InputError for what is not defined."""
    blocks = read("block_configs")
    layers = read("num_hidden_layers")
    if not isinstance(blocks, list) or len(blocks) != layers:
        raise InputError(f"block_configs is no list of {layers} layers")
    part = blocks[i].get(name) or {}
    for key, value in part.items():
        if key not in _READ[name] and value not in (None, False):
            raise InputError(
                f"block_configs[{i}].{name} sets {key} = {value!r:.60}, which is not supported for "
                f"model_type {read.row.model_type!r}; supported: null"
            )
    return part


def _nas_layer(read: Reader, kind: BlockKind, i: int) -> BlockKind:
    attention, ffn = _part(read, i, "attention"), _part(read, i, "ffn")
    row, mlp = kind.attention, kind.mlp
    assert isinstance(row, Attention)
    assert isinstance(mlp, Mlp)
    if group := attention.get("n_heads_in_group"):
        row = replace(row, kv_heads=row.heads // group)
    inner = ffn.get("intermediate_size")
    if inner is None and ffn.get("ffn_mult") is not None:
        inner = int(2 * ffn["ffn_mult"] * read("hidden_size") / 3)
        inner = -(-inner // _MULTIPLE) * _MULTIPLE
    mlp = replace(mlp, inner=inner or mlp.inner, activation=ffn.get("hidden_act", mlp.activation))
    return replace(kind, attention=_or_less(row, attention), mlp=_or_less(mlp, ffn))


def _or_less(row: Any, part: Mapping[str, Any]) -> Any:
    if part.get("no_op"):
        return None
    return Replaced() if part.get("replace_with_linear") else row


NEMOTRON_NAS = replace(
    LLAMA,
    model_type="nemotron-nas",
    title="Llama-Nemotron Super and Ultra",
    keys=frozen(intermediate_size=(), num_key_value_heads=()),
    defaults=frozen(intermediate_size=_MULTIPLE, num_key_value_heads=None),
    of_layer=_nas_layer,
    folds_rows=False,
)

ROWS = (NEMOTRON, NEMOTRON_NAS)
