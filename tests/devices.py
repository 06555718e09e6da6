# SPDX-License-Identifier: Apache-2.0
"""Several devices on a machine that has one: a script in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STRICT = """
import jax
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
"""


def run_on_devices(n: int, script: str, timeout: float = 300) -> str:
    """What `script` prints in a process whose JAX, strict as it is in this suite, has `n` CPU
    devices. Warnings are errors, and what lies in tests/ can be imported.

    Raises RuntimeError with the end of what it wrote to stderr if it fails.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n}"
    paths = (str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")]))
    env = dict(os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu", PYTHONPATH=os.pathsep.join(paths))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", STRICT + script],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"on {n} devices:\n{done.stdout}\n{done.stderr[-4000:]}")
    return done.stdout
