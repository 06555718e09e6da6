# SPDX-License-Identifier: Apache-2.0
"""What observing a function collects, and the same computed by hand in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jqx.transforms import observe, uses

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def channel_amax(use, x):
    """The largest magnitude of each channel, in the parameter's order; nothing for lookups."""
    if use.op == "gather":
        return None
    if use.op == "name":
        return jnp.max(jnp.abs(x))
    others = [i for i in range(x.ndim) if i not in use.activation_axes]
    moved = jnp.transpose(x, (*others, *use.activation_axes))
    channels = math.prod(x.shape[i] for i in use.activation_axes)
    return jnp.max(jnp.abs(moved).reshape(-1, channels), axis=0)


def by_channel(x):
    """The definition: x [..., k] -> [k]."""
    return np.abs(np.asarray(x)).reshape(-1, x.shape[-1]).max(0)


def observed(f, params, *args, collect=channel_amax, **kwargs):
    """What is collected, eagerly and under jit, after checking that the outputs are f's own."""
    params, args = jax.tree.map(jnp.asarray, (params, args))
    g = observe(f, collect, **kwargs)
    out, found = g(params, *args)
    np.testing.assert_array_equal(out, f(params, *args))
    out, jitted = jax.jit(g)(params, *args)
    np.testing.assert_array_equal(out, jax.jit(f)(params, *args))
    assert found.keys() == jitted.keys()
    for path, what in found.items():
        np.testing.assert_allclose(what, jitted[path], rtol=1e-6)
    return found


def dot_uses(f, params, *args):
    return [u for u in uses(f, params, *args) if u.op != "elementwise"]


def f_of(f):
    return lambda params, x: f(params["layer"]["w"], x)
