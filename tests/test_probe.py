# SPDX-License-Identifier: Apache-2.0
"""Zeros added to the results of products: their gradients are those of the results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from observing import normal

import jqx
from jqx import InputError


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


PARAMS = {"up": jnp.asarray(normal(8, 16)), "down": jnp.asarray(normal(16, 4))}
X = jnp.asarray(normal(3, 8))


def loss(params, added, x):
    return (jqx.probe(mlp)(params, added, x) ** 2).sum()


def test_nothing_changes_while_zeros_are_added():
    added = jqx.probes(mlp, PARAMS, X)
    assert {path: [a.shape for a in each] for path, each in added.items()} == {
        "up": [(3, 16)],
        "down": [(3, 4)],
    }
    np.testing.assert_array_equal(jqx.probe(mlp)(PARAMS, added, X), mlp(PARAMS, X))


def test_gradients_are_those_of_the_results():
    gradient = jax.jit(jax.grad(loss, argnums=1))(PARAMS, jqx.probes(mlp, PARAMS, X), X)
    hidden = np.tanh(X @ PARAMS["up"])
    to_out = 2 * hidden @ PARAMS["down"]
    np.testing.assert_allclose(gradient["down"][0], to_out, rtol=1e-5, atol=1e-5)
    to_up = (to_out @ PARAMS["down"].T) * (1 - hidden**2)
    np.testing.assert_allclose(gradient["up"][0], to_up, rtol=1e-4, atol=1e-5)


def test_a_small_probe_moves_the_loss_as_its_gradient_says():
    added = jqx.probes(mlp, PARAMS, X)
    gradient = jax.grad(loss, argnums=1)(PARAMS, added, X)
    step = {path: (1e-3 * jnp.asarray(normal(*each[0].shape)),) for path, each in added.items()}
    moved = loss(PARAMS, step, X) - loss(PARAMS, jax.tree.map(lambda a: -a, step), X)
    want = 2 * sum(float(jnp.vdot(gradient[path][0], step[path][0])) for path in added)
    np.testing.assert_allclose(moved, want, rtol=2e-2)


def test_every_use_and_every_iteration_has_its_own():
    def f(params, x):
        h = jnp.tanh(x @ params["w"]) @ params["w"]
        return lax.scan(lambda h, w: (jnp.tanh(h @ w @ params["w"]), None), h, params["stack"])[0]

    params = {"w": jnp.asarray(normal(8, 8)), "stack": jnp.asarray(normal(3, 8, 8))}
    added = jqx.probes(f, params, X)
    shapes = {path: [a.shape for a in each] for path, each in added.items()}
    assert shapes == {"w": [(3, 8), (3, 8), (3, 3, 8)], "stack": [(3, 3, 8)]}

    def by_hand(added, x):
        first, second, shared = added["w"]
        h = jnp.tanh(x @ params["w"] + first) @ params["w"] + second
        for i in range(3):
            h = h @ params["stack"][i] + added["stack"][0][i]
            h = jnp.tanh(h @ params["w"] + shared[i])
        return h

    got = jax.grad(lambda a: (jqx.probe(f)(params, a, X) ** 2).sum())(added)
    want = jax.grad(lambda a: (by_hand(a, X) ** 2).sum())(added)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_some_parameters_only():
    added = jqx.probes(mlp, PARAMS, X, paths=["down"])
    assert added.keys() == {"down"}
    gradient = jax.grad(loss, argnums=1)(PARAMS, added, X)
    np.testing.assert_allclose(gradient["down"][0], 2 * mlp(PARAMS, X), rtol=1e-5, atol=1e-5)


def test_shapes_are_enough():
    shapes = jax.eval_shape(lambda: (PARAMS, X))
    assert jqx.probes(mlp, *shapes)["up"][0].shape == (3, 16)


def test_what_does_not_fit_is_refused():
    added = jqx.probes(mlp, PARAMS, X)
    with pytest.raises(InputError, match=r"probe of up is \(3, 16\), and its product \(2, 16\)"):
        jqx.probe(mlp)(PARAMS, added, X[:2])
    with pytest.raises(InputError, match="probe of up is none, and its product"):
        jqx.probe(mlp)(PARAMS, {**added, "up": ()}, X)
    with pytest.raises(InputError, match="fewer products with down than there are probes"):
        jqx.probe(mlp)(PARAMS, {**added, "down": added["down"] * 2}, X)
    with pytest.raises(InputError, match="'upp'; did you mean up"):
        jqx.probes(mlp, PARAMS, X, paths=["upp"])


def test_a_loop_of_unknown_length_is_refused_by_name():
    def f(params, x):
        return lax.while_loop(lambda h: h.sum() < 1, lambda h: h @ params["w"], x)

    with pytest.raises(InputError, match="w is used inside a while loop"):
        jqx.probes(f, {"w": jnp.eye(8)}, X)


def test_a_gradient_that_would_be_lost_is_refused_by_name():
    @jax.custom_vjp
    def product(w, x):
        return x @ w

    product.defvjp(lambda w, x: (x @ w, (w, x)), lambda wx, g: (wx[1].T @ g, g @ wx[0].T))

    def f(params, x):
        return product(params["w"], x)

    params = {"w": jnp.eye(8)}
    added = jqx.probes(f, params, X)
    np.testing.assert_array_equal(jqx.probe(f)(params, added, X), X)
    with pytest.raises(InputError, match="^w: used inside a function with a gradient of its own"):
        jax.grad(lambda a: jqx.probe(f)(params, a, X).sum())(added)
