# SPDX-License-Identifier: Apache-2.0
"""A config.json, as a dict, becomes a ModelSpec. What the family does not understand is refused by
name.
"""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jqx import InputError
from jqx.models import Attention, BlockKind, Experts, Mlp, ModelSpec, Norm
from jqx.models.layers import ACTIVATIONS

from .experts import check_experts
from .family import Family
from .reader import Reader
from .rope import head_dim
from .table import FAMILIES
from .windows import WINDOWS


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The model a config.json describes, in the layout of transformers 5 or of earlier versions.

    Raises InputError for an unknown model_type, missing keys, numbers that do not fit together, and
    options that would change the arithmetic but are not supported here.
    """
    try:
        return _spec(config)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError, KeyError) as error:
        raise InputError(f"config.json has a value of the wrong kind ({error})") from error


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    read = reader_of(config)
    read.check_required()
    row = read.row
    norm = Norm(kind=row.norm, eps=float(read("rms_norm_eps")), bias=row.norm_bias)
    blocks = _blocks(read, norm)
    spec = ModelSpec(
        family=row.model_type,
        vocab=read("vocab_size"),
        hidden=read("hidden_size"),
        blocks=blocks,
        final_norm=norm,
        tied=bool(read("tie_word_embeddings")),
        head_bias=row.head_bias,
        init_range=float(read("initializer_range")),
        names=row.names,
    )
    spec = row.of_model(read, spec)
    read.refuse_unread()
    return spec


def context_of(config: Mapping[str, Any]) -> int:
    """The most tokens in a sequence that the model a config.json describes was made for.

    Raises InputError if it says no positive number.
    """
    tokens = reader_of(config)("max_position_embeddings")
    if not isinstance(tokens, int) or tokens < 1:
        raise InputError(f"config.json: max_position_embeddings is {tokens!r}, no positive number")
    return tokens


def reader_of(config: Mapping[str, Any]) -> Reader:
    """The reader of a config, or of what it says of text. Raises InputError as `family_of`, and
    where it says nothing of text.
    """
    row = family_of(config)
    if row.text is None:
        return Reader(row, config)
    inner = config.get(row.text)
    if not isinstance(inner, Mapping):
        raise InputError(f"config of model_type {row.model_type!r} has no object {row.text}")
    outer = {key: config[key] for key in ("quantization_config",) if key in config}
    return Reader(row, {**inner, **outer})


def family_of(config: Mapping[str, Any]) -> Family:
    """The row of a config. Raises InputError, with the nearest names, where there is none."""
    model_type, known = config.get("model_type"), ", ".join(sorted(FAMILIES))
    if model_type is None:
        raise InputError(f"config has no model_type; known: {known}")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    nearest = difflib.get_close_matches(str(model_type), FAMILIES, n=3)
    hint = f"nearest: {', '.join(nearest)}; " if nearest else ""
    raise InputError(f"unknown model_type {model_type!r}; {hint}known: {known}")


def _blocks(read: Reader, norm: Norm) -> tuple[BlockKind, ...]:
    """One kind a layer; equal ones are one object."""
    row = read.row
    mlp = Mlp(
        inner=read("intermediate_size"),
        activation=_activation(read),
        bias=read.flag(row.mlp_bias),
        form=row.mlp,
    )
    kind = BlockKind(
        attention=row.of_attention(read, _attention(read, norm)),
        mlp=row.of_mlp(read, mlp),
        norm=norm,
        layout=read.of(row.layout),
        transposed=row.transposed,
    )
    known: dict[BlockKind, BlockKind] = {}
    blocks = []
    for i, window in enumerate(WINDOWS[row.windows](read)):
        assert isinstance(kind.attention, Attention)
        found = replace(kind, attention=replace(kind.attention, window=window))
        if isinstance(kind.mlp, Mlp):
            found = replace(found, mlp=row.experts(read, kind.mlp, i))
        found = row.of_layer(read, found, i)
        if isinstance(found.mlp, Experts):
            check_experts(read, found.mlp)
        blocks.append(known.setdefault(found, found))
    return tuple(blocks)


def _attention(read: Reader, norm: Norm) -> Attention:
    hidden, heads = read("hidden_size"), read("num_attention_heads")
    kv_heads = read("num_key_value_heads") or heads
    if heads % kv_heads:
        raise InputError(
            f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        )
    size, rope = head_dim(read), read.row.rope(read)
    if (rope is not None and size % 2) or (read("head_dim") is None and hidden % heads):
        raise InputError(
            f"hidden_size = {hidden} and num_attention_heads = {heads} give no even head_dim; "
            "the config needs head_dim"
        )
    over = read.of(read.row.qk_norm)
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        scale=size**-0.5,
        rope=rope,
        qkv=read.of(read.row.qkv),
        qkv_bias=read.flag(read.row.qkv_bias),
        out_bias=read.flag(read.row.out_bias),
        qk_norm=None if over is None else replace(norm, bias=read.row.qk_norm_bias),
        qk_norm_of=over or "head",
    )


def _activation(read: Reader) -> str:
    name = read("hidden_act")
    name = read.row.activations.get(name, name)
    if name not in ACTIVATIONS:
        raise InputError(f"unknown hidden_act {name!r}; known: {', '.join(ACTIVATIONS)}")
    return name
