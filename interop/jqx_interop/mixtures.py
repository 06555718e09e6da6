# SPDX-License-Identifier: Apache-2.0
"""Running the experts of a block over the calibration data, one in memory at a time, and reducing
what their linears meet.

Each takes the tokens that were sent to it; with `all_experts` what it would meet of all others is
part of its statistics too. The largest magnitude of inputs is that of all experts, as ModelOpt 0.47
has it; other statistics are those of an expert, or of all where it met fewer than LEAST_TOKENS.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32

from jqx.algorithms import InputStats
from jqx.algorithms.quadratic import gram
from jqx.calibration import amax, input_amax
from jqx.calibration.moments import Moments, add_tokens, results, start
from jqx.errors import InputError
from jqx.models import (
    BlockKind,
    Compute,
    Experts,
    ModelSpec,
    expert,
    kinds,
)
from jqx.transforms import Use, observe

from .blocks import load_expert
from .chain import side_by_side
from .collecting import Readers, check_finite, wanted_of
from .device import compute_of
from .experts import expert_linears
from .job import Job
from .routed import RoutedStates, Sent

MOST_ROWS, FEWEST_ROWS = 2048, 16
"""Tokens that an expert takes at once: one of few numbers, so that few programs are compiled."""

LEAST_TOKENS = 32
"""With fewer, second moments say more of the tokens than of the expert."""


@dataclass(frozen=True, slots=True)
class ExpertProgram:
    """What one compiled program of an expert depends on; `whole`: linears whose inputs are
    returned.
    """

    spec: ModelSpec
    kind: BlockKind
    compute: Compute
    dtype: str
    whole: frozenset[str] = frozenset()


@partial(jax.jit, static_argnames=("program",))
def expert_step(
    params: Any,
    x: Float[jax.Array, "r k"],
    weights: Float32[jax.Array, "r"],
    real: Bool[jax.Array, "r"],
    *,
    program: ExpertProgram,
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """What an expert adds to the sums of its rows, the maxima of what its linears read, and that
    itself where asked for.
    """

    def collect(use: Use, x: jax.Array) -> dict[str, jax.Array] | None:
        if use.op != "dot":
            return None
        found = {"amax": amax(x, jnp.dtype(program.dtype))}
        return found | ({"whole": x} if _linear_of(use.path) in program.whole else {})

    def run(params: Any, x: jax.Array) -> jax.Array:
        return expert(program.spec, program.kind, params, x, weights, real, program.compute)

    y, found = observe(run, collect)(params, x)
    maxima = {_linear_of(path): part["amax"] for path, part in found.items()}
    whole = {_linear_of(path): part["whole"] for path, part in found.items() if "whole" in part}
    return y, maxima, whole


def _linear_of(path: str) -> str:
    return path.removesuffix(".weight")


class _One(NamedTuple):
    """What one expert made of its tokens, and what its linears met."""

    sums: Float32[np.ndarray, "n k"]
    maxima: dict[str, np.float32]
    stats: dict[str, InputStats]


class MixtureRun:
    """The experts of block `i` over what was routed to them."""

    def __init__(
        self,
        job: Job,
        i: int,
        states: RoutedStates,
        leaders: Readers,
        place: Path,
    ):
        """`leaders`: linears that stand for an input of which more than the amax is wanted -> all
        that read it; `place`: where large statistics lie.
        """
        assert job.spec is not None
        kind = kinds(job.spec)[i]
        assert isinstance(kind.mlp, Experts)
        self._job, self._i, self._states, self._place = job, i, states, place
        self._compute = compute_of(job.settings.compute, job.dtype)
        self._members = expert_linears(job.spec, i)
        self._leaders = [
            {name: leaders[path] for name, path in own.items() if path in leaders}
            for own in self._members
        ]
        for own in self._leaders:
            for readers in own.values():
                if "histogram" in (kind for path in readers for kind in job.wanted(path)):
                    raise InputError(
                        f"{readers[0]}: histograms of inputs are not taken of experts, "
                        "whose inputs share one scale: take --algorithm max, or leave them out of "
                        "the recipe"
                    )
        whole = frozenset(name for own in self._leaders for name in own)
        self._program = ExpertProgram(job.spec, kind, self._compute, job.dtype.name, whole)
        self._sent = states.sent()
        self.tokens = np.array([len(one.tokens) for one in self._sent])
        """How many tokens every expert was sent."""
        if job.settings.all_experts:
            self._sent = states.everywhere()
        self._merged: dict[str, InputStats] = {}

    def run(self, advance: Callable[[float], None]) -> dict[str, InputStats]:
        """Add to the sums of `states`; returns the statistics of all linears of experts."""
        maxima: list[dict[str, np.float32]] = []
        found: list[dict[str, InputStats]] = []
        few = self._few().any() and any(self._leaders)
        for e, one in enumerate(side_by_side(self._one, len(self._sent))):
            self._states.total[self._sent[e].tokens] += one.sums
            maxima.append(one.maxima)
            found.append({name: spilled(row, self._place) for name, row in one.stats.items()})
            for name, row in one.stats.items() if few else ():
                self._merged[name] = merged(self._merged.get(name), row)
            advance(1 / len(self._sent))
        self._states.settle()
        names = dict.fromkeys(name for own in maxima for name in own)
        largest = {
            name: input_amax([jnp.asarray(own[name]) for own in maxima if name in own])
            for name in names
        }
        return dict(self._by_path(found, {n: np.float32(v) for n, v in largest.items()}))

    def told(self) -> dict[str, Any]:
        """How many tokens experts were sent, for a journal and a report."""
        return {
            "experts": len(self.tokens),
            "few": int((self.tokens < LEAST_TOKENS).sum()),
            "none": int((self.tokens == 0).sum()),
            "stand_in": bool(any(self._leaders) and self._few().any()),
        }

    def _by_path(
        self, found: list[dict[str, InputStats]], largest: dict[str, np.float32]
    ) -> Iterator[tuple[str, InputStats]]:
        """The statistics of every linear of every expert, its own or those of all."""
        for e, members in enumerate(self._members):
            own = self._merged if self._few()[e] else found[e]
            for name, path in members.items():
                yield path, {"amax": largest.get(name, np.float32(0))}
            for name, readers in self._leaders[e].items():
                for path in readers:
                    yield path, {**own[name], "amax": largest[name]}

    def _few(self) -> Bool[np.ndarray, " e"]:
        """Which experts met too few tokens for statistics of their own."""
        return np.array([len(one.tokens) < LEAST_TOKENS for one in self._sent])

    def _one(self, e: int) -> _One:
        sent, params = self._sent[e], load_expert(self._job, self._i, e, self._compute)
        sums = np.zeros((len(sent.tokens), self._states.width), np.float32)
        maxima: list[dict[str, np.ndarray]] = []
        moments = self._moments(e)
        for at, count, given in self._parts(sent):
            y, found, whole = expert_step(params, *given, program=self._program)
            sums[at : at + count] = np.asarray(y)[:count]
            maxima.append(jax.device_get(found))
            last = jnp.asarray(at + count == len(sent.tokens))
            for name, so_far in moments.items():
                moments[name] = add_tokens(
                    so_far, whole[name], jnp.int32(count), last, dtype=self._job.dtype.name
                )
        most = (
            {name: np.max([part[name] for part in maxima]) for name in maxima[0]} if maxima else {}
        )
        stats: dict[str, InputStats] = {name: results(so_far) for name, so_far in moments.items()}
        for name, row in stats.items() if maxima else ():
            check_finite(self._members[e][name], row)
        return _One(sums, most, stats)

    def _moments(self, e: int) -> dict[str, Moments]:
        """Nothing yet, by the linears that stand for the inputs of an expert."""
        room = sum(rows_for(n) for _, n in _pieces(len(self._sent[e].tokens))) or FEWEST_ROWS
        return {
            name: start(wanted_of(self._job, readers, room))
            for name, readers in self._leaders[e].items()
        }

    def _parts(self, sent: Sent) -> Iterator[tuple[int, int, tuple[Any, Any, Any]]]:
        """Tokens of an expert as it takes them: where they begin, how many they are, and their
        rows, weights and which are real.
        """
        for at, count in _pieces(len(sent.tokens)):
            size = rows_for(count)
            x = np.zeros((size, self._states.width), self._compute.carrier)
            x[:count] = self._states.rows(sent.tokens[at : at + count])
            weights = np.pad(sent.weights[at : at + count], (0, size - count))
            yield at, count, (jnp.asarray(x), jnp.asarray(weights), jnp.arange(size) < count)


def merged(a: InputStats | None, b: InputStats) -> InputStats:
    """The statistics of two sets of tokens together. Second moments take the place of tokens."""
    b = _with_gram(b)
    if a is None:
        return b
    found = {kind: MERGES[kind](a[kind], b[kind]) for kind in b if kind in MERGES}
    if "channel_mean" in b:
        total = max(int(a["tokens"]) + int(b["tokens"]), 1)
        parts = (row["channel_mean"] * (int(row["tokens"]) / total) for row in (a, b))
        found["channel_mean"] = sum(parts)
    return found


MERGES: dict[str, Callable[[Any, Any], Any]] = {
    "amax": np.maximum,
    "channel_amax": np.maximum,
    "square": np.add,
    "gram": np.add,
    "block_gram": np.add,
    "block_log2": np.add,
    "tokens": np.add,
}
"""Kind of statistics -> what it is of two sets of tokens."""


def _with_gram(stats: InputStats) -> InputStats:
    found = {kind: np.asarray(value) for kind, value in stats.items() if kind != "root"}
    if "root" in stats:
        found["gram"] = np.asarray(gram(stats, "experts"))
    return found


def spilled(stats: InputStats, place: Path) -> InputStats:
    """`stats` with large arrays in files that vanish when nothing needs them."""
    found = {}
    for kind, value in stats.items():
        array = np.asarray(value)
        if array.nbytes > SPILLED:
            with tempfile.TemporaryFile(dir=place) as file:
                file.truncate(array.nbytes)
                kept = np.memmap(file, array.dtype, "r+", shape=array.shape)
            kept[...] = array
            array = kept
        found[kind] = array
    return found


SPILLED = 1 << 18
"""Bytes of an array from which on it lies in a file: of hundreds of experts there are many."""


def _pieces(count: int) -> Iterator[tuple[int, int]]:
    """Where parts of so many tokens begin, and how many they are."""
    for at in range(0, count, MOST_ROWS):
        yield at, min(MOST_ROWS, count - at)


def rows_for(count: int) -> int:
    """The number of rows that `count` tokens are filled up to: a power of two, or half as much
    again.
    """
    power = max(FEWEST_ROWS, 1 << max(count - 1, 0).bit_length())
    return power * 3 // 4 if power > FEWEST_ROWS and count <= power * 3 // 4 else power


def experts_line(blocks: Sequence[Mapping[str, Any]]) -> str | None:
    """One line for people about what `MixtureRun.told` says of blocks; None where there are no
    experts, or no statistics of them.
    """
    if not blocks:
        return None
    experts, few, none = (sum(int(b[key]) for b in blocks) for key in ("experts", "few", "none"))
    if not few:
        return f"all {experts} experts were sent at least {LEAST_TOKENS} tokens"
    stand_in = any(b["stand_in"] for b in blocks)
    instead = "; the statistics of all experts of their block stand in for theirs"
    return (
        f"{few} of {experts} experts were sent fewer than {LEAST_TOKENS} tokens, {none} none"
        f"{instead if stand_in else ''}"
    )
