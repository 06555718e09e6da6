# SPDX-License-Identifier: Apache-2.0
"""The parameters of one block without its experts, or of one of these, from the checkpoint."""

from typing import Any

import jax
import jax.numpy as jnp

from jqx.models import (
    Compute,
    Experts,
    block_prefix,
    expert_tensors,
    front_shapes,
    kinds,
)
from jqx.tensors.paths import unflatten
from jqx.tensors.stacks import member_name

from .compressing import compressed
from .job import Job
from .weights import read_tensor


def load_front(job: Job, i: int, compute: Compute) -> dict[str, Any]:
    """The parameters of block `i` but for those of experts, matrices in the dtype that products
    take, cast once; with `low_memory` those that will be quantized are stored.
    """
    assert job.spec is not None
    own, prefix = front_shapes(job.spec, kinds(job.spec)[i]), block_prefix(job.spec, i) + "."
    inside = job.inventory.units[job.inventory.blocks[i]]
    names = [name for name in inside if name.removeprefix(prefix) in own]
    stored: dict[str, Any] = dict(compressed(job, names)) if job.settings.low_memory else {}
    leaves = {
        name.removeprefix(prefix): stored[name] if name in stored else read_leaf(job, name, compute)
        for name in names
    }
    return unflatten(leaves)


def load_expert(job: Job, i: int, e: int, compute: Compute) -> dict[str, Any]:
    """The parameters of expert `e` of block `i`, as `jqx.models.expert` takes them."""
    assert job.spec is not None
    row, prefix = kinds(job.spec)[i].mlp, block_prefix(job.spec, i)
    assert isinstance(row, Experts)
    tensors = expert_tensors(row, job.spec.names, job.spec.hidden)  # of a job they are not fused
    return unflatten(
        {
            path: read_leaf(job, f"{prefix}.{member_name(tensor, e)}", compute)
            for path, tensor in tensors.items()
        }
    )


def read_leaf(job: Job, name: str, compute: Compute) -> jax.Array:
    """The tensor `name`, a matrix in the dtype that products take; its pages are released."""
    array = jnp.asarray(read_tensor(job, name))
    leaf = array.astype(compute.carrier) if array.ndim > 1 else array
    jax.block_until_ready(leaf)  # or what is still computed brings the pages back
    job.checkpoint.release(name)
    return leaf
