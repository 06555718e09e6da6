# SPDX-License-Identifier: Apache-2.0
"""The operations inside a block: linear, norms, activations. Each computes in float32 and ends in
`settle`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from jqx_kernels.bits import round_to

from .compute import FLOAT32, Compute
from .spec import Names, Norm

Params = Mapping[str, Any]
"""A nested dict: the checkpoint's tensors under their names split at the dots."""


def module(params: Params, name: str, missing: Params | None = None) -> Params:
    """The tensors of the module called `name`, whose dots are levels of the tree; `missing` where
    there is none, if that is given.
    """
    for part in name.split("."):
        if missing is not None and part not in params:
            return missing
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


def linear(
    params: Params, x: Float[Array, "*lead k"], compute: Compute, axis: int = 1
) -> Float[Array, "*lead n"]:
    """x @ weight.T + bias as one 2-D product; `weight` is [n, k] as on disk (measured: a transposed
    copy is no faster), or [k, n] with `axis` 0, the one that is contracted.

    The bias, if `params` has one, is added before the result is rounded.
    """
    return settle(unrounded(params, x, compute, axis), compute)


def unrounded(
    params: Params, x: Float[Array, "*lead k"], compute: Compute, axis: int = 1
) -> Float32[Array, "*lead n"]:
    """`linear` before its result is rounded."""
    rows = x.reshape(-1, x.shape[-1])
    y = lax.dot_general(
        rows,
        params["weight"].astype(rows.dtype),
        (((1,), (axis,)), ((), ())),
        precision=compute.precision,
        preferred_element_type=jnp.float32,
    )
    if "bias" in params:
        y = y + wide(params["bias"])[None, :]
    return y.reshape(*x.shape[:-1], y.shape[-1])


class Groups(NamedTuple):
    """Rows that lie in groups: how many each has, and the number of that of each row."""

    sizes: Int[Array, "e"]
    own: Int[Array, "m"]


def grouped_linear(
    params: Params, x: Float[Array, "m k"], groups: Groups, compute: Compute
) -> Float[Array, "m n"]:
    """`linear` with a stack [e, n, k]: the rows of each group with a matrix of it."""
    contract = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
    y = lax.ragged_dot_general(
        x,
        params["weight"].astype(x.dtype),
        groups.sizes,
        contract,
        precision=compute.precision,
        preferred_element_type=jnp.float32,
    )
    if "bias" in params:
        y = y + wide(params["bias"])[groups.own]
    return settle(y, compute)


class Inside(NamedTuple):
    """The inside of a block: its parameters, what they are called, and how it is computed.

    `transposed`: weights are [k, n]. `groups`: weights are stacks, and rows lie in these groups.
    """

    names: Names
    params: Params
    compute: Compute
    transposed: bool = False
    groups: Groups | None = None

    def linear(self, name: str, x: Float[Array, "*lead k"]) -> Float[Array, "*lead n"]:
        """What the linear called `name` makes of `x`."""
        params = module(self.params, name)
        if self.groups is not None:
            return grouped_linear(params, x, self.groups, self.compute)
        return linear(params, x, self.compute, 0 if self.transposed else 1)

    def exact_linear(self, name: str, x: Float[Array, "*lead k"]) -> Float32[Array, "*lead n"]:
        """The same, in float32 whatever the model is."""
        return unrounded(module(self.params, name), wide(x), FLOAT32)

    def tensor(self, name: str) -> Array:
        """The tensor called `name`."""
        path, _, leaf = name.rpartition(".")
        return module(self.params, path)[leaf]

    def norm(self, row: Norm, name: str, x: Float[Array, "*lead k"]) -> Float[Array, "*lead k"]:
        """What the norm called `name` makes of `x`."""
        return norm(row, module(self.params, name), x, self.compute)


def norm(
    row: Norm, params: Params, x: Float[Array, "*lead k"], compute: Compute
) -> Float[Array, "*lead k"]:
    """Normalise the last axis as `row` says, with the weight of `params`."""
    return NORMS[row.kind](params, x, row.eps, compute)


def _rms(params: Params, x: Array, eps: float, compute: Compute) -> Array:
    # Rounded twice: the normalised values are of the compute dtype before the weight meets them.
    weight = _along_last(wide(params["weight"]), x)
    return settle(weight * wide(settle(normalised(x, eps), compute)), compute)


def _rms_once(params: Params, x: Array, eps: float, compute: Compute) -> Array:
    return settle(normalised(x, eps) * _along_last(wide(params["weight"]), x), compute)


def _rms_plus_one(params: Params, x: Array, eps: float, compute: Compute) -> Array:
    weight = _along_last(wide(params["weight"]), x)
    return settle(normalised(x, eps) * (1.0 + weight), compute)


def _layer(params: Params, x: Array, eps: float, compute: Compute) -> Array:
    x = wide(x)
    y = normalised(x - jnp.mean(x, axis=-1, keepdims=True), eps)
    y = y * _along_last(wide(params["weight"]), x)
    if "bias" in params:
        y = y + _along_last(wide(params["bias"]), x)
    return settle(y, compute)


def _layer_plus_one(params: Params, x: Array, eps: float, compute: Compute) -> Array:
    # The sum is a number of the weight's own dtype.
    weight = params["weight"]
    return _layer({**params, "weight": round_to(wide(weight) + 1, weight.dtype)}, x, eps, compute)


def normalised(x: Float[Array, "*lead k"], eps: float) -> Float[Array, "*lead k"]:
    """`x` over the root mean square of its last axis, in float32."""
    x = wide(x)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _along_last(weight: Array, x: Array) -> Array:
    return weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)


NORMS: dict[str, Callable[[Params, Array, float, Compute], Array]] = {
    "rms": _rms,
    "rms_once": _rms_once,
    "rms_plus_one": _rms_plus_one,
    "layer": _layer,
    "layer_plus_one": _layer_plus_one,
}
"""Kind -> function. Those that end in "plus_one" store weight - 1; all but "rms" round once, at the
end. Those that begin with "layer" subtract the mean first.
"""

GAIN_OFFSETS = {"rms": 0, "rms_once": 0, "rms_plus_one": 1, "layer": 0, "layer_plus_one": 1}
"""Kind -> what is added to the stored gain."""

ROOT_MEAN_SQUARES = frozenset({"rms", "rms_once", "rms_plus_one"})
"""Kinds that only divide by a length: the same in any basis, but for their gains."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
"""The names config files use -> elementwise function in float32. "gelu" is the exact one, by erf.
"""


def activate(name: str, x: Float[Array, "*s"], compute: Compute) -> Float[Array, "*s"]:
    """The activation called `name`, elementwise."""
    return settle(ACTIVATIONS[name](wide(x)), compute)
