# SPDX-License-Identifier: Apache-2.0
"""Dotted names of the leaves of a tree: `params["model"]["norm"]["weight"]` is `model.norm.weight`.

A leading `params`, as in the variables of a Flax module, is no part of a name. Order never comes
from a tree (JAX sorts dict keys, layer 10 before layer 2): it is given by the caller, or natural
(numbers compare as numbers).
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from jax import tree_util

from jqx.errors import InputError

PREFIX = "params"


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key under which the runs of digits in `name` compare as numbers: `layers.2` before
    `layers.10`.
    """
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts if p)


def owner_of(name: str, paths: Collection[str]) -> str | None:
    """The nearest module around the leaf `name` that is among `paths`."""
    while name:
        name = name.rpartition(".")[0]
        if name in paths:
            return name
    return None


def strip(tree: Any) -> Any:
    """The tree under `params` if `tree` is a mapping with nothing else in it; otherwise `tree`
    itself.
    """
    wrapped = isinstance(tree, Mapping) and list(tree) == [PREFIX]
    return tree[PREFIX] if wrapped and isinstance(tree[PREFIX], Mapping) else tree


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """Every leaf of any pytree after its name, in the order of `jax.tree.leaves`.

    An attribute `value` that has no neighbours is no part of a name: it is the box Flax puts around
    a leaf (NNX variables, partitioning).
    """
    pairs = tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    leaves_in = Counter(keys[:i] for keys, _ in pairs for i in range(len(keys)))
    return [(_dotted(keys, leaves_in[keys[:-1]] == 1), leaf) for keys, leaf in pairs]


def _dotted(keys: Sequence[Any], alone: bool) -> str:
    """The name of a leaf from its keys; `alone`: whether it is all that its node has."""
    parts = [tree_util.keystr((key,), simple=True) for key in keys]
    if alone and keys and keys[-1] == tree_util.GetAttrKey("value"):
        parts = parts[:-1]
    if len(parts) > 1 and parts[0] == PREFIX:
        parts = parts[1:]
    return ".".join(parts)


def leaf_names(tree: Any) -> list[str]:
    """The name of every leaf of any pytree, in the order of `jax.tree.leaves`."""
    return [name for name, _ in named_leaves(tree)]


def flatten(tree: Mapping[str, Any], order: Iterable[str] | None = None) -> dict[str, Any]:
    """The leaves of a nested mapping by name. What is not a mapping (an array, a QTensor) is a
    leaf.

    `order` gives names first to last; names it has and the tree has not are passed over, leaves it
    does not name follow in natural order. Without it all names are in natural order.
    """
    found = dict(_leaves(strip(tree), ""))
    listed = [name for name in dict.fromkeys(order or ()) if name in found]
    rest = sorted(found.keys() - set(listed), key=natural_key)
    return {name: found[name] for name in (*listed, *rest)}


def unflatten(named: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose leaves have the given names: the inverse of `flatten`.

    Raises InputError if one name lies inside another (`a` and `a.b`).
    """
    tree: dict[str, Any] = {}
    inner: set[int] = {id(tree)}  # the dicts made here, as opposed to leaves that are dicts
    for name, leaf in named.items():
        node, (*parents, last) = tree, name.split(".")
        for part in parents:
            if part not in node:
                node[part] = {}
                inner.add(id(node[part]))
            node = node[part]
            if id(node) not in inner:
                raise InputError(f"{name} lies inside {part!r}, which is a leaf too: rename one.")
        if last in node:
            raise InputError(f"{name} is a leaf and also holds other leaves: rename one of them.")
        node[last] = leaf
    return tree


def matches(name: str, pattern: str) -> bool:
    """Whether the glob `pattern` (`*`, `?`, `[abc]`; a `*` also crosses dots) matches the whole
    name.
    """
    return fnmatchcase(name, pattern)


def select(names: Iterable[str], pattern: str) -> list[str]:
    """The names that `pattern` matches, in the order given."""
    return [name for name in names if matches(name, pattern)]


def _leaves(tree: Any, name: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield name, tree
        return
    for key, inner in tree.items():
        yield from _leaves(inner, f"{name}.{key}" if name else str(key))
