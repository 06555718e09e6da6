# SPDX-License-Identifier: Apache-2.0
"""The ways to multiply, look up and add: a case each."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from zoo import Case, Draws

D, N = 32, 16  # channels, which formats with blocks of 32 divide, and rows


def matrices() -> Case:
    draw = Draws()

    def f(p, x):
        return checkpoint_name(jnp.tanh(x @ p["a"]), "hidden") @ p["b"].T

    def by_hand(p, args, at):
        return at.product("b", jnp.tanh(at.product("a", *args, p["a"])), p["b"].T)

    params = {"a": draw.weight(D, D), "b": draw.weight(N, D)}
    contracted = {"a": (0,), "b": (1,)}
    args = (draw(6, D),)
    return Case(
        f=f, params=params, args=args, by_hand=by_hand, contracted=contracted, dynamic="mxfp8"
    )


def weight_first() -> Case:
    draw = Draws()

    def f(p, x):
        return p["w"] @ x.T

    def by_hand(p, args, at):
        return at.output("w", p["w"] @ at.input("w", args[0]).T)

    return Case(
        f=f,
        params={"w": draw.weight(N, D)},
        args=(draw(6, D),),
        by_hand=by_hand,
        contracted={"w": (1,)},
        dynamic="mxfp4",
    )


def batched() -> Case:
    draw = Draws()

    def f(p, x):
        return jnp.einsum("teo,eno->nte", jnp.einsum("etd,edo->teo", x, p["a"]), p["b"])

    def by_hand(p, args, at):
        outs = []
        for e, x in enumerate(args[0]):
            y = at.output("a", p["a"][e].T @ at.input("a", x, (e,)).T, index=(e,)).T
            outs.append(at.output("b", p["b"][e] @ at.input("b", y, (e,)).T, index=(e,)).T)
        return jnp.transpose(jnp.stack(outs), (2, 1, 0))

    return Case(
        f=f,
        params={"a": draw.weight(3, D, D), "b": draw.weight(3, N, D)},
        args=(draw(3, 4, D),),
        by_hand=by_hand,
        contracted={"a": (1,), "b": (2,)},
        stack={"a": (0,), "b": (0,)},
        dynamic="mxfp8",
    )


def heads() -> Case:
    draw = Draws()

    def f(p, x):
        q = jnp.einsum("btd,dhk->bthk", x, p["q"])
        return jnp.einsum("bthd,hdk->btk", jnp.tanh(q), p["o"])

    def by_hand(p, args, at):
        q = at.product("q", args[0].reshape(6, D), p["q"].reshape(D, 32))
        return at.product("o", jnp.tanh(q), p["o"].reshape(32, D)).reshape(2, 3, D)

    return Case(
        f=f,
        params={"q": draw.weight(D, 4, 8), "o": draw.weight(4, 8, D)},
        args=(draw(2, 3, D),),
        by_hand=by_hand,
        contracted={"q": (0,), "o": (0, 1)},
        dynamic="nvfp4",
    )


def channels_in_another_order() -> Case:
    draw = Draws()

    def f(p, x):
        return jnp.einsum("dbh,hnd->bn", x, p["w"])

    def by_hand(p, args, at):
        x = jnp.transpose(args[0], (1, 2, 0)).reshape(3, 32)
        return at.product("w", x, jnp.transpose(p["w"], (0, 2, 1)).reshape(32, N))

    return Case(
        f=f,
        params={"w": draw.weight(4, N, 8)},
        args=(draw(8, 3, 4),),
        by_hand=by_hand,
        contracted={"w": (0, 2)},
        dynamic="nvfp4",
    )


SIZES = (3, 0, 4, 2)  # a group of none, and rows after the last


def ragged() -> Case:
    draw = Draws()

    def f(p, x, sizes):
        x = jnp.tanh(lax.ragged_dot(x, p["a"], sizes))
        return lax.ragged_dot(x, jnp.swapaxes(p["b"], 1, 2), sizes)

    def by_hand(p, args, at):
        x = jnp.tanh(_in_groups("a", args[0], p["a"], at))
        return _in_groups("b", x, jnp.swapaxes(p["b"], 1, 2), at)

    return Case(
        f=f,
        params={"a": draw.weight(4, D, D), "b": draw.weight(4, N, D)},
        args=(draw(11, D), jnp.array(SIZES)),
        by_hand=by_hand,
        contracted={"a": (1,), "b": (2,)},
        stack={"a": (0,), "b": (0,)},
    )


def ragged_in_a_scan() -> Case:
    draw = Draws()

    def f(p, x, sizes):
        layer = lambda h, w: (jnp.tanh(lax.ragged_dot(h, w, sizes)), None)  # noqa: E731
        return lax.scan(layer, x, p["w"])[0]

    def by_hand(p, args, at):
        x, _ = args
        for i in range(2):
            x = jnp.tanh(_in_groups("w", x, p["w"][i], at, (i,)))
        return x

    return Case(
        f=f,
        params={"w": draw.weight(2, 4, D, D)},
        args=(draw(11, D), jnp.array(SIZES)),
        by_hand=by_hand,
        contracted={"w": (2,)},
        stack={"w": (0, 1)},
    )


def _in_groups(path, x, w, at, layer=()):
    outs, start = [], 0
    for e, size in enumerate(SIZES):
        rows = slice(start, start + size)
        y = at.input(path, x[rows], (*layer, e)) @ w[e]
        outs.append(at.output(path, y, index=(*layer, rows)))
        start += size
    rest = jnp.zeros((len(x) - start, w.shape[-1]))
    outs.append(at.output(path, rest, index=(*layer, slice(start, None))))
    return jnp.concatenate(outs)


def convolution(*window: int, groups: int = 1) -> Case:
    """A convolution over positions with padding, or over groups of features."""
    draw = Draws()
    letters = "HW"[: len(window)]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    spatial = tuple(range(len(window)))

    def conv(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            (1,) * len(window),
            "SAME",
            dimension_numbers=numbers,
            feature_group_count=groups,
        )

    def f(p, x):
        return conv(x, p["w"])

    def by_hand(p, args, at):
        x = at.input("w", args[0].reshape(-1, 8)).reshape(args[0].shape)
        return at.output("w", conv(x, p["w"]))

    return Case(
        f=f,
        params={"w": draw.weight(*window, 8 // groups, N)},
        args=(draw(2, *(5 for _ in window), 8),),
        by_hand=by_hand,
        contracted={"w": (*spatial, len(window))},
        dynamic=None,
    )


def tied_embedding() -> Case:
    draw = Draws()

    def f(p, ids):
        h = p["embed"][ids] + p["positions"][: ids.shape[1]][None] - p["mean"]
        return jnp.tanh(h) @ p["embed"].T

    def by_hand(p, args, at):
        h = jnp.stack([p["embed"][i] for i in args[0].reshape(-1)]).reshape(2, 3, D)
        h = jnp.tanh(h + p["positions"][None, :3] - p["mean"][None])
        return at.product("embed", h.reshape(6, D), p["embed"].T).reshape(2, 3, 20)

    params = {"embed": draw(20, D), "positions": draw(8, D), "mean": draw(3, D)}
    return Case(
        f=lambda p, ids: f(p | {"mean": p["mean"][None]}, ids),
        params=params,
        args=(draw.ids(20, 2, 3),),
        by_hand=by_hand,
        contracted={"embed": (1,)},
        dynamic="mxfp8",
    )


def embedding() -> Case:
    draw = Draws()

    def f(p, ids):
        return jnp.take(p["embed"], ids, axis=0) @ p["w"] + p["layers"][1][ids]

    def by_hand(p, args, at):
        rows = jnp.stack([p["embed"][i] for i in args[0]])
        other = jnp.stack([p["layers"][1, i] for i in args[0]])
        return at.product("w", rows, p["w"]) + other

    return Case(
        f=f,
        params={"embed": draw(20, D), "w": draw.weight(D, N), "layers": draw(2, 20, N)},
        args=(draw.ids(20, 6),),
        by_hand=by_hand,
        contracted={"embed": (1,), "w": (0,), "layers": (2,)},
        stack={"layers": (0,)},
        looked_up=("embed", "layers"),
        dynamic="mxfp8",
    )


def derivative() -> Case:
    """A derivative in the function itself, which sums up what comes back of two results: one is a
    parameter of two axes.
    """
    draw = Draws()

    def f(p, x):
        _, back = jax.vjp(lambda x: (x, jnp.square(x)), x)
        return back((p["field"], jnp.ones_like(x)))[0] @ p["w"]

    def by_hand(p, args, at):
        return at.product("w", p["field"] + 2 * args[0], p["w"])

    return Case(
        f=f,
        params={"w": draw.weight(D, N), "field": draw(6, D)},
        args=(draw(6, D),),
        by_hand=by_hand,
        contracted={"w": (0,)},
    )


CASES: dict[str, Callable[[], Case]] = {
    "x @ w and x @ w.T": matrices,
    "w @ x": weight_first,
    "a batch of matrices": batched,
    "heads": heads,
    "channels in another order": channels_in_another_order,
    "groups of rows": ragged,
    "groups of rows in a scan": ragged_in_a_scan,
    "a convolution": lambda: convolution(3),
    "a convolution of images": lambda: convolution(3, 2),
    "a grouped convolution": lambda: convolution(3, groups=2),
    "a tied embedding and positions": tied_embedding,
    "tables": embedding,
    "a derivative inside": derivative,
}
