# SPDX-License-Identifier: Apache-2.0
"""The experts of one block in some calls, with one expert in memory at a time: the sums of what
they make of every token, in every way that is asked for, and gradients on the way back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jqx.auto import NONE
from jqx.models import Experts, Front, combine
from jqx_interop.blocks import load_expert
from jqx_interop.experts import expert_linears
from jqx_interop.progress import Progress
from jqx_interop.routed import RoutedStates, Sent, folder_for, pieces_of

from .expert_programs import Sums, end_gradients, expert_gradients, expert_outputs
from .passes import Passes
from .scoring import Begun, FrontGradient, run_block

Ways = tuple[str, ...]
PLAIN: Ways = (NONE,)
Advance = Callable[[float], None]


class Mixture:
    """The experts of block `i`: `run` makes the sums of all calls, then each has its `end`; or
    `take_back`, which gradients go on from.
    """

    def __init__(
        self, passes: Passes, i: int, ways: Sequence[Ways], advance: Advance, copies: int = 0
    ):
        """`ways`: what is asked of every call, first what the block computes; `advance` is told
        shares of the work; `copies`: how many gradients every call has. Large arrays lie in files
        in the folder of the task.
        """
        self._passes, self._i, self._ways = passes, i, ways
        self._program, f32 = passes.program(i), np.dtype(np.float32)
        row, shape = self._program.kind.mlp, (len(ways), *passes.shape[1:])
        assert isinstance(row, Experts)
        most = max(map(len, ways))
        folder = folder_for(shape, 2 + most + 2 * copies, passes.task.folder)
        real = shape[0] * shape[1]  # what a call repeats has sums, too
        self._states = made = RoutedStates(row, shape, real, passes.compute, folder)
        self._sums = [made.total, *(made.states(f"sums-{n}", f32) for n in range(1, most))]
        self._to_sums = [made.states(f"to-sums-{n}", f32) for n in range(copies)]
        self._to_x = [made.states(f"to-x-{n}", f32) for n in range(copies)]
        self._to_weights = [np.zeros(made.ids.shape, np.float32) for _ in range(copies)]
        self._linears = expert_linears(passes.spec, i)
        self._advance, self._turns = advance, 2 if copies else 1

    def run(self, begin: Callable[[int], Begun]) -> None:
        """Sum up what experts make of all calls; `begin(n)` is the front of call `n`."""
        for n in range(len(self._ways)):
            found = begin(n)
            assert isinstance(found, Front)
            self._states.put(n, found)
        distinct = list(dict.fromkeys(self._ways))
        calls = np.array([distinct.index(ways) for ways in self._ways])
        of_tokens = np.repeat(calls, int(np.prod(self._passes.shape[1:3])))
        for e, sent in self._sent():
            params = load_expert(self._passes.job, self._i, e, self._passes.compute)
            linears = self._simulated(e, {way for ways in distinct for way in ways})
            for number, ways in enumerate(distinct):
                own = of_tokens[sent.tokens] == number
                mine = Sent(sent.tokens[own], sent.weights[own])
                wanted = {way: linears[way] for way in ways}
                for part, given in self._pieces(mine):
                    found = expert_outputs(params, wanted, *given, program=self._program)
                    for sums, way in zip(self._sums, ways, strict=False):
                        sums[part.tokens] += np.asarray(found[way])[: len(part.tokens)]

    def _sent(self) -> Iterator[tuple[int, Sent]]:
        """The experts that were sent anything."""
        sent = [(e, one) for e, one in enumerate(self._states.sent()) if len(one.tokens)]
        for own in sent:
            yield own
            self._advance(1 / len(sent) / self._turns)

    def _simulated(self, e: int, ways: set[str]) -> dict[str, dict[str, Any]]:
        """The linears of expert `e`, by way."""
        own = self._linears[e]
        candidates = [c for c in self._passes.task.candidates if c.name in ways]
        return {NONE: {}} | {c.name: self._passes.of_expert(c, own) for c in candidates}

    def _pieces(self, sent: Sent) -> Iterator[tuple[Sent, tuple[Array, Array, Array]]]:
        """Some of the tokens after others, and their rows, weights, and which are no filling."""
        for at, count in pieces_of(len(sent.tokens)):
            part = sent.piece(at, count)
            yield part, self._states.given(part)

    def end(self, n: int, params: Mapping[str, Any]) -> Float[Array, "b t k"]:
        """The states of call `n` after the block."""
        found, total = self._states.front(n)
        spec, kind, compute = self._program.spec, self._program.kind, self._program.compute
        return combine(spec, kind, params, found, jnp.asarray(total), compute)

    def take_back(
        self,
        params: Mapping[str, Any],
        begin: Callable[[int], Begun],
        gradient: Callable[[int], Array],
        score: Callable[[Sums, dict[str, Sums]], Any],
    ) -> list[Any]:
        """Run, and take all gradients to the states after the block, number `n` being
        `gradient(n)`, to what experts read. Returns `score` of each of them, as it is to the sums,
        and of what these become different in every way but the first.
        """
        self.run(begin)
        scores = []
        for n in range(len(self._ways) * len(self._to_sums)):
            copy, call = divmod(n, len(self._ways))
            to_sums = self._gone_back(call, params, gradient(n))[2]
            self._to_sums[copy][self._states.at(call)] = np.asarray(to_sums)
            scores.append(score(to_sums, self._changes(call)))
        self._back()
        return scores

    def _changes(self, n: int) -> dict[str, Sums]:
        at = self._states.at(n)
        mine, *others = (jnp.asarray(sums[at]) for sums in self._sums[: len(self._ways[n])])
        return {way: y - mine for way, y in zip(self._ways[n][1:], others, strict=True)}

    def _gone_back(self, call: int, params: Mapping[str, Any], g: Array) -> tuple[Any, Any, Sums]:
        found, total = self._states.front(call)
        return end_gradients(params, found, jnp.asarray(total), g, program=self._program)

    def _back(self) -> None:
        """From the gradients to sums to those to what experts read, and to its weights."""
        for e, sent in self._sent():
            params = load_expert(self._passes.job, self._i, e, self._passes.compute)
            for part, given in self._pieces(sent):
                g = np.zeros((len(self._to_sums), *given[0].shape), np.float32)
                for row, to_sums in zip(g, self._to_sums, strict=True):
                    row[: len(part.tokens)] = to_sums[part.tokens]
                found = expert_gradients(params, *given, jnp.asarray(g), program=self._program)
                self._add(e, part.tokens, *map(np.asarray, found))

    def _add(self, e: int, tokens: np.ndarray, to_x: np.ndarray, to_weights: np.ndarray) -> None:
        own = (self._states.ids[tokens] == e).astype(np.float32)
        for n in range(len(to_x)):
            self._to_x[n][tokens] += to_x[n, : len(tokens)].astype(np.float32)
            weights = to_weights[n, : len(tokens), None].astype(np.float32)
            self._to_weights[n][tokens] += own * weights

    def gradient(self, n: int, params: Mapping[str, Any], g: Array) -> FrontGradient:
        """What gradient number `n`, to the states after the block, is to the front."""
        copy, call = divmod(n, len(self._ways))
        to_h, to_beside, _ = self._gone_back(call, params, g)
        at = self._states.at(call)
        to_x, to_weights = (jnp.asarray(a[copy][at]) for a in (self._to_x, self._to_weights))
        return FrontGradient(to_h, to_x, to_weights, to_beside)

    def close(self) -> None:
        """Remove the files."""
        self._states.close()


def ended(
    passes: Passes,
    i: int,
    params: Mapping[str, Any],
    ways: Sequence[Ways],
    begin: Callable[[int], Begun],
    advance: Advance,
) -> Iterator[tuple[int, Float[np.ndarray, "b t k"]]]:
    """The states after block `i` of every call, `begin(n)` being those of a block without experts,
    or the front of call `n`; `ways`: what its experts are; `advance` is told shares of the work.
    """
    mixture = Mixture(passes, i, ways, lambda s: advance(s / 2)) if passes.mixed(i) else None
    if mixture is not None:
        mixture.run(begin)
    for n in range(len(ways)):
        yield n, np.asarray(begin(n) if mixture is None else mixture.end(n, params))
        advance((1 if mixture is None else 1 / 2) / len(ways))
    if mixture is not None:
        mixture.close()


def forward(passes: Passes, progress: Progress) -> None:
    """Run the model and keep the states before every block, and those after the last."""
    passes.embed()
    for i in range(passes.blocks):
        params, before = passes.params(i), partial(passes.states.get, i)
        run = partial(run_block, params, program=passes.program(i))
        given = (passes, i, params, [PLAIN] * passes.count)

        def begin(n: int, run: Any = run, before: Any = before) -> Begun:
            return run(jnp.asarray(before(n)))

        for n, h in ended(*given, begin, lambda s: progress.advance(s * passes.count)):
            passes.states.put(i + 1, n, h)
    passes.states.flush()
