# SPDX-License-Identifier: Apache-2.0
"""The layout of compressed-tensors: its arrays against what the package makes, and the descriptions
of others.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jqx
from jqx.config import Choice
from jqx.errors import InputError
from jqx.tensors import QTensor
from jqx_interop.checkpoints import dtype_name
from jqx_interop.targets import METHOD, TARGETS, ct_config, ct_layout
from jqx_interop.targets.ct_schemes import SCHEMES, find_scheme
from jqx_interop.targets.modelopt import ALGOS

CT = TARGETS[METHOD]
GOLDEN = dict(np.load(Path(__file__).with_name("golden") / "compressed.npz"))
BF16 = np.dtype(ml_dtypes.bfloat16)


def bits(x):
    return np.asarray(x).tobytes()


def choice_of(weight, given=None):
    return Choice(weight=weight, input=given)


# --- arrays


FOREIGN = {
    "int4 group": ("int4_b32", None),
    "int4 channel": ("int4_b256", None),
    "int8 packed": ("int8", None),
    "int8": ("int8", "int8_token"),
    "fp8": ("fp8", "fp8"),
    "fp8 channel": ("fp8_channel", "fp8_token"),
    "fp8 block": ("fp8_block", None),
    "nvfp4": ("nvfp4", None),
    "mxfp4": ("mxfp4", None),
    "mxfp8": ("mxfp8", "mxfp8"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_arrays_of_the_package_mean_what_it_decompresses(case):
    given = {k.split("|")[1]: a for k, a in GOLDEN.items() if k.startswith(case + "|")}
    decoded, choice = given.pop("decoded"), choice_of(*FOREIGN[case])
    for leaf in {"weight", "weight_scale" if case == "nvfp4" else "weight"} & set(given):
        if given[leaf].dtype == np.uint8:
            given[leaf] = given[leaf].view(ml_dtypes.float8_e4m3fn)
    q = CT.gathered(given, choice, decoded.shape, np.dtype("f4"))
    mine = np.asarray(jax.jit(lambda q: q.decode(jnp.float32))(q))
    # the package decodes NVFP4 in bfloat16
    np.testing.assert_allclose(mine, decoded, rtol=2.0**-7 if case == "nvfp4" else 0, atol=0)
    again = {name.removeprefix("a."): array for name, array in CT.named("a", q).items()}
    assert {k: bits(a) for k, a in again.items()} == {k: bits(a) for k, a in given.items()}
    promised = {t.name: (t.dtype, t.shape) for t in CT.outputs("a", choice, q.shape, BF16, False)}
    found = {n: (dtype_name(np.asarray(a).dtype), a.shape) for n, a in CT.named("a", q).items()}
    assert found == promised


SHIFTED = {"int4 zeros": "int4_b32", "int8 zeros": "int8"}


@pytest.mark.parametrize("case", SHIFTED)
def test_zero_points_are_a_part_of_low_rank(case):
    given = {k.split("|")[1]: a for k, a in GOLDEN.items() if k.startswith(case + "|")}
    decoded, choice = given.pop("decoded"), choice_of(SHIFTED[case])
    (promised,) = CT.beside("a", choice, decoded.shape)
    zeros = given["weight_zero_point"]
    assert (promised.name, promised.shape) == ("a.weight_zero_point", zeros.shape)
    assert CT.shifted(given)
    q = jax.tree.map(jnp.asarray, CT.gathered(given, choice, decoded.shape, np.dtype("f4")))
    outer, inner = q.low_rank
    found, step = q.decode(jnp.float32) + outer @ inner, float(np.max(np.abs(outer)))
    np.testing.assert_allclose(found, decoded, rtol=0, atol=step * 2.0**-22)  # of two roundings
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    out = jax.jit(jqx.quantized(lambda p, x: x @ p["w"].T))({"w": q}, x)
    np.testing.assert_allclose(out, x @ decoded.T, rtol=1e-5, atol=1e-4)


def test_every_case_of_the_package_is_looked_at():
    assert {key.split("|")[0] for key in GOLDEN} == {*FOREIGN, *SHIFTED}


@pytest.mark.parametrize(("name", "given_input"), SCHEMES)
def test_a_matrix_comes_back(name, given_input):
    w = np.random.default_rng(1).standard_normal((256, 384)).astype(np.float32)
    q = jax.device_get(QTensor.quantize(jnp.asarray(w), name))
    static = choice_of(name, given_input).static_input
    scale = np.float32(0.3) if static else None
    q = q.replace(input_format=given_input, input_scale=scale)
    named = CT.named("a.b", q)
    promised = CT.outputs("a.b", choice_of(name, given_input), q.shape, q.dtype, static)
    assert [(t.name, t.shape) for t in promised] == [(n, np.shape(a)) for n, a in named.items()]
    leaves = {n.removeprefix("a.b."): np.asarray(a) for n, a in named.items()}
    assert set(leaves) <= set(CT.leaves)
    again = CT.gathered(leaves, choice_of(name, given_input), q.shape, q.dtype)
    assert jax.tree.structure(again) == jax.tree.structure(q)
    for mine, its in zip(jax.tree.leaves(again), jax.tree.leaves(q), strict=True):
        np.testing.assert_allclose(np.float32(mine), np.float32(its), rtol=2.0**-23, atol=0)
    np.testing.assert_array_equal(again.codes, q.codes)
    np.testing.assert_array_equal(again.scale, q.scale)


@settings(max_examples=300, deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from(["weight_scale_2", "input_scale"]))
@example(float(np.nextafter(np.float32(1.9), np.float32(2))), "weight_scale_2")
def test_scales_come_back_with_what_is_noted_both_ways(value, leaf):
    choice, scale = choice_of("nvfp4", "nvfp4"), np.float32([value])
    for of in (ct_layout.RECIPROCALS, {v: k for k, v in ct_layout.RECIPROCALS.items()}):
        mine = leaf if leaf in of else ct_layout.RECIPROCALS[leaf]
        noted = ct_layout.inexact_scales(choice, {mine: scale}, of)
        there = ct_layout.reciprocal(scale)
        back = noted.get(mine, ct_layout.reciprocal(there))
        assert bits(np.float32(back).reshape(1)) == bits(scale)
        # and from there to here nothing need be noted, once the note is there
        rest = {v: k for k, v in of.items()}
        given_both = {of[mine]: there, mine: scale}
        assert ct_layout.inexact_scales(choice, given_both, rest) == {}


def test_schemes_that_layouts_share():
    assert set(ALGOS) - set(SCHEMES) == {
        ("int4_fp8", "fp8"), ("nvfp4_b32", None), ("nvfp4_b32_fp8", "fp8"), ("mxfp4", "fp8"),
    }  # fmt: skip
    assert set(SCHEMES) - set(ALGOS) == {("int8", "int8_token")}
    assert find_scheme(choice_of("nvfp4_b32")) is None
    assert find_scheme(Choice(weight="int4", variant="awq")) is None


# --- descriptions of others


ARGS = {
    "actorder": None, "block_structure": None, "dynamic": False, "group_size": None,
    "num_bits": 4, "observer": "mse", "observer_kwargs": {}, "scale_dtype": None,
    "strategy": "group", "symmetric": True, "type": "int", "zp_dtype": None,
}  # fmt: skip


def described(weights, inputs=None, **more):
    group = {"targets": ["Linear"], "weights": ARGS | weights, "output_activations": None}
    group["input_activations"] = None if inputs is None else ARGS | inputs
    base = {"quant_method": METHOD, "format": "pack-quantized", "ignore": ["lm_head"]}
    return {**base, "config_groups": {"group_0": group}, **more}


TENSOR = {"strategy": "tensor"}
INT8, FLOAT8 = {"num_bits": 8}, {"num_bits": 8, "type": "float"}
READ = {
    "W4A16": (described({"group_size": 64}), ("int4_b64", None)),
    "W4A16 with zero points": (
        described({"group_size": 128, "symmetric": False}),
        ("int4", None),
    ),
    "W4A16 ordered": (described({"group_size": 128, "actorder": "weight"}), ("int4", None)),
    "W4A16 rows": (described({"strategy": "channel"}), ("int4_b256", None)),
    "W8A16": (described(INT8 | {"strategy": "channel"}), ("int8", None)),
    "W8A8": (
        described(
            INT8 | {"strategy": "channel"},
            INT8 | {"strategy": "token", "dynamic": True, "observer": None},
        ),
        ("int8", "int8_token"),
    ),
    "FP8": (
        described(FLOAT8 | {"strategy": "tensor"}, FLOAT8 | {"strategy": "tensor"}),
        ("fp8", "fp8"),
    ),
    "FP8 dynamic": (
        described(
            FLOAT8 | {"strategy": "channel"}, FLOAT8 | {"strategy": "token", "dynamic": True}
        ),
        ("fp8_channel", "fp8_token"),
    ),
    "a group of -1": (described(INT8 | {"strategy": "channel", "group_size": -1}), ("int8", None)),
}


@pytest.mark.parametrize(("said", "formats"), READ.values(), ids=READ)
def test_what_others_write_is_understood(said, formats):
    found = ct_config.read_described(said)
    linears = {"model.layers.0.mlp.up_proj": (64, 256), "lm_head": (64, 256)}
    assert ct_config.choices_of(found, linears) == {
        "model.layers.0.mlp.up_proj": choice_of(*formats)
    }


def test_targets_and_what_is_ignored():
    said = described({"group_size": 128}, ignore=["re:.*self_attn.*", "model.layers.1"])
    other = {"targets": ["re:.*down_proj"], "weights": ARGS | INT8 | {"strategy": "channel"}}
    said["config_groups"] = {"group_0": other, "group_1": said["config_groups"]["group_0"]}
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    paths += [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.10.mlp.up_proj",
    ]
    found = ct_config.choices_of(ct_config.read_described(said), dict.fromkeys(paths, (64, 256)))
    assert found == {
        "model.layers.0.mlp.down_proj": choice_of("int8"),
        "model.layers.0.mlp.up_proj": choice_of("int4"),
        "model.layers.10.mlp.up_proj": choice_of("int4"),
    }


def test_a_pattern_is_nearer_than_all_linears():
    said = described({"group_size": 128})
    first = said["config_groups"]["group_0"]
    other = {"targets": ["re:.*down_proj$"], "weights": ARGS | {"group_size": 32}}
    said["config_groups"] = {"group_0": first, "group_1": other}
    paths = dict.fromkeys(("model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"), (64, 256))
    found = ct_config.choices_of(ct_config.read_described(said), paths)
    assert [choice.weight for choice in found.values()] == ["int4_b32", "int4"]


WRONG = {
    "zero points": (
        described(
            INT8 | {"strategy": "channel", "symmetric": False}, INT8 | {"strategy": "tensor"}
        ),
        "weights of group_0 have zero points, which are read for weights in pack-quantized alone",
    ),
    "zero points of inputs": (
        described({"group_size": 128}, INT8 | {"symmetric": False}),
        "input_activations of group_0 have zero points",
    ),
    "ordered": (described({"actorder": "group"}), "columns in another order"),
    "three bits": (described({"num_bits": 3}), "num_bits 3.* no pair of formats"),
    "inputs": (
        described({"group_size": 128}, FLOAT8 | {"strategy": "token"}),
        "no pair of formats",
    ),
    "outputs": (described({}), "quantizes outputs"),
    "sparse": (described({}, sparsity_config={"format": "sparse-24-bitmask"}), "are sparse"),
    "status": (described({}, quantization_status="frozen"), "are frozen, not compressed"),
    "groups": (described({}, config_groups={}), "no config_groups"),
    "no object": (
        described({}, config_groups={"group_0": 3}),
        "group_0 of config_groups",
    ),
    "no weights": (
        described({}, config_groups={"g": {"targets": ["Linear"]}}),
        "quantizes no w",
    ),
    "ignore": (described({"group_size": 128}, ignore="lm_head"), "ignore is no list of names"),
    "pattern": (described({"group_size": 128}, ignore=["re:("]), r"which is no pattern"),
    "cache": (
        described({"group_size": 128}, kv_cache_scheme=INT8),
        "kv_cache_scheme is num_b",
    ),
}
WRONG["outputs"][0]["config_groups"]["group_0"]["output_activations"] = ARGS


@pytest.mark.parametrize(("said", "message"), WRONG.values(), ids=WRONG)
def test_what_others_write_and_is_not_read(said, message):
    with pytest.raises(InputError, match=message) as caught:
        ct_config.read_described(said)
    assert "\n" not in str(caught.value)
