# SPDX-License-Identifier: Apache-2.0
"""What a run would do and cost, from config.json and tensor headers alone: no weight is read.

Memory and time are estimates. Time rests on two figures measured when the plan is made, the rate of
one matrix product and of one encode; memory is counted, plus what an idle process with a compiler
in it takes.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqx.algorithms.table import ALGORITHMS, applicable
from jqx.formats import find_format
from jqx.models import (
    Attention,
    BlockKind,
    Experts,
    Mlp,
    ModelSpec,
    expert_shapes,
    front_shapes,
)
from jqx.tensors.paths import owner_of

from .chain import ROWS_PER_CALL
from .checkpoints import parse_size, plan_shards
from .device import callers, compute_of
from .engines import Verdict, engines_for
from .experts import linears_of_experts, room_for_states
from .families import context_of
from .job import Job
from .report import Coverage, coverage_of
from .routed import IN_MEMORY
from .weights import CHUNK, encode_weight, linear_groups

PROCESS = 110 << 20  # bytes of a process that has loaded JAX
COMPILER = 130 << 20  # bytes that compiling the program of a block takes
STARTUP = 3.0  # seconds to load JAX and compile
SEARCH_COMPILER = 150 << 20  # bytes that compiling searches takes more
SEARCHED_COPIES = 8  # of the largest weight, in float32
SEARCH_STARTUP = 6.0  # seconds to compile searches
EXPERTS_MET = 4  # experts whose second moments are in memory: collected, put together, searched
DECODERS = 4  # weights of a source that are decoded side by side


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearPlan:
    """One linear that will be quantized: to what, and how many bytes it takes then."""

    path: str
    shape: tuple[int, ...]
    weight: str
    input: str | None
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The forecast of a run: bytes, seconds; `tokens` is 0 where no model is run; `engines`: what
    every engine will make of the result, as far as formats tell; `notes`: what it rests on where
    there are no weights.
    """

    recipe: str
    kv_cache: str
    target: str
    linears: tuple[LinearPlan, ...]
    coverage: Coverage
    source_bytes: int
    output_bytes: int
    free_bytes: int
    files: int
    tokens: int
    peak_memory_bytes: int
    spilled_bytes: int
    seconds: float
    engines: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        data = asdict(self)
        data["coverage"]["share"] = self.coverage.share
        data["engines"] = {verdict.engine: verdict.to_json() for verdict in self.engines}
        return data


def make_plan(job: Job, tokens: int = 0, out: Path | None = None) -> Plan:
    """Forecast `job`, which runs the model on `tokens` tokens. `out` says whose disk must have
    room.
    """
    shards = plan_shards(job.outputs, job.settings.max_shard_size)
    sizes: dict[str, int] = {}
    for tensor in job.outputs:
        path = owner_of(tensor.name, job.choices) or ""
        sizes[path] = sizes.get(path, 0) + tensor.nbytes
    memory, spilled = _memory(job, tokens)
    modules = job.modules
    return Plan(
        recipe=job.recipe.name,
        kv_cache=job.kv or "none",
        target=job.settings.target,
        linears=tuple(
            LinearPlan(
                path=p, shape=modules[p].shape, weight=c.weight or "", input=c.input, bytes=sizes[p]
            )
            for p, c in job.choices.items()
        ),
        coverage=coverage_of(job),
        source_bytes=_source_bytes(job),
        output_bytes=sum(shard.size for shard in shards),
        free_bytes=shutil.disk_usage(_existing(out or Path.cwd())).free,
        files=len(shards),
        tokens=tokens,
        peak_memory_bytes=memory,
        spilled_bytes=spilled,
        seconds=round(_seconds(job, tokens), 1),
        engines=engines_for(job.described, job.settings.target, job.kv),
        notes=tuple(_notes(job)),
    )


def _source_bytes(job: Job) -> int:
    if job.outlined:
        return sum(tensor.nbytes for tensor in job.checkpoint.tensors.values())
    return sum(file.stat().st_size for file in job.checkpoint.files)


def _notes(job: Job) -> Iterator[str]:
    """What to know of a plan that is made of a config.json alone."""
    if job.outlined:
        yield f"no weights are here: this is what {job.dtype.name} ones by config.json would give"
    if job.outlined and (more := job.checkpoint.config.get("num_nextn_predict_layers")):
        yield f"layers that predict further tokens go on as they are and are not counted: {more}"


