# SPDX-License-Identifier: Apache-2.0
"""The next token of every sequence from its logits: the likeliest, or one that is drawn.

    p = softmax(logits / temperature), of the top_k largest, of those the fewest that reach top_p

Tokens as likely as the last one that is kept are kept too, so the order of the vocabulary does not
matter. A set is found by its smallest member, bit by bit, which costs a sum over the vocabulary
for every bit and needs no sorting.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jqx_kernels.bits import from_bits

COLDEST = 1e-6
"""The lowest temperature that is told from lower ones: only equally likely tokens are drawn."""

_BITS = 31  # of a float32 that is not negative: ordered as the numbers are


class Draw(NamedTuple):
    """How tokens are drawn. Fields are numbers or arrays []; None leaves a step out, and without a
    temperature the likeliest token is taken.
    """

    temperature: Float[Array, ""] | float | None = None
    top_k: Int[Array, ""] | int | None = None
    top_p: Float[Array, ""] | float | None = None


def next_tokens(
    logits: Float[Array, "b v"], keys: Key[Array, "b"] | None, draw: Draw
) -> Int[Array, "b"]:
    """The next token of every sequence; the lowest of equally likely ones where none is drawn.

    `keys`: one for each sequence, used up; None where `draw` has no temperature.
    """
    if draw.temperature is None or keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    kept = filtered(logits.astype(jnp.float32), draw)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def filtered(logits: Float[Array, "b v"], draw: Draw) -> Float[Array, "b v"]:
    """Logits whose softmax is what is drawn from: -inf for tokens that are left out."""
    assert draw.temperature is not None
    # the largest is taken off first, or small temperatures make it infinite
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / jnp.maximum(jnp.asarray(draw.temperature, jnp.float32), COLDEST)
    p = jnp.exp(logits)
    if draw.top_k is not None:
        enough = jnp.minimum(jnp.asarray(draw.top_k, jnp.float32), logits.shape[-1])
        p = _largest(p, jnp.ones_like(p), jnp.full(p.shape[:1], enough))
    if draw.top_p is not None:
        p = _largest(p, p, jnp.asarray(draw.top_p, jnp.float32) * jnp.sum(p, axis=-1))
    return jnp.where(p > 0, logits, -jnp.inf)


def _largest(
    p: Float[Array, "b v"], mass: Float[Array, "b v"], enough: Float[Array, "b"]
) -> Float[Array, "b v"]:
    """`p` with zeros but for its largest values, the fewest whose masses add up to `enough`."""

    def longer(i: Array, least: Array) -> Array:
        tried = least | (1 << (_BITS - 1 - i))
        reached = jnp.sum(jnp.where(p >= from_bits(tried)[:, None], mass, 0.0), axis=-1)
        return jnp.where(reached >= enough, tried, least)

    least = lax.fori_loop(0, _BITS, longer, jnp.zeros(p.shape[:1], jnp.int32))
    return jnp.where(p >= from_bits(least)[:, None], p, 0.0)


def sequence_keys(seed: int, of: Sequence[int]) -> Key[Array, "b"]:
    """A key for every sequence, from the seed and a number of its own."""
    key = jax.random.key(seed)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(of, jnp.uint32))


def step_keys(keys: Key[Array, "b"], step: Int[Array, ""] | int) -> Key[Array, "b"]:
    """The keys of the token number `step` of every sequence."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)
