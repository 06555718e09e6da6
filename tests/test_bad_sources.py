# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a quantized source is told in one line before anything is written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import foreign
import ml_dtypes
import numpy as np
import pytest
import small_model
from checkpoints import write
from damage import arrays
from foreign import F8, FP8_BLOCKS, Arrays
from source import edit

import jqx_interop as ji
from jqx.errors import InputError

E5M2 = np.dtype(ml_dtypes.float8_e5m2)
DOWN, UP = (f"model.layers.1.mlp.{n}_proj.weight" for n in ("down", "up"))
SAID: dict[str, tuple[Callable[[Arrays], Arrays], dict[str, Any]]] = {
    "fp8": (foreign.stored_as_fp8, FP8_BLOCKS),
    "mxfp4": (foreign.stored_as_mxfp4, {"quant_method": "mxfp4"}),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """A model in layouts to damage, and as it was in "plain"."""
    root = small_model.write(tmp_path_factory.mktemp("bad") / "root")
    plain = arrays(root / "model")
    for name, (stored, said) in SAID.items():
        config = {**small_model.CONFIG, "quantization_config": said}
        foreign.put(root / name, config, stored(plain))
    for name, recipe, target in (
        ("modelopt", "w4a16_nvfp4", "modelopt"),
        ("compressed-tensors", "w4a16_nvfp4", "compressed-tensors"),
        ("gptq", "int4", "gptq"),
        ("awq", "int4", "awq"),
    ):
        options = (("block", "32"),) if recipe == "int4" else ()
        ji.ptq(root / "model", root / name, recipe, target=target, options=options)
    (root / "model").rename(root / "plain")
    return root


def altered(name: str, how: Callable[[np.ndarray], np.ndarray] | None) -> Callable[[Path], None]:
    """One tensor changed, or gone."""

    def damage(folder: Path) -> None:
        found = arrays(folder)
        array = found.pop(name)
        write(folder, found if how is None else found | {name: how(array)})

    return damage


def at(value: object) -> Callable[[np.ndarray], np.ndarray]:
    """The first number of an array replaced."""

    def how(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.reshape(-1)[0] = value
        return array

    return how


def added(name: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: write(folder, arrays(folder) | {name: array})


def said(**changes: object) -> Callable[[Path], None]:
    """Keys of the description changed; None takes one out."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        found = {**config["quantization_config"], **changes}
        found = {k: v for k, v in found.items() if v is not None}
        edit(folder, quantization_config=found)
        for file in ("quantize_config.json", "hf_quant_config.json"):
            (folder / file).unlink(missing_ok=True)

    return damage


GPTQ = "model.layers.0.self_attn.q_proj"
Case = tuple[str, Callable[[Path], object], tuple[str, ...]]
CASES: dict[str, Case] = {
    "a scale that is missing": (
        "fp8",
        altered(f"{DOWN}_scale_inv", None),
        (DOWN, "F8_E4M3", "_scale_inv is missing"),
    ),
    "a scale of another shape": (
        "fp8",
        altered(f"{DOWN}_scale_inv", lambda a: np.ones((3, 5), np.float32)),
        (f"{DOWN}_scale_inv has shape (3, 5)", "(64, 128) needs (1, 1)", "128x128"),
    ),
    "a scale that is NaN": (
        "fp8",
        altered(f"{DOWN}_scale_inv", at(np.nan)),
        (f"1 of 1 scales in {DOWN}_scale_inv are NaN", "damaged"),
    ),
    "a scale of floats": (
        "fp8",
        altered(UP, lambda a: a.astype(foreign.BF16)),
        (f"{UP}_scale_inv scales no F8_E4M3 weight",),
    ),
    "E5M2": (
        "fp8",
        altered(UP, lambda a: a.view(np.uint8).view(E5M2)),
        (f"{UP} is F8_E5M2", "only matrices in F8_E4M3"),
    ),
    "blocks of no size": (
        "fp8",
        said(weight_block_size=[128, 0]),
        ("weight_block_size", "[128, 0]"),
    ),
    "another method": ("fp8", said(quant_method="fp9"), ("unknown quant_method 'fp9'", "fp8")),
    "no method": (
        "fp8",
        said(quant_method=None),
        ("its quantization_config names no quant_method",),
    ),
    "bitsandbytes": ("fp8", said(quant_method="bitsandbytes"), ("'bitsandbytes'", "fp8")),
    "a description that is none": (
        "fp8",
        lambda f: edit(f, quantization_config=[4]),
        ("unknown quant_method '[4]'",),
    ),
    "a description alone": (
        "plain",
        lambda f: edit(f, quantization_config=FP8_BLOCKS),
        ("description says FP8, 128x128 blocks", "no weight is quantized"),
    ),
    "exponents that are NaN": (
        "mxfp4",
        altered(f"{DOWN}_scales", at(255)),
        (f"1 of 256 scales in {DOWN}_scales are NaN",),
    ),
    "scales that are missing": (
        "mxfp4",
        altered(f"{DOWN}_scales", None),
        (f"tensor {DOWN}_scales is missing",),
    ),
    "blocks that are missing": (
        "mxfp4",
        altered(f"{DOWN}_blocks", None),
        (f"{DOWN}_scales scales nothing", f"{DOWN}_blocks is missing"),
    ),
    "exponents of another shape": (
        "mxfp4",
        altered(f"{DOWN}_scales", lambda a: a[:, :2].copy()),
        (f"{DOWN}_scales is U8 (64, 2), it should be U8 (64, 4)",),
    ),
    "blocks of another size": (
        "mxfp4",
        altered(f"{DOWN}_blocks", lambda a: a.reshape(64, 8, 8)),
        (f"{DOWN}_blocks is U8 (64, 8, 8)", "[..., 16]"),
    ),
    "a tensor scale that is missing": (
        "modelopt",
        altered(f"{DOWN}_scale_2", None),
        (f"{DOWN}_scale_2 is missing",),
    ),
    "block scales of another shape": (
        "modelopt",
        altered(f"{DOWN}_scale", lambda a: a[:, :4].copy()),
        (f"{DOWN}_scale has shape (64, 4), it should have (64, 8)",),
    ),
    "a block scale that is NaN": (
        "modelopt",
        altered(f"{DOWN}_scale", at(np.nan)),
        (f"1 of 512 scales in {DOWN}_scale are NaN",),
    ),
    "codes that are missing": (
        "modelopt",
        altered(DOWN, None),
        (f"tensor {DOWN} is missing",),
    ),
    "a scale that nothing describes": (
        "modelopt",
        added("model.embed_tokens.weight_scale", np.ones((), np.float32)),
        ("embed_tokens has a weight_scale, and the descriptions leave it alone",),
    ),
    "a global scale that is zero": (
        "compressed-tensors",
        altered(f"{DOWN}_global_scale", at(np.inf)),
        (f"scales in {DOWN}_global_scale are NaN or infinite",),
    ),
    "another number of bits": ("gptq", said(bits=5), ("5 bits", "2, 3, 4, 8")),
    "zeros that are missing": (
        "gptq",
        altered(f"{GPTQ}.qzeros", None),
        (f"{GPTQ}.qzeros is missing",),
    ),
    "blocks that are none": (
        "gptq",
        altered(f"{GPTQ}.g_idx", at(7)),
        (f"{GPTQ}.g_idx names blocks", "none of the 2"),
    ),
    "an order that is missing": (
        "gptq",
        lambda f: [said(desc_act=True)(f), altered(f"{GPTQ}.g_idx", None)(f)],
        ("another order (desc_act)", f"{GPTQ} has no g_idx"),
    ),
    "a bias that the model has not": (
        "gptq",
        added(f"{GPTQ}.bias", np.ones(64, np.float16)),
        (f"{GPTQ}.bias is not zero",),
    ),
    "scales in the wrong order": (
        "gptq",
        altered(f"{GPTQ}.scales", lambda a: a.T.copy()),
        (f"{GPTQ}.qzeros has shape (2, 8)",),
    ),
    "no integers": (
        "plain",
        lambda f: edit(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        ("no linear has a qweight",),
    ),
    "another arrangement": ("awq", said(version="gemv"), ("arranged for gemv",)),
}


EXPERTS = "model.layers.0.mlp.experts.down_proj"
FUSED: dict[str, tuple[Arrays, str]] = {
    "no tensor scale": (
        {"": np.zeros((2, 16, 4), np.uint8), "_weight_scale": np.zeros((2, 2, 4), F8)},
        f"tensor {EXPERTS}_weight_scale_2 is missing",
    ),
    "block scales of another shape": (
        {
            "": np.zeros((2, 16, 4), np.uint8),
            "_weight_scale": np.zeros((2, 4, 2), F8),
            "_weight_scale_2": np.ones((), np.float32),
        },
        f"tensor {EXPERTS}_weight_scale has shape (2, 4, 2), it should have (2, 2, 4)",
    ),
    "a scale for every expert": (
        {"": np.zeros((2, 16, 4), F8), "_weight_scale": np.ones(2, np.float32)},
        f"tensor {EXPERTS}_weight_scale has shape (2,), it should have []",
    ),
    "floats": (
        {"": np.zeros((2, 16, 4), foreign.BF16), "_weight_scale": np.ones((), np.float32)},
        f"tensor {EXPERTS} is BF16 (2, 16, 4): no experts in FP8 or NVFP4",
    ),
    "no codes": (
        {"_weight_scale": np.ones((), np.float32)},
        f"tensor {EXPERTS} is missing",
    ),
}


@pytest.mark.parametrize(("tensors", "saying"), FUSED.values(), ids=FUSED)
def test_experts_in_one_tensor(tmp_path: Path, tensors: Arrays, saying: str):
    said = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []}
    config = {"model_type": "gpt_oss", "torch_dtype": "bfloat16", "quantization_config": said}
    named = {f"{EXPERTS}{ending}": array for ending, array in tensors.items()}
    named["model.norm.weight"] = np.ones(4, foreign.BF16)
    foreign.put(tmp_path / "model", config, named)
    command.refused("quantize", tmp_path / "model", tmp_path / "out", saying=saying)


def test_nothing_is_wrong_before(originals: Path, tmp_path: Path):
    for name in ("fp8", "mxfp4", "modelopt", "compressed-tensors", "gptq", "awq", "plain"):
        given = ("quantize", originals / name, tmp_path / name, "--qformat", "mxfp8")
        assert command.jqx(*given).code == 0


def test_biases_of_zeros_add_nothing(originals: Path, tmp_path: Path):
    shutil.copytree(originals / "gptq", tmp_path / "model")
    added(f"{GPTQ}.bias", np.zeros(64, np.float16))(tmp_path / "model")
    for name, model in (("a", originals / "gptq"), ("b", tmp_path / "model")):
        assert command.jqx("quantize", model, tmp_path / name, "--qformat", "mxfp8").code == 0
    assert command.snapshot(tmp_path / "a") == command.snapshot(tmp_path / "b")


@pytest.mark.parametrize(("source", "damage", "saying"), CASES.values(), ids=CASES)
def test_damaged_sources(originals: Path, tmp_path: Path, source: str, damage, saying):
    shutil.copytree(originals / source, tmp_path / "model")
    damage(tmp_path / "model")
    before = command.snapshot(tmp_path)
    given = (tmp_path / "model", tmp_path / "out", "--qformat", "mxfp8")
    command.refused("quantize", *given, saying=(str(tmp_path / "model"), *saying))
    assert command.snapshot(tmp_path) == before


RUN = [name for name, case in CASES.items() if case[0] in SAID]


@pytest.mark.parametrize("name", RUN)
def test_damaged_sources_are_not_run(originals: Path, tmp_path: Path, name: str):
    source, damage, saying = CASES[name]
    shutil.copytree(originals / source, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(InputError, match=re.escape(saying[0])) as caught:
        ji.load(tmp_path / "model")
    assert "\n" not in str(caught.value)


KEPT = {
    "a plain model": ("plain", {}, ("is not quantized", "leave --keep-source out")),
    "a layout of one format": ("fp8", {"target": "awq"}, ("awq has no name for fp8_block",)),
    "MXFP4 in a layout without it": ("mxfp4", {"target": "gptq"}, ("gptq has no name for mxfp4",)),
    "blocks of another size": ("small blocks", {}, ("no name for FP8, 32x32 blocks",)),
}


@pytest.mark.parametrize(("source", "more", "saying"), KEPT.values(), ids=KEPT)
def test_what_cannot_stay(originals: Path, tmp_path: Path, source: str, more: dict, saying):
    model = originals / source
    if source == "small blocks":
        model, plain = tmp_path / "model", arrays(originals / "plain")
        found = dict(plain)
        found[DOWN], found[f"{DOWN}_scale_inv"] = foreign.fp8_of(plain[DOWN], (32, 32))
        small = {**FP8_BLOCKS, "weight_block_size": [32, 32]}
        foreign.put(model, {**small_model.CONFIG, "quantization_config": small}, found)
    recipe = "int4" if more else "w4a16_nvfp4"
    (tmp_path / "attention.yaml").write_text(
        f"extends: {recipe}\nrules: [{{path_glob: '*.mlp.*', weight: null, input: null}}]\n"
    )
    given = ["--recipe", tmp_path / "attention.yaml", "--keep-source"]
    given += ["--target", more["target"], "--set", "block=32"] if more else []
    command.refused("quantize", model, tmp_path / "out", *given, saying=(str(model), *saying))
    assert not (tmp_path / "out").exists()


def test_zero_points_have_no_place(originals: Path, tmp_path: Path):
    shutil.copytree(originals / "gptq", tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.qzeros"
    altered(name, at(0x12345678))(tmp_path / "model")
    (tmp_path / "attention.yaml").write_text(
        "extends: w4a16_nvfp4\nrules: [{path_glob: '*.mlp.*', weight: null, input: null}]\n"
    )
    given = ("--recipe", tmp_path / "attention.yaml", "--keep-source")
    saying = ("model.layers.0.mlp.up_proj has zero points", "Leave --keep-source out")
    command.refused("quantize", tmp_path / "model", tmp_path / "out", *given, saying=saying)
