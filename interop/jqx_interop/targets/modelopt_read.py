# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's two descriptions, in any of the forms they have, become one statement.

Either file may be missing; what both say must agree. They come from strangers, so nothing about
their values is taken for granted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jqx.errors import InputError

METHOD = "modelopt"
MIXED = "MIXED_PRECISION"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """What is said about linears: the algorithm, and how many values share a scale if that is said
    too.
    """

    algo: str
    block: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stated:
    """What the descriptions say: `layer` about every linear that no pattern of `ignored` matches,
    or `layers` about those it names. `kv`: what the cache is called, None for one left alone.
    """

    layer: Layer | None = None
    layers: Mapping[str, Layer] | None = None
    ignored: tuple[str, ...] = ()
    kv: str | None = None


def read_stated(inline: object, file: object) -> Stated | None:
    """What `quantization_config` of config.json (`inline`) and the content of hf_quant_config.json
    (`file`) say; None where both are None.

    Raises InputError for descriptions of another layout, for values of a wrong kind, and where the
    two contradict each other.
    """
    if inline is None and file is None:
        return None
    here = _object(inline, "quantization_config")
    method = here.get("quant_method")
    here = _object(here.get("quantization", here), "quantization_config")
    if here and not str(method or (METHOD if "quant_algo" in here else None)).startswith(METHOD):
        raise InputError(
            f"its quantization_config is of quant_method {method!r}, and only {METHOD}, "
            "compressed-tensors, awq and gptq are read; give the original checkpoint or such an "
            "export of it"
        )
    there = _object(file, "hf_quant_config.json")
    there = _object(there.get("quantization", there), "quantization in hf_quant_config.json")
    name = _agreed("quant_algo", _text(there, "quant_algo"), _text(here, "quant_algo"))
    kv = _agreed("KV cache", _text(there, "kv_cache_quant_algo"), _kv_scheme(here))
    if there.get("has_zero_point") or here.get("has_zero_point"):
        raise InputError("codes with zero points are not read, only symmetric ones")
    if name == MIXED:
        layers = _object(there.get("quantized_layers") or here.get("quantized_layers"), MIXED)
        named = {str(path): _layer(layer, str(path)) for path, layer in layers.items()}
        return Stated(layers=named, kv=kv)
    ignored = _patterns(there.get("exclude_modules"), here.get("ignore"))
    layer = None if name is None else Layer(algo=name, block=_block(there) or _block(here))
    return Stated(layer=layer, ignored=ignored, kv=kv)


def _kv_scheme(inline: Mapping[str, Any]) -> str | None:
    scheme = inline.get("kv_cache_scheme")
    if not isinstance(scheme, Mapping):
        return _text(inline, "kv_cache_scheme") or _text(inline, "kv_cache_quant_algo")
    kinds: dict[Any, str] = {("float", 8): "FP8", ("int", 8): "INT8", ("float", 4): "NVFP4"}
    kind = (scheme.get("type"), scheme.get("num_bits"))
    if not all(isinstance(part, str | int) for part in kind) or kind not in kinds:
        raise InputError(f"kv_cache_scheme has type {kind[0]!r} and num_bits {kind[1]!r}")
    return kinds[kind]


def _layer(value: object, path: str) -> Layer:
    layer = _object(value, f"quantized_layers of {path}")
    if (algo := _text(layer, "quant_algo")) is None:
        raise InputError(f"quantized_layers has no quant_algo for {path}")
    return Layer(algo=algo, block=_block(layer))


def _block(said: Mapping[str, Any]) -> int | None:
    """The group_size of a description, or of the weights of its only config group."""
    size = said.get("group_size")
    groups = said.get("config_groups")
    if size is None and isinstance(groups, Mapping) and len(groups) == 1:
        (group,) = groups.values()
        weights = group.get("weights") if isinstance(group, Mapping) else None
        size = weights.get("group_size") if isinstance(weights, Mapping) else None
    if size in (None, 0, -1):
        return None
    if type(size) is not int or size < 1:
        raise InputError(f"group_size is {size!r}, not a positive whole number")
    return size


def _patterns(*lists: object) -> tuple[str, ...]:
    """The first list that is there."""
    found = next((value for value in lists if value is not None), [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise InputError("the list of modules that are left alone is no list of names")
    return tuple(found)


def _agreed(what: str, file: str | None, inline: str | None) -> str | None:
    if file is not None and inline is not None and file.upper() != inline.upper():
        raise InputError(
            f"hf_quant_config.json says {what} {file}, and config.json says {inline}; "
            "they are not of one checkpoint"
        )
    return file or inline


def _object(value: object, what: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{what} holds a {type(value).__name__}, not an object")
    return value


def _text(said: Mapping[str, Any], key: str) -> str | None:
    value = said.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{key} is {value!r}, not a name")
    return value
