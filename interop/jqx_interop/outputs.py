# SPDX-License-Identifier: Apache-2.0
"""Every tensor that a job writes, in order, before anything is read."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .checkpoints import TensorOut, dtype_name
from .inventory import FLOATS, KEPT
from .targets import companions

if TYPE_CHECKING:
    from .job import Job


def outputs_of(job: "Job") -> Iterable[TensorOut]:
    """Every tensor of the destination in the order of a torch state_dict."""
    return job.fusion.outputs(pieces_of(job))


def pieces_of(job: "Job") -> Iterable[TensorOut]:
    """The same before experts are fused."""
    after = _companions(job)
    for name in job.inventory.tensors:
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and path in job.described:
            yield job.linear_outputs(path)[0]
        else:
            info = job.checkpoint.tensors[name]
            dtype = dtype_name(job.dtype) if job.cast(name) else info.dtype
            if name.endswith(KEPT) and dtype in FLOATS:
                dtype = "F32"
            yield TensorOut(name, dtype, tuple(info.shape))
        yield from after.get(name, ())


def _companions(job: "Job") -> dict[str, list[TensorOut]]:
    """Tensor name -> scales that follow it: those of a linear after its last parameter, KV scales
    last of all.
    """
    groups = {path: job.linear_outputs(path)[1:] for path in job.described}
    for attention in job.attentions if job.needs_kv else ():
        groups[attention.path] = job.kv_outputs(attention)
    return companions(job.inventory.tensors, groups)
