# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: the pair (x_i, x_{i+d/2}) of a head turns by the angle position * frequency_i.

frequency_i = theta^(-2i/d), i < d/2, changed by the scaling; angles, cosines and sines are float32
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from .layers import settle, wide
from .spec import Compute, Rope

_ROWS = 256  # positions per step of the loop in `turns`

Turns = tuple[Float[Array, "b 1 t half"], Float[Array, "b 1 t half"]]
"""Cosines and sines for every position, one head axis of length 1."""


def turns(rope: Rope, head_dim: int, positions: Int[Array, "b t"], compute: Compute) -> Turns:
    """Cosines and sines of every position's angles, as values of the compute dtype.

    The positions of the whole batch decide the frequencies of the "dynamic" scaling.
    """
    frequencies = SCALINGS[rope.scaling](rope, head_dim, positions)

    def at(position: Int[Array, ""]) -> tuple[Array, Array]:
        angles = position.astype(jnp.float32) * frequencies
        return settle(jnp.cos(angles), compute), settle(jnp.sin(angles), compute)

    # In a loop, or XLA:CPU fuses the cosines into the rotation and computes them for every head.
    rows = _ROWS if compute.attention == "chunks" else positions.size
    turned = lax.map(at, positions.reshape(-1), batch_size=rows)
    cos, sin = (a.reshape(positions.shape[0], 1, positions.shape[1], -1) for a in turned)
    return cos, sin


def rotate(x: Float[Array, "b h t d"], by: Turns, compute: Compute) -> Float[Array, "b h t d"]:
    """Turn every head of `x` by its position's angles; products and sums are rounded one by one."""
    first, second = jnp.split(wide(x), 2, axis=-1)
    cos, sin = wide(by[0]), wide(by[1])

    def product(a: Array, b: Array) -> Array:
        return wide(settle(a * b, compute))

    lower = product(first, cos) - product(second, sin)
    upper = product(second, cos) + product(first, sin)
    return settle(jnp.concatenate([lower, upper], axis=-1), compute)


def _default(rope: Rope, d: int, _: Array) -> Array:
    return jnp.asarray(_frequencies(rope.theta, d))


def _linear(rope: Rope, d: int, _: Array) -> Array:
    return jnp.asarray(_frequencies(rope.theta, d) / np.float32(rope.factor))


def _dynamic(rope: Rope, d: int, positions: Array) -> Array:
    """NTK-aware: past the trained length the base grows with the longest position of the call."""
    trained = rope.trained_length
    length = jnp.maximum(jnp.max(positions) + 1, trained).astype(jnp.float32)
    growth = rope.factor * length / trained - (rope.factor - 1)
    exponent = jnp.asarray(np.arange(0, d, 2, dtype=np.float32) / np.float32(d))
    return 1.0 / (rope.theta * growth ** (d / (d - 2))) ** exponent


def _llama3(rope: Rope, d: int, _: Array) -> Array:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    frequency = _frequencies(rope.theta, d)
    wavelength = np.float32(2 * np.pi) / frequency
    low, high, trained = rope.low_freq_factor, rope.high_freq_factor, rope.trained_length
    smooth = (np.float32(trained) / wavelength - np.float32(low)) / np.float32(high - low)
    scaled = frequency / np.float32(rope.factor)
    between = (1 - smooth) * scaled + smooth * frequency
    kept = np.where(wavelength < trained / high, frequency, between)
    return jnp.asarray(np.where(wavelength > trained / low, scaled, kept).astype(np.float32))


def _frequencies(theta: float, d: int) -> np.ndarray:
    exponent = np.arange(0, d, 2, dtype=np.float32) / np.float32(d)
    power = np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    return np.float32(1) / power


SCALINGS: dict[str, Callable[[Rope, int, Array], Array]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
}
"""What config files call rope_type -> the float32 frequencies, [d/2]."""
