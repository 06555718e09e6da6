# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint of every family on disk, wide enough for all formats, and calibration ids."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from golden import make_families as golden
from golden import make_mixtures
from safetensors.numpy import save_file
from tiny_families import CONFIGS

from jqx.models import param_shapes
from jqx_interop.families import spec_from_config
from jqx_interop.inventory import KEPT

WIDE = {
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "head_dim": 32,
    "kv_channels": 32,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ff_intermediate_size": 96,
    "ffn_hidden_size": 96,
    "n_inner": 96,
    "word_embed_proj_dim": 64,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "v_head_dim": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
}
"""Sizes that blocks of 32 divide, by the keys of all families."""

CASES = {
    "llama": "llama_biases",
    "falcon": "falcon_40b",
    "opt": "opt_post",
    "stablelm": "stablelm_parallel",
    "gpt_neox": "gpt_neox",
    "baichuan": "baichuan2_13b",
    "cohere": "cohere_qk_norm",
    "gpt2": "gpt2",
    "phi3": "phi3",
}
"""model_type -> the case that is odder than the last."""

BATCHES = (2, 2, 16)


def config_of(case: str) -> dict[str, Any]:
    config = copy.deepcopy(CONFIGS[case])
    for part in (config, config.get("text_config"), config.get("ffn_config")):
        if part is not None:
            part |= {key: size for key, size in WIDE.items() if part.get(key) is not None}
    for key in ("short_factor", "long_factor"):
        if config["model_type"] == "phimoe":
            config["rope_scaling"][key] *= 2
    if config["model_type"] == "qwen":
        config["intermediate_size"] = 192
    heads = 4 if config["model_type"] != "qwen" else 2
    config |= {key: heads for key in ("num_attention_heads", "n_head", "n_heads") if key in config}
    return config | {"torch_dtype": "bfloat16"}


def _dtype(name: str) -> Any:
    return np.float32 if name.endswith(KEPT) else ml_dtypes.bfloat16


def made_once(factory: Any, write: Callable[[Path, str], Path]) -> Callable[[str], Path]:
    """model_type -> what `write` made of it in a folder of `factory`, once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = write(factory.mktemp(kind) / "model", kind)
        return made[kind]

    return get


def write(folder: Path, case: str) -> Path:
    """The checkpoint of a case in `folder`, and "ids.npy" beside it."""
    folder.mkdir(parents=True)
    config = config_of(case)
    shapes = param_shapes(spec_from_config(config))
    drawn = {n: make_mixtures.weight(n, s).astype(_dtype(n)) for n, s in shapes.items()}
    save_file(drawn, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    ids = np.random.RandomState(1).randint(0, golden.VOCAB, BATCHES)
    np.save(folder.parent / "ids.npy", ids.astype(np.int64))
    return folder
