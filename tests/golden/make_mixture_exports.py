# SPDX-License-Identifier: Apache-2.0
"""Exports of tiny mixtures of experts by ModelOpt: `python tests/golden/make_mixture_exports.py`
writes mixture_exports.npz beside this file.

Made with nvidia-modelopt 0.47.0, torch 2.13.0 (CPU) and transformers 5.14.1. Kept are the config
and the shapes of the model, digests of every tensor of an export but scales of inputs, of which the
numbers are kept, and the JSON descriptions.
"""

import copy
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import exports  # noqa: E402
from golden import make_mixtures  # noqa: E402
from golden.make_family_exports import export, packed  # noqa: E402
from golden.make_family_exports import unpacked as unpacked  # noqa: E402

FIXTURE = Path(__file__).with_name("mixture_exports.npz")
CONFIGS = {"fp8": "FP8_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG"}
"""Recipe -> the constant of ModelOpt."""

CASES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek_v3"),
    *("llama4_text", "gpt_oss"),
)
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "v_head_dim": 16,
}


def config_of(case: str) -> dict[str, Any]:
    """The config.json of a case, with sizes that blocks of 16 divide."""
    config = copy.deepcopy(make_mixtures.CASES[case])
    config |= {key: size for key, size in WIDE.items() if config.get(key) is not None}
    if config["model_type"] == "phimoe":
        for key in ("short_factor", "long_factor"):
            config["rope_scaling"][key] = list(np.resize(config["rope_scaling"][key], 8).tolist())
    return config


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights in bfloat16 by the names they have in checkpoints."""
    return {
        name: make_mixtures.weight(name, tuple(shape)).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }


def make(case: str, folder: Path) -> dict[str, np.ndarray]:
    """What is kept of one case."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    base = folder / case
    given = AutoConfig.for_model(**config_of(case))
    AutoModelForCausalLM.from_config(given, dtype=torch.bfloat16).save_pretrained(base)
    shapes = {name: a.shape for name, a in load_file(base / "model.safetensors").items()}
    save_file(drawn(shapes), base / "model.safetensors", {"format": "pt"})
    kept = {f"{case}|base": packed([(base / "config.json").read_text(), shapes])}
    for recipe, constant in CONFIGS.items():
        out = folder / f"{case}-{recipe}"
        export(base, out, constant, {})
        scales = exports.calibrated(out)
        tensors = {n: d for n, d in exports.digests(out).items() if n not in scales}
        texts = [(out / f).read_text() for f in ("config.json", "hf_quant_config.json")]
        kept[f"{case}|{recipe}"] = packed([tensors, scales, *texts])
    return kept


def main() -> None:
    """Write the fixture."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            found |= make(case, Path(folder))
            print(case, flush=True)
    np.savez_compressed(FIXTURE, **found)
    print(FIXTURE, FIXTURE.stat().st_size)


if __name__ == "__main__":
    main()
