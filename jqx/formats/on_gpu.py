# SPDX-License-Identifier: Apache-2.0
"""Encoding on an NVIDIA GPU: the bytes of `encode`, which is exact on CPUs only.

XLA divides on GPUs by what is nearly the reciprocal. So kernels divide what is large, the matrix
and its blocks, and a CPU what is small, the scales of tensors, rows and tiles.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jqx_kernels.blocks import block_amax, weight_amax
from jqx_kernels.dispatch import device_of
from jqx_kernels.tiles import no_gpu

from .encode import Encoded
from .format import Format, check_divides, grid_shape, storage_of, with_float_scales
from .scales import float_scale, tensor_scale


def encodes(device: Any, fmt: Format, shape: tuple[int, ...]) -> bool:
    """Whether `encode_on_gpu` works on a `jax.Device`, for this format and a matrix of this
    shape.
    """
    return no_gpu(device_of(device)) is None and with_float_scales(fmt) == fmt and 0 not in shape


def encode_on_gpu(
    w: Float[Array, "n k"],
    fmt: Format,
    whole: np.float32 | None = None,
    interpret: bool = False,
) -> Encoded:
    """`encode(w, fmt)` for a matrix that lies on a GPU for which `encodes` holds; not for jit.

    `whole`: what the scale of the whole tensor reaches, the largest magnitude in `w` if None.
    `interpret`: anywhere, slowly. Raises InputError if the shape does not fit the format.
    """
    from jqx_kernels.encode import codes, encode  # Pallas takes a while to import

    check_divides(fmt, w.shape)
    how: dict[str, Any] = {"storage": storage_of(fmt), "double_rounding": fmt.double_rounding}
    how |= {"implementation": "triton", "interpret": interpret}
    how["device"] = device_of(next(iter(w.devices())))  # which need not be the default one
    rows, columns = fmt.block
    one = (rows, columns) == (None, None)
    if whole is None and (one or fmt.tensor_bound is not None):
        whole = np.float32(_whole_amax(w))
    outer = None if fmt.tensor_bound is None else _on_cpu(_outer, whole, fmt=fmt)
    if rows == 1 and columns is not None:
        bytes_, scale = encode(w, None if outer is None else jnp.asarray(outer), **how)
    else:
        amax = np.full((1, 1), whole) if one else _block_amax(w, fmt=fmt)
        scale = _on_cpu(_scale, amax, fmt=fmt, dtype=w.dtype)
        bytes_ = codes(w, jnp.asarray(scale), **how)
    stored = np.dtype(fmt.element.dtype), np.dtype(fmt.scale.dtype)
    return Encoded(
        lax.bitcast_convert_type(bytes_, stored[0]),
        _as(jnp.asarray(scale).reshape(grid_shape(fmt, w.shape)), stored[1]),
        None if outer is None else jnp.asarray(outer),
    )


def _as(x: Array, dtype: np.dtype) -> Array:
    """Bytes as what they are codes of."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


_whole_amax = jax.jit(weight_amax)


@partial(jax.jit, static_argnames="fmt")
def _block_amax(w: Array, fmt: Format) -> Array:
    return block_amax(w, fmt.block)


@partial(jax.jit, static_argnames="fmt")
def _outer(amax: Array, fmt: Format) -> Array:
    return tensor_scale(amax, fmt)


@partial(jax.jit, static_argnames=("fmt", "dtype"))
def _scale(amax: Array, fmt: Format, dtype: Any) -> Array:
    return float_scale(amax, fmt, dtype)


def _on_cpu(find: Any, amax: Any, **static: Any) -> np.ndarray:
    """What `find` gives for magnitudes, found on a CPU."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(find(np.asarray(amax, np.float32), **static))
