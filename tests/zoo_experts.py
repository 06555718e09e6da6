# SPDX-License-Identifier: Apache-2.0
"""Cases of the zoo with a mixture of experts, whose matrices are a stack, in the ways in use: all
experts in one product each with a capacity, sorted tokens in ragged products, one after another.
"""

import jax
import jax.numpy as jnp
import numpy as np
from by_hand import Layers, by_path
from jax import lax
from zoo import Case, Draws

TOKENS, EXPERTS, D, F, CAPACITY, CHOSEN = 12, 4, 16, 32, 3, 2


def weights(down):
    """`down` is the shape of the matrices of the last product. No token goes to expert 2."""
    draw = Draws()
    experts = {
        "gate": draw.weight(EXPERTS, D, F),
        "up": draw.weight(EXPERTS, D, F),
        "down": draw.weight(EXPERTS, *down, k=F),
    }
    router = {"kernel": draw.weight(D, EXPERTS), "bias": jnp.float32([0, 0.5, -100, 0])}
    return {"router": router, "experts": experts}


def routed(params, x):
    """How probable each expert is for each token."""
    logits = x @ params["router"]["kernel"] + params["router"]["bias"][None]
    return jax.nn.softmax(logits)


def case(f, by_hand, down=(F, D), **fields):
    """A case with `by_hand(layers, x, order)`; `order`: the experts of every token, best first.

    In NumPy and in full precision: no choice may be so close that rounding makes another one.
    """
    params = weights(down)
    kernel, bias = map(np.asarray, (params["router"]["kernel"], params["router"]["bias"]))

    def routed_by_hand(params, args, at):
        order = np.argsort(-(np.asarray(args[0]) @ kernel + bias), -1)
        return by_hand(Layers(at, by_path(params)), *args, order)

    matrices = {"experts.gate": (1,), "experts.up": (1,), "experts.down": (1 + down.index(F),)}
    return Case(
        f=f,
        params=params,
        args=(Draws(3)(TOKENS, D),),
        by_hand=routed_by_hand,
        contracted={"router.kernel": (0,), **matrices},
        stack=dict.fromkeys(matrices, (0,)),
        **fields,
    )


def probabilities_by_hand(layers, x):
    return jax.nn.softmax(layers.dense("router", x))


def expert_by_hand(layers, e, x, **where):
    """Expert `e` of rows; `down` is [F, D] or [D, F]."""
    one = Layers(layers.at, layers.p, member=(e,), **where)
    w = {name: layers.p[f"experts.{name}"][e] for name in ("gate", "up", "down")}
    gate, up = (one.product(f"experts.{name}", x, w[name]) for name in ("gate", "up"))
    down = w["down"] if w["down"].shape == (F, D) else w["down"].T
    return one.product("experts.down", jax.nn.silu(gate) * up, down)


def in_one_product(params, x):
    """Every expert has room for some tokens, and gets them by a product with ones and zeros."""
    own, probabilities = params["experts"], routed(params, x)
    chosen = jax.nn.one_hot(jnp.argmax(probabilities, -1), EXPERTS)
    place = (jnp.cumsum(chosen, 0) - 1).astype(jnp.int32)
    dispatch = chosen[..., None] * jax.nn.one_hot(place, CAPACITY)  # [t, e, c]
    rows = jnp.einsum("tec,td->ecd", dispatch, x)
    gate, up = (jnp.einsum("ecd,edf->ecf", rows, own[name]) for name in ("gate", "up"))
    y = jnp.einsum("ecf,edf->ecd", jax.nn.silu(gate) * up, own["down"])
    return jnp.einsum("tec,te,ecd->td", dispatch, probabilities, y)


def in_one_product_by_hand(layers, x, order):
    probabilities = probabilities_by_hand(layers, x)
    out = jnp.zeros_like(x)
    for e in range(EXPERTS):
        mine = np.flatnonzero(order[:, 0] == e)[:CAPACITY]
        rows = jnp.zeros((CAPACITY, D)).at[: len(mine)].set(x[mine])
        y = expert_by_hand(layers, e, rows, index=(e,))
        out = out.at[mine].set(probabilities[mine, e, None] * y[: len(mine)])
    return out


def sorted_rows(params, x):
    """Each token with its two experts, sorted by expert; those that nobody chose get no rows."""
    own, probabilities = params["experts"], routed(params, x)
    weight, chosen = lax.top_k(probabilities, CHOSEN)
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=EXPERTS)
    rows = jnp.repeat(x, CHOSEN, axis=0)[order]
    gate, up = (lax.ragged_dot(rows, own[name], sizes) for name in ("gate", "up"))
    y = lax.ragged_dot(jax.nn.silu(gate) * up, own["down"], sizes)
    back = y[jnp.argsort(order)].reshape(TOKENS, CHOSEN, D)
    return jnp.einsum("tk,tkd->td", weight, back)


def sorted_rows_by_hand(layers, x, order):
    probabilities = probabilities_by_hand(layers, x)
    out, start = jnp.zeros_like(x), 0
    for e in range(EXPERTS):
        mine = np.flatnonzero((order[:, :CHOSEN] == e).any(-1))
        rows = slice(start, start + len(mine))
        y = expert_by_hand(layers, e, x[mine], index=(rows,))
        out, start = out.at[mine].add(probabilities[mine, e, None] * y), rows.stop
    return out


def one_after_another(params, x):
    """Every expert sees every token; `w[e]` picks its matrices."""
    own, probabilities = params["experts"], routed(params, x)
    out = jnp.zeros_like(x)
    for e in range(EXPERTS):
        h = jax.nn.silu(x @ own["gate"][e]) * (x @ own["up"][e])
        out = out + probabilities[:, e, None] * (h @ own["down"][e])
    return out


def one_after_another_by_hand(layers, x, _):
    probabilities = probabilities_by_hand(layers, x)
    each = [expert_by_hand(layers, e, x, use=e) for e in range(EXPERTS)]
    return sum(probabilities[:, e, None] * y for e, y in enumerate(each))


CASES = {
    "experts with a capacity": lambda: case(in_one_product, in_one_product_by_hand, (D, F)),
    "experts of sorted rows": lambda: case(sorted_rows, sorted_rows_by_hand),
    "experts one after another": lambda: case(one_after_another, one_after_another_by_hand),
}
