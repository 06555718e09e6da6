# SPDX-License-Identifier: Apache-2.0
"""Reductions and scales against their definitions, affine biases against ModelOpt's bytes."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.flax import load_file

from jqx import InputError
from jqx.calibration import (
    affine_fold,
    affine_start,
    amax,
    finite_amax,
    input_amax,
    input_scale,
    kv_scale,
    never_met,
    stored_amax,
    unified,
)

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import make_kv  # noqa: E402

DTYPES = ("bfloat16", "float16", "float32")
jitted_amax = jax.jit(amax, static_argnums=1)
jitted_fold = jax.jit(affine_fold)
finite = hnp.arrays(np.float32, 16, elements=st.floats(-6e4, 6e4, width=32))


@pytest.mark.parametrize("run", [amax, jitted_amax], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None)
@given(x=finite)
def test_amax_is_that_of_the_tensor_in_its_dtype(run, dtype, x):
    defined = np.abs(x.astype(dtype).astype(np.float32)).max()
    if 0 < defined < np.finfo(np.float32).tiny:
        return  # XLA reads float32 subnormals as zero on a CPU
    got = run(jnp.asarray(x), dtype)
    assert got.dtype == jnp.float32
    assert float(got) == defined
    assert float(run(jnp.asarray(x.astype(dtype)), dtype)) == defined
    assert stored_amax(x.astype(dtype)) == defined


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (64, 576), (69632,), (32, 4096)])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_never_lost(dtype, shape, bad):
    for place in (0, 0.4, 0.9999):
        x = np.ones(shape, np.float32)
        x.reshape(-1)[int(place * x.size)] = bad
        x = x.astype(dtype)
        for got in (
            amax(jnp.asarray(x), dtype),
            jitted_amax(jnp.asarray(x), dtype),
            stored_amax(x),
        ):
            assert np.isnan(got) if np.isnan(bad) else float(got) == np.inf
        with pytest.raises(InputError, match=r"model\.up met NaN or infinite"):
            finite_amax(stored_amax(x), "model.up")


def test_nan_next_to_infinity_and_overflow_in_the_dtype():
    both = jnp.array([np.nan, np.inf, 1], jnp.float32)
    assert not np.isfinite(jitted_amax(both, "bfloat16"))
    assert float(jitted_amax(jnp.float32([1e5]), "float16")) == np.inf
    assert float(jitted_amax(jnp.zeros((0, 4)), "bfloat16")) == 0


def test_stored_amax_reads_files_in_pieces(tmp_path, monkeypatch):
    x = np.random.default_rng(0).standard_normal((37, 11)).astype(ml_dtypes.bfloat16)
    x.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", ml_dtypes.bfloat16, "r", shape=x.shape)
    monkeypatch.setattr("jqx.calibration.reductions.CHUNK", 64)
    assert stored_amax(mapped) == np.abs(x.astype(np.float32)).max()
    assert stored_amax(mapped[::2, ::3]) == np.abs(x[::2, ::3].astype(np.float32)).max()
    assert stored_amax(mapped[:0]) == 0
    with pytest.raises(InputError, match="not float64"):
        stored_amax(np.ones(3))


@pytest.mark.parametrize(
    ("bound", "code_max", "unused"), [(448, None, 1), (127, None, 1), (2688, 6, 1 / 448)]
)
def test_scales_are_exact_quotients(bound, code_max, unused):
    values = np.random.default_rng(0).uniform(0.01, 50, 200).astype(ml_dtypes.bfloat16)
    for value in values.astype(np.float32):
        assert input_scale(jnp.float32(value), bound, "w", code_max) == np.float32(
            value
        ) / np.float32(bound)
    assert input_scale(0.0, bound, "w", code_max) == np.float32(unused)
    tiny = input_scale(np.float32(1e-40), bound, "w", code_max)
    floor = np.finfo(np.float32).tiny if code_max is None else np.float32(1e-40)
    assert tiny == floor / np.float32(bound)
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match=r"model\.q_proj met NaN"):
            input_scale(bad, bound, "model.q_proj", code_max)


def test_key_and_value_scales():
    assert kv_scale(jnp.float32(3.90625), "k") == np.float32(3.90625) / np.float32(448)
    assert kv_scale(0.0, "k") == 1
    with pytest.raises(InputError, match=r"attn\.k met"):
        kv_scale(np.nan, "attn.k")


@given(st.lists(st.floats(0, 2.0**99, width=32), max_size=6), st.randoms())
def test_the_amax_over_batches_does_not_depend_on_their_order(values, random):
    want = max(values, default=0)
    random.shuffle(values)
    assert input_amax(values) == want
    assert np.isnan(input_amax([*values, np.nan, 1]))


def test_members_of_a_group_share_the_largest_amax():
    amaxes = {
        "q": 1.0,
        "k": jnp.float32(3),
        "v": np.float32(2),
        "o": 0.0,
        "up": 5.0,
        "gate": np.nan,
    }
    groups = [("q", "k", "v"), ("gate", "up"), ("absent", "o")]
    out = unified(amaxes, groups)
    assert list(out) == list(amaxes)
    assert [out[x] for x in ("q", "k", "v", "o")] == [3, 3, 3, 0]
    assert np.isnan([out["up"], out["gate"]]).all()
    assert np.isnan(unified(amaxes, [("up", "gate")])["up"])
    assert amaxes["q"] == 1.0
    assert never_met(amaxes) == ["o"]


@pytest.mark.parametrize("fold", [affine_fold, jitted_fold], ids=["eager", "jit"])
@pytest.mark.parametrize("case", make_kv.CASES)
def test_affine_keys_end_with_the_bytes_of_modelopt(fold, case):
    stored = json.loads((GOLDEN / "kv_affine.json").read_text())["cases"][case]
    inputs = make_kv.batches(*make_kv.CASES[case])
    _, heads, _, dim = inputs[0].shape
    state = affine_start(heads, dim, "bfloat16")
    for x in inputs:
        state = fold(state, jnp.asarray(x))
    assert state.bias.dtype == jnp.bfloat16
    assert list(state.bias.shape) == stored["shape"]
    assert np.asarray(state.bias).view(np.uint16).astype(">u2").tobytes().hex() == stored["bias"]
    assert float(state.amax) == stored["amax"]
    assert int(state.batches) == len(inputs)


def reference_affine(inputs, dtype):
    """The definition in NumPy: a rounded running mean, and the amax of what each batch leaves."""
    bias, largest = None, 0.0
    for n, x in enumerate(inputs):
        x = x.astype(dtype)
        mean = x.astype(np.float64).mean((0, 2), keepdims=True).astype(np.float32).astype(dtype)
        if bias is None:
            bias = mean
        else:
            total = bias.astype(np.float32) * np.float32(n) + mean.astype(np.float32)
            bias = (total / np.float32(n + 1)).astype(dtype)
        left = (x.astype(np.float32) - bias.astype(np.float32)).astype(dtype)
        largest = max(largest, np.abs(left.astype(np.float32)).max())
    return bias, largest


@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_keys_follow_the_definition(dtype):
    rtol = 1e-5 if dtype == "float32" else 0
    for seed in range(20):
        inputs = make_kv.batches(seed, 3, (2, 2, 4, 8), 2.0)
        want, largest = reference_affine(inputs, dtype)
        state = affine_start(2, 8, dtype)
        for x in inputs:
            state = jitted_fold(state, jnp.asarray(x))
        bias = np.float32(state.bias)
        np.testing.assert_allclose(bias, want.astype(np.float32), rtol=rtol, atol=rtol / 10)
        np.testing.assert_allclose(state.amax, largest, rtol=rtol)


def test_affine_folds_depend_on_order_and_run_in_a_scan():
    inputs = make_kv.batches(3, 4, (2, 2, 16, 8), 2.0)
    inputs[0] = inputs[0] + 4
    start = affine_start(2, 8, "bfloat16")
    whole, _ = jax.lax.scan(lambda s, x: (affine_fold(s, x), None), start, jnp.stack(inputs))
    forward = backward = start
    for x in inputs:
        forward = jitted_fold(forward, jnp.asarray(x))
    for x in inputs[::-1]:
        backward = jitted_fold(backward, jnp.asarray(x))
    np.testing.assert_array_equal(whole.bias, forward.bias)
    assert float(whole.amax) == float(forward.amax) != float(backward.amax)


def test_a_nan_stays_in_affine_keys():
    first, second = make_kv.batches(0, 2, (1, 2, 4, 8), 1.0)
    first[0, 1, 2, 3] = np.nan
    state = jitted_fold(affine_start(2, 8, "bfloat16"), jnp.asarray(first))
    state = jitted_fold(state, jnp.asarray(second))
    assert np.isnan(state.amax)
    assert np.isnan(np.float32(state.bias))[0, 1, 0, 3]


INPUTS = {"fp8": (448.0, None), "int8": (127.0, None), "nvfp4": (2688.0, 6.0)}


@pytest.mark.parametrize("fmt", INPUTS)
def test_input_scales_equal_those_of_real_exports(shared, fmt):
    batches = load_file(shared / "golden" / "acts.safetensors")
    amaxes = {}
    for key, x in batches.items():
        module = key.split("|")[0]
        assert stored_amax(np.asarray(x)) == float(jitted_amax(x, "bfloat16"))
        amaxes.setdefault(module, []).append(stored_amax(np.asarray(x)))
    assert len(amaxes) == 14
    with safe_open(shared / "golden" / fmt / "model.safetensors", "np") as exported:
        for module, values in amaxes.items():
            scale = input_scale(input_amax(values), INPUTS[fmt][0], module, INPUTS[fmt][1])
            assert scale == exported.get_tensor(f"{module}.input_scale"), module
