# SPDX-License-Identifier: Apache-2.0
"""Attention of a few new tokens to stored keys and values, and the rows that compute it."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jqx_kernels.dispatch import Device, Implementation, Table, find_implementation
from jqx_kernels.matmul.request import as_bytes
from jqx_kernels.storage import Storage

from . import gpu, reference, tpu, xla
from .request import AttentionRequest, Stored, check_places, check_shapes, lacks_meaning

KV_ATTENTION: Table = (
    Implementation(name="triton", run=gpu.attention, lacks=gpu.lacks),
    Implementation(name="tpu", run=tpu.attention, lacks=tpu.lacks),
    Implementation(name="xla", run=xla.attention, lacks=xla.lacks),
    Implementation(name="reference", run=reference.attention, lacks=lacks_meaning),
)


def kv_attention(  # noqa: PLR0913  five arrays, and what is static about them
    q: Array,
    keys: Any,
    values: Any,
    start: Array,
    pads: Array,
    *,
    storage: Storage,
    scale: float,
    window: int | None = None,
    dtype: DTypeLike | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
    device: Device | None = None,
    interpret: bool = False,
) -> Float[Array, "n g t d"]:
    """What `t` new tokens find when they look back, in `out_dtype`, that of `q` if None.

    n is the number of key heads of all sequences, g that of the query heads that share one. `keys`
    and `values`, `Stored` or tuples like it, have a token in every slot, the new ones too, whose
    first is in slot `start`; slots after the last of them hold anything. The first `pads` slots of
    each of n, and what is `window` or more slots before a query, are not seen. Both `start` [] and
    `pads` [n] are int32 and may be traced.

    Keys and values are decoded in float32, code * scale (* scale of the token), and rounded to
    `dtype`, that of `q` if None; scores, which `scale` multiplies, and sums are float32;
    exponentials are rounded to `dtype` before they meet values; the division comes last. Rows of
    KV_ATTENTION that read some slots at a time round exponentials below the largest score so far.
    NaN in a slot that no query sees changes nothing; a query that sees nothing finds 0.
    `implementation`, `device` and `interpret` as in `matmul`. There is no gradient.

    Raises ValueError if the arrays do not belong together, dispatch.Unsupported where no row, or
    not the one that is asked for, can do it. Source: Flash-Decoding, 2023, for the splits.
    """
    keys, values = Stored(*keys), Stored(*values)
    slots = check_shapes(q, keys, values, storage)
    check_places(q.shape[0], start, pads)
    if window is not None and window < 1:
        raise ValueError(f"A window of {window} slots shows nothing; it is 1 or more, or None.")
    dtype = q.dtype if dtype is None else dtype
    request = AttentionRequest(
        q_shape=q.shape,
        q_dtype=q.dtype.name,
        slots=slots,
        storage=storage,
        dtype=jnp.dtype(dtype).name,
        out_dtype=jnp.dtype(q.dtype if out_dtype is None else out_dtype).name,
        scale=float(scale),
        window=window,
        interpret=interpret,
    )
    row = find_implementation("kv_attention", KV_ATTENTION, request, device, implementation)
    return row.run(q, _as_bytes(keys), _as_bytes(values), start, pads, request)


def _as_bytes(stored: Stored) -> Stored:
    return Stored(as_bytes(stored.codes), as_bytes(stored.scale), stored.outer)
