# SPDX-License-Identifier: Apache-2.0
"""max: every scale reaches exactly the largest magnitude of what it covers. Nothing is searched.

A weight scale that covers a whole tensor may have to reach further, where linears that read the
same input share it.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jqx.formats import Format
from jqx.tensors import QTensor


class LinearStats(NamedTuple):
    """What is known about one linear: `amax` of its weight, or of all weights that share its tensor
    scale, and its `input_scale`, if its inputs have a stored one.
    """

    amax: Float32[Array, ""] | np.float32 | None = None
    input_scale: Float32[Array, ""] | np.float32 | None = None


def max_calibrate(w: Float[Array, "n k"], fmt: Format, stats: LinearStats) -> QTensor:
    """Store `w` in `fmt` with scales that reach the largest magnitudes.

    Raises InputError if the blocks of `fmt` do not divide the shape.
    """
    whole = fmt.tensor_bound is not None or fmt.block == (None, None)
    amax = jnp.asarray(stats.amax) if whole and stats.amax is not None else None
    q = QTensor.quantize(w, fmt, amax)
    return q.replace(input_scale=stats.input_scale)
