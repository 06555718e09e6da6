# SPDX-License-Identifier: Apache-2.0
"""auto_quantize: every linear of any function of parameters gets the format that it loses least
with, within a budget of bits.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import jax

from jqx.api import quantize
from jqx.calibration.run import calibrate
from jqx.config import QuantConfig
from jqx.errors import InputError, nearest
from jqx.recipes import RECIPES, find_recipe
from jqx.selection import choose, config_of
from jqx.tensors import QTensor
from jqx.tensors.paths import named_leaves
from jqx.transforms.axes import Axes, axes
from jqx.transforms.decoding import is_stored
from jqx.transforms.interpret import PRODUCTS

from .keywords import Request, request_of
from .mixing import NONE, Mixable, mixed, part_of, takes_part
from .sensitivity import METHODS, Task, method_of
from .ways import BIT_COUNTS, Counted, bits_way

LEAF = r"(?P<leaf>(\.[^.]+)?)"
TOGETHER = (
    re.compile(rf"(?P<parent>.*\.)?(q_proj|k_proj|v_proj){LEAF}"),
    re.compile(rf"(?P<parent>.*\.)?(query|key|value){LEAF}"),
    re.compile(rf"(?P<parent>.*\.)?(gate_proj|up_proj){LEAF}"),
    re.compile(rf"(?P<parent>.*\.)?(w1|w3){LEAF}"),
    re.compile(r"(?P<parent>.*\.experts)\.\d+\..+(?P<leaf>)"),
)
"""Names of parameters that choose together where they have one parent: what reads one input, and
experts. (ModelOpt 0.47, and the names of Flax.)
"""


@dataclass(frozen=True, kw_only=True)
class AutoQuantized:
    """A choice of formats. `params`: those of the function with QTensors, for `jqx.quantized`;
    `config`: the rules that quantize so; `choices`: path -> recipe or "none"; `scores`: group, by
    its first member -> recipe -> what the function loses; `score`: the sum of the choice; `bits`: a
    weight, by way of counting; `loss`: the mean of the batches (of method "gradient"); `curve`:
    (bits, score) of all budgets. `within` chooses for another budget from the same scores.
    """

    params: Any
    config: QuantConfig
    choices: dict[str, str]
    scores: dict[str, dict[str, float]]
    score: float
    bits: dict[str, float]
    loss: float | None
    curve: tuple[tuple[float, float], ...]
    within: Callable[[float], "AutoQuantized"]


def auto_quantize(  # noqa: PLR0913  a contract
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    loss_fn: Callable[..., Any] | None = None,
    formats: Sequence[QuantConfig | Mapping[str, Any] | str] = ("nvfp4", "fp8"),
    bits: float = 4.8,
    method: str = "gradient",
    **more: Any,
) -> AutoQuantized:
    """The choice among `formats` (recipes, configurations, ModelOpt's dictionaries) or none, for
    every linear of `apply_fn(params, *batch)`, that loses least within `bits` a weight.

    `batches` as in `jqx.calibrate`: every format is calibrated and scored on all of them.
    `loss_fn(outputs, *batch)` is a scalar, and needed for the method "gradient", ModelOpt's
    default: the sum of (dL/dy * change of y)^2 over the outputs y of a linear. "fisher" and "kl"
    take outputs as logits, with the vocabulary last, and need no loss: they estimate, or measure,
    the KL divergence of the predictions. Linears that read one input, and experts, choose together.

    `more`: `count`, "modelopt" (nominal bits, and 16 for what nobody may quantize) or "quantizable"
    (bits as stored, of the linears that may be quantized); `disabled_layers`, globs of parameters
    that stay as they are. ModelOpt's names work too: `constraints={"effective_bits": 4.8,
    "cost_model": ..., "cost": {...}}`, the older `auto_quantize_bits`, `quantization_formats`,
    `method="kl_div"`, `num_calib_steps` and `num_score_steps`, batches that are used.

    Raises InputError for fewer bits than can be reached, with the least; for a loss that is no
    scalar or no number; for formats that are none; and as `calibrate` and `quantize` do.
    """
    asked = request_of({"formats": tuple(formats), "bits": bits}, more)
    method, found = method_of(method), [b if type(b) is tuple else (b,) for b in batches]
    if not found:
        raise InputError("there are no batches: scores need at least one")
    told = axes(apply_fn, params, *found[0])
    data = found[: asked.num_calib_steps]
    sources = [_source(apply_fn, params, data, told, given) for given in asked.formats]
    candidates = [candidate for candidate, _ in sources]
    groups = _groups(candidates, told, asked.disabled_layers)
    stored = {p: {c.name: qs[p] for c, qs in sources} for group in groups for p in group}
    task = Task(
        apply_fn=apply_fn,
        loss_fn=loss_fn,
        params=params,
        batches=found[: asked.num_score_steps],
        groups=groups,
        stored=stored,
    )
    scores, loss = METHODS[method](task)
    scored = _Scored(
        method=method,
        params=params,
        candidates=candidates,
        groups=groups,
        stored=stored,
        axes=told,
        scores=scores,
        loss=loss,
    )
    return _chosen(scored, asked)


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """All that a choice starts from."""

    method: str
    params: Any
    candidates: list[Mixable]
    groups: list[tuple[str, ...]]
    stored: dict[str, dict[str, QTensor]]
    axes: dict[str, Axes]
    scores: dict[str, dict[str, float]]
    loss: float | None


def _source(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Sequence[tuple[Any, ...]],
    told: Mapping[str, Axes],
    given: Any,
) -> tuple[Mixable, dict[str, QTensor]]:
    """A candidate and what it stores, by path."""
    config = config_of(given)
    name = find_recipe(given).name if isinstance(given, str) else _name_of(config)
    data = part_of(batches) if takes_part(config.steps) else batches
    stats = calibrate(apply_fn, params, data, config)
    leaves = named_leaves(quantize(params, config, stats), is_stored)
    chosen = choose(config, told, stats.meta.get("names", ()))
    qs = {path: leaf for path, leaf in leaves if isinstance(leaf, QTensor)}
    return Mixable(name=name, choices={p: chosen[p] for p in qs}, steps=config.steps), qs


def _name_of(config: QuantConfig) -> str:
    """That of the recipe with these rules; of others that of the first format."""
    for name, recipe in RECIPES.items():
        if recipe.config == config:
            return name
    return next((rule.weight for rule in config.rules if isinstance(rule.weight, str)), "weights")


def _groups(
    candidates: Sequence[Mixable], told: Mapping[str, Axes], disabled: Sequence[str]
) -> list[tuple[str, ...]]:
    """Parameters in products that choose together; those that some candidate leaves alone, or that
    are disabled, choose nothing, and nothing that belongs to them.
    """
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        raise InputError(f"formats are given twice: {', '.join(names)}")
    linears = _linears(told)
    for glob in disabled:
        if not any(fnmatchcase(path, glob) for path in linears):
            raise nearest(glob, linears, "glob of layers to leave out, no parameter in a product")
    found: dict[tuple[str, ...], list[str]] = {}
    for path in linears:
        found.setdefault(_key(path), []).append(path)

    def may(path: str) -> bool:
        off = any(fnmatchcase(path, glob) for glob in disabled)
        return not off and all(path in candidate.choices for candidate in candidates)

    groups = [tuple(paths) for paths in found.values() if all(map(may, paths))]
    if not groups:
        raise InputError("no parameter is quantized by all of these formats: nothing can be chosen")
    return groups


def _key(path: str) -> tuple[str, ...]:
    for number, pattern in enumerate(TOGETHER):
        if match := pattern.fullmatch(path):
            return (str(number), match["parent"] or "", match["leaf"])
    return ("alone", path)


def _linears(told: Mapping[str, Axes]) -> list[str]:
    return [path for path, row in told.items() if set(row.ops) & set(PRODUCTS)]


def _chosen(scored: _Scored, asked: Request) -> AutoQuantized:
    counted = Counted(
        groups=scored.groups,
        choices={c.name: c.choices for c in scored.candidates},
        scores=scored.scores,
        numel={path: math.prod(scored.axes[path].shape) for path in _linears(scored.axes)},
    )
    ways = {name: bits_way(name, counted, asked.weighting) for name in BIT_COUNTS}
    way = ways[asked.count]
    if not way.reaches(asked.bits):
        other = next(name for name in BIT_COUNTS if name != asked.count)
        raise InputError(
            f"{asked.bits:g} bits a weight cannot be reached with these formats: the least is "
            f"{way.least:.2f}, counted as {asked.count} does; give as many, a smaller format, or "
            f'count="{other}"'
        )
    found = way.best(asked.bits, scored.method)
    choices = way.members(found)
    picked = {p: scored.stored[p][name] for p, name in choices.items() if name != NONE}
    structure, leaves = jax.tree.structure(scored.params), named_leaves(scored.params)
    return AutoQuantized(
        params=structure.unflatten([picked.get(path, leaf) for path, leaf in leaves]),
        config=mixed(scored.candidates, choices, {p: p.replace("[", "[[]") for p in choices}),
        choices=choices,
        scores=scored.scores,
        score=found.score,
        bits={name: other.cost(found) for name, other in ways.items()},
        loss=scored.loss,
        curve=way.curve(),
        within=lambda bits: _chosen(scored, replace(asked, bits=bits)),
    )
