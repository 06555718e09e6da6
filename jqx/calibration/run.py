# SPDX-License-Identifier: Apache-2.0
"""calibrate: the statistics of a function's activations, one jitted reduction a batch."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqx.config import KV_FORMATS, QuantConfig
from jqx.errors import InputError, nearest
from jqx.selection import choose, config_of, kept, kinds, wanted_kinds
from jqx.tensors.stats import MERGES, Stats, kind_of
from jqx.transforms.axes import Axes, axes_from, names_of
from jqx.transforms.decoding import split_to_observe
from jqx.transforms.entries import Entry
from jqx.transforms.interpret import PRODUCTS, Acts, Met, Walk, arrays_of, interpret, named_arrays
from jqx.transforms.observe import record
from jqx.transforms.placing import entry
from jqx.transforms.primitives import PRIMITIVES

from .uses import REDUCTIONS

Wanted = Mapping[str, tuple[str, ...]]
OVER_BATCHES = {"channel_mean": "sum", "batches": "sum"}
"""Kinds that are added up here in the order of batches, whatever merging two runs would do."""
NEVER = int(np.iinfo(np.int32).max)


def calibrate(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    cfg: QuantConfig | str | None = None,
    statistics: Sequence[str] | None = None,
) -> Stats:
    """Statistics of what the parameters of `apply_fn(params, *batch)` are multiplied with.

    `batches`: any iterable; each is a tuple of arguments, and anything else is one argument. What
    is collected follows from `cfg`: the amax of the inputs to which it gives a stored scale, and of
    keys and values, and what its algorithms need (second moments are [k, k] for k inputs). None:
    the amax of everything that is met. `statistics` are the rows of `jqx.tensors.stats.KINDS` to
    collect instead: "amax", "channel_amax", "channel_mean", "square", "gram", "tokens".

    Statistics of a stack (layers that are scanned or indexed, experts) have an entry a member.
    Each batch is one call of a jitted function, to which the accumulated statistics are donated;
    parameters and batches keep their shardings. `Stats.meta` tells how the function uses each
    parameter (`axes`), which are not followed (`untracked`), and which activations have names.

    `params` may hold QTensors: their decoded weights are run, with inputs as they are, and
    `jqx.quantize` then adds the scales of their inputs.

    Raises InputError if there are no batches, if they differ in structure, if `params` does not fit
    `apply_fn`, for a rule that matches nothing, for a QTensor whose inputs are scaled first, and
    for NaN or infinite activations (path and batch).
    """
    config = None if cfg is None else config_of(cfg)
    statistics = _known_kinds(statistics)
    first, batches = _first(batches)
    shapes, _ = split_to_observe(params)
    with _naming(0, first):
        seen = record(apply_fn, shapes, first)
    found = axes_from(seen, {n: tuple(x.shape) for n, x in named_arrays(shapes).items()})
    names = names_of(seen)
    wanted = _wanted(config, found, names)
    if statistics is not None:
        wanted = {path: tuple(statistics) for path in wanted}
    entries, bad = _accumulated(apply_fn, params, batches, wanted)
    entries = {path: _means(kinds) for path, kinds in entries.items()}
    _check_finite({use.path: bad[use.path] for use in seen.uses if use.path in bad})
    axes = {path: asdict(a) for path, a in found.items()}
    untracked = list(seen.untracked)
    return Stats.of(entries, axes=axes, names=names, untracked=untracked)


def _known_kinds(statistics: Sequence[str] | None) -> Sequence[str] | None:
    """The kinds of statistics that are asked for, all of which there are."""
    if isinstance(statistics, str):
        statistics = (statistics,)
    for kind in statistics or ():
        if kind not in REDUCTIONS:
            raise nearest(kind, REDUCTIONS, "kind of statistic to collect:")
    return statistics


def _first(batches: Iterable[Any]) -> tuple[tuple[Any, ...], Iterable[tuple[Any, ...]]]:
    """The first batch, and all of them, as tuples of arguments."""
    if isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
        raise InputError(
            f"batches is a {type(batches).__name__}: give an iterable of batches, [batch] for one"
        )
    arguments = (b if type(b) is tuple else (b,) for b in batches)
    first = next(arguments, None)
    if first is None:
        raise InputError(
            "There are no batches to calibrate with: give at least one (a generator gives its "
            "batches once)"
        )
    return first, itertools.chain([first], arguments)


@contextmanager
def _naming(index: int, batch: tuple[Any, ...]) -> Iterator[None]:
    """Exceptions of the function become an InputError that names the batch."""
    try:
        yield
    except (InputError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        told = str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"apply_fn(params, *batch) failed with batch {index}, {_shapes(batch)}: "
            f"{type(error).__name__}: {told}. Do params and batches fit it?"
        ) from error


def _wanted(config: QuantConfig | None, found: Mapping[str, Axes], names: Sequence[str]) -> Wanted:
    """Kinds of statistics by path."""
    if config is None:
        used = [path for path, axes in found.items() if set(axes.ops) & set(PRODUCTS)]
        return {path: ("amax",) for path in (*used, *names) if path in names or kinds(found[path])}
    chosen = choose(config, found, names)
    wanted = {path: wanted_kinds(choice, config.steps) for path, choice in chosen.items()}
    _check_collected(config, wanted)
    stored = [name for name, kv in kept(config, names).items() if not KV_FORMATS[kv].cast]
    found_kinds = wanted | dict.fromkeys(stored, ("amax",))
    return {path: kinds for path, kinds in found_kinds.items() if kinds}


def _check_collected(config: QuantConfig, wanted: Wanted) -> None:
    """Raises InputError for what is not reduced of functions."""
    for path, needed in wanted.items():
        if missing := [kind for kind in needed if kind not in REDUCTIONS]:
            methods = ", ".join(step.method for step in config.steps)
            raise InputError(
                f"{path}: {methods} needs the {missing[0]} of its inputs, which is collected of "
                "checkpoints alone (jqx quantize): take max or another algorithm"
            )


def _accumulated(
    apply_fn: Callable[..., Any], params: Any, batches: Iterable[tuple[Any, ...]], wanted: Wanted
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The statistics of all batches, and by path the number of the first batch that spoilt them."""
    total: Any = None
    first: Any = None
    steps: dict[Any, Callable[..., Any]] = {}
    mine, with_params = arrays_of(params)
    for index, batch in enumerate(batches):
        arrays, with_batch = arrays_of(batch)
        structure, shapes = jax.tree.structure(batch), _shapes(batch)
        first = first or (structure, shapes)
        if structure != first[0]:
            raise InputError(
                f"Batch {index} is {shapes}, and batch 0 is {first[1]}: give all batches the same "
                "arguments"
            )
        static = tuple(str(x) for x in jax.tree.leaves(batch) if not hasattr(x, "shape"))
        if static not in steps:
            # jitted, so that what `_start` has traced the step finds traced
            reduced = jax.jit(_reduced(apply_fn, with_params, with_batch, wanted))
            steps[static] = _step(reduced)
            with _naming(index, batch):
                total = _start(reduced, mine, arrays) if total is None else total
        with _naming(index, batch):
            total = steps[static](total, mine, arrays, index)
    return total


