# SPDX-License-Identifier: Apache-2.0
"""Layouts: the arrays of a quantized linear, and the two descriptions."""

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqx.algorithms.table import variant_of
from jqx.config import INPUT_FORMATS, KV_FORMATS, VARIANTS, Choice, resolve
from jqx.formats import FORMATS, find_format
from jqx.recipes import RECIPES
from jqx.tensors import QTensor
from jqx_interop.checkpoints import dtype_name
from jqx_interop.targets import TARGETS, find_algo, input_factor, low_rank_factors
from jqx_interop.targets.layout import gathered
from jqx_interop.targets.modelopt import ALGOS, KV_ALGOS, STORED_AS, VARIANT_ALGOS, summarise

TARGET = TARGETS["modelopt"]
DESCRIBE = TARGET.files["hf_quant_config.json"]

# --- arrays

SCALES = {  # what stands beside `weight` for a weight [256, 384]
    "fp8": ("F8_E4M3", (256, 384), "F32", ()),
    "fp8_channel": ("F8_E4M3", (256, 384), "F32", (256,)),
    "fp8_block": ("F8_E4M3", (256, 384), "F32", (2, 1, 3, 1)),
    "int8": ("I8", (256, 384), "F32", (256,)),
    "int4": ("U8", (128, 384), "F32", (256, 3)),
    "int4_b64": ("U8", (128, 384), "F32", (256, 6)),
    "int4_fp8": ("U8", (128, 384), "F32", (256, 3)),
    "nvfp4": ("U8", (256, 192), "F8_E4M3", (256, 24)),
    "nvfp4_46": ("U8", (256, 192), "F8_E4M3", (256, 24)),
    "nvfp4_b32": ("U8", (256, 192), "F8_E4M3", (256, 12)),
    "nvfp4_b32_fp8": ("U8", (256, 192), "F8_E4M3", (256, 12)),
    "mxfp4": ("U8", (256, 192), "U8", (256, 12)),
    "mxfp8": ("F8_E4M3", (256, 384), "U8", (256, 12)),
}


@pytest.mark.parametrize("has_input_scale", [False, True])
@pytest.mark.parametrize("name", SCALES)
def test_the_arrays_of_a_linear(name: str, has_input_scale: bool):
    shape = (256, 384)
    dtype, size, scale_dtype, scale_size = SCALES[name]
    expected = [("weight", dtype, size), ("weight_scale", scale_dtype, scale_size)]
    expected += [("input_scale", "F32", ())] * has_input_scale
    expected += [("weight_scale_2", "F32", ())] * (find_format(name).tensor_bound is not None)
    promised = TARGET.outputs(
        "a.b", Choice(weight=name), shape, np.dtype(jnp.bfloat16), has_input_scale
    )
    assert [(t.name, t.dtype, t.shape) for t in promised] == [
        (f"a.b.{n}", d, s) for n, d, s in expected
    ]
    q = QTensor.quantize(jnp.ones(shape, jnp.bfloat16), find_format(name))
    q = QTensor(
        *(q.codes, q.scale, q.tensor_scale),
        input_scale=jnp.float32(2) if has_input_scale else None,
        format=q.format,
        dtype=q.dtype,
    )
    arrays = TARGET.named("a.b", q)
    assert [(n, dtype_name(np.dtype(a.dtype)), a.shape) for n, a in arrays.items()] == [
        (t.name, t.dtype, t.shape) for t in promised
    ]


def test_the_arrays_of_a_linear_with_more_beside_its_codes():
    shape, dtype = (64, 32), np.dtype(jnp.float16)
    q = QTensor.quantize(jnp.ones(shape, jnp.float16), "nvfp4")
    factors = jnp.ones((64, 5), jnp.float16), jnp.ones((5, 32), jnp.float16)
    q = q.replace(pre_quant_scale=jnp.ones(32, jnp.float16), low_rank=factors)
    arrays = TARGET.named("a.b", q)
    more = [input_factor("a.b", shape, dtype), *low_rank_factors("a.b", shape, 5, dtype)]
    expected = [
        ("a.b.pre_quant_scale", "F16", (32,)),
        ("a.b.weight_quantizer._svdquant_lora_a", "F16", (5, 32)),
        ("a.b.weight_quantizer._svdquant_lora_b", "F16", (64, 5)),
    ]
    assert [(t.name, t.dtype, t.shape) for t in more] == expected
    last = list(arrays.items())[-3:]
    assert [(n, dtype_name(np.dtype(a.dtype)), a.shape) for n, a in last] == expected
    leaves = {name.removeprefix("a.b."): np.asarray(a) for name, a in arrays.items()}
    again = gathered(leaves, Choice(weight="nvfp4"), shape, dtype)
    assert jax.tree.structure(again) == jax.tree.structure(q)
    for mine, its in zip(jax.tree.leaves(again), jax.tree.leaves(q), strict=True):
        np.testing.assert_array_equal(mine, its)


