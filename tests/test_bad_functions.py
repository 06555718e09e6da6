# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a function, its parameters or its batches is one line that names the thing and
says what to do.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import MLP, OUT, K, N, X, draw, mlp, refused

import jqx

STATS = jqx.calibrate(mlp, MLP, [X], "fp8")


def calibrate(f=mlp, p=MLP, batches=(X,), **more):
    return jqx.calibrate(f, p, list(batches), "fp8", **more)


# --- batches

BATCHES = {
    "none": ([], "^There are no batches to calibrate with: give at least one"),
    "one dict": ({"x": X}, r"^batches is a dict: give an iterable of batches, \[batch\] for one$"),
    "more arguments": (
        [X, (X, X)],
        r"^Batch 1 is \(\(3, 32\), \(3, 32\)\), and batch 0 is \(\(3, 32\),\): give all .* same",
    ),
    "other inputs": (
        [X, X, X[:, :5]],
        r"^apply_fn\(params, \*batch\) failed with batch 2, \(\(3, 5\),\): TypeError: dot_general "
        r"requires .* got \(5,\) and \(32,\)\. Do params and batches fit it\?$",
    ),
    "the wrong kind": ([{"x": X}], r"failed with batch 0, \(\{'x': \(3, 32\)\},\): TypeError"),
}


@pytest.mark.parametrize(("batches", "message"), BATCHES.values(), ids=BATCHES)
def test_batches(batches, message):
    refused(lambda: jqx.calibrate(mlp, MLP, batches, "fp8"), message)


def test_batches_with_other_keys():
    f = lambda p, batch: mlp(p, batch["x"])  # noqa: E731
    told = r"^Batch 1 is \(\{'y': \(3, 32\)\},\), and batch 0 is \(\{'x': \(3, 32\)\},\)"
    refused(lambda: calibrate(f=f, batches=[{"x": X}, {"y": X}]), told)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_no_scale_covers(value):
    """The first batch that has them and the first product there, however many follow."""
    bad = X.at[1, 2].set(value)
    told = r"^up.kernel met NaN or infinite values in batch 2.*, and no scale covers them: look at"
    refused(lambda: calibrate(batches=[X, X, bad, X, bad]), told)
    params = jax.tree.map(jnp.copy, MLP)
    params["up"]["bias"] = params["up"]["bias"].at[0].set(jnp.nan)
    refused(lambda: calibrate(p=params), "^down.kernel met NaN or infinite values in batch 0, and")


def test_the_kind_of_statistics():
    told = "^unknown kind of statistic to collect: 'amx'; did you mean amax"
    refused(lambda: calibrate(statistics=("amx",)), told)


# --- parameters

SCALED_FIRST = jqx.quantize(MLP, "fp8", STATS)
SCALED_FIRST["down"]["kernel"] = SCALED_FIRST["down"]["kernel"].replace(pre_quant_scale=jnp.ones(N))

PARAMS = {
    "one is missing": ({"up": MLP["up"]}, r"failed with batch 0, .*: KeyError: 'down'\. Do params"),
    "another shape": (MLP | {"down": {"kernel": draw(8, K)}}, r"TypeError: .*\(16,\) and \(8,\)"),
    "inputs scaled first": (
        SCALED_FIRST,
        r"^down.kernel is quantized with a pre_quant_scale, .*: give dense parameters to calibrate",
    ),
}


@pytest.mark.parametrize(("params", "message"), PARAMS.values(), ids=PARAMS)
def test_parameters_that_do_not_fit_the_function(params, message):
    refused(lambda: calibrate(p=params), message)


def test_quantized_parameters_are_refused_where_dense_ones_are_meant():
    q = jqx.quantize(MLP, "fp8", STATS)
    told = r"^down.kernel is quantized: give dense parameters here \(jqx.dequantize\)"
    refused(lambda: jqx.axes(mlp, q, X), told)
    refused(lambda: jqx.fake_quantized(mlp, "fp8")(q, X), told)


CHANGED = {
    "another shape": (
        MLP | {"down": {"kernel": draw(N, 8)}},
        r"^down.kernel has the shape \(16, 8\), and \(16, 32\) where its use was read: give the ",
    ),
    "one is missing": (
        {"up": MLP["up"]},
        r"^down.kernel is not in params, and \(16, 32\) where its",
    ),
}


@pytest.mark.parametrize(("params", "message"), CHANGED.values(), ids=CHANGED)
def test_parameters_that_were_not_calibrated(params, message):
    refused(lambda: jqx.quantize(params, "fp8", STATS), message)


def test_parameters_that_formats_cannot_hold():
    ids = {"w": jnp.ones((K, N), jnp.int32)}
    told = "^w is int32, and formats hold floats: " + OUT.format("w")
    refused(lambda: jqx.quantize(ids, "int8_weight_only", axes={"w": 0}), told)
    product = lambda p, x: x @ p["w"].astype(jnp.float32)  # noqa: E731
    refused(lambda: jqx.fake_quantized(product, "int8_weight_only")(ids, X), told)
    spoilt = {"w": MLP["up"]["kernel"].at[3, 4].set(jnp.nan)}
    told = "^w has NaN or infinite values, and no scale covers them: look at where the param"
    refused(lambda: jqx.quantize(spoilt, "int8_weight_only", axes=0), told)


def test_two_parameters_of_one_name():
    twice = {"params": {"w": draw(K, N)}, "w": draw(K, N)}
    told = "^two parameters are called w: rename one of them"
    refused(lambda: jqx.quantize(twice, "int8_weight_only", axes=0), told)


# --- how the function uses them

USES = {
    "scaled first": (
        lambda p, x: x @ (p["w"] * 2),
        r"^w \(32, 16\) meets an activation in a way that is not followed .*: " + OUT.format("w"),
    ),
    "multiplied with another parameter": (
        lambda p, x: x @ (p["w"] @ p["v"]),
        r"^[vw] \(\d+, \d+\) meets an activation in a way that is not followed",
    ),
    "along both axes": (
        lambda p, x: (x @ p["w"]) @ p["w"].T,
        r"^w \(32, 16\) is used in products over the axes \(0,\) and over the axes \(1,\): leave",
    ),
    "added, too": (
        lambda p, x: x @ p["w"] + p["w"][:3],
        r"^w \(32, 16\) meets an activation elementwise, too: " + OUT.format("w"),
    ),
}


@pytest.mark.parametrize(("f", "message"), USES.values(), ids=USES)
def test_parameters_that_cannot_be_stored(f, message):
    params = {"w": draw(K, N), "v": draw(N, K)}
    for give in (
        lambda: calibrate(f=f, p=params),
        lambda: jqx.quantize(params, "int8_weight_only", axes=jqx.axes(f, params, X)),
        lambda: jqx.fake_quantized(f, "int8_weight_only")(params, X),
    ):
        refused(give, message)
