# SPDX-License-Identifier: Apache-2.0
"""Histograms of activations: of the logarithms of block maxima, and of magnitudes.

    block_log2   bin = floor((log2 a + 40) / 80 * 512)       a: largest magnitude of 16 values
    Histogram    bin = floor(|x| / width)                    width: first largest / 2048

The second kind depends on the order of the batches: later ones with larger values add bins.
(ModelOpt 0.47: `calib/nvfp4_act_headroom.py` and `calib/histogram.py`.)
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Int64

from jqx.errors import InputError
from jqx.formats import block_amax

BINS = 512
LOWEST, HIGHEST = -40.0, 40.0  # of log2
BLOCK = 16
EDGES = np.exp2(LOWEST + np.arange(BINS) / BINS * (HIGHEST - LOWEST)).astype(np.float32)
"""The smallest number of every bin, but that the first begins at 0 and the last never ends."""

FIRST_BINS = 2048
MOST_BINS = 1 << 16  # then the first batch says nothing of the others


def block_log2(x: Float[Array, "..."]) -> Int32[Array, "512"]:
    """How many blocks of 16 values along the last axis have their largest magnitude in which bin;
    blocks of zeros are in none. The last block of a row may be smaller.

    Sums of it are the histogram of everything. What is below or above all bins counts in the first
    or last one.
    """
    flat = x.reshape(-1, x.shape[-1])
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % BLOCK)))
    a = block_amax(flat, (1, BLOCK)).reshape(-1)
    return jnp.zeros(BINS, jnp.int32).at[bin_of(a)].add((a > 0).astype(jnp.int32))


def bin_of(a: Float[Array, "n"]) -> Int32[Array, "n"]:
    """The bins of positive numbers."""
    edges = jnp.asarray(EDGES)
    share = (jnp.log2(jnp.clip(a, edges[0], edges[-1])) - LOWEST) / (HIGHEST - LOWEST)
    near = jnp.clip((share * BINS).astype(jnp.int32), 0, BINS - 1)
    # a logarithm is not exact, and powers of two lie on edges
    below = (a < edges[near]).astype(jnp.int32)
    above = (a >= edges[jnp.minimum(near + 1, BINS - 1)]).astype(jnp.int32)
    return jnp.clip(near - below + above, 0, BINS - 1)


class Histogram(NamedTuple):
    """How many magnitudes lie from i * width to (i + 1) * width, the last bin with its end."""

    counts: Int64[np.ndarray, "n"]
    width: np.float32
    """0 as long as there were only zeros."""

    @classmethod
    def start(cls, x: Float[np.ndarray, "..."]) -> "Histogram":
        """Of the first batch: 2048 bins up to its largest magnitude. Raises InputError for NaN and
        infinite values.
        """
        a = _magnitudes(x)
        width = np.float32(a.max(initial=0) / np.float32(FIRST_BINS))
        return cls(_counted(a, width, FIRST_BINS), width)

    def fold(self, x: Float[np.ndarray, "..."]) -> "Histogram":
        """With another batch, for which there are more bins if it has larger values.

        Raises InputError for NaN and infinite values, and for values 32 times as large as those of
        the first.
        """
        if self.width == 0:
            later = Histogram.start(x)
            return later._replace(counts=later.counts + _padded(self.counts, later.counts.size))
        a = _magnitudes(x)
        wanted = float(np.ceil(a.max(initial=0) / self.width))
        if wanted > MOST_BINS:
            raise InputError(
                f"A batch has values up to {a.max()}, and the bins of the first are {self.width} "
                "wide: calibrate with the batches in another order"
            )
        size = max(self.counts.size, int(wanted))
        return Histogram(_counted(a, self.width, size) + _padded(self.counts, size), self.width)


def _magnitudes(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    a = np.abs(np.asarray(x).astype(np.float32)).reshape(-1)
    if not np.isfinite(a).all():
        raise InputError("NaN or infinite activations have no histogram: look at that batch")
    return a


def _counted(a: Float[np.ndarray, "m"], width: np.float32, size: int) -> Int64[np.ndarray, "n"]:
    at = (a / width).astype(np.int64) if width else np.zeros(a.shape, np.int64)
    return np.bincount(np.minimum(at, size - 1), minlength=size).astype(np.int64)


def _padded(counts: Int64[np.ndarray, "n"], size: int) -> Int64[np.ndarray, "m"]:
    return np.pad(counts, (0, size - counts.size))
