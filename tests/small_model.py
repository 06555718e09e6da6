# SPDX-License-Identifier: Apache-2.0
"""A model whose linears have few shapes, with calibration ids and recorded inputs: what searches
are run on.
"""

import json
import zlib
from pathlib import Path

import exports
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
BATCHES = (3, 2, 14)
"""[batches, batch, length]: 84 tokens, more than the hidden size and fewer than the inner one."""

BF16 = np.dtype(ml_dtypes.bfloat16)


def write(folder: Path) -> Path:
    """The checkpoint "model", "ids.npy" and "acts.safetensors" in `folder`."""
    (folder / "model").mkdir(parents=True)
    drawn = {name: exports.draw(name, s, BF16) for name, s in exports.shapes(CONFIG).items()}
    save_file(drawn, folder / "model" / "model.safetensors", {"format": "pt"})
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    ids = np.random.RandomState(1).randint(0, CONFIG["vocab_size"], BATCHES)
    np.save(folder / "ids.npy", ids.astype(np.int64))
    save_file(activations(), folder / "acts.safetensors")
    return folder


def activations() -> dict[str, np.ndarray]:
    """Inputs of all linears whose channels depend on each other, a few far louder than others."""
    found = {}
    for name, shape in exports.shapes(CONFIG).items():
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        if leaf in ("q_proj", "o_proj", "gate_proj", "down_proj"):
            k = shape[1]
            r = np.random.RandomState(zlib.crc32(name.encode()))
            mixed = r.standard_normal((*BATCHES, k)) @ (np.eye(k) + r.standard_normal((k, k)) / 6)
            x = (mixed * np.exp(r.standard_normal(k))).astype(BF16)
            for twin in exports.SIBLINGS.get(leaf, (leaf,)):
                found |= {f"{parent}.{twin}|{i}": batch for i, batch in enumerate(x)}
    return found
