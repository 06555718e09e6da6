# SPDX-License-Identifier: Apache-2.0
"""Write a small Llama checkpoint with random weights, to try things on.

    python examples/make_tiny_llama.py OUT

It is laid out like any checkpoint on the Hugging Face Hub: config.json, model.safetensors and
tokenizer.json. The tokenizer knows the 256 bytes and the end of a text. As in trained models, the
weights have heavy tails and a few channels of the norms are large; what it predicts means nothing.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jqx.models import param_shapes
from jqx_interop.checkpoints import ShardWriter, TensorOut, plan_shards
from jqx_interop.families import spec_from_config

END_OF_TEXT = "<|endoftext|>"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 256,
}


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are the bytes, as letters of GPT-2's alphabet, and END_OF_TEXT."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def weights(shapes: dict[str, tuple[int, ...]], seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of every tensor: Student's t in matrices, ones and some fours in norms."""
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        if len(shape) == 1:
            w = np.where(rng.random(shape) < 0.03, 4.0, 1.0)
        else:
            freedom = rng.uniform(4, 30)  # the fewer, the heavier the tails
            w = rng.standard_t(freedom, shape) / np.sqrt(shape[1] * freedom / (freedom - 2))
        yield name, w.astype(np.float32).astype(ml_dtypes.bfloat16)


def write_checkpoint(out: Path, seed: int = 0) -> None:
    """Make the directory `out` and put the checkpoint into it."""
    out.mkdir(parents=True)
    shapes = param_shapes(spec_from_config(CONFIG))
    plans = plan_shards(TensorOut(name, "BF16", shape) for name, shape in shapes.items())
    with ShardWriter(out, plans) as writer:
        for name, w in weights(shapes, seed):
            writer.write(name, w)
        writer.finish()
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    byte_tokenizer().save(str(out / "tokenizer.json"))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="a directory that does not exist yet")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    options = parser.parse_args()
    if options.out.exists():
        parser.exit(2, f"error: {options.out} exists; name a new directory\n")
    write_checkpoint(options.out, options.seed)
    print(f"{options.out}: a Llama with {CONFIG['num_hidden_layers']} layers and random weights")


if __name__ == "__main__":
    main()
