# SPDX-License-Identifier: Apache-2.0
"""Functions to transform, each with the same function written by hand.

A case is what a user writes (`f`, which knows nothing of jqx) and `by_hand`: plain jax.numpy with
Python loops over layers and experts, which says at every product what goes in and what comes out.
What is to happen there is `At` and its subclasses; `zoo_checks` compares.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference

Member = tuple[int, ...]


class At:
    """What happens around the products of a function written by hand: nothing."""

    def input(
        self, path: str, x: Any, member: Member = (), channels: tuple[int, int] | None = None
    ) -> Any:
        """Before a product with the parameter at `path`, or with that member of its stack axes.

        `x` is [tokens, k], k in the order of the parameter's channels (of a convolution: features).
        Where `x` has not all of them: the number of its first channel, and of how many.
        """
        return x

    def output(self, path: str, y: Any, use: int = 0, index: Member = ()) -> Any:
        """After the `use`-th product that `f` has with the parameter at `path`.

        `y` has the values of f's own product in row-major order; it is only `[index]` of them where
        f scans (the iteration is in front) or multiplies with a stack at once.
        """
        return y

    def product(
        self, path: str, x: Any, w: Any, member: Member = (), use: int = 0, index: Member = ()
    ) -> Any:
        """x [tokens, k] times the matrix w [k, n]."""
        return self.output(path, self.input(path, x, member) @ w, use, index)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A function, its parameters and arguments, and the same function written by hand.

    `contracted` and `stack` are what `jqx.axes` should say of every matrix, by path; those in
    `looked_up` are in no product. `dynamic`: an input format with scales found in the activation;
    None where that is refused (a convolution, a part of the channels). `rtol`: of results.
    """

    f: Callable[..., Any]  # f(params, *args)
    params: Any  # float32
    args: tuple[Any, ...]
    by_hand: Callable[[Any, tuple[Any, ...], At], Any]  # by_hand(params, args, at)
    contracted: dict[str, tuple[int, ...]]
    stack: dict[str, tuple[int, ...]] = field(default_factory=dict)
    looked_up: tuple[str, ...] = ()
    dynamic: str | None = "fp8_token"
    differentiable: bool = True  # False: custom rules with a product inside, loops without an end
    probed: bool = True  # False: `by_hand` does not call `at.output`
    eager: bool = True  # False: `f` runs under jit only
    rtol: float = 1e-5


class Draws:
    """Arrays from a seeded generator. Another seed helps where a value is too close to a tie."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> jax.Array:
        """Activations: a normal distribution."""
        return jnp.asarray(self.rng.standard_normal(shape), jnp.float32)

    def weight(self, *shape: int, k: int = 16) -> jax.Array:
        """Weights with which `k` inputs keep about their magnitude."""
        return jnp.asarray(self.rng.standard_normal(shape) / np.sqrt(k), jnp.float32)

    def ids(self, end: int, *shape: int) -> jax.Array:
        """Numbers of rows."""
        return jnp.asarray(self.rng.integers(end, size=shape), jnp.int32)


class Recorded(At):
    """Keeps what goes into products."""

    def __init__(self) -> None:
        self.inputs: dict[tuple[str, Member], list[Any]] = {}

    def input(self, path, x, member=(), channels=None):
        assert x.ndim == 2, "tokens and channels"
        first, k = channels or (0, x.shape[1])
        whole = jnp.pad(x.astype(jnp.float32), ((0, 0), (first, k - first - x.shape[1])))
        self.inputs.setdefault((path, member), []).append(whole)
        return x


class Rounded(At):
    """Rounds what goes into products to `name`, with scales that cover `amax` ({path: one for every
    member}) where they are stored. The gradient is that of the identity.
    """

    def __init__(self, name: str, amax: dict[str, np.ndarray]) -> None:
        self.name, self.amax = name, amax

    def input(self, path, x, member=(), channels=None):
        bound = reference.INPUTS[self.name][2]
        scale = None
        if bound is not None:
            scale = np.float32(self.amax[path][member]) / np.float32(bound)
        return straight(lambda x: _far_from_ties(x, self.name, scale), x)


class Probed(At):
    """Adds something to what comes out of products."""

    def __init__(self, added: dict[str, tuple[Any, ...]]) -> None:
        self.added = added

    def output(self, path, y, use=0, index=()):
        return y + self.added[path][use][index].reshape(y.shape)


def straight(rounding: Callable[[np.ndarray], np.ndarray], x: jax.Array) -> jax.Array:
    """`rounding` in NumPy, with the gradient of the identity."""
    in_numpy = lambda x: rounding(np.asarray(x))  # noqa: E731
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    rounded = jax.custom_jvp(lambda x: jax.pure_callback(in_numpy, like, x))
    rounded.defjvp(lambda x, t: (rounded(*x), *t))
    return rounded(x)


NOISE = np.float32(2e-6)  # sums in another order, another XLA or machine differ by less


def _far_from_ties(x: np.ndarray, name: str, scale: np.float32 | None) -> np.ndarray:
    """`x` rounded by definition; an AssertionError where noise would lead to another code."""
    y = reference.activation(x, name, scale)
    if x.dtype == np.float32:
        for sign in np.random.default_rng(0).choice(np.float32([-1, 1]), (2, *x.shape)):
            other = reference.activation(x * (1 + NOISE * sign), name, scale)
            assert np.allclose(y, other, rtol=1e-4, atol=0), "close to a tie: take another seed"
    return y
