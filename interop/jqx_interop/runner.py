# SPDX-License-Identifier: Apache-2.0
"""Running the model over the calibration data, one block in memory at a time, and reducing what its
linears meet.

All blocks of one kind run one compiled program. Rows are sequences; the row that the last call
repeats changes no maximum.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jqx.algorithms import InputStats
from jqx.calibration import AffineKV, affine_fold, affine_start, amax, input_amax, never_met
from jqx.errors import InputError
from jqx.models import (
    Experts,
    Front,
    block,
    block_prefix,
    combine,
    embed_tensors,
    front,
    kinds,
)
from jqx.transforms import Use, observe

from .blocks import load_front
from .chain import embed_rows, side_by_side
from .collecting import Collecting, Readers, readers, wanted_of
from .data import CalibrationSet
from .device import compute_of
from .experts import expert_linears
from .hidden import HiddenStates
from .job import Job
from .mixtures import MixtureRun
from .program import Program
from .progress import Progress
from .routed import RoutedStates, folder_for
from .weights import checked_amax, read_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockStats:
    """What one block's quantization needs: statistics of inputs by linear, and amax and bias by
    "<attention>.k" and ".v"; how many tokens were `sent` to linears of experts, and what is told
    of `experts`.
    """

    inputs: Mapping[str, InputStats] = field(default_factory=dict)
    kv: Mapping[str, tuple[float, np.ndarray | None]] = field(default_factory=dict)
    sent: Mapping[str, int] = field(default_factory=dict)
    experts: Mapping[str, Any] = field(default_factory=dict)


class Runner:
    """The hidden states of the calibration set on their way through the blocks."""

    def __init__(
        self,
        job: Job,
        data: CalibrationSet,
        hidden: HiddenStates,
        progress: Progress,
        place: Path,
    ):
        """`hidden` holds the states before block `hidden.block`, or nothing yet; `place`: a folder
        for what does not stay in memory.
        """
        assert job.spec is not None
        self._job, self._spec, self._data = job, job.spec, data
        self._hidden, self._progress, self._place = hidden, progress, place
        self._compute = compute_of(job.settings.compute, job.dtype)
        self._kv = job.kv_format if job.needs_kv else None
        self._blocks = {unit: i for i, unit in enumerate(job.inventory.blocks)}

    def prepare(self, left: list[int], records: list[dict[str, Any]]) -> None:
        """Bring the hidden states to before the first block in `left`, or as near as what was kept
        allows.
        """
        first = next((self._blocks[unit] for unit in left if unit in self._blocks), None)
        if first is None:
            return
        last = max(self._blocks[unit] for unit in left if unit in self._blocks)
        digests = {self._blocks[r["unit"]] + 1: r["hidden"] for r in records if "hidden" in r}
        if not (first in digests and self._hidden.resume(first, digests[first])):
            self._embed()
        ahead = kinds(self._spec)[self._hidden.block : last + 1]
        parts = sum(2 if isinstance(kind.mlp, Experts) else 1 for kind in ahead)
        self._progress.phase("calibrating", parts * self._hidden.count)

    def of_unit(self, unit: int) -> tuple[BlockStats, dict[str, Any]]:
        """The statistics of the block that is `unit`, and the digest of the hidden states after it
        if they are kept.
        """
        stats, digest = BlockStats(), None
        while unit in self._blocks and self._hidden.block <= self._blocks[unit]:
            stats = self._run_block(self._hidden.block)
            self._hidden.turn()
            digest = self._hidden.digest()
        return stats, {} if digest is None else {"hidden": digest}

    def _embed(self) -> None:
        ids = np.concatenate(self._data.batches)
        read = partial(read_tensor, self._job)
        embed_rows(self._spec, read, ids, self._hidden, self._compute)

    def _run_block(self, i: int) -> BlockStats:
        """Take every state through block `i`; returns what its linears and its attention met."""
        row = kinds(self._spec)[i].mlp
        read = readers(self._job, self._job.inventory.blocks[i])
        own = {path for e in expert_linears(self._spec, i) for path in e.values()}
        states = None
        if isinstance(row, Experts):
            hidden = self._hidden
            folder = self._place if hidden.folder else folder_for(hidden.shape, 4, self._place)
            states = RoutedStates(row, hidden.shape, hidden.real, self._compute, folder)
        params = load_front(self._job, i, self._compute)
        stats = self._run_calls(i, params, {p: m for p, m in read.items() if p not in own}, states)
        if states is None:
            return stats
        leaders = {p: m for p, m in read.items() if p in own}
        of_experts = self._run_experts(i, params, states, leaders)
        inputs = {**stats.inputs, **of_experts.inputs}
        return replace(of_experts, inputs=inputs, kv=stats.kv)

    def _run_calls(
        self, i: int, params: Any, read: Readers, states: RoutedStates | None
    ) -> BlockStats:
        """The block, or its front whose results go to `states`; `read`: the inputs of which more
        than the amax is needed.
        """
        kind, prefix = kinds(self._spec)[i], block_prefix(self._spec, i)
        sizes = [len(batch) for batch in self._data.batches]
        whole = frozenset(path.removeprefix(f"{prefix}.") for path in read)
        program = Program(self._spec, kind, self._compute, self._job.dtype.name, self._kv, whole)
        fold = Folding(sizes, self._job.dtype)
        wanted = {p: wanted_of(self._job, m, self._data.tokens) for p, m in read.items()}
        collecting = Collecting(self._job, wanted, sizes)
        put = self._hidden.put if states is None else states.put

        def call(n: int) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
            h, maxima, kept = block_step(params, self._hidden.get(n), program=program)
            put(n, h)
            jax.block_until_ready(maxima)
            return maxima, kept

        found: list[dict[str, jax.Array]] = []
        # every call under way decodes weights of its own
        workers = 1 if self._job.settings.low_memory else None
        for maxima, kept in side_by_side(call, self._hidden.count, workers):
            found.append(maxima)
            for path in read:
                collecting.add(path, kept.pop(path.removeprefix(f"{prefix}.")))
            fold.add(kept)
            self._progress.advance(1)
        largest = {name: float(input_amax(part[name] for part in found)) for name in found[0]}
        stats = self._checked(prefix, largest, fold)
        more = collecting.results(read)
        inputs = {p: {**stats.inputs.get(p, {}), **more.get(p, {})} for p in {*stats.inputs, *more}}
        return replace(stats, inputs=inputs)

    def _run_experts(
        self, i: int, params: Any, states: RoutedStates, leaders: Readers
    ) -> BlockStats:
        """The experts of block `i`, and its end; returns what they met."""
        kind, count = kinds(self._spec)[i], self._hidden.count
        run = MixtureRun(self._job, i, states, leaders, self._place)
        met = run.run(lambda share: self._progress.advance(share * count))
        for n in range(count):
            front, total = states.front(n)
            self._hidden.put(n, combine(self._spec, kind, params, front, total, self._compute))
        states.close()
        experts = zip(expert_linears(self._spec, i), run.tokens.tolist(), strict=True)
        sent = {path: n for own, n in experts for path in own.values()}
        return BlockStats(inputs=met, sent=sent, experts=run.told())

    def _checked(self, prefix: str, found: dict[str, float], fold: "Folding") -> BlockStats:
        if spoilt := [name for name, value in found.items() if not np.isfinite(value)]:
            self._blame(prefix, spoilt)
        for name in never_met({n: v for n, v in found.items() if n.endswith(".weight")}):
            what = f"{prefix}.{name.removesuffix('.weight')}"
            self._progress.note(f"{what} met only zeros while calibrating: its scale is a guess")
        names = self._spec.names
        kept = {n: (v, None) for n, v in found.items() if n in (names.kept_k, names.kept_v)}
        inputs = {n.removesuffix(".weight"): v for n, v in found.items() if n not in kept}
        return BlockStats(
            inputs={f"{prefix}.{name}": {"amax": np.float32(v)} for name, v in inputs.items()},
            kv={f"{prefix}.{name}": kv for name, kv in (kept | fold.results()).items()},
        )

    def _blame(self, prefix: str, spoilt: list[str]) -> NoReturn:
        """Raise InputError for a weight that is not finite, else for the first spoilt input."""
        inside = [n for n in self._job.inventory.tensors if n.startswith(prefix + ".")]
        for name in (*embed_tensors(self._spec), *inside):
            checked_amax(read_tensor(self._job, name), name)
        first = next((n for n in inside if n.removeprefix(prefix + ".") in spoilt), prefix)
        raise InputError(
            f"the calibration inputs of {first.removesuffix('.weight')} are not finite; "
            "check the weights, or calibrate in another precision (--compute)"
        )


@partial(jax.jit, static_argnames=("program",), donate_argnums=(1,))
def block_step(
    params: Any,
    h: jax.Array,
    *,
    program: Program,
) -> tuple[jax.Array | Front, dict[str, jax.Array], dict[str, jax.Array]]:
    """One call: states after the block, or its front if it has experts, the maxima, and whole
    inputs, keys and values if asked.
    """

    def collect(use: Use, x: jax.Array) -> dict[str, jax.Array] | None:
        if use.op == "name" and program.kv and program.kv.affine:
            return {"whole": x}  # because the order of batches matters
        if not (use.op == "dot" or (use.op == "name" and program.kv)):
            return None
        found = {"amax": amax(x, jnp.dtype(program.dtype))}
        if use.path.removesuffix(".weight") in program.whole:
            found["whole"] = x.reshape(*h.shape[:2], x.shape[-1])
        return found

    def run(params: Any, h: jax.Array) -> jax.Array | Front:
        step = front if isinstance(program.kind.mlp, Experts) else block
        return step(program.spec, program.kind, params, h, positions, program.compute)

    positions = jnp.broadcast_to(jnp.arange(h.shape[1], dtype=jnp.int32)[None, :], h.shape[:2])
    out, found = observe(run, collect)(params, h)
    maxima = {name: part["amax"] for name, part in found.items() if "amax" in part}
    whole = {
        name.removesuffix(".weight"): part["whole"]
        for name, part in found.items()
        if "whole" in part
    }
    return out, maxima, whole


class Folding:
    """Keys and values put together into whole statistics batches, and folded in their order."""

    def __init__(self, sizes: list[int], dtype: np.dtype):
        """`sizes`: sequences in every statistics batch; `dtype`: the model's."""
        self._sizes, self._dtype = sizes, dtype
        self._waiting: dict[str, np.ndarray] = {}
        self._state: dict[str, AffineKV] = {}

    def add(self, kept: Mapping[str, jax.Array]) -> None:
        """The next keys and values [b, heads, t, dim] by name; what is beyond the last batch is
        dropped.
        """
        for name, x in kept.items():
            rows = np.asarray(x)
            if name not in self._state:
                self._state[name] = affine_start(rows.shape[1], rows.shape[3], self._dtype)
            whole = np.concatenate([self._waiting[name], rows]) if name in self._waiting else rows
            done = int(self._state[name].batches)
            while done < len(self._sizes) and len(whole) >= self._sizes[done]:
                batch, whole = whole[: self._sizes[done]], whole[self._sizes[done] :]
                self._state[name] = _fold(self._state[name], batch)
                done += 1
            self._waiting[name] = whole

    def results(self) -> dict[str, tuple[float, np.ndarray | None]]:
        """Name -> (amax, bias) after the last batch."""
        return {name: (float(s.amax), np.asarray(s.bias)) for name, s in self._state.items()}


_fold = jax.jit(affine_fold)
