# SPDX-License-Identifier: Apache-2.0
"""Which layers attend through a sliding window, from the config keys each lineage uses."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from jqx import InputError

from .reader import Reader

Windows = tuple[int | None, ...]

LAYER_TYPES = ("full_attention", "sliding_attention")


def _never(read: Reader) -> Windows:
    return (None,) * read("num_hidden_layers")


def _every_layer(read: Reader) -> Windows:
    return (read("sliding_window"),) * read("num_hidden_layers")


def _every_layer_if_used(read: Reader) -> Windows:
    return (_if_used(read),) * read("num_hidden_layers")


def _typed(read: Reader) -> Windows:
    """`layer_types` decides if windows are used, and must be there then: what its absence means
    differs between versions of the code that reads it.
    """
    window = _if_used(read)
    if window is not None and read("layer_types") is None:
        raise InputError(
            f"config sets use_sliding_window for model_type {read.row.model_type!r} without "
            "layer_types, which says where windows are"
        )
    return _by_types(read, window, lambda i: False)


def _from_max_window_layers(read: Reader) -> Windows:
    """`layer_types` decides if given, else layers from max_window_layers on slide, if windows are
    used at all.
    """
    window = _if_used(read)
    first = read("max_window_layers")
    return _by_types(read, window, lambda i: i >= first)


def _by_pattern(read: Reader) -> Windows:
    """`layer_types` decides if given, else all slide but every n-th, n from
    sliding_window_pattern.
    """
    pattern, window = read("sliding_window_pattern"), read("sliding_window")
    if window is None:
        return _by_types(read, None, lambda i: False)
    if isinstance(pattern, str):  # L slides
        return _by_types(read, window, lambda i: pattern[i % len(pattern)] == "L")
    return _by_types(read, window, lambda i: (i + 1) % pattern != 0)


def _every_other(read: Reader) -> Windows:
    """`layer_types` decides if given, else all layers with even numbers slide."""
    return _by_types(read, read("sliding_window"), lambda i: i % 2 == 0)


def _where_used(read: Reader) -> Windows:
    """`layer_types` decides if given and windows are used."""
    window = _if_used(read)
    return _by_types(read, window, lambda i: False)


def _if_used(read: Reader) -> int | None:
    window = read("sliding_window")
    return window if read("use_sliding_window") else None


def _by_types(read: Reader, window: int | None, slides: Callable[[int], bool]) -> Windows:
    types = read.layers("layer_types", LAYER_TYPES)
    if types is None:
        return tuple(window if slides(i) else None for i in range(read("num_hidden_layers")))
    if window is None and "sliding_attention" in types:
        raise InputError(
            "layer_types asks for sliding_attention, "
            "but use_sliding_window and sliding_window give no window"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


WINDOWS: Mapping[str, Callable[[Reader], Windows]] = MappingProxyType(
    {
        "never": _never,
        "every_layer": _every_layer,
        "every_layer_if_used": _every_layer_if_used,
        "every_other": _every_other,
        "typed": _typed,
        "from_max_window_layers": _from_max_window_layers,
        "by_pattern": _by_pattern,
        "where_used": _where_used,
    }
)
"""What a family row calls its pattern -> every layer's window (None: full attention)."""
