# SPDX-License-Identifier: Apache-2.0
"""The operations inside a block: linear, norms, activations. Each computes in float32 and ends in
`settle`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jqx_kernels.bits import round_to

from .spec import Compute, Norm

Params = Mapping[str, Any]
"""A nested dict: the checkpoint's tensors under their names split at the dots."""


def module(params: Params, name: str) -> Params:
    """The tensors of the module called `name`, whose dots are levels of the tree."""
    for part in name.split("."):
        params = params[part]
    return params


def settle(x: Float[Array, "*s"], compute: Compute) -> Float[Array, "*s"]:
    """End an operation: the float32 result `x` becomes values of the compute dtype in the carrier's
    arrays.
    """
    if compute.strict and compute.dtype != jnp.float32:
        x = _round(x, compute.dtype)
    return x.astype(compute.carrier)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _round(x: Float[Array, "*s"], dtype: jnp.dtype) -> Float[Array, "*s"]:
    """`round_to`, with the gradient a cast has: that of the identity."""
    return round_to(x, dtype)


@_round.defjvp
def _round_jvp(dtype: jnp.dtype, primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _round(primals[0], dtype), tangents[0]


def wide(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`x` in float32, where every operation computes."""
    return x.astype(jnp.float32)


def linear(params: Params, x: Float[Array, "*lead k"], compute: Compute) -> Float[Array, "*lead n"]:
    """x @ weight.T + bias as one 2-D product; `weight` is [n, k] as on disk (measured: a transposed
    copy is no faster).

    The bias, if `params` has one, is added before the result is rounded.
    """
    rows = x.reshape(-1, x.shape[-1])
    contract_last = (((1,), (1,)), ((), ()))
    y = lax.dot_general(
        rows,
        params["weight"].astype(rows.dtype),
        contract_last,
        precision=compute.precision,
        preferred_element_type=jnp.float32,
    )
    if "bias" in params:
        y = y + wide(params["bias"])[None, :]
    return settle(y, compute).reshape(*x.shape[:-1], y.shape[-1])


def norm(
    row: Norm, params: Params, x: Float[Array, "*lead k"], compute: Compute
) -> Float[Array, "*lead k"]:
    """Normalise the last axis as `row` says, with the weight of `params`."""
    return NORMS[row.kind](params, x, row.eps, compute)


def _rms(params: Params, x: Array, eps: float, compute: Compute) -> Array:
    # Rounded twice: the normalised values are of the compute dtype before the weight meets them.
    weight = _along_last(wide(params["weight"]), x)
    return settle(weight * wide(settle(_normalised(x, eps), compute)), compute)


def _rms_plus_one(params: Params, x: Array, eps: float, compute: Compute) -> Array:
    weight = _along_last(wide(params["weight"]), x)
    return settle(_normalised(x, eps) * (1.0 + weight), compute)


def _normalised(x: Array, eps: float) -> Array:
    x = wide(x)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _along_last(weight: Array, x: Array) -> Array:
    return weight.reshape((1,) * (x.ndim - 1) + weight.shape)


NORMS: dict[str, Callable[[Params, Array, float, Compute], Array]] = {
    "rms": _rms,
    "rms_plus_one": _rms_plus_one,
}
"""Kind -> function. "rms_plus_one" stores weight - 1 and rounds once, at the end."""

GAIN_OFFSETS = {"rms": 0, "rms_plus_one": 1}
"""Kind -> what is added to the stored gain."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}
"""The names config files use -> elementwise function in float32. "gelu" is the exact one, by erf.
"""


def activate(name: str, x: Float[Array, "*s"], compute: Compute) -> Float[Array, "*s"]:
    """The activation called `name`, elementwise."""
    return settle(ACTIVATIONS[name](wide(x)), compute)
