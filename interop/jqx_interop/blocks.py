# SPDX-License-Identifier: Apache-2.0
"""The parameters of one block, or of one of its experts, from the checkpoint."""

from typing import Any

import jax
import jax.numpy as jnp

from jqx.models import (
    Compute,
    Experts,
    block_leaf_shapes,
    block_prefix,
    expert_tensors,
    front_shapes,
    kinds,
)
from jqx.tensors.paths import unflatten
from jqx.tensors.stacks import EACH, member_name, stacked

from .compressing import compressed
from .job import Job
from .weights import read_tensor


def load_block(job: Job, i: int, compute: Compute) -> dict[str, Any]:
    """The parameters of block `i`, matrices in the dtype that products take, cast once; with
    `low_memory` those that will be quantized are stored. Experts are stacks.
    """
    assert job.spec is not None
    names = job.inventory.units[job.inventory.blocks[i]]
    return _tree(job, i, names, compute)


def load_front(job: Job, i: int, compute: Compute) -> dict[str, Any]:
    """Those of `load_block` that are not of experts: all, where there are none."""
    assert job.spec is not None
    own = front_shapes(job.spec, kinds(job.spec)[i])
    prefix = block_prefix(job.spec, i)
    inside = job.inventory.units[job.inventory.blocks[i]]
    return _tree(job, i, tuple(n for n in inside if n.removeprefix(f"{prefix}.") in own), compute)


def _tree(job: Job, i: int, names: tuple[str, ...], compute: Compute) -> dict[str, Any]:
    assert job.spec is not None
    prefix = block_prefix(job.spec, i) + "."
    stored: dict[str, Any] = dict(compressed(job, names)) if job.settings.low_memory else {}
    inside, leaves = set(names), {}
    for leaf, shape in block_leaf_shapes(job.spec, kinds(job.spec)[i]).items():
        own = (member_name(leaf, e) for e in range(shape[0] if EACH in leaf else 1))
        there = [name for name in own if prefix + name in inside]
        # of a stack that is made its members are there twice, and those of no other
        parts = {n: stored.pop(prefix + n, None) for n in there}
        parts |= {n: read_leaf(job, prefix + n, compute) for n in there if parts[n] is None}
        leaves |= stacked(parts, {leaf: shape})
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
