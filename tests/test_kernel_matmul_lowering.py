# SPDX-License-Identifier: Apache-2.0
"""The kernels of products become programs of the devices they are for, none of which is here."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from lowering import lowered
from matmul_cases import B200, DEVICES, FORMATS, spec, storage_of

from jqx_kernels.matmul import matmul
from jqx_kernels.scaled_matmul import scaled_matmul

PLATFORMS = {"triton": "cuda", "tpu": "tpu", "cudnn": "cuda"}
CALLS = {"triton": "xla.gpu.triton", "tpu": "tpu_custom_call", "cudnn": "block_scaled_dot"}
N, K = 1000, 1920  # 15 blocks of 128


def program(f, row, *args):
    text = lowered(f, args, PLATFORMS[row])
    return text, CALLS[row] in text


def weight_only(name, row, x_dtype="bfloat16"):
    how = {
        "storage": storage_of(name),
        "weight_dtype": x_dtype,
        "implementation": row,
        "device": DEVICES[row],
    }
    return partial(matmul, **how)


@pytest.mark.parametrize("m", [5, 200])
@pytest.mark.parametrize("row", ["triton", "tpu"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_storage_lowers(name, row, m):
    x = jax.ShapeDtypeStruct((m, K), jnp.bfloat16)
    text, called = program(weight_only(name, row), row, x, *spec(name, N, K))
    assert called
    assert "stored_matmul" in text


@pytest.mark.parametrize("row", ["triton", "tpu"])
def test_float32_lowers(row):
    x = jax.ShapeDtypeStruct((5, K), jnp.float32)
    assert program(weight_only("nvfp4", row, "float32"), row, x, *spec("nvfp4", N, K))[1]


@pytest.mark.parametrize("row", ["triton", "tpu"])
def test_batches_and_gradients_lower(row):
    x = jax.ShapeDtypeStruct((3, 5, K), jnp.bfloat16)
    run = weight_only("int4", row)

    def loss(x, *arrays):
        return jax.vmap(lambda x: run(x, *arrays))(x).astype(jnp.float32).sum()

    assert program(jax.value_and_grad(loss), row, x, *spec("int4", N, K))[1]


def both_stored(kind, row, device=None):
    how = {
        "kind": kind,
        "dtype": jnp.bfloat16,
        "implementation": row,
        "device": device or DEVICES[row],
    }
    run = partial(scaled_matmul, **how)
    return lambda x, w, outer: run(x.codes, x.scale, w.codes, w.scale, outer)


@pytest.mark.parametrize("m", [5, 200])
@pytest.mark.parametrize(
    ("kind", "name", "row"),
    [
        ("fp8", "fp8_channel", "triton"),
        ("fp8", "fp8_channel", "tpu"),
        ("int8", "int8", "triton"),
        ("int8", "int8", "tpu"),
        ("nvfp4", "nvfp4", "cudnn"),
        ("mxfp8", "mxfp8", "cudnn"),
    ],
)
def test_products_of_stored_matrices_lower(kind, name, row, m):
    outer = jax.ShapeDtypeStruct((), jnp.float32)
    run = both_stored(kind, row, B200 if row == "cudnn" else None)
    assert program(run, row, spec(name, m, K), spec(name, N, K), outer)[1]
