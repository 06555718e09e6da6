# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a configuration, or does not fit the parameters, statistics or axes it is used
with, is one line that names the thing and says what to do.
"""

import jax
import jax.numpy as jnp
import pytest
from devices import run_on_devices
from functions import MLP, OUT, K, N, X, config, draw, mlp, refused

import jqx
from jqx import QuantConfig, Rule

W = Rule(weight="fp8", input="fp8")
STATS = jqx.calibrate(mlp, MLP, [X], "fp8")


# --- configurations

CONFIGS = {
    "recipe": ("fp9", "^unknown format 'fp9'; did you mean fp8, "),
    "weight format": (config(weight="nvfp5"), "^There is no format 'nvfp5'. Did you mean nvfp4"),
    "input format": (
        config(weight="fp8", input="fp9"),
        "^unknown input format 'fp9'; did you .*fp8",
    ),
    "kv format": (config(kv="fp9"), "^unknown KV cache format 'fp9'; did you mean fp8"),
    "kind": (config(weight="fp8", kind="liner"), "^unknown kind of module 'liner'; did .* linear"),
    "algorithm": (QuantConfig(rules=(W,), algorithm="mx"), "^unknown algorithm 'mx'; .* max"),
    "matches nothing": (
        config(W, Rule(path_glob="upp.kernel", weight=None)),
        "^The rule for 'upp.kernel' matches nothing; the nearest paths are up.kernel, ",
    ),
    "no embedding": (
        config(weight="fp8", kind="embedding"),
        r"^The rule for '\*' matches nothing; no parameter is looked up$",
    ),
    "no keys": (
        config(kv="fp8"),
        r"^The rule for '\*' matches nothing; no keys and values have names: .*\"PATH.k\"",
    ),
    "nothing chosen": (
        "nvfp4_mlp_only",
        r"^No parameter gets a format; there are down.kernel, up.kernel\. Add a rule such as Rule",
    ),
    "blocks": (
        config(weight="int4_b32"),
        r"^down.kernel \(16, 32\) has 16 inputs along axis 0, and int4_b32 shares one scale over "
        r"32: take int4_b16, or " + OUT.format("down.kernel"),
    ),
    "blocks of inputs": (
        config(weight="fp8", input="mxfp8"),
        r"^down.kernel \(16, 32\) has 16 inputs along axis 0, and mxfp8 quantizes 32 of them "
        "together: " + OUT.format("down.kernel"),
    ),
    "outputs": (config(weight="fp8", output="fp8"), r"formats of outputs \(fp8\) are not impl"),
}


@pytest.mark.parametrize(("cfg", "message"), CONFIGS.values(), ids=CONFIGS)
def test_configurations(cfg, message):
    """Before anything is computed."""
    refused(lambda: jqx.calibrate(mlp, MLP, [X], cfg), message)
    refused(lambda: jqx.quantize(MLP, cfg, STATS), message)
    refused(lambda: jqx.fake_quantized(mlp, cfg, STATS)(MLP, X), message)


def test_formats_that_a_shape_does_not_take():
    odd = {"w": draw(K, 7)}
    told = r"^w \(32, 7\) has 7 rows, and int4_b32 packs pairs of them: " + OUT.format("w")
    refused(lambda: jqx.quantize(odd, config(weight="int4_b32"), axes=0), told)
    conv = jqx.Axes(shape=(3, K, N), contracted=(0, 1), ops=("conv",))
    told = (
        r"^w \(3, 32, 16\) is the kernel of a convolution, whose inputs have one scale, and nvfp4"
    )
    refused(lambda: jqx.quantize({"w": draw(3, K, N)}, "nvfp4", axes={"w": conv}), told)


def test_an_input_format_without_a_weight_format():
    cfg = config(input="fp8")
    told = "^down.kernel gets the input format fp8 and no weight format, .* use jqx.fake_quantized$"
    refused(lambda: jqx.quantize(MLP, cfg, STATS), told)
    jax.eval_shape(jqx.fake_quantized(mlp, cfg, STATS), MLP, X)


# --- statistics and axes

KNOWN = "inputs in fp8 have a stored scale, which needs statistics"
GIVEN = {
    "neither": ({}, "^Along which axes weights are contracted .*: give stats from jqx.calibrate, "),
    "no statistics": ({"axes": -2}, f"^down.kernel: {KNOWN}: give stats=jqx.calibrate"),
    "of another configuration": (
        {"stats": jqx.calibrate(mlp, MLP, [X], "int8_weight_only")},
        f"^down.kernel: {KNOWN}, and stats have no amax of them: calibrate with this cfg",
    ),
    "no such axis": ({"axes": 2}, r"^axes=2 for down.kernel: .* \(16, 32\) has no axis 2"),
    "an axis twice": ({"axes": {"up.kernel": (0, -2)}}, r"^axes=\(0, -2\) for up.kernel: .* twice"),
    "all axes": ({"axes": {"up.kernel": (0, 1)}}, "^axes=.* for up.kernel: .* has no row axis"),
    "another path": (
        {"axes": {"up.kernl": 0}},
        "^unknown parameter in axes: 'up.kernl'; did you mean up.kernel, ",
    ),
}


@pytest.mark.parametrize(("given", "message"), GIVEN.values(), ids=GIVEN)
def test_statistics_and_axes(given, message):
    refused(lambda: jqx.quantize(MLP, "fp8", **given), message)


def test_statistics_of_another_stack():
    stats = jqx.Stats.of({"w": {"amax": jnp.ones(2)}})
    told = r"^w has members \(3,\) along its stack axes \(0,\), and stats have \(2,\): calibrate"
    refused(lambda: jqx.quantize({"w": draw(3, K, N)}, "fp8", stats, axes=1), told)


def test_statistics_that_are_traced():
    told = f"^down.kernel: {KNOWN} that are known: close over stats, and trace params alone"
    refused(lambda: jax.jit(lambda p, s: jqx.quantize(p, "fp8", s))(MLP, STATS), told)


WRONG_TYPES = """
import jax.numpy as jnp
import jqx
from jqx import QuantConfig, Rule

