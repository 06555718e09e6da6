# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the tensors of a quantized checkpoint is told in one line, all at once."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damage import DOWN, INT4, KEYS, MXFP8, NVFP4, add, change, described, number, refused
from exports import Export

import jqx_interop as ji
from jqx_interop.stored import open_model

F32 = np.float32
STORED: dict[str, tuple[Export, Callable[[Path], object], tuple[str, ...]]] = {
    "no scale": (
        NVFP4,
        change(f"{DOWN}.weight_scale", None),
        (f"tensor {DOWN}.weight_scale is missing",),
    ),
    "no input_scale": (
        NVFP4,
        change(f"{DOWN}.input_scale", None),
        (f"tensor {DOWN}.input_scale is missing",),
    ),
    "no tensor scale": (
        NVFP4,
        change(f"{DOWN}.weight_scale_2", None),
        (f"tensor {DOWN}.weight_scale_2 is missing",),
    ),
    "no codes": (NVFP4, change(f"{DOWN}.weight", None), (f"tensor {DOWN}.weight is missing",)),
    "no norm": (
        NVFP4,
        change("model.norm.weight", None),
        ("tensor model.norm.weight is missing",),
    ),
    "a scale of another shape": (
        NVFP4,
        change(f"{DOWN}.weight_scale", lambda a: a[:, :8]),
        (f"{DOWN}.weight_scale has shape (128, 8), it should have (128, 16)",),
    ),
    "a scale of another dtype": (
        NVFP4,
        change(f"{DOWN}.weight_scale", lambda a: a.astype(F32)),
        (f"{DOWN}.weight_scale has dtype F32, it should have F8_E4M3",),
    ),
    "scales in place of one": (
        NVFP4,
        change(f"{DOWN}.input_scale", lambda a: np.ones(256, F32)),
        (f"{DOWN}.input_scale has shape (256,), it should have ()",),
    ),
    "codes of another shape": (
        NVFP4,
        change(f"{DOWN}.weight", lambda a: a[:64]),
        (f"{DOWN}.weight has shape (64, 128), it should have (128, 128)",),
    ),
    "codes of another dtype": (
        MXFP8,
        change(f"{DOWN}.weight", lambda a: a.view(np.int8)),
        (f"{DOWN}.weight has dtype I8, it should have F8_E4M3",),
    ),
    "floats under scales": (
        MXFP8,
        change(f"{DOWN}.weight", lambda a: a.astype(F32)),
        (f"{DOWN}.weight has dtype F32, it should have F8_E4M3",),
    ),
    "codes where floats should be": (
        MXFP8,
        change("model.norm.weight", lambda a: np.ones(128, np.int8)),
        ("model.norm.weight has dtype I8", "floating-point"),
    ),
    "described, not quantized": (
        MXFP8,
        lambda f: (
            change(f"{DOWN}.weight", lambda a: np.ones((128, 256), np.float16))(f),
            change(f"{DOWN}.weight_scale", None)(f),
        ),
        (f"{DOWN} is described as mxfp8, and its weight is F16 without a weight_scale",),
    ),
    "quantized, not described": (
        MXFP8,
        lambda f: described(f, exclude_modules=["lm_head", DOWN], ignore=["lm_head", DOWN]),
        (f"{DOWN} has a weight_scale, and the descriptions leave it alone",),
    ),
    "a quantized module inside a pattern": (
        MXFP8,
        lambda f: described(f, exclude_modules=["lm_head", "model.layers.1*"]),
        ("model.layers.1.self_attn.q_proj has a weight_scale", "3 more"),
    ),
    "an embedding with a scale": (
        MXFP8,
        add("model.embed_tokens.weight_scale", np.ones((), F32)),
        ("model.embed_tokens.weight_scale belongs to no linear",),
    ),
    "something else": (
        MXFP8,
        add("model.surprise", np.ones((), F32)),
        ("model.surprise is not part of the model",),
    ),
    "a low-rank part": (
        NVFP4,
        add(f"{DOWN}.weight_quantizer._svdquant_lora_a", np.ones((2, 256), F32)),
        ("_svdquant_lora_a is not part of the model",),
    ),
    "scales of a cache that is not described": (
        MXFP8,
        add(f"{KEYS}.k_scale", np.ones((), F32)),
        (f"{KEYS}.k_scale is not part of the model",),
    ),
    "one cache scale missing": (
        NVFP4,
        change(f"{KEYS}.k_scale", None),
        (f"{KEYS}.k_scale is missing",),
    ),
    "one cache bias missing": (
        NVFP4,
        change(f"{KEYS}.k_bias", None),
        (f"{KEYS}.k_bias is missing",),
    ),
    "a factor of another shape": (
        INT4,
        add(f"{DOWN}.pre_quant_scale", np.ones(128, np.float16)),
        ("pre_quant_scale has shape (128,), it should have (256,)", "F16", "BF16"),
    ),
}


