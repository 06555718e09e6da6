# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for devices that are not here: `python tests/aot.py TARGET [CASE...]`.

Prints a JSON object a line: the case, what was compiled, or the error. Needs the compilers of the
device in this environment: the extra "gpu" or "tpu". Not imported by tests, since
environment variables have to be there before JAX is.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

GPU = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32
shared_memory_per_block: 49152 shared_memory_per_core: 233472 threads_per_core_limit: 2048
core_count: {cores} fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
cuda_compute_capability {{ major: {major} minor: 0 }} registers_per_core_limit: 65536
registers_per_block_limit: 65536 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{kind}"
"""


class Target(NamedTuple):
    """A device to compile for: its platform, topology, and description for XLA."""

    platform: str
    topology: str
    kind: str
    major: int = 0
    cores: int = 0


TARGETS = {
    "h100": Target("cuda", "h100", "NVIDIA H100 80GB HBM3", 9, 132),
    "b200": Target("cuda", "b200", "NVIDIA B200", 10, 148),
    "v5e": Target("tpu", "v5e:2x2", "TPU v5 lite"),
    "v6e": Target("tpu", "v6e:2x2", "TPU v6 lite"),
    "7x": Target("tpu", "TPU7x:2x2x1", "TPU7x"),
}

TPU_ALONE = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Lets the TPU compiler start on a machine without one."""


def device(target):
    """A device of the topology, to compile for."""
    from jax.experimental import topologies

    more = {}
    if target.platform == "cuda":
        told = GPU.format(cores=target.cores, major=target.major, kind=target.kind)
        more = {"target_config": told, "topology": "1x1x1"}
    found = topologies.get_topology_desc(
        platform=target.platform, topology_name=target.topology, **more
    )
    return found.devices[0]


def compiled(target, f, args, dump):
    """What is told of one compiled function."""
    import jax
    from lowering import in_mind

    at = jax.sharding.SingleDeviceSharding(device(target))
    shardings = jax.tree.map(lambda _: at, tuple(args))
    with in_mind(target.platform, target.kind):
        traced = jax.jit(f, in_shardings=shardings, out_shardings=at).trace(*args)
        program = traced.lower(lowering_platforms=(target.platform,)).compile()
    calls = re.findall(r'custom_call_target="([^"]+)"', program.as_text())
    ptx = "".join(path.read_text() for path in sorted(dump.rglob("*.ptx")))
    found = {name: len(re.findall(pattern, ptx)) for name, pattern in IN_PTX.items()}
    for path in dump.rglob("*.ptx"):
        path.unlink()
    return {"calls": sorted(set(calls)), **(found if target.platform == "cuda" else {})}


IN_PTX = {
    "exact": r"\bdiv\.rn\.f32",
    "approximate": r"\bdiv\.(full|approx)\.",
    "tensor_cores": r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)",
}
"""What is counted in the code of a GPU."""


def main(name, *wanted):
    """Compile all cases, or those `wanted`."""
    target, folder = TARGETS[name], tempfile.TemporaryDirectory()
    dump = Path(folder.name)
    if target.platform == "tpu":
        os.environ.update(TPU_ALONE)
    else:
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump}"
    from grouped_cases import grouped_cases
    from hadamard_cases import hadamard_cases
    from kv_attention_cases import kv_attention_cases
    from lowering import cases
    from matmul_cases import product_cases

    makers = (cases, product_cases, grouped_cases, hadamard_cases, kv_attention_cases)
    every = {case: given for make in makers for case, given in make(target.platform).items()}
    with folder:
        for case, (f, args) in every.items():
            if wanted and case not in wanted:
                continue
            try:
                told = compiled(target, f, args, dump)
            except Exception as error:
                told = {"error": f"{type(error).__name__}: {error}"[:600]}
            print(json.dumps({"case": case, **told}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
