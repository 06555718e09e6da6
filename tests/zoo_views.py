# SPDX-License-Identifier: Apache-2.0
"""Parameters that are rearranged before they are multiplied: a case each.

Most are a single product: `linear`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard
from zoo import Case, Draws

D, N = 32, 16
X = (6, D)


def linear(
    f: Callable[[Any, Any], Any],
    *shape: int,
    columns: tuple[int, ...] = (0,),
    matrix: Callable[[Any], Any] = lambda w: w,
    **fields: Any,
) -> Case:
    """f(w, x) = x @ w, w [D, N] in some way; `matrix(w)` is it in the plainest way."""
    draw = Draws()
    return Case(
        f=lambda p, x: f(p["w"], x),
        params={"w": draw.weight(*shape or (D, N))},
        args=(draw(*X),),
        by_hand=lambda p, args, at: at.product("w", *args, matrix(p["w"])),
        contracted={"w": columns},
        **fields,
    )


def through(change: Callable[[Any], Any], *shape: int, **fields: Any) -> Callable[[], Case]:
    """x @ change(w)."""
    return lambda: linear(lambda w, x: x @ change(w), *shape, **fields)


def placed(w: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    return lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec("d")))


def resharded(w: jax.Array, x: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return reshard(x, everywhere) @ reshard(w, everywhere)


def in_bfloat16() -> Case:
    # products of bfloat16 are exact in float32, and their sums are rounded to bfloat16
    half = lambda x: x.astype(jnp.bfloat16)  # noqa: E731
    return replace(
        linear(lambda w, x: half(x) @ half(w)),
        by_hand=lambda p, args, at: at.product("w", half(args[0]), half(p["w"])),
        rtol=2**-7,
    )


def broadcast() -> Case:
    draw = Draws()

    def f(p, x):
        return jnp.matmul(x, jnp.broadcast_to(p["w"], (2, D, N)))

    def by_hand(p, args, at):
        return at.product("w", args[0].reshape(6, D), p["w"]).reshape(2, 3, N)

    args = (draw(2, 3, D),)
    params = {"w": draw.weight(D, N)}
    return Case(f=f, params=params, args=args, by_hand=by_hand, contracted={"w": (0,)})


def several(
    join: Callable[[list[Any]], Any], multiply: Callable[[Any, Any], Any], sizes: tuple[int, ...]
) -> Callable[[], Case]:
    """Parameters of so many rows each, side by side in one product."""
    draw = Draws()
    names = [f"w{i}" for i in range(len(sizes))]
    params = {name: draw.weight(D, n) for name, n in zip(names, sizes, strict=True)}

    def f(p, x):
        return multiply(x, join([p[name] for name in names]))

    def by_hand(p, args, at):
        return jnp.concatenate([at.product(name, *args, p[name]) for name in names], axis=1)

    return lambda: Case(
        f=f,
        params=params,
        args=(draw(*X),),
        by_hand=by_hand,
        contracted=dict.fromkeys(names, (0,)),
    )


def joined_channels() -> Case:
    draw = Draws()

    def f(p, x, y):
        return jnp.concatenate([x, y], 1) @ jnp.concatenate([p["a"], p["b"]])

    def by_hand(p, args, at):
        return at.product("a", args[0], p["a"]) + at.product("b", args[1], p["b"])

    return Case(
        f=f,
        params={"a": draw.weight(D, N), "b": draw.weight(16, N)},
        args=(draw(*X), draw(6, 16)),
        by_hand=by_hand,
        contracted={"a": (0,), "b": (0,)},
    )


def stacked_experts() -> Case:
    draw = Draws()
    names = ("a", "b", "c")

    def f(p, x):
        return jnp.einsum("etd,edn->etn", x, jnp.stack([p[name] for name in names]))

    def by_hand(p, args, at):
        outs = [at.product(n, x, p[n]) for n, x in zip(names, args[0], strict=True)]
        return jnp.stack(outs)

    return Case(
        f=f,
        params={name: draw.weight(D, N) for name in names},
        args=(draw(3, 4, D),),
        by_hand=by_hand,
        contracted=dict.fromkeys(names, (0,)),
    )


CASES: dict[str, Callable[[], Case]] = {
    "transposed": through(
        lambda w: jnp.transpose(w, (1, 0)), N, D, columns=(1,), matrix=jnp.transpose
    ),
    "reshaped": through(lambda w: w.reshape(D, N), D, 4, 4, matrix=lambda w: w.reshape(D, N)),
    "squeezed": through(lambda w: jnp.squeeze(w, 0), 1, D, N, columns=(1,), matrix=lambda w: w[0]),
    "expanded": lambda: linear(lambda w, x: jnp.matmul(x, lax.expand_dims(w, (0,)))[0]),
    "broadcast": broadcast,
    "in bfloat16": in_bfloat16,
    "rounded by the function": through(
        lambda w: lax.reduce_precision(w, 8, 22), matrix=lambda w: lax.reduce_precision(w, 8, 22)
    ),
    "copied": through(jnp.copy),
    "gradient stopped": lambda: linear(
        lambda w, x: x @ lax.stop_gradient(w), matrix=lax.stop_gradient
    ),
    "fenced": lambda: linear(lambda w, x: jnp.matmul(*lax.optimization_barrier((x, w)))),
    "sharded": through(placed),
    "sharded anew": lambda: linear(resharded),
    "put on a device": through(lambda w: jax.device_put(w, jax.devices()[0])),
    "every other row": through(
        lambda w: w[::2].T, 2 * N, D, columns=(1,), matrix=lambda w: w[::2].T
    ),
    "rows repeated": through(
        lambda w: jnp.repeat(w.reshape(D, 4, 4), 2, axis=1).reshape(D, 2 * N),
        matrix=lambda w: jnp.repeat(w.reshape(D, 4, 4), 2, axis=1).reshape(D, 2 * N),
    ),
    "side by side": several(partial(jnp.concatenate, axis=1), jnp.matmul, (8, 16, 8)),
    "side by side and turned": several(
        lambda ws: jnp.concatenate([w.T for w in ws]).T, jnp.matmul, (8, 16, 8)
    ),
    "channels side by side": joined_channels,
    "experts stacked": stacked_experts,
}
