# SPDX-License-Identifier: Apache-2.0
"""What is known of a stored matrix before it is decoded."""

from typing import NamedTuple

import jax.numpy as jnp

from jqx_kernels.storage import Storage


class DecodeRequest(NamedTuple):
    """The static facts of one stored matrix [n, k] to decode. `shape` and `dtype`: those of the
    matrix that it becomes. `interpret`: kernels run anywhere.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    storage: Storage
    interpret: bool = False

    @property
    def columns(self) -> int:
        """How many columns share a scale."""
        return self.storage.columns(self.shape[1])

    def __str__(self) -> str:
        """As errors name it."""
        return f"{self.storage} to a {self.dtype.name} matrix {list(self.shape)}"
