# SPDX-License-Identifier: Apache-2.0
"""Models whose next token is known: each token is followed by one of its own.

Attention and MLP add nothing to the embedding, and the head looks for the embedding of the token
before. Formats that round weights and activations change none of this.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jqx.models import param_shapes
from jqx_interop.families import spec_from_config

END, VOCAB = 256, 257
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": END,
}


def byte_tokenizer() -> Tokenizer:
    """Token ids 0 to 255 are the bytes, END ends a text."""
    letters = [""] * 256
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for letter in pre_tokenizers.ByteLevel.alphabet():
        byte = decoders.ByteLevel().decode([letter]).encode()
        if len(byte) == 1:
            letters[byte[0]] = letter
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as GPT-2 orders them
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    assert all(letters[b] in ("", table[b]) for b in range(256))
    tokenizer = Tokenizer(models.BPE({table[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = encode
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def followers(texts: Sequence[bytes], after: int = END) -> np.ndarray:
    """Which token follows which: the bytes of each text in turn, then `after`; elsewhere the next
    larger byte.
    """
    found = (np.arange(VOCAB) + 1) % 256
    for text in texts:
        for this, following in zip(text, [*text[1:], after], strict=True):
            found[this] = following
    return found


def weights(config: Mapping[str, Any], following: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Name -> tensor of the model in which `following[i]` comes after `i`."""
    rng = np.random.default_rng(seed)
    spec = spec_from_config(config)
    found = {}
    for name, shape in param_shapes(spec).items():
        w = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            w = 0 * w
        found[name] = np.ones_like(w) if len(shape) == 1 else w
    table = rng.choice(np.array([-1.0, 1.0], np.float32), (spec.vocab, spec.hidden))
    head = np.zeros_like(table)
    for this, token in enumerate(following):
        head[token] += table[this]
    found[f"{spec.names.embed}.weight"], found[f"{spec.names.head}.weight"] = table, head
    return found


def write_model(
    folder: Path,
    following: np.ndarray | None = None,
    template: bool = False,
    says: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A checkpoint in `folder`, with a chat template and a generation_config.json if asked."""
    folder.mkdir(parents=True)
    config = CONFIG | changes
    following = followers([]) if following is None else following
    save_file(weights(config, following), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    if template:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    if says is not None:
        (folder / "generation_config.json").write_text(json.dumps(says))
    return folder
