# SPDX-License-Identifier: Apache-2.0
"""Train the bundled model: `python -m training.train TEXT RUN`.

RUN gets the tokenizer, the state of the training (every few minutes; the same command goes on from
there), the parameters of an early step, and `log.jsonl`. The learning rate rises, stays, and falls
to zero over the last part of `--steps`, so a run that has not begun to fall can be given more or
fewer steps.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import serialization
from optax.contrib import MuonDimensionNumbers
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from jqx.models import forward
from jqx.models.linen import init_params

from .model import ARITHMETIC, CONFIG, SPEC
from .text import Corpus, encode, read_corpus, train_tokenizer

LENGTH = CONFIG["max_position_embeddings"]
WARMUP, FALL = 200, 0.3
EVERY, EVERY_VALID = 250, 1000
EARLY = 1250  # the step whose parameters are kept, to be averaged with the last ones


class State(NamedTuple):
    """All that a step changes."""

    params: Any
    optimizer: Any
    step: jax.Array


def schedule(peak: float, steps: int) -> optax.Schedule:
    """Up, level, and down to zero over the last FALL of the steps."""
    fall = int(FALL * steps)
    parts = [
        optax.linear_schedule(0.0, peak, WARMUP),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, 0.0, fall),
    ]
    return optax.join_schedules(parts, [WARMUP, steps - fall])


def make_optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, Adam at the same RMS rate for the embedding and the
    norms.
    """

    def matrices(params: Any) -> Any:
        def row(path: Any, x: jax.Array) -> MuonDimensionNumbers | None:
            inside = x.ndim == 2 and "embed_tokens" not in jax.tree_util.keystr(path)
            return MuonDimensionNumbers() if inside else None

        return jax.tree_util.tree_map_with_path(row, params)

    muon = optax.contrib.muon(
        schedule(rate, steps),
        weight_decay=0.1,
        adam_b2=0.98,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=matrices,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def loss(params: Any, ids: jax.Array) -> jax.Array:
    """Mean cross entropy of the next token, in nats."""
    logits = forward(SPEC, params, ids[:, :-1], ARITHMETIC)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


@partial(jax.jit, static_argnames=("optimizer",), donate_argnums=(0,))
def train_step(
    state: State, ids: jax.Array, *, optimizer: optax.GradientTransformation
) -> tuple[State, jax.Array]:
    """One batch [b, LENGTH + 1]."""
    value, gradient = jax.value_and_grad(loss)(state.params, ids)
    updates, kept = optimizer.update(gradient, state.optimizer, state.params)
    return State(optax.apply_updates(state.params, updates), kept, state.step + 1), value


valid_step = jax.jit(loss)


def windows(ids: np.ndarray, length: int) -> np.ndarray:
    """All of `ids` as rows of length + 1 that overlap by one: every token is predicted once."""
    count = (len(ids) - 1) // length
    return np.stack([ids[i * length : i * length + length + 1] for i in range(count)])


def batch(ids: np.ndarray, rows: int, step: int) -> np.ndarray:
    """The batch of this step: rows that begin anywhere."""
    starts = np.random.default_rng([0, step]).integers(0, len(ids) - LENGTH - 1, rows)
    return np.stack([ids[i : i + LENGTH + 1] for i in starts])


def mean_loss(params: Any, ids: np.ndarray) -> float:
    """Nats a token over all of `ids`; the last few rows are left out so that batches are full."""
    rows = windows(ids, LENGTH)
    parts = [rows[i : i + 16] for i in range(0, len(rows) - 15, 16)]
    return float(np.mean([valid_step(params, part) for part in parts]))


def save(path: Path, data: bytes) -> None:
    """Replace `path` at once."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.replace(path)


def tokenized(corpus: Corpus, run: Path) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer of this run, trained if it is new, and the ids of an epoch."""
    path = run / "tokenizer.json"
    if not path.is_file():
        train_tokenizer(corpus.train(), CONFIG["vocab_size"]).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    return tokenizer, encode(tokenizer, corpus.train())


def train(text: Path, run: Path, steps: int, rows: int, rate: float) -> None:
    """Take the run from where it stands to `steps`."""
    run.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(text)
    tokenizer, ids = tokenized(corpus, run)
    valid = encode(tokenizer, corpus.valid_wiki), encode(tokenizer, corpus.valid_papers)
    optimizer = make_optimizer(rate, steps)
    params = init_params(SPEC, jax.random.key(0))
    state = State(params, optimizer.init(params), jnp.int32(0))
    if (run / "state").is_file():
        state = serialization.from_bytes(state, (run / "state").read_bytes())
        state = jax.tree.map(jnp.asarray, state)
    first, began = int(state.step), time.monotonic()
    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, TextColumn("{task.fields[loss]}")) as bar,
        (run / "log.jsonl").open("a") as log,
    ):
        task = bar.add_task("training", total=steps, completed=first, loss="")
        recent = []
        for step in range(first, steps):
            state, value = train_step(state, batch(ids, rows, step), optimizer=optimizer)
            recent.append(value)
            bar.advance(task)
            if (step + 1) % EVERY and step + 1 < steps:
                continue
            line = {
                "step": step + 1,
                "loss": float(np.mean(recent)),
                "seconds": time.monotonic() - began,
            }
            line["epochs"] = (step + 1) * rows * LENGTH / len(ids)
            if (step + 1) % EVERY_VALID == 0 or step + 1 == steps:
                line |= dict(
                    zip(
                        ("wiki", "papers"), (mean_loss(state.params, v) for v in valid), strict=True
                    )
                )
            print(json.dumps(line), file=log, flush=True)
            bar.update(task, loss=f"loss {line['loss']:.3f}")
            save(run / "state", serialization.to_bytes(state))
            if step + 1 == EARLY:
                save(run / "early", serialization.to_bytes(state.params))
            recent = []


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--rows", type=int, default=16, help="sequences in a batch")
    parser.add_argument("--rate", type=float, default=5e-3, help="peak learning rate")
    options = parser.parse_args()
    train(options.text, options.run, options.steps, options.rows, options.rate)


if __name__ == "__main__":
    main()
