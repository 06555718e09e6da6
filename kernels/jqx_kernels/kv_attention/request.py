# SPDX-License-Identifier: Apache-2.0
"""What is known of attention to stored keys and values before it is computed, and what refuses
it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jqx_kernels.dispatch import Device
from jqx_kernels.matmul.planes import PARTS
from jqx_kernels.matmul.request import no_meaning, no_product
from jqx_kernels.matmul.steps import SCALE_DTYPES
from jqx_kernels.storage import Storage


class Stored(NamedTuple):
    """Keys or values of every slot, [n, slots, d], as `Storage` says of [n * slots, d].

    `codes`: packed bytes [n, slots, bytes]; `scale`: [n, slots, blocks], one for a whole token or
    one for every block of it; `outer`: float32 [n, slots, 1], what scales in E4M3 lie below.
    """

    codes: Array
    scale: Array
    outer: Array | None = None


class AttentionRequest(NamedTuple):
    """The static facts: `q_shape` is [n, g, t, d]; `dtype`: what keys, values and exponentials are
    rounded to; `scale` multiplies scores; a query sees the last `window` slots, all if None.
    `interpret`: Pallas kernels run anywhere.
    """

    q_shape: tuple[int, ...]
    q_dtype: str
    slots: int
    storage: Storage
    dtype: str
    out_dtype: str
    scale: float
    window: int | None = None
    interpret: bool = False

    def __str__(self) -> str:
        """As it is told in errors."""
        kept = f"{self.slots} slots of {self.storage}, decoded to {self.dtype}"
        return f"{self.q_dtype} queries {self.q_shape} to {kept}"


def lacks_meaning(device: Device, request: AttentionRequest) -> str | None:
    """Why nothing here can compute it on any device; None where something can."""
    return no_product(request.q_dtype, request.dtype) or no_meaning(request.storage)


def lacks_blocks(request: AttentionRequest) -> str | None:
    """Why kernels that read bytes in tiles cannot read such tokens; None where they can."""
    size, per_byte = request.storage.block[1], request.storage.per_byte[1]
    if 0 in request.q_shape:
        return f"has no tiles for empty queries, {request.q_shape}"
    if size is not None and (size & (size - 1) or size % per_byte):
        return f"needs blocks of a power of two that hold whole bytes, not of {size}"
    return None


def check_shapes(q: Array, keys: Stored, values: Stored, storage: Storage) -> int:
    """The number of slots. Raises ValueError where the arrays do not belong together."""
    if q.ndim != 4 or keys.codes.ndim != 3:
        raise ValueError(
            f"Queries are [n, g, t, d] and codes [n, slots, bytes], not {q.shape} and "
            f"{keys.codes.shape}."
        )
    rows, per_byte = storage.per_byte
    if rows != 1 or storage.packing not in PARTS or storage.block[0] != 1:
        raise ValueError(
            f"Every token is stored by itself, as {storage}, packed by {storage.packing}, are not."
        )
    n, _, t, d = q.shape
    slots = keys.codes.shape[1]
    size = storage.columns(d)
    if d % per_byte or d % size:
        raise ValueError(f"{storage} has blocks of {size}, which do not divide {d} channels.")
    if t > slots:
        raise ValueError(f"{t} new tokens are more than there are slots, {slots}.")
    for name, stored in (("Keys", keys), ("Values", values)):
        _check_array(f"{name}: codes", stored.codes, (n, slots, d // per_byte))
        _check_array(f"{name}: scales", stored.scale, (n, slots, d // size))
        if storage.scale == "e4m3":
            if stored.outer is None:
                raise ValueError(f"{name}: scales in e4m3 lie below one of each token; it is None.")
            _check_array(f"{name}: scales of tokens", stored.outer, (n, slots, 1))
        _check_dtypes(name, stored, storage)
    return slots


def check_places(n: int, start: Array, pads: Array) -> None:
    """Raises ValueError unless `start` is one integer and `pads` are `n` of them."""
    _check_array("start", start, ())
    _check_array("pads", pads, (n,))
    for name, array in (("start", start), ("pads", pads)):
        if array.dtype != jnp.int32:
            raise ValueError(f"{name} is int32, not {array.dtype}.")


def _check_array(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} are of shape {shape} here, not {array.shape}.")


def _check_dtypes(name: str, stored: Stored, storage: Storage) -> None:
    if stored.codes.dtype.itemsize != 1:
        raise ValueError(f"{name}: codes are bytes, not {stored.codes.dtype}.")
    known = SCALE_DTYPES.get(storage.scale, (stored.scale.dtype.name,))
    if stored.scale.dtype.name not in known:
        raise ValueError(
            f"{name}: scales in {storage.scale} come as {' or '.join(known)}, not "
            f"{stored.scale.dtype}."
        )
