# SPDX-License-Identifier: Apache-2.0
"""wmse: the scale of every block with the smallest error of what is stored, weighted with what the
inputs tell.

    square   sum_j E[x_j^2] d_j^2      what the errors cost if channels were independent
    gram     d^T E[x x^T] d            what they cost, as if no block met another

where d = w - decode(encode(w)). Scales of one level are multiples of the one that reaches the
largest magnitude, and last the one that fits the codes best (least squares). Below a tensor scale
they are E4M3 numbers, so all of them near the one that reaches the largest magnitude are tried; the
larger ones put the largest magnitude at 4 instead of 6.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from jqx.errors import InputError, nearest
from jqx.formats import Format, block_amax
from jqx.formats.elements import E4M3, FLOAT32
from jqx.formats.format import grid_shape
from jqx.formats.scales import find_scales, step_of
from jqx_kernels.bits import divide, e4m3_code, e4m3_value, round_to
from jqx_kernels.blocks import Block, from_blocks, spread, to_blocks
from jqx_kernels.codecs import CODECS

from .linear import InputStats, Linear
from .local_hessian import block_products
from .mse import Grid, first_best, with_tensor_amax
from .quadratic import block_gram, squares

Matrix = Float32[Array, "n k"]

SMALLEST = 2.0**-9  # of the E4M3 scales
LOWER, HIGHER = -10, 6
"""How many E4M3 codes below and above that of the largest magnitude are tried: about a third of its
scale to half as much again.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighted:
    """`weight`: "square" or "gram". `count` multiples from `lowest` to `highest` are tried for
    scales of one level, and `refine` times what fits the codes best.
    """

    weight: str = "square"
    lowest: float = 0.4
    highest: float = 1.2
    count: int = 41
    refine: int = 1

    def __post_init__(self) -> None:
        """Raises InputError for values that leave nothing to try."""
        if self.weight not in MEASURES:
            raise nearest(self.weight, MEASURES, "weight of wmse")
        if not 0 < self.lowest <= self.highest < math.inf or self.count < 1 or self.refine < 0:
            raise InputError(
                f"lowest {self.lowest}, highest {self.highest}, count {self.count}, refine "
                f"{self.refine}: take 0 < lowest <= highest, count from 1, refine from 0"
            )


def weighted_needs(fmt: Format, params: Weighted) -> tuple[str, ...]:
    """Squares of channels; second moments in the blocks of the format, or all of them."""
    if params.weight == "square":
        return ("square",)
    return ("block_gram",) if fmt.block[1] and not fmt.ragged else ("gram",)


def weighted(linear: Linear, fmt: Format, stats: InputStats, params: Weighted) -> Linear:
    """`linear` with the amax of every scale that costs least. `tensor_amax` is kept if known.

    Raises InputError without the statistics of `weighted_needs`.
    """
    if fmt.scale == E4M3:
        linear = with_tensor_amax(linear)
    return linear._replace(amax=weighted_amax(linear, fmt, stats, params))


def weighted_amax(
    linear: Linear, fmt: Format, stats: InputStats, params: Weighted | str = "square"
) -> Grid:
    """What scales reach, in their shape, so that storing `linear.weight` costs least; `params` may
    be the weight alone. Never worse than the largest magnitudes, in float32.

    What scales were chosen before does not matter. Under the tensor scale of `linear.tensor_amax`,
    or that of the largest magnitude, no scale is above 448.
    """
    params = Weighted(weight=params) if isinstance(params, str) else params
    linear = with_tensor_amax(linear) if fmt.scale == E4M3 else linear
    w = linear.weight.astype(jnp.float32)
    product = MEASURES[params.weight](fmt, stats, w.shape[1])

    def losses(amax: Grid) -> Grid:
        d = w - _decoded(linear, fmt, amax)
        return product(d, d).reshape(amax.shape)

    tried, amax_of = _CANDIDATES[fmt.scale.name](linear, fmt, params)
    found = first_best(tried, amax_of, losses)
    for _ in range(params.refine if fmt.scale == FLOAT32 else 0):
        y = _decoded(linear, fmt, found)
        factor = divide(product(w, y), product(y, y)).reshape(found.shape)
        pair = jnp.stack([found, found * jnp.where(factor > 0, factor, jnp.float32(1))])
        found = first_best(np.arange(2), pair.__getitem__, losses)
    return found


