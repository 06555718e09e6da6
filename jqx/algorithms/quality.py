# SPDX-License-Identifier: Apache-2.0
"""What became of one linear: the error of its outputs, of its weight, and its codes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jqx.formats.elements import FLOAT32
from jqx.tensors import QTensor
from jqx_kernels.bits import divide

from .linear import InputStats
from .quadratic import output_error

Factors = tuple[Float[Array, "k"] | None, Float[Array, "n"] | None]


@jax.jit
def measure(
    q: QTensor, w: Float[Array, "n k"], factors: Factors, stats: InputStats
) -> dict[str, Float32[Array, ""]]:
    """Figures of a stored linear `q` that stands for `w`.

    `factors`: what its inputs are multiplied by before they meet it, and its outputs were. Returns
    "output_error" = |X W'^T - X W^T|^2 / |X W^T|^2 where `stats` have second moments,
    "weight_error" likewise without inputs, and "saturated", the share of codes at the end of their
    range.
    """
    wide, (inputs, rows) = w.astype(jnp.float32), factors
    found = q.decode(jnp.float32)
    if q.low_rank is not None:
        outer, inner = (part.astype(jnp.float32) for part in q.low_rank)
        found = found + jnp.matmul(outer, inner, precision=jax.lax.Precision.HIGHEST)
    if inputs is not None:
        found = found * inputs.astype(jnp.float32)[None, :]
    if rows is not None:
        found = divide(found, rows.astype(jnp.float32)[:, None])
    d = found - wide
    figures = {"weight_error": _share(jnp.sum(d * d), jnp.sum(wide * wide))}
    if "gram" in stats or "root" in stats:
        made = output_error(wide, stats, "a report")
        figures["output_error"] = _share(output_error(d, stats, "a report"), made)
    return figures | {"saturated": _saturated(q)}


def _share(part: Float32[Array, ""], whole: Float32[Array, ""]) -> Float32[Array, ""]:
    return divide(part, jnp.maximum(whole, jnp.float32(jnp.finfo(jnp.float32).tiny)))


def _saturated(q: QTensor) -> Float32[Array, ""]:
    """The share of codes whose magnitude is the largest that is meant to be used, or above."""
    plain = replace(q.format, scale=FLOAT32, tensor_bound=None)
    ones = q.replace(scale=jnp.ones(q.scale.shape), tensor_scale=None, format=plain)
    codes = jnp.abs(ones.decode(jnp.float32))
    return jnp.mean((codes >= q.format.element.max).astype(jnp.float32))
