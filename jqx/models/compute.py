# SPDX-License-Identifier: Apache-2.0
"""The arithmetic that programs are run in: Compute, and a row for every kind of device."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """The arithmetic: every operation accumulates in float32, and its result is a value of `dtype`.

    `carrier` is the dtype of the arrays that hold those values, and of the operands of matrix
    products: a float32 carrier of bfloat16 values is for CPUs without units that multiply them.
    `strict` rounds every result on its bits; otherwise the compiler may keep more precision between
    operations that it fuses. `attention` is "chunks" (2-D products per key/value head and 128
    queries, for CPUs) or "batched" (for accelerators). `cache` is the row of CACHE_FORMATS in which
    keys and values are kept between calls, None where they are kept as they are.
    """

    dtype: jnp.dtype = jnp.dtype("float32")
    carrier: jnp.dtype = jnp.dtype("float32")
    strict: bool = True
    attention: str = "chunks"
    cache: str | None = None

    @property
    def precision(self) -> jax.lax.Precision:
        """Matrix products of float32 are exact products on every device; those of bfloat16 always
        are.
        """
        exact = self.carrier == jnp.dtype("float32")
        return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


_BFLOAT16 = jnp.dtype("bfloat16")
FLOAT32 = Compute()
BF16 = Compute(dtype=_BFLOAT16)
COMPUTES = {
    ("float32", "cpu"): FLOAT32,
    ("bf16", "cpu"): BF16,
    ("float32", "cpu with bf16 units"): FLOAT32,
    ("bf16", "cpu with bf16 units"): Compute(dtype=_BFLOAT16, carrier=_BFLOAT16),
    ("float32", "accelerator"): Compute(attention="batched"),
    ("bf16", "accelerator"): Compute(
        dtype=_BFLOAT16, carrier=_BFLOAT16, strict=False, attention="batched"
    ),
}
"""(name, kind of device) -> Compute."""
