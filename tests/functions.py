# SPDX-License-Identifier: Apache-2.0
"""Small functions of parameters in every layout, and what storing them gives by the definitions."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jqx
from jqx import QuantConfig, Rule

K, N, MEMBERS = 32, 16, 3
SIZES = np.array([2, 0, 3], np.int32)  # rows of a ragged product that meet each member


def draw(*shape: int, seed: int = 0) -> jax.Array:
    """Normal numbers, the same every time."""
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32))


def config(*rules: Rule, **rule: Any) -> QuantConfig:
    """A configuration of these rules, or of the one with these fields."""
    return QuantConfig(rules=rules or (Rule(**rule),))


def scanned(w: jax.Array, x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, v: (jnp.tanh(h @ v), None), x, w)[0]


def in_turn(w: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
    """What each of the matrices [members, k, k] of `scanned` is multiplied with."""
    seen = [x]
    for v in w[:-1]:
        seen.append(np.tanh(seen[-1] @ v))
    return seen


def each_member(w: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
    return list(x)


@dataclass(frozen=True)
class Layout:
    """A function of a weight of this `shape` and of a batch, which axes it sums over, and along
    which one member at a time is used. `inputs` are those of every member, by hand.
    """

    f: Callable[[Any, Any], Any]
    shape: tuple[int, ...]
    batch: tuple[int, ...]
    contracted: tuple[int, ...]
    stack: tuple[int, ...] = ()
    inputs: Callable[[np.ndarray, np.ndarray], list[np.ndarray]] = field(
        default=lambda w, x: [x], repr=False
    )


LAYOUTS = {
    "in, out": Layout(lambda w, x: x @ w, (K, N), (2, 5, K), (0,)),
    "out, in": Layout(lambda w, x: x @ w.T, (N, K), (2, 5, K), (1,)),
    "d, h, k": Layout(lambda w, x: jnp.einsum("btd,dhk->bthk", x, w), (K, 4, 6), (2, 5, K), (0,)),
    "h, k, d": Layout(
        lambda w, x: jnp.einsum("bthk,hkd->btd", x, w), (4, 8, N), (2, 5, 4, 8), (0, 1)
    ),
    "convolution": Layout(
        lambda w, x: lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (3, K, N),
        (2, 5, K),
        (0, 1),
    ),
    "scanned": Layout(scanned, (MEMBERS, K, K), (4, K), (1,), (0,), in_turn),
    "scanned along axis 1": Layout(
        lambda w, x: scanned(jnp.moveaxis(w, 1, 0), x),
        (K, MEMBERS, K),
        (4, K),
        (0,),
        (1,),
        lambda w, x: in_turn(w.swapaxes(0, 1), x),
    ),
    "indexed": Layout(
        lambda w, x: lax.fori_loop(0, MEMBERS, lambda i, h: jnp.tanh(h @ w[i]), x),
        (MEMBERS, K, K),
        (4, K),
        (1,),
        (0,),
        in_turn,
    ),
    "experts": Layout(
        lambda w, x: jnp.einsum("ebd,edf->ebf", x, w),
        (MEMBERS, K, N),
        (MEMBERS, 5, K),
        (1,),
        (0,),
        each_member,
    ),
    "ragged": Layout(
        lambda w, x: lax.ragged_dot(x, w, jnp.asarray(SIZES)),
        (MEMBERS, K, N),
        (5, K),
        (1,),
        (0,),
        lambda w, x: np.split(x, np.cumsum(SIZES)[:-1]),
    ),
}


def apply(layout: Layout) -> Callable[[Any, jax.Array], jax.Array]:
    """The layout's function of a tree of parameters."""
    return lambda p, x: layout.f(p["layer"]["w"], x)


def params_of(layout: Layout) -> dict[str, Any]:
    return {"layer": {"w": draw(*layout.shape)}}


def matrices(w: Any, contracted: tuple[int, ...], stack: tuple[int, ...]) -> np.ndarray:
    """[members, n, k]: what is stored of an array, in the order of its own axes."""
    w = np.asarray(w)
    rows = [a for a in range(w.ndim) if a not in (*contracted, *stack)]
    n, k = (math.prod(w.shape[a] for a in axes) for axes in (rows, contracted))
    return w.transpose(*stack, *rows, *contracted).reshape(-1, n, k)


def stored_bytes(x: Any) -> np.ndarray:
    """The bytes of an array, as a row for each of its leading members."""
    x = np.asarray(x)
    return np.atleast_1d(x).view(np.uint8)


def same(a: Any, b: Any) -> None:
    """Two trees are equal, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(stored_bytes(x), stored_bytes(y))


def check_stored(q: jqx.QTensor, w: Any, name: str, layout: Layout) -> None:
    """`q` is what the definition of the format says, member by member."""
    assert (q.format.name, q.shape, q.dtype) == (name, w.shape, w.dtype)
    assert (q.columns, q.stack) == (layout.contracted, layout.stack)
    lead = tuple(w.shape[a] for a in layout.stack)
    one = lambda x: np.asarray(x).reshape(-1, *x.shape[len(lead) :])  # noqa: E731
    for i, matrix in enumerate(matrices(w, layout.contracted, layout.stack)):
        codes, scale, tensor_scale = reference.encode(matrix, name)
        np.testing.assert_array_equal(one(q.codes)[i].view(np.uint8), codes)
        np.testing.assert_array_equal(stored_bytes(one(q.scale)[i]), stored_bytes(scale))
        if tensor_scale is not None:
            assert one(q.tensor_scale)[i] == tensor_scale


MLP = {"up": {"kernel": draw(K, N), "bias": draw(N)}, "down": {"kernel": draw(N, K)}}
X = draw(3, K)


def mlp(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"][None]) @ p["down"]["kernel"]


OUT = r"leave it out with Rule\(path_glob=\"{}\", weight=None, input=None\)$"


def refused(give: Callable[[], Any], message: str) -> None:
    """It is an InputError of one line, which matches `message`."""
    with pytest.raises(jqx.InputError, match=message) as caught:
        give()
    assert "\n" not in str(caught.value)


MODEL = {
    "embed": {"table": draw(20, K)},
    "heads": {"q": draw(K, 2, 16) / 6, "out": draw(2, 16, K) / 6},
    "layers": {"w": draw(MEMBERS, K, K) / 6, "bias": draw(MEMBERS, K) / 6},
    "experts": {"w": draw(MEMBERS, K, K) / 6},
    "head": {"kernel": draw(K, 20) / 6},
}
IDS = [np.random.default_rng(i).integers(0, 20, (2, 5)).astype(np.int32) for i in range(3)]


def model(p: Any, ids: Any) -> jax.Array:
    """A language model with a bit of everything, its keys and values named."""
    x = p["embed"]["table"][ids]
    heads = jnp.einsum("btd,dhk->bhtk", x, p["heads"]["q"])
    k, v = checkpoint_name(heads, "attn.k"), checkpoint_name(jnp.tanh(heads), "attn.v")
    x = x + jnp.einsum("bhtk,hkd->btd", jnp.tanh(k) * v, p["heads"]["out"])

    def layer(h: jax.Array, one: Any) -> tuple[jax.Array, None]:
        return jnp.tanh(h @ one["w"] + one["bias"][None, None]), None

    x = lax.scan(layer, x, p["layers"])[0]
    y = jnp.einsum("ebtd,edf->btf", jnp.stack([x, 2 * x, -x]), p["experts"]["w"])
    return jnp.tanh(y) @ p["head"]["kernel"]
