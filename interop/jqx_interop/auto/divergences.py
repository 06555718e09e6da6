# SPDX-License-Identifier: Apache-2.0
"""Scores by divergence: for every group and candidate the model runs from its block to the end with
that group, and nothing else, quantized.

All groups go through the blocks together, a wave of calls at a time, so that a block is read and
its candidates are found once a wave, and a group costs what lies behind it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jqx.auto.sensitivity import Scores
from jqx_interop.checkpoints import Workspace
from jqx_interop.progress import Progress

from .heads import head_divergence
from .mixture import PLAIN, ended, forward
from .passes import Passes, Task
from .scoring import EXPERTS, Begun, run_block
from .states import States

WAVE_BYTES = 2 << 30
"""States of one wave on disk, where a call has fewer: what a run that is killed computes again.
While experts run three or four times as much lies beside them.
"""
AT_A_TIME = 8  # streams whose predictions are compared with those of the model at once


def divergence_scores(
    task: Task, space: Workspace, records: list[dict[str, Any]], progress: Progress
) -> tuple[Scores, dict[str, float]]:
    """The sum over all tokens of the KL divergence from the model's predictions; what `records` of
    a run before it have is not computed again.
    """
    passes = _Forks(task)
    done = {r["wave"]: r["scores"] for r in records if "wave" in r}
    begun = any("forward" in r for r in records)
    progress.phase("forward", 0 if begun else passes.blocks * passes.count)
    if not begun:
        forward(passes, progress)
        space.record({"forward": True})
    waves = [w for w in range(passes.waves) if w not in done]
    progress.phase("scoring", sum(len(passes.calls(w)) for w in waves) * (passes.blocks + 1))
    for w in waves:
        done[w] = passes.wave(w, progress)
        space.record({"wave": w, "scores": done[w]})
    total: Scores = {g[0]: {c.name: 0.0 for c in task.candidates} for g in task.groups}
    for scores in done.values():
        for group, row in scores.items():
            for name, value in row.items():
                total[group][name] += value
    return total, {}


class _Forks(Passes):
    """The streams: the states of every group and candidate, from where they leave those of the
    model.
    """

    def __init__(self, task: Task):
        super().__init__(task)
        self._streams = [
            (group, c.name)
            for i in range(self.blocks)
            for group in self.groups_of(i)
            for c in task.candidates
        ]
        carrier = np.dtype(self.compute.carrier)
        one = int(np.prod(self.shape[1:])) * carrier.itemsize * max(len(self._streams), 1)
        self._calls = min(self.count, max(1, WAVE_BYTES // one))
        self.waves = -(-self.count // self._calls)
        shape = (len(self._streams), self._calls, *self.shape[1:])
        self._forks = States(task.folder / "hidden-forks.bin", shape, carrier)

    def calls(self, w: int) -> range:
        """The calls of wave `w`."""
        return range(w * self._calls, min((w + 1) * self._calls, self.count))

    def wave(self, w: int, progress: Progress) -> Scores:
        """The scores of the data of wave `w`."""
        begun, calls = 0, self.calls(w)
        for i in range(self.blocks):
            begun += self._step(i, calls, begun, progress)
        return self._heads(calls, progress)

    def _step(self, i: int, calls: Sequence[int], begun: int, progress: Progress) -> int:
        """Take the streams that have `begun` through block `i`, and begin those that leave there:
        how many.
        """
        params, program = self.params(i), self.program(i)
        linears = {c.name: self.linears(c, i) for c in self.task.candidates}
        leaving = [(m, name) for m in self.groups_of(i).values() for name in linears]
        places = [(s, at) for at in range(len(calls)) for s in range(begun + len(leaving))]

        def begin(number: int) -> Begun:
            s, at = places[number]
            if s < begun:
                return run_block(params, jnp.asarray(self._forks.get(s, at)), program=program)
            members, name = leaving[s - begun]
            mine = {m: linears[name][m] for m in members if m != EXPERTS}
            h = jnp.asarray(self.states.get(i, calls[at]))
            return run_block(params, h, mine, program=program)

        of_streams = [PLAIN] * begun
        of_streams += [(name,) if m == (EXPERTS,) else PLAIN for m, name in leaving]
        ways = [of_streams[s] for s, _ in places]
        if not places:
            progress.advance(len(calls))
            return 0
        told = lambda share: progress.advance(share * len(calls))  # noqa: E731
        for number, h in ended(self, i, params, ways, begin, told):
            self._forks.put(*places[number], h)
        return len(leaving)

    def _heads(self, calls: Sequence[int], progress: Progress) -> Scores:
        params, sums = self.head_params(), np.zeros(len(self._streams))
        for at, n in enumerate(calls):
            for start in range(0, len(sums), AT_A_TIME):
                streams = range(start, min(start + AT_A_TIME, len(sums)))
                sums[streams] += self._diverged(params, n, at, streams)
            progress.advance(1)
        scores: Scores = {}
        for (group, name), value in zip(self._streams, sums, strict=True):
            scores.setdefault(group, {})[name] = float(value)
        return scores

    def _diverged(
        self, params: Mapping[str, Any], n: int, at: int, streams: Sequence[int]
    ) -> np.ndarray:
        """The divergences of some streams over the tokens of call `n`, the wave's number `at`."""
        mine, width = self.states.get(self.blocks, n), self.spec.hidden
        others = [self._forks.get(s, at).reshape(-1, width) for s in streams]
        others += others[-1:] * (AT_A_TIME - len(others))  # all calls run one program
        share = np.repeat(self.real(n).astype(np.float32), mine.shape[1])
        total = np.zeros(AT_A_TIME)
        for part, _, weights in self.chunks(share):
            found = head_divergence(
                params,
                jnp.asarray(mine.reshape(-1, width)[part]),
                jnp.asarray(np.stack([other[part] for other in others])),
                jnp.asarray(weights),
                program=self.program(self.blocks - 1),
            )
            total += np.asarray(found, np.float64)
        return total[: len(streams)]
