# SPDX-License-Identifier: Apache-2.0
"""generate: prompts in, texts out, all in one batch."""

import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jqx.errors import InputError
from jqx.models import Compute, ModelSpec, param_shapes
from jqx.models.cache import check_cache_format, check_heads
from jqx.models.generate import Session
from jqx.models.layers import module
from jqx.models.sampling import sequence_keys
from jqx_interop.device import compute_of
from jqx_interop.families import context_of
from jqx_interop.progress import Progress, Silent
from jqx_interop.stored import Source, open_model, read_params

from .prompts import Prompt, is_text, listed, open_tokenizer, token_ids
from .settings import Sampling, draw_of, ends_of, read_generation_config
from .text import Detokenizer, Stops

if TYPE_CHECKING:
    from jqx_interop.model import Model

OnToken = Callable[[int, str], None]
"""Called with the number of a prompt, from 0, and the text that its last token made certain."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """How one prompt went on. `ids` are all tokens, the one that ended it too; `text` is what they
    say without that, up to a stop text. `reason` is "stop" or "length".
    """

    text: str
    ids: tuple[int, ...]
    reason: str
    prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a batch of prompts became, and what it took: seconds to read the weights and the
    prompts, tokens a second of one sequence after its first two, which wait for compilers; None if
    there are no more. `weight_bytes`: all parameters in memory.
    """

    completions: tuple[Completion, ...]
    load_seconds: float
    prefill_seconds: float
    tokens_per_second: float | None
    weight_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "completions": [
                {
                    "text": c.text,
                    "ids": list(c.ids),
                    "reason": c.reason,
                    "prompt_tokens": c.prompt_tokens,
                }
                for c in self.completions
            ],
            "load_seconds": self.load_seconds,
            "prefill_seconds": self.prefill_seconds,
            "tokens_per_second": self.tokens_per_second,
            "weight_bytes": self.weight_bytes,
        }


def generate(
    model: "Model | str | Path",
    prompts: Prompt | Sequence[Prompt],
    sampling: Sampling | None = None,
    on_token: OnToken | None = None,
    compute: str = "auto",
    kv_cache: str | None = None,
) -> list[Completion]:
    """How each of the prompts goes on.

    `model`: a checkpoint in memory, or a directory or Hub id, plain or quantized. `prompts`: one or
    several texts, lists of token ids, or conversations (lists of messages with role and content,
    for the model's chat template); they run as one batch. `on_token(i, text)` is told the text of
    prompt `i` piece by piece. `compute` as for `ptq`. `kv_cache`: keep keys and values in eight
    bits, "fp8" or "int8", with a scale for every token of every head, or in four, "nvfp4"; None: as
    they are.

    Raises InputError for prompts and settings that mean nothing, for prompts that fill the context,
    and for what `load` refuses.
    """
    how = Arithmetic(compute, kv_cache)
    return list(run(model, prompts, sampling or Sampling(), on_token, how).completions)


class Arithmetic(NamedTuple):
    """`compute` and `kv_cache` of `generate`."""

    compute: str = "auto"
    kv_cache: str | None = None


PLAIN = Arithmetic()


def run(
    model: "Model | Source | str | Path",
    prompts: Prompt | Sequence[Prompt],
    sampling: Sampling,
    on_token: OnToken | None = None,
    arithmetic: Arithmetic = PLAIN,
    progress: Progress | None = None,
) -> Generation:
    """`generate` with all that is known about it; tells `progress` how far it is."""
    progress = progress or Silent()
    sampling.check()
    check_cache_format(arithmetic.kv_cache)
    start = time.perf_counter()
    source = _opened(model)
    said = read_generation_config(source.path)
    draw, ends = draw_of(sampling, said), ends_of(said, source.config)
    how = _how(arithmetic, source)
    asked = listed(prompts)
    tokenizer = open_tokenizer(source.path, bool(sampling.stop) or any(map(is_text, asked)))
    ids = token_ids(asked, tokenizer, source.path, source.spec.vocab)
    limits = _limits(ids, sampling.max_new_tokens, source.config, progress)
    params = source.read()
    # sequences end together with the longest prompt, whoever goes on for longest
    most = max(map(len, ids)) + max(limits)
    session = Session(source.spec, params, how, most)
    rows = [_Row(tokenizer, sampling.stop, ends, limit) for limit in limits]
    moments = [time.perf_counter()]
    session.read(ids)
    _check_numbers(np.asarray(session.logits()))
    keys = None if draw.temperature is None else sequence_keys(sampling.seed, _numbers(ids))
    progress.phase("generating", max(limits))
    for tokens in session.tokens(draw, keys):
        moments.append(time.perf_counter())
        for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            text = row.add(token)
            if text and on_token is not None:
                on_token(i, text)
        progress.advance(1)
        if all(row.reason for row in rows):
            break
    return Generation(
        completions=tuple(row.completion(len(i)) for row, i in zip(rows, ids, strict=True)),
        load_seconds=moments[0] - start,
        prefill_seconds=moments[1] - moments[0],
        tokens_per_second=(len(moments) - 3) / (moments[-1] - moments[2]) if moments[3:] else None,
        weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
    )


