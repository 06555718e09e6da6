# SPDX-License-Identifier: Apache-2.0
"""What a quantized checkpoint says wrongly of itself is told in one line that names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import DOWN, INT4, MIXED, MXFP8, NVFP4, described, inline, refused
from exports import Export

import jqx_interop as ji

FOREIGN = {
    "hqq": {"quant_method": "hqq", "bits": 4, "group_size": 128},
    "quark": {"quant_method": "quark", "bits": 4, "zero_point": True},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    None: {"bits": 4},
}


@pytest.mark.parametrize(("method", "said"), FOREIGN.items(), ids=map(str, FOREIGN))
def test_other_methods(copy, method: str | None, said: dict):
    folder = copy(INT4)
    (folder / "hf_quant_config.json").unlink()
    inline(folder, said)
    known = (f"unknown quant_method {method!r}",)
    saying = known if method else ("its quantization_config names no quant_method",)
    refused(folder, saying, opened=True)


UNKNOWN = {
    "NVFP5": ("unknown quant_algo 'NVFP5'", "did you mean", "NVFP4"),
    "MXINT8": ("unknown quant_algo 'MXINT8'", "MXFP8"),
    "FP8_PB_REAL": ("'FP8_PB_REAL' is known but not read", "read are FP8"),
}


@pytest.mark.parametrize(("algo", "saying"), UNKNOWN.items(), ids=UNKNOWN.keys())
def test_algorithms(copy, algo: str, saying: tuple[str, ...]):
    folder = copy(NVFP4)
    described(folder, quant_algo=algo)
    refused(folder, saying, opened=True)
    shutil.rmtree(folder)
    folder = copy(MIXED)
    said = json.loads((folder / "hf_quant_config.json").read_text())
    said["quantization"]["quantized_layers"][DOWN] = {"quant_algo": algo}
    (folder / "hf_quant_config.json").write_text(json.dumps(said))
    refused(folder, saying, opened=True)


SAID: dict[str, tuple[Export, Callable[[Path], object], tuple[str, ...]]] = {
    "two names": (
        NVFP4,
        lambda f: inline(f, {"quant_method": "modelopt", "quant_algo": "FP8"}),
        ("hf_quant_config.json says quant_algo NVFP4", "config.json says FP8"),
    ),
    "two caches": (
        NVFP4,
        lambda f: inline(
            f, {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": "NVFP4"}
        ),
        ("KV cache NVFP4_AFFINE", "config.json says NVFP4"),
    ),
    "not JSON": (
        NVFP4,
        lambda f: (f / "hf_quant_config.json").write_text("{"),
        ("hf_quant_config.json is not JSON",),
    ),
    "nested without end": (
        NVFP4,
        lambda f: (f / "hf_quant_config.json").write_text("[" * 100_000),
        ("hf_quant_config.json is not JSON",),
    ),
    "not an object": (
        NVFP4,
        lambda f: (f / "hf_quant_config.json").write_text("[]"),
        ("hf_quant_config.json holds a list",),
    ),
    "an algorithm that is no name": (
        NVFP4,
        lambda f: described(f, quant_algo=4),
        ("quant_algo is 4, not a name",),
    ),
    "patterns that are none": (
        NVFP4,
        lambda f: described(f, exclude_modules={"lm_head": True}),
        ("left alone is no list of names",),
    ),
    "blocks of no size": (
        NVFP4,
        lambda f: described(f, group_size="16"),
        ("group_size is '16', not a positive",),
    ),
    "blocks of another size": (
        INT4,
        lambda f: described(f, group_size=64),
        ("q_proj.weight_scale has shape (128, 1), it should have (128, 2)", "10 more"),
    ),
    "blocks that do not divide": (
        INT4,
        lambda f: described(f, group_size=96),
        ("q_proj", "96 values", "128"),
    ),
    "blocks that no input has": (
        NVFP4,
        lambda f: described(f, group_size=32),
        ("NVFP4 with 32 values to a scale", "is not read"),
    ),
    "zero points": (INT4, lambda f: described(f, has_zero_point=True), ("zero points",)),
    "a cache of another name": (
        NVFP4,
        lambda f: described(f, kv_cache_quant_algo="INT8", kv_cache_scheme="INT8"),
        ("unknown kv_cache_quant_algo 'INT8'", "FP8"),
    ),
    "a cache without its means": (
        MXFP8,
        lambda f: described(f, kv_cache_quant_algo="NVFP4_AFFINE", kv_cache_scheme="NVFP4_AFFINE"),
        ("called NVFP4_AFFINE, and no scales are stored",),
    ),
    "a cache of an odd scheme": (
        MXFP8,
        lambda f: described(f, kv_cache_scheme={"type": "float", "num_bits": 6}),
        ("kv_cache_scheme has type 'float' and num_bits 6",),
    ),
    "a layer that is none": (
        MIXED,
        lambda f: described(
            f, quantized_layers={"model.layers.0.mlp.router": {"quant_algo": "FP8"}}
        ),
        ("model.layers.0.mlp.router is described as quantized and is no linear",),
    ),
    "a layer without an algorithm": (
        MIXED,
        lambda f: described(f, quantized_layers={DOWN: {"group_size": 16}}),
        ("no quant_algo for", DOWN),
    ),
    "float64": (
        NVFP4,
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace("bfloat16", "float64")
        ),
        ("a model in F64", "BF16, F16, F32"),
    ),
    "an unknown architecture": (
        NVFP4,
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('"llama"', '"lama"')
        ),
        ("'lama'", "llama"),
    ),
}


@pytest.mark.parametrize(("row", "damage", "saying"), SAID.values(), ids=SAID.keys())
def test_descriptions(copy, row: Export, damage: Callable, saying: tuple[str, ...]):
    folder = copy(row)
    damage(folder)
    refused(folder, saying, opened=True)


def test_an_export_with_one_description_is_a_source(copy):
    folder = copy(INT4)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    done = ji.ptq(folder, folder.with_name("out"), "mxfp8")
    assert done.coverage.source == "ModelOpt W4A16_AWQ"
