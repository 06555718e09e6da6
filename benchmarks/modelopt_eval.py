# SPDX-License-Identifier: Apache-2.0
"""Perplexity of quantized models as NVIDIA ModelOpt simulates them, and as jqx runs what ModelOpt
exports: same calibration ids, same windows.

    python benchmarks/modelopt_eval.py MODEL --peer PEER/bin/python --text FILE.txt

PEER is a virtual environment with torch, transformers and nvidia-modelopt; it runs this file again
with "peer" as first word. ModelOpt computes in bfloat16, jqx as --compute says. Formats whose fake
quantization ModelOpt has for GPUs only (blocks with scales found at run time) are emulated.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import parser


@dataclass(frozen=True, kw_only=True)
class Format:
    """A configuration of ModelOpt, of its KV cache, and the block of weights if not its own."""

    config: str | None
    kv: str | None = None
    block: int = 0


FORMATS = {
    "plain": Format(config=None),
    "fp8": Format(config="FP8_DEFAULT_CFG"),
    "fp8_kv": Format(config="FP8_DEFAULT_CFG", kv="FP8_KV_CFG"),
    "fp8_pc_pt": Format(config="FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    "int8": Format(config="INT8_DEFAULT_CFG"),
    "int4_wo": Format(config="INT4_BLOCKWISE_WEIGHT_ONLY_CFG", block=64),
    "nvfp4": Format(config="NVFP4_DEFAULT_CFG"),
    "nvfp4_kv": Format(config="NVFP4_DEFAULT_CFG", kv="NVFP4_KV_CFG"),
    "mxfp4": Format(config="MXFP4_DEFAULT_CFG"),
    "mxfp8": Format(config="MXFP8_DEFAULT_CFG"),
}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--peer", type=Path, required=True, help="python of the peer environment")
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--calib", type=Path, help="text to calibrate on (default: --text)")
    p.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    p.add_argument("--tokens", type=int, default=20480)
    p.add_argument("--window", type=int, default=512)
    p.add_argument("--stride", type=int, default=256)
    p.add_argument("--sequences", type=int, default=16, help="for calibration, of 512 tokens")
    p.add_argument("--compute", nargs="+", default=["float32"])
    p.add_argument("--keep", type=Path, help="directory for what ModelOpt exports")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(a, a.keep or Path(folder))
    if a.json:
        print(json.dumps(rows, indent=1))


def measure(a: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row a format and arithmetic, printed as soon as it is there."""
    from jqx_interop.evaluation.windows import slide

    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "ids.npy", tokens_of(a.model, a.text, a.tokens).astype(np.int32))
    calib = tokens_of(a.model, a.calib or a.text, a.sequences * 512).reshape(-1, 1, 512)
    np.save(folder / "calib.npy", calib)
    windows = slide(np.load(folder / "ids.npy"), a.window, a.stride)
    np.savez(folder / "windows.npz", ids=windows.ids, first=windows.first)
    rows = []
    for name in a.formats:
        theirs = peer(a, FORMATS[name], folder, folder / name)
        checkpoint = a.model if FORMATS[name].config is None else folder / name
        for compute in a.compute:
            row = {"format": name, "compute": compute}
            row |= compared(a, checkpoint, folder / "ids.npy", compute, theirs)
            rows.append(row)
            print(
                f"{name:10s} ModelOpt {row['modelopt']:9.4f} | jqx {compute:8s} {row['jqx']:9.4f}"
                f" | {row['difference']:+.3%} +- {row['difference_se']:.3%}",
                file=sys.stderr,
                flush=True,
            )
    return rows


def compared(
    a: argparse.Namespace, checkpoint: Path, ids: Path, compute: str, theirs: np.ndarray
) -> dict[str, float]:
    """Both perplexities, their relative difference, and its standard error, window by window."""
    from jqx_interop.evaluation import EvalSettings, prepare, scores
    from jqx_interop.progress import Silent

    settings = EvalSettings(text=ids, window=a.window, stride=a.stride, compute=compute)
    sums = scores(prepare(checkpoint, None, settings), Silent())
    ratio = sums.mean(sums["nll"] - theirs).exp()
    return {
        "modelopt": sums.mean(theirs).exp().value,
        "jqx": sums.mean(sums["nll"]).exp().value,
        "difference": ratio.value - 1,
        "difference_se": ratio.se or 0.0,
    }


