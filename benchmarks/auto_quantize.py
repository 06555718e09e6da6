# SPDX-License-Identifier: Apache-2.0
"""What a model loses with the choices of `jqx auto`, and with others of the same cost.

    python benchmarks/auto_quantize.py MODEL --text HELD_OUT.txt [--calib FILE] [--kept FOLDER]

For every mixture and budget: the KL divergence from the model of the best choice by ModelOpt's
scores ("gradient"), by "fisher", by "fisher" after --rounds, and of random choices that spend as
much, in nats a token of the held-out text, in float32. All choices go through the model together,
a block at a time, with their linears as they are simulated.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jqx.auto import NONE, Way
from jqx_interop.auto import Limit, Scored, Scoring, chosen, refined, scored
from jqx_interop.auto.heads import head_divergence
from jqx_interop.auto.mixture import forward
from jqx_interop.auto.passes import Passes, Task
from jqx_interop.auto.rounds import DIVERGENCES
from jqx_interop.auto.scoring import run_block
from jqx_interop.auto.ways import ways_of
from jqx_interop.data import CalibrationSet, load_calibration
from jqx_interop.progress import Silent
from jqx_interop.settings import Settings

MIXES = {
    "nvfp4+fp8": (("nvfp4", "fp8"), (4.8, 5.4, 6.0), ()),
    "int4_awq+int8": (("int4_awq", "int8"), (5.0,), (("block", "64"),)),
}
METHODS = ("gradient", "fisher")
TARGET = "compressed-tensors"  # which engines read all of these mixtures in


@dataclass(frozen=True)
class Row:
    """One choice under one budget, and its KL a token, by sequence."""

    name: str
    bits: float
    choices: Mapping[str, str]


def random_choice(way: Way, most: float, rng: np.random.Generator) -> dict[str, str]:
    """Every group's cheapest candidate, and dearer ones at random as long as they fit."""
    picked = {g.name: int(np.argmin(g.costs)) for g in way.groups}
    room = most * way.per - way.fixed - sum(min(g.costs) for g in way.groups)
    by_name = {g.name: g for g in way.groups}
    steps = [(g.name, c) for g in way.groups for c in range(len(g.costs))]
    for index in rng.permutation(len(steps)):
        name, c = steps[index]
        costs = by_name[name].costs
        more = costs[c] - costs[picked[name]]
        if 0 < more <= room:
            picked[name], room = c, room - more
    return {path: g.candidates[picked[g.name]] for g in way.groups for path in g.members}


class Choices(Passes):
    """The states of every choice on their way through the model."""

    def divergences(self, rows: Sequence[Row]) -> np.ndarray:
        """[choices, sequences]: the mean KL of a token."""
        forward(self, Silent())
        states = self.file("hidden-choices.bin", len(rows))
        for s in range(len(rows)):
            for n in range(self.count):
                states.put(s, n, self.states.get(0, n))
        for i in range(self.blocks):
            params, groups = self.params(i), self.groups_of(i)
            linears = {c.name: self.linears(c, i) for c in self.task.candidates}
            for s, row in enumerate(rows):
                mine = {
                    member: linears[row.choices[group]][member]
                    for group, members in groups.items()
                    for member in members
                    if row.choices[group] != NONE
                }
                for n in range(self.count):
                    h = jnp.asarray(states.get(s, n))
                    h = run_block(params, h, mine, program=self.program(i))
                    states.put(s, n, np.asarray(h))
        return self._heads(states, len(rows))

    def _heads(self, states: Any, count: int) -> np.ndarray:
        params, tokens = self.head_params(), self.ids.shape[1]
        found = np.zeros((count, self.count * self.rows))
        for n in range(self.count):
            mine = self.states.get(self.blocks, n)
            other = np.stack([states.get(s, n) for s in range(count)])
            for row in range(self.rows):
                for at, _, share in self.chunks(np.ones(tokens, np.float32)):
                    kl = head_divergence(
                        params,
                        jnp.asarray(mine[row][at]),
                        jnp.asarray(other[:, row][:, at]),
                        jnp.asarray(share),
                        program=self.program(self.blocks - 1),
                    )
                    found[:, n * self.rows + row] += np.asarray(kl) / tokens
        return found[:, : len(self.ids)]


