# SPDX-License-Identifier: Apache-2.0
"""How near the limits of the machine a run comes, each limit measured in the same run.

    python benchmarks/throughput.py calibration MODEL      FLOP/s against float32 products alone
    python benchmarks/throughput.py encoding --gib 2       bytes/s of whole runs against `cp`

calibration times the compiled program of one block, statistics included, in turn with its matrix
products alone; encoding makes a checkpoint of random Llama blocks and times processes from start to
exit, with and without the time an empty checkpoint takes. Both alternate and report medians.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from measure import median, run

from jqx.models import BlockKind, kinds
from jqx_interop.blocks import load_block
from jqx_interop.checkpoints import ShardWriter, TensorOut, plan_shards
from jqx_interop.device import compute_of
from jqx_interop.families import spec_from_config
from jqx_interop.job import prepare
from jqx_interop.program import Program
from jqx_interop.runner import block_step
from jqx_interop.settings import Settings

GOALS = {"fp8_pc_pt": 0.6, "w4a16_nvfp4": 0.4, "int4_wo": 0.4}


def calibration(a: argparse.Namespace) -> None:
    """One block of MODEL: its program against its products."""
    job = prepare(a.model, "fp8", Settings())
    assert job.spec is not None
    kind, compute = kinds(job.spec)[0], compute_of(a.compute, job.dtype)
    params = load_block(job, 0, compute)
    shape = (a.rows // a.length, a.length, job.spec.hidden)
    h = jax.random.normal(jax.random.key(0), shape).astype(compute.carrier)
    program = Program(job.spec, kind, compute, job.dtype.name)
    shapes = [m.shape for m in job.inventory.modules if m.path.startswith("model.layers.0.")]
    inputs = {k: jnp.ones((a.rows, k), compute.carrier) for _, k in shapes}
    weights = [jnp.ones(shape, compute.carrier) for shape in shapes]
    products = jax.jit(_products)
    state = [h]

    def step() -> None:
        state[0], _, _ = block_step(params, state[0], program=program)
        jax.block_until_ready(state[0])

    def plain() -> None:
        jax.block_until_ready(products(inputs, weights))

    times = _alternate([step, plain], a.runs)
    linear = 2 * a.rows * sum(n * k for n, k in shapes)
    flops = linear + _attention_flops(kind, a.rows, a.length)
    rates = [(flops / s / 1e9, linear / p / 1e9) for s, p in zip(*times, strict=True)]
    block, alone = (median([row[i] for row in rates]) for i in range(2))
    print(
        f"{a.rows} tokens a call in {a.compute}: block with statistics {block:.0f} GFLOP/s, "
        f"its products alone {alone:.0f} GFLOP/s, "
        f"ratio {median([s / p for s, p in rates]):.2f} (goal 0.80)"
    )


def _products(inputs: dict[int, jax.Array], weights: list[jax.Array]) -> list[jax.Array]:
    """The block's matrix products alone, accumulated in float32."""
    last = (((1,), (1,)), ((), ()))
    dot = partial(jax.lax.dot_general, dimension_numbers=last, preferred_element_type=jnp.float32)
    return [dot(inputs[w.shape[1]], w) for w in weights]


def _attention_flops(kind: BlockKind, rows: int, length: int) -> float:
    """Scores and sums of causal attention: half of all pairs."""
    return 2 * rows * length * kind.attention.heads * kind.attention.head_dim


def _alternate(works: list, runs: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in works]
    for i in range(runs + 2):
        for work, found in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            if i >= 2:
                found.append(time.perf_counter() - start)
    return times


def encoding(a: argparse.Namespace) -> None:
    """Data-free recipes over a checkpoint of a few GiB, against cp."""
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        big, small = Path(folder) / "big", Path(folder) / "small"
        size = make_checkpoint(big, a.hidden, a.gib)
        make_checkpoint(small, a.hidden, 0)
        jqx = str(Path(sys.executable).with_name("jqx"))
        rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in GOALS}
        for _ in range(a.runs):
            for name, found in rows.items():
                copied = _timed(["cp", "-r", big, Path(folder) / "out"], folder)
                durable = _timed(["sh", "-c", f"cp -r {big} {folder}/out && sync"], folder)
                whole = _timed(
                    [jqx, "quantize", big, Path(folder) / "out", "--qformat", name], folder
                )
                start = _timed(
                    [jqx, "quantize", small, Path(folder) / "out", "--qformat", name], folder
                )
                found.append((copied / whole, durable / whole, durable / (whole - start)))
        for name, found in rows.items():
            copied, durable, steady = (median([row[i] for row in found]) for i in range(3))
            print(
                f"{name:12s} {size / 2**30:.1f} GiB: {copied:.0%} of cp's bytes/s (goal "
                f"{GOALS[name]:.0%}); of cp and sync, which leaves the files on the disk as jqx "
                f"does, {durable:.0%}, and {steady:.0%} without start-up"
            )


def _timed(command: list, folder: str) -> float:
    seconds = run(command).seconds
    shutil.rmtree(Path(folder) / "out", ignore_errors=True)
    return seconds


def make_checkpoint(path: Path, hidden: int, gib: float) -> int:
    """A Llama checkpoint of about `gib` GiB of random weights; returns its bytes."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 7 * hidden // 2,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(hidden // 512, 1),
        "num_hidden_layers": max(1, round(gib * 2**30 / (2 * hidden**2 * 13))) if gib else 1,
        "vocab_size": 256,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    if not gib:
        config |= {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 4}
        config |= {"num_key_value_heads": 1}
    from jqx.models import param_shapes

    shapes = param_shapes(spec_from_config(config))
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    plans = plan_shards([TensorOut(n, "BF16", s) for n, s in shapes.items()], "100GB")
    noise = np.random.default_rng(0).standard_normal(1 << 22).astype(ml_dtypes.bfloat16)
    with ShardWriter(path, plans) as writer:
        for name, shape in shapes.items():
            writer.write(name, np.resize(noise, shape))
        writer.finish()
    subprocess.run(
        ["cat", *(path / plan.file for plan in plans)], stdout=subprocess.DEVNULL, check=True
    )
    return sum(plan.size for plan in plans)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(required=True)
    one = commands.add_parser("calibration")
    one.add_argument("model", type=Path)
    one.add_argument("--rows", type=int, default=512)
    one.add_argument("--length", type=int, default=512)
    one.add_argument("--runs", type=int, default=30)
    one.add_argument("--compute", default="float32", choices=["float32", "bf16"])
    one.set_defaults(work=calibration)
    two = commands.add_parser("encoding")
    two.add_argument("--gib", type=float, default=2.0)
    two.add_argument("--hidden", type=int, default=2048)
    two.add_argument("--folder", type=Path, default=None)
    two.add_argument("--runs", type=int, default=3)
    two.set_defaults(work=encoding)
    a = p.parse_args()
    a.work(a)


if __name__ == "__main__":
    main()