def test_every_format_of_a_weight_has_a_layout():
    described = {*STORED_AS, *(weight for weight, _ in ALGOS)}
    assert described <= set(FORMATS)
    assert set(STORED_AS.values()) < {weight for weight, _ in ALGOS}
    alone = {
        "int8_tensor",
        "mxfp6",
        "mxint8",
        "nf4",
        "nf4_double",
    }  # of inputs, or for arithmetic alone
    assert set(FORMATS) - described == alone
    assert {name for _, name in ALGOS} <= {None, *INPUT_FORMATS}
    assert {v for *_, v in VARIANT_ALGOS} < set(VARIANTS)
    assert {pair[:2] for pair in VARIANT_ALGOS} < set(ALGOS)
    assert set(KV_ALGOS) == set(KV_FORMATS)


NO_LAYOUT = ("mxfp6", "mxint8")
LINEARS = ("mlp.up_proj", "mlp.experts.0.up_proj")


@pytest.mark.parametrize("row", RECIPES.values(), ids=RECIPES.keys())
def test_every_recipe_can_be_described(row):
    found = (resolve(row.config, f"model.layers.0.{n}.weight", "linear") for n in LINEARS)
    choice = next(c for c in found if c.weight is not None)
    fmt = find_format(choice.weight)
    choice = replace(choice, variant=variant_of(row.config.steps, fmt))
    assert TARGET.supports(choice) == (row.name not in NO_LAYOUT)


NAMES = {
    ("int4_fp8", "fp8", None): "W4A8_AWQ",
    ("int4_fp8", "fp8", "awq"): "W4A8_AWQ",
    ("int4", None, "awq"): "W4A16_AWQ",
    ("int4", None, None): "W4A16_AWQ",
    ("int8", "int8", "smooth"): "W8A8_SQ_PER_CHANNEL",
    ("int8", "int8", None): "W8A8_SQ_PER_CHANNEL",
    ("nvfp4", "nvfp4", None): "NVFP4",
    ("nvfp4_46", "nvfp4", None): "NVFP4",
    ("nvfp4", "nvfp4", "awq"): "NVFP4_AWQ",
    ("nvfp4_46", "nvfp4", "awq"): "NVFP4_AWQ",
    ("nvfp4", "nvfp4", "svd"): "NVFP4_SVD",
    ("nvfp4", "nvfp4", "smooth"): None,
    ("fp8", "fp8", "awq"): None,
    ("int4", None, "svd"): None,
    ("int8", "int8", "svd"): None,
}


@pytest.mark.parametrize(("formats", "name"), NAMES.items(), ids=map(str, NAMES))
def test_names_with_what_lies_beside_the_codes(formats, name):
    weight, inputs, variant = formats
    row = find_algo(Choice(weight=weight, input=inputs, variant=variant))
    assert (row and row.quant_algo) == name


def test_pairs_without_a_name_are_not_supported():
    assert not TARGET.supports(Choice(weight="int4", input="int8"))
    assert not TARGET.supports(Choice(weight="fp8"))
    assert TARGET.supports(Choice(weight="int4_b64"))
    assert not TARGET.supports(Choice())


# --- names left alone


