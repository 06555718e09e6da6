# SPDX-License-Identifier: Apache-2.0
"""Simulated: a linear as ModelOpt simulates it while it scores, which differs from what it stores
by a rounding (FP8 scores up to 15 % otherwise).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jqx.algorithms import Linear
from jqx.algorithms.linear import INVERSE
from jqx.algorithms.simulate import simulate, simulate_stages
from jqx.config import INPUT_FORMATS
from jqx.formats import Format, find_format
from jqx.transforms.interpret import PRODUCTS, Acts, Met, Walk, interpret
from jqx.transforms.primitives import PRIMITIVES
from jqx_kernels.bits import round_to


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "pre_quant_scale", "input_amax"],
    meta_fields=["input_format"],
)
@dataclass(frozen=True)
class Simulated:
    """A linear as it is simulated: its rounded weight, what inputs are multiplied by, the largest
    magnitude that a scale of them reaches, and their format.
    """

    weight: Float[Array, "n k"]
    pre_quant_scale: Float[Array, "k"] | None
    input_amax: Float32[Array, ""] | None
    input_format: str | None

    @classmethod
    def of(
        cls, linear: Linear, fmt: Format, input_format: str | None, weight: Float[Array, "n k"]
    ) -> "Simulated":
        """That of a linear before its codes, in the format `fmt`, whose weight was `weight`."""
        inverse = linear.facts.get(INVERSE) if linear.low_rank is None else None
        rounded = _rounded(linear._replace(facts={}), inverse, weight, fmt=fmt)
        return cls(rounded, linear.pre_quant_scale, linear.input_amax, input_format)

    def inputs(self, x: Float[Array, "... k"]) -> Float[Array, "... k"]:
        """`x`, in the dtype of the model, as the linear reads it."""
        if self.pre_quant_scale is not None:
            x = x * jnp.broadcast_to(self.pre_quant_scale, x.shape)
        if self.input_format is None:
            return x
        row = INPUT_FORMATS[self.input_format]
        fmt, flat = find_format(row.format), x.reshape(-1, x.shape[-1])
        bound = self.input_amax if row.bound is not None else None
        amax = (None, bound) if fmt.tensor_bound is not None else (bound, None)
        return simulate(flat, fmt, *amax).reshape(x.shape)

    def outputs(self, met: Met) -> Array:
        """The result of a product of rows with the linear's weight, kept as [n, k] or [k, n], from
        the inputs as they are met.
        """
        x = self.inputs(met.x.astype(self.weight.dtype)).astype(met.x.dtype)
        weight = self.weight.T if met.use.weight_axes == (0,) else self.weight
        return met.apply(x, weight.astype(met.w.dtype))


@partial(jax.jit, static_argnames=("fmt",))
def _rounded(
    linear: Linear,
    inverse: Float32[Array, "k"] | None,
    weight: Float[Array, "n k"],
    *,
    fmt: Format,
) -> Float[Array, "n k"]:
    scaled = linear.weight
    if inverse is not None:
        # while it scores ModelOpt has the factor of weights in their dtype, too
        wide = weight.astype(jnp.float32) * round_to(inverse, weight.dtype)[None, :]
        scaled = wide.astype(weight.dtype)
    return simulate_stages(scaled, fmt, linear.amax, linear.tensor_amax)


def simulated(f: Callable[..., Any], linears: Mapping[str, Simulated]) -> Callable[..., Any]:
    """`f`, with the products of the parameters in `linears`, by path, as they are simulated."""

    def change(met: Met, walk: Walk) -> Array | None:
        linear = walk.beside.get(met.use.path)
        if met.use.op not in PRODUCTS or linear is None:
            return None
        return linear.outputs(met)

    def run(params: Any, *args: Any) -> Any:
        walk = Walk(PRIMITIVES, Acts(change=change), beside=linears)
        return interpret(f, walk, params, args)[0]

    return run
