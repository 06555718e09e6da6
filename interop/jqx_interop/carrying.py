# SPDX-License-Identifier: Apache-2.0
"""MXFP4 sources go on without an error where they can: to MXFP4 as they lie, to NVFP4 exactly.

    code * 2^e  =  code * 2^(e - top + 8) * 2^(top - 8)       top: the largest exponent

The first factor is a block scale, which E4M3 holds from 2^-9 to 2^8: blocks down to 2^-17 of the
largest are exact, and those below are rounded as any block is. (ModelOpt 0.47,
`cast_mxfp4_to_nvfp4`.)
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jqx.algorithms import Linear, stored
from jqx.config import base_format
from jqx.formats import Format, find_format
from jqx.tensors import QTensor

from .job import Job
from .sources import DecodedCheckpoint

FROM, TO = "mxfp4", "nvfp4"
BIAS, TOP, LEAST = 127, 8, -9  # of exponents: that of a byte, and those that E4M3 reaches
BOUND = 6.0 * 448.0
NOTHING = 2.0**-40  # of the largest: a block of zeros gets the smallest scale, not 1
HALVES = 2  # blocks of 16 in one of 32
ROWS = 1 << 21  # values encoded in one call


@dataclass(frozen=True, kw_only=True, slots=True)
class Carried:
    """Blocks of 32 that became NVFP4, and those whose exponent a block scale does not reach."""

    blocks: int
    beyond: int

    @property
    def line(self) -> str:
        """One line for people."""
        exact = "every one exactly" if not self.beyond else f"{self.beyond:,} of them rounded"
        return f"{self.blocks:,} blocks of MXFP4 became NVFP4, {exact}"


def carried(job: Job, path: str) -> QTensor | None:
    """What a linear becomes without being quantized anew; None for one that is."""
    source = _source_of(job, path)
    if source is None:
        return None
    q, name = source.stored(f"{path}.weight"), job.choices[path].weight or ""
    if name == FROM:
        return q.replace(input_format=job.choices[path].input)
    if (top := _top(job, source, path)) is None:
        return None
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        found = cast(q, top, find_format(name))
    return found.replace(dtype=job.dtype, input_format=job.choices[path].input)


def count(job: Job) -> Carried | None:
    """What becomes of the blocks of a job, from scales and few codes; None where none is cast."""
    blocks = beyond = 0
    for path, choice in job.choices.items():
        source = _source_of(job, path)
        if source is None or choice.weight == FROM:
            continue
        if (top := _top(job, source, path)) is None:
            continue
        q = source.stored(f"{path}.weight")
        exponents = np.asarray(q.scale).astype(np.int32) - BIAS
        low = exponents < top - TOP + LEAST
        codes = np.asarray(q.codes).reshape(*exponents.shape, -1)
        blocks += exponents.size
        beyond += int(np.any(codes[low] & 0x77, axis=-1).sum())
        source.release(f"{path}.weight")
    return Carried(blocks=blocks, beyond=beyond) if blocks else None


def alike(job: Job, path: str) -> list[str]:
    """The linears that share the tensor scale of `path`, and it."""
    if members := job.fusion.members(path):
        return list(members)
    groups = (group for group in job.inventory.siblings if path in group)
    group = next(groups, (path,)) if job.shares(path) else (path,)
    return [p for p in group if job.choices.get(p) == job.choices[path]]


def _source_of(job: Job, path: str) -> DecodedCheckpoint | None:
    """The source of a linear that is MXFP4 there and need not be searched."""
    source, choice = job.checkpoint, job.choices[path]
    if not isinstance(source, DecodedCheckpoint) or choice.weight not in (FROM, TO):
        return None
    if any(step.method != "max" for step in job.config.steps):
        return None
    weight = source.weights.get(f"{path}.weight")
    stored_as = "" if weight is None or weight.choice is None else weight.choice.weight or ""
    return source if base_format(stored_as) == FROM else None


def _top(job: Job, source: DecodedCheckpoint, path: str) -> int | None:
    """The largest exponent of all linears that share the tensor scale of `path`; None where one of
    them is quantized anew.
    """
    group = alike(job, path)
    if any(_source_of(job, p) is None for p in group):
        return None
    return max(top_of(np.asarray(source.stored(f"{p}.weight").scale)) for p in group)


def top_of(scales: np.ndarray) -> int:
    """The largest exponent; bytes of 0 are blocks of zeros."""
    largest = int(scales.max(initial=0))
    return largest - BIAS if largest else 0


def cast(q: QTensor, top: int, fmt: Format) -> QTensor:
    """`q` in MXFP4 as NVFP4 whose tensor scale is 2^(top - 8), in slices of rows."""
    n, k = q.shape
    rows = max(ROWS // k, 1)
    whole = np.float32(np.ldexp(BOUND, top - TOP))
    parts = []
    for i in range(0, n, rows):
        part = q.replace(codes=q.codes[i : i + rows], scale=q.scale[i : i + rows])
        parts.append(jax.tree.map(np.asarray, _cast_rows(part, whole, np.int32(top), fmt=fmt)))
    return jax.tree.map(lambda *a: np.concatenate(a) if a[0].ndim else a[0], *parts)


@partial(jax.jit, static_argnames=("fmt",))
def _cast_rows(q: QTensor, whole: jax.Array, top: jax.Array, *, fmt: Format) -> QTensor:
    w = q.decode(jnp.float32)
    exponents = q.scale.astype(jnp.int32) - BIAS
    ideal = jnp.ldexp(jnp.float32(6), exponents)
    blocks = jnp.abs(w).reshape(*exponents.shape, -1)
    near = exponents >= top - TOP + LEAST
    amax = jnp.where(near, ideal, jnp.max(blocks, axis=-1))
    amax = jnp.maximum(amax, whole * jnp.float32(NOTHING))
    return stored(Linear(w)._replace(amax=jnp.repeat(amax, HALVES, axis=1), tensor_amax=whole), fmt)
