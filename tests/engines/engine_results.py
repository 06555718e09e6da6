# SPDX-License-Identifier: Apache-2.0
"""How far an engine's logprobs are from those computed here, beside the effect of quantization.

What is computed here is what is stored, decoded and multiplied in float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from engine_runs import Engine

import jqx
import jqx_interop as ji
from jqx.tensors.paths import flatten, unflatten

FUSED = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one checkpoint in one engine.

    `effect`: mean |logprob here - logprob of the unquantized model here|, and its largest;
    `difference`: |logprob there - logprob here|, mean, median and largest, None if there is none.
    `same`: how many of the `tokens` that it chose are the likeliest here, after the same tokens;
    `gap`: by how much, in nats, one of them was less likely than the likeliest. `kind`: a row of
    LIMITS.
    """

    model: str
    target: str
    recipe: str
    engine: str
    dtype: str
    loads: bool
    method: str | None = None
    error: str | None = None
    kind: str = "exact"
    effect: tuple[float, float] = (0.0, 0.0)
    difference: tuple[float, float, float] | None = None
    tokens: int = 0
    same: int = 0
    gap: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, numbers short."""
        return {key: _short(value) for key, value in asdict(self).items()}


LIMITS = {"exact": 1e-3, "decoded": 0.1, "ties": 0.5, "apart": 1.25, "noise": 1.5}
"""How far an engine may be from here, in the mean.

    exact    the same numbers in float32: parts of the effect, or twice the unquantized difference
    decoded  weights go by way of bfloat16: parts of the effect
    ties     activations are rounded, in float32: parts of the effect, in the median half of that
    apart    activations are rounded otherwise, or after bfloat16: parts of the effect
    noise    bfloat16: parts of the difference that the unquantized model has

