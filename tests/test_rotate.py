# SPDX-License-Identifier: Apache-2.0
"""Rotations: matrices are orthogonal, and a small transformer written out here has the same outputs
before and after.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqx.algorithms.hadamard import rotation, turned
from jqx.algorithms.rotate import KINDS, Role, rotate_in, rotate_out, rotate_params
from jqx.errors import InputError

WIDTH, HEADS, SIZE, HIDDEN, VOCAB = 24, 4, 8, 40, 50  # one head of keys and values for two
IDS = np.random.RandomState(9).randint(0, VOCAB, 11)


def matrix(signs):
    """The rotation with these signs, as a matrix."""
    return np.asarray(turned(jnp.eye(len(signs)), jnp.asarray(signs, jnp.float32)))


@pytest.mark.parametrize("n", [1, 2, 12, 20, 24, 28, 36, 64, 72, 576])
def test_rotations_have_numbers_of_one_magnitude(n):
    h = matrix(np.ones(n))
    np.testing.assert_allclose(np.abs(h), n**-0.5, rtol=1e-6)
    np.testing.assert_allclose(h @ h.T, np.eye(n), atol=1e-5)


@pytest.mark.parametrize(("n", "block"), [(44, 4), (7, 1), (48 * 7, 16)])
def test_other_sizes_are_blocks_of_a_power_of_two(n, block):
    h = matrix(np.ones(n))
    np.testing.assert_allclose(h @ h.T, np.eye(n), atol=1e-5)
    inside = np.kron(np.eye(n // block), np.ones((block, block)))
    np.testing.assert_allclose(np.abs(h), inside * block**-0.5, atol=1e-6)


def test_signs_are_drawn_from_the_seed_and_are_those_of_rows():
    one, same, other = (np.asarray(rotation(24, seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert set(one) == {-1, 1}
    np.testing.assert_array_equal(matrix(one), matrix(np.ones(24)) * one[:, None])


def drawn(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def test_inputs_and_outputs_of_a_linear():
    r, x, w = rotation(12, 0), drawn(5, 24), drawn(36, 24, seed=1)
    big = np.kron(np.eye(2), matrix(r))  # every 12 of 24 channels
    within = np.asarray(jax.jit(rotate_in)(w, r))
    np.testing.assert_allclose((x @ big) @ within.T, x @ w.T, atol=1e-4)
    without = np.asarray(jax.jit(rotate_out)(w, r))
    np.testing.assert_allclose(x @ without.T, x @ w.T @ np.kron(np.eye(3), matrix(r)), atol=1e-4)
    stack = np.stack([w, 2 * w])
    np.testing.assert_allclose(rotate_out(jnp.asarray(stack), r)[1], 2 * without, rtol=1e-5)
    np.testing.assert_allclose(rotate_in(jnp.asarray(stack), r)[1], 2 * within, rtol=1e-5)
    assert rotate_in(jnp.asarray(w, jnp.bfloat16), r).dtype == jnp.bfloat16
    with pytest.raises(InputError, match=r"12 channels does not fit 30 of \(3, 30\)"):
        rotate_in(jnp.zeros((3, 30)), r)


SHAPES = {
    "q": (HEADS * SIZE, WIDTH),
    "k": (HEADS * SIZE // 2, WIDTH),
    "v": (HEADS * SIZE // 2, WIDTH),
    "v_bias": (HEADS * SIZE // 2,),
    "o": (WIDTH, HEADS * SIZE),
    "o_bias": (WIDTH,),
    "gate": (HIDDEN, WIDTH),
    "up": (HIDDEN, WIDTH),
    "down": (WIDTH, HIDDEN),
}
LAYER_ROLES = {
    "q": Role("reads", "before"),
    "k": Role("reads", "before"),
    "v": Role("values", "before", SIZE),
    "v_bias": Role("values_bias", head_dim=SIZE),
    "o": Role("writes_values", head_dim=SIZE),
    "o_bias": Role("writes_bias"),
    "gate": Role("reads", "after"),
    "up": Role("reads", "after"),
    "down": Role("writes"),
    "before": Role("norm"),
    "after": Role("norm"),
}


def model(plus_one=False):
    """Leaves and roles of two layers with gains, biases, and some channels of outliers."""
    leaves, roles = {"embed": drawn(VOCAB, WIDTH)}, {"embed": Role("embedding")}
    leaves["embed"][:, 5] *= 30
    shapes = {**SHAPES, "before": (WIDTH,), "after": (WIDTH,)}
    for layer in range(2):
        for i, (name, shape) in enumerate(shapes.items()):
            w = drawn(*shape, seed=20 * layer + i + 1)
            is_norm = LAYER_ROLES[name].kind == "norm"
            w = np.exp(w / 2) - plus_one if is_norm else w / shape[-1] ** 0.5
            leaves[f"{layer}.{name}"] = w.astype(np.float32)
            role = LAYER_ROLES[name]
            roles[f"{layer}.{name}"] = role._replace(norm=role.norm and f"{layer}.{role.norm}")
    leaves["last"] = (np.exp(drawn(WIDTH, seed=77) / 2) - plus_one).astype(np.float32)
    leaves["head"] = drawn(VOCAB, WIDTH, seed=78)
    roles |= {"last": Role("norm"), "head": Role("reads", "last")}
    return {name: jnp.asarray(w) for name, w in leaves.items()}, roles


def normed(x, gain, plus_one):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * (gain + plus_one)


def attention(p, x):
    q, k, v = (x @ p[name].T for name in "qkv")
    q, k, v = (a.reshape(len(x), -1, SIZE) for a in (q, k, v + p["v_bias"]))
    k, v = (np.repeat(a, 2, axis=1) for a in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / SIZE**0.5
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1)
    return mixed @ p["o"].T + p["o_bias"]


def logits(leaves, plus_one=False):
    p = {name: np.asarray(w, np.float64) for name, w in leaves.items()}
    x = p["embed"][IDS]
    for layer in range(2):
        at = {name.split(".")[1]: w for name, w in p.items() if name.startswith(f"{layer}.")}
        x = x + attention(at, normed(x, at["before"], plus_one))
        y = normed(x, at["after"], plus_one)
        gate = y @ at["gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ at["up"].T)) @ at["down"].T
    return normed(x, p["last"], plus_one) @ p["head"].T


@pytest.mark.parametrize("plus_one", [False, True])
def test_a_transformer_has_the_same_outputs(plus_one):
    leaves, roles = model(plus_one)
    rotated = rotate_params(leaves, roles, seed=1, plus_one=plus_one)
    assert list(rotated) == list(leaves)
    np.testing.assert_allclose(
        logits(rotated, plus_one), logits(leaves, plus_one), rtol=1e-4, atol=1e-4
    )
    for name, role in roles.items():
        changed = (np.asarray(rotated[name]) != np.asarray(leaves[name])).mean()
        assert changed > 0.9, name
        if role.kind == "norm":
            assert (np.asarray(rotated[name]) == 1 - plus_one).all()


def test_outliers_are_spread():
    leaves, roles = model()
    before, after = (np.asarray(p["embed"]) for p in (leaves, rotate_params(leaves, roles, seed=1)))
    peak = [np.abs(w).max(1).mean() / np.sqrt(np.square(w).mean()) for w in (before, after)]
    assert peak[1] < 0.5 * peak[0]


def test_names_without_a_role_stay():
    leaves, roles = model()
    leaves["other"] = jnp.ones(3)
    kept = {name: role for name, role in roles.items() if name.startswith("1.") and role.norm}
    kept |= {name: roles[name] for name in ("1.before", "1.after")}
    rotated = rotate_params(leaves, kept, seed=1)
    for name in leaves:
        assert (rotated[name] is leaves[name]) == (name not in kept)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head": Role("read", "last")}, "unknown kind of role 'read'; did you mean reads"),
        ({"heads": Role("reads", "last")}, "unknown array 'heads'; did you mean head"),
        ({"head": Role("reads", "lost")}, "unknown array 'lost'"),
        ({"head": Role("reads")}, "No array reads what last scales"),
        ({"head": Role("reads", "0.q")}, "0.q scales, which has not the role norm"),
        ({"0.v": Role("values", "0.before")}, "0.v has values of heads"),
        ({"0.q": Role("writes", "0.before")}, "24 channels in embed, 32 in 0.q"),
    ],
)
def test_roles_that_cannot_be_are_refused(change, said):
    leaves, roles = model()
    with pytest.raises(InputError, match=re.escape(said)):
        rotate_params(leaves, {**roles, **change}, seed=1)
    assert {role.kind for role in roles.values()} == set(KINDS)
