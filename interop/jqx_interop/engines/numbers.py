# SPDX-License-Identifier: Apache-2.0
"""The numbers of scales, the one thing that is read besides headers: once, file by file."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from jqx_interop.checkpoints import TensorInfo
from jqx_interop.progress import Progress, Silent
from jqx_interop.unfused import SCALES as STACK_SCALES

from .facts import Facts
from .problem import first

SCALES = frozenset(
    ("weight_scale", "weight_scale_2", "input_scale", "weight_global_scale", "input_global_scale")
    + ("scales", "pre_quant_scale", "k_scale", "v_scale", "q_scale")
)
"""Leaves that are scales; a factor of inputs is one."""

ORDERS = ("g_idx", "weight_g_idx")
_INTEGERS = ("weight_shape", *ORDERS)

LARGEST, LEAST = 1e6, 1e-12
"""Beyond these no scale of a trained model has been seen: largest of all, least of one number."""

TOP_EXPONENT = 127 + 40
"""The highest sensible byte of a power of two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """`bad`: scales that cannot be right, and `odd`: those of absurd magnitude, one phrase each;
    `single`: name -> value of scales that are one number; `matrices`: name of a stored shape ->
    what it says; `orders`: name of the groups of columns -> the least and the largest.
    """

    bad: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    single: Mapping[str, float]
    matrices: Mapping[str, tuple[int, ...]]
    orders: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def read_numbers(facts: Facts, progress: Progress | None = None) -> Numbers:
    """Read the scales of `facts`, but those in files that are damaged."""
    progress = progress or Silent()
    wanted = sorted(_wanted(facts), key=lambda item: (item[1].file.name, item[1].start))
    progress.phase("reading scales", sum(info.nbytes for _, info in wanted) or 1)
    bad, odd = [], []
    single: dict[str, float] = {}
    matrices: dict[str, tuple[int, ...]] = {}
    orders: dict[str, tuple[int, int]] = {}
    for leaf, info in wanted:
        array = facts.files.mapped.read(info.name)
        if leaf == "weight_shape":
            matrices[info.name] = tuple(int(size) for size in array.reshape(-1)[:4])
        elif leaf in ORDERS:
            if array.size and array.dtype.kind in "iu":
                orders[info.name] = (int(array.min()), int(array.max()))
        else:
            _look(info, array, bad, odd)
            if array.size == 1:
                single[info.name] = float(array.astype(np.float64).reshape(()))
        facts.files.mapped.release(info.name)
        progress.advance(info.nbytes)
    odd += _inverted(single)
    return Numbers(bad=tuple(bad), odd=tuple(odd), single=single, matrices=matrices, orders=orders)


def _inverted(single: Mapping[str, float]) -> Iterator[str]:
    """Scales of tensors that look like what divides, where engines multiply, or the other way."""
    divisors = {n: x for n, x in single.items() if n.endswith(".weight_global_scale")}
    if divisors and max(divisors.values()) < 1:
        yield f"{first(divisors)}: all are below 1, so they look inverted"
    factors = [n for n, x in single.items() if n.endswith(".weight_scale_2") and x > 1]
    yield from (f"{name}: it is above 1, so it looks inverted" for name in factors)


def _wanted(facts: Facts) -> Iterator[tuple[str, TensorInfo]]:
    for name, info in facts.files.tensors.items():
        leaf = next((e[1:] for e in STACK_SCALES if name.endswith(e)), name.rpartition(".")[2])
        if (leaf in SCALES or leaf in _INTEGERS) and info.file.name not in facts.files.damaged:
            yield leaf, info


def _look(info: TensorInfo, array: np.ndarray, bad: list[str], odd: list[str]) -> None:
    if not array.size:
        return
    look = _BY_DTYPE.get(info.dtype, _floats)
    found = look(array)
    bad += [f"{info.name}: {problem}" for problem in found if not problem.startswith("!")]
    odd += [f"{info.name}: {problem[1:]}" for problem in found if problem.startswith("!")]


def _count(wrong: np.ndarray, what: str) -> str:
    return f"{int(np.count_nonzero(wrong))} of {wrong.size} are {what}"


def _e4m3(array: np.ndarray) -> list[str]:
    """One look at the largest byte is enough where all is well."""
    raw = array.view(np.uint8)
    top = int(raw.max())
    if top == 0:
        return ["all are zero"]
    if top < 0x7F:
        zeros = raw.size - int(np.count_nonzero(raw))
        return [f"!{zeros} of {raw.size} are zero"] if 2 * zeros > raw.size else []
    found = [(raw & 0x7F) == 0x7F, (raw >= 0x80) & ((raw & 0x7F) != 0x7F)]
    return [_count(w, what) for w, what in zip(found, ("NaN", "negative"), strict=True) if w.any()]


def _e8m0(array: np.ndarray) -> list[str]:
    top = int(array.view(np.uint8).max())
    if top == 0:
        return ["all are zero bytes, 2^-127"]
    if top == 255:
        return [_count(array.view(np.uint8) == 255, "NaN")]
    return [f"!the largest is 2^{top - 127}"] if top > TOP_EXPONENT else []


def _number(value: float) -> list[str]:
    """What is wrong with a scale that is one number."""
    if math.isnan(value):
        return ["it is NaN"]
    if math.isinf(value):
        return ["it is infinite"]
    if value <= 0:
        return ["it is negative" if value else "it is zero"]
    return [f"!it is {value:g}"] if not LEAST <= value <= LARGEST else []


def _floats(array: np.ndarray) -> list[str]:
    if array.size == 1:
        return _number(float(array.reshape(()).astype(np.float32)))
    values = array.astype(np.float32, copy=False)
    if not np.issubdtype(values.dtype, np.floating):
        return []
    low, high = float(values.min()), float(values.max())
    if low > 0 and np.isfinite(high):
        return [f"!the largest is {high:g}"] if high > LARGEST else []
    kinds = {
        "NaN": np.isnan(values),
        "infinite": np.isinf(values),
        "negative": values < 0,
        "zero": values == 0,
    }
    return [_count(wrong, what) for what, wrong in kinds.items() if wrong.any()]


_BY_DTYPE = {"F8_E4M3": _e4m3, "U8": _e8m0, "F8_E8M0": _e8m0}
