# SPDX-License-Identifier: Apache-2.0
"""SVDQuant: the largest part of a weight is kept in two narrow factors, the rest is rounded.

    W' = W diag(s)                            s: of awq_lite
    W' = U S V^T,   B = U_r S_r,  A = V_r^T   the r largest singular values
    y = Q(x p) Q(W' - B A)^T + (x p) A^T B^T  p = 1 / s

(Li et al. 2024, arXiv 2411.05007, with the smoothing of ModelOpt 0.47.)
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from jqx.errors import InputError
from jqx.formats import Format
from jqx_kernels.bits import round_to

from .awq import AwqLite, awq_lite, lite_needs
from .linear import InputStats, Linear
from .quadratic import HIGHEST


@dataclass(frozen=True, kw_only=True, slots=True)
class SvdQuant:
    """`lowrank`: columns of the factors that are kept beside the weight. `alpha_step`: that of
    awq_lite, which comes first.
    """

    lowrank: int = 32
    alpha_step: float = 0.1

    def __post_init__(self) -> None:
        """Refuse values out of range with InputError."""
        _ = self.lite
        if self.lowrank < 1:
            raise InputError(f"lowrank of svdquant is at least 1, not {self.lowrank}")

    @property
    def lite(self) -> AwqLite:
        """The parameters of what comes first."""
        return AwqLite(alpha_step=self.alpha_step)


def svdquant_needs(fmt: Format, params: SvdQuant) -> tuple[str, ...]:
    """What awq_lite needs."""
    return lite_needs(fmt, params.lite)


def svdquant(linear: Linear, fmt: Format, stats: InputStats, params: SvdQuant) -> Linear:
    """The weight scaled by awq_lite, without its part of rank `params.lowrank`.

    Raises InputError for statistics that are not there.
    """
    return low_rank_off(awq_lite(linear, fmt, stats, params.lite), params.lowrank)


def low_rank_off(linear: Linear, rank: int) -> Linear:
    """`linear` with its best approximation of this rank taken off the weight and put into
    `low_rank`; a low-rank part that it had counts to the weight first.

    Factors are rounded to the dtype of the weight, and so is their product before it is taken off.
    Beyond the smaller axis they are zeros. What scales reach is found anew.
    """
    dtype, wide = linear.weight.dtype, linear.weight.astype(jnp.float32)
    if linear.low_rank is not None:
        wide = wide + _product(*linear.low_rank)
    outer, values, inner = jnp.linalg.svd(wide, full_matrices=False)
    kept = min(rank, values.shape[0])
    filled = ((0, 0), (0, rank - kept))
    b = jnp.pad((outer * values[None, :])[:, :kept], filled).astype(dtype)
    a = jnp.pad(inner[:kept], filled[::-1]).astype(dtype)
    weight = (wide - round_to(_product(b, a), dtype)).astype(dtype)
    return linear._replace(weight=weight, low_rank=(b, a), amax=None, tensor_amax=None)


def _product(outer: Float[Array, "n r"], inner: Float[Array, "r k"]) -> Float[Array, "n k"]:
    wide = (part.astype(jnp.float32) for part in (outer, inner))
    return jnp.matmul(*wide, precision=HIGHEST)
