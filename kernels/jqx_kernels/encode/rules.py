# SPDX-License-Identifier: Apache-2.0
"""From the largest magnitude of every block to its stored scale, and from values to quotients, by
kind of scale.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt8

from jqx_kernels.bits import e8m0_value, round_to, scale_up
from jqx_kernels.codecs import CODECS, Codec
from jqx_kernels.scale_rules import Divide, e4m3_scale, e8m0_scale, float32_scale

from .request import EncodeRequest

_Find = Callable[[Array, Array | None, EncodeRequest, Divide], tuple[Array, Array]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of scale. `find`: (largest magnitudes, tensor scale, request, division) -> what is
    stored, and the factor of a block. `quotient`: (values, factor, division) -> what is coded.
    """

    find: _Find
    quotient: Callable[[Array, Array, Divide], Array]


def _amax_dtype(request: EncodeRequest) -> jnp.dtype:
    """The dtype within whose normal numbers an amax is kept: for rows and tiles the matrix's."""
    rows, columns = request.storage.block
    whole_row_or_tile = rows is not None and (columns is None or rows > 1)
    return request.dtype if whole_row_or_tile else jnp.dtype(jnp.float32)


def _float32(
    amax: Array, outer: Array | None, request: EncodeRequest, divide: Divide
) -> tuple[Array, Array]:
    info = jnp.finfo(_amax_dtype(request))
    limits = (float(info.tiny), float(info.max))
    scale = float32_scale(amax, request.storage.bound, limits, divide)
    return scale, scale


def _e4m3(
    amax: Array, outer: Array | None, request: EncodeRequest, divide: Divide
) -> tuple[Array, Array]:
    assert outer is not None
    return e4m3_scale(amax, outer, request.storage.bound, divide=divide)


def _e8m0(
    amax: Array, outer: Array | None, request: EncodeRequest, divide: Divide
) -> tuple[Array, Array]:
    code = e8m0_scale(amax, request.storage.bound, divide)
    opposite = (254 - code.astype(jnp.int32)).astype(jnp.uint8)
    return code, e8m0_value(opposite)


RULES = {
    "float32": Rule(_float32, lambda x, step, divide: divide(x, step)),
    "e4m3": Rule(_e4m3, lambda x, step, divide: divide(x, step)),
    # a power of two: values are multiplied by its inverse, exactly
    "e8m0": Rule(_e8m0, lambda x, inverse, divide: scale_up(x, inverse)),
}
"""Kind of scale -> its rule."""


def code(
    q: Float32[Array, "*s"],
    x: Float32[Array, "*s"],
    request: EncodeRequest,
    codecs: dict[str, Codec] = CODECS,
) -> UInt8[Array, "*s"]:
    """The codes of the quotients `q` of the values `x`, one a byte."""
    if request.double_rounding:
        q = round_to(q, request.dtype)
    return codecs[request.storage.element].encode(q, x)
