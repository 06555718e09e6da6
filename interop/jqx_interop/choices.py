# SPDX-License-Identifier: Apache-2.0
"""What a configuration says about the linears of one checkpoint, and what speaks against it."""

import dataclasses
from collections.abc import Iterable, Mapping

from jqx.algorithms.table import ALGORITHMS, check_applicable, needed, params_of, variant_of
from jqx.config import INPUT_FORMATS, Choice, QuantConfig, resolve
from jqx.errors import InputError
from jqx.formats import check_divides, find_format
from jqx.steps import check_steps, with_option

from .inventory import Inventory, Module
from .settings import Settings
from .targets import Target


def calibrated(config: QuantConfig) -> bool:
    """Whether some rule of `config` needs statistics of activations."""
    inputs = (rule.input for rule in config.rules if isinstance(rule.input, str))
    weights = (rule.weight for rule in config.rules if isinstance(rule.weight, str))
    return any(input_bound(config, Choice(input=name)) for name in inputs) or any(
        needed(config.steps, find_format(name)) for name in weights
    )


def wanted_kinds(config: QuantConfig, choice: Choice) -> tuple[str, ...]:
    """The kinds of statistics that a linear with this choice needs of its inputs."""
    amax = ("amax",) if input_bound(config, choice) is not None else ()
    asked = needed(config.steps, find_format(choice.weight or ""))
    return tuple(dict.fromkeys((*amax, *asked)))


def input_bound(config: QuantConfig, choice: Choice) -> float | None:
    """What input_amax of this linear is divided by; None where no input scale is stored."""
    if config.algorithm is None or choice.input is None:
        return None
    return INPUT_FORMATS[choice.input].bound


def low_rank_of(config: QuantConfig) -> int:
    """The rank of low-rank parts, 0 where there are none."""
    rows = [params_of(step) for step in config.steps if ALGORITHMS[step.method].variant == "svd"]
    return int(getattr(rows[-1], "lowrank", 0))


def apply_options(config: QuantConfig, settings: Settings) -> QuantConfig:
    """`config` with `--algorithm` and then every `--set key=value` applied. Raises InputError for
    names and values that are none, with the nearest ones.
    """
    if settings.algorithm is not None:
        config = dataclasses.replace(config, algorithm=settings.algorithm)
    for key, value in settings.options:
        config = with_option(config, key, value)
    return check_steps(config)


def refuse_unheard(name: str, config: QuantConfig) -> None:
    """Raise InputError for what the rules of the recipe `name` ask for and nothing here does."""
    for rule in config.rules:
        if isinstance(rule.kv, str):
            raise InputError(
                f"recipe {name}: keys and values are the same everywhere and no rule of a recipe; "
                f"take out kv: {rule.kv} and pass --kv-cache {rule.kv}"
            )
        if isinstance(rule.output, str):
            raise InputError(f"recipe {name}: outputs are not quantized; take out {rule.output!r}")


def choices_for(
    config: QuantConfig,
    inventory: Inventory,
    name: str,
    target: Target | None,
    *,
    fold: bool = False,
) -> dict[str, Choice]:
    """What is chosen for every linear that the recipe `name` quantizes, in module order, for the
    layout `target`; None where nothing is written. `fold`: nothing may stay beside codes.

    Raises InputError for what cannot be stored, with the first problem, and if nothing is chosen.
    """
    resolved = {m.path: resolve(config, m.weight, m.kind) for m in inventory.modules}
    choices = {
        path: dataclasses.replace(choice, variant=_variant(config, choice.weight, fold))
        for path, choice in resolved.items()
        if choice.weight is not None
    }
    kept = any(input_bound(config, choice) is not None for choice in choices.values())
    check_applicable(config.steps, (c.weight or "" for c in choices.values()), kept)
    problems = [
        f"{module.path}: {problem}"
        for module in inventory.modules
        if module.path in choices
        and (problem := _problem(module, choices[module.path], target)) is not None
    ]
    problems += _siblings_apart(choices, inventory)
    if target is not None and (apart := target.apart(choices)):
        problems.append(apart)
    if problems:
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)
    if not choices:
        linears = [module.path for module in inventory.modules if module.kind == "linear"]
        raise InputError(
            f"recipe {name} selects none of the {len(linears)} linears here"
            + (f" (the first is {linears[0]})" if linears else "")
        )
    return choices


def _variant(config: QuantConfig, name: str, fold: bool) -> str | None:
    """What the algorithm leaves beside the codes of a weight; low-rank parts fold into nothing."""
    found = variant_of(config.steps, find_format(name))
    return None if fold and found != "svd" else found


def _problem(module: Module, choice: Choice, target: Target | None) -> str | None:
    """Why a module cannot be stored as `choice` says."""
    if module.kind == "embedding":
        return "embeddings are read as they are; narrow the rule of the recipe with kind: linear"
    if target is not None and (lacking := target.lacks(choice, module.shape)) is not None:
        return lacking
    try:
        check_divides(find_format(choice.weight or ""), module.shape)
    except InputError as error:
        return str(error)
    return None


def _siblings_apart(choices: Mapping[str, Choice], inventory: Inventory) -> Iterable[str]:
    """Linears that engines fuse, and that are quantized to different formats."""
    for group in inventory.siblings:
        kinds_of = {p: f"{choices[p].weight}, {choices[p].input}" for p in group if p in choices}
        if len(set(kinds_of.values())) > 1:
            found = "; ".join(f"{path} to {kind}" for path, kind in kinds_of.items())
            yield f"engines fuse linears that read one input, so give them one format: {found}"
