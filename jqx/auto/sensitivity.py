# SPDX-License-Identifier: Apache-2.0
"""How much a function loses when one group of its parameters, and no other, is stored.

    gradient   sum over outputs of (dL/dy * D)^2, D the change of a linear's outputs
    fisher     (sum over outputs of dL'/dy * D)^2 / 2, L' = sum over predictions of s sqrt(p) log p
               with sqrt(p) held fixed and signs s drawn: the mean is KL(p || p') up to third order
    kl         sum over predictions of KL(p || p')

(ModelOpt 0.47, auto_quantize, has the first and the last.)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from jqx.errors import InputError, nearest
from jqx.tensors import QTensor

from .products import Stored, outputs_of, switched
from .taps import tapped

Groups = Sequence[tuple[str, ...]]
Scores = dict[str, dict[str, float]]
"""Group, by its first member -> candidate -> score."""

LIMIT = 1e10
"""Products of a gradient and a change are cut off there, as ModelOpt has it."""
DRAWS = 4  # of signs for every batch
WINDOW, BINS = 16, 64
"""Rows, the tokens of a sequence, whose products are summed before they are squared: errors of
neighbours are alike; and sums that are kept apart. More in one sum are as right, and need more
draws."""


def squares(g: Array, change: Array) -> Float32[Array, ""]:
    """The sum of the squares of products, each cut off at LIMIT."""
    product = g.astype(jnp.float32) * change.astype(jnp.float32)
    return jnp.sum(jnp.square(jnp.clip(product, -LIMIT, LIMIT)))


def products(g: Array, change: Array) -> Float32[Array, "bins"]:
    """Sums of products over the outputs of WINDOW rows each, which fall into BINS in turn."""
    product = g.astype(jnp.float32) * change.astype(jnp.float32)
    rows = jnp.sum(product.reshape(-1, product.shape[-1]), axis=-1)
    padded = jnp.pad(rows, (0, -rows.size % (WINDOW * BINS)))
    return jnp.sum(padded.reshape(-1, BINS, WINDOW), axis=(0, 2))


def by_gradient(
    apply_fn: Callable[..., Any], loss_fn: Callable[..., Any], params: Any, stored: Stored
) -> Callable[..., tuple[Array, Any]]:
    """Batch -> the loss, and by path a score for each of what is `stored`."""

    def loss(params: Any, *batch: Any) -> Array:
        return loss_fn(apply_fn(params, *batch), *batch)

    @jax.jit
    def one(params: Any, stored: Stored, batch: tuple[Any, ...]) -> tuple[Array, Any]:
        run = tapped(loss, _outputs(stored), squares)
        value, back = jax.vjp(lambda taps: run(params, taps, *batch), _zeros(stored))
        return value, back(jnp.ones_like(value))[0]

    def checked(*batch: Any) -> tuple[Array, Any]:
        _check_scalar(jax.eval_shape(loss, params, *batch))
        value, found = one(params, stored, batch)
        if not bool(jnp.isfinite(value)):
            raise InputError(
                f"the loss is {float(value)}, and has no gradient: look at params, batches, loss_fn"
            )
        return value, found

    return checked


def by_fisher(
    apply_fn: Callable[..., Any], params: Any, stored: Stored
) -> Callable[..., tuple[None, Any]]:
    """(key, *batch) -> by path numbers for each of what is `stored`, which added up over a group
    and squared are a draw of twice its score.
    """

    def loss(params: Any, key: Array, *batch: Any) -> Array:
        log_p = jax.nn.log_softmax(apply_fn(params, *batch).astype(jnp.float32))
        signs = jax.random.rademacher(key, log_p.shape, jnp.float32)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(log_p / 2)) * signs * log_p)

    @jax.jit
    def one(params: Any, stored: Stored, batch: tuple[Any, ...]) -> Any:
        run = tapped(loss, _outputs(stored), products)
        value, back = jax.vjp(lambda taps: run(params, taps, *batch), _zeros(stored, BINS))
        return back(jnp.ones_like(value))[0]

    return lambda *batch: (None, one(params, stored, batch))


def _outputs(stored: Stored) -> dict[str, list[Any]]:
    return {path: [outputs_of(path, q) for q in qs] for path, qs in stored.items()}


def _zeros(stored: Stored, *shape: int) -> dict[str, list[Array]]:
    return {path: [jnp.zeros(shape, jnp.float32) for _ in qs] for path, qs in stored.items()}


def gradient_scores(
    apply_fn: Callable[..., Any],
    loss_fn: Callable[..., Any] | None,
    params: Any,
    batches: Sequence[tuple[Any, ...]],
    chosen: tuple[Groups, Mapping[str, Mapping[str, QTensor]]],
) -> tuple[Scores, float]:
    """The scores of "gradient" over all batches, and the mean loss of one. `chosen`: the groups,
    and by path what each candidate stores.
    """
    if loss_fn is None:
        raise InputError(
            "gradients are of a loss: give loss_fn(outputs, *batch), a scalar, or method='kl'"
        )
    groups, stored = chosen
    run = by_gradient(apply_fn, loss_fn, params, {p: [*row.values()] for p, row in stored.items()})
    sums, losses = _nothing(groups, stored), []
    for batch in batches:
        loss, found = run(*batch)
        losses.append(float(loss))
        for group in groups:
            for i, name in enumerate(stored[group[0]]):
                sums[group[0]][name] += sum(float(found[path][i]) for path in group)
    return sums, float(np.mean(losses))


def fisher_scores(
    apply_fn: Callable[..., Any],
    loss_fn: Callable[..., Any] | None,
    params: Any,
    batches: Sequence[tuple[Any, ...]],
    chosen: tuple[Groups, Mapping[str, Mapping[str, QTensor]]],
) -> tuple[Scores, None]:
    """The scores of "fisher" over all batches; outputs are logits, with the vocabulary last."""
    groups, stored = chosen
    run = by_fisher(apply_fn, params, {p: [*row.values()] for p, row in stored.items()})
    sums = _nothing(groups, stored)
    for number, batch in enumerate(batches):
        for draw in range(DRAWS):
            _, found = run(jax.random.fold_in(jax.random.key(draw), number), *batch)
            for group in groups:
                for i, name in enumerate(stored[group[0]]):
                    together = sum(np.asarray(found[path][i], np.float64) for path in group)
                    sums[group[0]][name] += float(np.sum(np.square(together))) / (2 * DRAWS)
    return sums, None


def kl_scores(
    apply_fn: Callable[..., Any],
    loss_fn: Callable[..., Any] | None,
    params: Any,
    batches: Sequence[tuple[Any, ...]],
    chosen: tuple[Groups, Mapping[str, Mapping[str, QTensor]]],
) -> tuple[Scores, None]:
    """The scores of "kl" over all batches; outputs are logits, with the vocabulary last."""
    groups, stored = chosen
    forms = {path: [*row.values()] for path, row in stored.items()}

    @jax.jit
    def predicted(params: Any, forms: Stored, switches: Any, batch: Any) -> Array:
        logits = switched(apply_fn, forms)(params, switches, *batch)
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    @jax.jit
    def divergence(mine: Array, other: Array) -> Array:
        return jnp.sum(jnp.exp(mine) * (mine - other))

    off = {path: jnp.int32(0) for path in forms}
    sums = _nothing(groups, stored)
    for batch in batches:
        run = partial(predicted, params, forms, batch=batch)
        mine = run(switches=off)
        for group in groups:
            for i, name in enumerate(stored[group[0]]):
                on = off | dict.fromkeys(group, jnp.int32(i + 1))
                sums[group[0]][name] += float(divergence(mine, run(switches=on)))
    return sums, None


METHODS = {"gradient": gradient_scores, "fisher": fisher_scores, "kl": kl_scores}
"""Method -> what scores by it."""

OTHER_NAMES = {"kl_div": "kl"}
"""ModelOpt's."""


def method_of(name: str) -> str:
    """The row of METHODS called `name` here or in ModelOpt. Raises InputError for another."""
    name = OTHER_NAMES.get(name, name)
    if name not in METHODS:
        raise nearest(name, METHODS, "method")
    return name


def _nothing(groups: Groups, stored: Mapping[str, Mapping[str, Any]]) -> Scores:
    return {group[0]: dict.fromkeys(stored[group[0]], 0.0) for group in groups}


def _check_scalar(shape: Any) -> None:
    if getattr(shape, "shape", None) != ():
        told = getattr(shape, "shape", type(shape).__name__)
        raise InputError(f"loss_fn gives {told}: give a scalar, such as the mean over all tokens")