Reduced = Callable[[list[Any], list[Any]], dict[str, dict[str, Any]]]


def _reduced(
    apply_fn: Callable[..., Any], with_params: Any, with_batch: Any, wanted: Wanted
) -> Reduced:
    """The function of the arrays of `params` and of a batch that returns the batch's statistics."""

    def collect(met: Met, walk: Walk) -> Entry | None:
        if met.use.op not in (*PRODUCTS, "name") or not met.active:
            return None
        found = {kind: REDUCTIONS[kind](met) for kind in _collected(wanted.get(met.use.path, ()))}
        return entry(met, found, 0, walk.stacks, each=True) if found else None

    def reduced(mine: list[Any], arrays: list[Any]) -> dict[str, dict[str, Any]]:
        shapes, stored = split_to_observe(with_params(mine))
        walk = Walk(PRIMITIVES, Acts(collect=collect, merge=_merge_kinds), stored=stored)
        return interpret(apply_fn, walk, shapes, with_batch(arrays))[1]

    return reduced


def _collected(kinds: Sequence[str]) -> tuple[str, ...]:
    """What is reduced of one batch: where more than an amax is wanted, of how many tokens too."""
    counted = set(kinds) - {"amax", "tokens"}
    return (*dict.fromkeys(kinds), *(("tokens",) if counted and "tokens" not in kinds else ()))


