# SPDX-License-Identifier: Apache-2.0
"""What the descriptions of a checkpoint say, whatever wrote them and however damaged they are.

Nothing is raised: a value that makes no sense is a problem told in `Said.problems`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .description_ct import compressed
from .description_int import awq, gptq
from .matching import matcher
from .problem import first
from .reading import Group, Reader, kv_scheme, size_of, upper
from .schemes import AWQ, CT, GPTQ, MIXED, MODELOPT, PLAIN


@dataclass(frozen=True, kw_only=True)
class Said:
    """`layout`: what kind of checkpoint it says to be; `groups`: how which linears are stored;
    `layers`: the same by name, where that is how it is said; `ignored`: patterns of what is left
    alone; `lists`: the two lists of that, where both descriptions have one; `by_tensors`: whether
    engines leave alone what has no codes; `kv`: what keys and values are called; `problems`:
    (rule, text) of values that make no sense.
    """

    layout: str = PLAIN
    groups: tuple[Group, ...] = ()
    layers: Mapping[str, Group] | None = None
    ignored: tuple[str, ...] = ()
    lists: tuple[tuple[str, ...], ...] = ()
    by_tensors: bool = False
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
    here, there = (Reader(value, where, problems) for where, value in given.items())
    if not here.said and not there.said:
        return Said(problems=tuple(problems))
    method = str(here.said.get("quant_method") or MODELOPT).lower()
    layout = MODELOPT if method.startswith(MODELOPT) else method
    read = _READERS.get(layout)
    if read is None:
        return Said(layout=layout, problems=tuple(problems))
    found = read(here, there)
    return Said(**found, layout=layout, problems=tuple(problems))


def _modelopt(here: Reader, there: Reader) -> dict[str, Any]:
    inner = [r.inside("quantization") if "quantization" in r.said else r for r in (here, there)]
    mine, file = inner
    algo = _agreed(mine.problems, "quant_algo", mine, file)
    kv = _modelopt_kv(mine), file.get("kv_cache_quant_algo", str, "name")
    if all(inner_.said for inner_ in inner) and upper(kv[0]) != upper(kv[1]):
        text = f"{FILE} says KV cache {kv[1]}, and config.json says {kv[0]}"
        mine.problems.append(("descriptions-agree", text))
    ignored = mine.names("ignore") or mine.names("exclude_modules"), file.names("exclude_modules")
    found: dict[str, Any] = {"kv": upper(kv[0] or kv[1]), "ignored": ignored[0] or ignored[1]}
    found["lists"] = ignored if mine.said and file.said else ()
    if algo is not None and algo.upper() == MIXED:
        return found | {"layers": _mixed(mine, file)}
    sizes = size_of(mine), _group_size(mine), size_of(file)
    given = {size for size in sizes if size is not None}
    if len(given) > 1:
        text = f"the descriptions give group_size as {', '.join(map(str, sorted(given)))}"
        mine.problems.append(("descriptions-agree", text))
    if algo is None:
        mine.problems.append(("description", "no quant_algo says how the linears are stored"))
        return found
    size = next((size for size in sizes if size is not None), None)
    return found | {"groups": (Group(targets=("Linear",), scheme=algo.upper(), size=size),)}


def _mixed(mine: Reader, file: Reader) -> dict[str, Group]:
    """The linears that both descriptions list, and where they differ."""
    both = [read.inside("quantized_layers") for read in (mine, file)]
    if not any(layers.said for layers in both):
        mine.problems.append(("description", f"{MIXED} without quantized_layers"))
    here, there = map(_layers, both)
    differ = sorted(path for path in {*here, *there} if _differ(here.get(path), there.get(path)))
    if here and there and differ:
        text = f"config.json and {FILE} do not store alike: {first(differ)}"
        mine.problems.append(("descriptions-agree", text))
    return here or there


def _differ(one: Group | None, other: Group | None) -> bool:
    if one is None or other is None:
        return one is not other
    sizes = {one.size, other.size} - {None}
    return one.scheme != other.scheme or len(sizes) > 1


def _layers(read: Reader) -> dict[str, Group]:
    found = {}
    for path in read.said:
        layer = read.inside(str(path))
        algo = layer.get("quant_algo", str, "name")
        if algo is None:
            read.problems.append(("description", f"quantized_layers has no quant_algo for {path}"))
            continue
        found[str(path)] = Group(targets=(str(path),), scheme=algo.upper(), size=size_of(layer))
    return found


def _agreed(problems: list[tuple[str, str]], key: str, mine: Reader, file: Reader) -> str | None:
    here, there = mine.get(key, str, "name"), file.get(key, str, "name")
    if mine.said and file.said and upper(here) != upper(there):
        text = f"{FILE} says {key} {there}, and config.json says {here}"
        problems.append(("descriptions-agree", text))
    return here or there


def _group_size(read: Reader) -> int | None:
    """That of the weights in the only config group."""
    groups = read.inside("config_groups")
    if len(groups.said) != 1:
        return None
    return size_of(groups.inside(next(iter(groups.said))).inside("weights"))


def _modelopt_kv(read: Reader) -> str | None:
    scheme = read.said.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        return kv_scheme(read)
    return read.get("kv_cache_scheme", str, "name") or read.get("kv_cache_quant_algo", str, "name")


_READERS = {MODELOPT: _modelopt, CT: compressed, AWQ: awq, GPTQ: gptq}


def unmatched_targets(said: Said, paths: Sequence[str]) -> list[str]:
    """Targets by name that are no linear of the model."""
    names = {target for group in said.groups for target in group.targets}
    plain = {t for t in names if not t.startswith("re:") and "." in t}
    return sorted((plain | set(said.layers or ())) - set(paths))
