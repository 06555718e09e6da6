# SPDX-License-Identifier: Apache-2.0
"""Stats: what calibration keeps of the activations, a pytree of small arrays keyed by (path, kind).

A path names a parameter (the statistics are of what it was multiplied with) or a named activation.
A kind says which reduction it is and how two calibration runs combine; the kinds are the rows of
`KINDS`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jqx.errors import InputError

Entries = Mapping[str, Mapping[str, Any]]
SEPARATOR = "|"  # between path and kind in the flat form; no tensor name has it


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of statistic. `merge` is "max", "sum", "rows" (one after the other), or "ordered":
    the result depends on the order of the batches.
    """

    name: str
    merge: str
    about: str


KINDS = {
    kind.name: kind
    for kind in (
        Kind("amax", "max", "largest magnitude, float32 []"),
        Kind("channel_amax", "max", "largest magnitude of each channel, float32 [k]"),
        Kind("channel_mean", "ordered", "mean over batches of the mean magnitude, float32 [k]"),
        Kind("square", "sum", "sum of squares of each channel, float32 [k]"),
        Kind("gram", "sum", "sum of x x^T over all rows x, float32 [k, k]"),
        Kind("rounded_gram", "sum", "the same of quantized inputs, float32 [k, k]"),
        Kind("block_gram", "sum", "the same within blocks of channels, float32 [k / b, b, b]"),
        Kind("root", "rows", "all rows, where they are fewer than channels, float32 [rows, k]"),
        Kind("block_log2", "sum", "histogram of log2 of the amax of 16 channels, int32 [512]"),
        Kind("histogram", "ordered", "how many magnitudes are in which bin, float32 [bins]"),
        Kind("histogram_width", "ordered", "width of those bins, float32 []"),
        Kind("tokens", "sum", "rows that were met, int32 []"),
        Kind("affine_bias", "ordered", "running mean over statistics batches, [1, h, 1, d]"),
        Kind(
            "affine_amax", "ordered", "largest magnitude after that mean is taken off, float32 []"
        ),
    )
}

MERGES: dict[str, Callable[[Any, Any], Any]] = {
    "max": jnp.maximum,
    "sum": jnp.add,
    "rows": lambda a, b: jnp.concatenate([jnp.asarray(a), jnp.asarray(b)]),
}


@partial(jax.tree_util.register_dataclass, data_fields=["entries"], meta_fields=["meta_json"])
@dataclass(frozen=True)
class Stats:
    """Statistics of a calibration run. Make one with `Stats.of`.

    `entries` is {path: {kind: array}}; its order means nothing. `meta_json` is canonical JSON text,
    static under jit: facts about the run (data, model, lengths) that are the same for all of it.
    Numbers that grow belong in entries.
    """

    entries: Entries
    meta_json: str = "{}"

    @classmethod
    def of(cls, entries: Entries, **meta: Any) -> "Stats":
        """Statistics from {path: {kind: array}} and JSON-able facts. Raises InputError for a kind
        not in `KINDS`.
        """
        for kinds in entries.values():
            for name in kinds:
                kind_of(name)
        return cls({p: dict(k) for p, k in entries.items()}, json.dumps(meta, sort_keys=True))

    @property
    def meta(self) -> dict[str, Any]:
        """The facts about the run."""
        return json.loads(self.meta_json)

    def get(self, path: str, kind: str) -> Any:
        """The statistic of one kind at one path. Raises InputError saying what there is instead."""
        kinds = self.entries.get(path)
        if kinds is None:
            near = get_close_matches(path, self.entries, n=1, cutoff=0)
            hint = f"; the nearest name is {near[0]}" if near else ""
            raise InputError(f"No statistics for {path} ({len(self.entries)} others){hint}.")
        if kind not in kinds:
            raise InputError(f"{path} has {', '.join(kinds)} but no {kind}: calibrate for it.")
        return kinds[kind]


def kind_of(name: str) -> Kind:
    """The row of `KINDS` with that name. Raises InputError with the nearest name."""
    if name not in KINDS:
        near = get_close_matches(name, KINDS, n=1, cutoff=0)[0]
        raise InputError(f"{name!r} is no kind of statistic; did you mean {near!r}?")
    return KINDS[name]


def merge(a: Stats, b: Stats) -> Stats:
    """The statistics of both runs together: maxima of maxima, sums of sums, rows after rows,
    whatever only one has as it is.

    Associative, and for either operand order the same but for the order of rows. Facts must not
    contradict each other.

    Raises InputError if both hold an entry whose kind depends on the order of batches, if two
    entries differ in shape, or if a fact differs.
    """
    differing = [k for k in a.meta.keys() & b.meta.keys() if a.meta[k] != b.meta[k]]
    if differing:
        k = min(differing)
        raise InputError(f"Statistics of different runs: {k} is {a.meta[k]!r} and {b.meta[k]!r}.")
    paths = dict.fromkeys((*a.entries, *b.entries))
    entries = {p: _merge_kinds(p, a.entries.get(p, {}), b.entries.get(p, {})) for p in paths}
    return Stats.of(entries, **{**a.meta, **b.meta})


def _merge_kinds(path: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**a, **b}
    for name in a.keys() & b.keys():
        rule = kind_of(name).merge
        if rule not in MERGES:
            raise InputError(
                f"{name} of {path} depends on the order of its batches and cannot be merged: "
                "collect it in one run over all batches."
            )
        rows = 1 if rule == "rows" else 0  # of which one run may have more
        if jnp.shape(a[name])[rows:] != jnp.shape(b[name])[rows:]:
            raise InputError(
                f"{name} of {path} has shape {jnp.shape(a[name])} in one run and "
                f"{jnp.shape(b[name])} in the other: they are not of the same model."
            )
        merged[name] = MERGES[rule](a[name], b[name])
    return merged


def to_flat(stats: Stats) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays by `path|kind`, and JSON-able metadata: what a file of named arrays can hold. Dtypes
    and values are kept.
    """
    arrays = {
        f"{path}{SEPARATOR}{kind}": value
        for path, kinds in stats.entries.items()
        for kind, value in kinds.items()
    }
    return arrays, {"jqx_stats": 1, "meta": stats.meta}


def from_flat(arrays: Mapping[str, Any], metadata: Mapping[str, Any]) -> Stats:
    """The inverse of `to_flat`. Raises InputError for arrays that are no statistics or of a later
    layout.
    """
    if metadata.get("jqx_stats") != 1:
        raise InputError(
            f"Not statistics of a layout known here: jqx_stats is {metadata.get('jqx_stats')!r}, "
            "1 is understood. Calibrate again, or update jqx."
        )
    entries: dict[str, dict[str, Any]] = {}
    for name, value in arrays.items():
        path, separator, kind = name.rpartition(SEPARATOR)
        if not separator:
            raise InputError(f"{name!r} is not named path{SEPARATOR}kind: these are no statistics.")
        entries.setdefault(path, {})[kind] = value
    return Stats.of(entries, **metadata["meta"])
