# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that engines are asked about: small good ones of every layout and kind, made once,
and ways to change their files.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from checkpoints import write
from damage import arrays, described
from exports import Export
from stored_trees import model_of

import jqx_interop as ji

BF16, F8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
CONFIG, HF_QUANT, INDEX = "config.json", "hf_quant_config.json", "model.safetensors.index.json"

Damage = Callable[[Path], object]


def saved(folder: Path, recipe: str, kv: str = "none", shard: str = "10GB") -> Path:
    """An export of the reference tool as its bytes are, with a tokenizer."""
    ji.save(model_of(Export(model="llama", recipe=recipe, kv=kv)), folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def exported(folder: Path, source: Path) -> Path:
    """The same in compressed-tensors."""
    ji.export(source, folder, "compressed-tensors")
    return folder


def config(**more: Any) -> dict[str, Any]:
    """The configuration of a small model of a family that is not defined here."""
    base = {"model_type": "strange", "architectures": ["StrangeForCausalLM"], "dtype": "float16"}
    return base | {"tie_word_embeddings": False} | more


def put(folder: Path, said: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A checkpoint with these tensors and this quantization_config."""
    folder.mkdir()
    write(folder, tensors)
    (folder / CONFIG).write_text(json.dumps(config(quantization_config=said)))
    (folder / "tokenizer.json").write_text("{}")
    return folder


PROJECTIONS = {
    **{f"self_attn.{name}_proj": (64, 64) for name in "qkvo"},
    **{f"mlp.{name}_proj": (128, 64) for name in ("gate", "up")},
    "mlp.down_proj": (64, 128),
}


def plain() -> dict[str, np.ndarray]:
    """What is not quantized in those models."""
    ends = {"model.embed_tokens.weight": (96, 64), "lm_head.weight": (96, 64)}
    norms = {f"model.layers.{i}.input_layernorm.weight": (64,) for i in range(2)}
    return {name: np.ones(shape, np.float16) for name, shape in (ends | norms).items()}


def awq(folder: Path, **more: Any) -> Path:
    """A checkpoint as AutoAWQ writes it, of groups of 32."""
    tensors = plain()
    for i in range(2):
        for name, (n, k) in PROJECTIONS.items():
            path = f"model.layers.{i}.{name}"
            tensors[f"{path}.qweight"] = np.full((k, n // 8), 0x12345678, np.int32)
            tensors[f"{path}.qzeros"] = np.full((k // 32, n // 8), 0x08080808, np.int32)
            tensors[f"{path}.scales"] = np.full((k // 32, n), 0.01, np.float16)
    said = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    return put(folder, said | {"version": "gemm", "modules_to_not_convert": None} | more, tensors)


def gptq(folder: Path, **more: Any) -> Path:
    """A checkpoint as GPTQ's packages write it, of groups of 32."""
    tensors = plain()
    for i in range(2):
        for name, (n, k) in PROJECTIONS.items():
            path = f"model.layers.{i}.{name}"
            tensors[f"{path}.qweight"] = np.full((k // 8, n), 0x12345678, np.int32)
            tensors[f"{path}.qzeros"] = np.full((k // 32, n // 8), 0x77777777, np.int32)
            tensors[f"{path}.scales"] = np.full((k // 32, n), 0.01, np.float16)
            tensors[f"{path}.g_idx"] = np.arange(k, dtype=np.int32) // 32
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    return put(folder, said | more, tensors)


def moe(folder: Path, experts: str = "mlp.experts.{}.{}_proj") -> Path:
    """A model of experts in ModelOpt's FP8; its routers and its head are listed."""
    tensors = plain()
    names = ("gate", "up", "down") if "proj" in experts else ("w1", "w3", "w2")
    for i in range(2):
        layer = f"model.layers.{i}"
        paths = [f"{layer}.self_attn.{name}_proj" for name in "qkvo"]
        paths += [f"{layer}.{experts.format(e, name)}" for e in range(4) for name in names]
        router = experts.partition(".experts")[0]
        tensors[f"{layer}.{router}.gate.weight"] = np.ones((4, 64), np.float16)
        for path in paths:
            tensors[f"{path}.weight"] = np.ones((64, 64), F8)
            tensors[f"{path}.weight_scale"] = np.asarray(0.5, np.float32)
            tensors[f"{path}.input_scale"] = np.asarray(0.25, np.float32)
    listed = [f"model.layers.{i}.{router}.gate" for i in range(2)] + ["lm_head"]
    said = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": listed}
    put(folder, said, tensors)
    file = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": listed}
    (folder / HF_QUANT).write_text(json.dumps({"quantization": file}))
    return folder


def qwen_moe(folder: Path) -> Path:
    """The same of a model_type whose parameters are known by its configuration."""
    moe(folder)
    found = arrays(folder)
    norms = {"input_layernorm": 64, "post_attention_layernorm": 64}
    norms |= {"self_attn.q_norm": 32, "self_attn.k_norm": 32}
    for i in range(2):
        for name, size in norms.items():
            found[f"model.layers.{i}.{name}.weight"] = np.ones(size, np.float16)
    write(folder, found | {"model.norm.weight": np.ones(64, np.float16)})
    sizes = {"vocab_size": 96, "num_attention_heads": 2, "num_hidden_layers": 2, "num_experts": 4}
    sizes |= {"num_experts_per_tok": 2}
    sizes |= dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 64)
    said = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(said | sizes | {"model_type": "qwen3_moe"}))
    return folder


def make_all(root: Path) -> dict[str, Path]:
    """Name -> a good checkpoint."""
    found = {
        "nvfp4": saved(root / "nvfp4", "nvfp4"),
        "sharded": saved(root / "sharded", "nvfp4", shard="60KB"),
        "fp8": saved(root / "fp8", "fp8", kv="fp8"),
        "affine": saved(root / "affine", "fp8", kv="fp8_affine"),
        "int4": saved(root / "int4", "int4_blockwise_weight_only"),
        "mxfp8": saved(root / "mxfp8", "mxfp8"),
        "mixed": saved(root / "mixed", "mixed"),
        "awq": awq(root / "awq"),
        "gptq": gptq(root / "gptq"),
        "moe": moe(root / "moe"),
        "qwen-moe": qwen_moe(root / "qwen-moe"),
        "mixtral": moe(root / "mixtral", "block_sparse_moe.experts.{}.{}"),
    }
    for name in ("nvfp4", "int4", "fp8"):
        found[f"ct-{name}"] = exported(root / f"ct-{name}", found[name])
    return found


def inline(folder: Path, how: Callable[[dict[str, Any]], None]) -> None:
    """Change the quantization_config of config.json."""
    found = json.loads((folder / CONFIG).read_text())
    how(found["quantization_config"])
    (folder / CONFIG).write_text(json.dumps(found))


def configured(**changes: object) -> Damage:
    """Change keys of config.json; None takes one out."""

    def change(folder: Path) -> None:
        found = json.loads((folder / CONFIG).read_text()) | changes
        found = {key: value for key, value in found.items() if value is not None}
        (folder / CONFIG).write_text(json.dumps(found))

    return change


def said(**changes: object) -> Damage:
    """Change keys of both descriptions alike; None takes one out."""
    return lambda folder: described(folder, **changes)


def saying(**changes: object) -> Damage:
    """Change keys of the quantization_config alone; None takes one out."""

    def change(found: dict[str, Any]) -> None:
        found.update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            found.pop(key)

    return lambda folder: inline(folder, change)


def ignoring(*names: str) -> Damage:
    """What both descriptions leave alone, as ModelOpt's two files call it."""

    def change(folder: Path) -> None:
        inline(folder, lambda found: found.update(ignore=list(names)))
        file = json.loads((folder / HF_QUANT).read_text())
        file["quantization"]["exclude_modules"] = list(names)
        (folder / HF_QUANT).write_text(json.dumps(file))

    return change


def indexed(how: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the index."""

    def change(folder: Path) -> None:
        found = json.loads((folder / INDEX).read_text())
        how(found)
        (folder / INDEX).write_text(json.dumps(found))

    return change


def cut(folder: Path) -> None:
    """Keep three quarters of the largest file, as a copy that broke off does."""
    file = max(folder.glob("*.safetensors"), key=lambda f: f.stat().st_size)
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) * 3 // 4])


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def duplicate(folder: Path, root: Path) -> Path:
    return Path(shutil.copytree(folder, root / "model"))


def change_all(pattern: str, how: Callable[[np.ndarray], np.ndarray | None]) -> Damage:
    """Change every tensor whose name has `pattern`; None takes it out."""

    def change(folder: Path) -> None:
        found = {}
        for name, array in arrays(folder).items():
            new = how(array) if pattern in name else array
            found |= {} if new is None else {name: new}
        write(folder, found)

    return change