def tokens_of(job: Job) -> int:
    """How many tokens a run would calibrate on, where its data are not looked at."""
    if job.spec is None or not (job.needs_inputs or job.needs_kv):
        return 0
    length = min(job.settings.calib_seq, context_of(job.checkpoint.config))
    return job.settings.calib_size * length


def _existing(path: Path) -> Path:
    path = path.resolve()
    return path if path.exists() else _existing(path.parent)


def _memory(job: Job, tokens: int) -> tuple[int, int]:
    """Peak memory, and bytes of hidden states and of statistics that go to disk."""
    largest = max(math.prod(job.modules[path].shape) for path in job.choices)
    encoding = 2 * min(largest, CHUNK) * (4 + 4 + 2) + largest
    if job.checkpoint.source is not None:  # decoded ones are in memory, those of files are not
        encoding += DECODERS * largest * job.dtype.itemsize
    if not tokens or job.spec is None:
        return PROCESS + encoding, 0
    carrier = np.dtype(compute_of(job.settings.compute, job.dtype).carrier).itemsize
    block, at_once = streamed_parameters(job.spec) * carrier, callers()
    if job.settings.low_memory:
        block, at_once = _compressed_block(job, carrier), 1
    hidden, spilled = _states(job, job.spec, tokens, carrier)
    widths = working_width(job.spec)
    rows = max(ROWS_PER_CALL, job.settings.calib_seq * max(job.settings.batch_size, 1))
    calls = at_once * min(tokens, rows) * widths * 4
    searching, moments = _searching(job, largest)
    return PROCESS + COMPILER + block + hidden + calls + encoding + searching, spilled + moments


def _states(job: Job, spec: ModelSpec, tokens: int, carrier: int) -> tuple[int, int]:
    """Bytes of hidden states, and of what lies beside them while experts are run: in memory, and on
    disk.
    """
    numbers = tokens * spec.hidden
    hidden = numbers * carrier
    spills = hidden > room_for_states(spec, parse_size(job.settings.max_memory))
    beside = states_beside(spec, numbers, carrier)
    files = spills or 4 * numbers * 4 > IN_MEMORY
    disk = (2 * hidden if spills else 0) + (beside if files else 0)
    return (0 if spills else hidden) + (0 if files else beside), disk


def states_beside(spec: ModelSpec, numbers: int, carrier: int) -> int:
    """Bytes that lie beside hidden states of so many numbers while the experts of a block run."""
    rows = [kind.mlp for kind in spec.blocks if isinstance(kind.mlp, Experts)]
    kept = 3 if any(row.shared is not None for row in rows) else 2
    return numbers * (kept * carrier + 4) if rows else 0


def _compressed_block(job: Job, carrier: int) -> int:
    """Bytes of the largest block as it will be written, and of the weights that are decoded
    together: those of linears that read one input.
    """
    units = [job.inventory.units[unit] for unit in job.inventory.blocks]
    block_of = {name.rpartition(".")[0]: i for i, unit in enumerate(units) for name in unit}
    sizes = [0] * len(units)
    for tensor in job.outputs:
        if (path := owner_of(tensor.name, block_of)) is not None:
            sizes[block_of[path]] += tensor.nbytes
    groups = [group for unit in units for group in linear_groups(job, unit)]
    decoded = (sum(math.prod(job.modules[path].shape) for path in group) for group in groups)
    return max(sizes) + max(decoded, default=0) * carrier


def _searching(job: Job, largest: int) -> tuple[int, int]:
    """What second moments of a block take, those of the block before beside them, and a search in
    the largest weight; and bytes of moments on disk, where those of experts lie but for a few.
    """
    experts = linears_of_experts(job.spec)
    own: set[str] = set()
    met: set[tuple[str, int]] = set()  # linears of one width in a module mostly read one input
    for path in job.choices:
        if "gram" in job.wanted(path):
            module = path.rpartition(".")[0]
            own.update([module] if path in experts else [])
            met.add((module, job.modules[path].shape[1]))
    moments: dict[str, int] = {}
    files: dict[str, int] = {}
    for module, width in met:
        block, where = module.rpartition(".")[0], files if module in own else moments
        where[block] = where.get(block, 0) + 4 * width * width
    if not met:  # whole matrices all the same, where scales are rounded
        return SEARCHED_COPIES * 4 * largest if job.target.half_scales else 0, 0
    widths = [width for module, width in met if module in own]
    few = EXPERTS_MET * sum(4 * width * width for width in set(widths))
    memory = SEARCH_COMPILER + few + 3 * max(moments.values(), default=0)
    return memory + SEARCHED_COPIES * 4 * largest, 3 * max(files.values(), default=0)


