# SPDX-License-Identifier: Apache-2.0
"""Rotary parameters from a config: `rope_parameters`, or the older `rope_theta` beside
`rope_scaling`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jqx import InputError
from jqx.models import Rope

from .reader import Reader

Given = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A rope_type: `needs` are the numbers it must have and `lists` its lists of them, `may` those
    it may have; `rest` are more fields of Rope from them, the context of the model and the length
    it was trained for.
    """

    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    rest: Callable[[Given, Any, Any], dict[str, Any]] = lambda given, context, trained: {}


def _yarn(given: Given, context: int | float, trained: int | float) -> dict[str, Any]:
    def scale(by: int | float) -> float:
        return 0.1 * by * math.log(given["factor"]) + 1.0 if given["factor"] > 1 else 1.0

    magnitude, one, all_ = (given.get(k) for k in ("attention_factor", "mscale", "mscale_all_dim"))
    if magnitude is None:
        magnitude = scale(one) / scale(all_) if one and all_ else scale(1.0)
    return {
        "trained_length": int(trained),
        "magnitude": float(magnitude),
        "beta_fast": float(given.get("beta_fast") or 32),
        "beta_slow": float(given.get("beta_slow") or 1),
        "truncate": bool(given.get("truncate", True)),
    }


def _longrope(given: Given, context: int | float, trained: int | float) -> dict[str, Any]:
    factor = given.get("factor") or context / trained
    magnitude, more = given.get("attention_factor"), {}
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    if given.get("long_mscale") is not None:
        magnitude = given.get("short_mscale") or 1.0
        more = {"long_magnitude": float(given["long_mscale"])}
    return {"trained_length": int(trained), "magnitude": float(magnitude), **more}


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
_YARN = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate")
SCALING: Mapping[str, Scaling] = MappingProxyType(
    {
        "default": Scaling(),
        "linear": Scaling(needs=("factor",)),
        "dynamic": Scaling(needs=("factor",), rest=lambda g, context, t: _trained(context)),
        "llama3": Scaling(needs=_LLAMA3, rest=lambda g, c, trained: _trained(trained)),
        "yarn": Scaling(needs=("factor",), may=_YARN, rest=_yarn),
        "longrope": Scaling(
            may=("factor", "attention_factor", "short_mscale", "long_mscale"),
            lists=("short_factor", "long_factor"),
            rest=_longrope,
        ),
    }
)
"""rope_type -> what it is made of. All may give original_max_position_embeddings."""

_COMMON = ("rope_type", "type", "rope_theta", "original_max_position_embeddings")


def _trained(length: int | float) -> dict[str, Any]:
    return {"trained_length": int(length)}


def rope_from_config(read: Reader, layers: str = "full_attention") -> Rope:
    """The rotary row of a config, of the kind of `layers` where it says more than one.

    Raises InputError for a rope_type that is not defined here, a missing parameter, or one that
    would be ignored.
    """
    where, given = given_rope(read, layers)
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = read.row.rope_types.get(kind, kind)
    if kind not in SCALING:
        known = ", ".join(SCALING)
        raise InputError(
            f"{where} asks for rope_type {kind!r:.60}, which is not supported; known: {known}"
        )
    dims = read.row.rotates(read)
    _check_parameters(where, given, kind, "partial_rotary_factor" in read.seen)
    row, context = SCALING[kind], read("max_position_embeddings")
    pairs = (dims or head_dim(read)) // 2
    for key in row.lists:
        if len(given[key]) != pairs:
            raise InputError(f"{where} has {len(given[key])} numbers {key} for {pairs} pairs")
    top = read("original_max_position_embeddings")
    original = top or given.get("original_max_position_embeddings") or context
    return Rope(
        theta=float(given.get("rope_theta") or read("rope_theta")),
        scaling=kind,
        dims=dims,
        pairs=read.row.rope_pairs,
        **{key: float(given[key]) for key in row.needs},
        **{key: tuple(map(float, given[key])) for key in row.lists},
        **row.rest(given, context, original),
    )


def given_rope(read: Reader, layers: str = "full_attention") -> tuple[str, Given]:
    """Where a config says how it rotates, and what it says of one kind of layers."""
    where = "rope_parameters" if read.config.get("rope_parameters") else "rope_scaling"
    given = read.config.get(where) or {}
    if not isinstance(given, Mapping):
        raise InputError(f"{where} is a {type(given).__name__}, not an object")
    if isinstance(given.get(layers), Mapping):
        given = given[layers]
    return where, given


def rotated(read: Reader) -> int | None:
    """The channels of a head that turn, from the fraction a config gives; None for all of them."""
    _, given = given_rope(read)
    elsewhere = read("partial_rotary_factor")
    fraction = given.get("partial_rotary_factor") or elsewhere or 1.0
    dims = int(head_dim(read) * fraction)
    return channels(read, dims, f"partial_rotary_factor {fraction}")


def channels(read: Reader, dims: int, told: str) -> int | None:
    """The channels of a head that turn, None for all. Raises InputError for numbers that make no
    pairs; `told`: where they come from.
    """
    size = head_dim(read)
    if dims < 2 or dims > size or dims % 2:
        raise InputError(f"{told} makes {dims} of {size} channels of a head turn: no pairs")
    return None if dims == size else dims


def head_dim(read: Reader) -> int:
    """Channels of a head."""
    return read("head_dim") or read("hidden_size") // read("num_attention_heads")


def _check_parameters(where: str, given: Given, kind: str, partial: bool) -> None:
    row = SCALING[kind]
    missing = [key for key in (*row.needs, *row.lists) if given.get(key) is None]
    if missing:
        raise InputError(f"{where} with rope_type {kind!r} lacks {', '.join(missing)}")
    numbers = [key for key in (*row.needs, *row.may, "rope_theta") if given.get(key) is not None]
    wrong = [key for key in numbers if not isinstance(given[key], int | float)]
    if wrong:
        names = ", ".join(f"{key} = {given[key]!r}" for key in wrong)
        raise InputError(f"{where} needs numbers, but has {names}")
    allowed = {*_COMMON, *row.needs, *row.may, *row.lists}
    extra = [key for key in given if key not in allowed and given[key] is not None]
    if partial or given.get("partial_rotary_factor") in (1, 1.0):
        extra = [key for key in extra if key != "partial_rotary_factor"]
    if extra:
        names = ", ".join(f"{key} = {given[key]!r:.60}" for key in extra)
        raise InputError(f"{where} with rope_type {kind!r} has no use for {names}")
