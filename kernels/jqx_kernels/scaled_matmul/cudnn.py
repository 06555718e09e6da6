# SPDX-License-Identifier: Apache-2.0
"""Products of two matrices with block scales on the tensor cores of Blackwell GPUs, by
`jax.nn.scaled_matmul`, which is cuDNN there.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from jqx_kernels.dispatch import Device

from .kinds import KINDS, Kind, ScaledRequest, Stored, lacks_dtype, lacks_kind

_SCALED_MATMUL = getattr(jax.nn, "scaled_matmul", None)


def lacks(device: Device, request: ScaledRequest) -> str | None:
    """Other devices, and kinds without block scales."""
    if _SCALED_MATMUL is None:
        return f"needs jax.nn.scaled_matmul, which JAX {jax.__version__} has not"
    if device.platform != "gpu" or device.capability is None or device.capability < (10, 0):
        told = device.platform if device.capability is None else "{}.{}".format(*device.capability)
        return f"needs a GPU of compute capability 10.0, not {told}"
    return lacks_kind(request, ("nvfp4", "mxfp8")) or lacks_dtype(device, request)


def operand(stored: Stored, kind: Kind) -> tuple[Array, Array]:
    """Codes and scales [1, rows, ...] in the dtypes that they are codes of."""
    codes = lax.bitcast_convert_type(stored.codes, jnp.dtype(kind.dtype))
    scale = lax.bitcast_convert_type(stored.scale, jnp.dtype(kind.scale_dtype))
    return codes.reshape(1, stored.codes.shape[0], -1), scale[None]


def multiply(
    x: Stored, w: Stored, outer: Float32[Array, ""], request: ScaledRequest
) -> Float[Array, "m n"]:
    """The product in `request.dtype`."""
    assert _SCALED_MATMUL is not None
    (x_codes, x_scale), (w_codes, w_scale) = (operand(side, KINDS[request.kind]) for side in (x, w))
    y = _SCALED_MATMUL(x_codes, w_codes, x_scale, w_scale, preferred_element_type=jnp.float32)
    return (y[0] * outer).astype(request.dtype)
