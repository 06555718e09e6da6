# SPDX-License-Identifier: Apache-2.0
"""QTensor: a matrix, or a stack of them, in stored form, with what belongs to its linear; a pytree.

It passes through jit, vmap, scan (stacked), `jax.eval_shape`, `jax.device_put` with shardings and
orbax: everything that depends on the number of leading axes is derived from the codes. So it does
through flax.serialization once `jqx.models.linen` is imported, which `jqx_interop.load` does.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jqx.errors import InputError
from jqx.formats import Encoded, Format, check_divides, decode, encode, find_format, unpacked_shape

# An array, or what a transformation of trees puts in its place: ShapeDtypeStruct, sharding, None...
Leaf = Any


LEAVES = ("codes", "scale", "tensor_scale", "input_scale", "pre_quant_scale", "low_rank")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=list(LEAVES),
    meta_fields=["format", "dtype", "axis", "input_format"],
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """Codes and scales of the matrices [*lead, n, k] whose last axis is the contraction axis.

    The array they stand for has this axis at `axis`, counted from the end: -1 for weights stored
    [out, in], -2 for Flax kernels [in, out]. Every member of a stack has its own scales.
    """

    codes: Leaf  # as exported: float8_e4m3fn or int8 [*lead, n, k], or packed uint8
    scale: Leaf  # [*lead, blocks of rows, blocks of columns], [*lead] per tensor
    tensor_scale: Leaf  # float32 [*lead], or None for formats of one level
    format: Format
    dtype: jnp.dtype  # of the array it stands for
    axis: int = -1
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
        axis: int = -1,
    ) -> "QTensor":
        """Store `w`, whose axis `axis` is contracted with the activation, in `fmt` (a row of
        FORMATS or its name).

        The last two axes that remain with the contraction axis last are the matrix; axes before are
        a stack whose members are encoded one by one. `amax` as in `jqx.formats.encode`, with the
        leading axes of the stack; one number is shared by all. Raises InputError if the shape does
        not fit the format or `axis` is no axis of `w`.
        """
        fmt = find_format(fmt) if isinstance(fmt, str) else fmt
        if not -w.ndim <= axis < w.ndim:
            raise InputError(f"An array of shape {w.shape} has no axis {axis}.")
        matrices = jnp.moveaxis(w, axis, -1)
        check_divides(fmt, matrices.shape)
        lead = matrices.shape[:-2]
        if amax is not None and amax.ndim == 0:
            amax = jnp.broadcast_to(amax, lead)
        codes, scale, tensor_scale = _over(lead, lambda m, a: encode(m, fmt, a))(matrices, amax)
        from_end = axis if axis < 0 else axis - w.ndim
        return cls(codes, scale, tensor_scale, format=fmt, dtype=w.dtype, axis=from_end)

    def replace(self, **fields: Any) -> "QTensor":
        """The same with other `fields`, as `dataclasses.replace`."""
        return dataclasses.replace(self, **fields)

    def decode(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """The array the codes stand for, in `dtype` (its own if None): float32 arithmetic, one
        rounding at the end.

        The other fields act on activations and on results: they are not applied.
        """
        dtype = self.dtype if dtype is None else dtype
        fmt, encoded = self.format, Encoded(self.codes, self.scale, self.tensor_scale)
        matrices = _over(self.codes.shape[:-2], lambda e: decode(e, fmt, dtype))(encoded)
        return jnp.moveaxis(matrices, -1, self.axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array it stands for."""
        *rest, k = unpacked_shape(self.format.packing, self.codes.shape)
        at = len(rest) + 1 + self.axis
        return (*rest[:at], k, *rest[at:])

    @property
    def ndim(self) -> int:
        """The number of axes of the array it stands for."""
        return len(self.codes.shape)

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


def _nbytes(tree: Any) -> int:
    return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(tree))
