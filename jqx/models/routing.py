# SPDX-License-Identifier: Apache-2.0
"""Routers: which experts a token goes to, and with what weights, from a logit for every expert.

softmax          the largest probabilities
softmax_chosen   the largest logits, and the softmax of those
sigmoid          the largest logits, and the sigmoids of those
corrected        the largest sigmoids, with a correction that counts for the choice alone
sparsemixer      two, one after the other: probabilities among those that are near the largest

A token chooses groups of experts first where there are any: by the largest score in each, for
"corrected" by the sum of the two largest.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .compute import Compute
from .layers import settle, wide
from .spec import Experts

Chosen = tuple[Int[Array, "t k"], Float[Array, "t k"]]
"""The numbers of experts, and their weights."""


def route(
    row: Experts,
    logits: Float[Array, "t e"],
    compute: Compute,
    correction: Float[Array, "e"] | None = None,
) -> Chosen:
    """The experts of every token and their weights, float32 numbers of the compute dtype unless the
    router is exact. `correction`: what "corrected" adds.
    """
    router = row.router
    ids, weights = ROUTERS[router.kind](row, wide(logits), correction)
    if router.power is not None:
        total = jnp.sum(jnp.abs(weights) ** router.power, axis=-1, keepdims=True)
        weights = weights / (total ** (1 / router.power) + _TINY)
    if router.scale != 1.0:
        weights = weights * router.scale
    return ids.astype(jnp.int32), weights if router.exact else wide(settle(weights, compute))


_TINY = 1e-20  # what published code adds to the sum


def _softmax(row: Experts, logits: Array, _: Array | None) -> Chosen:
    scores = jax.nn.softmax(logits, axis=-1)
    weights, ids = lax.top_k(_in_groups(row, scores, 1, 0.0), row.top_k)
    return ids, weights


def _of_chosen(
    among: Callable[[Array], Array], row: Experts, logits: Array, _: Array | None
) -> Chosen:
    most, ids = lax.top_k(_in_groups(row, logits, 1, -jnp.inf), row.top_k)
    return ids, among(most)


def _corrected(row: Experts, logits: Array, correction: Array | None) -> Chosen:
    scores = jax.nn.sigmoid(logits)
    assert correction is not None
    corrected = scores + wide(correction)[None, :]
    _, ids = lax.top_k(_in_groups(row, corrected, 2, -jnp.inf), row.top_k)
    return ids, jnp.take_along_axis(scores, ids, axis=-1)


def _in_groups(row: Experts, scores: Float[Array, "t e"], best: int, out: float) -> Array:
    """Scores of the experts in the best groups, by the sum of their `best` largest; `out` where an
    expert is in none of them.
    """
    router = row.router
    if router.groups == 1:
        return scores
    grouped = scores.reshape(len(scores), router.groups, -1)
    of_groups = jnp.sum(lax.top_k(grouped, min(best, grouped.shape[-1]))[0], axis=-1)
    _, chosen = lax.top_k(of_groups, router.top_groups)
    inside = jnp.any(jax.nn.one_hot(chosen, router.groups, dtype=jnp.bool), axis=1)
    return jnp.where(inside[:, :, None], grouped, out).reshape(scores.shape)


def _sparsemixer(row: Experts, logits: Array, _: Array | None) -> Chosen:
    """Experts far below the largest of those left count for nothing (Liu et al. 2023, arXiv
    2310.00811, at evaluation).
    """
    left, ids, weights = logits, [], []
    for _n in range(row.top_k):
        most = jnp.max(left, axis=-1, keepdims=True)
        best = jnp.argmax(left, axis=-1, keepdims=True)
        far = (most - logits) / jnp.maximum(jnp.abs(logits), most) > 2 * row.router.threshold
        probabilities = jax.nn.softmax(jnp.where(far, -jnp.inf, left), axis=-1)
        weights.append(jnp.take_along_axis(probabilities, best, axis=-1))
        ids.append(best)
        left = jnp.where(jax.nn.one_hot(best[:, 0], row.number, dtype=jnp.bool), -jnp.inf, left)
    return jnp.concatenate(ids, axis=-1), jnp.concatenate(weights, axis=-1)


ROUTERS: dict[str, Callable[[Experts, Array, Array | None], Chosen]] = {
    "softmax": _softmax,
    "softmax_chosen": partial(_of_chosen, partial(jax.nn.softmax, axis=-1)),
    "sigmoid": partial(_of_chosen, jax.nn.sigmoid),
    "corrected": _corrected,
    "sparsemixer": _sparsemixer,
}
"""Router.kind -> function of the row, float32 logits and a correction."""
