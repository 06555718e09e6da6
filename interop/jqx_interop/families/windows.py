# SPDX-License-Identifier: Apache-2.0
"""Which layers attend through a sliding window, from the config keys each lineage uses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jqx import InputError

from .reader import Reader

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Windows:
    """`of_layers` gives every layer's window (None: full attention) from the config keys in
    `reads`.
    """

    of_layers: Callable[[Reader], tuple[int | None, ...]]
    reads: tuple[str, ...] = ()


def _never(read: Reader) -> tuple[int | None, ...]:
    return (None,) * read("num_hidden_layers")


def _every_layer(read: Reader) -> tuple[int | None, ...]:
    return (read("sliding_window"),) * read("num_hidden_layers")


def _from_max_window_layers(read: Reader) -> tuple[int | None, ...]:
    """`layer_types` decides if given, else layers from max_window_layers on slide, if windows are
    used at all.
    """
    layers = read("num_hidden_layers")
    window = read("sliding_window") if read("use_sliding_window") else None
    types = read("layer_types")
    if types is None:
        return tuple(window if i >= read("max_window_layers") else None for i in range(layers))
    unknown = sorted(set(types) - set(LAYER_TYPES))
    if unknown or len(types) != layers:
        known = ", ".join(LAYER_TYPES)
        raise InputError(
            f"layer_types has {len(types)} entries for {layers} layers, "
            f"among them {sorted(set(types))}; known: {known}"
        )
    if window is None and "sliding_attention" in types:
        raise InputError(
            "layer_types asks for sliding_attention, "
            "but use_sliding_window and sliding_window give no window"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


WINDOWS: Mapping[str, Windows] = MappingProxyType(
    {
        "never": Windows(_never),
        "every_layer": Windows(_every_layer, ("sliding_window",)),
        "from_max_window_layers": Windows(
            _from_max_window_layers,
            ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
        ),
    }
)
"""What a family row calls its pattern -> how it is read."""
