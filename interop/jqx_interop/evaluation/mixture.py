# SPDX-License-Identifier: Apache-2.0
"""All windows through a block with experts, one expert in memory at a time, each with the tokens
that are sent to it. Its weights are decoded once, however many windows there are.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jqx.models import Compute, Experts, combine, expert, front, kinds
from jqx_interop.chain import side_by_side
from jqx_interop.hidden import HiddenStates
from jqx_interop.progress import Progress
from jqx_interop.routed import LastFew, RoutedStates, pieces_of
from jqx_interop.stored import Source
from jqx_interop.stored_blocks import read_expert, read_front


def run_mixture(
    source: Source, i: int, hidden: HiddenStates, compute: Compute, progress: Progress
) -> None:
    """Take the states `hidden` through block `i` of `source`, which has experts."""
    spec, kind = source.spec, kinds(source.spec)[i]
    assert isinstance(kind.mlp, Experts)
    states = RoutedStates(kind.mlp, hidden.shape, hidden.real, compute, hidden.folder)
    params, positions = read_front(source, i, compute), _positions(hidden)

    def call(n: int) -> None:
        states.put(n, front(spec, kind, params, hidden.get(n), positions, compute))

    for _ in side_by_side(call, hidden.count):
        progress.advance(1 / 4)
    for share in _add_experts(source, i, states, compute):
        progress.advance(share * hidden.count / 2)
    for n in range(hidden.count):
        found, total = states.front(n)
        h = combine(spec, kind, params, found, jnp.asarray(total), compute)
        hidden.put(n, jax.block_until_ready(h))
        progress.advance(1 / 4)
    states.close()


def _positions(hidden: HiddenStates) -> Int[jax.Array, "b t"]:
    _, rows, length, _ = hidden.shape
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (rows, length))


def _add_experts(source: Source, i: int, states: RoutedStates, compute: Compute) -> Iterator[float]:
    """Sum up what experts make of every token; yields shares of the work as they are done."""
    kind, sent = kinds(source.spec)[i], states.sent()
    run = partial(expert, source.spec, kind, compute=compute)
    few = LastFew(lambda e: read_expert(source, i, e, compute))
    pieces = [(e, at, n) for e, one in enumerate(sent) for at, n in pieces_of(len(one.tokens))]

    def call(number: int) -> np.ndarray:
        e, at, count = pieces[number]
        x, weights, real = states.given(sent[e].piece(at, count))
        return np.asarray(run(few.get(e), x, weights, real))[:count]

    for (e, at, count), made in zip(pieces, side_by_side(call, len(pieces)), strict=True):
        states.total[sent[e].piece(at, count).tokens] += made
        yield 1 / len(pieces)
    states.settle()
