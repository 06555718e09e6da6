# SPDX-License-Identifier: Apache-2.0
"""GPTQ of many experts: one program for all against one call for each.

    python benchmarks/expert_algorithms.py [--shapes 64x64 128x256] [--counts 8 32 128] [--runs 3]

Pin it to one core (`taskset -c 0`, and OPENBLAS_NUM_THREADS=1) for numbers that other processes do
not move: times are those of the processor, and runs of both alternate. `ratio` is one by one over
together, of the fastest runs; `codes` the share of numbers of the rounded weights that differ.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqx.algorithms import InputStats, Linear, calibrated, lanes_for, of_each
from jqx.config import Algorithm
from jqx.formats import find_format


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--shapes", nargs="+", default=["32x32", "64x64", "128x128", "128x256"])
    p.add_argument("--counts", nargs="+", type=int, default=[8, 32, 128])
    p.add_argument("--algorithm", default="gptq")
    p.add_argument("--format", default="int4_b32")
    p.add_argument("--runs", type=int, default=3)
    a = p.parse_args()
    print("shape      experts  one by one ms  together ms  ratio  codes")
    for shape in a.shapes:
        n, k = map(int, shape.split("x"))
        for count in a.counts:
            alone, together, off = measured((count, n, k), a)
            times = f"{alone:13.3f}  {together:11.3f}  {alone / together:5.2f}"
            print(f"{shape:10} {count:7}  {times}  {off:.1e}", flush=True)


def measured(shape: tuple[int, int, int], a: argparse.Namespace) -> tuple[float, float, float]:
    """Milliseconds of an expert one by one and together, and the share of numbers that differ."""
    given = {"fmt": find_format(a.format), "steps": (Algorithm.of(a.algorithm),)}
    weights, stats = drawn(*shape)
    lanes = lanes_for(shape[1:], given["steps"])

    def alone() -> list[Any]:
        pairs = zip(weights, stats, strict=True)
        done = (calibrated(Linear(jnp.asarray(w)), row, **given) for w, row in pairs)
        return [jax.block_until_ready(found).weight for found in done]

    def together() -> Any:
        rows = {kind: np.stack([row[kind] for row in stats]) for kind in stats[0]}
        linears = Linear(jnp.asarray(np.stack(weights)))
        return jax.block_until_ready(of_each(linears, rows, run=calibrated, lanes=lanes, **given))

    wanted, got = np.stack([np.asarray(w) for w in alone()]), np.asarray(together().weight)
    times = [(seconds(alone), seconds(together)) for _ in range(a.runs)]
    each = (1000 * min(row) / shape[0] for row in zip(*times, strict=True))
    return (*each, float((wanted != got).mean()))


def drawn(count: int, n: int, k: int) -> tuple[list[np.ndarray], list[InputStats]]:
    """Weights, and statistics of inputs whose channels differ in size."""
    r = np.random.default_rng(0)
    weights = [(r.standard_normal((n, k)) / 8).astype(jnp.bfloat16) for _ in range(count)]
    stats = []
    for _ in range(count):
        x = (r.standard_normal((2 * k, k)) * np.exp(r.standard_normal(k))).astype(np.float32)
        magnitudes = np.abs(x)
        row = {"channel_mean": magnitudes.mean(0), "channel_amax": magnitudes.max(0)}
        stats.append({"gram": x.T @ x, **row})
    return weights, stats


def seconds(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


if __name__ == "__main__":
    main()
