# SPDX-License-Identifier: Apache-2.0
"""Products inside shard_map, on however many devices there are: a case each.

`DEVICES` divides every size here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from zoo import Case, Draws

DEVICES = 4
D, N = 32, 16
X = (8, D)


def over_mesh(f: Callable[..., Any], in_specs: Any, out_specs: Any, **settings: Any) -> Any:
    """`f` on every device of a mesh with one axis, "d"."""
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **settings)


def one(f: Callable[..., Any], *specs: Any, check_vma: bool = True, **fields: Any) -> Case:
    """f(w, x) = tanh(x @ w), sharded as `specs` of w, x and the result say."""
    draw = Draws()
    sharded = over_mesh(f, specs[:2], specs[2], check_vma=check_vma)
    return Case(
        f=lambda p, x: sharded(p["w"], x),
        params={"w": draw.weight(D, N)},
        args=(draw(*X),),
        by_hand=lambda p, args, at: jnp.tanh(at.product("w", *args, p["w"])),
        contracted={"w": (0,)},
        probed=False,
        **fields,
    )


def local(w, x):
    return jnp.tanh(x @ w)


def summed(w, x):
    return jnp.tanh(lax.psum(x @ w, "d"))


def varying(w, x):
    return jnp.tanh(x @ lax.pcast(w, "d", to="varying"))


def gathered(w, x):
    return jnp.tanh(lax.all_gather(x, "d", axis=1, tiled=True) @ w)


def experts() -> Case:
    """Two experts a device, each with its own tokens."""
    draw = Draws()
    f = over_mesh(lambda w, x: jnp.einsum("etd,edn->etn", x, w), (P("d"), P("d")), P("d"))

    def by_hand(p, args, at):
        return jnp.stack([at.product("w", x, p["w"][e], (e,)) for e, x in enumerate(args[0])])

    return Case(
        f=lambda p, x: f(p["w"], x),
        params={"w": draw.weight(8, D, N)},
        args=(draw(8, 3, D),),
        by_hand=by_hand,
        contracted={"w": (1,)},
        stack={"w": (0,)},
        probed=False,
    )


def layers() -> Case:
    """Layers scanned on every device, whose two matrices are sharded over the hidden channels."""
    draw = Draws()

    def layer(h, w):
        up, down = w
        return h + lax.psum(jnp.tanh(h @ up) @ down, "d"), None

    specs = P(None, None, "d"), P(None, "d", None)
    f = over_mesh(lambda p, x: lax.scan(layer, x, p)[0], (specs, P()), P())

    def by_hand(p, args, at):
        (x,) = args
        for i in range(2):
            hidden = jnp.tanh(at.product("up", x, p["up"][i], (i,)))
            x = x + at.product("down", hidden, p["down"][i], (i,))
        return x

    return Case(
        f=lambda p, x: f((p["up"], p["down"]), x),
        params={"up": draw.weight(2, D, D), "down": draw.weight(2, D, D)},
        args=(draw(*X),),
        by_hand=by_hand,
        contracted={"up": (1,), "down": (1,)},
        stack={"up": (0,), "down": (0,)},
        dynamic=None,
        probed=False,
    )


def stages() -> Case:
    """Layers of its own on every device, which it scans."""
    draw = Draws()
    layer = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
    f = over_mesh(lambda w, x: lax.scan(layer, x[0], w)[0][None], (P("d"), P("d")), P("d"))

    def by_hand(p, args, at):
        outs, each = [], len(p["w"]) // jax.device_count()
        for device, x in enumerate(args[0]):
            for i in range(device * each, (device + 1) * each):
                x = jnp.tanh(at.product("w", x, p["w"][i], (i,)))
            outs.append(x)
        return jnp.stack(outs)

    return Case(
        f=lambda p, x: f(p["w"], x),
        params={"w": draw.weight(8, D, D)},
        args=(draw(jax.device_count(), 4, D),),
        by_hand=by_hand,
        contracted={"w": (1,)},
        stack={"w": (0,)},
        probed=False,
    )


CASES: dict[str, Callable[[], Case]] = {
    "tokens on every device": lambda: one(local, P(), P("d"), P("d")),
    "tokens on every device, unchecked": partial(one, local, P(), P("d"), P("d"), check_vma=False),
    "a matrix that varies": lambda: one(varying, P(), P("d"), P("d")),
    "rows on every device": lambda: one(local, P(None, "d"), P(), P(None, "d")),
    "channels on every device": lambda: one(summed, P("d"), P(None, "d"), P(), dynamic=None),
    "channels gathered": lambda: one(gathered, P(None, "d"), P(None, "d"), P(None, "d")),
    "experts on every device": experts,
    "layers on every device": layers,
    "layers of its own on every device": stages,
}
