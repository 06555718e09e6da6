# SPDX-License-Identifier: Apache-2.0
"""What ModelOpt's dictionaries are made of: the older form, attributes of quantizers, algorithms,
and what is wrong.
"""

from typing import Any

import pytest

from jqx import InputError, QuantConfig
from jqx.config import Algorithm, Choice, resolve
from jqx.formats import find_format
from jqx.modelopt_config import from_modelopt

FP8, NVFP4 = {"num_bits": (4, 3), "axis": None}, {"num_bits": (2, 1)}
NVFP4 = {**NVFP4, "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
OFF = {"quantizer_name": "*", "enable": False}


def said(config: QuantConfig, path: str, kind: str) -> Choice:
    """What is chosen, without what there is none of in modules of this kind."""
    found = resolve(config, path if kind == "attention" else f"{path}.weight", kind)
    if kind == "attention":
        return Choice(kv=found.kv)
    return Choice(weight=found.weight, input=found.input, output=found.output)


def translated(*entries: dict[str, Any], algorithm: Any = "max") -> QuantConfig:
    return from_modelopt({"quant_cfg": list(entries), "algorithm": algorithm})


OLDER = {
    "default": {"enable": False},
    "*weight_quantizer": {"num_bits": (4, 3), "axis": None},
    "*input_quantizer": {"num_bits": 8, "axis": None, "enable": True},
    "nn.Linear": {"*lm_head*": {"enable": False}, "*up_proj.weight_quantizer": NVFP4},
    "nn.Embedding": {"*": {"enable": False}},
    "nn.BatchNorm1d": {"*": {"enable": False}},
}


def test_the_older_form():
    today = [
        OFF,
        {"quantizer_name": "*weight_quantizer", "cfg": FP8},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8}},
        {"quantizer_name": "*lm_head*", "parent_class": "nn.Linear", "enable": False},
        {"quantizer_name": "*up_proj.weight_quantizer", "parent_class": "nn.Linear", "cfg": NVFP4},
        {"quantizer_name": "*", "parent_class": "nn.Embedding", "enable": False},
    ]
    found = from_modelopt({"quant_cfg": OLDER})
    assert found == translated(*today)
    assert said(found, "a.up_proj", "linear") == Choice(weight="nvfp4", input="int8")
    assert said(found, "lm_head", "linear") == Choice()
    pairs = [{key: value} for key, value in OLDER.items()]
    assert from_modelopt({"quant_cfg": pairs}) == found
    assert from_modelopt({"quant_cfg": [OFF, OLDER]}) == found


FORMATS = {
    "fp8_block": {"num_bits": "e4m3", "block_sizes": {-1: 128, -2: 128}},
    "fp8_channel": {"num_bits": [4, 3], "axis": 0},
    "int4_b32": {"num_bits": 4, "block_sizes": {"-1": 32}},
    "nvfp4_b64": {"num_bits": "E2M1", "block_sizes": {-1: 64, "scale_bits": "e4m3"}},
    "nvfp4_46": {
        "num_bits": (2, 1),
        "block_sizes": {-1: 16, "scale_bits": (4, 3), "four_over_six": True},
    },
    "mxfp8": {
        "num_bits": (4, 3),
        "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)},
    },
    "int8": {
        "axis": 0,
        "effective_bits": 8.0,
        "fake_quant": False,
        "trt_high_precision_dtype": "Half",
    },
    "int4_fp8_b64": [{"num_bits": 4, "block_sizes": {-1: 64}}, {"num_bits": (4, 3)}],
}


@pytest.mark.parametrize("name", FORMATS)
def test_attributes_are_formats(name: str):
    found = translated(OFF, {"quantizer_name": "*weight_quantizer", "cfg": FORMATS[name]})
    assert said(found, "a", "linear") == Choice(weight=name)
    assert find_format(name).name == name


