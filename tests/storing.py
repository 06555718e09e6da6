# SPDX-License-Identifier: Apache-2.0
"""QTensors to run functions on, and what the functions are to compute, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import reference
from observing import normal

import jqx
from jqx import QTensor

ENCODE = jax.jit(QTensor.quantize, static_argnames=("fmt", "axis", "stack"))
DECODE = jax.jit(QTensor.decode)
SCALE = np.float32(0.02)
K, N = 32, 16


def store(w, fmt="int8", axis=-1, **fields):
    """`w` as a QTensor; by default its inputs are FP8 with a scale that some of them exceed."""
    fields = {"input_format": "fp8", "input_scale": SCALE, **fields}
    given = {k: jnp.asarray(v) if k.endswith("scale") else v for k, v in fields.items()}
    lead = w.shape[:-2]
    if given["input_scale"].shape != lead:
        given["input_scale"] = jnp.broadcast_to(given["input_scale"], lead)
    return ENCODE(jnp.asarray(w), fmt, axis=axis).replace(**given)


def rounded(x, name="fp8", scale=SCALE):
    return reference.activation(np.asarray(x), name, scale)


def run(f, params, *args):
    params, args = jax.tree.map(jnp.asarray, (params, args))
    return jax.tree.map(np.asarray, jax.jit(jqx.quantized(f))(params, *args))


def stacked(layers=3, **fields):
    w = normal(layers, K, K)
    scales = np.float32([0.01, 0.02, 0.04])[:layers]
    return store(w, "nvfp4", **{"input_scale": scales, **fields})


def layer(h, w):
    return jnp.tanh(h @ w.T), None


def by_hand(q, x, factors=None):
    for i in range(q.shape[0]):
        x = x if factors is None else x * factors[i]
        x = np.tanh(rounded(x, "fp8", np.asarray(q.input_scale)[i]) @ np.asarray(DECODE(q))[i].T)
    return x
