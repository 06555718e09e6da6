# SPDX-License-Identifier: Apache-2.0
"""Loops over layers, and loops with one matrix: a case each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from zoo import Case, Draws

D, N, LAYERS = 32, 16, 2
X = (6, D)


def scanned(f: Callable[..., Any], *extra: Any, order: Any = range(LAYERS), **fields: Any) -> Case:
    """f(w, x, *extra): layers of a stack [layers, D, D] in a loop, in this order."""
    draw = Draws()

    def by_hand(p, args, at):
        x = args[0]
        for i in order:
            x = jnp.tanh(at.product("w", x, p["w"][i], (i,), index=(i,)))
        return x

    return Case(
        f=lambda p, *args: f(p["w"], *args),
        params={"w": draw.weight(LAYERS, D, D)},
        args=(draw(*X), *extra),
        by_hand=by_hand,
        contracted={"w": (1,)},
        stack={"w": (0,)},
        **fields,
    )


def layer(h, w):
    return jnp.tanh(h @ w), None


def by_number(w, x):
    return lax.fori_loop(0, LAYERS, lambda i, h: jnp.tanh(h @ w[i]), x)


def between(w, x, first, end):
    return lax.fori_loop(first, end, lambda i, h: jnp.tanh(h @ w[i]), x)


def carried(w, x):
    def body(carry, i):
        h, w = carry
        return (jnp.tanh(h @ w[i]), w), None

    return lax.scan(body, (x, w), jnp.arange(LAYERS))[0][0]


def along_the_middle() -> Case:
    """The layers lie along axis 1, and are moved to the front for the scan."""
    draw = Draws()

    def f(p, x):
        return lax.scan(layer, x, jnp.moveaxis(p["w"], 1, 0))[0]

    def by_hand(p, args, at):
        (x,) = args
        for i in range(LAYERS):
            x = jnp.tanh(at.product("w", x, p["w"][:, i], (i,), index=(i,)))
        return x

    return Case(
        f=f,
        params={"w": draw.weight(D, LAYERS, D)},
        args=(draw(*X),),
        by_hand=by_hand,
        contracted={"w": (0,)},
        stack={"w": (1,)},
    )


def in_groups() -> Case:
    """Two groups of two layers, and a projection that all share."""
    draw = Draws()

    def f(p, x):
        def inner(h, w):
            return jnp.tanh(h @ w) @ p["shared"], None

        def outer(h, ws):
            return lax.scan(inner, h, ws)[0], None

        return lax.scan(outer, x, p["w"].reshape(2, 2, D, D))[0]

    def by_hand(p, args, at):
        (x,) = args
        for i in range(4):
            at_group = divmod(i, 2)
            x = jnp.tanh(at.product("w", x, p["w"][i], (i,), index=at_group))
            x = at.product("shared", x, p["shared"], index=at_group)
        return x

    return Case(
        f=f,
        params={"w": draw.weight(4, D, D), "shared": draw.weight(D, D)},
        args=(draw(*X),),
        by_hand=by_hand,
        contracted={"w": (1,), "shared": (0,)},
        stack={"w": (0,)},
        rtol=3e-5,  # eight products in a row
    )


def repeated(f: Callable[[Any, Any], Any], **fields: Any) -> Case:
    """f(w, x): one matrix [D, D], twice."""
    draw = Draws()

    def by_hand(p, args, at):
        x = args[0]
        for i in range(2):
            x = jnp.tanh(at.product("w", x, p["w"], index=(i,)))
        return x

    return Case(
        f=lambda p, x: f(p["w"], x),
        params={"w": draw.weight(D, D)},
        args=(draw(*X),),
        by_hand=by_hand,
        contracted={"w": (0,)},
        **fields,
    )


def counted(w, x):
    def body(state):
        i, h = state
        return i + 1, jnp.tanh(h @ w)

    return lax.while_loop(lambda state: state[0] < 2, body, (jnp.int32(0), x))[1]


def again_and_again(w, x):
    """Layers that are scanned, all of them twice."""
    return lax.fori_loop(0, jnp.int32(2), lambda _, h: lax.scan(layer, h, w)[0], x)


def in_a_recurrence(w, x):
    return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=2)[0]


def ensemble() -> Case:
    """Two models at a time, each with layers of its own that are scanned."""
    draw = Draws()

    def f(p, x):
        return jax.vmap(lambda w, x: lax.scan(layer, x, w)[0])(p["w"], x)

    def by_hand(p, args, at):
        outs = []
        for e, x in enumerate(args[0]):
            for i in range(LAYERS):
                x = jnp.tanh(at.product("w", x, p["w"][e, i], (e, i), index=(i, e)))
            outs.append(x)
        return jnp.stack(outs)

    return Case(
        f=f,
        params={"w": draw.weight(2, LAYERS, D, D)},
        args=(draw(2, 4, D),),
        by_hand=by_hand,
        contracted={"w": (2,)},
        stack={"w": (0, 1)},
    )


def of_two_kinds() -> Case:
    """Every second layer takes another branch, with other rows of its matrix."""
    draw = Draws()

    def f(p, x):
        def body(h, inputs):
            w, odd = inputs
            ways = [lambda h, w: h @ w[:, :D], lambda h, w: -h @ w[:, D:]]
            return jnp.tanh(lax.switch(odd, ways, h, w)), None

        return lax.scan(body, x, (p["w"], jnp.arange(3) % 2))[0]

    def by_hand(p, args, at):
        (x,) = args
        for i in range(3):
            odd = i % 2
            x, rows = (-x, p["w"][i, :, D:]) if odd else (x, p["w"][i, :, :D])
            x = jnp.tanh(at.product("w", x, rows, (i,), use=odd, index=(i,)))
        return x

    return Case(
        f=f,
        params={"w": draw.weight(3, D, 2 * D)},
        args=(draw(*X),),
        by_hand=by_hand,
        contracted={"w": (1,)},
        stack={"w": (0,)},
    )


def side_by_side() -> Case:
    """Gate and up projections of every layer in one product, in slices of the batch."""
    draw = Draws()

    def f(p, x):
        def block(h, layer):
            both = h @ jnp.concatenate([layer["gate"], layer["up"]], axis=1)
            gate, up = jnp.split(both, 2, axis=1)
            return h + (jnp.tanh(gate) * up + layer["bias"]) @ layer["down"].T, None

        return lax.map(lambda x: lax.scan(block, x, p, unroll=2)[0], x)

    def by_hand(p, args, at):
        outs = []
        for j, x in enumerate(args[0]):
            for i in range(LAYERS):
                own, here = {name: w[i] for name, w in p.items()}, ((i,), 0, (j, i))
                gate = at.product("gate", x, own["gate"], *here)
                up = at.product("up", x, own["up"], *here)
                hidden = jnp.tanh(gate) * up + own["bias"]
                x = x + at.product("down", hidden, own["down"].T, *here)
            outs.append(x)
        return jnp.stack(outs)

    shapes = {"gate": (D, N), "up": (D, N), "down": (D, N), "bias": (1, N)}
    return Case(
        f=f,
        params={name: draw.weight(LAYERS, *shape) for name, shape in shapes.items()},
        args=(draw(2, 3, D),),
        by_hand=by_hand,
        contracted={"gate": (1,), "up": (1,), "down": (2,)},
        stack=dict.fromkeys(("gate", "up", "down"), (0,)),
    )


CASES: dict[str, Callable[[], Case]] = {
    "layers in a fori_loop": lambda: scanned(by_number),
    "layers in a fori_loop with traced bounds": lambda: scanned(
        between,
        jnp.int32(1),
        jnp.int32(LAYERS),
        order=(1,),
        differentiable=False,
        probed=False,
    ),
    "layers scanned": lambda: scanned(lambda w, x: lax.scan(layer, x, w)[0]),
    "layers scanned in a while loop": lambda: scanned(
        again_and_again, order=(0, 1, 0, 1), differentiable=False, probed=False, rtol=3e-5
    ),
    "layers scanned backwards": lambda: scanned(
        lambda w, x: lax.scan(layer, x, w, reverse=True)[0], order=(1, 0)
    ),
    "layers carried unchanged": lambda: scanned(carried),
    "layers rematerialized in a scan": lambda: scanned(
        lambda w, x: lax.scan(jax.checkpoint(layer), x, w)[0]
    ),
    "layers along the middle axis, scanned": along_the_middle,
    "layers scanned in groups": in_groups,
    "layers of an ensemble": ensemble,
    "layers of two kinds": of_two_kinds,
    "layers with matrices side by side": side_by_side,
    "one matrix in a scan": lambda: repeated(in_a_recurrence),
    "one matrix in a while loop": lambda: repeated(counted, differentiable=False, probed=False),
}
