# SPDX-License-Identifier: Apache-2.0
"""What functions on QTensors would silently do wrong is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from observing import f_of, normal
from storing import DECODE, ENCODE, K, N, stacked, store

import jqx
from jqx import InputError

TREATED = store(normal(K, K))
STACK = stacked()
REFUSED = {
    "scaled": (TREATED, lambda w, x: x @ (w * 2).T, "a product as it is"),
    "masked": (TREATED, lambda w, x: (x[None] * w[:, None]).sum(-1), "a product as it is"),
    "of one row": (
        store(normal(1, K)),
        lambda w, x: (x * w.reshape(1, K)).sum(-1),
        "a product as it is",
    ),
    "added to": (TREATED, lambda w, x: x @ (w + jnp.eye(K)).T, "a product as it is"),
    "rotated": (
        TREATED,
        lambda w, x: x @ (jnp.asarray(np.eye(K, dtype=np.float32)) @ w).T,
        "a product as it is",
    ),
    "added": (TREATED, lambda w, x: x @ w.T + w[:2], "a product as it is"),
    "carried": (
        TREATED,
        lambda w, x: lax.scan(lambda c, _: ((c[0].T, c[1] @ c[0].T), None), (w, x), length=2)[0][1],
        "a product as it is",
    ),
    "the other axis": (TREATED, lambda w, x: x @ w, r"inputs along axis 1 of \(32, 32\)"),
    "sliced on the other axis": (TREATED, lambda w, x: x[:, :8] @ w[:8], "inputs along axis 1"),
    "a part of the inputs": (
        store(normal(K, K), input_format="fp8_token"),
        lambda w, x: x[:, :8] @ w[:, :8].T,
        "8 inputs at once",
    ),
    "parts of the inputs": (
        store(normal(K, K), input_format="mxfp8"),
        lambda w, x: jnp.einsum("bhd,nhd->bhn", x.reshape(-1, 4, 8), w.reshape(K, 4, 8)),
        "8 inputs at once",
    ),
    "a part without a scale": (
        store(normal(K, K)).replace(input_scale=None),
        lambda w, x: x[:, :8] @ w[:, :8].T,
        "8 inputs at once",
    ),
    "convolved with blocks": (
        ENCODE(jnp.asarray(normal(3, 32, 8)), "int8", axis=(0, 1)).replace(input_format="mxfp8"),
        lambda w, x: lax.conv_general_dilated(
            x[None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        "kernel of a convolution, whose inputs take formats with one scale",
    ),
    "a stack at once": (STACK, lambda w, x: jnp.einsum("bk,enk->ebn", x, w), "scan over it"),
    "a stack scanned and whole": (
        STACK,
        lambda w, x: lax.scan(lambda h, v: (h @ v.T + jnp.einsum("bk,enk->bn", x, w), None), x, w)[
            0
        ],
        "a product as it is",
    ),
    "a stack scanned and used at once": (
        STACK,
        lambda w, x: (
            lax.scan(lambda h, v: (h @ v.T, None), x, w)[0] + jnp.tensordot(x, w, [[1], [2]])[:, 0]
        ),
        "scan over it",
    ),
    "a stack changed and indexed": (STACK, lambda w, x: x @ (2 * w)[0].T, "a product as it is"),
}


@pytest.mark.parametrize(("q", "f", "message"), REFUSED.values(), ids=REFUSED)
def test_an_input_that_would_not_be_quantized_is_refused(q, f, message):
    x = jnp.asarray(normal(2, K))
    with pytest.raises(InputError, match=rf"^layer\.w .*{message}"):
        jax.eval_shape(jqx.quantized(f_of(f)), {"layer": {"w": q}}, x)


def test_weights_alone_may_be_used_in_any_way():
    """All the ways above, decoded."""
    ways = {name: (q.replace(input_format=None), f) for name, (q, f, _) in REFUSED.items()}
    x = jnp.asarray(normal(2, K))

    def f(p, x):
        return {name: f(p[name], x) for name, (_, f) in ways.items()}

    got = jax.jit(jqx.quantized(f))({name: q for name, (q, _) in ways.items()}, x)
    want = jax.jit(f)({name: DECODE(q) for name, (q, _) in ways.items()}, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


WRONG = {
    "two ranks": (
        {"low_rank": (jnp.ones((N, 2)), jnp.ones((3, K)))},
        r"low_rank of layer.w has the shapes .*\(16, 2\), .* not .*\(16, 3\), \(3, 32\)",
    ),
    "factors the other way round": (
        {"low_rank": (jnp.ones((2, K)), jnp.ones((N, 2)))},
        r"low_rank of layer.w .* not .*\(16, 16\), \(16, 32\)",
    ),
    "a scale too many": ({"input_scale": jnp.ones(2)}, r"input_scale .* shape \(2,\), not \(\)"),
    "a factor too many": ({"pre_quant_scale": jnp.ones(N)}, r"shape \(16,\), not \(32,\)"),
    "no format": ({"input_format": "fp9"}, "unknown input format of layer.w 'fp9'"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_fields_that_do_not_fit_are_refused(fields, message):
    q = dataclasses.replace(store(normal(N, K)), **fields)
    with pytest.raises(InputError, match=message):
        jqx.quantized(f_of(lambda w, x: x @ w.T))({"layer": {"w": q}}, jnp.ones((2, K)))


def test_inputs_that_are_no_whole_blocks_are_refused():
    q = store(normal(N, 24), input_format="nvfp4")
    with pytest.raises(InputError, match="layer.w has 24 inputs, and nvfp4 quantizes 16 together"):
        jqx.quantized(f_of(lambda w, x: x @ w.T))({"layer": {"w": q}}, jnp.ones((2, 24)))


def test_names_that_are_not_given_are_refused():
    def f(p, x):
        h = checkpoint_name(x, "h")
        return lax.custom_linear_solve(lambda y: y, h, lambda _, b: checkpoint_name(b, "inside"))

    x = jnp.ones((2, K))
    for name in ("k", "inside"):
        with pytest.raises(InputError, match=f"no activation is called {name}, .* there are h$"):
            jqx.quantized(f, {name: lambda x: x})({}, x)


def test_two_parameters_of_one_name_are_refused():
    tree = {"params": {"w": store(normal(K, K))}, "w": jnp.ones((K, K))}
    with pytest.raises(InputError, match="two parameters are called w"):
        jqx.quantized(lambda p, x: x @ p["params"]["w"].T)(tree, jnp.ones((2, K)))
