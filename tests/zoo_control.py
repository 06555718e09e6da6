# SPDX-License-Identifier: Apache-2.0
"""Branches, and functions within functions, around products: a case each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from zoo import Case, Draws

D, N, LAYERS = 32, 16, 2
X = (6, D)


def branches() -> Case:
    """One of three linears, of which two are the same; and another, or none."""
    draw = Draws()
    draw_all = {"a": draw.weight(D, D), "b": draw.weight(D, D), "c": draw.weight(D, D)}

    def f(p, x, which, on):
        ways = [lambda x: x @ p["a"], lambda x: x @ p["b"], lambda x: jnp.tanh(x) @ p["a"]]
        x = jnp.tanh(lax.switch(which, ways, x))
        return lax.cond(on, lambda x: x @ p["c"], lambda x: x, x)

    def by_hand(p, args, at):
        x, which, on = args
        way = [("a", 0), ("b", 0), ("a", 1)][int(which)]
        x = jnp.tanh(x) if way[1] else x
        x = jnp.tanh(at.product(way[0], x, p[way[0]], use=way[1]))
        return at.product("c", x, p["c"]) if on else x

    return Case(
        f=f,
        params=draw_all,
        args=(draw(*X), jnp.int32(2), jnp.bool(True)),
        by_hand=by_hand,
        contracted=dict.fromkeys("abc", (0,)),
    )


def one(f: Callable[[Any, Any], Any], **fields: Any) -> Case:
    """f(w, x) = tanh(x @ w), w a matrix [D, N]."""
    draw = Draws()
    return Case(
        f=lambda p, x: f(p["w"], x),
        params={"w": draw.weight(D, N)},
        args=(draw(*X),),
        by_hand=lambda p, args, at: jnp.tanh(at.product("w", *args, p["w"])),
        contracted={"w": (0,)},
        **fields,
    )


def linear(w, x):
    return jnp.tanh(x @ w)


def with_custom_jvp(f):
    wrapped = jax.custom_jvp(f)
    wrapped.defjvp(lambda xs, ts: jax.jvp(f, xs, ts))
    return wrapped


def with_custom_vjp(f):
    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(lambda *xs: jax.vjp(f, *xs), lambda back, g: back(g))
    return wrapped


@jax.custom_jvp
def steep(x):
    """tanh, with twice its gradient."""
    return jnp.tanh(x)


steep.defjvp(lambda x, t: jax.jvp(lambda x: 2 * jnp.tanh(x) - lax.stop_gradient(jnp.tanh(x)), x, t))


@jax.custom_vjp
def through(x):
    """tanh, with the gradient of the identity."""
    return jnp.tanh(x)


through.defvjp(lambda x: (jnp.tanh(x), None), lambda _, g: (g,))


def around_activations() -> Case:
    """Functions with a gradient of their own between products: it is kept."""
    draw = Draws()

    def f(p, x):
        return through(steep(x @ p["a"]) @ p["b"]) @ p["c"]

    def by_hand(p, args, at):
        x = through(at.product("b", steep(at.product("a", *args, p["a"])), p["b"]))
        return at.product("c", x, p["c"])

    return Case(
        f=f,
        params={"a": draw.weight(D, D), "b": draw.weight(D, D), "c": draw.weight(D, N)},
        args=(draw(*X),),
        by_hand=by_hand,
        contracted=dict.fromkeys("abc", (0,)),
    )


def derivative_of_layers() -> Case:
    """A derivative in the function itself, through rematerialized layers: JAX puts the scan in a
    call, and runs it again on the way back.
    """
    draw = Draws()

    def value(gate, p, xs):
        layer = lambda h, x: (h * gate + jnp.sin(x @ p["w"]), None)  # noqa: E731
        return jnp.sum(lax.scan(layer, jnp.ones_like(gate), xs)[0])

    def f(p, gate, xs):
        return jax.value_and_grad(jax.checkpoint(value))(gate, p, xs)

    def by_hand(p, args, at):
        gate, xs = args
        a, b, again, _ = (
            jnp.sin(at.product("w", xs[i], p["w"], use=use, index=(i,)))
            for use in (0, 1)
            for i in (0, 1)
        )
        return jnp.sum(gate * gate + a * gate + b), 2 * gate + again

    return Case(
        f=f,
        params={"w": draw.weight(D, N)},
        args=(draw(6, N), draw(2, *X)),
        by_hand=by_hand,
        contracted={"w": (0,)},
    )


def with_custom_vmap(w, x):
    f = custom_vmap(lambda x: linear(w, x))
    f.def_vmap(lambda size, batched, x: (linear(w, x), True))
    return f(x)


def examples() -> Case:
    """One example at a time, with a scan over layers in each."""
    draw = Draws()

    def f(p, xs):
        return jax.vmap(
            lambda x: lax.scan(lambda h, w: (linear(w, h), None), jnp.tanh(x @ p["in"]), p["w"])[0]
        )(xs)

    def by_hand(p, args, at):
        x = jnp.tanh(at.product("in", args[0].reshape(6, D), p["in"]))
        for i in range(LAYERS):
            x = jnp.tanh(at.product("w", x, p["w"][i], (i,), index=(i,)))
        return x.reshape(2, 3, D)

    return Case(
        f=f,
        params={"in": draw.weight(D, D), "w": draw.weight(LAYERS, D, D)},
        args=(draw(2, 3, D),),
        by_hand=by_hand,
        contracted={"in": (0,), "w": (1,)},
        stack={"w": (0,)},
    )


def experts() -> Case:
    """Experts at a time: each with tokens of its own, and all with the same ones."""
    draw = Draws()

    def f(p, x):
        routed = jax.vmap(lambda x, w: x @ w)(x, p["routed"])
        return routed + jax.vmap(lambda w: x[0] @ w)(p["shared"])

    def by_hand(p, args, at):
        x = args[0]
        routed = [at.product("routed", x[e], p["routed"][e], (e,), index=(e,)) for e in range(3)]
        # what all share is one matrix with the rows of all
        joined = at.input("shared", x[0]) @ jnp.moveaxis(p["shared"], 0, 1).reshape(D, 3 * N)
        shared = at.output("shared", joined.reshape(4, 3, N))
        return jnp.stack(routed) + jnp.moveaxis(shared, 1, 0)

    return Case(
        f=f,
        params={"routed": draw.weight(3, D, N), "shared": draw.weight(3, D, N)},
        args=(draw(3, 4, D),),
        by_hand=by_hand,
        contracted={"routed": (1,), "shared": (1,)},
        stack={"routed": (0,)},
    )


CASES: dict[str, Callable[[], Case]] = {
    "branches": branches,
    "nested jit": lambda: one(jax.jit(linear)),
    "nested jit that closes over": lambda: one(lambda w, x: jax.jit(lambda x: linear(w, x))(x)),
    "remat": lambda: one(jax.checkpoint(linear)),
    "a custom jvp": lambda: one(with_custom_jvp(linear), differentiable=False),
    "a custom vjp": lambda: one(with_custom_vjp(linear), differentiable=False),
    "own gradients of activations": around_activations,
    "layers in a derivative": derivative_of_layers,
    "a custom vmap": lambda: one(with_custom_vmap),
    "examples at a time": examples,
    "experts at a time": experts,
}
