# SPDX-License-Identifier: Apache-2.0
"""Encoding, decoding, products with stored matrices, with stored experts, and attention to stored
keys and values on the device that is here, each beside a copy of the same bytes, or the same with
numbers that are not stored, in the same run.

    python benchmarks/kernels.py                      a matrix of 2048 x 4096 on a CPU
    python benchmarks/kernels.py --shape 8192x8192    the same on a GPU or TPU

`of copy`: bytes read and written a second, as a part of those of a copy: of NumPy into memory that
is there on a CPU, of JAX elsewhere. `x bfloat16`: how many products are computed in the time of one
with a bfloat16 matrix. Times are the shortest of several rounds, in which all rows take turns.
`--threads 1` keeps XLA to one core, for which it starts itself anew.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqx.formats import FORMATS, Encoded, decode, encode, storage_of
from jqx.models.cache import CACHE_FORMATS
from jqx_kernels.dispatch import current_device
from jqx_kernels.encode import codes as codes_kernel
from jqx_kernels.encode import encode as encode_kernel
from jqx_kernels.grouped_matmul import grouped_matmul
from jqx_kernels.kv_attention import kv_attention
from jqx_kernels.matmul import matmul

RATIOS = ("of copy", "x bfloat16", "x decoded", "x plain")
ENCODED = ("nvfp4", "fp8", "int8", "int4", "mxfp4", "mxfp8")
MULTIPLIED = ("int4", "nvfp4", "mxfp4", "fp8", "int8", "mxfp8")


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--shape", default="2048x4096")
    p.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64, 256])
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--threads", type=int)
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    if a.threads is not None and len(os.sched_getaffinity(0)) != a.threads:
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: a.threads]))
        raise SystemExit(subprocess.call(["taskset", "-c", cores, sys.executable, *sys.argv]))
    n, k = map(int, a.shape.split("x"))
    w = jax.random.normal(jax.random.key(0), (n, k), jnp.bfloat16)
    rows = [*coding(w, a.rounds), *(r for m in a.rows for r in products(w, m, a.rounds))]
    rows += [row for m in (4, 512) for row in experts(m, a.rounds)]
    rows += [row for slots in (2048, 8192) for row in looking_back(slots, a.rounds)]
    device = current_device()
    if a.json:
        told = {"device": device.kind, "jax": jax.__version__, "shape": [n, k], "rows": rows}
        print(json.dumps(told, indent=1))
        return
    print(f"{device.kind}, {n} x {k}, JAX {jax.__version__}")
    for row in rows:
        rest = [f"{value:.2f} {name}" for name, value in row.items() if name in RATIOS]
        print(f"{row['what']:24s} {row['seconds'] * 1e3:9.3f} ms  {', '.join(rest)}")


def coding(w: jax.Array, rounds: int) -> list[dict[str, Any]]:
    """Every format there and back, beside a copy."""
    runs: dict[str, Callable[[], Any]] = {"copy": copier(w)}
    moved = {"copy": 2 * w.nbytes}
    for name in ENCODED:
        encoder = partial(jax.jit(partial(encoded, name=name)), w)
        stored = encoder()
        decoder = partial(jax.jit(partial(decoded, name=name)), stored)
        runs |= {f"encode {name}": encoder, f"decode {name}": decoder}
        size = w.nbytes + sum(x.nbytes for x in jax.tree.leaves(stored))
        moved |= {f"encode {name}": size, f"decode {name}": size}
    found = timed(runs, rounds)
    rate = moved["copy"] / found["copy"]
    return [
        {"what": name, "seconds": s, "of copy": moved[name] / s / rate} for name, s in found.items()
    ]


def copier(w: jax.Array) -> Callable[[], Any]:
    if current_device().platform != "cpu":
        return partial(jax.jit(lambda x: x + 0), w)
    source = np.asarray(w).view(np.uint8)
    target = np.ones_like(source)
    return lambda: np.copyto(target, source)


def encoded(w: jax.Array, name: str) -> Encoded:
    """The library's own on a CPU, else the kernel with a scale that is there."""
    fmt = FORMATS[name]
    if current_device().platform == "cpu":
        return encode(w, fmt)
    outer = None if fmt.tensor_bound is None else jnp.float32(2.0**-10)
    how: dict[str, Any] = {"storage": storage_of(fmt), "double_rounding": fmt.double_rounding}
    if fmt.block[0] == 1 and fmt.block[1] is not None:
        return Encoded(*encode_kernel(w, outer, **how), outer)
    step = jnp.full((1 if fmt.block[0] is None else w.shape[0], 1), 2.0**-6, jnp.float32)
    return Encoded(codes_kernel(w, step, **how), step, outer)


