# SPDX-License-Identifier: Apache-2.0
"""A few logits of a tiny random model of every family with experts by transformers:
`python tests/golden/make_mixtures.py` writes mixtures.npz beside this file.

Made with torch 2.13.0 (CPU) and transformers 5.14.1. Weights are drawn by the names they have in
checkpoints: transformers says them where it saves a model, and reads the model made of them. The
configurations turn on what is odd in a family.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden import make_families  # noqa: E402
from golden.make_families import PLACES, SMALL, token_ids  # noqa: E402

FIXTURE = Path(__file__).with_name("mixtures.npz")

_QWEN = SMALL | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}

CASES: dict[str, dict] = {
    "mixtral": SMALL
    | {
        "model_type": "mixtral",
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rope_theta": 100.0,
        "router_jitter_noise": 0.3,
    },
    "mixtral_window": SMALL
    | {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "sliding_window": 5,
        "head_dim": 12,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": _QWEN
    | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "head_dim": 12,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "attention_bias": True,
    },
    "qwen3_moe_listed": _QWEN
    | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
}
"""Name -> config.json, beside those of make_families.py."""


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor called `name` in checkpoints. Corrections are small: all experts are
    chosen by some tokens.
    """
    if name.endswith("e_score_correction_bias"):
        return 0.1 * make_families.weight(name, shape)
    return make_families.weight(name, shape)


def save_drawn(config: dict, folder: Path) -> None:
    """The checkpoint of `config` in `folder`, with the names that transformers writes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = AutoConfig.for_model(**config)
    AutoModelForCausalLM.from_config(given, dtype=torch.float32).save_pretrained(folder)
    file = folder / "model.safetensors"
    shapes = {name: array.shape for name, array in load_file(file).items()}
    save_file({n: weight(n, s) for n, s in shapes.items()}, file, {"format": "pt"})


def peer_logits(config: dict) -> np.ndarray:
    """Float32 logits by transformers, [batch, length, vocab]."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_drawn(config, Path(folder))
        model, told = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    wrong = {key: found for key, found in told.items() if found and key != "conversion_errors"}
    assert not wrong, wrong
    with torch.no_grad():
        return model.eval()(torch.from_numpy(token_ids())).logits.float().numpy()


def saved_config(config: dict) -> str:
    """The config.json that transformers writes for `config`."""
    return make_families.saved_config(config)


def main() -> None:
    arrays = {case: peer_logits(config)[:, PLACES] for case, config in CASES.items()}
    arrays |= {f"{case}|config": np.array(saved_config(c)) for case, c in CASES.items()}
    np.savez_compressed(FIXTURE, **arrays)
    print(FIXTURE, FIXTURE.stat().st_size)


if __name__ == "__main__":
    main()