A difference in the last bit becomes one of a whole code where an activation lies at a tie, and all
later layers and tokens see it. In float32 that meets few tokens, so the median is small. After
bfloat16 it happens everywhere: two runs of one model are then about as far from each other as from
the unquantized model, and all that is left to see is that the error has the size it should have.
"""

SHALLOW = 8
"""Up to so many blocks few tokens meet a tie in float32. In SmolLM2-135M, of 30 blocks, most do:
the last bit of the gains of its norms, changed here, moves logprobs by 0.13 in the mean with FP8 by
token and by 0.16 with INT8 by token, where the effects are 0.22 and 0.20.
"""


def within(row: Mapping[str, Any], plain: Sequence[float]) -> bool:
    """Whether an Outcome keeps to its limit. `plain`: the difference of the unquantized model in
    the same engine.

    An engine takes another token where two logprobs are off, so by no more than twice the largest.
    """
    kind, (mean, median, _) = row["kind"], row["difference"]
    limit = LIMITS[kind]
    usual, _, largest = plain if kind == "noise" else (row["effect"][0], 0.0, row["effect"][1])
    if kind == "ties" and median > 0.5 * limit * usual:
        return False
    least = 2 * plain[0] if kind == "exact" else 0.0
    return mean <= max(limit * usual, least) and row["gap"] <= 2 * limit * largest


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.3g}")
    return [_short(each) for each in value] if isinstance(value, list | tuple) else value


class Here:
    """One checkpoint, run here in float32 as `engine` reads it."""

    def __init__(self, folder: str | Path, engine: Engine | None = None):
        self._model = ji.load(folder)
        leaves = {p: _wide(leaf) for p, leaf in flatten(self._model.params).items()}
        if engine is not None:
            leaves |= {p: _left(q, engine) for p, q in leaves.items()}
            leaves |= _reconciled(leaves) if engine.fuses else {}
        self._params = unflatten(leaves)

    def kind(self, engine: Engine) -> str:
        """The row of LIMITS that the outcome of `engine` has to keep to."""
        stored = [q for q in flatten(self._params).values() if isinstance(q, jqx.QTensor)]
        weights = {q.format.name for q in stored}
        inputs = {q.input_format for q in stored} - {None}
        apart, narrow = set(engine.apart), engine.dtype == "bfloat16"
        deep = len(self._model.spec.blocks) > SHALLOW
        if inputs or self._model.spec.kv_cache is not None or "fp8_block" in weights & apart:
            return "apart" if narrow or deep or apart & (weights | inputs) else "ties"
        return "noise" if narrow else "decoded" if "nvfp4" in weights & apart else "exact"

    def logprobs(self, ids: np.ndarray) -> np.ndarray:
        """Those of all tokens at every place."""
        return np.asarray(_logprobs(self._model.module, self._params, ids))


@partial(jax.jit, static_argnums=0)
def _logprobs(module: Any, params: Any, ids: Any) -> jax.Array:
    return jax.nn.log_softmax(module.apply({"params": params}, ids))


def _wide(leaf: Any) -> Any:
    """In float32, where stored numbers become that without another rounding."""
    if isinstance(leaf, jqx.QTensor):
        return leaf.replace(dtype=np.dtype(np.float32))
    return np.asarray(leaf, np.float32)


def _left(leaf: Any, engine: Engine) -> Any:
    if isinstance(leaf, jqx.QTensor) and leaf.input_format in engine.leaves:
        return leaf.replace(input_format=None, input_scale=None)
    return leaf


def _reconciled(leaves: Mapping[str, Any]) -> dict[str, jqx.QTensor]:
    """FP8 weights with a scale a tensor, rounded again with the largest scale of those that an
    engine fuses, by way of float16 as vLLM does it.
    """
    found: dict[str, jqx.QTensor] = {}
    for path in leaves:
        parent, _, name = path.removesuffix(".weight").rpartition(".")
        for module, members in FUSED:
            if parent.endswith(module) and name == members[0]:
                paths = [f"{parent}.{member}.weight" for member in members]
                group = {p: leaves[p] for p in paths if _one_scale(leaves[p])}
                if group:
                    largest = max(float(q.scale.reshape(())) for q in group.values())
                    found |= {p: _rounded_again(q, largest) for p, q in group.items()}
    return found


def _one_scale(leaf: Any) -> bool:
    return isinstance(leaf, jqx.QTensor) and leaf.format.name == "fp8"


def _rounded_again(q: jqx.QTensor, largest: float) -> jqx.QTensor:
    scale = np.float32(np.asarray(q.scale).reshape(()))
    if scale == np.float32(largest):
        return q
    codes = np.asarray(q.codes).view(ml_dtypes.float8_e4m3fn)
    decoded = (codes.astype(np.float16) * np.float16(1) * scale).astype(np.float16)
    wide = decoded.astype(np.float32) * (np.float32(1) / np.float32(largest))
    again = np.clip(wide, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(q.codes.dtype)
    return q.replace(codes=again, scale=np.full_like(np.asarray(q.scale), largest))


def compare(
    answer: Mapping[str, Any], here: Here, plain: np.ndarray, prompts: np.ndarray
) -> dict[str, Any]:
    """The fields of an Outcome that an engine's `answer` decides. `plain`: the logprobs of the
    prompts' tokens but the first in the unquantized model.
    """
    length = prompts.shape[1]
    answered = "logprobs" in answer
    tokens = np.array(answer["tokens"], np.int32) if answered else prompts[:, :0]
    table = here.logprobs(np.concatenate([prompts, tokens], 1))
    mine = picked(table[:, : length - 1], prompts[:, 1:])
    found: dict[str, Any] = {
        "loads": answer["loads"],
        "method": answer.get("method"),
        "error": answer.get("error"),
        "effect": _sizes(mine - plain)[::2],
    }
    if not answered:
        return found
    after = table[:, length - 1 : -1]
    gaps = after.max(-1) - picked(after, tokens)
    return found | {
        "difference": _sizes(np.array(answer["logprobs"]) - mine),
        "tokens": int(tokens.size),
        "same": int(np.sum(gaps == 0)),
        "gap": float(gaps.max()),
    }


def picked(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The logprobs of `ids` in a table of all."""
    return np.take_along_axis(table, ids[..., None].astype(np.int64), -1)[..., 0]


def _sizes(difference: np.ndarray) -> tuple[float, float, float]:
    d = np.abs(difference)
    return float(d.mean()), float(np.median(d)), float(d.max())
