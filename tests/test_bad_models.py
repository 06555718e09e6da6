# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a model is said in one line with exit code 2, and nothing is left at the
destination.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import command
import exports
import numpy as np
import pytest
from command import refused
from source import DOWN, FP8, INDEX, MODEL, WEIGHTS, edit, save, untouched

# --- models


def _truncate(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)


def _corrupt(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:8] + b"}" + raw[9:])


def _missing_shard(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    shards = dict.fromkeys(exports.tensors("llama"), "model-00001-of-00002.safetensors")
    shards["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))


def _tensor_missing(folder: Path) -> None:
    save(folder, {n: a for n, a in exports.tensors("llama").items() if n != f"{DOWN}.weight"})


def _tensor_extra(folder: Path) -> None:
    save(folder, exports.tensors("llama") | {"model.surprise.weight": np.zeros((2, 2), np.float32)})


def _wrong_shape(folder: Path) -> None:
    save(folder, exports.tensors("llama") | {f"{DOWN}.weight": np.zeros((128, 128), np.float32)})


def _quantized(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})


MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config.json": (lambda f: (f / "config.json").unlink(), ("no config.json",)),
    "broken JSON": (
        lambda f: (f / "config.json").write_text('{\n"a": 1,'),
        ("config.json", "line 2"),
    ),
    "another model_type": (lambda f: edit(f, model_type="lama"), ("'lama'", "llama")),
    "no model_type": (lambda f: edit(f, model_type=None), ("model_type", "llama")),
    "no hidden_size": (lambda f: edit(f, hidden_size=None), ("hidden_size",)),
    "sizes that are none": (
        lambda f: edit(f, num_hidden_layers="two"),
        ("num_hidden_layers", "two"),
    ),
    "a layer too many": (lambda f: edit(f, num_hidden_layers=3), ("model.layers.2.", "missing")),
    "a dtype that is none": (lambda f: edit(f, dtype="int8"), ("dtype", "int8", "bfloat16")),
    "float64": (lambda f: edit(f, dtype="float64"), ("F64", "BF16")),
    "truncated": (_truncate, (WEIGHTS, "truncated")),
    "corrupt header": (_corrupt, (WEIGHTS, "corrupt")),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ("no safetensors",)),
    "a missing shard": (_missing_shard, ("model-00002-of-00002.safetensors", "missing")),
    "a missing tensor": (_tensor_missing, (f"{DOWN}.weight", "missing")),
    "another tensor": (_tensor_extra, ("model.surprise.weight", "not part of the model")),
    "a wrong shape": (_wrong_shape, (f"{DOWN}.weight", "(128, 128)", "(128, 256)")),
    "quantized by its word alone": (_quantized, ("says integers", "no linear has a qweight")),
}


@pytest.mark.parametrize(("damage", "saying"), MODELS.values(), ids=MODELS.keys())
def test_models(here: Path, damage: Callable[[Path], object], saying: tuple[str, ...]):
    damage(here / MODEL)
    untouched(here, "quantize", MODEL, "out", *FP8, saying=(MODEL, *saying))


def test_a_model_that_is_not_there(here: Path):
    untouched(
        here, "quantize", "no/such/model", "out", saying=("no/such/model", "no such directory")
    )
    untouched(
        here, "quantize", f"{MODEL}/{WEIGHTS}", "out", saying=(WEIGHTS, "is a file", "directory")
    )


def test_pickled_weights_are_never_opened(here: Path):
    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (here / "sprung",)

    (here / MODEL / WEIGHTS).unlink()
    (here / MODEL / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    untouched(
        here,
        "quantize",
        MODEL,
        "out",
        *FP8,
        saying=("pytorch_model.bin", "never opened", "safetensors"),
    )
    pickle.loads((here / MODEL / "pytorch_model.bin").read_bytes())
    assert (here / "sprung").exists()


def test_a_strange_architecture_has_no_keys_and_values(here: Path):
    edit(here / MODEL, model_type="strange")
    given = ("quantize", MODEL, "out", "--activations", "acts.safetensors", "--kv-cache", "fp8")
    untouched(here, *given, saying=("'strange'", "--kv-cache none", "_cast"))


# --- shapes a format cannot store


def reshaped(folder: Path, **sizes: int) -> None:
    """Give the model other widths."""
    config = exports.MODELS["llama"] | sizes
    dtype = exports.DTYPES[config["dtype"]]
    save(folder, {n: exports.draw(n, s, dtype) for n, s in exports.shapes(config).items()})
    edit(folder, **sizes, head_dim=config["hidden_size"] // config["num_attention_heads"])


SHAPES = {
    "int4_blockwise_weight_only": (
        {"intermediate_size": 192},
        ("mlp.down_proj", "128", "192", "block=64"),
    ),
    "nvfp4": ({"intermediate_size": 200}, ("mlp.down_proj", "16", "200", "Leave")),
    "mxfp8": ({"intermediate_size": 176}, ("mlp.down_proj", "32", "176", "block=16")),
}


@pytest.mark.parametrize(("recipe", "sizes", "saying"), [(r, *row) for r, row in SHAPES.items()])
def test_blocks_that_do_not_divide(
    here: Path, recipe: str, sizes: dict[str, int], saying: tuple[str, ...]
):
    reshaped(here / MODEL, **sizes)
    given = ("--qformat", recipe, "--calib", "ids.npy")
    untouched(here, "quantize", MODEL, "out", *given, saying=("model.layers.0", "1 more", *saying))


def test_another_block_size_is_the_way_out(here: Path):
    reshaped(here / MODEL, intermediate_size=192)
    given = ("--qformat", "int4", "--set", "block=64")
    assert command.jqx("quantize", MODEL, "out", *given).code == 0
    described = json.loads((here / "out" / "hf_quant_config.json").read_text())
    assert described["quantization"]["group_size"] == 64


def test_pairs_of_rows_that_are_odd(here: Path):
    reshaped(here / MODEL, intermediate_size=255)
    save(here / MODEL, {n: a for n, a in _tensors(here / MODEL).items() if ".down_proj" not in n})
    edit(here / MODEL, model_type="strange")
    saying = ("mlp.gate_proj", "pairs of rows", "255")
    untouched(here, "quantize", MODEL, "out", "--qformat", "int4", saying=saying)


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return exports.load_file(folder / WEIGHTS)


# --- numbers that are none


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", f"{DOWN}.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("given", [("--qformat", "mxfp8"), ("--activations", "acts.safetensors")])
def test_weights(here: Path, name: str, value: float, given: tuple[str, ...]):
    tensors = exports.tensors("llama")
    tensors[name].reshape(-1)[17] = value
    save(here / MODEL, tensors)
    refused("quantize", MODEL, "out", *given, saying=(name, "NaN or infinite"))
    assert not (here / "out").exists()
    assert (here / "out.jqx-partial").exists() == (name != "model.embed_tokens.weight")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj"])
def test_weights_that_calibration_meets_first(here: Path, name: str):
    tensors = exports.tensors("llama")
    tensors[f"{name}.weight"][3, 5] = np.nan
    save(here / MODEL, tensors)
    refused("quantize", MODEL, "out", *FP8, saying=("model.layers.", "finite"))
    assert not (here / "out").exists()


def test_inputs_that_overflow(here: Path):
    tensors = exports.tensors("llama")
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] *= exports.DTYPES["bfloat16"].type(1e30)
    save(here / MODEL, tensors)
    refused(
        "quantize",
        MODEL,
        "out",
        *FP8,
        saying=("model.layers.0.mlp.down_proj", "not finite", "--compute"),
    )
    assert not (here / "out").exists()
