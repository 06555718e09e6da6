# SPDX-License-Identifier: Apache-2.0
"""ENGINES: programs that load checkpoints, each in a process and an environment of its own."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import jqx_interop as ji
from jqx_interop.data.tokens import load_tokenizer

HERE = Path(__file__).parent
TEXT = Path(ji.__file__).parent / "data" / "evaluation.txt"
BUNDLED = Path(ji.__file__).parent / "demo" / "model"
NEW_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Engine:
    """`script` runs it, computing in `dtype`; `emulate`: with the kernels of emulation.py.
    `targets`: the layouts that it reads, None for all. `fuses`: it multiplies the linears that
    share an input as one, with one scale where a tensor has one. `leaves`: formats of inputs that
    its kernels do not round to; `apart`: formats of weights or inputs that it has other arithmetic
    for than is defined here.
    """

    name: str
    script: str
    dtype: str
    emulate: bool = False
    targets: tuple[str, ...] | None = None
    fuses: bool = True
    leaves: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(name="vLLM", script="run_vllm.py", dtype="bfloat16"),
        Engine(
            name="vLLM, emulated",
            script="run_vllm.py",
            dtype="float32",
            emulate=True,
            targets=("modelopt", "compressed-tensors", "gptq"),
            leaves=("mxfp4", "mxfp8"),
        ),
        Engine(
            name="transformers",
            script="run_transformers.py",
            dtype="float32",
            targets=("compressed-tensors",),
            fuses=False,
            # NVFP4 weights become bfloat16; inputs: of FP8 blocks are rounded to 1 x 128, INT8
            # reaches 127.5, the scales of MXFP4 are others
            apart=("nvfp4", "fp8_block", "int8_token", "mxfp4"),
        ),
    )
}


def prompts_of(model: Path, count: int = 8, length: int = 64) -> np.ndarray:
    """The evaluation text in pieces, by the tokenizer of `model`."""
    text = TEXT.read_text(encoding="utf-8")[: 16 * count * length]
    ids = load_tokenizer(model).encode(text).ids
    return np.array(ids[: count * length], np.int32).reshape(count, length)


def run(
    engine: Engine,
    environment: Path,
    models: Mapping[str, Path],
    prompts: Sequence[Sequence[int]] | np.ndarray,
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """What `engine` says of every model: see run_vllm.py. A model that ends the process has an
    error as well, and the others are asked again.
    """
    out = folder / f"{engine.name}.jsonl"
    out.unlink(missing_ok=True)
    found: dict[str, dict[str, Any]] = {}
    while left := [key for key in models if key not in found]:
        request = {
            "models": {key: str(models[key]) for key in left},
            "prompts": np.asarray(prompts).tolist(),
            "new_tokens": NEW_TOKENS,
            "dtype": engine.dtype,
            "emulate": engine.emulate,
        }
        said = _process(engine, environment, request, out)
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        found |= {row.pop("key"): row for row in map(json.loads, lines)}
        ended = next((key for key in left if key not in found), None)
        if ended is not None:
            found[ended] = {"loads": False, "error": f"the process ended: {said}"}
    return {key: found[key] for key in models}


def _process(engine: Engine, environment: Path, request: dict[str, Any], out: Path) -> str:
    """Run the script on a request, and return the last thing that it says."""
    file = out.with_suffix(".json")
    file.write_text(json.dumps(request), encoding="utf-8")
    command = [environment / "bin" / "python", "-E", HERE / engine.script, file, out]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX")}
    done = subprocess.run(
        [str(word) for word in command],
        env={**kept, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=3600,
    )
    out.with_suffix(".log").write_text(done.stdout, encoding="utf-8")
    return (done.stdout.strip().splitlines() or [""])[-1][:500]
