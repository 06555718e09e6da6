# SPDX-License-Identifier: Apache-2.0
"""QTensor: a weight in stored form, with what belongs to its linear; a pytree.

It passes through jit, vmap, scan (stacked), `jax.eval_shape`, `jax.device_put` with shardings and
orbax: everything that depends on the number of leading axes is derived from the codes. So it does
through flax.serialization once `jqx.models.linen` is imported, which `jqx_interop.load` does.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Integer

from jqx.errors import InputError
from jqx.formats import (
    Encoded,
    Format,
    check_divides,
    decode,
    encode,
    find_format,
    grid_shape,
    unpacked_shape,
)

from .layout import (
    Layout,
    Places,
    array_shape,
    from_matrices,
    layout_at,
    layout_of,
    places_of,
    to_matrices,
)
from .sharding import blocks_cut, cuts_of, placed

# An array, or what a transformation of trees puts in its place: ShapeDtypeStruct, sharding, None...
Leaf = Any


LEAVES = ("codes", "scale", "tensor_scale", "input_scale", "pre_quant_scale", "low_rank")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=list(LEAVES),
    meta_fields=["format", "dtype", "layout", "input_format"],
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """Codes and scales of the matrices [*lead, n, k] whose last axis is the contraction axis.

    `layout` says how the array they stand for has these axes. Every member of a stack has its own
    scales.
    """

    codes: Leaf  # as exported: float8_e4m3fn or int8 [*lead, n, k], or packed uint8
    scale: Leaf  # [*lead, blocks of rows, blocks of columns], [*lead] per tensor
    tensor_scale: Leaf  # float32 [*lead], ScaleFactors, or None for formats of one level
    format: Format
    dtype: jnp.dtype  # of the array it stands for
    layout: Layout = Layout()
    input_scale: Leaf = None  # float32 [*lead]: of the activation that meets this weight
    pre_quant_scale: Leaf = None  # [*lead, k]: the activation is multiplied by it first
    input_format: str | None = None  # the row of INPUT_FORMATS for the activation; None: as it is
    low_rank: Leaf = (
        None  # a pair ([*lead, n, r], [*lead, r, k]) whose product is added to the decoded matrix
    )

    @classmethod
    def quantize(
        cls,
        w: Float[Array, "..."],
        fmt: Format | str,
        amax: Float[Array, "..."] | None = None,
        axis: int | tuple[int, ...] = -1,
        stack: tuple[int, ...] | None = None,
    ) -> "QTensor":
        """Store `w`, whose axes `axis` are contracted with the activation, in `fmt` (a row of
        FORMATS or its name).

        Members along the axes `stack` are encoded one by one; the other axes are rows. With None
        there is one row axis, the last that is not contracted. `amax` as in `jqx.formats.encode`,
        with the leading axes of the stack; one number is shared by all. Raises InputError if the
        shape does not fit the format, an axis is not there or is named twice, or no row is left.
        """
        fmt = find_format(fmt) if isinstance(fmt, str) else fmt
        layout = layout_of(w.shape, axis, stack)
        matrices = to_matrices(w, layout)
        check_divides(fmt, matrices.shape)
        lead = matrices.shape[:-2]
        if amax is not None and amax.ndim == 0:
            amax = jnp.broadcast_to(amax, lead)
        codes, scale, tensor_scale = _over(lead, lambda m, a: encode(m, fmt, a))(matrices, amax)
        return cls(codes, scale, tensor_scale, format=fmt, dtype=w.dtype, layout=layout)

    def replace(self, **fields: Any) -> "QTensor":
        """The same with other `fields`, as `dataclasses.replace`."""
        return dataclasses.replace(self, **fields)

    def decode(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """The array the codes stand for, in `dtype` (its own if None): float32 arithmetic, one
        rounding at the end.

        The other fields act on activations and on results: they are not applied. Raises InputError
        if scales are not those of the codes, as in a shard whose edge lies within a block.
        """
        self._check_scales()
        dtype = self.dtype if dtype is None else dtype
        fmt, encoded = self.format, Encoded(self.codes, self.scale, self.tensor_scale)
        matrices = _over(self.codes.shape[:-2], lambda e: decode(e, fmt, dtype))(encoded)
        return from_matrices(matrices, self.layout)

    def transpose(self, permutation: Sequence[int]) -> "QTensor | None":
        """What stands for `jnp.transpose` of the array, with the same codes; None where row axes or
        contraction axes would change their order among themselves, for then there is none.
        """
        permutation = [range(self.ndim)[axis] for axis in permutation]
        to = {axis: i for i, axis in enumerate(permutation)}
        places = Places(*(tuple(to[axis] for axis in axes) for axes in self._places))
        if any(list(axes) != sorted(axes) for axes in (places.rows, places.columns)):
            return None
        order = sorted(range(len(places.stack)), key=places.stack.__getitem__)
        ordered = order == sorted(order)
        moved = self if ordered else jax.tree.map(partial(_reordered, order), self)
        shape = tuple(self.shape[axis] for axis in permutation)
        places = places._replace(stack=tuple(sorted(places.stack)))
        return moved.replace(layout=layout_at(shape, places))

    def member(self, axis: int, index: Integer[ArrayLike, ""]) -> "QTensor | None":
        """What stands for `lax.dynamic_index_in_dim` of the array, without the axis `axis`; None if
        that is no stack axis.
        """
        axis = range(self.ndim)[axis]
        if axis not in self.stack:
            return None
        lead = self.stack.index(axis)
        left = jax.tree.map(
            lambda a: lax.dynamic_index_in_dim(a, index, lead, keepdims=False), self
        )
        shape = (*self.shape[:axis], *self.shape[axis + 1 :])
        places = Places(*(tuple(a - (a > axis) for a in p if a != axis) for p in self._places))
        return left.replace(layout=layout_at(shape, places))

    def part(self, axis: int, start: Integer[ArrayLike, ""], size: int) -> "QTensor | None":
        """What stands for `lax.dynamic_slice_in_dim` of the array along `axis`; None if that is no
        stack axis.
        """
        axis = range(self.ndim)[axis]
        if axis not in self.stack:
            return None
        lead = self.stack.index(axis)
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size, lead), self)

    def shardings(self, sharding: NamedSharding) -> "QTensor":
        """The shardings of its arrays, in their places, if `sharding` is that of the array they
        stand for: what `jax.device_put`, `jit` and, by their `spec`, `shard_map` take.

        An axis that does not fall into whole shards is not sharded, nor is one that is folded
        behind another. Arrays may be abstract. Raises InputError if there are more axes in
        `sharding` than in the array.
        """
        n, k = unpacked_shape(self.format.packing, self.codes.shape)[-2:]
        cuts = cuts_of(sharding, self._places, self.shape, tuple(self.codes.shape))
        block = blocks_cut(sharding, cuts, (n, k), self.format.block)
        at = partial(placed, sharding, *cuts.lead)
        grid = block if len(self.scale.shape) > len(cuts.lead) else ()
        wanted = {
            "codes": at(cuts.rows, cuts.columns),
            "scale": at(*grid),
            "tensor_scale": jax.tree.map(lambda _: at(), self.tensor_scale),
            "input_scale": at(),
            "pre_quant_scale": at(cuts.columns),
            "low_rank": (at(cuts.rows, None), at(None, cuts.columns)),
        }
        return self.replace(
            **{leaf: wanted[leaf] for leaf in LEAVES if getattr(self, leaf) is not None}
        )

    def _check_scales(self) -> None:
        size = unpacked_shape(self.format.packing, self.codes.shape)[-2:]
        grid = grid_shape(self.format, size) or (1, 1)
        scales = tuple(self.scale.shape[len(self.stack) :])
        if any(have not in (1, need) for have, need in zip(scales, grid, strict=False)):
            raise InputError(
                f"{self.format.name} has scales {grid} for codes of {size}, and there are {scales}:"
                " codes and scales are not of one matrix. In shard_map, shard axes of which whole "
                "blocks fall into every shard."
            )

    @property
    def _places(self) -> Places:
        return places_of(self.layout, len(self.codes.shape) - 2)

    @property
    def stack(self) -> tuple[int, ...]:
        """The stack axes of the array, in ascending order: the leading axes of the codes."""
        return self._places.stack

    @property
    def rows(self) -> tuple[int, ...]:
        """The row axes of the array, in ascending order: `n` of the matrices."""
        return self._places.rows

    @property
    def columns(self) -> tuple[int, ...]:
        """The contraction axes of the array, in ascending order: `k` of the matrices."""
        return self._places.columns

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array it stands for."""
        return array_shape(self.layout, unpacked_shape(self.format.packing, self.codes.shape))

    @property
    def ndim(self) -> int:
        """The number of axes of the array it stands for."""
        return sum(map(len, self._places))

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays it holds."""
        return _nbytes(self)

    @property
    def bits(self) -> float:
        """Stored bits per weight: codes and scales."""
        return 8 * _nbytes((self.codes, self.scale, self.tensor_scale)) / self.size


def _over(lead: tuple[int, ...], f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, a function of matrices, over the leading axes of its arguments."""
    for _ in lead:
        f = jax.vmap(f)
    return f


def _reordered(order: Sequence[int], a: Array) -> Array:
    """`a` with its leading axes in this order."""
    return jnp.transpose(a, (*order, *range(len(order), a.ndim)))


def _nbytes(tree: Any) -> int:
    return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(tree))
