# SPDX-License-Identifier: Apache-2.0
"""Tokens a second, and memory, of text generation by jqx and by transformers with torch.

    python benchmarks/generation.py MODEL --peer PEER/bin/python

PEER is a virtual environment with torch and transformers; this script and jqx run without torch.
The model runs in bfloat16 by both, and quantized by jqx alone. Every process loads its model once
and then waits for its turn, so runs alternate on the same cores; medians are reported. `read` is
the share of the memory bandwidth, as measured by the largest number in a large array, that reading
the weights once a token makes up.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import parser

HERE = Path(__file__).resolve().parent
RECIPES = {
    "int8 weights": ("int8_weight_only",),
    "int4 weights": ("int4_blockwise_weight_only", "--set", "block=64"),
    "fp8": ("fp8", "--calib-size", "8"),
    "nvfp4": ("nvfp4", "--calib-size", "8"),
}
"""Name of a row -> what `jqx quantize --qformat` is given."""


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--peer", type=Path, help="python of the peer environment")
    p.add_argument("--formats", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    p.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    p.add_argument("--new", type=int, default=96, help="tokens to generate")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker:
        work(a.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(a, Path(folder))
    if a.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            f"{row['name']:22s} {row['decode']:7.1f} tokens/s, prompts {row['prefill']:7.0f} "
            f"tokens/s, weights {row['weights'] / 2**20:6.1f} MiB of {row['files'] / 2**20:6.1f}, "
            f"process {row['peak'] / 2**20:6.0f} MiB, read {row['read']:.0%}"
            + (f", {row['ratio']:.2f} times transformers" if "ratio" in row else "")
        )


def measure(a: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row for every program and format."""
    pin = ["taskset", "-c", ",".join(map(str, range(a.threads)))]
    ours = [*pin, sys.executable, HERE / "generation.py", "--worker"]
    commands = {"jqx bfloat16": [*ours, a.model]}
    for name in a.formats:
        out = folder / name.replace(" ", "-")
        jqx = Path(sys.executable).with_name("jqx")
        call(jqx, "quantize", a.model, out, "--qformat", *RECIPES[name])
        commands[f"jqx {name}"] = [*ours, out]
    if a.peer:
        script = HERE / "transformers_peer.py"
        commands["transformers bfloat16"] = [*pin, a.peer, "-P", script, a.model, str(a.threads)]
    workers = {name: Worker(command) for name, command in commands.items()}
    vocab = json.loads((a.model / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocab, (a.batch, a.prompt)).tolist()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for n in range(-1, a.runs):  # the first compiles
        for name, worker in workers.items():
            reply = worker.ask({"ids": ids, "new": a.new})
            if n >= 0:
                found[name].append(reply)
    speed = bandwidth(a.threads)
    rows = [row_of(name, replies, a, speed) for name, replies in found.items()]
    peer = next((row for row in rows if row["name"].startswith("transformers")), None)
    for row in rows:
        if peer is not None and row is not peer:
            pairs = zip(found[row["name"]], found[peer["name"]], strict=True)
            row["ratio"] = statistics.median(p["decode"] / o["decode"] for o, p in pairs)
    return rows


def row_of(
    name: str, replies: list[dict[str, Any]], a: argparse.Namespace, speed: float
) -> dict[str, Any]:
    decode = statistics.median(r["decode"] for r in replies)
    prefill = statistics.median(r["prefill"] for r in replies)
    last = replies[-1]
    step = decode / (a.new - 1)
    return {
        "name": name,
        "decode": a.batch / step,
        "prefill": a.batch * a.prompt / prefill,
        "weights": last["weights"],
        "files": last["files"],
        "peak": last["peak"],
        "read": last["read"] / step / speed,
        "bandwidth": speed,
    }


class Worker:
    """A process that has loaded a model and answers a line of JSON with another."""

    def __init__(self, command: list[str | Path]):
        self._process = subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} has ended")
        return json.loads(line)


def work(model: Path) -> None:
    """Answer questions about generation by jqx until there are no more."""
    import jax

    from jqx.models import param_shapes
    from jqx.models.generate import Session
    from jqx.models.layers import module
    from jqx.models.sampling import Draw
    from jqx_interop.device import compute_of
    from jqx_interop.stored import open_model, read_params

    source = open_model(model)
    params = read_params(source, param_shapes(source.spec))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    names = source.spec.names
    unread = 0 if source.spec.tied else module(params, names.embed)["weight"].nbytes
    for line in sys.stdin:
        asked = json.loads(line)
        most = len(asked["ids"][0]) + asked["new"]
        session = Session(source.spec, params, compute_of("auto", source.dtype), most)
        start = time.perf_counter()
        session.read(asked["ids"])
        tokens = session.tokens(Draw(), None)
        next(tokens)
        first = time.perf_counter()
        for _ in range(asked["new"] - 1):
            next(tokens)
        reply = {
            "prefill": first - start,
            "decode": time.perf_counter() - first,
            "weights": weights,
            "read": weights - unread,
            "files": files(model),
            "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
        print(json.dumps(reply), flush=True)


def files(model: Path) -> int:
    """Bytes of the weights on disk."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def bandwidth(threads: int) -> float:
    """Bytes a second at which large arrays are read."""
    parts = [np.ones(1 << 25, np.float32) for _ in range(threads)]
    best = np.inf
    for _ in range(10):
        crew = [threading.Thread(target=part.max) for part in parts]
        start = time.perf_counter()
        for one in crew:
            one.start()
        for one in crew:
            one.join()
        best = min(best, time.perf_counter() - start)
    return float(sum(part.nbytes for part in parts) / best)


def call(*command: str | Path) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


if __name__ == "__main__":
    main()
