# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: a pair of channels of a head turns by the angle position * frequency_i.

frequency_i = theta^(-2i/d), i < d/2, changed by the scaling; angles, cosines and sines are float32.
Where a scaling looks at the length of the text, a key that is kept from earlier calls is turned as
the text was then.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from .compute import Compute
from .layers import settle, wide
from .spec import Rope

_ROWS = 256  # positions per step of the loop in `turns`

Turns = tuple[Float[Array, "b 1 t half"], Float[Array, "b 1 t half"]]
"""Cosines and sines for every position, one head axis of length 1."""


def turns(rope: Rope, head_dim: int, positions: Int[Array, "b t"], compute: Compute) -> Turns:
    """Cosines and sines of every position's angles, as values of the compute dtype.

    The positions of the whole batch decide what a scaling does that looks at the length.
    """
    frequencies = SCALINGS[rope.scaling](rope, rope.dims or head_dim, positions)
    magnitude = _magnitude(rope, positions)

    def at(position: Int[Array, ""]) -> tuple[Array, Array]:
        angles = position.astype(jnp.float32) * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if magnitude is not None:
            cos, sin = cos * magnitude, sin * magnitude
        return settle(cos, compute), settle(sin, compute)

    # In a loop, or XLA:CPU fuses the cosines into the rotation and computes them for every head.
    rows = _ROWS if compute.attention == "chunks" else positions.size
    turned = lax.map(at, positions.reshape(-1), batch_size=rows)
    cos, sin = (a.reshape(positions.shape[0], 1, positions.shape[1], -1) for a in turned)
    return cos, sin


def _magnitude(rope: Rope, positions: Array) -> float | Array | None:
    if rope.long_magnitude is not None:
        return jnp.where(_is_long(rope, positions), rope.long_magnitude, rope.magnitude)
    return None if rope.magnitude == 1.0 else rope.magnitude


def _is_long(rope: Rope, positions: Array) -> Array:
    """Whether the longest text is longer than what the frequencies were trained for."""
    return jnp.max(positions) + 1 > rope.trained_length


def rotate(
    rope: Rope, x: Float[Array, "b h t d"], by: Turns, compute: Compute
) -> Float[Array, "b h t d"]:
    """Turn every head of `x` by its position's angles; products and sums are rounded one by one."""
    dims = rope.dims or x.shape[-1]
    apart, together = PAIRS[rope.pairs]
    first, second = apart(wide(x[..., :dims]))
    cos, sin = wide(by[0]), wide(by[1])

    def product(a: Array, b: Array) -> Array:
        return wide(settle(a * b, compute))

    lower = product(first, cos) - product(second, sin)
    upper = product(second, cos) + product(first, sin)
    turned = settle(together(lower, upper), compute)
    return turned if dims == x.shape[-1] else jnp.concatenate([turned, x[..., dims:]], axis=-1)


def _halves(x: Array) -> tuple[Array, Array]:
    first, second = jnp.split(x, 2, axis=-1)
    return first, second


def _neighbours(x: Array) -> tuple[Array, Array]:
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return pairs[..., 0], pairs[..., 1]


PAIRS: dict[str, tuple[Callable[[Array], tuple[Array, Array]], Callable[[Array, Array], Array]]] = {
    "halves": (_halves, lambda a, b: jnp.concatenate([a, b], axis=-1)),
    "neighbours": (
        _neighbours,
        lambda a, b: jnp.stack([a, b], axis=-1).reshape(*a.shape[:-1], -1),
    ),
}
"""Which channels turn together, i and i + d/2 or 2i and 2i + 1: taken apart, and put together."""


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
    width = np.float32(high - low) if high != low else np.float32(1)  # then none is between
    smooth = (np.float32(trained) / wavelength - np.float32(low)) / width
    scaled = frequency / np.float32(rope.factor)
    between = (1 - smooth) * scaled + smooth * frequency
    kept = np.where(wavelength < trained / high, frequency, between)
    return jnp.asarray(np.where(wavelength > trained / low, scaled, kept).astype(np.float32))


def _yarn(rope: Rope, d: int, _: Array) -> Array:
    """Frequencies that turn often in the trained length are kept, those that turn seldom are
    divided by the factor, with a ramp between (Peng et al. 2023, arXiv 2309.00071).
    """

    def dimension(rotations: float) -> float:
        turn = math.log(rope.trained_length / (rotations * 2 * math.pi))
        return d * turn / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    width = np.float32(high - low) if high != low else np.float32(0.001)
    ramp = np.clip((np.arange(d // 2, dtype=np.float32) - np.float32(low)) / width, 0, 1)
    frequency = _frequencies(rope.theta, d)
    scaled = np.float32(1) / (np.float32(rope.factor) / frequency)
    return jnp.asarray((scaled * ramp + frequency * (1 - ramp)).astype(np.float32))


def _longrope(rope: Rope, d: int, positions: Array) -> Array:
    """Every frequency has a divisor of its own, and another one past the trained length."""
    frequency = _frequencies(rope.theta, d)
    divisors = (np.array(f, np.float32) for f in (rope.short_factor, rope.long_factor))
    short, long = (frequency / f for f in divisors)
    return jnp.where(_is_long(rope, positions), jnp.asarray(long), jnp.asarray(short))


def _doubling(rope: Rope, d: int, positions: Array) -> Array:
    """NTK-aware in steps: whenever the text has doubled past the trained length the base grows."""
    length = (jnp.max(positions) + 1).astype(jnp.float32)
    steps = jnp.ceil(jnp.log2(length / rope.trained_length) + 1)
    growth = jnp.maximum(2.0**steps - 1, 1.0)
    exponent = jnp.asarray(np.arange(0, d, 2, dtype=np.float32) / np.float32(d))
    return 1.0 / (rope.theta * growth ** (d / (d - 2))) ** exponent


def _frequencies(theta: float, d: int) -> np.ndarray:
    exponent = np.arange(0, d, 2, dtype=np.float32) / np.float32(d)
    power = np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    return np.float32(1) / power


SCALINGS: dict[str, Callable[[Rope, int, Array], Array]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "doubling": _doubling,
}
"""What config files call rope_type, or "doubling", which they do not -> the float32 frequencies,
[d/2].
"""
