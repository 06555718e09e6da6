# SPDX-License-Identifier: Apache-2.0
"""What an evaluation will cost, from headers and one measured rate: no weight is read."""

import math
from dataclasses import dataclass

import numpy as np

from jqx_interop.chain import ROWS_PER_CALL
from jqx_interop.device import callers, compute_of
from jqx_interop.plan import (
    COMPILER,
    PROCESS,
    STARTUP,
    active_parameters,
    product_rate,
    score_operations,
    states_beside,
    streamed_parameters,
    working_width,
)
from jqx_interop.stored import Source

from .passes import chunk_of
from .task import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Estimates: seconds, and bytes of memory and of hidden states on disk."""

    seconds: float
    peak_memory_bytes: int
    spilled_bytes: int


def forecast(task: Task) -> Forecast:
    """Forecast a task; measures how fast a matrix product is."""
    length = task.windows.ids.shape[1]
    rows = max(ROWS_PER_CALL, length * max(task.settings.batch_size, 1))
    states = task.hidden_bytes
    beside = max(_beside(task, source) for source in task.sources)  # one model after the other
    blocks = max(_block_bytes(task, source, rows) for source in task.sources)
    heads = sum(_head_bytes(task, source) for source in task.sources)
    seconds = STARTUP + sum(_operations(task, source) for source in task.sources) / product_rate()
    memory, disk = (0, 2 * states + beside) if task.spills else (states + beside, 0)
    return Forecast(
        seconds=round(seconds, 1),
        peak_memory_bytes=PROCESS + COMPILER + max(blocks, heads) + memory,
        spilled_bytes=disk,
    )


def _beside(task: Task, source: Source) -> int:
    numbers = task.windows.ids.size * source.spec.hidden
    return states_beside(source.spec, numbers, _carrier(task, source))


def _block_bytes(task: Task, source: Source, rows: int) -> int:
    """A block's weights, and what calls side by side need for their tokens and decoded weights."""
    spec, carrier = source.spec, _carrier(task, source)
    weights, widths = streamed_parameters(spec), working_width(spec)
    decoded = weights * (source.dtype.itemsize + carrier) if source.choices else 0
    calls = callers() * (min(task.windows.ids.size, rows) * widths * 4 + decoded)
    return weights * carrier + calls


def _head_bytes(task: Task, source: Source) -> int:
    vocab = source.spec.vocab
    return (
        vocab * source.spec.hidden * _carrier(task, source)
        + callers() * 4 * chunk_of(vocab) * vocab * 4
    )


def _carrier(task: Task, source: Source) -> int:
    return np.dtype(compute_of(task.settings.compute, source.dtype).carrier).itemsize


def _operations(task: Task, source: Source) -> int:
    """Products of weights, and attention, which is four times as slow."""
    spec, tokens = source.spec, task.windows.ids.size
    scores = score_operations(spec, tokens, task.windows.ids.shape[1])
    blocks = len(spec.blocks) * 2 * active_parameters(spec) * tokens + 4 * scores
    return blocks + 2 * math.prod((spec.vocab, spec.hidden, task.windows.tokens))
