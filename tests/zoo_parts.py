# SPDX-License-Identifier: Apache-2.0
"""Products with a part of a parameter at a time: a case each."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import lax
from zoo import Case, Draws

D, N = 32, 16
X = (6, D)


def fused(cut: Callable[[Any], tuple[Any, Any, Any]]) -> Case:
    """Queries, keys and values in one matrix, whose rows are cut apart."""
    draw = Draws()

    def f(p, x):
        q, k, v = cut(p["qkv"])
        return jnp.tanh(x @ q.T) * (x @ k.T) + x @ v.T

    def by_hand(p, args, at):
        starts = (0, 8, 16)
        q, k, v = (
            at.product("qkv", *args, p["qkv"][start : start + 8].T, use=i)
            for i, start in enumerate(starts)
        )
        return jnp.tanh(q) * k + v

    params = {"qkv": draw.weight(24, D)}
    return Case(f=f, params=params, args=(draw(*X),), by_hand=by_hand, contracted={"qkv": (1,)})


def some_channels() -> Case:
    """Two parts of the channels are multiplied apart, with one and the same input scale."""
    draw = Draws()

    def f(p, x):
        return x[:, :8] @ p["w"][:8] + jnp.tanh(x)[:, 8:] @ lax.slice_in_dim(p["w"], 8, D)

    def by_hand(p, args, at):
        (x,) = args
        a = at.input("w", x[:, :8], channels=(0, D)) @ p["w"][:8]
        b = at.input("w", jnp.tanh(x)[:, 8:], channels=(8, D)) @ p["w"][8:]
        return at.output("w", a) + at.output("w", b, use=1)

    return Case(
        f=f,
        params={"w": draw.weight(D, N)},
        args=(draw(*X),),
        by_hand=by_hand,
        contracted={"w": (0,)},
        dynamic=None,
    )


def rows_in_chunks() -> Case:
    """A head so large that it is multiplied some rows at a time."""
    draw = Draws()

    def f(p, x):
        def chunk(i):
            return x @ lax.dynamic_slice_in_dim(p["head"], 8 * i, 8).T

        return lax.map(chunk, jnp.arange(3))

    def by_hand(p, args, at):
        rows = (p["head"][8 * i : 8 * i + 8] for i in range(3))
        return jnp.stack([at.product("head", *args, w.T, index=(i,)) for i, w in enumerate(rows)])

    params = {"head": draw.weight(24, D)}
    return Case(f=f, params=params, args=(draw(*X),), by_hand=by_hand, contracted={"head": (1,)})


def channels_in_chunks() -> Case:
    """The sum over channels is a scan."""
    draw = Draws()

    def f(p, x):
        def add(total, part):
            x, w = part
            return total + x @ w, None

        xs = jnp.moveaxis(x.reshape(6, 4, 8), 1, 0)
        return lax.scan(add, jnp.zeros((6, N)), (xs, p["w"].reshape(4, 8, N)))[0]

    def by_hand(p, args, at):
        total = jnp.zeros((6, N))
        for i in range(4):
            part = slice(8 * i, 8 * i + 8)
            x = at.input("w", args[0][:, part], channels=(8 * i, D))
            total = total + at.output("w", x @ p["w"][part], index=(i,))
        return total

    return Case(
        f=f,
        params={"w": draw.weight(D, N)},
        args=(draw(*X),),
        by_hand=by_hand,
        contracted={"w": (0,)},
        dynamic=None,
    )


def layers(pick: Callable[[Any, int], Any], axis: int = 0) -> Case:
    """A stack whose members are picked one by one."""
    draw = Draws()
    shape = [D, D]
    shape.insert(axis, 2)

    def f(p, x):
        for i in range(2):
            x = jnp.tanh(x @ pick(p["w"], i))
        return x

    def by_hand(p, args, at):
        (x,) = args
        for i in range(2):
            x = jnp.tanh(at.product("w", x, jnp.moveaxis(p["w"], axis, 0)[i], (i,), use=i))
        return x

    return Case(
        f=f,
        params={"w": draw.weight(*shape)},
        args=(draw(*X),),
        by_hand=by_hand,
        contracted={"w": (1 if axis == 0 else 0,)},
        stack={"w": (axis,)},
    )


def unstacked() -> Case:
    case = layers(lambda w, i: w[i])

    def f(p, x):
        for w in lax.unstack(p["w"]):
            x = jnp.tanh(x @ w)
        return x

    return replace(case, f=f)


def first_apart() -> Case:
    """The first layer of a stack, then a scan over the others."""
    case = layers(lambda w, i: w[i])

    def f(p, x):
        x = jnp.tanh(x @ p["w"][0])
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"][1:])[0]

    def by_hand(p, args, at):
        x = jnp.tanh(at.product("w", *args, p["w"][0], (0,)))
        return jnp.tanh(at.product("w", x, p["w"][1], (1,), use=1, index=(0,)))

    return replace(case, f=f, by_hand=by_hand)


def by_two_numbers() -> Case:
    """Experts of layers, by a number that is known and one that is not."""
    draw = Draws()

    def f(p, x, e):
        return jnp.tanh(x @ p["w"][1, e]) @ p["w"][e, 0]

    def by_hand(p, args, at):
        x, e = args[0], int(args[1])
        x = jnp.tanh(at.product("w", x, p["w"][1, e], (1, e)))
        return at.product("w", x, p["w"][e, 0], (e, 0), use=1)

    return Case(
        f=f,
        params={"w": draw.weight(3, 3, D, D)},
        args=(draw(*X), jnp.int32(2)),
        by_hand=by_hand,
        contracted={"w": (2,)},
        stack={"w": (0, 1)},
    )


CASES: dict[str, Callable[[], Case]] = {
    "rows cut by slices": lambda: fused(lambda w: (w[:8], w[8:16], w[16:])),
    "rows split": lambda: fused(lambda w: jnp.split(w, 3)),
    "rows taken at a traced place": lambda: fused(
        lambda w: tuple(
            lax.dynamic_slice(w, (i, jnp.int32(0)), (8, D)) for i in jnp.arange(0, 24, 8)
        )
    ),
    "rows in chunks": rows_in_chunks,
    "channels in chunks": channels_in_chunks,
    "some channels": some_channels,
    "layers by number": lambda: layers(lambda w, i: w[i]),
    "layers along the middle axis": lambda: layers(lambda w, i: w[:, i], axis=1),
    "layers by a traced number": lambda: layers(lambda w, i: w[jnp.int32(i)]),
    "layers taken": lambda: layers(lambda w, i: jnp.take(w, jnp.int32(i), axis=0)),
    "layers unstacked": unstacked,
    "the first layer apart": first_apart,
    "layers and experts by number": by_two_numbers,
}