def _decoded(linear: Linear, fmt: Format, amax: Grid) -> Matrix:
    """What the weight reads as, once it is stored with scales that reach `amax`."""
    w, codec = linear.weight, CODECS[fmt.element.name]
    scales = find_scales(w, fmt, amax, linear.tensor_amax)
    x = to_blocks(w, fmt.block).astype(jnp.float32)
    q = scales.quotient(x)
    if fmt.double_rounding:
        q = round_to(q, w.dtype)
    step = spread(step_of(scales.scale, scales.tensor_scale, fmt))
    return from_blocks(codec.decode(codec.encode(q, x)) * step, w.shape)


Product = Callable[[Matrix, Matrix], Float32[Array, "..."]]
"""Two matrices [n, k] -> their product over the channels that share a scale, and over the rows."""


def _by_squares(fmt: Format, stats: InputStats, k: int) -> Product:
    weights = squares(stats, "wmse")
    return lambda a, b: _summed(a * b * weights[None], fmt.block)


def _by_gram(fmt: Format, stats: InputStats, k: int) -> Product:
    rows, cols = fmt.block
    size = math.gcd(cols or k, k)
    moments = block_gram(stats, size, "wmse")
    blocks = rows, cols and cols // size
    return lambda a, b: _summed(block_products(a, b, moments), blocks)


def _summed(x: Matrix, block: Block) -> Float32[Array, "..."]:
    return jnp.sum(to_blocks(x, block), axis=(1, 3))


MEASURES = {"square": _by_squares, "gram": _by_gram}

Candidates = tuple[Float32[np.ndarray, "c"] | Int[np.ndarray, "c"], Callable[[Array], Grid]]
"""Numbers to try, the one of the largest magnitudes first, and the amaxes that they stand for."""


def _multiples(linear: Linear, fmt: Format, params: Weighted) -> Candidates:
    largest = _largest(linear, fmt)
    spaced = np.linspace(params.lowest, params.highest, params.count)
    return np.array([1, *spaced], np.float32), lambda m: largest * m


def _codes(linear: Linear, fmt: Format, params: Weighted) -> Candidates:
    """Codes near that of the scale that reaches the largest magnitude."""
    assert linear.tensor_amax is not None
    assert fmt.tensor_bound is not None
    largest, whole = _largest(linear, fmt), linear.tensor_amax
    top = jnp.float32(fmt.tensor_bound / fmt.element.max)
    scale = divide(largest * top, whole)
    code = e4m3_code(jnp.clip(scale, jnp.float32(SMALLEST), jnp.float32(448))).astype(jnp.int32)

    def amax_of(offset: Int32[Array, ""]) -> Grid:
        near = jnp.clip(code + offset, 1, 0x7E).astype(jnp.uint8)
        return jnp.where(offset == 0, largest, whole * divide(e4m3_value(near), top))

    return np.array(sorted(range(LOWER, HIGHER + 1), key=abs), np.int32), amax_of


def _powers(linear: Linear, fmt: Format, params: Weighted) -> Candidates:
    """Scales are powers of two: the next ones."""
    largest = _largest(linear, fmt)
    return np.array([1, 0.5, 2], np.float32), lambda m: largest * m


_CANDIDATES = {"float32": _multiples, "e4m3": _codes, "e8m0": _powers}


def _largest(linear: Linear, fmt: Format) -> Grid:
    w = linear.weight
    return block_amax(w, fmt.block).reshape(grid_shape(fmt, w.shape))
