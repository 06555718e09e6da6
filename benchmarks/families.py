# SPDX-License-Identifier: Apache-2.0
"""How long the calibration of one block takes in every family, beside Llama's of the same width.

    python benchmarks/families.py [--width 512] [--tokens 512] [--runs 15] [family ...]

Configurations are those of the tests, with their odd options, and the sizes of Llama: width, three
times as many inner channels, heads of 64 and as many key heads. Runs alternate with Llama's; the
ratio is that of the fastest. Families whose MLP is not gated, or always four times as wide, compute
another number of products: the column "products" has that ratio.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jqx.models import FLOAT32, block_shapes, kinds, linears
from jqx_interop.families import spec_from_config
from jqx_interop.program import Program
from jqx_interop.runner import block_step

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny_families import CONFIGS, DENSE, ONE_EACH  # noqa: E402

HEADS = ("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "num_kv_heads")
WIDTHS = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
INNER = ("intermediate_size", "ffn_dim", "ff_intermediate_size", "ffn_hidden_size", "n_inner")


def config_of(case: str, width: int) -> dict[str, Any]:
    """The configuration of a case in another size."""
    config = copy.deepcopy(CONFIGS[case])
    sizes = dict.fromkeys(HEADS, width // 64) | dict.fromkeys(WIDTHS, width)
    sizes |= dict.fromkeys(INNER, 3 * width) | {"head_dim": 64, "kv_channels": 64}
    config |= {key: size for key, size in sizes.items() if config.get(key) is not None}
    for key in ("short_factor", "long_factor"):
        if key in (config.get("rope_scaling") or {}):
            each = config["rope_scaling"][key]
            config["rope_scaling"][key] = list(np.resize(each, _pairs(config)))
    if config["model_type"] == "qwen":
        config["intermediate_size"] = 6 * width
    return config


class Calibration:
    """One block of a family, and what it is run on."""

    def __init__(self, config: dict[str, Any], tokens: int):
        spec = spec_from_config(config)
        kind = next(k for k in kinds(spec) if k.attention is not None and k.mlp is not None)
        rng = np.random.default_rng(0)
        shapes = block_shapes(spec, kind)
        self.products = sum(
            int(np.prod(shapes[f"{name}.weight"]))
            for name in linears(spec, kind)
            if f"{name}.weight" in shapes
        )
        leaves = {
            name: jnp.asarray(rng.standard_normal(shape, np.float32) * 0.02)
            for name, shape in shapes.items()
        }
        self.params = unflatten_dict(leaves, sep=".")
        self.states = rng.standard_normal((1, tokens, spec.hidden), np.float32)
        self.program = Program(spec, kind, FLOAT32, "float32")

    def seconds(self) -> float:
        """One run."""
        h = jnp.asarray(self.states)
        start = time.perf_counter()
        jax.block_until_ready(block_step(self.params, h, program=self.program))
        return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("family", nargs="*", help="model types (default: all without experts)")
    p.add_argument("--width", type=int, default=512)
    p.add_argument("--tokens", type=int, default=512)
    p.add_argument("--runs", type=int, default=15)
    a = p.parse_args()
    base = Calibration(_llama(a), a.tokens)
    print("| family | ms | Llama | time | products |\n| --- | --- | --- | --- | --- |")
    for family in a.family or DENSE:
        mine = Calibration(config_of(ONE_EACH[family], a.width), a.tokens)
        pairs = [(mine.seconds(), base.seconds()) for _ in range(a.runs + 2)][2:]
        fastest, its = (1000 * min(each) for each in zip(*pairs, strict=True))
        products = mine.products / base.products
        print(
            f"| {family} | {fastest:.1f} | {its:.1f} | {fastest / its:.2f} | {products:.2f} |",
            flush=True,
        )


def _pairs(config: dict[str, Any]) -> int:
    """How many pairs of channels turn."""
    share = config.get("partial_rotary_factor") or config.get("rope_pct") or 1.0
    return int(64 * share) // 2


def _llama(a: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": a.width,
        "intermediate_size": 3 * a.width,
        "num_hidden_layers": 1,
        "num_attention_heads": a.width // 64,
        "max_position_embeddings": 4096,
    }


if __name__ == "__main__":
    main()