def test_algorithms_keep_what_says_what_to_compute():
    how = {"distributed_sync": True, "debug": False, "shared_states": None, "max_co_batch_size": 8}
    lite = {"method": "awq_lite", "alpha_step": 0.1, **how}
    assert translated(OFF, algorithm=lite).algorithm == Algorithm.of("awq_lite", alpha_step=0.1)
    assert translated(OFF, algorithm=[lite, "max"]).steps == (
        Algorithm.of("awq_lite", alpha_step=0.1),
        Algorithm("max"),
    )
    for nothing in (None, {"method": None}):
        assert translated(OFF, algorithm=nothing).algorithm is None
    assert from_modelopt({"quant_cfg": []}).algorithm == "max"
    layerwise = {"method": "max", "layerwise": {"enable": True}}
    assert translated(OFF, algorithm=layerwise).algorithm == Algorithm("max")


WEIGHTS, KEYS = "*weight_quantizer", "*k_bmm_quantizer"


@pytest.mark.parametrize(
    ("data", "phrases"),
    [
        ({"quant_confg": []}, ("'quant_confg'", "quant_cfg")),
        ({"algorithm": "max"}, ("quant_cfg",)),
        ({"quant_cfg": "fp8"}, ("quant_cfg", "list")),
        ({"quant_cfg": ["fp8"]}, ("quant_cfg", "list")),
        ({"quant_cfg": [{"cfg": FP8, "enable": True}]}, ("quantizer_name", "cfg")),
        ({"quant_cfg": [{"quantizer_name": "*", "enabled": False}]}, ("'enabled'", "enable")),
        ({"quant_cfg": [{"quantizer_name": "*", "enable": "no"}]}, ("'*'", "true or false")),
        ({"quant_cfg": [{"quantizer_name": WEIGHTS}]}, (WEIGHTS, "nothing")),
        ({"quant_cfg": [{"quantizer_name": WEIGHTS, "cfg": {}}]}, (WEIGHTS, "nothing")),
        ({"quant_cfg": [{"quantizer_name": WEIGHTS, "cfg": "fp8"}]}, (WEIGHTS, "'fp8'", "mapping")),
        ({"quant_cfg": {"nn.Linear": "fp8"}}, ("nn.Linear", "'fp8'")),
        ({"quant_cfg": {WEIGHTS: {"num_bit": 8}}}, (WEIGHTS, "'num_bit'", "num_bits")),
        (
            {"quant_cfg": {WEIGHTS: {"block_sizes": {-1: 16, "scale_bit": 8}}}},
            (WEIGHTS, "'scale_bit'", "scale_bits"),
        ),
        (
            {"quant_cfg": {WEIGHTS: {"num_bits": (4, 3), "axis": 1}}},
            (WEIGHTS, "axis 1", "nearest", "fp8_channel", "axis 0"),
        ),
        ({"quant_cfg": {WEIGHTS: {"num_bits": (5, 2)}}}, (WEIGHTS, "(5, 2)", "nearest")),
        ({"quant_cfg": {WEIGHTS: {"calibrator": "histogram"}}}, (WEIGHTS, "histogram", "int8")),
        ({"quant_cfg": {WEIGHTS: [FP8, FP8]}}, (WEIGHTS, "fp8 then fp8", "int4 then fp8")),
        ({"quant_cfg": {"*mlp*": {"num_bits": 8, "axis": 0}}}, ("*mlp*", "input format", "axis 0")),
        ({"quant_cfg": {KEYS: FP8}}, ("keys and values", "[kv]_bmm_quantizer")),
        (
            {"quant_cfg": {"*[kv]_bmm_quantizer": {"num_bits": 8}}},
            ("keys and values", "num_bits 8"),
        ),
        ({"quant_cfg": {"*weight_quantzer": FP8}}, ("weight_quantzer", "weight_quantizer")),
        ({"quant_cfg": {"nn.Linaer": {"*": {"enable": False}}}}, ("nn.Linaer", "nn.Linear")),
        ({"quant_cfg": {"nn.Conv2d": {"*": {"enable": False}}}}, ("nn.Conv2d", "paths")),
        ({"quant_cfg": [], "algorithm": 8}, ("algorithm", "8")),
        (
            {
                "quant_cfg": [],
                "algorithm": {
                    "method": "gptq",
                    "layerwise": {"get_qdq_activations_from_prev_layer": True},
                },
            },
            ("get_qdq_activations_from_prev_layer",),
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(data: dict[str, Any], phrases: tuple[str, ...]):
    with pytest.raises(InputError) as caught:
        from_modelopt(data)
    assert "\n" not in str(caught.value)
    for phrase in phrases:
        assert phrase in str(caught.value)
