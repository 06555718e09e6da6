# SPDX-License-Identifier: Apache-2.0
"""GPTQ: columns are rounded one by one, and the columns still to come make up for what each lost.

    H = X^T X + damping * mean(diag) * I,    U upper triangular with U^T U = H^-1
    e_i = (w_i - round(w_i)) / U_ii,         w_j -= e_i U_ij  for j > i

Scales are those of the weight before the first column, so what was rounded is stored as it is.
(Frantar et al. 2022, arXiv 2210.17323, algorithm 1.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float32, Int32

from jqx.errors import InputError
from jqx.formats import Format, check_divides
from jqx.formats.scales import TINY, find_scales, step_of
from jqx_kernels.bits import divide
from jqx_kernels.codecs import CODECS

from .linear import InputStats, Linear, scale_amax
from .quadratic import HIGHEST, gram
from .weighted import weighted_amax

SCALES = ("plain", "weighted")
MOST_DAMPING = 1e3
"""Damping, in mean diagonals, at which a Gram matrix counts as of no use."""
LEAF = 64  # rows of a triangle that is inverted at once

_Nearest = Callable[[Float32[Array, "n"], Int32[Array, ""]], Float32[Array, "n"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gptq:
    """Parameters of GPTQ.

    `perc_damp`: what is added to the diagonal of the Gram matrix, as a part of its mean, in (0, 1].
    `block_size`: columns after which the rest of the matrix is brought up to date; it changes the
    time, not the result. `act_order`: columns with the largest inputs are rounded first.
    `scales`: "plain", of the largest magnitudes or chosen before; "weighted", searched for the
    smallest error weighted by the mean squares of the inputs.
    """

    perc_damp: float = 0.01
    block_size: int = 128
    act_order: bool = False
    scales: str = "plain"

    def __post_init__(self) -> None:
        """Refuse values out of range with InputError."""
        if not 0 < self.perc_damp <= 1:
            raise InputError(f"perc_damp of gptq is above 0 and at most 1, not {self.perc_damp}")
        if self.block_size < 1:
            raise InputError(f"block_size of gptq is at least 1, not {self.block_size}")
        if self.scales not in SCALES:
            raise InputError(f"scales of gptq is one of {', '.join(SCALES)}, not {self.scales!r}")


def gptq(linear: Linear, fmt: Format, stats: InputStats, params: Gptq) -> Linear:
    """The weight as its codes will decode, in its own dtype, and the amax they are found with.

    Of the second moments of the inputs "rounded_gram", of the inputs as they meet the weight, goes
    before "gram". Inputs that were never seen and columns of zeros neither give nor take. Where the
    Gram matrix has no Cholesky root the damping is raised tenfold until it has; the fact "damping"
    is what was used, infinite if there is none and weights were rounded to nearest.

    Raises InputError if blocks do not divide the shape or second moments were not collected.
    """
    check_divides(fmt, linear.weight.shape)
    linear = _with_scales(linear, fmt, stats, params)
    h = _hessian(linear, stats)
    w, columns = linear.weight.astype(jnp.float32).T, jnp.arange(h.shape[0])
    if params.act_order:
        columns = jnp.argsort(-jnp.diagonal(h))
        w, h = w[columns], h[columns][:, columns]
    u, damping = inverse_root(h, params.perc_damp)
    rounded = _swept(w, u, _nearest(linear, fmt, columns), params.block_size)
    if params.act_order:
        rounded = jnp.zeros_like(rounded).at[columns].set(rounded)
    return linear._replace(weight=rounded.T.astype(linear.weight.dtype)).told(damping=damping)


def check_gram(stats: Mapping[str, Any]) -> None:
    """Raises InputError if second moments of concrete inputs are of no use: no tokens, NaN or
    infinite, nothing but zeros.
    """
    if "tokens" in stats and int(stats["tokens"]) == 0:
        raise InputError("no token reached this linear, so there are no second moments: calibrate")
    for kind in ("gram", "rounded_gram", "root"):
        if kind not in stats:
            continue
        values = np.asarray(stats[kind])
        if not np.isfinite(values).all():
            raise InputError(f"the second moments of the inputs ({kind}) are not finite")
        if not values.any():
            raise InputError(f"the second moments of the inputs ({kind}) are all zero")


@sequential_vmap
def inverse_root(
    h: Float32[Array, "k k"], damping: float | Float32[Array, ""]
) -> tuple[Float32[Array, "k k"], Float32[Array, ""]]:
    """Upper triangular U with U^T U = (h + damping I)^-1, and the damping that it took; the
    identity and infinity where none up to `MOST_DAMPING` was enough.

    With rows and columns in reverse order the root of h is a lower one, and its inverse is U in
    reverse order: one factorization and one triangular inverse. Under `vmap` one matrix is done
    after the other: on a CPU factorizations of several wait for threads that wait for them.
    """
    turned, eye = h[::-1, ::-1], jnp.eye(h.shape[0], dtype=jnp.float32)

    def root(d: Array) -> tuple[Array, Array]:
        return d, jnp.linalg.cholesky(turned + d * eye)

    def failed(state: tuple[Array, Array]) -> Array:
        return ~jnp.all(jnp.isfinite(state[1])) & (state[0] < MOST_DAMPING)

    d, lower = lax.while_loop(failed, lambda s: root(10 * s[0]), root(jnp.float32(damping)))
    inverse = _inverse(lower)
    found = jnp.all(jnp.isfinite(inverse))
    return jnp.where(found, inverse[::-1, ::-1], eye), jnp.where(found, d, jnp.float32(jnp.inf))


def _inverse(lower: Float32[Array, "k k"]) -> Float32[Array, "k k"]:
    """The inverse of a lower triangular matrix by halves, so that most of it is products: half the
    time of solving for it.
    """
    k = lower.shape[0]
    if k <= LEAF:
        eye = jnp.eye(k, dtype=jnp.float32)
        return lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
    m = -(-k // 2 // LEAF) * LEAF
    first, last = _inverse(lower[:m, :m]), _inverse(lower[m:, m:])
    below = jnp.matmul(lower[m:, :m], first, precision=HIGHEST)
    below = -jnp.matmul(last, below, precision=HIGHEST)
    return jnp.block([[first, jnp.zeros((m, k - m), jnp.float32)], [below, last]])


def _with_scales(linear: Linear, fmt: Format, stats: InputStats, params: Gptq) -> Linear:
    """`linear` with everything that scales are made of."""
    whole = linear.tensor_amax
    if fmt.tensor_bound is not None:
        one = linear.amax is not None and linear.amax.ndim == 0  # of the tensor, none of blocks
        linear, whole = (linear._replace(amax=None), linear.amax) if one else (linear, whole)
        whole = jnp.max(scale_amax(linear, fmt)) if whole is None else whole
    linear = linear._replace(tensor_amax=whole)
    searched = params.scales == "weighted"
    amax = weighted_amax(linear, fmt, stats) if searched else scale_amax(linear, fmt)
    return linear._replace(amax=amax)


def _hessian(linear: Linear, stats: InputStats) -> Float32[Array, "k k"]:
    """The Gram matrix in units of its mean diagonal; 1 alone for columns without inputs or without
    weights.
    """
    g = stats["rounded_gram"] if "rounded_gram" in stats else gram(stats, "gptq")
    live = (jnp.diagonal(g) > 0) & jnp.any(linear.weight != 0, axis=0)
    total = jnp.sum(jnp.where(live, jnp.diagonal(g), jnp.float32(0)))
    mean = total / jnp.maximum(jnp.sum(live), 1).astype(jnp.float32)
    h = jnp.where(live[:, None] & live[None, :], g / jnp.where(live.any(), mean, 1), 0)
    return h + jnp.diag(jnp.where(live, jnp.float32(0), jnp.float32(1)))


def _nearest(linear: Linear, fmt: Format, columns: Int32[Array, "k"]) -> _Nearest:
    """The function that rounds what stands in a column (x, place in the order of `columns`) to the
    values its codes can have.
    """
    scales = find_scales(linear.weight, fmt, linear.amax, linear.tensor_amax)
    n, k = linear.weight.shape
    rows, cols = fmt.block
    steps = jnp.maximum(step_of(scales.scale, scales.tensor_scale, fmt), jnp.float32(TINY))
    steps = jnp.repeat(steps, rows or n, axis=0)[:n].T
    codec = CODECS[fmt.element.name]

    def nearest(x: Array, place: Array) -> Array:
        step = steps[columns[place] // (cols or k)]
        return codec.decode(codec.encode(divide(x, step), x)) * step

    return nearest


def _swept(
    w: Float32[Array, "k n"], u: Float32[Array, "k k"], nearest: _Nearest, block_size: int
) -> Float32[Array, "k n"]:
    """The rounded columns, here rows of `w`."""
    k, b = w.shape[0], min(block_size, w.shape[0])
    w = jnp.pad(w, ((0, -k % b), (0, 0)))
    u = jnp.pad(u, ((0, -k % b), (0, -k % b)))
    places = jnp.arange(w.shape[0])

    def block(w: Array, start: Array) -> tuple[Array, Array]:
        part, rows = (lax.dynamic_slice_in_dim(a, start, b) for a in (w, u))
        within = lax.dynamic_slice_in_dim(rows, start, b, axis=1)
        last = k - 1 - start  # columns behind it fill the block
        rounded, errors = _block(
            part, within, lambda x, i: nearest(x, start + jnp.minimum(i, last))
        )
        later = jnp.where(places >= start + b, rows, jnp.float32(0))
        return w - jnp.matmul(later.T, errors, precision=HIGHEST), rounded

    _, rounded = lax.scan(block, w, places[::b])
    return rounded.reshape(w.shape)[:k]


def _block(
    w: Float32[Array, "b n"], u: Float32[Array, "b b"], nearest: _Nearest
) -> tuple[Float32[Array, "b n"], Float32[Array, "b n"]]:
    """The rounded columns of one block and their errors over the diagonal of `u`, which is 0 where
    a column is only there to fill the block.
    """
    places = jnp.arange(u.shape[0])

    def column(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        w, rounded, errors = state
        x = w[i]
        q = nearest(x, i)
        e = divide(x - q, u[i, i])
        w = w - jnp.where(places > i, u[i], jnp.float32(0))[:, None] * e[None, :]
        return w, rounded.at[i].set(q), errors.at[i].set(e)

    _, rounded, errors = lax.fori_loop(0, u.shape[0], column, (w, w, w))
    return rounded, errors
