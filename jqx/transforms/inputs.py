# SPDX-License-Identifier: Apache-2.0
"""What a product does to its activation first, where a parameter quantizes its inputs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jqx.config import INPUT_FORMATS
from jqx.errors import InputError, nearest
from jqx.formats import FORMATS
from jqx.tensors import QTensor

from .entries import beside, everywhere
from .interpret import Met, Record
from .placing import Members, back, by_member, members, pieces_of, places
from .stored import block_of, fake_input


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["input_scale", "pre_quant_scale", "low_rank"],
    meta_fields=["shape", "columns", "stack", "input_format"],
)
@dataclass(frozen=True, kw_only=True)
class Treatment:
    """How the inputs of one parameter are quantized, and what is added to its products.

    `columns` and `stack` are the axes of the parameter that are summed over, and that members of a
    stack lie along. `input_scale` has the shape of the stack, None where the scale is found in the
    activation; `pre_quant_scale` has an axis of all channels more. `low_rank`: the two
    factors of a matrix that meets the inputs too, before they are rounded.
    """

    shape: tuple[int, ...]
    columns: tuple[int, ...]
    stack: tuple[int, ...]
    input_format: str | None
    input_scale: Any = None
    pre_quant_scale: Any = None
    low_rank: Any = None

    @property
    def channels(self) -> int:
        """How many inputs there are."""
        return math.prod(self.shape[a] for a in self.columns)

    @property
    def by_member(self) -> bool:
        """Whether members of the stack change an activation in ways of their own."""
        row = INPUT_FORMATS.get(self.input_format or "")
        static = row is not None and row.bound is not None
        own = self.pre_quant_scale is not None or self.low_rank is not None or static
        return bool(self.stack) and own

    @property
    def elementwise(self) -> bool:
        """Whether each number is quantized by itself."""
        if self.pre_quant_scale is not None or self.input_format is None:
            return False
        return FORMATS[INPUT_FORMATS[self.input_format].format].block == (None, None)


def treatment_of(name: str, q: QTensor) -> Treatment | None:
    """How the inputs of a stored parameter are quantized, None if nothing is done with them.

    Raises InputError for fields that do not fit each other.
    """
    lead, k = tuple(q.shape[a] for a in q.stack), math.prod(q.shape[a] for a in q.columns)
    wanted = {"input_scale": lead, "pre_quant_scale": (*lead, k)}
    for field, shape in wanted.items():
        value = getattr(q, field)
        if value is not None and tuple(value.shape) != shape:
            raise InputError(f"{field} of {name} has the shape {tuple(value.shape)}, not {shape}")
    _check_factors(name, q, lead, k)
    if q.pre_quant_scale is None and q.input_format is None and q.low_rank is None:
        return None
    found = Treatment(
        shape=q.shape,
        columns=q.columns,
        stack=q.stack,
        input_format=q.input_format,
        input_scale=q.input_scale,
        pre_quant_scale=q.pre_quant_scale,
        low_rank=q.low_rank,
    )
    check_format(name, found)
    return found


def _check_factors(name: str, q: QTensor, lead: tuple[int, ...], k: int) -> None:
    """Raises InputError unless the low-rank part of a parameter is two factors of one rank."""
    if q.low_rank is None:
        return
    n = math.prod(q.shape[a] for a in q.rows)
    shapes = [tuple(factor.shape) for factor in q.low_rank]
    rank = shapes[-1][-2] if len(shapes[-1]) > 1 else 0
    if (wanted := [(*lead, n, rank), (*lead, rank, k)]) != shapes:
        raise InputError(f"low_rank of {name} has the shapes {shapes}, not {wanted}")


def check_format(name: str, treatment: Treatment) -> None:
    """Raises InputError if the inputs of the parameter `name` cannot be quantized so."""
    wanted, k = treatment.input_format, treatment.channels
    if wanted is None:
        return
    if wanted not in INPUT_FORMATS:
        raise nearest(wanted, INPUT_FORMATS, f"input format of {name}")
    block = block_of(INPUT_FORMATS[wanted])
    if k % block:
        raise InputError(
            f"{name} has {k} inputs, and {wanted} quantizes {block} together: "
            "leave this linear's input_format out"
        )


def treated(treatment: Treatment, met: Met) -> Float[Array, "..."]:
    """The activation of a use as the parameter's linear sees it, in its own dtype.

    Raises InputError where that would not be what the format says.
    """
    _check_use(treatment, met)
    x = met.x
    if met.use.op == "conv" or treatment.elementwise and not treatment.by_member:
        return fake_input(x, treatment.input_format or "", _scales(treatment, met, ()))
    if met.groups is not None:
        return _in_groups(treatment, met)
    sizes = tuple(p.size for p in pieces_of(met))
    channels = by_member(met, x)
    y = _each(treatment, met, channels.reshape(-1, *channels.shape[-2:]), sizes)
    return back(met, y.reshape(channels.shape), x)


def _each(
    treatment: Treatment, met: Met, x: Float[Array, "members tokens k"], sizes: tuple[int, ...]
) -> Float[Array, "members tokens k"]:
    """Every member's tokens as its linear sees them; `sizes` of the axes that `members` folds."""
    own = (int(x.shape[0]),) if treatment.by_member else ()
    scale = _scales(treatment, met, sizes)
    factor = treatment.pre_quant_scale
    if factor is not None:
        factor = chosen(treatment, met, factor, sizes)
        factor = factor.reshape(*own, factor.shape[-1])
        factor = beside(x, factor) if own else factor
    if scale is not None and own:
        scale = beside(x, scale.reshape(own))
    if not own:
        return _one(treatment, x, factor, scale)
    return jax.vmap(partial(_one, treatment))(x, factor, scale)


