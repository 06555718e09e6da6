# SPDX-License-Identifier: Apache-2.0
"""A choice that is corrected by what the model with it does.

Scores say what a group loses when nothing else is quantized, and their sum leaves out what errors
of many groups do to each other. A round runs the model with a choice, measures its divergence, and
goes back once for the shifts of all groups to first order, which hold that:

    interaction[g, c] = shift[g, c] - shift[g, none]        c another candidate than the chosen one
                      = -shift[g, none] - 2 score[g, c]     c the chosen one

(2 score is what the gradient of an error's own divergence gives at that error; errors of two
candidates of one group count as independent.) The next choice is the best by scores with the mean
interactions of all rounds; what is taken in the end is the choice that was measured best.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqx.auto import NONE
from jqx.auto.sensitivity import Scores
from jqx.errors import InputError
from jqx_interop.checkpoints import Workspace
from jqx_interop.progress import Progress

from .choosing import Chosen, Limit, Tried, choices_within, chosen
from .expert_programs import sums_shifts
from .heads import divergence_gradient
from .mixture import Mixture, ended, forward
from .passes import Passes, Task
from .run import FILE, Scored, kept_in
from .scoring import EXPERTS, Begun, Linears
from .shifts import Picked, block_shifts, chosen_block, order

DIVERGENCES = ("fisher", "kl")
"""Methods whose scores are divergences, to which interactions can be added."""
VERSION = 1


def refined(scored: Scored, limit: Limit, rounds: int, folder: Path, progress: Progress) -> Chosen:
    """The best of `1 + rounds` choices within `limit`; `folder`: of the scores, beside which rounds
    are kept.

    Raises InputError for fewer than no rounds, for scores that are no divergences, and as `chosen`
    does.
    """
    if rounds < 0:
        raise InputError(f"{rounds} rounds are asked for: give 0 or more")
    if not rounds:
        return chosen(scored, limit)
    if scored.method not in DIVERGENCES:
        raise InputError(
            f"rounds correct scores that are divergences, and those of {scored.method!r} are not: "
            f"take --method {' or '.join(DIVERGENCES)}"
        )
    facts = _facts(folder, limit, rounds)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    place = folder / f"rounds-{key}"
    if (kept := kept_in(place / "rounds.json", facts)) is None:
        kept = _run(scored, limit, (rounds, place, facts), progress)
    tried = tuple(Tried(kl=row["kl"], choices=row["choices"]) for row in kept["tried"])
    best = min(tried, key=lambda row: row.kl)
    return replace(chosen(scored, limit, best.choices), tried=tried)


def _facts(folder: Path, limit: Limit, rounds: int) -> dict[str, Any]:
    scores = (folder / "scores" / FILE).read_bytes()
    table = None if limit.table is None else hashlib.sha256(limit.table.read_bytes()).hexdigest()
    told = asdict(replace(limit, table=None))
    return {
        "jqx_rounds": VERSION,
        "scores": hashlib.sha256(scores).hexdigest(),
        "limit": json.loads(json.dumps(told)),
        "table": table,
        "rounds": rounds,
    }


def _run(
    scored: Scored,
    limit: Limit,
    asked: tuple[int, Path, dict[str, Any]],
    progress: Progress,
) -> dict[str, Any]:
    rounds, place, facts = asked
    job = scored.candidates[0].job
    with Workspace(place, job.checkpoint.path) as space:
        records = space.begin(facts, restart=job.settings.restart)
        space.files.mkdir(exist_ok=True)
        assert scored.data is not None
        task = Task(
            job=job,
            candidates=scored.candidates,
            groups=scored.groups,
            data=scored.data,
            folder=space.directory,
            method="kl",
        )
        passes, choices = _Rounds(task, space, records, progress), choices_within(scored, limit)
        tried: list[dict[str, Any]] = []
        found: list[Scores] = []
        for number in range(rounds + 1):
            known = [row["choices"] for row in tried]
            if choices in known:  # nothing changes any more
                break
            tried.append({"kl": passes.measure(number, choices), "choices": choices})
            if number < rounds:
                shifts = passes.shifts(number, choices)
                found.append(interactions(scored.scores, choices, shifts))
                better = _corrected(scored.scores, found)
                choices = choices_within(replace(scored, method="fisher", scores=better), limit)
        kept = {"facts": facts, "tried": tried}
        told = json.dumps(kept, indent=1) + "\n"
        (space.files / "rounds.json").write_text(told, encoding="utf-8")
        space.publish()
    return kept


def interactions(
    scores: Mapping[str, Mapping[str, float]], choices: Mapping[str, str], shifts: Scores
) -> Scores:
    """Group -> candidate -> what the errors of all other groups add to its score, from the shifts
    of a model with `choices`.
    """
    found: Scores = {}
    for group, row in shifts.items():
        mine = choices[group]
        found[group] = {name: row[name] - row[NONE] for name in scores[group]}
        if mine != NONE:
            found[group][mine] = -row[NONE] - 2 * scores[group][mine]
    return found


def _corrected(scores: Mapping[str, Mapping[str, float]], found: list[Scores]) -> Scores:
    return {
        group: {
            name: score + float(np.mean([one[group][name] for one in found]))
            for name, score in row.items()
        }
        for group, row in scores.items()
    }


@dataclass(frozen=True, slots=True)
class _Done:
    """What records tell: divergences by round, shifts by round and block."""

    kl: dict[int, float]
    shifts: dict[tuple[int, int], Scores]

    @classmethod
    def of(cls, records: list[dict[str, Any]]) -> "_Done":
        kl = {r["round"]: r["kl"] for r in records if "kl" in r}
        shifts = {(r["round"], r["block"]): r["shifts"] for r in records if "shifts" in r}
        return cls(kl, shifts)


class _Rounds(Passes):
    """The states of the model as it is after the last block, and those of the model with a choice
    before every block.
    """

    def __init__(
        self, task: Task, space: Workspace, records: list[dict[str, Any]], progress: Progress
    ):
        """Runs the model, unless records say that this is done."""
        super().__init__(task)
        self._space, self._progress, self._done = space, progress, _Done.of(records)
        self._plain, self.states = self.states, self.file("hidden-chosen.bin", self.blocks + 1)
        self._gradients = self.file("hidden-gradients.bin", 2, 1, np.float32)
        if not any("plain" in r for r in records):
            progress.phase("forward", self.blocks * self.count)
            self._forward_plain()
            space.record({"plain": True})

    def _forward_plain(self) -> None:
        chosen_states, self.states = self.states, self._plain
        forward(self, self._progress)
        self.states = chosen_states
        for n in range(self.count):
            self.states.put(0, n, self._plain.get(0, n))
        self.states.flush()

    def measure(self, number: int, choices: Mapping[str, str]) -> float:
        """The divergence of a token of the model with `choices`."""
        if number in self._done.kl:
            return self._done.kl[number]
        self._progress.phase(f"choice {number + 1}: forward", self.blocks * self.count)
        for i in range(self.blocks):
            params, given = self.params(i), (self._all(i), self._picked(i, choices))
            ways = [(self._of_experts_in(i, choices),)] * self.count
            begin = partial(self._begun, i, params, given)
            for n, h in ended(self, i, params, ways, begin, self._advance):
                self.states.put(i + 1, n, h)
        total = self._heads()
        self.states.flush()
        self._gradients.flush()
        self._space.record({"round": number, "kl": total / self.ids.size})
        return total / self.ids.size

    def _all(self, i: int) -> dict[str, dict[str, Any]]:
        return {c.name: self.linears(c, i) for c in self.task.candidates}

    def _picked(self, i: int, choices: Mapping[str, str]) -> Picked:
        names = order(c.name for c in self.task.candidates)
        return {
            member: jnp.int32(names.index(choices[group]))
            for group, members in self.groups_of(i).items()
            for member in members
            if member != EXPERTS
        }

    def _of_experts_in(self, i: int, choices: Mapping[str, str]) -> str:
        """The candidate of the experts of block `i`; NONE where they choose nothing."""
        own = (g for g, members in self.groups_of(i).items() if members == (EXPERTS,))
        return next((choices[group] for group in own), NONE)

    def _advance(self, share: float) -> None:
        """A share of what a block takes, forward or back."""
        self._progress.advance(share * self.count)

    def _begun(self, i: int, params: Any, given: tuple[Linears, Picked], n: int) -> Begun:
        h = jnp.asarray(self.states.get(i, n))
        return chosen_block(params, h, *given, program=self.program(i))

    def _heads(self) -> float:
        """Put the gradients to the last states; returns the divergence of all tokens."""
        params, last, total = self.head_params(), self.blocks, 0.0
        program = self.program(last - 1)
        for n in range(self.count):
            plain, h = self._plain.get(last, n), self.states.get(last, n)
            share = np.repeat(self.real(n).astype(np.float32), h.shape[1])
            flat, plain = h.reshape(-1, h.shape[-1]), plain.reshape(-1, h.shape[-1])
            found = np.zeros(flat.shape, np.float32)
            for at, real, weights in self.chunks(share):
                given = (jnp.asarray(a) for a in (plain[at], flat[at], weights))
                g, value = divergence_gradient(params, *given, program=program)
                found[at[:real]] = np.asarray(g, np.float32)[:real]
                total += float(value)
            self._gradients.put(last % 2, n, found.reshape(h.shape))
        return total

    def shifts(self, number: int, choices: Mapping[str, str]) -> Scores:
        """Group -> candidate, or NONE -> the shift of the divergence of all tokens."""
        done = {i: s for (r, i), s in self._done.shifts.items() if r == number}
        left = self.blocks - len(done)
        if left:
            self._progress.phase(f"choice {number + 1}: backward", left * self.count)
        for i in reversed(range(self.blocks)):
            if i not in done:
                done[i] = self._back(i, choices)
                self._gradients.flush()
                self._space.record({"round": number, "block": i, "shifts": done[i]})
        return {group: row for found in done.values() for group, row in found.items()}

    def _back(self, i: int, choices: Mapping[str, str]) -> Scores:
        params, given = self.params(i), (self._all(i), self._picked(i, choices))
        names, groups = order(given[0]), self.groups_of(i)
        sums: Scores = {group: dict.fromkeys(names, 0.0) for group in groups}
        mixture, of_experts = None, []
        if self.mixed(i):
            mixture, of_experts = self._experts_back(i, params, given, choices)
        for n in range(self.count):
            h, g = jnp.asarray(self.states.get(i, n)), self._gradient(i, n)
            g = g if mixture is None else mixture.gradient(n, params, g)
            to_states, found = block_shifts(params, h, g, given, program=self.program(i))
            self._gradients.put(i % 2, n, np.asarray(to_states, np.float32))
            by_name = {m: dict(zip(names, row, strict=True)) for m, row in found.items()}
            if mixture is not None:
                by_name[EXPERTS] = of_experts[n]
            for group, members in groups.items():
                for name in names:
                    sums[group][name] += sum(float(by_name[m].get(name, 0)) for m in members)
            self._progress.advance(1 if mixture is None else 1 / 2)
        if mixture is not None:
            mixture.close()
        return sums

    def _gradient(self, i: int, n: int) -> jax.Array:
        """The gradient of call `n` to the states after block `i`."""
        return jnp.asarray(self._gradients.get((i + 1) % 2, n))

    def _experts_back(
        self, i: int, params: Any, given: tuple[Linears, Picked], choices: Mapping[str, str]
    ) -> tuple[Mixture, list[dict[str, Any]]]:
        """The experts of block `i`, all gradients taken to what they read, and their shifts."""
        mine, every = self._of_experts_in(i, choices), order(given[0])
        chosen = (EXPERTS,) in self.groups_of(i).values()
        ways = (mine, *(name for name in every if chosen and name != mine))
        mixture = Mixture(self, i, [ways] * self.count, lambda s: self._advance(s / 2), 1)
        begin, gradient = partial(self._begun, i, params, given), partial(self._gradient, i)

        def shifts(to_sums: jax.Array, changes: dict[str, jax.Array]) -> dict[str, Any]:
            return jax.device_get(sums_shifts(to_sums, changes))

        return mixture, mixture.take_back(params, begin, gradient, shifts)