def _how(arithmetic: Arithmetic, source: "_Opened") -> Compute:
    """Raises InputError for a cache in another format than the checkpoint says, or heads allow."""
    said, asked = source.spec.kv_cache, arithmetic.kv_cache
    if said is not None and asked is not None:
        raise InputError(
            f"the checkpoint says that keys and values are kept in {said}, and kv_cache is "
            f"{asked}: leave it out"
        )
    check_heads(asked, source.spec)
    return replace(compute_of(arithmetic.compute, source.dtype), cache=asked)


def _check_numbers(logits: Float[np.ndarray, "b v"]) -> None:
    """Raises InputError if the model computes no numbers."""
    for row, of_prompt in enumerate(logits, 1):
        bad = np.count_nonzero(~np.isfinite(of_prompt))
        if bad:
            raise InputError(
                f"after prompt {row} {bad} of {of_prompt.size} scores of the next token are not "
                "finite: the weights hold NaN or infinity, or their products overflow"
            )


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A model that is known but perhaps not read."""

    spec: ModelSpec
    config: Mapping[str, Any]
    path: Path | None
    dtype: np.dtype
    read: Callable[[], Mapping[str, Any]]


def _opened(model: "Model | Source | str | Path") -> _Opened:
    source = open_model(model) if isinstance(model, str | Path) else model
    if not isinstance(source, Source):
        return _Opened(
            spec=source.spec,
            config=source.config,
            path=source.path,
            dtype=module(source.params, source.spec.names.embed)["weight"].dtype,
            read=lambda: source.params,
        )
    return _Opened(
        spec=source.spec,
        config=source.checkpoint.config,
        path=source.checkpoint.path,
        dtype=source.dtype,
        read=lambda: read_params(source, param_shapes(source.spec)),
    )


def _limits(
    ids: list[list[int]], wanted: int, config: Mapping[str, Any], progress: Progress
) -> list[int]:
    """How many tokens each prompt may go on for. Raises InputError where that is none."""
    context = context_of(config)
    limits = []
    for number, prompt in enumerate(ids, 1):
        room = context - len(prompt)
        if room < 1:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, and the model's context, "
                f"max_position_embeddings, is {context}: no room to go on, so shorten it"
            )
        if room < wanted:
            progress.note(
                f"prompt {number}: {room} new tokens at most, not {wanted}, since its "
                f"{len(prompt)} are most of the model's context of {context}"
            )
        limits.append(min(room, wanted))
    return limits


def _numbers(ids: list[list[int]]) -> list[int]:
    """A number for every prompt: that of its ids, another one if they were there before."""
    seen: Counter[tuple[int, ...]] = Counter()
    numbers = []
    for prompt in map(tuple, ids):
        numbers.append(zlib.crc32(np.array([*prompt, seen[prompt]], "<i4").tobytes()))
        seen[prompt] += 1
    return numbers


class _Row:
    """One sequence on its way."""

    def __init__(
        self, tokenizer: Any, stop: tuple[str, ...], ends: frozenset[int], limit: int
    ) -> None:
        self.reason = ""
        self._ids: list[int] = []
        self._said: list[str] = []
        self._text = None if tokenizer is None else Detokenizer(tokenizer)
        self._stops, self._ends, self._limit = Stops(stop), ends, limit

    def add(self, token: int) -> str:
        """One more token; the text that is certain now. None is taken after the last one."""
        if self.reason:
            return ""
        self._ids.append(token)
        over, full = token in self._ends, len(self._ids) == self._limit
        text = "" if over or self._text is None else self._stops.add(self._text.add(token))
        if (over or full) and self._text is not None:
            text += self._stops.add(self._text.rest()) + self._stops.rest()
        if over or self._stops.found:
            self.reason = "stop"
        elif full:
            self.reason = "length"
        self._said.append(text)
        return text

    def completion(self, prompt_tokens: int) -> Completion:
        """What became of it."""
        return Completion(
            text="".join(self._said),
            ids=tuple(self._ids),
            reason=self.reason,
            prompt_tokens=prompt_tokens,
        )