def streamed_parameters(spec: ModelSpec) -> int:
    """Weights of the largest block that are in memory together, where experts are read one by
    one.
    """
    return max(_weights(spec, kind, callers()) for kind in set(spec.blocks))


def active_parameters(spec: ModelSpec) -> int:
    """Weights that a token meets in the largest block."""
    return max(_weights(spec, kind, 0) for kind in set(spec.blocks))


def _weights(spec: ModelSpec, kind: BlockKind, experts: int) -> int:
    """Those of a block with so many of its experts, as many as a token meets where 0."""
    row = kind.mlp
    front = sum(math.prod(s) for s in front_shapes(spec, kind).values() if len(s) > 1)
    if not isinstance(row, Experts):
        return front
    whole = sum(math.prod(s) for s in expert_shapes(spec, kind).values() if len(s) > 1)
    return front + whole // row.number * (experts or row.top_k)


def working_width(spec: ModelSpec) -> int:
    """Numbers for each token that a block computes with at most."""
    attentions = [k.attention for k in spec.blocks if isinstance(k.attention, Attention)]
    inner = max((inner_width(kind) for kind in spec.blocks), default=0)
    heads = max((row.heads * row.head_dim for row in attentions), default=0)
    return 6 * spec.hidden + 3 * inner + 4 * heads


def inner_width(kind: BlockKind) -> int:
    """Inner channels for each token of an MLP, or of all the experts that it goes to."""
    row = kind.mlp
    if isinstance(row, Experts):
        beside = (mlp.inner for mlp in (row.shared, row.residual) if mlp is not None)
        return row.top_k * row.each.inner + sum(beside)
    return row.inner if isinstance(row, Mlp) else 0


def score_operations(spec: ModelSpec, tokens: int, length: int) -> int:
    """Those of the scores of all layers, for `tokens` in texts of `length`."""
    rows = (k.attention for k in spec.blocks if isinstance(k.attention, Attention))
    return sum(2 * tokens * length * row.heads * row.head_dim for row in rows)


def _seconds(job: Job, tokens: int) -> float:
    """Products at the measured rate, attention at a quarter of it, and weights at the measured
    encoding rate.
    """
    choice = next(iter(job.choices.values()))
    w = np.ones((1024, 1024), job.dtype)
    fmt = find_format(choice.weight or "")
    encoding = _best(lambda: encode_weight(w, fmt, None))
    numel = sum(math.prod(job.modules[path].shape) for path in job.choices)
    seconds = STARTUP + numel / w.size * encoding
    if tokens and job.spec is not None:
        rate = product_rate()
        blocks = len(job.spec.blocks)
        scores = score_operations(job.spec, tokens, job.settings.calib_seq)
        seconds += (blocks * 2 * active_parameters(job.spec) * tokens + 4 * scores) / rate
    if work := _search_operations(job):
        seconds += SEARCH_STARTUP + work / product_rate()
    return seconds


def _search_operations(job: Job) -> float:
    """Those of products with second moments: to collect them is a part of running the model."""
    found = 0.0
    for path, choice in job.choices.items():
        n, k = job.modules[path].shape
        for step in applicable(job.config.steps, find_format(choice.weight or "")):
            found += 2.0 * n * k * k * ALGORITHMS[step.method].products
    return found


def product_rate() -> float:
    """Operations a second in a float32 matrix product, measured now."""
    a = jnp.ones((1024, 1024), jnp.float32)
    return 2 * 1024**3 / _best(lambda: _product(a))


_product = jax.jit(lambda a: a @ a)


def _best(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of three calls after a first one."""
    jax.block_until_ready(work())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - start)
    return min(times)
