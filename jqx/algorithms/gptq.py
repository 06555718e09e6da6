# SPDX-License-Identifier: Apache-2.0
"""GPTQ: columns are rounded one by one, and the columns still to come make up for what each lost.

    H = X^T X + damping * mean(diag) * I,    U upper triangular with U^T U = H^-1
    e_i = (w_i - round(w_i)) / U_ii,         w_j -= e_i U_ij  for j > i

Scales are those of the weight before the first column, so what was rounded is stored as it is.
(Frantar et al. 2022, arXiv 2210.17323, algorithm 1.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

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
LEAVES, LEAF, LARGEST_LEAF = 64, 32, 256
"""Into how many parts a matrix is divided, and how many rows of it are eliminated one by one."""
INNER, PANEL = 16, 512
"""Columns that change one another one by one, and those that do in blocks of one loop."""

_Nearest = Callable[[Float32[Array, "n"], Int32[Array, ""]], Float32[Array, "n"]]
_Both = tuple[Float32[Array, "k n"], Float32[Array, "k n"]]


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


def inverse_root(
    h: Float32[Array, "k k"], damping: float | Float32[Array, ""]
) -> tuple[Float32[Array, "k k"], Float32[Array, ""]]:
    """Upper triangular U with U^T U = (h + damping I)^-1, and the damping that it took; the
    identity and infinity where none up to `MOST_DAMPING` was enough.
    """
    eye = jnp.eye(h.shape[0], dtype=jnp.float32)

    def another(tried: _Tried) -> _Tried:
        u = _root(h + tried.next * eye)
        return _Tried(10 * tried.next, tried.next, u, jnp.isfinite(jnp.sum(jnp.abs(u))))

    def failed(tried: _Tried) -> Array:
        return ~tried.found & (tried.damping < MOST_DAMPING)

    none = _Tried(jnp.float32(damping), jnp.float32(0), h, jnp.asarray(False))
    last = lax.while_loop(failed, another, none)
    d = jnp.where(last.found, last.damping, jnp.float32(jnp.inf))
    return jnp.where(last.found, last.root, eye), d


class _Tried(NamedTuple):
    """The damping to try next, and that of the last attempt with what came out."""

    next: Float32[Array, ""]
    damping: Float32[Array, ""]
    root: Float32[Array, "k k"]
    found: Bool[Array, ""]


def _root(h: Float32[Array, "k k"]) -> Float32[Array, "k k"]:
    """U by halves, the last one first, so that most of it is products; NaN somewhere if `h` is not
    positive definite.

        h = R R^T,   U = R^-1,   R = [[R1, B], [0, R2]],   U = [[U1, -U1 B U2], [0, U2]]

    LAPACK is not called: threads that its libraries leave spinning take the cores from the
    products.
    """
    k = h.shape[0]
    leaf = min(max(k // LEAVES, LEAF), LARGEST_LEAF)
    if k <= leaf:
        return _eliminated(h)
    m = -(-k // 2 // LEAF) * LEAF
    last = _root(h[m:, m:])
    across = _product(h[:m, m:], last.T)
    first = _root(h[:m, :m] - _product(across, across.T))
    right = -_product(first, _product(across, last))
    return jnp.block([[first, right], [jnp.zeros((k - m, m), jnp.float32), last]])


def _eliminated(h: Float32[Array, "k k"]) -> Float32[Array, "k k"]:
    """U by eliminating columns from the last to the first, beside an identity that becomes U."""
    k = h.shape[0]
    places = jnp.arange(k)

    def column(i: Array, both: Array) -> Array:
        j = k - 1 - i
        pivot = jnp.sqrt(both[j, j])
        row = both[j] / pivot
        above = jnp.where(places < j, both[:, j] / pivot, jnp.float32(0))
        changed = both - above[:, None] * row[None, :]
        return jnp.where((places == j)[:, None], row[None, :], changed)

    start = jnp.concatenate([h, jnp.eye(k, dtype=jnp.float32)], axis=1)
    return lax.fori_loop(0, k, column, start)[:, k:]


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=HIGHEST)


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

    grid_rows = columns // (cols or k)

    def nearest(x: Array, place: Array) -> Array:
        row = _row(grid_rows, jnp.minimum(place, k - 1))  # columns behind it only fill a block
        step = _row(steps, row)
        return codec.decode(codec.encode(divide(x, step), x)) * step

    return nearest


def _swept(
    w: Float32[Array, "k n"], u: Float32[Array, "k k"], nearest: _Nearest, block_size: int
) -> Float32[Array, "k n"]:
    """The rounded columns, here rows of `w`."""
    k, b = w.shape[0], min(block_size, w.shape[0])
    sizes = (b,) if b <= INNER else (-(-b // INNER) * INNER, INNER)
    fill = -k % sizes[0]
    u = jnp.pad(u, (0, fill)) + jnp.diag((jnp.arange(k + fill) >= k).astype(jnp.float32))
    return _halved(jnp.pad(w, ((0, fill), (0, 0))), u, nearest, sizes)[0][:k]


def _halved(w: Array, u: Array, nearest: _Nearest, sizes: tuple[int, ...], start: int = 0) -> _Both:
    """The rounded columns and their errors: one half, then what it changes of the other, as long as
    there are many.
    """
    k, b = w.shape[0], sizes[0]
    if k <= max(PANEL, b):
        return _scanned(w, u, nearest, sizes, jnp.int32(start))
    m = -(-k // 2 // b) * b
    rounded, errors = _halved(w[:m], u[:m, :m], nearest, sizes, start)
    rest = w[m:] - _product(u[:m, m:].T, errors)
    last, after = _halved(rest, u[m:, m:], nearest, sizes, start + m)
    return jnp.concatenate([rounded, last]), jnp.concatenate([errors, after])


def _scanned(
    w: Array, u: Array, nearest: _Nearest, sizes: tuple[int, ...], start: Int32[Array, ""]
) -> _Both:
    """The same block after block, of the largest of `sizes`; within it of the next."""
    if not sizes:
        return _one_by_one(w, u, nearest, start)

    def block(errors: Array, at: Array) -> tuple[Array, Array]:
        columns = lax.dynamic_slice_in_dim(u, at, sizes[0], axis=1)
        part = lax.dynamic_slice_in_dim(w, at, sizes[0]) - _product(columns.T, errors)
        within = lax.dynamic_slice_in_dim(columns, at, sizes[0])
        rounded, own = _scanned(part, within, nearest, sizes[1:], start + at)
        return lax.dynamic_update_slice_in_dim(errors, own, at, 0), rounded

    places = jnp.arange(0, w.shape[0], sizes[0], dtype=jnp.int32)
    errors, rounded = lax.scan(block, jnp.zeros_like(w), places)
    return rounded.reshape(w.shape), errors


def _one_by_one(w: Array, u: Array, nearest: _Nearest, start: Int32[Array, ""]) -> _Both:
    """The same of few columns."""
    places = jnp.arange(u.shape[0])

    def column(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        w, rounded, errors = state
        x, root = _row(w, i), _row(u, i)
        q = nearest(x, start + i)
        e = divide(x - q, _row(root, i))
        w = w - jnp.where(places > i, root, jnp.float32(0))[:, None] * e[None, :]
        return w, _with_row(rounded, q, i), _with_row(errors, e, i)

    _, rounded, errors = lax.fori_loop(0, u.shape[0], column, (w, w, w))
    return rounded, errors


def _row(a: Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(a, i, keepdims=False)


def _with_row(a: Array, row: Array, i: Array) -> Array:
    return lax.dynamic_update_index_in_dim(a, row, i, 0)
