# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint that are one array in memory: a stack has the name of its members with
"{}" in the place of their numbers.

    mlp.experts.{}.up_proj.weight [e, n, k]   is   mlp.experts.0.up_proj.weight [n, k], ...
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jqx.errors import InputError

EACH = "{}"
"""What stands for the number of a member."""

Shape = tuple[int, ...]


def member_name(name: str, e: int) -> str:
    """What member `e` of the stack `name` is called."""
    return name.replace(EACH, str(e), 1)


def members(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Names and shapes with those of members in the place of stacks: expert by expert, where stacks
    that follow each other are of the same experts.
    """
    found: dict[str, Shape] = {}
    waiting: list[str] = []

    def expand() -> None:
        for e in range(shapes[waiting[0]][0] if waiting else 0):
            found.update({member_name(name, e): shapes[name][1:] for name in waiting})
        waiting.clear()

    for name, shape in shapes.items():
        if EACH in name and waiting and _before(name) == _before(waiting[0]):
            waiting.append(name)
            continue
        expand()
        if EACH in name:
            waiting.append(name)
        else:
            found[name] = shape
    expand()
    return found


def _before(name: str) -> str:
    return name.partition(EACH)[0]


def stacked(named: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """`named`, arrays or QTensors, with stacks in the place of the members of those in `shapes`.

    Raises InputError for members that are missing, or are not alike.
    """
    left = dict(named)
    stack_all(left, shapes)
    return left


def stack_all(named: dict[str, Any], shapes: Mapping[str, Shape]) -> None:
    """The same in `named` itself, which lets go of members as soon as they are in a stack, so that
    not all of them are there twice.
    """
    for name, shape in shapes.items():
        if EACH not in name:
            continue
        own = [member_name(name, e) for e in range(shape[0])]
        there = {member: named.pop(member) for member in own if member in named}
        if not there:
            continue
        if len(there) < len(own):
            missing = next(member for member in own if member not in there)
            raise InputError(f"{missing} is missing, and others of its experts are there")
        named[name] = stack_of(list(there.values()), own)


def stack_of(members: list[Any], names: list[str]) -> Any:
    """One stack of arrays or of QTensors. Raises InputError for those that are not alike."""
    first = _kind(members[0])
    for name, leaf in zip(names, members, strict=True):
        if _kind(leaf) != first:
            raise InputError(f"{name} is not like {names[0]}: experts of one block are alike")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def _kind(leaf: Any) -> Any:
    leaves, structure = jax.tree.flatten(leaf)
    return structure, [(a.shape, str(a.dtype)) for a in leaves]


def unstacked(named: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stacked`: members in the place of every stack."""
    found: dict[str, Any] = {}
    for name, leaf in named.items():
        if EACH not in name:
            found[name] = leaf
            continue
        for e in range(leaf.shape[0]):
            found[member_name(name, e)] = jax.tree.map(lambda a, e=e: a[e], leaf)
    return found
