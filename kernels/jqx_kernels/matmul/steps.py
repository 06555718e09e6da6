# SPDX-License-Identifier: Apache-2.0
"""Scales as products take them."""

import jax.numpy as jnp
from jaxtyping import Array, Float32

SCALE_DTYPES = {
    "float32": ("float32",),
    "e4m3": ("uint8", "float8_e4m3fn"),
    "e8m0": ("uint8", "float8_e8m0fnu"),
}


def outer_scale(tensor_scale: Array | None, kind: str) -> Float32[Array, ""]:
    """The tensor scale, 1 for kinds of scales that know none.

    Raises ValueError where it is missing, and for one that is not one number.
    """
    if kind != "e4m3":
        return jnp.float32(1)
    if tensor_scale is None or tensor_scale.size != 1:
        given = "none" if tensor_scale is None else f"an array {tensor_scale.shape}"
        raise ValueError(f"Scales in e4m3 lie below one tensor scale; there is {given}.")
    return tensor_scale.reshape(()).astype(jnp.float32)
