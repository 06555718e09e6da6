# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints drawn by name, and what the reference tool exported from them.

The checkpoints are made of integers, so every platform and NumPy version draws the same bytes.
Imported by the tests and by golden/make_exports.py, so nothing here needs jqx or torch.
"""

import hashlib
import json
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).with_name("golden") / "exports"

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("f2"),
    "float32": np.dtype("f4"),
}

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama_f16": _LLAMA | {"dtype": "float16"},
    "llama_f32": _LLAMA | {"dtype": "float32"},
    "wide": _LLAMA | {"hidden_size": 160, "num_hidden_layers": 1, "num_key_value_heads": 4},
    "qwen2": _LLAMA
    | {
        "model_type": "qwen2",
        "vocab_size": 72,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 12,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}
BATCHES = {"llama": (2, 2, 16), "qwen2": (2, 1, 4)}
"""[batches, batch, length] of the calibration ids; the model's inputs on them are recorded."""

SIBLINGS = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}
"""A recorded linear -> those that read the same input."""

CONFIGS = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_per_channel_per_token": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8_2d_blockwise_weight_only": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int8": "INT8_DEFAULT_CFG",
    "int8_weight_only": "INT8_WEIGHT_ONLY_CFG",
    "int4_blockwise_weight_only": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "w4a16_nvfp4": "W4A16_NVFP4_CFG",
    "w4a8_nvfp4_fp8": "W4A8_NVFP4_FP8_CFG",
    "nvfp4_mlp_only": "NVFP4_MLP_ONLY_CFG",
    "nvfp4_omlp_only": "NVFP4_OMLP_ONLY_CFG",
    "nvfp4_mlp_weight_only": "NVFP4_MLP_WEIGHT_ONLY_CFG",
    "mxfp4": "MXFP4_DEFAULT_CFG",
    "mxfp4_mlp_weight_only": "MXFP4_MLP_WEIGHT_ONLY_CFG",
    "w4a8_mxfp4_fp8": "W4A8_MXFP4_FP8_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
}
"""Recipe -> the constant of the reference tool."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """One run of the reference tool: which model by which recipe."""

    model: str
    recipe: str
    kv: str = "none"
    shard: str = "10GB"

    @property
    def key(self) -> str:
        return "-".join((self.model, self.recipe, self.kv, self.shard))

    @property
    def detailed(self) -> bool:
        """Whether single tensors are kept."""
        return self.model == "llama" or (self.model != "qwen2" and self.recipe == "fp8")


KV = (
    *(("fp8", kv) for kv in ("fp8", "fp8_affine", "fp8_cast")),
    *(("nvfp4", kv) for kv in ("nvfp4", "nvfp4_affine", "nvfp4_cast")),
    ("int8_weight_only", "fp8"),
    ("mxfp8", "fp8_cast"),
)
FEW = ("fp8", "int8_weight_only", "int4_blockwise_weight_only", "w4a16_nvfp4", "mxfp4", "mxfp8")
QWEN2 = ("fp8_per_channel_per_token", "w4a16_nvfp4", "mxfp4", "w4a8_mxfp4_fp8", "mxfp8")
MIXED = """\
extends: nvfp4
rules:
  - {path_glob: "*o_proj*", weight: fp8, input: fp8}
  - {path_glob: "*.1.mlp.*", weight: int4, input: null}
  - {path_glob: "*.0.mlp.down_proj*", weight: null, input: null}
"""
"""A recipe file; make_exports.py says the same in the reference tool's words."""

BLOCKS = "fp8_2d_blockwise_weight_only"
"""Not for llama: the reference tool stores a matrix of one block as if it had none."""

