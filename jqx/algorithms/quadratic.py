# SPDX-License-Identifier: Apache-2.0
"""What an error of a weight costs at the output, from second moments of the inputs alone.

    |X D^T|^2 = tr(D G D^T),   G = X^T X    (R with R^T R = G where tokens are fewer than channels)

So a candidate costs one product with G, however many tokens there were.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from jqx.errors import InputError

from .linear import InputStats

HIGHEST = lax.Precision.HIGHEST
PANELS, NARROWEST = 4, 128


def output_error(d: Float[Array, "n k"], stats: InputStats, algorithm: str) -> Float32[Array, ""]:
    """The squared error of all outputs if the weight is off by `d`."""
    d = d.astype(jnp.float32)
    if "root" in stats:
        return jnp.sum(jnp.square(jnp.matmul(d, stats["root"].T, precision=HIGHEST)))
    return _symmetric(d, gram(stats, algorithm))


def _symmetric(d: Float32[Array, "n k"], g: Float32[Array, "k k"]) -> Float32[Array, ""]:
    """tr(d g d^T) for a symmetric `g`, of which the panels above the diagonal count twice: with
    four of them 5/8 of the products of all.
    """
    k = d.shape[1]
    size = -(-k // PANELS) if k >= PANELS * NARROWEST else k
    total = jnp.float32(0)
    for start in range(0, k, size):
        end = min(start + size, k)
        own = jnp.matmul(d[:, start:end], g[start:end, start:end], precision=HIGHEST)
        if start:
            own = own + 2 * jnp.matmul(d[:, :start], g[:start, start:end], precision=HIGHEST)
        total = total + jnp.sum(own * d[:, start:end])
    return total


def gram(stats: InputStats, algorithm: str) -> Float32[Array, "k k"]:
    """The second moments of the inputs. Raises InputError if they were not collected."""
    if "gram" in stats:
        return stats["gram"]
    if "root" in stats:
        return jnp.matmul(stats["root"].T, stats["root"], precision=HIGHEST)
    raise _missing(stats, algorithm)


def block_gram(stats: InputStats, block: int, algorithm: str) -> Float32[Array, "blocks b b"]:
    """The second moments within every block of `block` channels.

    Raises InputError if neither they nor all second moments were collected.
    """
    if "block_gram" in stats:
        return _within(stats["block_gram"], block, algorithm)
    if "root" in stats:
        x = stats["root"].reshape(stats["root"].shape[0], -1, block)
        return jnp.einsum("mki,mkj->kij", x, x, precision=HIGHEST)
    if "gram" not in stats:
        raise _missing(stats, algorithm)
    return _within(stats["gram"][None], block, algorithm)


def squares(stats: InputStats, algorithm: str) -> Float32[Array, "k"]:
    """The sum of squares of every input channel."""
    if "square" in stats:
        return stats["square"]
    if "root" in stats:
        return jnp.sum(jnp.square(stats["root"]), axis=0)
    if "gram" in stats:
        return jnp.diagonal(stats["gram"])
    if "block_gram" in stats:
        return jnp.diagonal(stats["block_gram"], axis1=1, axis2=2).reshape(-1)
    raise _missing(stats, algorithm)


def scaled(stats: InputStats, p: Float32[Array, "k"]) -> InputStats:
    """The second moments of the inputs times `p`; maxima of channels and mean magnitudes too."""
    # of rounded inputs nothing is known once they are scaled before they are rounded
    out = {kind: value for kind, value in stats.items() if kind != "rounded_gram"}
    factors = {
        "gram": lambda g: g * p[:, None] * p[None, :],
        "root": lambda r: r * p[None, :],
        "square": lambda s: s * p * p,
        "channel_amax": lambda a: a * p,
        "channel_mean": lambda a: a * p,
    }
    for kind, times in factors.items():
        if kind in out:
            out[kind] = times(out[kind])
    if "block_gram" in out:
        q = p.reshape(out["block_gram"].shape[0], -1)
        out["block_gram"] = out["block_gram"] * q[:, :, None] * q[:, None, :]
    return out


def _within(moments: Float32[Array, "blocks b b"], block: int, algorithm: str) -> Array:
    """The diagonal blocks of this size of every matrix."""
    have = moments.shape[-1]
    if have % block:
        raise InputError(
            f"{algorithm} needs second moments of {block} channels together, and those collected "
            f"are of {have}: calibrate for this format"
        )
    count = have // block
    parts = moments.reshape(moments.shape[0], count, block, count, block)
    at = jnp.arange(count)
    return jnp.swapaxes(parts[:, at, :, at, :], 0, 1).reshape(-1, block, block)


def _missing(stats: InputStats, algorithm: str) -> InputError:
    have = ", ".join(sorted(stats)) or "none"
    return InputError(
        f"{algorithm} needs second moments of the inputs ('gram'), and the statistics are: {have}. "
        f"Calibrate for {algorithm}"
    )


def least(losses: Float[Array, "c ..."]) -> Int[Array, "..."]:
    """The first candidate of the smallest loss; one that is NaN or overflows is not taken."""
    return jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf), axis=0)
