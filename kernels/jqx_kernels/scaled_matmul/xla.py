# SPDX-License-Identifier: Apache-2.0
"""Products of two stored matrices that XLA compiles.

Where a scale serves a whole row the codes are multiplied as they are, in the units for their dtype.
Blocks are decoded first: a code of E2M1 or E4M3 times the scale of its block is a bfloat16.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32

from jqx_kernels.blocks import from_blocks, spread, to_blocks
from jqx_kernels.codecs import CODECS
from jqx_kernels.matmul.reference import NT
from jqx_kernels.scale_rules import STEPS

from .kinds import KINDS, Kind, ScaledRequest, Stored

_SHIFTS = {"bytes": (0,), "columns": (0, 4)}


def scaled(total: Array, x: Stored, w: Stored, outer: Float32[Array, ""]) -> Float32[Array, "m n"]:
    """A sum of products of codes, times the scales of rows."""
    return total.astype(jnp.float32) * x.scale * w.scale.T * outer


def as_codes(stored: Stored, kind: Kind) -> Array:
    """The bytes as numbers of the dtype they are codes of."""
    return lax.bitcast_convert_type(stored.codes, jnp.dtype(kind.dtype))


def _decoded(stored: Stored, kind: Kind) -> list[BFloat16[Array, "rows columns"]]:
    """The matrix, but for the tensor scale; in two, even and odd columns, where bytes hold both."""
    assert kind.block is not None
    shifts = _SHIFTS[kind.packing]
    step = spread(STEPS[kind.scale](stored.scale, jnp.float32(1)))
    decode, block = CODECS[kind.element].decode, (1, kind.block // len(shifts))
    parts = [decode(to_blocks(stored.codes >> shift, block)) * step for shift in shifts]
    return [from_blocks(p, stored.codes.shape).astype(jnp.bfloat16) for p in parts]


def multiply(
    x: Stored, w: Stored, outer: Float32[Array, ""], request: ScaledRequest
) -> Float[Array, "m n"]:
    """The product in `request.dtype`."""
    row = KINDS[request.kind]
    if row.block is None:
        codes = as_codes(x, row), as_codes(w, row)
        total = lax.dot_general(*codes, NT, preferred_element_type=jnp.dtype(row.total))
        return scaled(total, x, w, outer).astype(request.dtype)
    pairs = zip(_decoded(x, row), _decoded(w, row), strict=True)
    sums = [lax.dot_general(a, b, NT, preferred_element_type=jnp.float32) for a, b in pairs]
    return (sum(sums[1:], sums[0]) * outer).astype(request.dtype)
