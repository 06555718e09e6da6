# SPDX-License-Identifier: Apache-2.0
"""Encoding where weights are, on a GPU: the kernels interpreted give what a CPU gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jqx
from jqx.formats import FORMATS, encode, find_format, on_gpu
from jqx.formats.on_gpu import encode_on_gpu, encodes
from jqx.tensors import on_gpu as leaves_on_gpu
from jqx.tensors.layout import layout_of
from jqx.tensors.on_gpu import quantize_on_gpu, stays_on_gpu
from jqx_interop import weights

ENCODE = jax.jit(encode, static_argnames="fmt")
NAMES = [name for name, fmt in FORMATS.items() if fmt.scale.name != "double"]


class Gpu:
    """What is asked of a `jax.Device`."""

    platform, device_kind, compute_capability = "gpu", "NVIDIA H200", "9.0"


def matrix(n, k, dtype="bfloat16", seed=0):
    r = np.random.default_rng([seed, n, k])
    w = r.standard_normal((n, k)) * np.exp(2 * r.standard_normal((n, 1)))
    w[1] = 0
    return jnp.asarray(w.astype(np.float32)).astype(dtype)


def check_same(mine, theirs):
    mine, theirs = jax.tree.leaves(mine), jax.tree.leaves(theirs)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_a_cpu(name, dtype):
    fmt = find_format(name)
    shape = (134, 200) if fmt.ragged else (6, 3 * (fmt.block[1] or 25))
    w = matrix(*shape, dtype)
    check_same(encode_on_gpu(w, fmt, interpret=True), ENCODE(w, fmt=fmt))


@pytest.mark.parametrize("name", ["fp8", "int8_tensor", "nvfp4", "int4_fp8"])
def test_what_the_scale_of_the_tensor_reaches_may_be_given(name):
    fmt, w, whole = find_format(name), matrix(4, 256), np.float32(77)
    field = "amax" if fmt.tensor_bound is None else "tensor_amax"
    check_same(encode_on_gpu(w, fmt, whole, interpret=True), ENCODE(w, fmt=fmt, **{field: whole}))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["nvfp4", "fp8", "int8", "int4", "mxfp4"]))
def test_any_bits_of_bfloat16_give_the_same(seed, name):
    fmt, r = find_format(name), np.random.default_rng(seed)
    halves = r.integers(0, 1 << 16, (4, 256), np.uint16)
    w = jax.lax.bitcast_convert_type(jnp.asarray(halves), jnp.bfloat16)
    w = jnp.where(jnp.isfinite(w), w, 1).astype(jnp.bfloat16)
    check_same(encode_on_gpu(w, fmt, interpret=True), ENCODE(w, fmt=fmt))


@pytest.mark.parametrize(
    ("shape", "axis", "stack"),
    [((6, 128), -1, None), ((128, 6), 0, None), ((3, 4, 128), -1, (0,)), ((6, 4, 32), (1, 2), ())],
)
def test_arrays_of_any_layout_are_those_of_a_cpu(shape, axis, stack):
    w = matrix(shape[0], int(np.prod(shape[1:]))).reshape(shape)
    expected = jqx.QTensor.quantize(w, "nvfp4", axis=axis, stack=stack)
    layout = layout_of(shape, axis, stack)
    mine = quantize_on_gpu(w, expected.format, layout, interpret=True)
    assert jax.tree.structure(mine) == jax.tree.structure(expected)
    check_same(mine, expected)


@pytest.fixture
def gpu(monkeypatch):
    """Every device is taken for a GPU whose kernels are interpreted; gives what was encoded."""
    seen = []

    def interpreted(w, fmt, whole=None, interpret=False):
        seen.append((fmt.name, w.shape))
        return encode_on_gpu(w, fmt, whole, interpret=True)

    told = on_gpu.device_of(Gpu)
    monkeypatch.setattr(on_gpu, "device_of", lambda device: told)
    for module in (leaves_on_gpu, weights):
        monkeypatch.setattr(module, "encode_on_gpu", interpreted)
    return seen


def params():
    return {"up": matrix(128, 64), "down": matrix(256, 64).reshape(4, 64, 64)}


def test_parameters_are_stored_where_they_are(gpu):
    expected = {
        "up": jqx.QTensor.quantize(params()["up"], "nvfp4", axis=-2),
        "down": jqx.QTensor.quantize(params()["down"], "nvfp4", axis=-2, stack=(0,)),
    }
    found = jqx.quantize(params(), "w4a16_nvfp4", axes=-2)
    assert gpu == [("nvfp4", (64, 64))] * 4 + [("nvfp4", (64, 128))]
    check_same(found, expected)


def test_what_is_searched_or_traced_or_has_no_kernel_is_not(gpu):
    alone = {"up": params()["up"]}
    searched = jqx.QuantConfig(rules=(jqx.Rule(weight="int8", kind="linear"),), algorithm="mse")
    for cfg in (searched, jqx.QuantConfig(rules=(jqx.Rule(weight="nf4_double", kind="linear"),))):
        expected = jqx.quantize(jax.tree.map(np.asarray, alone), cfg, axes=-2)
        check_same(jqx.quantize(alone, cfg, axes=-2), expected)
    jax.jit(lambda p: jqx.quantize(p, "w4a16_nvfp4", axes=-2))(alone)
    assert gpu == []


def test_numbers_that_no_scale_covers_are_found_there_too(gpu):
    bad = {"up": params()["up"].at[3, 5].set(jnp.nan)}
    with pytest.raises(jqx.InputError, match="^up has NaN or infinite values"):
        jqx.quantize(bad, "w4a16_nvfp4", axes=-2)
    with pytest.raises(jqx.InputError, match="has 24 inputs along axis 0, and nvfp4 shares one"):
        jqx.quantize({"up": matrix(24, 64)}, "w4a16_nvfp4", axes=-2)


@pytest.mark.parametrize("name", ["nvfp4", "int8", "fp8_block", "mxfp4", "nf4_double"])
def test_checkpoints_are_encoded_there(gpu, name, monkeypatch):
    w, fmt = np.asarray(matrix(384, 256)), find_format(name)
    expected = weights._encode_on_cpu(w, None, fmt)
    monkeypatch.setattr(weights, "GPU_CHUNK", 128 * 256)
    whole = None if fmt.tensor_bound is None else np.float32(np.abs(w.astype(np.float32)).max())
    check_same(weights.encode_weight(w, fmt, whole), expected)
    assert gpu == ([] if name == "nf4_double" else [(name, (128, 256))] * 3)


def test_which_devices_encode():
    class Old(Gpu):
        compute_capability = "7.5"

    class Tpu(Gpu):
        platform, compute_capability = "tpu", None

    nvfp4 = find_format("nvfp4")
    assert encodes(Gpu, nvfp4, (2, 16))
    assert not encodes(Gpu, nvfp4, (0, 16))
    assert not encodes(Gpu, find_format("nf4_double"), (2, 64))
    assert not any(encodes(device, nvfp4, (2, 16)) for device in (Old, Tpu, jax.devices()[0]))
    assert not stays_on_gpu(jnp.ones((2, 16)), nvfp4)
