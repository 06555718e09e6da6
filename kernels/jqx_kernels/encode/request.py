# SPDX-License-Identifier: Apache-2.0
"""What is known of a matrix before it is encoded, and where that is not exact."""

from typing import NamedTuple

import jax.numpy as jnp

from jqx_kernels.dispatch import Device
from jqx_kernels.storage import Storage
from jqx_kernels.tiles import no_storage


class EncodeRequest(NamedTuple):
    """The static facts of one matrix [n, k] to encode. `double_rounding`: quotients are rounded to
    `dtype`, that of the matrix, before they are coded. `interpret`: kernels run anywhere.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    storage: Storage
    double_rounding: bool = False
    interpret: bool = False

    @property
    def columns(self) -> int:
        """How many columns share a scale."""
        return self.storage.columns(self.shape[1])

    def __str__(self) -> str:
        """As errors name it."""
        twice = " after double rounding" if self.double_rounding else ""
        return f"a {self.dtype.name} matrix {list(self.shape)} as {self.storage}{twice}"


def inexact(device: Device, request: EncodeRequest) -> str | None:
    """Why programs that XLA compiles cannot do it."""
    if device.platform == "gpu":
        return "is compiled by XLA, whose divisions on GPUs are off by up to two ulp: codes at ties"
    return no_storage(device, request)


def several_rows(request: EncodeRequest) -> str | None:
    """Why a kernel cannot find the scales; None if it can."""
    return None if request.storage.block[0] == 1 else "finds scales of single rows only"
