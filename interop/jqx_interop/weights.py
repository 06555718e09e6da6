# SPDX-License-Identifier: Apache-2.0
"""Weights on the host: reading them in the model's dtype, and their codes.

Codes and scales are computed where division is exact, or codes at ties would change: by kernels on
NVIDIA GPUs, else on the CPU, whatever the default device is.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import jax
import numpy as np

from jqx.algorithms import InputStats, Linear, stored
from jqx.calibration import input_scale, stored_amax
from jqx.config import INPUT_FORMATS
from jqx.errors import InputError
from jqx.formats import Format, find_format, with_float_scales
from jqx.formats.on_gpu import encode_on_gpu, encodes
from jqx.tensors import QTensor

from .carrying import carried
from .checkpoints import DTYPES
from .choices import input_bound
from .inventory import KEPT
from .job import Job
from .orientation import straight

Groups = list[tuple[str, ...]]
"""Linears that read one input together."""

CHUNK = 1 << 21
"""Values encoded in one call: few enough for a core's cache, and for memory with any matrix."""

GPU_CHUNK = 1 << 27
"""The same on a GPU: enough to keep it busy, in half a gigabyte with what comes out."""


def read_tensor(job: Job, name: str) -> np.ndarray:
    """The tensor `name` in the dtype that it is written in."""
    array = job.checkpoint.read(name)
    if name.endswith(KEPT) and array.dtype in (DTYPES["BF16"], DTYPES["F16"]):
        return array.astype(np.float32)
    return array.astype(job.dtype) if job.cast(name) and array.dtype != job.dtype else array


def read_weight(job: Job, path: str) -> np.ndarray:
    """The weight [n, k] of a linear in the dtype that it is written in."""
    return straight(job.spec, path, read_tensor(job, f"{path}.weight"))


def checked_amax(array: np.ndarray, name: str) -> np.float32:
    """The largest magnitude in the tensor `name`. Raises InputError if a number in it is NaN or
    infinite.
    """
    largest = stored_amax(array)
    if not np.isfinite(largest):
        raise InputError(
            f"the tensor {name} holds NaN or infinite numbers; the checkpoint is damaged"
        )
    return largest


def linear_groups(job: Job, names: Iterable[str]) -> Groups:
    """The quantized linears among the tensors `names`, in their order."""
    siblings = {path: group for group in job.inventory.siblings for path in group}
    inside, seen = dict.fromkeys(names), set()
    groups: Groups = []
    for name in inside:
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and path in job.choices and path not in seen:
            group = siblings.get(path, (path,))
            members = tuple(p for p in group if p + ".weight" in inside and p in job.choices)
            seen.update(members)
            groups.append(members)
    return groups


def alike(job: Job, members: tuple[str, ...], path: str) -> list[str]:
    """Those of `members`, which read one input, that share scales with `path`, and it."""
    choice = job.choices[path]
    return [p for p in members if job.shares(path) and job.choices[p] == choice] or [path]


def stored_group(job: Job, members: tuple[str, ...]) -> Iterator[tuple[str, QTensor]]:
    """Linears that read one input, their scales reaching the largest magnitudes, without scales of
    inputs; tensor scales are shared where the layout says so.

    Raises InputError naming a weight that is not finite.
    """
    weights = {} if job.checkpoint.source else {path: read_weight(job, path) for path in members}
    together = [path for path in members if _shares_scale(job, members, path)]
    amax = {path: _amax(job, path, weights.get(path)) for path in together}
    for path in members:
        w = weights[path] if path in weights else read_weight(job, path)
        q, fmt = carried(job, path), find_format(job.choices[path].weight or "")
        largest = fused_amax(job, path) if q is None else None
        if largest is None and path in amax:
            largest = max(amax[p] for p in alike(job, members, path))
        elif largest is None:
            largest = checked_amax(w, path + ".weight")
        if q is None:
            whole = largest if one_scale(fmt) else None
            q = encode_weight(w.astype(quotient_dtype(job, path), copy=False), fmt, whole)
        del w
        yield path, q.replace(input_format=job.choices[path].input, dtype=job.dtype)
        job.checkpoint.release(path + ".weight")