def decoded(stored: Encoded, name: str) -> jax.Array:
    return decode(stored, FORMATS[name], jnp.bfloat16)


def products(w: jax.Array, m: int, rounds: int) -> list[dict[str, Any]]:
    """`m` rows times every stored matrix, beside the matrix in bfloat16."""
    x = jax.random.normal(jax.random.key(1), (m, w.shape[1]), jnp.bfloat16)
    dot = partial(jax.lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())))
    runs = {f"bfloat16 of {m}": partial(jax.jit(dot), x, w)}
    for name in MULTIPLIED:
        fmt = FORMATS[name]
        stored = jax.jit(partial(encode, fmt=fmt))(w)
        f = partial(matmul, storage=storage_of(fmt), weight_dtype="bfloat16")
        runs[f"{name} of {m}"] = partial(jax.jit(f), x, *stored)
    found = timed(runs, rounds)
    plain = found[f"bfloat16 of {m}"]
    return [{"what": name, "seconds": s, "x bfloat16": plain / s} for name, s in found.items()]


def experts(m: int, rounds: int, count: int = 32, side: int = 1024) -> list[dict[str, Any]]:
    """`m` rows that meet the stored matrices of their experts, beside `ragged_dot` with all of them
    decoded.
    """
    drawn = np.random.default_rng(0)
    sizes = jnp.asarray(drawn.multinomial(m, [1 / count] * count), jnp.int32)
    x = jnp.asarray(drawn.standard_normal((m, side)), jnp.bfloat16)
    w = jnp.asarray(drawn.standard_normal((count, side, side)), jnp.bfloat16)
    found = []
    for name in ("int4", "nvfp4", "fp8"):
        fmt = FORMATS[name]
        stack = jax.jit(jax.vmap(partial(encode, fmt=fmt)))(w)
        grouped = partial(grouped_matmul, storage=storage_of(fmt), weight_dtype="bfloat16")

        def all_decoded(x: Any, stack: Any, sizes: Any, fmt: Any = fmt) -> jax.Array:
            back = jax.vmap(lambda one: decode(one, fmt, jnp.bfloat16))(stack)
            return jax.lax.ragged_dot(x, back.swapaxes(1, 2), sizes)

        runs = {
            "decoded": partial(jax.jit(all_decoded), x, stack, sizes),
            "grouped": partial(jax.jit(grouped), x, *stack, sizes),
        }
        times = timed(runs, rounds)
        beside = {"seconds": times["grouped"], "x decoded": times["decoded"] / times["grouped"]}
        found.append({"what": f"{name} experts of {m}", **beside})
    return found


def looking_back(
    slots: int, rounds: int, shape: tuple[int, int, int] = (12, 3, 64)
) -> list[dict[str, Any]]:
    """One token looks back at as many as there are slots, beside float32 keys and values."""
    n, g, d = shape
    drawn = np.random.default_rng(0)
    q = jnp.asarray(drawn.standard_normal((n, g, 1, d)), jnp.float32)
    k, v = jnp.asarray(drawn.standard_normal((2, n, slots, d)), jnp.float32)
    start, pads = jnp.int32(slots - 1), jnp.zeros(n, jnp.int32)

    def plain(q: Any, k: Any, v: Any) -> jax.Array:
        scores = jnp.einsum("ngtd,nsd->ngts", q, k) * jnp.float32(d**-0.5)
        return jnp.einsum("ngts,nsd->ngtd", jax.nn.softmax(scores), v)

    runs = {"plain": partial(jax.jit(plain), q, k, v)}
    for name, row in CACHE_FORMATS.items():
        stored = [jax.jit(partial(row.encode, storage=row.storage))(x) for x in (k, v)]
        look = partial(kv_attention, storage=row.storage, scale=d**-0.5)
        runs[name] = partial(jax.jit(look), q, *stored, start, pads)
    times = timed(runs, rounds)
    return [
        {"what": f"{name} cache of {slots}", "seconds": s, "x plain": times["plain"] / s}
        for name, s in times.items()
    ]


def timed(runs: dict[str, Callable[[], Any]], rounds: int, calls: int = 3) -> dict[str, float]:
    """Seconds of one call, the shortest of all rounds."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in runs.items():
            start, result = time.perf_counter(), None
            for _ in range(calls):
                result = run()
            jax.block_until_ready(result)
            best[name] = min(best[name], (time.perf_counter() - start) / calls)
    return best


if __name__ == "__main__":
    main()
