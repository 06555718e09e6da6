# SPDX-License-Identifier: Apache-2.0
"""Products of codes with codes, where a linear rounds its inputs to the element of its weight and
there is one scale for each: what units for eight bits compute.

    y = (code_x code_w^T) * input_scale * weight_scale

The activation is rounded when it comes here, and in its own dtype: x / input_scale is within 2^-9
of its code, which is found again exactly.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from jqx.tensors import QTensor
from jqx_kernels.bits import e4m3_code, int_code
from jqx_kernels.dispatch import current_device

from .inputs import Treatment

Product = Callable[[Array], Array]


class _Kind(NamedTuple):
    """`name`: the kind of `scaled_matmul`; `encode`: quotients to codes; `least`: the first compute
    capability of GPUs that have units for it.
    """

    name: str
    encode: Callable[[Float32[Array, "*s"]], UInt8[Array, "*s"]]
    least: tuple[int, int]


_KINDS: Mapping[tuple[str | None, str], _Kind] = {
    ("fp8", "e4m3"): _Kind("fp8", e4m3_code, (8, 9)),
    ("int8", "int8"): _Kind("int8", partial(int_code, width=8), (8, 0)),
}
"""(input format, element of the weight) -> how both are multiplied as codes."""


def scaled_matmul(*args: Any, **how: Any) -> Array:
    """`jqx_kernels.scaled_matmul.scaled_matmul`, imported where it is needed."""
    from jqx_kernels.scaled_matmul import scaled_matmul as kernel

    return kernel(*args, **how)


def multiplies_codes(q: QTensor, treatment: Treatment | None, implementation: str | None) -> bool:
    """Whether products with `q` are those of codes: it and its inputs have one element and scales
    that serve whole rows, and the device has units for it or an implementation is asked for.
    """
    if treatment is None or treatment.input_scale is None or q.format.block[1] is not None:
        return False
    kind = _KINDS.get((treatment.input_format, q.format.element.name))
    if kind is None:
        return False
    capability = current_device().capability
    return implementation is not None or capability is None or capability >= kind.least


def scaled_product(
    rows: Float[Array, "m k"],
    q: QTensor,
    treatment: Treatment,
    product: Product,
    how: Mapping[str, Any],
) -> Float[Array, "m n"]:
    """`rows`, which are rounded to codes times the input scale, times the transpose of `q`. A row
    with a NaN becomes NaN.

    `product`: the same with the decoded matrix, whose gradient this has. `how`: `dtype` and
    `implementation` of `scaled_matmul`, whose errors it raises.
    """
    kind = _KINDS[treatment.input_format, q.format.element.name]
    one = treatment.input_scale.astype(jnp.float32).reshape(())

    @jax.custom_vjp
    def multiply(x: Array) -> Array:
        codes = kind.encode(x.astype(jnp.float32) / one)
        y = scaled_matmul(codes, one, q.codes, q.scale, kind=kind.name, **how)
        lost = jnp.isnan(x).any(axis=1, keepdims=True)  # codes of integers have none
        return jnp.where(lost, jnp.asarray(jnp.nan, y.dtype), y)

    def forward(x: Array) -> tuple[Array, Array]:
        return multiply(x), x

    def backward(x: Array, dy: Array) -> tuple[Array]:
        return (jax.vjp(product, x)[1](dy)[0],)

    multiply.defvjp(forward, backward)
    return multiply(rows)
