# SPDX-License-Identifier: Apache-2.0
"""compress: patterns choose which of the selected weights are stored; their inputs are calibrated
afterwards, on the stored weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import IDS, LAYOUTS, MODEL, apply, config, draw, model, params_of, same

import jqx
from jqx import InputError, QTensor, QuantConfig, Rule
from jqx.tensors.paths import named_leaves

WIDTH = 64
LAYERS = {
    f"layers_{i}": {
        "mlp": {"up": draw(WIDTH, WIDTH, seed=i), "down": draw(WIDTH, WIDTH, seed=i + 2)},
        "attn": {"q": draw(WIDTH, WIDTH, seed=i + 4)},
    }
    for i in range(2)
}
PARAMS = {**LAYERS, "lm_head": draw(WIDTH, 24), "odd": draw(20, 8)}
BATCHES = [draw(6, WIDTH, seed=i) * 3 for i in range(3)]
FORMATS = ("fp8", "nvfp4", "int8")
"""Formats whose inputs have a stored scale."""


def net(p, x):
    for name in ("layers_0", "layers_1"):
        layer = p[name]
        x = x + jnp.tanh(x @ layer["attn"]["q"])
        x = x + jax.nn.relu(x @ layer["mlp"]["up"]) @ layer["mlp"]["down"]
    return (x[:, :20] @ p["odd"]), x @ p["lm_head"]


def stored_in(tree):
    """The paths of the QTensors."""
    leaves = named_leaves(tree, lambda x: isinstance(x, QTensor))
    return {path for path, x in leaves if isinstance(x, QTensor)}


MLP = {f"layers_{i}.mlp.{name}" for i in (0, 1) for name in ("up", "down")}
EVERY = MLP | {"layers_0.attn.q", "layers_1.attn.q"}
PICKED = {
    "all": (None, EVERY),
    "all, said": ({"*": True}, EVERY),
    "some": ({"*mlp*": True}, MLP),
    "a module with slashes": ({"layers_1/mlp": True}, {p for p in MLP if "_1" in p}),
    "the last one wins": (
        {"*": True, "*mlp*": False, "*.up": True},
        EVERY - {"layers_0.mlp.down", "layers_1.mlp.down"},
    ),
    "also in the other order": ({"*.up": True, "*mlp*": False, "*attn*": True}, EVERY - MLP),
    "what is left anyway may be left": ({"*": True, "lm_head": False, "odd": False}, EVERY),
}


@pytest.mark.parametrize(("patterns", "want"), PICKED.values(), ids=PICKED)
def test_patterns_choose_among_what_the_configuration_selects(patterns, want):
    """ "odd" fits no block of NVFP4: it would be refused if it were asked for."""
    cfg = config(
        Rule(weight="int8", kind="linear"),
        Rule(path_glob="lm_head", weight=None),
        Rule(path_glob="odd", weight=None),
    )
    got = jqx.compress(PARAMS, patterns, config=cfg, axes=-2)
    assert stored_in(got) == want
    whole = jqx.quantize(PARAMS, cfg, axes=-2)
    for (path, x), (_, y), (_, z) in zip(
        *(named_leaves(t, lambda x: isinstance(x, QTensor)) for t in (got, PARAMS, whole)),
        strict=True,
    ):
        if path in want:
            same(x, z)
        else:
            assert x is y


def test_what_is_left_out_need_not_fit():
    cfg = config(weight="nvfp4", kind="linear")
    assert stored_in(jqx.compress(PARAMS, {"*mlp*": True}, config=cfg, axes=-2)) == MLP
    with pytest.raises(InputError, match=r"^odd \(20, 8\) has 20 inputs"):
        jqx.compress(PARAMS, config=cfg, axes=-2)


REFUSED = {
    "nothing": ({"*mpl*": True}, r"^the pattern '\*mpl\*' matches no parameter to which the conf"),
    "no": ({"*": True, "lm_hed": False}, r"^the pattern 'lm_hed' matches no parameter that prod"),
    "left by the recipe": (
        {"lm_head": True},
        "^the pattern 'lm_head' matches no parameter to which",
    ),
    "all of it": ({"*": False}, r"^patterns \{'\*': False\} leave none of the 7 parameters"),
    "none": ({}, r"^patterns \{\} leave none of the 7 parameters"),
    "a list": (["*mlp*"], r'^patterns is a list: give globs and whether .* \{"\*mlp\*": True\}'),
    "a number": ({"*mlp*": 1}, r"^'\*mlp\*': 1 is no pattern: give a glob and True or False"),
    "no name": ({3: True}, "^3: True is no pattern"),
}


@pytest.mark.parametrize(("patterns", "message"), REFUSED.values(), ids=REFUSED)
def test_patterns_that_are_none(patterns, message):
    with pytest.raises(InputError, match=message) as caught:
        jqx.compress(PARAMS, patterns, config="int8_weight_only", axes=-2)
    assert "\n" not in str(caught.value)


def test_what_else_is_refused():
    with pytest.raises(InputError, match="^compress stores the largest magnitudes, and awq_lite"):
        jqx.compress(PARAMS, config="int4_awq", axes=-2)
    misspelt = config(Rule(weight="int8"), Rule(path_glob="layer_0", weight=None))
    with pytest.raises(InputError, match="^The rule for 'layer_0' matches nothing; the nearest"):
        jqx.compress(PARAMS, {"*mlp*": True}, config=misspelt, axes=-2)
    with pytest.raises(InputError, match="^Along which axes weights are contracted is read from"):
        jqx.compress(PARAMS, config="int8")
    q = jqx.compress(PARAMS, {"*.up": True}, config="int8_weight_only", axes=-2)
    with pytest.raises(InputError, match="^layers_0.mlp.up is quantized already, to int8 and not"):
        jqx.compress(q, {"*mlp*": True}, config="w4a16_nvfp4", axes=-2)


# --- inputs, afterwards


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_are_calibrated_on_stored_weights(name):
    cfg = config(weight=name, input=name, path_glob="layers_*")
    q = jqx.compress(PARAMS, config=cfg, axes=-2)
    first = q["layers_0"]["mlp"]["up"]
    assert (first.input_format, first.input_scale) == (name, None)
    stats = jqx.calibrate(net, q, BATCHES, cfg)
    dense = jqx.dequantize(q)
    by_hand = jqx.calibrate(net, dense, BATCHES, cfg)
    other = jqx.calibrate(net, PARAMS, BATCHES, cfg)
    assert stats.meta == by_hand.meta
    assert set(stats.entries) == EVERY
    for path in EVERY:
        np.testing.assert_array_equal(stats.get(path, "amax"), by_hand.get(path, "amax"))
    assert any(stats.get(p, "amax") != other.get(p, "amax") for p in EVERY)
    done = jqx.quantize(q, cfg, stats)
    straight = jqx.quantize(PARAMS, cfg, by_hand)
    same(done, straight)
    out, want = (jax.jit(jqx.quantized(net))(p, BATCHES[0]) for p in (done, straight))
    np.testing.assert_array_equal(out[1], want[1])


def test_with_statistics_inputs_have_their_scales_at_once():
    stats = jqx.calibrate(net, PARAMS, BATCHES, "fp8")
    got = jqx.compress(PARAMS, {"*mlp*": True}, config="fp8", stats=stats)
    want = jqx.quantize(PARAMS, "fp8", stats)
    same(got["layers_0"]["mlp"], want["layers_0"]["mlp"])
    assert got["layers_0"]["attn"]["q"] is PARAMS["layers_0"]["attn"]["q"]


def test_stored_weights_keep_their_codes_and_get_new_scales_of_inputs():
    cfg = config(weight="fp8", input="fp8", path_glob="layers_0")
    q = jqx.quantize(PARAMS, cfg, jqx.calibrate(net, PARAMS, BATCHES, cfg))
    louder = jqx.calibrate(net, q, [b * 2 for b in BATCHES], cfg)
    again = jqx.quantize(q, cfg, louder)["layers_0"]["attn"]["q"]
    before = q["layers_0"]["attn"]["q"]
    assert again.codes is before.codes
    np.testing.assert_array_equal(again.input_scale, before.input_scale * 2)
    plain = QuantConfig(rules=cfg.rules, algorithm=None)  # which gives no scales
    same(jqx.quantize(q, plain, axes=-2), q)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["int4_b16", "nf4_double_b16"])
def test_every_layout_and_double_quantization(layout, name):
    params, batch = params_of(layout), draw(*layout.batch)
    cfg = config(weight=name, input="fp8")
    axes = jqx.axes(apply(layout), params, batch)
    q = jqx.compress(params, {"layer/w": True}, config=cfg, axes=axes)
    same(q, jqx.quantize(params, QuantConfig(rules=cfg.rules, algorithm=None), axes=axes))
    stats = jqx.calibrate(apply(layout), q, [batch], cfg)
    want = jqx.calibrate(apply(layout), jqx.dequantize(q), [batch], cfg)
    np.testing.assert_allclose(stats.get("layer.w", "amax"), want.get("layer.w", "amax"), rtol=1e-6)
    done = jqx.quantize(q, cfg, stats)["layer"]["w"]
    assert done.input_scale.shape == tuple(done.shape[a] for a in done.stack)


def test_a_model_of_many_constructs():
    cfg = config(weight="int8", input="int8", kind="linear")
    q = jqx.compress(MODEL, config=cfg, axes=jqx.axes(model, MODEL, IDS[0]))
    stats = jqx.calibrate(model, q, IDS, cfg)
    want = jqx.calibrate(model, jqx.dequantize(q), IDS, cfg)
    assert set(stats.entries) == set(want.entries)
    for path in want.entries:
        np.testing.assert_allclose(stats.get(path, "amax"), want.get(path, "amax"), rtol=1e-6)


def test_scales_of_inputs_lie_where_the_codes_do():
    device = jax.devices()[0]
    cfg = config(weight="int8", input="int8")
    params = {"w": jax.device_put(draw(WIDTH, WIDTH), device)}
    f = lambda p, x: x @ p["w"]  # noqa: E731
    q = jqx.compress(params, config=cfg, axes=-2)
    done = jqx.quantize(q, cfg, jqx.calibrate(f, q, BATCHES, cfg))["w"]
    assert done.input_scale.committed
    assert done.input_scale.devices() == done.codes.devices()