def test_patterns_are_the_shortest():
    left = ["model.embed_tokens", "lm_head"]
    attention = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"]
    mlp = [f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")]
    assert summarise(left, [*attention, *mlp]) == ["lm_head", "model.embed_tokens"]
    assert summarise([*left, *attention], mlp) == [
        *("lm_head", "model.embed_tokens"),
        *("model.layers.0.self_attn*", "model.layers.1.self_attn*"),
    ]
    assert summarise(["a.b.c"], ["a.x"]) == ["a.b*"]
    assert summarise(["a.b.c"], ["a.bb.c"]) == ["a.b.*"]
    assert summarise(["a.1.x", "a.1.y"], ["a.10.x"]) == ["a.1.*"]
    assert summarise(["a.b"], ["a.b.c"]) == ["a.b"]
    assert summarise(["a.b"], []) == ["a*"]
    assert summarise([], ["a"]) == []


PATHS = st.lists(
    st.lists(st.sampled_from(["a", "b", "ab", "1", "10"]), min_size=1, max_size=4).map(".".join),
    max_size=8,
    unique=True,
)


@given(paths=PATHS, cut=st.integers(0, 8))
def test_patterns_cover_what_is_left_and_nothing_else(paths: list[str], cut: int):
    left, quantized = paths[:cut], paths[cut:]
    patterns = summarise(left, quantized)
    assert patterns == sorted(set(patterns))
    for name in left:
        assert any(fnmatchcase(name, pattern) for pattern in patterns)
    for name in quantized:
        assert not any(fnmatchcase(name, pattern) for pattern in patterns)


# --- descriptions


def test_one_format():
    choices = {
        "a.q": Choice(weight="nvfp4", input="nvfp4"),
        "a.k": Choice(weight="nvfp4", input="nvfp4"),
    }
    described = DESCRIBE(choices, ["lm_head"], "fp8")
    quantization = described["quantization"]
    assert described["producer"] == {"name": "modelopt", "version": "0.47.0"}
    assert list(quantization.items()) == [
        *(("quant_algo", "NVFP4"), ("kv_cache_quant_algo", "FP8"), ("group_size", 16)),
        ("exclude_modules", ["lm_head"]),
    ]
    config = TARGET.quantization_config(choices, ["lm_head"], "fp8")
    side = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    assert list(config) == [
        *("config_groups", "ignore", "quant_algo", "kv_cache_scheme", "producer", "quant_method")
    ]
    assert config["config_groups"] == {
        "group_0": {"input_activations": side, "weights": side, "targets": ["Linear"]}
    }
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}


def test_another_block_size_is_described():
    described = DESCRIBE({"a": Choice(weight="int4_b64")}, [], None)["quantization"]
    assert described["group_size"] == 64
    assert described["has_zero_point"] is False
    assert described["pre_quant_scale"] is True


def test_keys_and_values_by_name():
    for kv, name in (("nvfp4", "NVFP4"), ("nvfp4_affine", "NVFP4_AFFINE"), ("nvfp4_cast", "NVFP4")):
        config = TARGET.quantization_config({"a": Choice(weight="fp8", input="fp8")}, [], kv)
        assert config["kv_cache_scheme"] == name
    plain = TARGET.quantization_config({"a": Choice(weight="fp8", input="fp8")}, [], None)
    assert "kv_cache_scheme" not in plain


def test_a_description_can_be_changed_without_changing_the_next():
    choices = {"a": Choice(weight="fp8", input="fp8")}
    first = TARGET.quantization_config(choices, [], "fp8")
    expected = json.dumps(first)
    first["producer"].clear()
    first["kv_cache_scheme"].clear()
    first["config_groups"]["group_0"]["weights"].clear()
    first["config_groups"]["group_0"]["input_activations"].clear()
    assert json.dumps(TARGET.quantization_config(choices, [], "fp8")) == expected


FACTORS = {"has_zero_point": False, "pre_quant_scale": True}


def test_factors_are_described():
    """Beside the block in one file; in a group only where the name of the format has one alone."""
    for variant, alone in (("awq", False), ("svd", True)):
        choices = {"a": Choice(weight="nvfp4", input="nvfp4", variant=variant)}
        said = DESCRIBE(choices, [], None)["quantization"]
        assert {key: said.get(key) for key in ("group_size", *FACTORS)} == FACTORS | {
            "group_size": 16
        }
        config = TARGET.quantization_config(choices, [], None)
        assert ("config_groups" in config) == alone
    assert FACTORS.items() <= config["config_groups"]["group_0"].items()


def test_groups_of_mixed_formats():
    """The block is repeated for inputs that have none, as the reference tool does for W4A8."""
    choices = {"a": Choice(weight="int4_fp8", input="fp8"), "b": Choice(weight="fp8", input="fp8")}
    first, second = TARGET.quantization_config(choices, [], None)["config_groups"].values()
    assert first["input_activations"]["group_size"] == first["weights"]["group_size"] == 128
    assert "group_size" not in second["input_activations"]


def test_mixed_formats_are_described_as_the_reference_tool_does(shared: Path):
    rows = {
        "FP8": Choice(weight="fp8", input="fp8"),
        "NVFP4": Choice(weight="nvfp4", input="nvfp4"),
        "W4A8_AWQ": Choice(weight="int4_fp8", input="fp8"),
    }
    for name in ("mixed_fp8_nvfp4", "mixed_fp8_w4a8"):
        folder = shared / "golden" / name
        want = json.loads((folder / "hf_quant_config.json").read_text())
        choices = {
            path: rows[layer["quant_algo"]]
            for path, layer in want["quantization"]["quantized_layers"].items()
        }
        assert json.dumps(DESCRIBE(choices, ["lm_head"], None)) == json.dumps(want)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        described = TARGET.quantization_config(choices, ["lm_head"], None)
        assert json.dumps(described) == json.dumps(config)
