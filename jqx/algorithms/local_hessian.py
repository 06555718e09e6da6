# SPDX-License-Identifier: Apache-2.0
"""local_hessian: the scale of every block with the smallest error of the outputs, as if no block
met another (ModelOpt 0.47, `local_hessian_calibrate`).

    loss = sum d^T H d     d = w - simulate(w) of `block_size` channels,  H = sum x x^T of them
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float32

from jqx.errors import InputError
from jqx.formats import Format
from jqx_kernels.blocks import to_blocks

from .linear import InputStats, Linear
from .mse import Grid, Mse, searched
from .quadratic import HIGHEST, block_gram


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalHessian(Mse):
    """As `Mse`; `block_size` channels are looked at together, and must fit into the blocks of the
    format.
    """

    fp8_scale_sweep: bool = True
    block_size: int = 16

    def __post_init__(self) -> None:
        """Raises InputError for values that leave nothing to try."""
        Mse.__post_init__(self)
        if self.block_size < 1:
            raise InputError(f"block_size is {self.block_size}: take that of the format, 16")


def local_hessian_needs(fmt: Format, params: LocalHessian) -> tuple[str, ...]:
    """Second moments within blocks."""
    return ("block_gram",)


def local_hessian(linear: Linear, fmt: Format, stats: InputStats, params: LocalHessian) -> Linear:
    """As `mse`, with the error that blocks make at the outputs in place of that of the weights.

    Raises InputError without second moments of `block_size` channels together, and if those do not
    fit into the blocks of `fmt`.
    """
    rows, cols = fmt.block
    size = params.block_size
    if cols and cols % size:
        raise InputError(
            f"{fmt.name} shares a scale over {cols} values, and block_size is {size}: take "
            f"block_size={cols}"
        )
    moments = block_gram(stats, size, "local_hessian")

    def loss(d: Float32[Array, "n k"]) -> Grid:
        errors = block_products(d, d, moments)
        return jnp.sum(to_blocks(errors, (rows, cols and cols // size)), axis=(1, 3))

    return searched(linear, fmt, params, loss)


def block_products(
    a: Float32[Array, "n k"], b: Float32[Array, "n k"], moments: Float32[Array, "blocks b b"]
) -> Float32[Array, "n blocks"]:
    """a^T H b of every block of every row."""
    shape = a.shape[0], moments.shape[0], moments.shape[1]
    half = jnp.einsum("nbi,bij->nbj", a.reshape(shape), moments, precision=HIGHEST)
    return jnp.sum(half * b.reshape(shape), axis=2)
