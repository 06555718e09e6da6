# SPDX-License-Identifier: Apache-2.0
"""What the descriptions of a checkpoint say, whatever wrote them and however damaged they are.

Nothing is raised: a value that makes no sense is a problem told in `Said.problems`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .matching import matcher
from .schemes import AWQ, CT, GPTQ, MIXED, MODELOPT, PLAIN


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Linears that are stored alike: those that `targets` name, `scheme`, and the columns to a
    scale if that is said, -1 for whole rows.
    """

    targets: tuple[str, ...]
    scheme: str
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Said:
    """`layout`: what kind of checkpoint it says to be; `groups`: how which linears are stored;
    `layers`: the same by name, where that is how it is said; `ignored`: patterns of what is left
    alone; `kv`: what keys and values are called; `problems`: (rule, text) of values that make no
    sense.
    """

    layout: str = PLAIN
    groups: tuple[Group, ...] = ()
    layers: Mapping[str, Group] | None = None
    ignored: tuple[str, ...] = ()
    kv: str | None = None
    problems: tuple[tuple[str, str], ...] = ()

    def grouper(self) -> Callable[[str], Group | None]:
        """What says how a linear is stored, before what is ignored is left out."""
        if self.layers is not None:
            return self.layers.get
        means = [(group, matcher(CT, None, group.targets)) for group in self.groups]

        def find(path: str) -> Group | None:
            found = (g for g, names in means if "Linear" in g.targets or names(path, (path,)))
            return next(found, None)

        return find

    @property
    def described(self) -> bool:
        """Whether there is a description at all."""
        return self.layout != PLAIN

    @property
    def understood(self) -> bool:
        """Whether what it says is of a layout that is known here."""
        return self.layout == PLAIN or self.layout in _READERS


@dataclass(frozen=True, slots=True)
class _Reader:
    """Values of a JSON object by kind; those of another kind become problems."""

    said: Mapping[str, Any]
    where: str
    problems: list[tuple[str, str]] = field(default_factory=list)

    def get(self, key: str, kind: type, what: str) -> Any:
        value = self.said.get(key)
        if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
            return value
        self.problems.append(("description", f"{self.where} has {key} {value!r:.60}, no {what}"))
        return None

    def names(self, key: str) -> tuple[str, ...]:
        found = self.get(key, list, "list of names") or []
        if not all(isinstance(name, str) for name in found):
            self.problems.append(("description", f"{self.where} has a {key} with no name in it"))
        return tuple(name for name in found if isinstance(name, str))

    def inside(self, key: str) -> "_Reader":
        found = self.get(key, dict, "object") or {}
        return _Reader(found, f"{key} of {self.where}", self.problems)


INLINE, FILE = "quantization_config in config.json", "hf_quant_config.json"


def read_said(inline: object, file: object) -> Said:
    """What `quantization_config` of config.json and the content of hf_quant_config.json say; both
    may be None.
    """
    problems: list[tuple[str, str]] = []
    given = {}
    for where, value in ((INLINE, inline), (FILE, file)):
        if value is not None and not isinstance(value, dict):
            problems.append(("description", f"{where} is {value!r:.60}, no object"))
        given[where] = value if isinstance(value, dict) else {}
    here, there = (_Reader(value, where, problems) for where, value in given.items())
    if not here.said and not there.said:
        return Said(problems=tuple(problems))
    method = str(here.said.get("quant_method") or MODELOPT).lower()
    layout = MODELOPT if method.startswith(MODELOPT) else method
    read = _READERS.get(layout)
    if read is None:
        return Said(layout=layout, problems=tuple(problems))
    found = read(here, there)
    return Said(**found, layout=layout, problems=tuple(problems))


def _modelopt(here: _Reader, there: _Reader) -> dict[str, Any]:
    inner = [r.inside("quantization") if "quantization" in r.said else r for r in (here, there)]
    mine, file = inner
    algo = _agreed(mine.problems, "quant_algo", mine, file)
    kv = _modelopt_kv(mine), file.get("kv_cache_quant_algo", str, "name")
    if all(inner_.said for inner_ in inner) and _upper(kv[0]) != _upper(kv[1]):
        text = f"{FILE} says KV cache {kv[1]}, and config.json says {kv[0]}"
        mine.problems.append(("descriptions-agree", text))
    ignored = mine.names("ignore") or mine.names("exclude_modules"), file.names("exclude_modules")
    if mine.said and file.said and set(ignored[0]) != set(ignored[1]):
        only = sorted(set(ignored[0]) ^ set(ignored[1]))
        text = f"config.json and {FILE} do not leave the same modules alone: {', '.join(only[:4])}"
        mine.problems.append(("descriptions-agree", text))
    found: dict[str, Any] = {"kv": _upper(kv[0] or kv[1]), "ignored": ignored[0] or ignored[1]}
    if algo is not None and algo.upper() == MIXED:
        layers = mine.inside("quantized_layers")
        layers = layers if layers.said else file.inside("quantized_layers")
        return found | {"layers": _layers(layers)}
    sizes = _size(mine), _group_size(mine), _size(file)
    given = {size for size in sizes if size is not None}
    if len(given) > 1:
        text = f"the descriptions give group_size as {', '.join(map(str, sorted(given)))}"
        mine.problems.append(("descriptions-agree", text))
    if algo is None:
        mine.problems.append(("description", "no quant_algo says how the linears are stored"))
        return found
    size = next((size for size in sizes if size is not None), None)
    return found | {"groups": (Group(targets=("Linear",), scheme=algo.upper(), size=size),)}


