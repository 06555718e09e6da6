# SPDX-License-Identifier: Apache-2.0
"""What is known of a product with a Hadamard matrix before it is computed, and what refuses it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array

from jqx_kernels.dispatch import Device
from jqx_kernels.matmul.request import no_product

from .matrices import base_of, largest_order, orders


class HadamardRequest(NamedTuple):
    """The static facts about one product. `shape`: [m, k], every run of `order` values of a row is
    multiplied. `transpose`: with the transpose of the matrix. `interpret`: Pallas kernels run
    anywhere.
    """

    shape: tuple[int, ...]
    dtype: str
    order: int
    transpose: bool = False
    interpret: bool = False

    @property
    def runs(self) -> int:
        """How many runs there are in all rows."""
        m, k = self.shape
        return m * k // self.order

    @property
    def scale(self) -> np.float32:
        """What sums are multiplied by, which makes the matrix orthogonal."""
        return np.float32(self.order**-0.5)

    def oriented(self, matrix: np.ndarray) -> np.ndarray:
        """A factor of the matrix, or its transpose."""
        return matrix.T if self.transpose else matrix

    def __str__(self) -> str:
        """As it is told in errors."""
        return f"{self.dtype} {self.shape} in runs of {self.order}"


def lacks_dtype(device: Device, request: HadamardRequest) -> str | None:
    """Why nothing here can compute it on any device; None where something can."""
    return no_product(request.dtype)


def lacks_tiles(request: HadamardRequest) -> str | None:
    """Why no kernel that works on tiles can compute it; None where one can."""
    return f"has no tiles for an empty matrix {request.shape}" if 0 in request.shape else None


def check_shapes(x: Array, block: int | None, signs: Array | None) -> int:
    """The order of the matrix. Raises ValueError where the arrays do not belong together, and where
    there is no such matrix.
    """
    if x.ndim == 0:
        raise ValueError("A product with a Hadamard matrix takes rows of numbers, not one number.")
    k = x.shape[-1]
    order = k if block is None else block
    if base_of(order) is None:
        way = f"; take block={largest_order(order)}" if order > 0 else ""
        raise ValueError(f"No Hadamard matrix of order {order} is known here: {orders()}{way}.")
    if k % order:
        raise ValueError(
            f"Runs of {order} values do not fit rows of {k}, the last axis of {x.shape}."
        )
    if signs is not None and signs.shape != (k,):
        raise ValueError(f"Rows of {k} values take signs of shape {(k,)}, not {signs.shape}.")
    return order
