# SPDX-License-Identifier: Apache-2.0
"""A config.json, as a dict, becomes a ModelSpec. What the family does not understand is refused by
name.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from jqx import InputError
from jqx.models import Attention, BlockKind, Mlp, ModelSpec, Norm
from jqx.models.layers import ACTIVATIONS

from . import llama
from .family import Family
from .reader import Reader
from .rope import rope_from_config
from .windows import WINDOWS

FAMILIES: Mapping[str, Family] = MappingProxyType({row.model_type: row for row in llama.ROWS})
"""model_type -> row."""

EMBEDDING_SCALES: Mapping[str, Callable[[Reader], float | None]] = MappingProxyType(
    {"none": lambda _: None, "sqrt_hidden": lambda read: math.sqrt(read("hidden_size"))}
)
"""What embeddings are multiplied by."""


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The model a config.json describes, in the layout of transformers 5 or of earlier versions.

    Raises InputError for an unknown model_type, missing keys, numbers that do not fit together, and
    options that would change the arithmetic but are not supported here.
    """
    try:
        return _spec(config)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"config.json has a value of the wrong kind ({error})") from error


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    row = _row(config)
    read, windows = Reader(row, config), WINDOWS[row.windows]
    flags = [f for f in (row.qkv_bias, row.out_bias, row.mlp_bias) if isinstance(f, str)]
    read.refuse_unread((*flags, *windows.reads))
    read.check_required()
    norm = Norm(kind=row.norm, eps=float(read("rms_norm_eps")))
    attention = _attention(read, norm)
    mlp = Mlp(
        inner=read("intermediate_size"), activation=_activation(read), bias=read.flag(row.mlp_bias)
    )
    layers = windows.of_layers(read)
    kinds = {
        window: BlockKind(attention=replace(attention, window=window), mlp=mlp, norm=norm)
        for window in set(layers)
    }
    return ModelSpec(
        family=row.model_type,
        vocab=read("vocab_size"),
        hidden=read("hidden_size"),
        blocks=tuple(kinds[window] for window in layers),
        final_norm=norm,
        tied=bool(read("tie_word_embeddings")),
        embedding_scale=EMBEDDING_SCALES[row.embedding_scale](read),
        init_range=float(read("initializer_range")),
        names=row.names,
    )


def context_of(config: Mapping[str, Any]) -> int:
    """The most tokens in a sequence that the model a config.json describes was made for.

    Raises InputError if it says no positive number.
    """
    tokens = Reader(_row(config), config)("max_position_embeddings")
    if not isinstance(tokens, int) or tokens < 1:
        raise InputError(f"config.json: max_position_embeddings is {tokens!r}, no positive number")
    return tokens


def _row(config: Mapping[str, Any]) -> Family:
    model_type, known = config.get("model_type"), ", ".join(sorted(FAMILIES))
    if model_type is None:
        raise InputError(f"config has no model_type; known: {known}")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    nearest = difflib.get_close_matches(str(model_type), FAMILIES, n=3)
    hint = f"nearest: {', '.join(nearest)}; " if nearest else ""
    raise InputError(f"unknown model_type {model_type!r}; {hint}known: {known}")


def _attention(read: Reader, norm: Norm) -> Attention:
    hidden, heads = read("hidden_size"), read("num_attention_heads")
    kv_heads = read("num_key_value_heads") or heads
    if heads % kv_heads:
        raise InputError(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    head_dim = read("head_dim") or hidden // heads
    if head_dim % 2 or (read("head_dim") is None and hidden % heads):
        raise InputError(
            f"hidden_size = {hidden} and num_attention_heads = {heads} give no even head_dim; "
            "the config needs head_dim"
        )
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope_from_config(read.config, read("rope_theta"), read("max_position_embeddings")),
        qkv_bias=read.flag(read.row.qkv_bias),
        out_bias=read.flag(read.row.out_bias),
        qk_norm=norm if read.row.qk_norm else None,
    )


def _activation(read: Reader) -> str:
    name = read("hidden_act")
    name = read.row.activations.get(name, name)
    if name not in ACTIVATIONS:
        raise InputError(f"unknown hidden_act {name!r}; known: {', '.join(ACTIVATIONS)}")
    return name
