# SPDX-License-Identifier: Apache-2.0
"""What queries may look at: slots that are no padding, not after them and within their window.

    query i sees slot s    where    pads <= s <= start + i    and    start + i - s < window

All functions are of integers and arrays of them, and use only what Pallas kernels also have.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

MASKED = float(np.finfo(np.float32).min)
"""The score of what is not seen. Finite: a difference of two such scores is a number."""


def seen(slot: Any, at: Any, pad: Any, window: int | None) -> Bool[Array, "..."]:
    """Whether a query beside slot `at` sees `slot`; `pad` slots are padding."""
    found = (slot <= at) & (slot >= pad)
    return found if window is None else found & (at - slot < window)


def reach(start: Any, t: int, pad: Any, window: int | None) -> tuple[Any, Any]:
    """The slots [first, end) outside of which no query of `t` sees any."""
    first = jnp.maximum(pad, 0)
    if window is not None:
        first = jnp.maximum(first, start - (window - 1))
    return first, start + t
