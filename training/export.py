# SPDX-License-Identifier: Apache-2.0
"""Write what was trained as a checkpoint: `python -m training.export TEXT RUN OUT`.

OUT gets what a Hub repository of a small model has, and a model card with the figures of the run,
among them those of a bigram model of the same tokens. OUT is overwritten.
"""

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from jqx.models import param_shapes
from jqx.tensors.paths import flatten, unflatten
from jqx_interop.checkpoints import ShardWriter, TensorOut, plan_shards

from .bigram import bigram_loss
from .model import CONFIG, SPEC
from .text import END, encode, read_corpus
from .train import LENGTH, mean_loss, tokenized

GENERATION = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END,
    "eos_token": END,
    "model_max_length": LENGTH,
    "clean_up_tokenization_spaces": False,
}
LAST = 0.7
"""The share of the last parameters; the rest is that of the early ones. Several passes over so
little text overfit, and the average of two points of one path does less (Wortsman et al., Robust
fine-tuning of zero-shot models, CVPR 2022).
"""
CARD = Path(__file__).with_name("card.md")


def export(text: Path, run: Path, out: Path) -> dict[str, Any]:
    """Write the checkpoint; returns the figures in its card."""
    state = serialization.msgpack_restore((run / "state").read_bytes())
    early = serialization.msgpack_restore((run / "early").read_bytes())
    blended = jax.tree.map(lambda a, b: LAST * a + (1 - LAST) * b, state["params"], early)
    trained = {name: jnp.asarray(x, jnp.bfloat16) for name, x in flatten(blended).items()}
    out.mkdir(parents=True, exist_ok=True)
    shapes = param_shapes(SPEC)
    plans = plan_shards(TensorOut(name, "BF16", shape) for name, shape in shapes.items())
    with ShardWriter(out, plans) as writer:
        for name in shapes:
            writer.write(name, np.asarray(trained[name]))
        writer.finish()
    described = {"config": CONFIG, "generation_config": GENERATION, "tokenizer_config": TOKENIZER}
    for name, content in described.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    shutil.copyfile(run / "tokenizer.json", out / "tokenizer.json")
    figures = measure(text, run, unflatten(trained)) | {"steps": int(state["step"])}
    (out / "README.md").write_text(CARD.read_text("utf-8").format(**figures), "utf-8")
    return figures


def measure(text: Path, run: Path, params: dict[str, Any]) -> dict[str, Any]:
    """Perplexities of the network and of a bigram model on the two kinds of held-out text."""
    corpus = read_corpus(text)
    tokenizer, ids = tokenized(corpus, run)
    figures: dict[str, Any] = {
        "epoch": len(ids),
        "parameters": sum(x.size for x in flatten(params).values()),
    }
    for name, documents in (("wiki", corpus.valid_wiki), ("papers", corpus.valid_papers)):
        valid = encode(tokenizer, documents)
        figures[name] = math.exp(mean_loss(params, valid))
        figures[f"{name}_bigram"] = math.exp(bigram_loss(ids, valid, CONFIG["vocab_size"]))
        figures[f"{name}_tokens"] = len(valid)
    return figures


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__)
    for name in ("text", "run", "out"):
        parser.add_argument(name, type=Path, metavar=name.upper())
    options = parser.parse_args()
    print(json.dumps(export(options.text, options.run, options.out), indent=2))


if __name__ == "__main__":
    main()