def rows_of(
    methods: Mapping[str, Scored], most: float, draws: int, rounds: int = 0, kept: Path = Path()
) -> list[Row]:
    """The choices of all methods, those of some after rounds, and random ones; `kept`: the folder
    that has those of every method's scores.
    """
    limit, rows = Limit(most=most, count="quantizable"), []
    for name, found in methods.items():
        choice = chosen(found, limit)
        rows.append(Row(name, choice.costs["quantizable"], choice.choices))
        if rounds and name in DIVERGENCES:
            choice = refined(found, limit, rounds, kept / name, Silent())
            bits, told = choice.costs["quantizable"], f"{name}, {rounds} rounds"
            rows.append(Row(told, bits, choice.choices))
    first = next(iter(methods.values()))
    way = ways_of(first, limit.weighting)["quantizable"]
    for draw in range(draws):
        picked = random_choice(way, most, np.random.default_rng(draw))
        costs = [g.costs[g.candidates.index(picked[g.name])] for g in way.groups]
        rows.append(Row(f"random {draw}", sum(costs) / way.per, picked))
    return rows


def measured(methods: Mapping[str, Scored], rows: list[Row], data: CalibrationSet) -> np.ndarray:
    """[choices, sequences]: the mean KL of a token."""
    found = next(iter(methods.values()))
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            job=found.candidates[0].job,
            candidates=found.candidates,
            groups=found.groups,
            data=data,
            folder=Path(folder),
            method="kl",
        )
        return Choices(task).divergences(rows)


def table(budget: float, rows: list[Row], kl: np.ndarray) -> list[str]:
    """Lines of a table: the methods, and the random choices together."""
    lines = []
    mean = kl.mean(1)
    for row, each in zip(rows, kl, strict=True):
        if not row.name.startswith("random"):
            off = each - kl[0]
            error = off.std(ddof=1) / np.sqrt(len(off))
            lines.append(
                f"| {budget:g} | {row.name} | {row.bits:.3f} | {each.mean():.5f} | "
                f"{off.mean():+.5f} ± {error:.5f} |"
            )
    others = [i for i, row in enumerate(rows) if row.name.startswith("random")]
    if others:
        bits = np.mean([rows[i].bits for i in others])
        best, middle = mean[others].min(), np.median(mean[others])
        lines.append(
            f"| {budget:g} | {len(others)} random | {bits:.3f} | best {best:.5f}, median "
            f"{middle:.5f} | |"
        )
    return lines


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("model")
    p.add_argument("--text", type=Path, required=True, help="held-out text or ids")
    p.add_argument("--calib", type=Path, help="calibration text or ids (default: the bundled text)")
    p.add_argument("--mix", choices=MIXES, action="append")
    p.add_argument("--methods", default=",".join(METHODS))
    p.add_argument("--rounds", type=int, default=2, help="how often choices are corrected")
    p.add_argument("--random", type=int, default=20)
    p.add_argument("--bits", type=float, action="append", help="budgets (default: those of a mix)")
    p.add_argument("--size", type=int, default=16, help="sequences to score on")
    p.add_argument("--eval-size", type=int, default=8, help="sequences to measure on")
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--kept", type=Path, help="where scores are kept (default: thrown away)")
    p.add_argument("--json", type=Path, help="where all choices and numbers go")
    a = p.parse_args()
    kept = a.kept or Path(tempfile.mkdtemp())
    told: list[dict[str, Any]] = []
    print("| bits | choice | bits spent | KL | difference from the first |\n|---|---|---|---|---|")
    for mix in a.mix or MIXES:
        formats, budgets, options = MIXES[mix]
        given = Settings(calib=a.calib, calib_size=a.size, calib_seq=a.length, target=TARGET)
        given = replace(given, options=options)
        methods = {
            name: scored(
                a.model, Scoring(recipes=formats, method=name), kept / mix / name, given, Silent()
            )
            for name in a.methods.split(",")
        }
        job = next(iter(methods.values())).candidates[0].job
        data = load_calibration(
            a.text,
            tokenizer_dir=job.checkpoint.path,
            vocab_size=job.spec.vocab,
            size=a.eval_size,
            length=a.length,
        )
        for budget in a.bits or budgets:
            rows = rows_of(methods, budget, a.random, a.rounds, kept / mix)
            kl = measured(methods, rows, data)
            print("\n".join([f"| **{mix}** | | | | |", *table(budget, rows, kl)]), flush=True)
            told += [
                {"mix": mix, "budget": budget, "name": row.name, "bits": row.bits, "kl": list(each)}
                for row, each in zip(rows, kl.tolist(), strict=True)
            ]
    if a.json:
        a.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
