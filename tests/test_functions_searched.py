# SPDX-License-Identifier: Apache-2.0
"""Models in other people's style, unchanged, under algorithms that search: what is collected of
their inputs, and that they come out better.
"""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo_models
from zoo import Recorded
from zoo_checks import by_path, inputs, other_batch

import jqx
from jqx import Algorithm, InputError, QuantConfig, Rule

NAMES = (
    "nnx transformer block",
    "linen scan and remat",
    "equinox mlp",
    "nnx vmap",
)
ALGORITHMS = {
    "awq_lite": (Algorithm("awq_lite"),),
    "gptq": (Algorithm("gptq"),),
    "wmse": (Algorithm("wmse"),),
    "awq_lite, wmse": (Algorithm("awq_lite"), Algorithm.of("wmse", weight="gram")),
}


def config(case, fmt, algorithm, inputs_as=None):
    rules = tuple(
        Rule(path_glob=path, weight=fmt, input=inputs_as)
        for path in inputs(case)
        if math.prod(by_path(case.params)[path].shape[a] for a in case.contracted[path]) % 16 == 0
    )
    return QuantConfig(rules=rules, algorithm=algorithm)


def batches(case):
    return [case.args, other_batch(case)]


def by_hand(case, path):
    """Member -> the rows of each batch that the parameter is multiplied with."""
    found = {}
    for i, args in enumerate(batches(case)):
        at = Recorded()
        case.by_hand(case.params, args, at)
        for (name, member), xs in at.inputs.items():
            if name == path:
                found.setdefault(member, [[], []])[i] += [np.asarray(x, np.float64) for x in xs]
    return {m: [np.concatenate(xs) for xs in both if xs] for m, both in found.items()}


@pytest.mark.parametrize("name", [*NAMES, "linen decoder stacked along axis 1"])
def test_moments_are_those_of_what_goes_into_products(name):
    case = zoo_models.CASES[name]()
    kinds = ("gram", "square", "channel_mean", "channel_amax")
    stats = jqx.calibrate(case.f, case.params, batches(case), statistics=kinds)
    for path in inputs(case):
        for member, rows in by_hand(case, path).items():
            have = {kind: np.asarray(stats.get(path, kind))[member] for kind in kinds}
            x = np.concatenate(rows)
            near = {"rtol": 2e-4, "atol": 2e-4 * np.square(x).sum(0).max()}
            np.testing.assert_allclose(have["gram"], x.T @ x, **near)
            np.testing.assert_allclose(have["square"], np.square(x).sum(0), **near)
            mean = np.mean([np.abs(part).mean(0) for part in rows], axis=0)
            np.testing.assert_allclose(have["channel_mean"], mean, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", NAMES)
def test_a_search_lowers_the_error_of_every_product(name, algorithm):
    case = zoo_models.CASES[name]()
    plain, cfg = (config(case, "int4_b16", a) for a in ("max", ALGORITHMS[algorithm]))
    stats = jqx.calibrate(case.f, case.params, batches(case), cfg)
    stored = [jqx.quantize(case.params, c, stats) for c in (plain, cfg)]
    out = eqx.filter_jit(jqx.quantized(case.f))(stored[1], *case.args)
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), out))
    errors = [dict(products(case, q)) for q in stored]
    assert errors[0].keys() == errors[1].keys()
    ratios = [errors[1][key] / errors[0][key] for key in errors[0] if errors[0][key] > 0]
    # AWQ does not try to change nothing, and squares know no correlations: one may come out worse
    assert np.exp(np.mean(np.log(np.maximum(ratios, 1e-9)))) < 0.97


def products(case, params):
    """The squared error of every product of a matrix with its own inputs, of both batches."""
    stored = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, jqx.QTensor))
    dense = by_path(case.params)
    for path, q in zip(dense, stored, strict=True):
        if not isinstance(q, jqx.QTensor):
            continue
        w, decoded = (matrices(case, path, a) for a in (dense[path], q.decode()))
        for member, rows in by_hand(case, path).items():
            x = np.concatenate(rows)
            p = 1 if q.pre_quant_scale is None else np.asarray(q.pre_quant_scale)[member]
            yield (path, member), np.square((x * p) @ decoded[member].T - x @ w[member].T).sum()


def matrices(case, path, a):
    """[*members, n, k] of an array."""
    columns, stack = case.contracted[path], case.stack.get(path, ())
    rows = [i for i in range(a.ndim) if i not in columns and i not in stack]
    lead = tuple(a.shape[i] for i in stack)
    k = math.prod(a.shape[i] for i in columns)
    return np.asarray(jnp.transpose(a, (*stack, *rows, *columns)), np.float64).reshape(*lead, -1, k)