def tokens_of(model: Path, text: Path, count: int) -> np.ndarray:
    """The first `count` tokens of `text`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    found = tokenizer.encode(text.read_text()[: 12 * count]).ids
    if len(found) < count:
        sys.exit(f"{text} has {len(found)} tokens, {count} are needed")
    return np.array(found[:count], np.int64)


def peer(a: argparse.Namespace, fmt: Format, folder: Path, out: Path) -> np.ndarray:
    """The negative log-likelihood of every window by ModelOpt in `fmt`; its export is in `out`
    afterwards.
    """
    words = [a.model, out, fmt.config or "-", fmt.kv or "-", fmt.block, folder, a.threads]
    command = [a.peer, "-P", Path(__file__).resolve(), "peer", *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[-3000:]}")
    return np.array(json.loads(done.stdout.splitlines()[-1]))


# --- what runs in the peer's environment


def as_peer() -> None:
    """Calibrate, evaluate, export; the last line printed is the result."""
    model_dir, out, config_name, kv, block, folder, threads = sys.argv[2:9]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(int(threads))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    if config_name != "-":
        quantize(model, config_name, kv, int(block), np.load(Path(folder) / "calib.npy"))
    windows = np.load(Path(folder) / "windows.npz")
    result = nll_of(model, windows["ids"], windows["first"])
    if config_name != "-":
        from modelopt.torch.export import export_hf_checkpoint

        with torch.inference_mode():
            export_hf_checkpoint(model, export_dir=out)
    print(json.dumps(result))


def quantize(model: Any, config_name: str, kv: str, block: int, calib: np.ndarray) -> None:
    """Fake-quantize `model` in place."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.quantization import tensor_quant

    tensor_quant.dynamic_block_quantize_op = emulated
    config = copy.deepcopy(getattr(mtq, config_name))
    for entry in config["quant_cfg"]:
        cfg = entry.get("cfg")
        if block and isinstance(cfg, dict) and "block_sizes" in cfg:
            cfg["block_sizes"][-1] = block
    if kv != "-":
        config["quant_cfg"] = [*config["quant_cfg"], *copy.deepcopy(getattr(mtq, kv)["quant_cfg"])]

    def forward_loop(model: Any) -> None:
        with torch.no_grad():
            for batch in torch.from_numpy(calib):
                model(batch)

    mtq.quantize(model, config, forward_loop)


def nll_of(model: Any, ids: np.ndarray, first: np.ndarray) -> list[float]:
    """The summed negative log-likelihood of the tokens that each window scores."""
    import torch

    found = []
    for row, start in zip(torch.from_numpy(ids).long(), first.tolist(), strict=True):
        with torch.no_grad():
            logits = model(row[None]).logits[0, start - 1 : -1].float()
        nll = torch.nn.functional.cross_entropy(logits, row[start:], reduction="none")
        found.append(float(nll.double().sum()))
    return found


def emulated(  # noqa: PLR0913  the signature is that of the kernels
    x: Any,
    block: int,
    amax: Any,
    bits: int,
    exponent_bits: int,
    scale_bits: int,
    scale_exponent_bits: int,
) -> Any:
    """Fake quantization with block scales found at run time, as ModelOpt's GPU kernels do it."""
    import torch

    exponent_only = scale_bits - 1 == scale_exponent_bits
    width = block if exponent_only else 16  # the two-level kernel has blocks of 16 only
    blocks = x.float().reshape(-1, x.shape[-1])
    blocks = torch.nn.functional.pad(blocks, (0, -x.shape[-1] % width))
    blocks = blocks.reshape(blocks.shape[0], -1, width)
    largest = blocks.abs().amax(-1, keepdim=True)
    if exponent_only:
        bound = 6.0 if bits == 4 else 448.0
        mantissa, exponent = torch.frexp(largest / bound)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
        step = torch.where(largest == 0, torch.ones_like(largest), torch.exp2(exponent.float()))
    else:
        tensor_scale = amax.float().amax() / (6.0 * 448.0)
        step = (largest / (6.0 * tensor_scale)).clamp(max=448.0)
        step = step.to(torch.float8_e4m3fn).float() * tensor_scale
        step = torch.where(step < 1e-5, torch.ones_like(step), step)
    magnitude = blocks.abs() / step
    if bits == 4:
        codes = to_e2m1(magnitude)
    else:
        codes = magnitude.clamp(max=448.0).to(torch.float8_e4m3fn).float()
    y = torch.copysign(codes * step, blocks).reshape(blocks.shape[0], -1)
    return y[:, : x.shape[-1]].reshape(x.shape).to(x.dtype)


def to_e2m1(magnitude: Any) -> Any:
    """The nearest of 0, .5, 1, 1.5, 2, 3, 4, 6; ties go to the even code."""
    import torch

    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (torch.round(magnitude / step) * step).clamp(max=6.0)


if __name__ == "__main__":
    as_peer() if sys.argv[1:2] == ["peer"] else main()
