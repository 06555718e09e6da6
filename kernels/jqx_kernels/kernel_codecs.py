# SPDX-License-Identifier: Apache-2.0
"""`CODECS` for the compilers of kernels: Mosaic adds and compares no bytes."""

import jax.numpy as jnp

from .codecs import CODECS, Codec
from .nf4 import nf4_code, nf4_value

KERNEL_CODECS = {
    **CODECS,
    "nf4": Codec(
        lambda q, x: nf4_code(q, jnp.int32),
        lambda code: nf4_value(code.astype(jnp.int32)),
    ),
}
"""Name of an element -> the functions of a kernel."""