@pytest.mark.parametrize("name", NAMES[1:3])
def test_static_inputs_have_the_scales_of_scaled_inputs(name):
    case = zoo_models.CASES[name]()
    cfg = config(case, "int8", (Algorithm.of("smoothquant", alpha=0.5),), "int8")
    stats = jqx.calibrate(case.f, case.params, batches(case), cfg)
    q = jqx.quantize(case.params, cfg, stats)
    leaves = jax.tree.leaves(q, is_leaf=lambda x: isinstance(x, jqx.QTensor))
    for path, leaf in zip(by_path(case.params), leaves, strict=True):
        if isinstance(leaf, jqx.QTensor):
            most = np.asarray(stats.get(path, "channel_amax")) * np.asarray(leaf.pre_quant_scale)
            np.testing.assert_allclose(leaf.input_scale, most.max(-1) / 127, rtol=1e-5)
    error = lambda cfg: distance(case, cfg)  # noqa: E731
    assert error(cfg) < 1.05 * error(dataclasses.replace(cfg, algorithm="max"))


def distance(case, cfg):
    stats = jqx.calibrate(case.f, case.params, batches(case), cfg)
    q = jqx.quantize(case.params, cfg, stats)
    got = eqx.filter_jit(jqx.quantized(case.f))(q, *case.args)
    want = case.f(case.params, *case.args)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return sum(float(jnp.sum(jnp.square(a - b))) for a, b in pairs)


def test_what_is_missing_is_told():
    params, x = {"w": jnp.ones((16, 4))}, jnp.ones((3, 16))
    f = lambda p, x: x @ p["w"]  # noqa: E731
    cfg = QuantConfig(rules=(Rule(path_glob="w", weight="int4_b16"),), algorithm="gptq")
    stats = jqx.calibrate(f, params, [x])
    with pytest.raises(InputError, match="w: gptq needs the statistics gram of its inputs"):
        jqx.quantize(params, cfg, stats)
    spoilt = jqx.calibrate(f, params, [x], cfg)
    spoilt.entries["w"]["gram"] = spoilt.entries["w"]["gram"].at[0, 0].set(jnp.nan)
    with pytest.raises(InputError, match="w: gram of its inputs holds NaN"):
        jqx.quantize(params, cfg, spoilt)
    wrong = dataclasses.replace(cfg, algorithm="smoothquant")
    with pytest.raises(InputError, match="smoothquant is not for weights in int4_b16"):
        jqx.calibrate(f, params, [x], wrong)


def test_scales_that_follow_the_weights_are_not_searched():
    cfg = QuantConfig(rules=(Rule(path_glob="w", weight="int4_b16"),), algorithm="awq_lite")
    with pytest.raises(InputError, match="awq_lite chooses scales once"):
        jqx.fake_quantized(lambda p, x: x @ p["w"], cfg)


@pytest.mark.parametrize(
    ("algorithm", "fmt"),
    [("awq_lite", "int4_b16"), ("gptq", "int4_b16"), ("smoothquant", "int8"), ("wmse", "nvfp4")],
)
def test_a_member_without_tokens_is_told(algorithm, fmt):
    case = zoo_models.CASES["experts of sorted rows"]()
    cfg = config(case, fmt, algorithm)
    stats = jqx.calibrate(case.f, case.params, [case.args], cfg)
    assert any(not np.all(kinds["tokens"]) for kinds in stats.entries.values())
    with pytest.raises(InputError, match="some member met no tokens while calibrating"):
        jqx.quantize(case.params, cfg, stats)


def test_a_product_over_a_part_of_the_channels_has_no_moments():
    params, x = {"w": jnp.ones((32, 4))}, jnp.ones((3, 16))
    f = lambda p, x: x @ p["w"][:16] + x @ p["w"][16:]  # noqa: E731
    cfg = QuantConfig(rules=(Rule(path_glob="w", weight="int4_b16"),), algorithm="gptq")
    with pytest.raises(InputError, match="w is used in a product over a part of its channels"):
        jqx.calibrate(f, params, [x], cfg)


@pytest.mark.parametrize("algorithm", ["percentile", "entropy", "histogram_mse"])
def test_histograms_are_collected_of_checkpoints_alone(algorithm):
    params, x = {"w": jnp.ones((16, 4))}, jnp.ones((3, 16))
    rule = Rule(path_glob="w", weight="int8", input="int8")
    cfg = QuantConfig(rules=(rule,), algorithm=algorithm)
    with pytest.raises(InputError, match=f"w: {algorithm} needs the histogram of its inputs, whic"):
        jqx.calibrate(lambda p, x: x @ p["w"], params, [x], cfg)


def test_engines_that_scale_inputs_need_no_statistics():
    w = jnp.asarray(np.random.RandomState(0).standard_normal((32, 8)), jnp.float32)
    q = jqx.quantize({"w": w}, "w4a8_mxfp4_fp8", axes=0)["w"]
    assert (q.input_format, q.input_scale) == ("fp8", None)
    x = jnp.asarray(np.random.RandomState(1).standard_normal((3, 32)), jnp.float32)
    out = jax.jit(jqx.quantized(lambda p, x: x @ p["w"]))({"w": q}, x)
    np.testing.assert_allclose(out, x @ q.decode(), rtol=0.1, atol=0.5)
