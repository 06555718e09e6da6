# SPDX-License-Identifier: Apache-2.0
"""evaluate: the perplexity of a checkpoint on a text, and how far its predictions are from those of
a reference, one block in memory at a time.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jqx.errors import InputError
from jqx_interop.chain import rows_per_call
from jqx_interop.checkpoints import one_line, parse_size
from jqx_interop.device import compute_of
from jqx_interop.experts import room_for_states
from jqx_interop.families import context_of
from jqx_interop.hidden import HiddenStates
from jqx_interop.progress import Progress, Silent
from jqx_interop.stored import Source, open_model

from .metrics import Sums
from .passes import Chain, run_blocks, score
from .result import Evaluation, bits_per_weight, estimates
from .settings import EvalSettings
from .text import Tokens, check_same_tokens, read_tokens, windows_of
from .windows import Windows

WINDOW = 512
"""Tokens in a window where nobody says how many."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """An evaluation that is ready to run: checkpoints open, text cut into windows.

    `sources` holds the model and the reference, if there is one.
    """

    sources: tuple[Source, ...]
    named: tuple[str, ...]
    settings: EvalSettings
    tokens: Tokens
    windows: Windows
    window: int
    stride: int

    @property
    def hidden_bytes(self) -> int:
        """The size of the hidden states of all models."""
        return sum(self.windows.ids.size * _state_bytes(self, source) for source in self.sources)

    @property
    def spills(self) -> bool:
        """Whether hidden states go to disk."""
        most = parse_size(self.settings.max_memory)
        return self.hidden_bytes > min(room_for_states(s.spec, most) for s in self.sources)


def evaluate(
    model: str | Path,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    settings: EvalSettings = EvalSettings(),  # noqa: B008  frozen
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate the checkpoint `model`, plain or quantized, on a text.

    `reference`: a checkpoint with the same tokens, such as what `model` was quantized from. `text`
    replaces that of the settings. Linears, keys and values are quantized as the checkpoint says.
    Raises InputError, before anything is computed where that can be known, with a message for
    people.
    """
    settings = settings if text is None else replace(settings, text=text)
    return run(prepare(model, reference, settings), progress or Silent())


def prepare(model: str | Path, reference: str | Path | None, settings: EvalSettings) -> Task:
    """Open the checkpoints and cut the text into windows; no weight is read."""
    settings.check()
    named = (str(model),) if reference is None else (str(model), str(reference))
    sources = tuple(open_model(name) for name in named)
    spec, directory = sources[0].spec, sources[0].checkpoint.path
    for other, name in zip(sources[1:], named[1:], strict=True):
        if other.spec.vocab != spec.vocab:
            raise InputError(
                one_line(
                    f"{model} has a vocabulary of {spec.vocab} tokens and {name} one of "
                    f"{other.spec.vocab}; give a reference with the same tokens"
                )
            )
    tokens = read_tokens(settings, directory, spec.vocab)
    for other in sources[1:]:
        check_same_tokens(settings, directory, other.checkpoint.path, tokens, spec.vocab)
    windows, window, stride = windows_of(tokens, settings, min(WINDOW, *map(_positions, sources)))
    return Task(
        sources=sources,
        named=named,
        settings=settings,
        tokens=tokens,
        windows=windows,
        window=window,
        stride=stride,
    )


def run(task: Task, progress: Progress) -> Evaluation:
    """Carry out a prepared evaluation."""
    started = time.monotonic()
    sums = scores(task, progress)
    return Evaluation(
        model=task.named[0],
        reference=task.named[1] if len(task.named) > 1 else None,
        text=task.tokens.source,
        cut=task.tokens.cut,
        tokens=task.windows.tokens,
        windows=len(task.windows.ids),
        window=task.window,
        stride=task.stride,
        compute=compute_of(task.settings.compute, task.sources[0].dtype).dtype.name,
        bits_per_weight=bits_per_weight(task.sources[0]),
        **estimates(sums),
        seconds=round(time.monotonic() - started, 3),
    )


def scores(task: Task, progress: Progress) -> Sums:
    """The scores of every window, before they become means."""
    settings, windows = task.settings, task.windows
    if task.tokens.cut:
        progress.note(f"{task.tokens.source}: no more than {settings.max_tokens} tokens are read")
    if (positions := min(map(_positions, task.sources))) < task.window:
        progress.note(f"windows of {task.window} tokens, and the model knows {positions} positions")
    with _folders(task) as folders:
        chains = tuple(_chain(task, *each) for each in zip(task.sources, folders, strict=True))
        for chain, title in zip(chains, ("model", "reference"), strict=False):
            run_blocks(chain, windows, title, progress)
        return score(chains, windows, progress)


def _positions(source: Source) -> int:
    """How many tokens the model sees together, going by its configuration."""
    return max(2, context_of(source.checkpoint.config))


def _state_bytes(task: Task, source: Source) -> int:
    carrier = compute_of(task.settings.compute, source.dtype).carrier
    return source.spec.hidden * np.dtype(carrier).itemsize


def _chain(task: Task, source: Source, folder: Path | None) -> Chain:
    compute = compute_of(task.settings.compute, source.dtype)
    n, length = task.windows.ids.shape
    rows = rows_per_call(n, length, task.settings.batch_size)
    shape = (n, length, source.spec.hidden)
    hidden = HiddenStates(shape, rows, np.dtype(compute.carrier), folder)
    return Chain(source=source, compute=compute, hidden=hidden)


@contextmanager
def _folders(task: Task) -> Iterator[tuple[Path | None, ...]]:
    """Where the hidden states of every model spill to, gone afterwards; None where they need not.

    Raises InputError if the system refuses the room.
    """
    if not task.spills:
        yield (None,) * len(task.sources)
        return
    try:
        with tempfile.TemporaryDirectory(prefix="jqx-eval-") as top:
            folders = tuple(Path(top) / str(i) for i in range(len(task.sources)))
            for folder in folders:
                folder.mkdir()
            yield folders
    except OSError as error:
        if error.filename and not str(error.filename).startswith(tempfile.gettempdir()):
            raise  # another file's
        raise InputError(
            f"{tempfile.gettempdir()}: {error.strerror or error}; hidden states of "
            f"{2 * task.hidden_bytes / 2**30:.1f} GiB go there, so make room, or allow them in "
            "memory (--max-memory), or take fewer tokens (--max-tokens)"
        ) from error
