# SPDX-License-Identifier: Apache-2.0
"""Windows through a model, one block of its weights in memory at a time, and the scores of their
tokens.

The states after the last block of model and reference are kept; the logits of both are computed
together, a few hundred tokens at a time, and reduced to a few numbers a token before they leave the
program.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from jqx.errors import InputError
from jqx.models import Compute, Experts, ModelSpec, block, embed_tensors, head, head_tensors, kinds
from jqx_interop.chain import embed_rows, side_by_side
from jqx_interop.hidden import HiddenStates
from jqx_interop.progress import Progress
from jqx_interop.stored import Source, read_params
from jqx_interop.stored_blocks import read_block

from .metrics import ALONE, COMPARED, Sums, alone, compared
from .mixture import run_mixture
from .windows import Windows

TOKENS_PER_CHUNK = 256
LOGITS_PER_CHUNK = 1 << 25
"""Logits are computed for so many tokens at a time, and for fewer where the vocabulary is large:
no more than so many numbers.
"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Chain:
    """A checkpoint, the arithmetic it is run in, and the states of all windows on their way."""

    source: Source
    compute: Compute
    hidden: HiddenStates


SCORES: dict[int, Callable[..., Float32[Array, "r c"]]] = {1: alone, 2: compared}
"""Number of models -> scores of their logits."""


def run_blocks(chain: Chain, windows: Windows, title: str, progress: Progress) -> None:
    """Take all windows through the blocks of one model. `title` names the phase."""
    source, hidden, compute = chain.source, chain.hidden, chain.compute
    spec = source.spec

    def read(name: str) -> np.ndarray:
        return source.checkpoint.read(name).astype(source.dtype, copy=False)

    embed_rows(spec, read, windows.ids, hidden, compute)
    for name in embed_tensors(spec):
        source.checkpoint.release(name)
    progress.phase(title, len(spec.blocks) * hidden.count)
    for i in range(len(spec.blocks)):
        _run_block(chain, i, windows.ids.shape[1], progress)
        hidden.turn()


def _run_block(chain: Chain, i: int, length: int, progress: Progress) -> None:
    """Take all windows through block `i`, whose weights are gone afterwards."""
    hidden, spec, compute = chain.hidden, chain.source.spec, chain.compute
    kind = kinds(spec)[i]
    if isinstance(kind.mlp, Experts):
        run_mixture(chain.source, i, hidden, compute, progress)
        return
    params = read_block(chain.source, i, compute)
    positions = jnp.broadcast_to(
        jnp.arange(length, dtype=jnp.int32)[None, :], (hidden.rows, length)
    )

    def call(n: int) -> None:
        h = block(spec, kind, params, hidden.get(n), positions, compute)
        hidden.put(n, jax.block_until_ready(h))

    for _ in side_by_side(call, hidden.count):
        progress.advance(1)


def score(chains: tuple[Chain, ...], windows: Windows, progress: Progress) -> Sums:
    """The scores of all windows after their last block: of one model alone, or of a model and its
    reference.

    Raises InputError if the model's probabilities are not finite.
    """
    hidden, length = chains[0].hidden, windows.ids.shape[1]
    parts = tuple((chain.source.spec, chain.compute) for chain in chains)
    params = tuple(_head_params(chain) for chain in chains)
    chunk = chunk_of(parts[0][0].vocab)
    sums = Sums(windows, COMPARED if len(chains) > 1 else ALONE)
    progress.phase("scoring", hidden.count)

    def call(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
        rows = np.arange(n * hidden.rows, min((n + 1) * hidden.rows, len(windows.ids)))
        states = tuple(chain.hidden.get(n) for chain in chains)
        found = []
        for window, position in _chunks(windows, rows, chunk):
            at = np.resize((window - rows[0]) * length + position - 1, chunk).astype(np.int32)
            targets = np.resize(windows.ids[window, position], chunk)
            values = score_step(params, states, at, targets, parts=parts)
            found.append((window, np.asarray(values)[: len(window)]))
        return found

    for found in side_by_side(call, hidden.count):
        for window, values in found:
            sums.add(window, values)
        progress.advance(1)
    _check_finite(sums, chains)
    return sums


def chunk_of(vocab: int) -> int:
    """How many tokens have their logits computed together."""
    return max(1, min(TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // vocab))


def _chunks(
    windows: Windows, rows: Int[np.ndarray, " n"], chunk: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The scored tokens of some windows, `chunk` at a time: which window, which position in it."""
    length = windows.ids.shape[1]
    scored = np.arange(length)[None, :] >= windows.first[rows, None]
    row, position = np.nonzero(scored)
    for start in range(0, len(row), chunk):
        part = slice(start, start + chunk)
        yield rows[row[part]], position[part]


def _head_params(chain: Chain) -> dict[str, Any]:
    """What the head of a model needs, matrices in the dtype that products take."""
    return read_params(chain.source, head_tensors(chain.source.spec), chain.compute.carrier)


@partial(jax.jit, static_argnames=("parts",))
def score_step(
    params: tuple[Any, ...],
    states: tuple[Float[Array, "b t _k"], ...],
    at: Int[Array | np.ndarray, " r"],
    targets: Int[Array | np.ndarray, " r"],
    *,
    parts: tuple[tuple[ModelSpec, Compute], ...],
) -> Float32[Array, "r c"]:
    """The columns of the tokens `targets`, each predicted by the state at the place `at` among all
    of `states`.
    """
    logits = []
    for (spec, compute), p, h in zip(parts, params, states, strict=True):
        picked = h.reshape(-1, h.shape[-1])[at]
        logits.append(head(spec, p, picked[None], compute)[0])
    return SCORES[len(logits)](*logits, jnp.asarray(targets))


def _check_finite(sums: Sums, chains: tuple[Chain, ...]) -> None:
    for column, chain in zip(("nll", "reference_nll"), chains, strict=False):
        bad = np.flatnonzero(~np.isfinite(sums[column]))
        if len(bad):
            raise InputError(
                f"{chain.source.checkpoint.path}: what it predicts in {len(bad)} of "
                f"{len(sums[column])} windows is not finite; check the weights, or evaluate in "
                "another precision (--compute)"
            )
