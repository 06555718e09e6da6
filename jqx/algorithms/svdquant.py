# SPDX-License-Identifier: Apache-2.0
"""SVDQuant: the largest part of a weight is kept in two narrow factors, the rest is rounded.

    W' = W diag(s)                            s: of awq_lite
    W' = U S V^T,   B = U_r S_r,  A = V_r^T   the r largest singular values
    y = Q(x p) Q(W' - B A)^T + (x p) A^T B^T  p = 1 / s

(Li et al. 2024, arXiv 2411.05007, with the smoothing of ModelOpt 0.47.) At the end B also takes
what it can of the error E that rounding left, by least squares of the outputs:

    B' = B + E G A^T (A G A^T)^-1             G: second moments of x p
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jqx.errors import InputError
from jqx.formats import Format
from jqx_kernels.bits import divide, round_to

from .awq import AwqLite, awq_lite, lite_needs
from .linear import InputStats, Linear, stored
from .quadratic import HIGHEST, gram, output_error

RIDGE = 1e-6  # of the mean of the diagonal


@dataclass(frozen=True, kw_only=True, slots=True)
class SvdQuant:
    """`lowrank`: columns of the factors that are kept beside the weight. `alpha_step`: that of
    awq_lite, which comes first. `refit`: whether the outer factor takes what it can of the error of
    rounding, as it does not in ModelOpt.
    """

    lowrank: int = 32
    alpha_step: float = 0.1
    refit: bool = True

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
    done = low_rank_off(awq_lite(linear, fmt, stats, params.lite), params.lowrank)
    assert done.pre_quant_scale is not None
    # its inputs are looked at once more, as they come from the rounded factor
    met = round_to(stats["channel_amax"], done.weight.dtype)
    met = round_to(met * _relative(done, linear), done.weight.dtype)
    return done._replace(input_amax=jnp.max(met))


def _relative(done: Linear, before: Linear) -> Float32[Array, "k"]:
    """What inputs are multiplied by in `done`, in terms of those of `before`."""
    assert done.pre_quant_scale is not None
    p = done.pre_quant_scale.astype(jnp.float32)
    old = before.pre_quant_scale
    return p if old is None else divide(p, old.astype(jnp.float32))


def low_rank_off(linear: Linear, rank: int) -> Linear:
    """`linear` with its best approximation of this rank taken off the weight and put into
    `low_rank`; a low-rank part that it had counts to the weight first.

    Factors are rounded to the dtype of the weight, and so is their product before it is taken off.
    Beyond the smaller axis they are zeros. What scales reach is found anew.
    """
    dtype, wide = linear.weight.dtype, linear.weight.astype(jnp.float32)
    if linear.low_rank is not None:
        wide = wide + product(*linear.low_rank)
    outer, inner = (part.astype(dtype) for part in low_rank(wide, rank))
    weight = (wide - round_to(product(outer, inner), dtype)).astype(dtype)
    return linear._replace(weight=weight, low_rank=(outer, inner), amax=None, tensor_amax=None)


def low_rank(
    w: Float32[Array, "n k"], rank: int
) -> tuple[Float32[Array, "n r"], Float32[Array, "r k"]]:
    """The factors of the best approximation of `w` of this rank, zeros beyond its smaller axis: U S
    and V^T, the largest number of every row of the latter positive.

    Found in float64: singular vectors of close values turn with the last bits. The eigenvectors of
    the products of its rows or columns take a thirtieth of the time of all singular vectors.
    """
    with jax.enable_x64(True):
        wide = w.astype(jnp.float64)
        tall = wide if w.shape[0] >= w.shape[1] else wide.T
        _, vectors = jnp.linalg.eigh(jnp.matmul(tall.T, tall, precision=HIGHEST))
        vectors = vectors[:, ::-1][:, :rank]  # from the largest
        across = jnp.matmul(tall, vectors, precision=HIGHEST)
        if tall is wide:
            b, a = across, vectors.T
        else:
            values = jnp.linalg.norm(across, axis=0)
            b, a = vectors * values[None, :], (across / jnp.where(values > 0, values, 1)[None, :]).T
        b, a = b.astype(jnp.float32), a.astype(jnp.float32)
    sign = jnp.where(jnp.max(a, axis=1) < jnp.max(-a, axis=1), jnp.float32(-1), jnp.float32(1))
    b, a = b * sign[None, :], a * sign[:, None]
    missing = rank - a.shape[0]
    return jnp.pad(b, ((0, 0), (0, missing))), jnp.pad(a, ((0, missing), (0, 0)))


def refitted(linear: Linear, fmt: Format, stats: InputStats, params: SvdQuant) -> Linear:
    """`linear`, whose scales are settled, with the outer factor of its low-rank part fitted to the
    error of the outputs; it stays where that gains nothing. `stats`: of the scaled inputs.

    Raises InputError without second moments.
    """
    if linear.low_rank is None or not params.refit:
        return linear
    lost = linear.weight.astype(jnp.float32) - stored(linear, fmt).decode(jnp.float32)
    outer, inner = (part.astype(jnp.float32) for part in linear.low_rank)
    seen = jnp.matmul(inner, gram(stats, "svdquant"), precision=HIGHEST)
    normal = jnp.matmul(seen, inner.T, precision=HIGHEST)
    least = jnp.mean(jnp.diagonal(normal)) * RIDGE + jnp.finfo(jnp.float32).tiny
    ridge = least * jnp.eye(normal.shape[0], dtype=jnp.float32)
    more = jnp.linalg.solve(normal + ridge, jnp.matmul(seen, lost.T, precision=HIGHEST)).T
    new = (outer + more).astype(linear.weight.dtype)
    left = lost - product(new - linear.low_rank[0], linear.low_rank[1])
    errors = [output_error(d, stats, "svdquant") for d in (left, lost)]
    kept = jnp.where(errors[0] < errors[1], new, linear.low_rank[0])
    return linear._replace(low_rank=(kept, linear.low_rank[1]))


def product(outer: Float[Array, "n r"], inner: Float[Array, "r k"]) -> Float[Array, "n k"]:
    """The part of the weight that two factors stand for, in float32."""
    wide = (part.astype(jnp.float32) for part in (outer, inner))
    return jnp.matmul(*wide, precision=HIGHEST)
