# SPDX-License-Identifier: Apache-2.0
"""`jqx.quantized` multiplies codes with codes where inputs are rounded like the weight."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernel_products import WAYS, K, N, asked, drawn, near, stored

from jqx import quantized
from jqx.transforms import products, scaled_products
from jqx_kernels.dispatch import Device

CODES = [("fp8", "fp8"), ("fp8_channel", "fp8"), ("int8", "int8"), ("int8_tensor", "int8")]


def rounding(fmt, given, way="rows"):
    """A weight whose inputs are rounded, some of them saturated."""
    f, shape, axis = WAYS[way]
    q = stored(fmt, shape, axis).replace(input_format=given, input_scale=jnp.float32(0.005))
    return f, {"w": q}, 40 * drawn(2, 3, K, seed=5) ** 3


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("way", ["rows", "first", "heads"])
@pytest.mark.parametrize(("fmt", "given"), CODES)
def test_inputs_rounded_like_the_weight_are_multiplied_as_codes(fmt, given, way, implementation):
    f, params, x = rounding(fmt, given, way)
    mine = quantized(f, implementation=implementation)
    near(jax.jit(mine)(params, x), jax.jit(quantized(f))(params, x))
    assert asked(mine, params, x, of=scaled_products, op="scaled_matmul") == 1

    def loss(g, x):
        return jnp.sum(g(params, x).astype(jnp.float32))

    near(jax.grad(partial(loss, mine))(x), jax.grad(partial(loss, quantized(f)))(x), 2.0**-5)


@pytest.mark.parametrize(("fmt", "given"), CODES)
def test_codes_of_inputs_are_found_exactly(fmt, given):
    """Both sums are of whole numbers times one scale: only their last rounding may differ."""
    f, params, x = rounding(fmt, given)
    wide = {"w": params["w"].replace(dtype=jnp.dtype("float32"))}
    mine = quantized(f, implementation="xla")(wide, x.astype(jnp.float32))
    near(mine, quantized(f)(wide, x.astype(jnp.float32)), 2.0**-18)


@pytest.mark.parametrize(("fmt", "given"), CODES)
def test_a_row_with_a_nan_is_nan(fmt, given):
    f, params, x = rounding(fmt, given)
    y = jax.jit(quantized(f, implementation="xla"))(params, x.at[1, 2, 7].set(jnp.nan))
    lost = np.isnan(np.asarray(y, np.float32))
    assert lost[1, 2].all()
    assert lost.sum() == N


def test_what_is_not_multiplied_as_codes():
    for fmt, given, scale in (
        ("fp8_block", "fp8", 0.01),
        ("int8", "fp8", 0.01),
        ("fp8", "fp8", None),
        ("fp8", "fp8_token", None),
    ):
        f, shape, axis = WAYS["rows"]
        given_scale = None if scale is None else jnp.float32(scale)
        q = stored(fmt, shape, axis).replace(input_format=given, input_scale=given_scale)
        mine = quantized(f, implementation="xla")
        assert asked(mine, {"w": q}, drawn(5, K), of=scaled_products, op="scaled_matmul") == 0
        near(mine({"w": q}, drawn(5, K)), quantized(f)({"w": q}, drawn(5, K)))


@pytest.mark.parametrize(
    ("device", "times"),
    [
        (Device("gpu", "", (9, 0)), {"fp8": 1, "int8": 1}),
        (Device("gpu", "", (8, 0)), {"fp8": 0, "int8": 1}),
        (Device("tpu"), {"fp8": 1, "int8": 1}),
        (Device("cpu"), {"fp8": 0, "int8": 0}),
    ],
)
def test_devices_that_multiply_codes(device, times, monkeypatch):
    for module in (products, scaled_products):
        monkeypatch.setattr(module, "current_device", lambda: device)
    plain = lambda *a, **how: jnp.zeros((6, N), how.get("dtype", how.get("out_dtype")))  # noqa: E731
    monkeypatch.setattr(products, "matmul", plain)
    monkeypatch.setattr(scaled_products, "scaled_matmul", plain)
    for name, expected in times.items():
        f, params, x = rounding(name, name)
        assert asked(quantized(f), params, x, of=scaled_products, op="scaled_matmul") == expected
