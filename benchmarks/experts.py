# SPDX-License-Identifier: Apache-2.0
"""What experts cost: time by how many there are, and by how many a token takes; memory by what lies
on the disk.

    python benchmarks/experts.py [--hidden 512] [--inner 256] [--layers 2] [--tokens 8192]
    python benchmarks/experts.py --layers 16 --hidden 1024 --inner 512 --experts 128 --memory
    python benchmarks/experts.py --layers 2 --hidden 1024 --inner 512 --experts 256 --tokens 4096
        --memory --command auto

Random checkpoints of Qwen3-MoE in bfloat16 are quantized to NVFP4 by `jqx.ptq`, with and without
calibrated inputs: the difference is what running the experts takes. Every number is the fastest of
--runs in one process, after one that compiles. With --memory each is one run of a process of its
own, and what is told of it is the most of its memory that is no page of a file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import jqx_interop as ji

BF16 = ml_dtypes.bfloat16
VOCAB = 512
RECIPES = ("w4a16_nvfp4", "nvfp4")
COMMANDS = {
    "quantize": "quantize {model} {out} --qformat nvfp4 --calib {ids}",
    "auto": "auto {model} {out} --bits 6 --formats nvfp4,fp8 --calib {ids}",
    "eval": "eval {model} --text {ids}",
}
"""What --memory may run."""


def write(folder: Path, sizes: tuple[int, int, int], experts: int, taken: int) -> Path:
    """A checkpoint of `sizes` (layers, hidden, inner of an expert), `taken` experts for a token.
    Experts are turns of the same numbers: those of a 6 GB model are drawn at once.
    """
    layers, hidden, inner = sizes
    folder.mkdir(parents=True)
    heads = max(hidden // 128, 1)
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 2 * inner,
        "moe_intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 128,
        "num_experts": experts,
        "num_experts_per_tok": taken,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng, names = np.random.default_rng(0), {}

    def drawn(*shape: int) -> np.ndarray:
        return (0.02 * rng.standard_normal(shape, np.float32)).astype(BF16)

    def put(file: str, tensors: dict[str, np.ndarray]) -> None:
        save_file(tensors, folder / file, {"format": "pt"})
        names.update(dict.fromkeys(tensors, file))

    ends = {
        "model.embed_tokens.weight": drawn(VOCAB, hidden),
        "lm_head.weight": drawn(VOCAB, hidden),
    }
    put("model-00000.safetensors", {**ends, "model.norm.weight": np.ones(hidden, BF16)})
    for i in range(layers):
        prefix, wide = f"model.layers.{i}.", heads * 128
        tensors = {f"{prefix}self_attn.{n}_proj.weight": drawn(wide, hidden) for n in "qkv"}
        tensors[f"{prefix}self_attn.o_proj.weight"] = drawn(hidden, wide)
        tensors |= {f"{prefix}self_attn.{n}_norm.weight": np.ones(128, BF16) for n in "qk"}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = np.ones(hidden, BF16)
        tensors[f"{prefix}mlp.gate.weight"] = drawn(experts, hidden)
        base = drawn(3 * inner * hidden)
        for e in range(experts):
            gate, up, down = np.roll(base, 977 * e).reshape(3, -1)
            stem = f"{prefix}mlp.experts.{e}."
            tensors[f"{stem}gate_proj.weight"] = gate.reshape(inner, hidden)
            tensors[f"{stem}up_proj.weight"] = up.reshape(inner, hidden)
            tensors[f"{stem}down_proj.weight"] = down.reshape(hidden, inner)
        put(f"model-{i + 1:05d}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def timed(model: Path, recipe: str, ids: Path, runs: int) -> float:
    """Seconds of the fastest of so many runs, after one that compiles."""
    seconds = []
    for _ in range(runs + 1):
        with tempfile.TemporaryDirectory(dir=model.parent) as out:
            start = time.perf_counter()
            ji.ptq(model, Path(out) / "out", recipe, calib=ids)
            seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def most_memory(command: list[str]) -> tuple[float, float]:
    """Seconds and the most MiB of a process that are no pages of a file."""
    start, most = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                most = max(most, int(line.split()[1]))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return time.perf_counter() - start, most / 1024


def row(a: argparse.Namespace, experts: int, taken: int) -> str:
    """One line of the table."""
    with tempfile.TemporaryDirectory(dir=a.place) as place:
        model = write(Path(place) / "model", (a.layers, a.hidden, a.inner), experts, taken)
        ids, all_experts = Path(place) / "ids.npy", a.layers * experts
        draw = np.random.default_rng(1).integers(0, VOCAB, (a.tokens // 512, 1, 512))
        np.save(ids, draw)
        size = sum(file.stat().st_size for file in model.iterdir()) / 1e9
        told = f"| {experts} | {taken} | {size:.2f} "
        if a.memory:
            where = {"model": model, "out": Path(place) / "out", "ids": ids}
            words = COMMANDS[a.command].format(**where).split()
            seconds, mib = most_memory([str(Path(sys.executable).with_name("jqx")), *words])
            return f"{told}| {seconds:.1f} | {mib:.0f} |"
        plain, whole = (timed(model, recipe, ids, a.runs) for recipe in RECIPES)
        each, running = 1e3 * whole / all_experts, whole - plain
        return f"{told}| {plain:.2f} | {whole:.2f} | {each:.2f} | {a.tokens / running:,.0f} |"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--inner", type=int, default=256)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--tokens", type=int, default=8192, help="calibration tokens, a multiple of 512")
    p.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    p.add_argument("--taken", type=int, nargs="+", default=[8], help="experts for each token")
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--memory", action="store_true", help="memory of one run each, not times")
    p.add_argument("--command", choices=list(COMMANDS), default="quantize", help="with --memory")
    p.add_argument("--place", type=Path, help="a folder for the models (default: temporary)")
    a = p.parse_args()
    if a.memory:
        print("| experts | for a token | GB | seconds | MiB |\n|---|---|---|---|---|")
    else:
        print(
            "| experts | taken | GB | weights alone, s | with inputs, s | ms an expert | tokens/s |"
        )
        print("|---|---|---|---|---|---|---|")
    for experts in a.experts:
        for taken in a.taken:
            if taken <= experts:
                print(row(a, experts, taken), flush=True)


if __name__ == "__main__":
    main()
