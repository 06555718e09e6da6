# SPDX-License-Identifier: Apache-2.0
"""The formats that ModelOpt's descriptions mean: the inverse of `modelopt.describe`.

One name may stand for several pairs of formats, and descriptions may leave the size of blocks out:
the stored scales then decide.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from jqx.config import KV_FORMATS, Choice, base_format, resolve
from jqx.errors import InputError, nearest
from jqx.formats import FORMATS
from jqx.recipes import RECIPES

from .modelopt import ALGOS, KV_ALGOS, VARIANT_ALGOS, find_algo
from .modelopt_read import MIXED, Layer, Stated

NOT_READ = ("FP8_PB_REAL",)
"""Names that ModelOpt writes for arithmetic that is not defined here."""

_ROWS = {Choice(weight=w, input=i): algo for (w, i), algo in ALGOS.items()}
_ROWS |= {Choice(weight=w, input=i, variant=v): algo for (w, i, v), algo in VARIANT_ALGOS.items()}

MEANT = {
    algo.quant_algo.upper(): [c for c, row in _ROWS.items() if row.quant_algo == algo.quant_algo]
    for algo in _ROWS.values()
}
"""Upper-case algorithm -> the formats that share the name, and what may lie beside codes if it
tells."""


def choices_of(
    stated: Stated,
    shapes: Mapping[str, tuple[int, ...]],
    scales: Mapping[str, tuple[int, ...]],
) -> dict[str, Choice]:
    """The formats of every quantized linear, in the order of `shapes`.

    `shapes`: all linears of the model; `scales`: the shape of their stored scales, from which the
    block follows where it is not said. Raises InputError for algorithms that are not read.
    """
    said = quantized_layers(stated, shapes)
    kinds = {
        path: (layer.algo, layer.block or _block_of(shapes[path], scales.get(path, ())))
        for path, layer in said.items()
    }
    picked: dict[tuple[str, int | None], Choice] = {}
    for path, kind in kinds.items():
        if kind not in picked:
            same = {p for p, layer in said.items() if layer.algo == kind[0]}
            picked[kind] = _pick(meant_by(kind[0]), kind[1], same, shapes)
        if find_algo(picked[kind]) is None:
            raise InputError(f"{kind[0]} with {kind[1]} values to a scale ({path}) is not read")
    return {path: picked[kind] for path, kind in kinds.items()}


def quantized_layers(stated: Stated, linears: Iterable[str]) -> dict[str, Layer]:
    """What is said about each of `linears` that is described as quantized, in their order."""
    if stated.layers is not None:
        return {path: stated.layers[path] for path in linears if path in stated.layers}
    if stated.layer is None:
        return {}
    return {path: stated.layer for path in linears if not _ignored(path, stated.ignored)}


def meant_by(algo: str) -> list[Choice]:
    """What an algorithm's name may stand for. Raises InputError for other names."""
    if algo.upper() in NOT_READ:
        raise InputError(f"quant_algo {algo!r} is known but not read; read are {_known()}")
    if algo.upper() not in MEANT:
        raise nearest(algo, (*_names(), MIXED), "quant_algo")
    return MEANT[algo.upper()]


def kv_of(name: str | None, *, scales: bool, biases: bool) -> str | None:
    """The row of KV_FORMATS for what the cache is called, by whether scales and biases are stored.

    Raises InputError for another name, and where what is stored is not what the name stands for.
    """
    if name is None:
        return None
    rows = [row for row, algo in KV_ALGOS.items() if algo == name.upper()]
    if not rows:
        raise nearest(name, dict.fromkeys(KV_ALGOS.values()), "kv_cache_quant_algo")
    for row in rows:
        cast = not scales and not biases
        if (KV_FORMATS[row].affine, KV_FORMATS[row].cast) == (biases, cast):
            return row
    stored = "biases" if biases else "scales alone" if scales else "no scales"
    raise InputError(f"keys and values are called {name}, and {stored} are stored for them")


def _names() -> list[str]:
    return list(dict.fromkeys(algo.quant_algo for algo in _ROWS.values()))


def _known() -> str:
    return ", ".join(_names())


def _pick(
    meant: list[Choice], block: int | None, chosen: set[str], linears: Iterable[str]
) -> Choice:
    """The one that is meant: by block, then by which recipe quantizes just the `chosen`.

    "mxfp4" is what both pairs of that format are called, and the files say nothing of inputs; the
    recipes that write it reach different linears.
    """
    fitting = [c for c in meant if block in (None, FORMATS[c.weight or ""].block[1])]
    if not fitting:
        name = meant[0].weight or ""
        rows, columns = FORMATS[name].block
        varied = f"{base_format(name)}_b{block}" if rows == 1 and columns else name
        return replace(meant[0], weight=varied)
    if len(fitting) == 1:
        return fitting[0]
    reached = _reached(tuple(linears))
    return next((c for c in fitting if chosen in reached.get(c, [])), fitting[0])


def _reached(linears: tuple[str, ...]) -> dict[Choice, list[set[str]]]:
    """Formats -> the linears that each recipe with them quantizes."""
    found: dict[Choice, list[set[str]]] = {}
    for recipe in RECIPES.values():
        choices = {p: resolve(recipe.config, f"{p}.weight", "linear") for p in linears}
        reached = {p: c for p, c in choices.items() if c.weight is not None}
        for choice in list(reached.values())[:1]:
            formats = Choice(weight=choice.weight, input=choice.input)
            found.setdefault(formats, []).append(set(reached))
    return found


def _block_of(shape: tuple[int, ...], scale: tuple[int, ...]) -> int | None:
    """How many columns of a weight [n, k] share one of its scales [n, blocks]."""
    if len(scale) != 2 or not scale[1] or shape[1] % scale[1]:
        return None
    return shape[1] // scale[1]


def _ignored(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern matches the module or one it lies in."""
    parts = path.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in above)
