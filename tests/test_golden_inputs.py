# SPDX-License-Identifier: Apache-2.0
"""Inputs of linears, keys and values beside ModelOpt's fake quantization of the same (a committed
file): where they differ, and by how much.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jqx.calibration import input_scale
from jqx.config import INPUT_FORMATS, KV_FORMATS
from jqx.transforms import fake_input, fake_kv

HERE = Path(__file__).parent / "golden"
STORED = {k: a.view(ml_dtypes.bfloat16) for k, a in np.load(HERE / "inputs.npz").items()}
INPUT = jax.jit(fake_input, static_argnums=1)
CACHED = jax.jit(fake_kv, static_argnums=1)


def _maker():
    spec = importlib.util.spec_from_file_location("make_inputs", HERE / "make_inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NOW = _maker().inputs()["now"].astype(ml_dtypes.bfloat16)


def scale_of(case, row):
    """The scale that is exported for ModelOpt's amax."""
    if f"{case}|amax" not in STORED or row.bound is None:
        return None
    return jnp.float32(input_scale(float(STORED[f"{case}|amax"]), row.bound, case))


def differs(mine, theirs):
    """How many values differ, and by how much of the larger one at most."""
    a, b = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    at = a != b
    most = np.abs(a - b)[at] / np.maximum(np.abs(a), np.abs(b))[at]
    return int(at.sum()), float(most.max(initial=0))


# Case -> format, how many of 512 values may differ. Those are ties in one arithmetic and not in the
# other, and land one E4M3 code apart. bf16 magnitudes are ties often where their scale comes of one
# of them, so the scale that is found in the values shows it most.
INPUTS = {
    "fp8": ("fp8", 2),
    "fp8 without a scale": ("fp8", 8),
    "fp8_token": ("fp8_token", 2),
    "int8": ("int8", 1),
    "nvfp4": ("nvfp4", 0),
    "mxfp4": ("mxfp4", 0),
    "mxfp8": ("mxfp8", 0),
}


@pytest.mark.parametrize(("case", "name", "most"), [(c, *row) for c, row in INPUTS.items()])
def test_inputs(case, name, most):
    got = INPUT(jnp.asarray(NOW), name, scale_of(case, INPUT_FORMATS[name]))
    count, step = differs(got, STORED[case])
    assert count <= most
    assert step <= 1 / 8


@pytest.mark.parametrize(("name", "most"), [("fp8", 2), ("fp8_cast", 0), ("nvfp4", 2)])
def test_keys_and_values(name, most):
    """The stored scale of NVFP4 is that of FP8: its tensor scale is once more rounded."""
    got = CACHED(jnp.asarray(NOW), name, scale_of(name, KV_FORMATS[name]), None)
    count, step = differs(got, STORED[name])
    assert count <= most
    assert step <= 1 / 3


def test_keys_and_values_without_their_mean():
    """ModelOpt rounds x - bias and what comes back of it to bf16; here the sum is rounded once."""
    bias = STORED["fp8_affine|bias"]
    scale = scale_of("fp8_affine", KV_FORMATS["fp8_affine"])
    mine = np.asarray(CACHED(jnp.asarray(NOW), "fp8_affine", scale, jnp.asarray(bias)), np.float64)
    theirs, x = STORED["fp8_affine"].astype(np.float64), NOW.astype(np.float64)
    left = np.abs(x - bias.astype(np.float64))
    rounding = np.maximum(np.abs(x), left) / 2**8  # of bf16
    step = np.maximum(left / 8, float(scale) * 2.0**-9)  # of E4M3
    assert (np.abs(mine - theirs) <= step + 2 * rounding).all()
    apart = np.abs(mine - theirs) > 2 * rounding
    assert apart.sum() <= 0.05 * x.size  # these were ties
    errors = [np.square(np.clip(y, -30, 30) - np.clip(x, -30, 30)).sum() for y in (mine, theirs)]
    assert errors[0] <= errors[1]
