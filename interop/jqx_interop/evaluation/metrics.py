# SPDX-License-Identifier: Apache-2.0
"""What a token's logits say, and means over tokens with their standard errors.

    nll  = -log p(token)                       perplexity = exp(mean nll)
    kl   = sum_v r(v) (log r(v) - log p(v))    r: the reference's probabilities; nats
    top1 = the reference's most likely token is the model's as well
    top5 = it is among the model's five most likely

Tokens of one window depend on each other, so windows are what is independent: with S_g the sum and
n_g the number of tokens in window g, m = sum S_g / sum n_g is a ratio of sums, whose variance is

    G / (G - 1) * sum_g (S_g - m n_g)^2 / (sum_g n_g)^2       (Cochran, Sampling Techniques, 6.4)

and that of exp(m) follows by the delta method.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from .windows import Windows

ALONE = ("nll",)
COMPARED = ("nll", "reference_nll", "kl", "top1", "top5")


class Estimate(NamedTuple):
    """A mean and its standard error, which one window alone has none of."""

    value: float
    se: float | None

    def exp(self) -> "Estimate":
        """exp of the mean; its error by the delta method."""
        value = math.exp(self.value) if self.value < 709 else math.inf
        return Estimate(value, None if self.se is None else value * self.se)


def alone(logits: Float[Array, "r v"], targets: Int[Array, " r"]) -> Float32[Array, "r 1"]:
    """The columns `ALONE` of every row, computed in float32."""
    return _nll(_log_softmax(logits), targets)[:, None]


def compared(
    logits: Float[Array, "r v"], reference: Float[Array, "r v"], targets: Int[Array, " r"]
) -> Float32[Array, "r 5"]:
    """The columns `COMPARED` of every row, computed in float32. Equal logits are equally likely:
    ties count as agreement.
    """
    p, r = _log_softmax(logits), _log_softmax(reference)
    kl = jnp.sum(jnp.exp(r) * (r - p), axis=-1)
    favourite = jnp.argmax(reference, axis=-1)
    above = jnp.sum(logits > _at(logits, favourite)[:, None], axis=-1)
    top1, top5 = (above < 1).astype(jnp.float32), (above < 5).astype(jnp.float32)
    return jnp.stack([_nll(p, targets), _nll(r, targets), kl, top1, top5], axis=-1)


def _log_softmax(logits: Float[Array, "r v"]) -> Float32[Array, "r v"]:
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def _nll(log_p: Float32[Array, "r v"], targets: Int[Array, " r"]) -> Float32[Array, " r"]:
    return -_at(log_p, targets)


def _at(x: Float[Array, "r v"], columns: Int[Array, " r"]) -> Float[Array, " r"]:
    return jnp.take_along_axis(x, columns[:, None], axis=-1)[:, 0]


class Sums:
    """Sums over the scored tokens of every window, in float64."""

    def __init__(self, windows: Windows, columns: tuple[str, ...]):
        """Nothing is added yet. `columns` names the values of a token."""
        self._counts = windows.scored.astype(np.float64)
        self.columns = columns
        self._sums = np.zeros((len(self._counts), len(columns)))

    def add(self, window: Int[np.ndarray, " r"], values: Float[np.ndarray, "r c"]) -> None:
        """Add the values of tokens that belong to the windows numbered `window`."""
        np.add.at(self._sums, window, values.astype(np.float64))

    def __getitem__(self, column: str) -> Float[np.ndarray, " n"]:
        """The sum over every window of one column."""
        return self._sums[:, self.columns.index(column)]

    def mean(self, sums: Float[np.ndarray, " n"]) -> Estimate:
        """The mean over all tokens of what sums to `sums` in every window, and its error."""
        total, windows = self._counts.sum(), len(self._counts)
        mean = float(sums.sum() / total)
        if windows < 2:
            return Estimate(mean, None)
        squares = np.square(sums - mean * self._counts).sum()
        return Estimate(mean, float(np.sqrt(windows / (windows - 1) * squares) / total))
