# SPDX-License-Identifier: Apache-2.0
"""Scores from gradients: from the gradient to the last states back through the blocks, one at a
time, all candidates of a block at once.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqx.auto.sensitivity import COMBINE, Scores
from jqx.errors import InputError
from jqx_interop.checkpoints import Workspace
from jqx_interop.progress import Progress

from .expert_programs import sums_given
from .heads import head_draw, head_gradient
from .mixture import PLAIN, Mixture, forward
from .passes import Passes, Task
from .scoring import EXPERTS, Begun, Given, block_scores, run_block

SEED = 20_000
"""Of what "fisher" draws: the same for all models and data."""
ENOUGH, MOST_DRAWS = 16_384, 8
"""Tokens that "fisher" draws for where there are fewer, and how often it draws at most for each."""


def gradient_scores(
    task: Task, space: Workspace, records: list[dict[str, Any]], progress: Progress
) -> tuple[Scores, dict[str, float]]:
    """The scores of a method that goes backward, and the loss; what `records` of a run before it
    have is not computed again.

    Raises InputError for a loss that is not finite.
    """
    passes = _Backward(task)
    done = {r["block"]: r["scores"] for r in records if "block" in r}
    loss = next((r["loss"] for r in records if "loss" in r), None)
    progress.phase("forward", 0 if loss is not None else passes.blocks * passes.count)
    if loss is None:
        forward(passes, progress)
        loss = passes.heads()
        space.record({"loss": loss})
    progress.phase("scoring", (passes.blocks - len(done)) * passes.count * passes.draws)
    for i in reversed(range(passes.blocks)):
        if i not in done:
            done[i] = passes.backward(i, progress)
            space.record({"block": i, "scores": done[i]})
    return {group: row for scores in done.values() for group, row in scores.items()}, {"loss": loss}


class _Backward(Passes):
    """The gradients on their way back: of one loss, or of so many draws of one."""

    def __init__(self, task: Task):
        super().__init__(task)
        few = min(-(-ENOUGH // self.ids.size), MOST_DRAWS)
        self.draws = few if task.method == "fisher" else 1
        self._gradients = self.file("hidden-gradients.bin", 2, self.draws, np.float32)
        means = (np.full(len(b), 1 / (b.size - len(b) or 1), np.float32) for b in task.data.batches)
        self._means = np.concatenate([*means])

    def heads(self) -> float:
        """Put the gradients to the last states; returns the mean loss of a token of the text."""
        params, last, total = self.head_params(), self.blocks, 0.0
        for n in range(self.count):
            h = self.states.get(last, n)
            flat, (targets, share) = h.reshape(-1, h.shape[-1]), self._targets(n)
            for number in range(n, self.count * self.draws, self.count):
                found = np.zeros(flat.shape, np.float32)
                for at, real, weights in self.chunks(share):
                    where = (number, int(at[0]))
                    g, loss = self._head(params, flat[at], targets[at], weights, where)
                    found[at[:real]] = g[:real]
                    total += loss / self.draws
                self._gradients.put(last % 2, number, found.reshape(h.shape))
        self._gradients.flush()
        loss = total / float(np.sum(self._means)) / max(self.ids.shape[1] - 1, 1)
        if not np.isfinite(loss):
            raise InputError(
                f"{self.job.checkpoint.path}: the loss on these data is {loss}, and has no "
                "gradient; check the weights, or compute in another precision (--compute)"
            )
        return loss

    def _head(
        self,
        params: Any,
        h: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray,
        where: tuple[int, int],
    ) -> tuple[np.ndarray, float]:
        """The gradient to states after the last block, and the loss of the text at them."""
        program, states = self.program(self.blocks - 1), jnp.asarray(h)
        share = jnp.asarray(weights)
        words = jnp.asarray(targets)
        if self.task.method == "fisher":
            key = jax.random.fold_in(jax.random.key(SEED + where[0]), where[1])
            g, loss = head_draw(params, states, (words, share, key), program=program)
        else:
            g, loss = head_gradient(params, states, words, share, program=program)
        return np.asarray(g, np.float32), float(loss)

    def _targets(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The next token of every place of call `n`, and its share of the loss; 0 where there is
        none.
        """
        rows = self.picked(n)
        ids = self.ids[rows]
        share = np.repeat((self._means[rows] * self.real(n))[:, None], ids.shape[1], axis=1)
        share[:, -1] = 0
        return np.roll(ids, -1, axis=1).reshape(-1).astype(np.int32), share.reshape(-1)

    def backward(self, i: int, progress: Progress) -> Scores:
        """The scores of the groups of block `i`; puts the gradients to the states before it."""
        params, program = self.params(i), self.program(i)
        linears = {c.name: self.linears(c, i) for c in self.task.candidates}
        combine, groups = COMBINE[self.task.method], self.groups_of(i)
        sums: Scores = {group: dict.fromkeys(linears, 0.0) for group in groups}
        mixture, of_experts = None, []
        if self.mixed(i):
            mixture, of_experts = self._experts_back(i, params, progress)
        for n in range(self.count * self.draws):
            h, g = jnp.asarray(self.states.get(i, n % self.count)), self._gradient(i, n)
            g = g if mixture is None else mixture.gradient(n, params, g)
            to_states, found = block_scores(params, linears, h, g, program=program)
            self._gradients.put(i % 2, n, np.asarray(to_states, np.float32))
            given: Given = jax.device_get(found)
            if mixture is not None:
                given[EXPERTS] = of_experts[n]
            for group, members in groups.items():
                for name in linears:
                    together = combine([given[m][name] for m in members])
                    sums[group][name] += together / self.draws
            progress.advance(1 if mixture is None else 1 / 2)
        if mixture is not None:
            mixture.close()
        self._gradients.flush()
        return sums

    def _gradient(self, i: int, n: int) -> jax.Array:
        """Gradient number `n` to the states after block `i`."""
        return jnp.asarray(self._gradients.get((i + 1) % 2, n))

    def _experts_back(
        self, i: int, params: Any, progress: Progress
    ) -> tuple[Mixture, list[dict[str, Any]]]:
        """The experts of block `i`, all gradients taken to what they read, and what they give to
        scores.
        """
        program, chosen = self.program(i), (EXPERTS,) in self.groups_of(i).values()
        ways = (*PLAIN, *(c.name for c in self.task.candidates)) if chosen else PLAIN
        half = self.count * self.draws / 2
        told = lambda share: progress.advance(share * half)  # noqa: E731
        mixture = Mixture(self, i, [ways] * self.count, told, self.draws)

        def begin(n: int) -> Begun:
            return run_block(params, jnp.asarray(self.states.get(i, n)), program=program)

        def score(to_sums: jax.Array, changes: dict[str, jax.Array]) -> dict[str, Any]:
            found = sums_given(to_sums, changes, rows=self.rows, program=program)
            return jax.device_get(found)

        return mixture, mixture.take_back(params, begin, partial(self._gradient, i), score)