EXPORTS = (
    *(Export(model="wide" if recipe == BLOCKS else "llama", recipe=recipe) for recipe in CONFIGS),
    *(Export(model="llama", recipe=recipe, kv=kv) for recipe, kv in KV),
    Export(model="llama", recipe="fp8", kv="fp8", shard="60KB"),
    Export(model="llama", recipe="mixed"),
    *(Export(model=model, recipe=recipe) for model in ("llama_f16", "llama_f32") for recipe in FEW),
    *(Export(model="qwen2", recipe=recipe) for recipe in ("fp8", "nvfp4", "int8", *QWEN2)),
    Export(model="qwen2", recipe="nvfp4", kv="fp8_affine"),
    Export(model="qwen2", recipe="mxfp8", shard="100KB"),
)


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a llama or qwen2 checkpoint, in the order of the modules."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head_dim
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for i in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        for letter, rows in (("q", hidden), ("k", kv), ("v", kv)):
            found[f"{attention}.{letter}_proj.weight"] = (rows, hidden)
            if config["model_type"] == "qwen2":
                found[f"{attention}.{letter}_proj.bias"] = (rows,)
        found[f"{attention}.o_proj.weight"] = (hidden, hidden)
        found[f"{mlp}.gate_proj.weight"] = (inner, hidden)
        found[f"{mlp}.up_proj.weight"] = (inner, hidden)
        found[f"{mlp}.down_proj.weight"] = (hidden, inner)
        found[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
        found[f"model.layers.{i}.post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    return found


def draw(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The tensor `name`: bell-shaped values, some channels far above the rest, zeros of both signs,
    a block of zeros.
    """
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    values = (rng.randint(0, 1 << 12, (4, *shape)).sum(0) - 2 * 4095).astype(np.float32) / 4096
    loud = rng.randint(0, shape[0], max(2, shape[0] // 32))
    if name.endswith("norm.weight"):
        values = 1 + values / 4
        values[loud] *= 8
    elif len(shape) == 1:
        values /= 4
    elif "embed" not in name:
        values /= np.float32(np.sqrt(shape[-1]))
        values[loud] *= 4
        values[0, :32] = 0
        values[1, 3], values[1, 4], values[1, 5] = -0.0, 1e-7, -1e-7
    return values.astype(dtype)


def tensors(model: str) -> dict[str, np.ndarray]:
    config = MODELS[model]
    return {
        name: draw(name, shape, DTYPES[config["dtype"]]) for name, shape in shapes(config).items()
    }


def token_ids(model: str) -> np.ndarray:
    """Calibration ids [batches, batch, length]."""
    name = "qwen2" if model == "qwen2" else "llama"
    return (
        np.random.RandomState(1)
        .randint(0, MODELS[model]["vocab_size"], BATCHES[name])
        .astype(np.int64)
    )


@cache
def answers() -> dict[str, Any]:
    """What make_exports.py wrote."""
    return json.loads((GOLDEN / "exports.json").read_text())


def write_base(folder: Path, model: str) -> Path:
    """The checkpoint `model` in `folder`: weights drawn here, descriptions as transformers writes
    them. Its calibration ids lie beside it.
    """
    folder.mkdir(parents=True)
    save_file(tensors(model), folder / "model.safetensors", {"format": "pt"})
    for name, text in answers()["models"][model]["files"].items():
        (folder / name).write_text(text)
    np.save(folder.with_name(f"{folder.name}-ids.npy"), token_ids(model))
    return folder


def write_activations(path: Path, model: str) -> Path:
    """The recorded inputs of every linear, those that linears share repeated."""
    found = {}
    for key, array in load_file(GOLDEN / f"{model}_acts.safetensors").items():
        module, _, batch = key.partition("|")
        parent, _, name = module.rpartition(".")
        found |= {f"{parent}.{twin}|{batch}": array for twin in SIBLINGS.get(name, (name,))}
    save_file(found, path)
    return path


def short(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def read_tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> (dtype, shape, bytes) of all safetensors files in `folder`, read by their headers."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = (entry["dtype"], entry["shape"], raw[begin:end])
    return found


def digests(folder: Path) -> dict[str, str]:
    """Name -> digest of dtype, shape and bytes."""
    return {
        name: short(f"{dtype} {shape} ".encode() + raw)
        for name, (dtype, shape, raw) in read_tensors(folder).items()
    }


CALIBRATED = ("input_scale", ".k_scale", ".v_scale", ".k_bias", ".v_bias")
"""What follows from activations."""


def calibrated(folder: Path) -> dict[str, list[float]]:
    """Name -> values of the tensors that follow from activations."""
    kinds = {"F32": np.dtype("f4"), "BF16": DTYPES["bfloat16"]}
    return {
        name: np.frombuffer(raw, kinds[dtype]).astype(float).tolist()
        for name, (dtype, _, raw) in read_tensors(folder).items()
        if name.endswith(CALIBRATED)
    }
