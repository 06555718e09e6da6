# SPDX-License-Identifier: Apache-2.0
"""What the transforms cost, and what calibrating a model takes beside qwix.

    python benchmarks/transforms.py cost [--layers 12] [--scan]   observe(f) against f
    python benchmarks/transforms.py qwix                          a Linen and an NNX model in both

cost compiles and runs a decoder, alone and observed (the largest magnitude of every linear's
input), in turn in one process. qwix needs `pip install qwix` in this environment; the programs are
in `qwix_peer.py`, and their lines are counted as they stand there.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from measure import median

import jqx
from jqx.transforms import Use


def decoder(params: Any, ids: jax.Array, scan: bool = False) -> jax.Array:
    """Logits of a Llama-like decoder whose layers are a list, or stacked and scanned."""

    def layer(h: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        b, t, d = h.shape
        x = _rms(h, p["norm1"])
        q, k, v = ((x @ p[n]).reshape(b, t, -1, 64).swapaxes(1, 2) for n in ("q", "k", "v"))
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) / 8
        mask = jnp.tril(jnp.ones((t, t), bool))[None, None]
        y = jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(jnp.where(mask, scores, -1e9)), v)
        h = h + y.swapaxes(1, 2).reshape(b, t, d) @ p["o"]
        x = _rms(h, p["norm2"])
        return h + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"], None

    h = params["embed"][ids]
    if scan:
        h, _ = jax.lax.scan(layer, h, params["layers"])
    else:
        for p in params["layers"]:
            h, _ = layer(h, p)
    return _rms(h, params["norm"]) @ params["head"]


def _rms(x: jax.Array, gain: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * gain


def draw(layers: int, d: int, scan: bool) -> Any:
    """Parameters of `decoder`."""
    shapes = dict.fromkeys("qkvo", (d, d))
    shapes |= {"gate": (d, 3 * d), "up": (d, 3 * d), "down": (3 * d, d)}
    key = iter(jax.random.split(jax.random.key(0), 1000))

    def one() -> dict[str, jax.Array]:
        weights = {n: jax.random.normal(next(key), s) / s[0] ** 0.5 for n, s in shapes.items()}
        return weights | {"norm1": jnp.ones(d), "norm2": jnp.ones(d)}

    parts = [one() for _ in range(layers)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *parts) if scan else parts
    return {
        "embed": jax.random.normal(next(key), (1024, d)),
        "layers": stacked,
        "norm": jnp.ones(d),
        "head": jax.random.normal(next(key), (d, 1024)) / d**0.5,
    }


def largest(use: Use, x: jax.Array) -> jax.Array | None:
    return jnp.max(jnp.abs(x)) if use.op == "dot" else None


def cost(a: argparse.Namespace) -> dict[str, float]:
    """Seconds to trace, compile and run, alone and observed; ratios are medians of pairs."""
    params = draw(a.layers, a.width, a.scan)
    ids = jax.random.randint(jax.random.key(1), (a.batch, a.length), 0, 1024)
    f = partial(decoder, scan=a.scan)
    functions = {"alone": f, "observed": jqx.observe(f, largest)}
    seconds: dict[str, list[float]] = {}
    programs = {}
    for i in range(a.repeats):
        for name in list(functions)[:: (-1) ** i]:
            jax.clear_caches()  # what one has traced would help the other
            start = time.perf_counter()
            traced = jax.jit(functions[name]).trace(params, ids)
            seen = time.perf_counter()
            programs[name] = traced.lower().compile()
            seconds.setdefault(f"compile {name}", []).append(time.perf_counter() - start)
            seconds.setdefault(f"trace {name}", []).append(seen - start)
    for i in range(a.repeats * 4):
        for name in list(programs)[:: (-1) ** i]:
            seconds.setdefault(f"run {name}", []).append(_timed(programs[name], params, ids))
    out = {name: median(values) for name, values in seconds.items()}
    for what in ("trace", "compile", "run"):
        pairs = zip(seconds[f"{what} observed"], seconds[f"{what} alone"], strict=True)
        out[f"{what} ratio"] = median([x / y for x, y in pairs])
    return out


def _timed(program: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - start


def qwix() -> Any:
    """The module with the comparison. Ends the program if qwix is not installed."""
    try:
        import qwix_peer
    except ImportError as error:
        print(f"qwix is needed, and {error}: pip install qwix", file=sys.stderr)
        raise SystemExit(2) from None
    return qwix_peer


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=("cost", "qwix"))
    p.add_argument("--layers", type=int, default=12)
    p.add_argument("--width", type=int, default=512)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--scan", action="store_true")
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    if a.what == "qwix":
        peer = qwix()
        found = peer.compare(a.repeats)
        told = peer.table(found)
    else:
        found = cost(a)
        told = "\n".join(f"{name:20} {value:.3f}" for name, value in found.items())
    print(json.dumps(found) if a.json else told)


if __name__ == "__main__":
    main()