def _layers(read: _Reader) -> dict[str, Group]:
    found = {}
    if not read.said:
        read.problems.append(("description", f"{MIXED} without quantized_layers"))
    for path in read.said:
        layer = read.inside(str(path))
        algo = layer.get("quant_algo", str, "name")
        if algo is None:
            read.problems.append(("description", f"quantized_layers has no quant_algo for {path}"))
            continue
        found[str(path)] = Group(targets=(str(path),), scheme=algo.upper(), size=_size(layer))
    return found


def _agreed(problems: list[tuple[str, str]], key: str, mine: _Reader, file: _Reader) -> str | None:
    here, there = mine.get(key, str, "name"), file.get(key, str, "name")
    if mine.said and file.said and _upper(here) != _upper(there):
        text = f"{FILE} says {key} {there}, and config.json says {here}"
        problems.append(("descriptions-agree", text))
    return here or there


def _upper(name: str | None) -> str | None:
    return None if name is None else name.upper()


def _size(read: _Reader) -> int | None:
    size = read.get("group_size", int, "whole number")
    if size is not None and size != -1 and size < 1:
        read.problems.append(("description", f"{read.where} has group_size {size}"))
        return None
    return size


def _group_size(read: _Reader) -> int | None:
    """That of the weights in the only config group."""
    groups = read.inside("config_groups")
    if len(groups.said) != 1:
        return None
    return _size(groups.inside(next(iter(groups.said))).inside("weights"))


KV_SCHEMES = {("float", 8): "FP8", ("int", 8): "INT8", ("float", 4): "NVFP4"}


def _modelopt_kv(read: _Reader) -> str | None:
    scheme = read.said.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        return _kv_scheme(read)
    return read.get("kv_cache_scheme", str, "name") or read.get("kv_cache_quant_algo", str, "name")


def _kv_scheme(read: _Reader) -> str | None:
    scheme = read.get("kv_cache_scheme", dict, "object")
    if not scheme:
        return None
    kind, bits = scheme.get("type"), scheme.get("num_bits")
    if not isinstance(bits, int) or (str(kind), bits) not in KV_SCHEMES:
        text = f"kv_cache_scheme has type {kind!r:.30} and num_bits {bits!r:.30}"
        read.problems.append(("description", text))
        return None
    return KV_SCHEMES[str(kind), bits]


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


def _compressed(here: _Reader, there: _Reader) -> dict[str, Any]:
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
        size = -1 if str(weights.said.get("strategy")) == "channel" else _size(weights)
        scheme = ct_name(weights.said, inputs.said)
        groups.append(Group(targets=targets, scheme=scheme, size=size))
    # exact names come before patterns, and those before the class
    order = sorted(groups, key=lambda g: ("Linear" in g.targets, g.targets[0].startswith("re:")))
    return {"groups": tuple(order), "ignored": here.names("ignore"), "kv": _kv_scheme(here)}


def _awq(here: _Reader, there: _Reader) -> dict[str, Any]:
    bits, version = here.get("bits", int, "whole number"), here.said.get("version", "gemm")
    if str(version).lower() != "gemm":
        here.problems.append(("description", f"version {version!r:.30} of AutoAWQ is not gemm"))
    scheme = f"W{bits if bits is not None else here.said.get('w_bit', 4)}A16"
    group = Group(targets=("Linear",), scheme=scheme, size=_size(here))
    return {"groups": (group,), "ignored": here.names("modules_to_not_convert") or ("lm_head",)}


def _gptq(here: _Reader, there: _Reader) -> dict[str, Any]:
    bits = here.get("bits", int, "whole number")
    scheme = f"W{bits}A16" + ("_ASYM" if here.said.get("sym") is False else "")
    return {"groups": (Group(targets=("Linear",), scheme=scheme, size=_size(here)),)}


_READERS = {MODELOPT: _modelopt, CT: _compressed, AWQ: _awq, GPTQ: _gptq}


def unmatched(said: Said, paths: Sequence[str]) -> list[str]:
    """Targets by name that are no linear of the model."""
    names = {target for group in said.groups for target in group.targets}
    plain = {t for t in names if not t.startswith("re:") and "." in t}
    return sorted((plain | set(said.layers or ())) - set(paths))
