# SPDX-License-Identifier: Apache-2.0
"""Arrays on a GPU to QTensors there, where no algorithm chooses scales."""

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jqx.formats import Format
from jqx.formats.on_gpu import encode_on_gpu, encodes

from .layout import Layout, to_matrices
from .qtensor import QTensor


def stays_on_gpu(w: jax.Array, fmt: Format) -> bool:
    """Whether `quantize_on_gpu` can store `w` in `fmt` where it is: on one GPU."""
    if isinstance(w, Tracer) or len(w.devices()) > 1:
        return False
    return encodes(next(iter(w.devices())), fmt, w.shape)


def quantize_on_gpu(w: jax.Array, fmt: Format, layout: Layout, interpret: bool = False) -> QTensor:
    """`w` with scales that reach its largest magnitudes: the codes and scales that a CPU finds.

    `interpret`: anywhere, slowly. Raises InputError if the shape does not fit the format.
    """
    matrices = to_matrices(w, layout)
    lead = matrices.shape[:-2]
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    members = [encode_on_gpu(m, fmt, interpret=interpret) for m in flat]
    encoded = jax.tree.map(lambda *a: jnp.stack(a).reshape(*lead, *a[0].shape), *members)
    return QTensor(*encoded, format=fmt, dtype=w.dtype, layout=layout)