@pytest.mark.parametrize(("row", "damage", "saying"), STORED.values(), ids=STORED.keys())
def test_tensors(copy, row: Export, damage: Callable, saying: tuple[str, ...]):
    folder = copy(row)
    damage(folder)
    refused(folder, saying, opened=True)


NUMBERS = {
    "tensor scale": (NVFP4, f"{DOWN}.weight_scale_2", 0.0, "1 of 1 numbers", "not positive"),
    "tensor scale that is none": (NVFP4, f"{DOWN}.weight_scale_2", np.nan, "not positive"),
    "input_scale": (NVFP4, f"{DOWN}.input_scale", -1.0, "not positive"),
    "infinite input_scale": (NVFP4, f"{DOWN}.input_scale", np.inf, "finite"),
    "block scale, NaN": (NVFP4, f"{DOWN}.weight_scale", 0x7F, "1 of 2048", "negative or NaN"),
    "block scale, negative": (NVFP4, f"{DOWN}.weight_scale", 0x80 | 0x30, "negative or NaN"),
    "power of two, NaN": (MXFP8, f"{DOWN}.weight_scale", 255, "1 of 1024 numbers", "NaN"),
    "float32 block scale": (INT4, f"{DOWN}.weight_scale", 0.0, "1 of 256", "not positive"),
    "k_scale": (NVFP4, f"{KEYS}.k_scale", np.nan, "not positive"),
    "k_bias": (NVFP4, f"{KEYS}.k_bias", np.inf, "1 of 64 numbers", "NaN or infinite"),
}


@pytest.mark.parametrize(
    ("row", "name", "value", "saying"),
    [(*r[:3], r[3:]) for r in NUMBERS.values()],
    ids=NUMBERS.keys(),
)
def test_numbers(copy, row: Export, name: str, value: float, saying: tuple[str, ...]):
    folder = copy(row)
    change(name, number(0, value))(folder)
    open_model(folder)
    refused(folder, (name, *saying, "damaged"), opened=False)


def test_a_block_scale_that_underflowed_is_none_of_these(copy):
    folder = copy(NVFP4)
    change(f"{DOWN}.weight_scale", number(0, 0))(folder)
    ji.load(folder)


def test_everything_is_said_at_once(copy):
    folder = copy(NVFP4)
    for i in (0, 1):
        change(f"model.layers.{i}.mlp.up_proj.input_scale", None)(folder)
        change(f"model.layers.{i}.mlp.gate_proj.weight_scale_2", None)(folder)
        add(f"model.layers.{i}.mlp.down_proj.surprise", np.ones(2, F32))(folder)
    refused(
        folder, ("layers.0.mlp.gate_proj.weight_scale_2", "layers.1.mlp", "2 more"), opened=True
    )
    shutil.rmtree(folder)
    folder = copy(NVFP4)
    for i in (0, 1):
        change(f"model.layers.{i}.mlp.up_proj.input_scale", number(0, np.nan))(folder)
    saying = tuple(f"layers.{i}.mlp.up_proj.input_scale are not" for i in (0, 1))
    refused(folder, saying, opened=False)
