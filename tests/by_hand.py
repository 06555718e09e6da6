# SPDX-License-Identifier: Apache-2.0
"""Layers that several libraries have, in plain jnp, that tell `zoo.At` what they multiply."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from zoo import At, Draws

from jqx.tensors.paths import leaf_names


def drawn(params: Any) -> Any:
    """The same tree with drawn numbers in place of floats, of which the shapes are enough: no bias
    is zero, and no gain is one.
    """
    draw = Draws(1)

    def number(x: Any) -> Any:
        floats = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        return draw(*x.shape) / 4 if floats else x

    return jax.tree.map(number, params)


def by_path(params: Any) -> dict[str, Any]:
    return dict(zip(leaf_names(params), jax.tree.leaves(params), strict=True))


def along_last(x: jax.Array, like: jax.Array) -> jax.Array:
    """A vector with as many axes as `like`, the last of which is its own."""
    return x.reshape((1,) * (like.ndim - 1) + (-1,))


@dataclass(frozen=True)
class Layers:
    """The layers whose leaves are `p`, by path; of a stack those of one member.

    `use` and `index` are what `At.output` needs; in a loop over `member` the index is that.
    """

    at: At
    p: Mapping[str, Any]
    member: tuple[int, ...] = ()
    use: int = 0
    index: tuple[Any, ...] = ()

    def of(self, prefix: str, i: int, axis: int = 0) -> "Layers":
        """Member `i`, along `axis`, of the stacks of layers whose paths begin with `prefix`."""
        own = {k: v for k, v in self.p.items() if k.startswith(prefix) and hasattr(v, "ndim")}
        chosen = {k: jnp.take(v, i, axis=axis) for k, v in own.items() if v.ndim}
        return replace(self, p={**self.p, **chosen}, member=(i,), index=(i,))

    def product(self, path: str, x: jax.Array, w: jax.Array, turned: bool = False) -> jax.Array:
        """`x` [..., k] times `w` [k, n], the parameter at `path` as a matrix; `turned`: the
        function computes [n, ...].
        """
        y = self.at.input(path, x.reshape(-1, x.shape[-1]), self.member) @ w
        y = y.T if turned else y
        y = self.at.output(path, y, self.use, self.index)
        return (y.T if turned else y).reshape(*x.shape[:-1], w.shape[-1])

    def dense(self, path: str, x: jax.Array, summed: int = 1) -> jax.Array:
        """Flax: a kernel [*in, *out] whose first `summed` axes meet the last ones of `x`."""
        w = self.p[f"{path}.kernel"]
        lead, k = x.shape[: x.ndim - summed], prod(w.shape[:summed])
        y = self.product(f"{path}.kernel", x.reshape(*lead, k), w.reshape(k, -1))
        if f"{path}.bias" in self.p:
            y = y + along_last(self.p[f"{path}.bias"].reshape(-1), y)
        return y.reshape(*lead, *w.shape[summed:])

    def linear(self, path: str, x: jax.Array) -> jax.Array:
        """Equinox: a weight [out, in] times the vector of each token."""
        y = self.product(f"{path}.weight", x, self.p[f"{path}.weight"].T, turned=True)
        bias = self.p.get(f"{path}.bias")
        return y if bias is None else y + along_last(bias, y)

    def layer_norm(
        self, path: str, x: jax.Array, gain: str = "scale", eps: float = 1e-6
    ) -> jax.Array:
        y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + eps)
        return y * along_last(self.p[f"{path}.{gain}"], x) + along_last(self.p[f"{path}.bias"], x)

    def rms_norm(self, path: str, x: jax.Array) -> jax.Array:
        y = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        return y * along_last(self.p[f"{path}.scale"], x)

    def attention(self, path: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """Flax: the attention of `x` to `y`, both [b, t, d]."""
        q = self.dense(f"{path}query", x)
        k, v = self.dense(f"{path}key", y), self.dense(f"{path}value", y)
        return self.dense(f"{path}out", attended(q, k, v), summed=2)


def attended(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """Values [b, s, h, c] by the softmax of products of queries [b, t, h, c] and keys."""
    scores = jnp.einsum("bthc,bshc->bhts", q, k) / q.shape[-1] ** 0.5
    if causal:
        past = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(past[None, None], scores, -1e9)
    return jnp.einsum("bhts,bshc->bthc", jax.nn.softmax(scores), v)
