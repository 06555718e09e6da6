# SPDX-License-Identifier: Apache-2.0
"""Linears of experts are searched many at a time: all that are alike in one program, in slices, so
that a block of hundreds is never in memory at once.

What comes out for one expert does not depend on which others are in its slice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jqx.algorithms import InputStats, Linear, lanes_for, of_each
from jqx.config import Algorithm
from jqx.errors import InputError
from jqx.formats import find_format

from .experts import linears_of_experts
from .job import Job
from .weights import Groups

SLICE = 1 << 26
"""Bytes of weights and second moments, in float32, up to which experts are searched together."""

SIZES = (32, 8)
"""How many linears one program takes: few numbers, so that few programs are compiled. The rest goes
by as many as two rounds take.
"""

ROUNDS = 2


class Asked(NamedTuple):
    """A linear before some steps, with the statistics of its inputs."""

    linear: Linear
    stats: InputStats
    steps: tuple[Algorithm, ...]


def bunched(job: Job, groups: Groups) -> Iterator[Groups]:
    """`groups` as pieces of work: those of experts whose members are alike together, in slices; all
    others alone.
    """
    waiting: dict[Any, Groups] = {}
    for group in groups:
        if group[0] not in linears_of_experts(job.spec):
            yield [group]
            continue
        key = tuple((job.modules[path].shape, job.choices[path]) for path in group)
        bunch = waiting.setdefault(key, [])
        bunch.append(group)
        if len(bunch) >= _most(_bytes_of(job, group)):
            yield waiting.pop(key)
    yield from waiting.values()


def _most(size: int) -> int:
    """How many experts are together, of so many bytes each."""
    return max(1, min(SIZES[0], SLICE // size))


def _bytes_of(job: Job, group: tuple[str, ...]) -> int:
    shapes = [job.modules[path].shape for path in group]
    return 4 * (sum(n * k for n, k in shapes) + shapes[0][1] ** 2)


def each(
    job: Job, run: Callable[..., Linear], asked: Mapping[str, Asked]
) -> Iterator[tuple[str, Linear]]:
    """What `run`, which is `calibrated` or `finished`, makes of every linear; those of experts that
    are alike go through one program.

    Raises InputError naming a linear whose statistics do not suffice.
    """
    experts = linears_of_experts(job.spec)
    alike: dict[Any, list[str]] = {}
    for path, (linear, stats, steps) in asked.items():
        fmt = find_format(job.choices[path].weight or "")
        if path in experts:
            key = (fmt, steps, *_outline((linear, stats)))
            alike.setdefault(key, []).append(path)
            continue
        with _named(path):
            found = run(linear, stats, fmt=fmt, steps=steps)
        yield path, jax.block_until_ready(found)
    for (fmt, steps, *_), paths in alike.items():
        lanes = lanes_for(job.modules[paths[0]].shape, steps)
        for some in _slices(paths, lanes):
            stacked = _stack([asked[path][:2] for path in some])
            with _named(some[0]):
                found = of_each(*stacked, run=run, fmt=fmt, steps=steps, lanes=lanes)
            whole = jax.tree.map(np.asarray, found)
            for i, path in enumerate(dict.fromkeys(some)):
                yield path, jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), whole)


def _outline(tree: Any) -> tuple[Any, ...]:
    """What linears must have in common to be stacked."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), np.asarray(leaf).dtype) for leaf in leaves)


def _slices(paths: list[str], lanes: int) -> Iterator[list[str]]:
    """`paths` in lots of few sizes; the last one again where places would stay empty. Never one
    round of the loop alone: compilers dissolve that into what is around it, and last bits move.
    """
    at, least = 0, ROUNDS * lanes
    while at < len(paths):
        left = len(paths) - at
        size = next((size for size in SIZES if least <= size <= left), least)
        lot = paths[at : at + size]
        yield lot + [lot[-1]] * (size - len(lot))
        at += size


def _stack(members: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(a) for a in leaves]), *members)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Name the linear in what is raised."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
