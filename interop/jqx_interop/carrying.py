# SPDX-License-Identifier: Apache-2.0
"""MXFP4 sources go on without an error where they can: to MXFP4 as they lie, to NVFP4 exactly.

    code * 2^e  =  code * 2^(e - top + 8) * 2^(top - 8)       top: the largest exponent

The first factor is a block scale, which E4M3 holds from 2^-9 to 2^8: blocks down to 2^-17 of the
largest are exact, and those below are rounded as any block is. (ModelOpt 0.47,
`cast_mxfp4_to_nvfp4`.) So do experts that lie in one tensor, each by itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jqx.algorithms import Linear, stored
from jqx.config import base_format
from jqx.formats import Format, find_format
from jqx.models.apart import Piece
from jqx.tensors import QTensor

from .job import Job
from .sources import DecodedCheckpoint
from .unfused import UnfusedCheckpoint

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
    if (q := _stored(job, path)) is None:
        return None
    name = job.choices[path].weight or ""
    if name == FROM:
        return q.replace(input_format=job.choices[path].input)
    if (top := _top(job, path)) is None:
        return None
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        found = cast(q, top, find_format(name))
    return found.replace(dtype=job.dtype, input_format=job.choices[path].input)


def count(job: Job) -> Carried | None:
    """What becomes of the blocks of a job, from scales and few codes; None where none is cast."""
    blocks = beyond = 0
    for path, choice in job.choices.items():
        if choice.weight == FROM or (q := _stored(job, path)) is None:
            continue
        if (top := _top(job, path)) is None:
            continue
        exponents = np.asarray(q.scale).astype(np.int32) - BIAS
        low = exponents < top - TOP + LEAST
        codes = np.asarray(q.codes).reshape(*exponents.shape, -1)
        blocks += exponents.size
        beyond += int(np.any(codes[low] & 0x77, axis=-1).sum())
        job.checkpoint.release(f"{path}.weight")
    return Carried(blocks=blocks, beyond=beyond) if blocks else None


def alike(job: Job, path: str) -> list[str]:
    """The linears that share the tensor scale of `path`, and it."""
    groups = (group for group in job.inventory.siblings if path in group)
    group = next(groups, (path,)) if job.shares(path) else (path,)
    return [p for p in group if job.choices.get(p) == job.choices[path]]


def _stored(job: Job, path: str) -> QTensor | None:
    """The codes of a linear that is MXFP4 in the source and need not be searched."""
    source, name = job.checkpoint, f"{path}.weight"
    if job.choices[path].weight not in (FROM, TO):
        return None
    if any(step.method != "max" for step in job.config.steps):
        return None
    if isinstance(source, UnfusedCheckpoint) and isinstance(source.base, DecodedCheckpoint):
        if name in source.own:
            return _of_expert(source.base, source.own[name][1])
        source = source.base
    if not isinstance(source, DecodedCheckpoint) or (weight := source.weights.get(name)) is None:
        return None
    stored_as = "" if weight.choice is None else weight.choice.weight or ""
    return source.stored(name) if base_format(stored_as) == FROM else None


def _of_expert(source: DecodedCheckpoint, piece: Piece) -> QTensor | None:
    """The codes of what lies with all experts in one tensor."""
    q = source.stored_member(piece.tensor, piece.e, piece.rows)
    return q if q is not None and q.format == find_format(FROM) else None


def _top(job: Job, path: str) -> int | None:
    """The largest exponent of all linears that share the tensor scale of `path`; None where one of
    them is quantized anew.
    """

    def largest(group: Iterable[str]) -> tuple[int | None]:
        tops = []
        for member in group:
            if (q := _stored(job, member)) is None:
                return (None,)
            tops.append(top_of(np.asarray(q.scale)))
        return (max(tops),)

    (top,) = job.fusion.once(path, "top", largest) or largest(alike(job, path))
    return top


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
