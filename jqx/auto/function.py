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
from .mixing import NONE, Mixable, mixed
from .search import Budget, Group, bisected, curve, monotone, optimum
from .sensitivity import METHODS, method_of
from .weighting import PLAIN_BITS, bits_of

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

COUNTS = {"modelopt": (False, True), "quantizable": (True, False)}
"""Way to count bits -> whether scales count, and whether what nobody may quantize does, at 16."""


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
    sources = [_source(apply_fn, params, found[: asked.num_calib_steps], c) for c in asked.formats]
    candidates = [candidate for candidate, _ in sources]
    groups = _groups(candidates, told, asked.disabled_layers)
    stored = {p: {c.name: qs[p] for c, qs in sources} for group in groups for p in group}
    batches = found[: asked.num_score_steps]
    scores, loss = METHODS[method](apply_fn, loss_fn, params, batches, (groups, stored))
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
    apply_fn: Callable[..., Any], params: Any, batches: list[tuple[Any, ...]], given: Any
) -> tuple[Mixable, dict[str, QTensor]]:
    """A candidate and what it stores, by path."""
    config = config_of(given)
    name = find_recipe(given).name if isinstance(given, str) else _name_of(config)
    if any("awq" in step.method for step in config.steps):  # ModelOpt saves time so
        batches = batches[: max(1, len(batches) // 4)]
    stats = calibrate(apply_fn, params, batches, config)
    leaves = named_leaves(quantize(params, config, stats), is_stored)
    chosen = choose(config, axes(apply_fn, params, *batches[0]), stats.meta.get("names", ()))
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
    linears = [path for path, row in told.items() if set(row.ops) & set(PRODUCTS)]
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


def _chosen(scored: _Scored, asked: Request) -> AutoQuantized:
    ways = {name: _way(scored, asked, *COUNTS[name]) for name in COUNTS}
    groups, weights, fixed = ways[asked.count]
    least = (fixed + sum(min(group.costs) for group in groups)) / weights
    if asked.bits < least * (1 - 1e-12):
        other = next(name for name in COUNTS if name != asked.count)
        raise InputError(
            f"{asked.bits:g} bits a weight cannot be reached with these formats: the least is "
            f"{least:.2f}, counted as {asked.count} does; give as many, a smaller format, or "
            f'count="{other}"'
        )
    budget = Budget(most=asked.bits * weights * (1 + 1e-12), fixed=fixed)
    found = (bisected if scored.method == "kl" else optimum)(groups, budget)
    choices = {path: found.choices[group.name] for group in groups for path in group.members}
    leaves = named_leaves(scored.params)
    picked = {p: scored.stored[p][name] for p, name in choices.items() if name != NONE}
    structure = jax.tree.structure(scored.params)
    return AutoQuantized(
        params=structure.unflatten([picked.get(path, leaf) for path, leaf in leaves]),
        config=mixed(scored.candidates, choices, {p: p.replace("[", "[[]") for p in choices}),
        choices=choices,
        scores=scored.scores,
        score=found.score,
        bits={name: _bits(way, found.choices) for name, way in ways.items()},
        loss=scored.loss,
        curve=tuple((point.cost / weights, point.score) for point in curve(groups, fixed)),
        within=lambda bits: _chosen(scored, replace(asked, bits=bits)),
    )


Way = tuple[list[Group], float, float]
"""Groups with their costs, how many weights bits are about, and the bits that nobody chooses."""


def _way(scored: _Scored, asked: Request, scales: bool, whole: bool) -> Way:
    numel = {path: math.prod(row.shape) for path, row in scored.axes.items()}
    groups = []
    for paths in scored.groups:
        factor = asked.weighting.of(paths)
        costs = [
            factor * sum(numel[p] * bits_of(c.choices[p], scales=scales) for p in paths)
            for c in scored.candidates
        ]
        plain = factor * PLAIN_BITS * sum(numel[p] for p in paths)
        names = [c.name for c in scored.candidates]
        group = Group(
            members=paths,
            candidates=(*names, NONE),
            scores=(*(scored.scores[paths[0]][name] for name in names), 0.0),
            costs=(*costs, plain),
        )
        groups.append(monotone(group))
    mine = {path for paths in scored.groups for path in paths}
    rest = [p for p, row in scored.axes.items() if set(row.ops) & set(PRODUCTS) and p not in mine]
    fixed = sum(asked.weighting.of((p,)) * numel[p] for p in rest) if whole else 0.0
    weights = sum(group.costs[-1] for group in groups) / PLAIN_BITS + fixed
    if weights <= 0:
        raise InputError("no weight counts: leave out less of them in the cost")
    return groups, weights, PLAIN_BITS * fixed


def _bits(way: Way, choices: Mapping[str, str]) -> float:
    groups, weights, fixed = way
    cost = sum(group.costs[group.candidates.index(choices[group.name])] for group in groups)
    return (cost + fixed) / weights