def _one(
    treatment: Treatment,
    x: Float[Array, "*tokens k"],
    factor: Float[Array, "k"] | None,
    scale: Float[Array, ""] | None,
) -> Float[Array, "*tokens k"]:
    """Tokens that one linear sees."""
    y = x
    if factor is not None:
        spread = factor.reshape((1,) * (x.ndim - 1) + (-1,)).astype(jnp.float32)
        y = (x.astype(jnp.float32) * spread).astype(x.dtype)
    return y if treatment.input_format is None else fake_input(y, treatment.input_format, scale)


def _in_groups(treatment: Treatment, met: Met) -> Float[Array, "..."]:
    """The rows of a ragged product, each as the linear of its group sees it."""
    channels = list(met.use.activation_axes)
    order = [met.ragged, *(i for i in range(met.x.ndim) if i not in (met.ragged, *channels))]
    order += channels
    moved = jnp.transpose(met.x, order)
    rows = moved.reshape(moved.shape[0], -1, treatment.channels)
    y = _each(treatment, met, rows, (moved.shape[0],))
    return jnp.transpose(y.reshape(moved.shape), [order.index(i) for i in range(met.x.ndim)])


def _scales(treatment: Treatment, met: Met, sizes: tuple[int, ...]) -> Any:
    """The stored scale of every member that is met, None where scales are found in `x`."""
    scale = treatment.input_scale
    return None if scale is None else chosen(treatment, met, scale, sizes)


def chosen(treatment: Treatment, met: Met, what: Any, sizes: tuple[int, ...]) -> Any:
    """What `what` [*stack, ...] has for the members that are met, [*sizes, ...]."""
    if not treatment.stack:
        return what
    if not treatment.by_member:
        return what[(0,) * len(treatment.stack)]
    what = everywhere(what)
    met_at = {m.axis: m for m in members(met)}
    at: list[Any] = []
    for axis in treatment.stack:
        one = met_at.get(axis)  # none for an axis of a single member
        at.append(0 if one is None else _places(one, met, sizes))
    return jnp.broadcast_to(what[tuple(at)], (*sizes, *what.shape[len(treatment.stack) :]))


def _places(one: Members, met: Met, sizes: tuple[int, ...]) -> Any:
    """The numbers of the members that are met; of a ragged product those of every row."""
    if met.groups is None:
        return places(one, len(sizes))
    if not one.moving:
        return places(one, 1)
    groups = jnp.arange(met.groups.shape[0], dtype=jnp.int32)
    of_row = jnp.repeat(groups, met.groups, total_repeat_length=sizes[0])
    return places(one, 1)[of_row]


def _check_use(treatment: Treatment, met: Met) -> None:
    """Raises InputError if the inputs of a use are not those that the parameter quantizes."""
    use, shape, k = met.use, treatment.shape, treatment.channels
    over = math.prod(met.x.shape[a] for a in use.activation_axes)
    if use.op == "conv":
        over = k
        if not treatment.elementwise:
            more = "a pre_quant_scale" if treatment.low_rank is None else "a low-rank part"
            raise InputError(
                f"{use.path} is the kernel of a convolution, whose inputs take formats with one "
                f"scale, and not {treatment.input_format or more}: use fp8 or int8"
            )
    alone = treatment.elementwise and treatment.input_scale is not None
    if use.weight_axes != treatment.columns or (over != k and not alone):
        raise InputError(
            f"{use.path} quantizes {k} inputs along axis {_told(treatment.columns)} of {shape}, "
            f"and it is summed over the axes {use.weight_axes}, {over} inputs at once: store it "
            "along those"
        )
    meant, used = ([a for a in axes if shape[a] > 1] for axes in (treatment.stack, use.stack_axes))
    if treatment.by_member and used != meant:
        raise InputError(
            f"{use.path} is a stack {shape} whose members scale their inputs, and it is used as a "
            "whole or rearranged first: scan over it, or keep its members apart"
        )


def _told(axes: tuple[int, ...]) -> str:
    return ", ".join(map(str, axes))


def check_all_met(record: Record, paths: Iterable[str]) -> None:
    """Raises InputError if one of these parameters met an activation that was not quantized."""
    elsewhere = [u.path for u in record.uses if u.op == "elementwise"]
    wanted = set(paths)
    for path in (*record.untracked, *elsewhere):
        if path in wanted:
            raise InputError(
                f"{path} quantizes its inputs or has a low-rank part, and it meets an activation "
                "other than in a product as it is (it is scaled or changed first, or carried "
                "through a loop): decode it first, or drop its input_format, pre_quant_scale and "
                "low_rank"
            )
