# SPDX-License-Identifier: Apache-2.0
"""Which parameters of a function a configuration is about: rules meet what `axes` has read.

A parameter in a product is of kind "linear", one that is looked up is an "embedding"; a tied one is
both. Named activations `PATH.k` and `PATH.v` are the keys and values of the "attention" at PATH.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from .algorithms.table import check_applicable, needed
from .config import (
    INPUT_FORMATS,
    KEEP,
    KV_FORMATS,
    Algorithm,
    Choice,
    QuantConfig,
    Rule,
    base_format,
    check_names,
    resolve,
)
from .errors import InputError
from .formats import FORMATS, find_format
from .globs import covers
from .modelopt_config import read_config
from .recipes import RECIPES, find_recipe
from .steps import check_steps
from .transforms import Axes

KINDS_OF = {
    "dot": "linear",
    "ragged_dot": "linear",
    "conv": "linear",
    "gather": "embedding",
}
"""Op of a use -> kind of rule."""

WORDS = {"linear": "multiplied with an activation", "embedding": "looked up"}
"""Kind of rule -> what such a parameter is."""

RECIPE_RULES = {rule for recipe in RECIPES.values() for rule in recipe.config.rules}
"""Rules for many families: of these some match nothing in any one model."""


def config_of(cfg: Any) -> QuantConfig:
    """A configuration, or that of the recipe with this name, of ModelOpt's dictionary, or of what
    `to_json` writes. Raises InputError for another name or another type, of it or of something in
    it.
    """
    if isinstance(cfg, str):
        return find_recipe(cfg).whole
    if isinstance(cfg, Mapping) and ("quant_cfg" in cfg or "rules" in cfg):
        return read_config(cfg)
    if not isinstance(cfg, QuantConfig):
        raise InputError(
            f"{type(cfg).__name__} is no configuration: give a QuantConfig, or the name of a recipe"
            ', or a mapping with "rules" or with the "quant_cfg" of ModelOpt'
        )
    if not isinstance(cfg.rules, tuple | list):
        raise InputError(f"rules is a {type(cfg.rules).__name__}: give a tuple, rules=(Rule(...),)")
    for rule in cfg.rules:
        if not isinstance(rule, Rule):
            raise InputError(f"{rule!r} among the rules is no Rule: write Rule(path_glob=...)")
        check_names(rule)
    return check_steps(cfg)


MOMENTS = ("block_gram", "root")
"""Kinds of statistics that follow from all second moments, "gram"."""


def wanted_kinds(choice: Choice, steps: tuple[Algorithm, ...]) -> tuple[str, ...]:
    """The kinds of statistics of its inputs that a parameter with this choice needs."""
    found = dict.fromkeys(("amax",) if choice.static_input and steps else ())
    if choice.weight is not None:
        asked = needed(steps, find_format(choice.weight))
        found |= dict.fromkeys("gram" if kind in MOMENTS else kind for kind in asked)
    return tuple(found)


def choose(
    config: QuantConfig, seen: Mapping[str, Axes], names: Iterable[str] = ()
) -> dict[str, Choice]:
    """What is chosen for each parameter that gets a format, by path in the order of `seen`; `names`
    are the named activations.

    Raises InputError if nothing is chosen, for a rule that matches nothing, and for a parameter
    that is chosen and cannot be stored so.
    """
    check_rules(config, seen, list(names))
    chosen = {}
    for path, axes in seen.items():
        choice = _choice(config, path, axes)
        if choice is not None:
            _check(path, axes, choice)
            chosen[path] = choice
    if not chosen and not kept(config, names):
        raise InputError(
            f"No parameter gets a format; there are {_some(p for p in seen if kinds(seen[p]))}. "
            'Add a rule such as Rule(path_glob="*kernel", weight="int8")'
        )
    check_applicable(config.steps, (c.weight for c in chosen.values() if c.weight is not None))
    return chosen


def kinds(axes: Axes) -> tuple[str, ...]:
    """The kinds of rules that are about a parameter; none for a vector that is no matrix."""
    found = dict.fromkeys(KINDS_OF[op] for op in axes.ops if op in KINDS_OF)
    if axes.problem is not None and sum(n > 1 for n in axes.shape) > 1:
        return tuple(found) or ("linear",)
    return tuple(found) if axes.is_matrix else ()


def kept(config: QuantConfig, names: Iterable[str]) -> dict[str, str]:
    """The format of keys and values by the name of the activation, where `config` gives one."""
    found = {}
    for name in names:
        path, _, letter = name.rpartition(".")
        kv = resolve(config, path, "attention").kv if letter in ("k", "v") and path else None
        if kv is not None:
            if KV_FORMATS[kv].affine:
                raise InputError(
                    f"{name}: {kv} depends on the order of batches and is for checkpoints "
                    "(ji.ptq): choose fp8 or nvfp4"
                )
            found[name] = kv
    return found


def _choice(config: QuantConfig, path: str, axes: Axes) -> Choice | None:
    """What is chosen for one parameter, None if nothing is."""
    by_kind = {kind: resolve(config, path, kind) for kind in kinds(axes)}
    if list(by_kind) == ["embedding"]:  # the inputs of a lookup are numbers of rows
        by_kind["embedding"] = replace(by_kind["embedding"], input=None)
    choices = list(by_kind.values())
    if not any(c.weight or c.input or c.output for c in choices):
        return None
    if len({c.weight for c in choices}) > 1:
        told = ", ".join(f"{c.weight or 'none'} as {kind}" for kind, c in by_kind.items())
        raise InputError(
            f"{path} is multiplied and looked up, and gets {told}: one array has one format. "
            f'Leave it out with Rule(path_glob="{path}", weight=None, input=None), give both uses '
            "one (a rule without kind), or untie the head"
        )
    return by_kind.get("linear", choices[0])


def _check(path: str, axes: Axes, choice: Choice) -> None:
    """Raises InputError if a parameter cannot be what was chosen."""
    problem = axes.problem or _misfit(axes, choice)
    if problem is not None:
        other = _smaller(axes, choice) if axes.problem is None else ""
        out = f'{other}leave it out with Rule(path_glob="{path}", weight=None, input=None)'
        raise InputError(f"{path} {axes.shape} {problem}: {out}")
    if choice.output is not None:
        raise InputError(f"{path}: formats of outputs ({choice.output}) are not implemented")


def _misfit(axes: Axes, choice: Choice) -> str | None:
    """What is wrong with these formats for a parameter of this shape, None if nothing is."""
    k = _inputs(axes)
    inputs = f"has {k} inputs along {_axes(axes.contracted)}"
    if choice.weight is not None:
        fmt, members = find_format(choice.weight), math.prod(axes.shape[a] for a in axes.stack)
        block, rows = fmt.block[1], math.prod(axes.shape) // max(k * members, 1)
        if block is not None and not fmt.ragged and k % block:
            return f"{inputs}, and {fmt.name} shares one scale over {block}"
        if fmt.packing == "rows" and rows % 2:
            return f"has {rows} rows, and {fmt.name} packs pairs of them"
    if choice.input is not None:
        shared, block = FORMATS[INPUT_FORMATS[choice.input].format].block
        if "conv" in axes.ops and (shared, block) != (None, None):
            wrong = f"and {choice.input} shares them otherwise"
            return f"is the kernel of a convolution, whose inputs have one scale, {wrong}"
        if k % (block or 1):
            return f"{inputs}, and {choice.input} quantizes {block} of them together"
    return None


def _inputs(axes: Axes) -> int:
    return math.prod(axes.shape[a] for a in axes.contracted)


def _smaller(axes: Axes, choice: Choice) -> str:
    """A format with blocks that divide the inputs, in words."""
    block = None if choice.weight is None else find_format(choice.weight).block[1]
    fits = math.gcd(_inputs(axes), block or 1)
    if choice.weight is None or fits < 16 or fits == block:
        return ""
    return f"take {base_format(choice.weight)}_b{fits}, or "


def _axes(axes: tuple[int, ...]) -> str:
    return ("axis " if len(axes) == 1 else "the axes ") + ", ".join(map(str, axes))


def check_rules(config: QuantConfig, seen: Mapping[str, Axes], names: list[str]) -> None:
    """Raises InputError for a rule that somebody wrote and that matches nothing."""
    attentions = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    for rule in config.rules:
        if rule.optional or rule in RECIPE_RULES:
            continue
        where = _candidates(rule, seen, attentions)
        if not any(covers(rule.path_glob, path) for path in where):
            near = difflib.get_close_matches(rule.path_glob.replace("/", "."), where, n=3, cutoff=0)
            told = f"the nearest paths are {', '.join(near)}" if near else _none_of(rule)
            raise InputError(f"The rule for {rule.path_glob!r} matches nothing; {told}")


def _candidates(rule: Rule, seen: Mapping[str, Axes], attentions: list[str]) -> list[str]:
    """The paths that a rule may be about."""
    if _about_attention(rule):
        return attentions
    gives = isinstance(rule.weight, str) or isinstance(rule.input, str)
    return [
        path
        for path, axes in seen.items()
        if (rule.kind is None or rule.kind in kinds(axes)) and (kinds(axes) or not gives)
    ] + (attentions if rule.kv is not KEEP else [])


def _about_attention(rule: Rule) -> bool:
    others = (rule.weight, rule.input, rule.output)
    return rule.kind == "attention" or (rule.kv is not KEEP and all(v is KEEP for v in others))


def _none_of(rule: Rule) -> str:
    """Why there are no paths that a rule may be about."""
    if _about_attention(rule):
        return (
            "no keys and values have names: give them some with checkpoint_name(k, "
            '"PATH.k") and checkpoint_name(v, "PATH.v")'
        )
    return f"no parameter is {WORDS.get(rule.kind or '', 'multiplied or looked up')}"


def _some(paths: Iterable[str]) -> str:
    paths = list(paths)
    more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
    return (", ".join(paths[:8]) or "none that a product uses") + more
