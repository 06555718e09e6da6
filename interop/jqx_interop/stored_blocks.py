# SPDX-License-Identifier: Apache-2.0
"""One block of a checkpoint that is run as it is, in parts where it has experts: its front, and
each of its experts. Plain matrices are in the dtype that products take, cast once.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from jqx.models import (
    Compute,
    Experts,
    block_prefix,
    block_shapes,
    expert_tensors,
    front_shapes,
    kinds,
)
from jqx.models.layers import module
from jqx.models.stores import STORES
from jqx.tensors.paths import unflatten
from jqx.tensors.stacks import EACH, member_name

from .stored import Source, plain, read_leaves, read_params


def read_block(source: Source, i: int, compute: Compute) -> dict[str, Any]:
    """The tree below `block_prefix(source.spec, i)`, as `jqx.models.block` takes it."""
    return _tree(source, i, block_shapes(source.spec, kinds(source.spec)[i]), compute)


def read_front(source: Source, i: int, compute: Compute) -> dict[str, Any]:
    """The same without what is of experts, as `jqx.models.front` takes it."""
    return _tree(source, i, front_shapes(source.spec, kinds(source.spec)[i]), compute)


def _tree(source: Source, i: int, names: Iterable[str], compute: Compute) -> dict[str, Any]:
    prefix = block_prefix(source.spec, i)
    whole = read_params(source, [f"{prefix}.{name}" for name in names], compute.carrier)
    return dict(module(whole, prefix, {}))


def read_expert(source: Source, i: int, e: int, compute: Compute) -> dict[str, Any]:
    """The parameters of expert `e` of block `i`, as `jqx.models.expert` takes them."""
    spec, row, prefix = source.spec, kinds(source.spec)[i].mlp, block_prefix(source.spec, i)
    assert isinstance(row, Experts)
    tensors = expert_tensors(row, spec.names, spec.hidden)
    own = {p: f"{prefix}.{member_name(t, e)}" for p, t in tensors.items() if EACH in t}
    leaves = read_leaves(source, own.values(), compute.carrier)
    found = {path: leaves[name] for path, name in own.items()}
    for path, tensor in tensors.items():
        if path not in own:  # in one tensor with those of all others
            linear, _, leaf = path.rpartition(".")
            of = {"experts": row.number, "e": e, "part": (linear, leaf)}
            one = partial(STORES[row.store].one, **of)
            found[path] = plain(source, f"{prefix}.{tensor}", compute.carrier, one)
    return unflatten(found)
