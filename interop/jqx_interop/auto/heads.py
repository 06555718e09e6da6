# SPDX-License-Identifier: Apache-2.0
"""The programs of what comes after the last block: losses of some tokens, divergences from the
model, and their gradients to the states.

The loss of "gradient" is the cross entropy of the text's next tokens, the mean of a batch (ModelOpt
0.47, auto_quantize). That of "fisher" is, with signs s drawn for every word v of the vocabulary at
every place,

    L = sum of s_v sqrt(p_v) log p_v, sqrt(p_v) held fixed      E[(sum of g * D)^2] = D^T F D

with the Fisher matrix F of the outputs, and D^T F D / 2 is the KL divergence that D causes, up to
third order (Amari 1998, Natural gradient works efficiently in learning). Words drawn by their
probability have the same expectation, and more variance.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jqx.models import head

from .scoring import Program


@partial(jax.jit, static_argnames=("program",))
def head_gradient(
    params: Any,
    h: Float[Array, "c k"],
    targets: Int[Array, "c"],
    share: Float32[Array, "c"],
    *,
    program: Program,
) -> tuple[Float[Array, "c k"], Float32[Array, ""]]:
    """The gradient of the loss to the states `h` after the last block, and the loss: the sum of the
    cross entropies of `targets`, each times its `share`.
    """

    def loss(h: Array) -> Array:
        return _entropy(_log_p(program, params, h), targets, share)

    value, gradient = jax.value_and_grad(loss)(h)
    return gradient, value


def _log_p(program: Program, params: Any, h: Array) -> Float[Array, "c v"]:
    return jax.nn.log_softmax(head(program.spec, params, h[None], program.compute)[0])


def _entropy(log_p: Array, targets: Array, share: Array) -> Float32[Array, ""]:
    """The sum of the cross entropies of `targets`, each times its share."""
    each = -jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.where(share > 0, each, 0) * share)


def signs(key: Array, shape: tuple[int, ...]) -> Float32[Array, "..."]:
    """Draws of 1 and -1."""
    return jax.random.rademacher(key, shape, jnp.float32)


@partial(jax.jit, static_argnames=("program",))
def head_draw(
    params: Any,
    h: Float[Array, "c k"],
    given: tuple[Int[Array, "c"], Float32[Array, "c"], Array],
    *,
    program: Program,
) -> tuple[Float[Array, "c k"], Float32[Array, ""]]:
    """A draw of the gradient of "fisher" to the states `h` after the last block, 0 where their
    share is, and the loss of `head_gradient`. `given`: its targets and shares, and a key.
    """
    targets, share, key = given

    def loss(h: Array) -> tuple[Array, Array]:
        log_p = _log_p(program, params, h)
        fixed = jax.lax.stop_gradient(jnp.exp(log_p / 2)) * signs(key, log_p.shape)
        drawn = jnp.sum(jnp.where(share > 0, jnp.sum(fixed * log_p, axis=-1), 0))
        return drawn, _entropy(log_p, targets, share)

    return jax.grad(loss, has_aux=True)(h)


@partial(jax.jit, static_argnames=("program",))
def head_divergence(
    params: Any,
    h: Float[Array, "c k"],
    changed: Float[Array, "s c k"],
    share: Float32[Array, "c"],
    *,
    program: Program,
) -> Float32[Array, "s"]:
    """The sum of KL(p || p') over tokens, each times its `share`: p is predicted by the states `h`
    after the last block, p' by each of `changed`.
    """
    log_mine = _log_p(program, params, h)

    def divergence(other: Array) -> Array:
        return _divergence(log_mine, _log_p(program, params, other), share)

    return jax.lax.map(divergence, changed)


@partial(jax.jit, static_argnames=("program",))
def divergence_gradient(
    params: Any,
    h: Float[Array, "c k"],
    changed: Float[Array, "c k"],
    share: Float32[Array, "c"],
    *,
    program: Program,
) -> tuple[Float[Array, "c k"], Float32[Array, ""]]:
    """The gradient to `changed` of what `head_divergence` finds of it, and that."""
    log_mine = _log_p(program, params, h)

    def divergence(changed: Array) -> Array:
        return _divergence(log_mine, _log_p(program, params, changed), share)

    value, gradient = jax.value_and_grad(divergence)(changed)
    return gradient, value


def _divergence(log_mine: Array, log_other: Array, share: Array) -> Float32[Array, ""]:
    """The sum of KL(p || p') over tokens, each times its share."""
    each = jnp.sum(jnp.exp(log_mine) * (log_mine - log_other), axis=-1)
    return jnp.sum(jnp.where(share > 0, each, 0) * share)