def fused_amax(job: Job, path: str) -> np.float32 | None:
    """The largest magnitude in the tensor that a linear of an expert will be a part of; None for
    all others. Raises InputError as `checked_amax`.
    """

    def largest(members: tuple[str, ...]) -> np.float32:
        found = np.float32(0)
        for member in members:
            found = np.maximum(found, _amax(job, member, None))
            job.checkpoint.release(f"{member}.weight")
        return found

    return job.fusion.once(path, "amax", largest)


def quotient_dtype(job: Job, path: str) -> np.dtype:
    """What quotients by scales are rounded to first: the dtype of the model, but float32 where one
    FP8 scale is that of all experts (ModelOpt 0.47, `to_quantized_weight`).
    """
    fmt = find_format(job.choices[path].weight or "")
    exact = fmt.tensor_bound is None and bool(job.fusion.members(path))
    return np.dtype(np.float32) if exact else job.dtype


def read_together(job: Job, members: tuple[str, ...], path: str) -> Iterable[str]:
    """The linears whose inputs have one stored scale with those of `path`, and it."""
    return job.fusion.members(path) or alike(job, members, path)


def _shares_scale(job: Job, members: tuple[str, ...], path: str) -> bool:
    """Whether a linear shares the scale of its whole tensor with others, of which one after the
    other is read twice where reading is decoding.
    """
    fmt = find_format(job.choices[path].weight or "")
    return one_scale(fmt) and len(alike(job, members, path)) > 1


def _amax(job: Job, path: str, weight: np.ndarray | None) -> np.float32:
    return checked_amax(read_weight(job, path) if weight is None else weight, path + ".weight")


def encode_group(
    job: Job, members: tuple[str, ...], inputs: Mapping[str, InputStats]
) -> Iterator[tuple[str, np.ndarray]]:
    """The named arrays of `stored_group`, with scales of inputs that are shared likewise.

    `inputs` has the statistics of the linears whose inputs get a stored scale. Raises InputError
    naming a weight that is not finite.
    """
    for path, q in stored_group(job, members):
        choice = job.choices[path]
        if (bound := input_bound(job.config, choice)) is not None:
            row = INPUT_FORMATS[choice.input or ""]
            reads = read_together(job, members, path)
            largest = max(float(inputs[p]["amax"]) for p in reads)
            q = q.replace(input_scale=input_scale(largest, bound, path, row.code_max))
        yield from job.named(path, q)


def one_scale(fmt: Format) -> bool:
    """Whether there is a scale of the whole tensor."""
    return fmt.tensor_bound is not None or fmt.block == (None, None)


def encode_weight(w: np.ndarray, fmt: Format, whole: np.float32 | None) -> QTensor:
    """`w` [n, k] stored in `fmt` with scales that reach the largest magnitudes, computed on a GPU
    or the CPU in slices of rows when it is large and their scales have nothing in common. `whole`:
    what the scale of the whole tensor reaches.
    """
    n, k = w.shape
    on_gpu = encodes(jax.devices()[0], fmt, w.shape)
    encode, chunk = (_encode_on_gpu, GPU_CHUNK) if on_gpu else (_encode_on_cpu, CHUNK)
    rows = max(chunk // k // 128, 1) * 128 if with_float_scales(fmt) == fmt else n
    if n <= rows:
        return encode(w, whole, fmt)
    parts = [
        jax.tree.map(np.asarray, encode(w[i : i + rows], whole, fmt)) for i in range(0, n, rows)
    ]
    return jax.tree.map(
        lambda *leaves: np.concatenate(leaves) if leaves[0].ndim else leaves[0], *parts
    )


def _encode_on_gpu(w: np.ndarray, whole: np.float32 | None, fmt: Format) -> QTensor:
    encoded = encode_on_gpu(jax.device_put(w, jax.devices()[0]), fmt, whole)
    return QTensor(*jax.device_get(encoded), format=fmt, dtype=w.dtype)


def _encode_on_cpu(w: np.ndarray, whole: np.float32 | None, fmt: Format) -> QTensor:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return _encode(w, whole, fmt=fmt)


@partial(jax.jit, static_argnames=("fmt",))
def _encode(w: jax.Array, whole: jax.Array | None, *, fmt: Format) -> QTensor:
    field = {"tensor_amax" if fmt.tensor_bound is not None else "amax": whole}
    return stored(Linear(w)._replace(**field), fmt)
