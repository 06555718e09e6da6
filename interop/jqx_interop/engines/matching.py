# SPDX-License-Identifier: Apache-2.0
"""How lists of ignored modules are read: once by the layout's own rule, and by every engine that
reads them in its own way.

A matcher is made of the patterns of a list. It is asked for a module as the engine builds it: its
name and those of the linears it is made of. It answers whether the engine leaves it alone, None
where the list splits what the engine makes one matrix of, at which it fails.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import translate

from .schemes import AWQ, CT, GPTQ, MODELOPT

Matcher = Callable[[str, Sequence[str]], bool | None]
Factory = Callable[[Sequence[str]], Matcher]


def any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    """One pattern for several regular expressions; those that are none match nothing."""
    good = []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            continue
        good.append(f"(?:{pattern})")
    return re.compile("|".join(good) or r"(?!)")


def _ancestors(name: str) -> Iterable[str]:
    """The module and those it lies in."""
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(len(parts), 0, -1))


def _together(flags: Sequence[bool]) -> bool | None:
    """What all say; None where they differ, no where there are none."""
    return None if len(set(flags)) > 1 else any(flags)


def by_glob(patterns: Sequence[str]) -> Matcher:
    """ModelOpt's own rule, and TensorRT-LLM's: globs on the module and on what it lies in, any
    linear of a fused one.
    """
    globs = any_of(translate(p) for p in patterns if not p.startswith("re:"))
    regexes = any_of(p[3:] for p in patterns if p.startswith("re:"))

    def match(name: str, linears: Sequence[str]) -> bool:
        asked = (above for path in (*linears, name) for above in _ancestors(path))
        return any(globs.match(above) or regexes.fullmatch(above) for above in asked)

    return match


def _vllm_modelopt(patterns: Sequence[str]) -> Matcher:
    exact, globs = set(patterns), any_of(map(translate, patterns))

    def match(name: str, linears: Sequence[str]) -> bool | None:
        exactly = True if name in exact else _together([path in exact for path in linears])
        if exactly is None or exactly:
            return exactly
        if "experts" in name and any(name in p for p in exact if "experts" in p):
            return True
        return any(p in name for p in exact if p != name) or globs.match(name) is not None

    return match


def _within(pattern: str, name: str) -> bool:
    """Whether a dotted path holds another one as whole parts."""
    return f".{pattern.rstrip('.')}." in f".{name}."


def _sglang_modelopt(patterns: Sequence[str]) -> Matcher:
    globs = any_of(p.replace(".", r"\.").replace("*", ".*") for p in patterns)

    def match(name: str, linears: Sequence[str]) -> bool | None:
        listed = _together([any(_within(p, path) for p in patterns) for path in linears])
        if listed is None or listed:
            return listed
        if "experts" in name and any(name in p for p in patterns):
            return True
        return any(globs.fullmatch(part) for part in (name, *name.split(".")))

    return match


def _compressed(patterns: Sequence[str], *, suffixes: bool = False) -> Matcher:
    """Names and `re:` patterns, for each linear of a fused module."""
    exact = {p for p in patterns if not p.startswith("re:")}
    regexes = any_of(p[3:] for p in patterns if p.startswith("re:"))

    def one(path: str) -> bool:
        ends = suffixes and any(path.endswith("." + p) for p in exact)
        return path in exact or ends or regexes.match(path) is not None

    return lambda name, linears: _together([one(path) for path in linears])


def by_name(patterns: Sequence[str]) -> Matcher:
    """The rule of compressed-tensors: names, modules that it lies in, and `re:` patterns."""
    exact = set(patterns)
    regexes = any_of(p[3:] for p in patterns if p.startswith("re:"))

    def one(path: str) -> bool:
        return any(p in exact for p in _ancestors(path)) or regexes.match(path) is not None

    return lambda name, linears: any(map(one, linears))


def by_part(patterns: Sequence[str]) -> Matcher:
    """The rule of AutoAWQ and its readers: any text within the name."""

    def match(name: str, linears: Sequence[str]) -> bool | None:
        return _together([any(p in path for p in patterns) for path in linears])

    return match


def _own_awq(patterns: Sequence[str]) -> Matcher:
    """The same, but for names in experts whole parts: a router's is part of a linear's there."""
    anywhere = by_part(patterns)

    def match(name: str, linears: Sequence[str]) -> bool | None:
        if ".experts." not in name:
            return anywhere(name, linears)
        return any(_within(p, name) for p in patterns)

    return match


OWN: dict[str, Factory] = {MODELOPT: by_glob, CT: by_name, AWQ: _own_awq, GPTQ: by_name}
"""Layout -> how its lists are meant."""

THEIRS: dict[tuple[str, str], Factory] = {
    (MODELOPT, "vllm"): _vllm_modelopt,
    (MODELOPT, "tpu-vllm"): _vllm_modelopt,
    (MODELOPT, "sglang"): _sglang_modelopt,
    (MODELOPT, "trtllm"): by_glob,
    (CT, "vllm"): _compressed,
    (CT, "tpu-vllm"): _compressed,
    (CT, "transformers"): _compressed,
    (CT, "sglang"): lambda patterns: _compressed(patterns, suffixes=True),
    (CT, "trtllm"): by_glob,
    (AWQ, "vllm"): by_part,
    (AWQ, "sglang"): by_part,
    (AWQ, "tpu-vllm"): by_part,
}
"""(layout, engine) -> how the engine reads them: vLLM 0.32 layers/quantization/modelopt.py
`is_layer_excluded` and compressed_tensors/utils.py, SGLang 0.5.23 layers/quantization/utils.py
`is_layer_skipped` and modelopt_quant.py, TensorRT-LLM models/modeling_utils.py (read, not run).
"""


def matcher(layout: str, engine: str | None, patterns: Sequence[str]) -> Matcher:
    """How `engine` reads a list of a layout; None: how it is meant. Where neither is known, nothing
    is ignored.
    """
    factory = OWN.get(layout) if engine is None else THEIRS.get((layout, engine), OWN.get(layout))
    return factory(patterns) if factory else lambda name, linears: False