def _means(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The statistics of all batches, every batch counting alike in the mean magnitudes."""
    found = dict(kinds)
    if "batches" in found:
        count = jnp.maximum(found.pop("batches"), 1).astype(jnp.float32)
        found["channel_mean"] = found["channel_mean"] / count[..., None]
    return found


def _of_batch(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """What one batch adds: of magnitudes their mean, and that a member met something."""
    found = dict(kinds)
    if "channel_mean" in found:
        tokens = found["tokens"]
        share = jnp.maximum(tokens, 1).astype(jnp.float32)[..., None]
        found["channel_mean"] = found["channel_mean"] / share
        found["batches"] = (tokens > 0).astype(jnp.int32)
    return found


def _merge_kinds(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Of two uses in one batch: magnitudes are still sums here."""
    rule = lambda kind: MERGES[OVER_BATCHES.get(kind) or kind_of(kind).merge]  # noqa: E731
    return {kind: rule(kind)(a[kind], b[kind]) for kind in a}


def _start(reduced: Reduced, mine: list[Any], arrays: list[Any]) -> Any:
    """The statistics of no batch, and for every path that no batch was bad."""
    batch = lambda *xs: {path: _of_batch(kinds) for path, kinds in reduced(*xs).items()}  # noqa: E731
    shapes = jax.eval_shape(batch, mine, arrays)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return nothing, {path: jnp.int32(NEVER) for path in shapes}


def _step(reduced: Reduced) -> Callable[..., Any]:
    """One batch added to the statistics so far, which are donated."""

    def step(total: Any, mine: list[Any], arrays: list[Any], index: Any) -> Any:
        entries, bad = total
        new = {path: _of_batch(kinds) for path, kinds in reduced(mine, arrays).items()}
        first = {
            path: jnp.where(_finite(new[path]), b, jnp.minimum(b, jnp.int32(index)))
            for path, b in bad.items()
        }
        return {path: _merge_kinds(entries[path], new[path]) for path in entries}, first

    return jax.jit(step, donate_argnums=0)


def _finite(found: Mapping[str, Any]) -> Any:
    floats = [x for x in found.values() if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats])) if floats else True


def _check_finite(bad: Mapping[str, Any]) -> None:
    """Raises InputError for the batch with the first NaN or infinity, and the first path in `bad`
    that met it.
    """
    known = jax.device_get(bad)  # in another order
    first = {path: int(known[path]) for path in bad}
    where = min(first, key=lambda path: first[path], default=None)
    if where is None or first[where] == NEVER:
        return
    others = [path for path, index in first.items() if index != NEVER and path != where]
    more = f" (so did {', '.join(others[:3])}{', ...' * (len(others) > 3)})" if others else ""
    raise InputError(
        f"{where} met NaN or infinite values in batch {first[where]}{more}, and no scale covers "
        "them: look at that batch, or compute in a wider dtype"
    )


def _shapes(batch: Any) -> Any:
    return jax.tree.map(lambda x: tuple(np.shape(x)) if hasattr(x, "shape") else x, batch)
