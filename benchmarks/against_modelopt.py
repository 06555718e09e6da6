# SPDX-License-Identifier: Apache-2.0
"""The same jobs by jqx and by NVIDIA ModelOpt: same machine, threads and calibration ids, process
start to files written.

    python benchmarks/against_modelopt.py MODEL --peer PEER/bin/python --text FILE.txt

PEER is a virtual environment with torch, transformers and nvidia-modelopt, run with -P since files
here have names of packages that it imports; this script and jqx run without torch. ModelOpt
simulates NVFP4 on GPUs alone: for searches in it `--emulation FILE.py` names a module whose
`install_emulation()` does that on a CPU. Runs alternate, ratios are taken pair by pair, medians are
reported. The two results are then compared tensor by tensor.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import Run, median, parser, run
from tokenizers import Tokenizer

from jqx_interop import compare_checkpoints

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Job:
    """One comparison: our recipe and block, ModelOpt's configuration, and the goals. `emulated`:
    its search needs the arithmetic of a GPU.
    """

    recipe: str
    config: str
    block: int = 0
    faster: float = 1.0
    memory: float = 0.6
    emulated: bool = False


JOBS = {
    "fp8": Job(recipe="fp8", config="FP8_DEFAULT_CFG", faster=2.0),
    "nvfp4": Job(recipe="nvfp4", config="NVFP4_DEFAULT_CFG", faster=2.0),
    "int4_wo": Job(recipe="int4_wo", config="INT4_BLOCKWISE_WEIGHT_ONLY_CFG", block=64, faster=6.0),
    "int8_sq": Job(recipe="int8_sq", config="INT8_SMOOTHQUANT_CFG", faster=2.0),
    "int4_awq": Job(recipe="int4_awq", config="INT4_AWQ_CFG", block=64, faster=5.0),
    "nvfp4_awq": Job(recipe="nvfp4_awq", config="NVFP4_AWQ_LITE_CFG", emulated=True),
    "nvfp4_svdquant": Job(
        recipe="nvfp4_svdquant", config="NVFP4_SVDQUANT_DEFAULT_CFG", emulated=True
    ),
}
SEARCHED = ("input_scale", "k_scale", "v_scale")  # depend on how activations are computed


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--peer", type=Path, required=True, help="python of the peer environment")
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--emulation", type=Path, default=None)
    p.add_argument("--jobs", nargs="+", default=["fp8", "int4_wo"], choices=list(JOBS))
    p.add_argument("--sequences", type=int, default=32)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--batch", type=int, default=1, help="sequences in a statistics batch")
    p.add_argument("--runs", type=int, default=3)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids.npy"
        np.save(ids, calibration_ids(a.model, a.text, (a.sequences // a.batch, a.batch, a.length)))
        rows = [measure(JOBS[name], a, ids, Path(folder)) for name in a.jobs]
    if a.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            f"{row['job']:8s} ours {row['ours_s']:6.1f} s {row['ours_mib']:6.0f} MiB | "
            f"ModelOpt {row['peer_s']:6.1f} s "
            f"{row['peer_mib']:6.0f} MiB | "
            f"{row['faster']:.2f}x faster (goal {row['goal_faster']:.0f}x), "
            f"{row['memory']:.0%} of the memory (goal {row['goal_memory']:.0%}) | {row['tensors']}"
        )


def calibration_ids(model: Path, text: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """The first tokens of `text` in the shape of statistics batches."""
    needed = int(np.prod(shape))
    tokens = (
        Tokenizer.from_file(str(model / "tokenizer.json"))
        .encode(text.read_text()[: 12 * needed])
        .ids
    )
    if len(tokens) < needed:
        sys.exit(f"{text} has {len(tokens)} tokens, {needed} are needed")
    return np.array(tokens[:needed], np.int64).reshape(shape)


def measure(job: Job, a: argparse.Namespace, ids: Path, folder: Path) -> dict[str, object]:
    """Alternating runs of one job; medians of pairwise ratios."""
    outs = folder / "ours", folder / "peer"
    options = ["--set", f"block={job.block}"] if job.block else []
    jqx = Path(sys.executable).with_name("jqx")
    ours = [jqx, "quantize", a.model, outs[0], "--qformat", job.recipe, "--calib", ids, *options]
    script = HERE / "modelopt_peer.py"
    peer = [a.peer, "-P", script, a.model, outs[1], job.config, ids, str(job.block), str(a.threads)]
    if job.emulated:
        peer.append(a.emulation or sys.exit(f"{job.recipe} needs --emulation FILE.py"))
    pin = ["taskset", "-c", ",".join(map(str, range(a.threads)))]
    pairs: list[tuple[Run, Run]] = []
    for _ in range(a.runs):
        for out in outs:
            shutil.rmtree(out, ignore_errors=True)
        pairs.append((run([*pin, *ours]), run([*pin, *peer])))
    return {
        "job": job.recipe,
        "ours_s": median([o.seconds for o, _ in pairs]),
        "peer_s": median([p.seconds for _, p in pairs]),
        "ours_mib": median([o.peak_bytes / 2**20 for o, _ in pairs]),
        "peer_mib": median([p.peak_bytes / 2**20 for _, p in pairs]),
        "faster": median([p.seconds / o.seconds for o, p in pairs]),
        "memory": median([o.peak_bytes / p.peak_bytes for o, p in pairs]),
        "goal_faster": job.faster,
        "goal_memory": job.memory,
        "tensors": agreement(*outs),
    }


def agreement(ours: Path, peer: Path) -> str:
    """How the two results compare."""
    rows = compare_checkpoints(ours, peer).tensors
    equal = sum(row.verdict == "equal" for row in rows)
    scales = [row for row in rows if row.verdict == "differs" and row.name.endswith(SEARCHED)]
    other = len(rows) - equal - len(scales)
    differing = f"{len(scales)} activation scales and {other} others differ"
    return f"{equal} of {len(rows)} tensors equal, {differing}"


if __name__ == "__main__":
    main()
