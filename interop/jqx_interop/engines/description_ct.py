# SPDX-License-Identifier: Apache-2.0
"""How compressed-tensors describes a checkpoint."""

from collections.abc import Mapping
from typing import Any

from .reading import Group, Reader, kv_scheme, size_of

CT_NAMES = {
    ("float8 tensor", "float8 tensor"): "FP8",
    ("float8 channel", "float8 tensor"): "FP8",
    ("float8 tensor", "float8 token dynamic"): "FP8_DYNAMIC",
    ("float8 tensor", "float8 tensor dynamic"): "FP8_DYNAMIC",
    ("float8 channel", "float8 token dynamic"): "FP8_DYNAMIC",
    ("float8 tensor", ""): "FP8A16",
    ("float8 channel", ""): "FP8A16",
    ("float8 block", "float8 group dynamic"): "FP8_BLOCK",
    ("int8 tensor", "int8 tensor"): "INT8",
    ("int8 channel", "int8 tensor"): "INT8",
    ("int8 tensor", "int8 token dynamic"): "INT8_DYNAMIC",
    ("int8 channel", "int8 token dynamic"): "INT8_DYNAMIC",
    ("int4 group", ""): "W4A16",
    ("int4 channel", ""): "W4A16",
    ("int4 group asymmetric", ""): "W4A16_ASYM",
    ("int4 channel asymmetric", ""): "W4A16_ASYM",
    ("int8 group", ""): "W8A16",
    ("int8 channel", ""): "W8A16",
    ("float4 tensor_group", "float4 tensor_group dynamic"): "NVFP4",
    ("float4 tensor_group", ""): "NVFP4A16",
    ("float4 group", "float4 group dynamic"): "MXFP4",
    ("float4 group", ""): "MXFP4A16",
    ("float8 group", "float8 group dynamic"): "MXFP8",
}
"""Arguments of weights and inputs in compressed-tensors -> the scheme they are."""


def ct_name(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> str:
    """The scheme of arguments; a text that tells them where they are no scheme here."""
    told = (_told(weights), _told(inputs) if inputs else "")
    return CT_NAMES.get(told, f"{told[0]} weights with {told[1] or 'plain'} inputs")


def _told(said: Mapping[str, Any]) -> str:
    strategy = said.get("strategy") or ("group" if said.get("group_size") else "tensor")
    words = [f"{said.get('type', 'int')}{said.get('num_bits', 8)}", str(strategy)]
    words += ["asymmetric"] if said.get("symmetric") is False else []
    return " ".join(words + (["dynamic"] if said.get("dynamic") else []))


PACKED, INTEGERS = ("pack-quantized", "marlin-24"), ("int-quantized", "naive-quantized")
FLOATS = ("float-quantized", "naive-quantized")
FORMATS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("W4A16", "W4A16_ASYM", "W8A16"), PACKED),
    **dict.fromkeys(("INT8", "INT8_DYNAMIC"), INTEGERS),
    **dict.fromkeys(("FP8", "FP8_DYNAMIC", "FP8A16", "FP8_BLOCK"), FLOATS),
    **dict.fromkeys(("NVFP4", "NVFP4A16"), ("nvfp4-pack-quantized",)),
    **dict.fromkeys(("MXFP4", "MXFP4A16"), ("mxfp4-pack-quantized",)),
    "MXFP8": ("mxfp8-quantized", *FLOATS),
}
"""Scheme -> what its format may be called (compressed-tensors 0.20 config/base.py)."""

MIXTURE = "mixed-precision"
ORDERS = (None, "weight", "static", "group", "dynamic")


def compressed(here: Reader, there: Reader) -> dict[str, Any]:
    """Groups of linears by name, pattern or class, and what is ignored."""
    groups, read = [], here.inside("config_groups")
    if not read.said:
        here.problems.append(("description", f"{here.where} has no config_groups"))
    for name in read.said:
        group = read.inside(str(name))
        weights, inputs = group.inside("weights"), group.inside("input_activations")
        targets = group.names("targets")
        if not weights.said or not targets:
            here.problems.append(
                ("description", f"{name} of config_groups has no weights or no targets")
            )
            continue
        group.patterns(t[3:] for t in targets if t.startswith("re:"))
        _order(weights)
        size = -1 if str(weights.said.get("strategy")) == "channel" else size_of(weights)
        scheme = ct_name(weights.said, inputs.said)
        _format(here, group, scheme)
        groups.append(Group(targets=targets, scheme=scheme, size=size))
    ignored = here.names("ignore")
    here.patterns(name[3:] for name in ignored if name.startswith("re:"))
    # exact names come before patterns, and those before the class
    order = sorted(groups, key=lambda g: ("Linear" in g.targets, g.targets[0].startswith("re:")))
    return {"groups": tuple(order), "ignored": ignored, "kv": kv_scheme(here)}


def _order(weights: Reader) -> None:
    order = weights.said.get("actorder")
    if order not in ORDERS and not isinstance(order, bool):
        weights.problems.append(("description", f"{weights.where} has actorder {order!r:.30}"))


def _format(here: Reader, group: Reader, scheme: str) -> None:
    """Tell of a format that is not the scheme's; that of a group comes before that of all."""
    whole, own = here.get("format", str, "name"), group.get("format", str, "name")
    known = FORMATS.get(scheme)
    if known is None:
        return
    may = " or ".join(known)
    if (own or whole) not in known:
        text = f"{(group if own else here).where} has format {own or whole!r:.40}"
        here.problems.append(("format", f"{text}, and {scheme} is {may}"))
    elif whole is not None and whole != MIXTURE and whole not in _EVERY:
        text = f"{here.where} has format {whole!r:.40}, which is none"
        here.problems.append(("format-name", text))


_EVERY = {name for names in FORMATS.values() for name in names}