p, rule = {"w": jnp.ones((32, 16))}, Rule(weight="fp8", input="fp8")
f, x = (lambda p, x: x @ p["w"]), jnp.ones((3, 32))
for give in (
    lambda: jqx.calibrate(f, p, None, "fp8"),
    lambda: jqx.calibrate(f, p, [x], {"rules": [rule]}),
    lambda: jqx.quantize(p, jqx.RECIPES["fp8"], axes=0),
    lambda: jqx.quantize(p, QuantConfig(rules=rule), axes=0),
    lambda: jqx.quantize(p, QuantConfig(rules=("fp8",)), axes=0),
    lambda: jqx.quantize(p, "fp8", {"w": 1.0}),
    lambda: jqx.fake_quantized(f, "fp8", {"w": 1.0}),
    lambda: jqx.kv_rounding("fp8", {"w": 1.0}),
    lambda: jqx.quantize(p, "int8_weight_only", axes="in"),
    lambda: jqx.quantize(p, "int8_weight_only", axes={"w": 0.5}),
):
    try:
        give()
    except jqx.InputError as error:
        print(error)
"""
STATS_TYPE = "stats is a dict: give what jqx.calibrate returns, a jqx.Stats"
AXES_TYPE = "for w: give the axes of (32, 16) that products sum over, an int or a tuple of them, or"


def test_wrong_types_without_a_type_checker():
    told = [
        "batches is a NoneType: give an iterable of batches, [batch] for one",
        "rules is a list of mappings such as {path_glob: '*mlp*', weight: fp8}",
        "Recipe is no configuration: give a QuantConfig, or the name of a recipe",
        "rules is a Rule: give a tuple, rules=(Rule(...),)",
        "'fp8' among the rules is no Rule: write Rule(path_glob=...)",
        *[STATS_TYPE] * 3,
        f"axes='in' {AXES_TYPE}",
        f"axes=0.5 {AXES_TYPE}",
    ]
    lines = run_on_devices(1, WRONG_TYPES).splitlines()
    assert len(lines) == len(told)
    assert all(line.startswith(start) for line, start in zip(lines, told, strict=True)), lines
