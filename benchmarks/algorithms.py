# SPDX-License-Identifier: Apache-2.0
"""What every algorithm for weights is worth on one model: seconds, perplexity and divergence from
the original, from one calibration (`--max-tokens 0`: seconds alone).

    python benchmarks/algorithms.py MODEL --calib FILE.txt --text OTHER.txt [--formats int4 nvfp4]
        [--peer NAME=DIR ...]

The statistics are collected once; `seconds` is what a recipe takes from them, process start to
files written. `--text` chose nothing. `--peer` adds checkpoints that others made. All INT4 formats
have blocks of 64.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ALGORITHMS: dict[str, str | dict | list] = {
    "max": "max",
    "mse": "mse",
    "awq_lite": "awq_lite",
    "awq_clip": "awq_clip",
    "awq_full": "awq_full",
    "wmse": "wmse",
    "wmse, block moments": {"method": "wmse", "weight": "gram"},
    "awq_lite, then wmse": ["awq_lite", "wmse"],
    "gptq": "gptq",
    "gptq, weighted scales": {"method": "gptq", "scales": "weighted"},
    "gptq, weighted scales, ordered": {
        "method": "gptq",
        "scales": "weighted",
        "act_order": True,
    },
}
NVFP4 = {
    "mse sweep": {"method": "mse", "fp8_scale_sweep": True},
    "local_hessian": "local_hessian",
    "svdquant": "svdquant",
}
COMMON = {name: algorithm for name, algorithm in ALGORITHMS.items() if name != "mse"}
FORMATS = {"int4": ("int4", ALGORITHMS), "nvfp4": ("nvfp4", COMMON | NVFP4)}
JQX = Path(sys.executable).with_name("jqx")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--calib", type=Path, required=True)
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--sequences", type=int, default=32)
    p.add_argument("--max-tokens", type=int, default=20_000)
    p.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    p.add_argument("--only", nargs="+", default=None, help="names of algorithms")
    p.add_argument("--peer", nargs="*", default=[], metavar="NAME=DIR")
    p.add_argument("--json", type=Path, default=None)
    a = p.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        stats = Path(folder) / "stats"
        size = ["--calib", a.calib, "--calib-size", a.sequences]
        seconds = timed(["calibrate", a.model, stats, *size, "--kv-cache", "none"])
        print(f"statistics of {a.sequences} sequences: {seconds:.1f} s", flush=True)
        rows.append({"format": "original", **evaluated(a, a.model)})
        for name in a.formats:
            base, algorithms = FORMATS[name]
            for told, algorithm in algorithms.items():
                if a.only is None or told in a.only:
                    row = measured(a, Path(folder), (base, algorithm))
                    rows.append({"format": name, "algorithm": told, **row})
                    show(rows[-1])
        for peer in a.peer:
            told, _, path = peer.partition("=")
            rows.append({"format": told, **evaluated(a, Path(path))})
            show(rows[-1])
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1) + "\n")


def measured(a: argparse.Namespace, folder: Path, what: tuple[str, object]) -> dict[str, object]:
    """One recipe from the statistics in `folder`."""
    base, algorithm = what
    recipe, out = folder / "recipe.yaml", folder / "out"
    recipe.write_text(yaml.safe_dump({"extends": base, "algorithm": algorithm}))
    shutil.rmtree(out, ignore_errors=True)
    block = ["--set", "block=64"] if base == "int4" else []
    seconds = timed(
        ["quantize", a.model, out, "--recipe", recipe, "--stats", folder / "stats", *block]
    )
    return {**evaluated(a, out), "seconds": round(seconds, 1)}


def timed(words: list[object]) -> float:
    """Seconds of one command."""
    started = time.monotonic()
    subprocess.run([JQX, *map(str, words)], check=True, capture_output=True)
    return time.monotonic() - started


def evaluated(a: argparse.Namespace, model: Path) -> dict[str, float]:
    """What `jqx eval` says; nothing where no tokens are asked for."""
    if not a.max_tokens:
        return {}
    command = [JQX, "eval", model, "--reference", a.model, "--text", a.text, "--json"]
    command += ["--max-tokens", a.max_tokens, "--window", 512, "--stride", 512]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def show(row: dict[str, object]) -> None:
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
