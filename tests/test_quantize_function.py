# SPDX-License-Identifier: Apache-2.0
"""quantize, fake_quantized and kv_rounding on functions of any parameters: what is stored is what
the definitions of the formats say, and what runs is what is stored.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from functions import (
    IDS,
    LAYOUTS,
    MODEL,
    K,
    N,
    apply,
    check_stored,
    config,
    draw,
    model,
    params_of,
    same,
)
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jqx
from jqx import InputError, QuantConfig, Rule

DENSE = jax.jit(model)

# --- what is stored


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_codes_and_scales_in_every_layout(layout):
    """One scale of weights and one of inputs for every member of a stack."""
    params, xs = params_of(layout), [draw(*layout.batch, seed=i) for i in (1, 2)]
    cfg = config(weight="nvfp4", input="fp8")
    stats = jqx.calibrate(apply(layout), params, xs, cfg)
    q = jqx.quantize(params, cfg, stats)["layer"]["w"]
    check_stored(q, params["layer"]["w"], "nvfp4", layout)
    met = [layout.inputs(np.asarray(params["layer"]["w"]), np.asarray(x)) for x in xs]
    amax = [max(np.abs(x).max(initial=0) for x in each) for each in zip(*met, strict=True)]
    # a member that met nothing has the scale 1
    want = [a / np.float32(448) if a else np.float32(1) for a in amax]
    assert q.input_format == "fp8"
    assert q.input_scale.shape == tuple(q.shape[a] for a in q.stack)
    np.testing.assert_allclose(q.input_scale.reshape(-1), want, rtol=1e-5)
    np.testing.assert_array_equal(q.input_scale.reshape(-1)[0], want[0])


@pytest.mark.parametrize("name", ["fp8", "fp8_channel", "int8", "int8_tensor", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("layout", ["in, out", "scanned along axis 1"])
def test_codes_and_scales_in_every_format(layout, name):
    layout = LAYOUTS[layout]
    params = params_of(layout)
    axes = jqx.axes(apply(layout), params, draw(*layout.batch))
    q = jqx.quantize(params, config(weight=name), axes=axes)["layer"]["w"]
    check_stored(q, params["layer"]["w"], name, layout)
    assert (q.input_scale, q.input_format) == (None, None)


def test_rules_choose_formats_by_path_and_everything_else_stays_what_it_is():
    cfg = config(
        Rule(weight="int8", kind="linear"),
        Rule(path_glob="layers", weight="nvfp4", input="nvfp4"),
        Rule(path_glob="head.kernel", weight=None),
    )
    q = jqx.quantize(MODEL, cfg, jqx.calibrate(model, MODEL, IDS, cfg))
    got = {"heads": q["heads"]["q"], "layers": q["layers"]["w"], "experts": q["experts"]["w"]}
    assert {name: x.format.name for name, x in got.items()} == {
        "heads": "int8",
        "layers": "nvfp4",
        "experts": "int8",
    }
    assert got["layers"].input_format == "nvfp4"
    assert got["layers"].input_scale.shape == got["layers"].shape[:1]
    kept = ("embed", "table"), ("layers", "bias"), ("head", "kernel")
    assert all(q[a][b] is MODEL[a][b] for a, b in kept)


def test_axes_may_be_said_in_any_way():
    def f(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"] + p["c"][None]

    params = {"a": draw(K, N), "b": draw(N, K), "c": draw(K), "ids": jnp.ones((2, 2), jnp.int32)}
    want = jqx.quantize(params, "int8_weight_only", axes=jqx.axes(f, params, draw(3, K)))
    assert want["a"].columns == (0,)
    ways = [-2, 0, (0,), {"a": 0, "b": -2}, {"a": (0,), "b": [0]}]
    for axes in ways:
        same(jqx.quantize(params, "int8_weight_only", axes=axes), want)
    turned = jqx.quantize(params, "int8_weight_only", axes={"b": 1})
    assert (turned["b"].columns, turned["a"]) == ((1,), params["a"])
    heads = {"w": draw(4, 8, N), "layers": draw(2, K, 3, 4)}
    both = jqx.quantize(heads, "int8_weight_only", axes={"w": (0, 1), "layers": 1})
    assert (both["w"].columns, both["w"].stack) == ((0, 1), ())
    assert (both["layers"].columns, both["layers"].stack) == ((1,), (0, 2))


def test_dequantize_gives_the_arrays_that_are_stood_for():
    params = {"w": draw(N, K).astype(jnp.bfloat16), "b": draw(N)}
    back = jqx.dequantize(jqx.quantize(params, "w4a16_nvfp4", axes=-1))
    w = np.asarray(params["w"])
    assert back["b"] is params["b"]
    np.testing.assert_array_equal(back["w"], reference.decode(w, "nvfp4").astype(w.dtype))


def test_inside_jit_and_of_shapes_alone():
    stats = jqx.calibrate(model, MODEL, IDS, "nvfp4")
    want = jqx.quantize(MODEL, "nvfp4", stats)
    quantize = lambda p: jqx.quantize(p, "nvfp4", stats)  # noqa: E731
    same(jax.jit(quantize)(MODEL), want)
    same(jax.jit(lambda: quantize(MODEL))(), want)
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)  # noqa: E731
    assert jax.eval_shape(quantize, shapes(MODEL)) == shapes(want)


def test_weights_stay_where_they_are():
    """What is on no device in particular may meet what is anywhere."""
    w = draw(K, N)
    free, put = (
        jqx.quantize({"w": x}, "int8_weight_only", axes=-2)["w"]
        for x in (w, jax.device_put(w, jax.devices()[0]))
    )
    assert [x.committed for x in jax.tree.leaves(free)] == [False, False]
    assert [x.committed for x in jax.tree.leaves(put)] == [True, True]
    same(free, put)


def test_a_quantized_tree_is_not_quantized_to_another_format():
    params = {"a": draw(K, N), "b": draw(K, N)}
    q = jqx.quantize(params, config(path_glob="a", weight="int8"), axes=-2)
    refusals = {
        r"^a is quantized already, to int8 and not to fp8: dequantize it first": ("fp8", "max", -2),
        "^a is quantized already, and mse starts from the weight: deq": ("int8", "mse", -2),
        r"^a is quantized already, along the axes \(0,\) of \(32, 16\)": ("int8", "max", -1),
    }
    for told, (weight, algorithm, axes) in refusals.items():
        cfg = QuantConfig(rules=(Rule(path_glob="a", weight=weight),), algorithm=algorithm)
        with pytest.raises(InputError, match=told):
            jqx.quantize(q, cfg, axes=axes)
    scaled = {"a": q["a"].replace(pre_quant_scale=jnp.ones(K))}
    with pytest.raises(InputError, match="^a is quantized already, and what its inputs meet was"):
        jqx.quantize(scaled, config(path_glob="a", weight="int8"), axes=-2)
    both = jqx.quantize(q, config(path_glob="b", weight="fp8"), axes=-2)
    assert both["a"] is q["a"]
    assert both["b"].format.name == "fp8"


def test_a_tied_embedding_has_one_format():
    def lm(p, ids):
        return jnp.tanh(p["embed"][ids]) @ p["embed"].T

    params, ids = {"embed": draw(20, K)}, [np.array([1, 5, 7])]
    told = (
        "^embed is multiplied and looked up, and gets none as embedding, fp8 as linear: one array "
        r'.*Rule\(path_glob="embed", weight=None, input=None\).* untie the head$'
    )
    with pytest.raises(InputError, match=told):
        jqx.calibrate(lm, params, ids, "fp8")
    with pytest.raises(InputError, match=told):
        jqx.quantize(params, "fp8", axes=jqx.axes(lm, params, ids[0]))
    cfg = config(weight="fp8", input="fp8")
    q = jqx.quantize(params, cfg, jqx.calibrate(lm, params, ids, cfg))
    w = reference.decode(np.asarray(params["embed"]).astype(np.float32), "fp8")
    x = np.tanh(w[ids[0]])
    scale = np.abs(np.tanh(np.asarray(params["embed"])[ids[0]])).max() / np.float32(448)
    want = reference.activation(x, "fp8", scale) @ w.T
    np.testing.assert_allclose(jax.jit(jqx.quantized(lm))(q, ids[0]), want, 1e-4, 1e-4)


# --- what runs

RECIPES = ["fp8", "fp8_per_channel_per_token", "int8", "nvfp4", "w4a16_nvfp4", "mxfp8", "mxfp4"]
CONFIGS = {
    **{name: jqx.RECIPES[name].config for name in (*RECIPES, "w4a8_nvfp4_fp8")},
    "int8 and fp8 per token": config(weight="int8", input="fp8_token", kind="linear"),
    "experts in int4": config(path_glob="experts", weight="int4_b32", input="fp8"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_fake_quantization_computes_what_stored_weights_do(name):
    cfg = CONFIGS[name]
    stats = jqx.calibrate(model, MODEL, IDS, cfg)
    q = jqx.quantize(MODEL, name if name in jqx.RECIPES else cfg, stats)
    got = jax.jit(jqx.quantized(model))(q, IDS[0])
    fake = jax.jit(jqx.fake_quantized(model, cfg, stats))
    # rows of stored experts are summed in another order
    np.testing.assert_allclose(fake(MODEL, IDS[0]), got, 0, 2.0**-20 * np.abs(got).max())
    dense = DENSE(MODEL, IDS[0])
    assert 1e-3 < np.abs(got - dense).max() < np.abs(dense).max() / 2


def test_fake_quantization_without_statistics_finds_scales_in_activations():
    f, x = (lambda p, x: x @ p["w"]), draw(3, K) * 9
    params, cfg = {"w": draw(K, N)}, config(weight="int8", input="fp8")
    w = reference.decode(np.asarray(params["w"]).T.copy(), "int8").T
    got = jax.jit(jqx.fake_quantized(f, cfg))(params, x)
    np.testing.assert_allclose(got, reference.activation(np.asarray(x), "fp8") @ w, 1e-5, 1e-4)


def test_gradients_of_fake_quantization_go_straight_through():
    f, x = (lambda p, x: jnp.tanh(x @ p["w"]).sum()), draw(3, K)
    params = {"w": draw(K, N)}
    stats = jqx.calibrate(f, params, [x], "fp8")
    fake = jqx.fake_quantized(f, "fp8", stats)
    to_w, to_x = jax.jit(jax.grad(fake, argnums=(0, 1)))(params, x)
    q = jqx.quantize(params, "fp8", stats)["w"]
    w, rounded = q.decode(), reference.activation(np.asarray(x), "fp8", np.asarray(q.input_scale))
    slope = 1 - np.tanh(rounded @ np.asarray(w)) ** 2
    np.testing.assert_allclose(to_w["w"], rounded.T @ slope, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(to_x, slope @ np.asarray(w).T, rtol=1e-4, atol=1e-4)


# --- keys and values


@pytest.mark.parametrize("kv", ["fp8", "nvfp4", "fp8_cast"])
def test_keys_and_values_by_their_names(kv):
    cfg = QuantConfig(rules=(Rule(path_glob="attn", kv=kv, kind="attention"),))
    stats = jqx.calibrate(model, MODEL, IDS, cfg)
    named = jqx.kv_rounding(cfg, stats)
    assert set(named) == {"attn.k", "attn.v"}
    assert set(stats.entries) == (set() if kv == "fp8_cast" else set(named))
    k = np.einsum("btd,dhk->bhtk", MODEL["embed"]["table"][IDS[0]], MODEL["heads"]["q"])
    scale = 1 if kv == "fp8_cast" else stats.get("attn.k", "amax") / np.float32(448)
    np.testing.assert_array_equal(jax.jit(named["attn.k"])(k), reference.cached(k, kv, scale))
    got = jax.jit(jqx.quantized(model, named=named))(MODEL, IDS[0])
    want = DENSE(MODEL, IDS[0])
    assert 1e-4 < np.abs(got - want).max() < np.abs(want).max() / 2


def test_keys_and_values_that_are_no_whole_blocks_are_refused():
    cfg = config(kv="nvfp4", kind="attention")
    named = jqx.kv_rounding(cfg, jqx.calibrate(model, MODEL, IDS, cfg))
    told = r"^attn.k \(1, 2, 3, 24\) has 24 channels, and nvfp4 shares one scale over 16: take fp8"
    with pytest.raises(InputError, match=told):
        named["attn.k"](draw(1, 2, 3, 24))


def test_keys_and_values_of_scanned_layers_are_refused():
    def f(p, x):
        def layer(h, w):
            return jnp.tanh(checkpoint_name(h @ w, "attn.k")), None

        return lax.scan(layer, x, p["w"])[0]

    cfg = config(kv="fp8", kind="attention")
    stats = jqx.calibrate(f, {"w": draw(3, K, K)}, [draw(2, K)], cfg)
    assert stats.get("attn.k", "amax").shape == (3,)
    told = r"^attn.k has statistics of \(3,\) layers that one scan runs: .* Unroll the layers"
    with pytest.raises(InputError, match=told):
        jqx.kv_rounding(cfg, stats)
