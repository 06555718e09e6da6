# SPDX-License-Identifier: Apache-2.0
"""Running the experts of a block over the calibration data, one in memory at a time, and reducing
what their linears meet.

Each takes the tokens that were sent to it; with `all_experts` what it would meet of all others is
part of its statistics too. The largest magnitude of inputs is that of all experts, as ModelOpt 0.47
has it; other statistics are those of an expert, or of all where it met fewer than LEAST_TOKENS.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32

from jqx.algorithms import InputStats
from jqx.calibration import amax
from jqx.calibration.moments import Moments, add_tokens, results, start
from jqx.errors import InputError
from jqx.models import (
    Experts,
    expert,
    kinds,
)
from jqx.transforms import Use, observe

from .blocks import load_expert
from .chain import side_by_side
from .collecting import Readers, check_finite, wanted_of
from .device import compute_of
from .expert_stats import merged, spilled
from .experts import expert_linears
from .job import Job
from .program import Program
from .routed import FEWEST_ROWS, LastFew, RoutedStates, pieces_of, rows_for

LEAST_TOKENS = 32
"""With fewer, second moments say more of the tokens than of the expert."""


@partial(jax.jit, static_argnames=("program",))
def expert_step(
    params: Any,
    x: Float[jax.Array, "r k"],
    weights: Float32[jax.Array, "r"],
    real: Bool[jax.Array, "r"],
    *,
    program: Program,
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


class _Made(NamedTuple):
    """What one expert made of some of its tokens, and what its linears met."""

    sums: Float32[np.ndarray, "n k"]
    maxima: dict[str, np.ndarray]
    whole: dict[str, jax.Array]


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
        self._program = Program(job.spec, kind, self._compute, job.dtype.name, whole=whole)
        self._sent = states.sent()
        self.tokens = np.array([len(one.tokens) for one in self._sent])
        """How many tokens every expert was sent."""
        if job.settings.all_experts:
            self._sent = states.everywhere()
        self._few = np.array([len(one.tokens) < LEAST_TOKENS for one in self._sent])
        """Which experts met too few tokens for statistics of their own."""
        self._found: list[dict[str, InputStats]] = [{} for _ in self._sent]
        self._merged: dict[str, InputStats] = {}
        self._so_far: dict[str, Moments] = {}
        self._params = LastFew(lambda e: load_expert(job, i, e, self._compute))

    def run(self, advance: Callable[[float], None]) -> dict[str, InputStats]:
        """Add to the sums of `states`; returns the statistics of all linears of experts."""
        pieces = [
            (e, at, count)
            for e, sent in enumerate(self._sent)
            for at, count in pieces_of(len(sent.tokens))
        ]
        largest: dict[str, np.float32] = {}
        made = side_by_side(lambda n: self._made(*pieces[n]), len(pieces))
        for (e, at, count), part in zip(pieces, made, strict=True):
            self._add(e, at, count, part)
            for name, value in part.maxima.items():
                largest[name] = np.maximum(largest.get(name, np.float32(0)), value)
            advance(1 / len(pieces))
        self._states.settle()
        self._check(largest)
        return dict(self._by_path(largest))

    def _made(self, e: int, at: int, count: int) -> _Made:
        """What expert `e` makes of `count` of its tokens, those from `at` on."""
        given = self._states.given(self._sent[e].piece(at, count))
        y, maxima, whole = expert_step(self._params.get(e), *given, program=self._program)
        return _Made(np.asarray(y)[:count], jax.device_get(maxima), whole)

    def _add(self, e: int, at: int, count: int, part: _Made) -> None:
        """Take in what one expert made of some tokens, in the order of tokens."""
        sent = self._sent[e]
        self._states.total[sent.tokens[at : at + count]] += part.sums
        last = at + count == len(sent.tokens)
        moments = self._moments(e) if at == 0 else self._so_far
        self._so_far = {
            name: add_tokens(
                so_far,
                part.whole[name],
                jnp.int32(count),
                jnp.asarray(last),
                dtype=self._job.dtype.name,
            )
            for name, so_far in moments.items()
        }
        if not last:
            return
        for name, so_far in self._so_far.items():
            row = results(so_far)
            check_finite(self._members[e][name], row)
            if self._few.any():
                self._merged[name] = merged(self._merged.get(name), row)
            self._found[e][name] = spilled(row, self._place)

    def _check(self, largest: Mapping[str, np.float32]) -> None:
        """Raise InputError for inputs that are not finite."""
        bad = [name for name, value in largest.items() if not np.isfinite(value)]
        if bad and self._members[0]:
            raise InputError(
                f"the calibration inputs of {self._members[0][bad[0]]}, or of another expert "
                "beside it, are not finite; check the weights, or calibrate in another precision "
                "(--compute)"
            )

    def told(self) -> dict[str, Any]:
        """How many tokens experts were sent, for a journal and a report."""
        return {
            "layer": self._i,
            "tokens": self.tokens.tolist(),
            "experts": len(self.tokens),
            "few": int((self.tokens < LEAST_TOKENS).sum()),
            "none": int((self.tokens == 0).sum()),
            "stand_in": bool(any(self._leaders) and self._few.any()),
        }

    def _by_path(self, largest: Mapping[str, np.float32]) -> Iterator[tuple[str, InputStats]]:
        """The statistics of every linear of every expert, its own or those of all."""
        for e, members in enumerate(self._members):
            own = self._merged if self._few[e] else self._found[e]
            for name, path in members.items():
                yield path, {"amax": largest[name]}
            for name, readers in self._leaders[e].items():
                for path in readers:
                    yield path, {**own[name], "amax": largest[name]}

    def _moments(self, e: int) -> dict[str, Moments]:
        """Nothing yet, by the linears that stand for the inputs of an expert."""
        room = sum(rows_for(n) for _, n in pieces_of(len(self._sent[e].tokens))) or FEWEST_ROWS
        return {
            name: start(wanted_of(self._job, readers, room))
            for name, readers in self._leaders[e].items()
        }


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
