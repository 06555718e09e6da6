# SPDX-License-Identifier: Apache-2.0
"""The same static-range int8 quantization written with jqx and with qwix: the `qwix` part of
`transforms.py`.

The model is a small transformer, once of Flax Linen and once of NNX. Weights get a scale per output
channel, inputs of linears a stored scale per tensor (`act_batch_axes`: qwix has one for every
position otherwise). Products of two activations stay as they are (`op_names`): qwix 0.1.8 has no
stored scales for those of Linen's attention.

Each program is what its library's documentation shows, with all of it jitted that can be. Their
results differ: jqx takes the largest magnitude in all batches of the float model, qwix the mean of
the tokens' largest magnitudes in the model that rounds already; jqx multiplies decoded weights with
rounded inputs, qwix multiplies codes.
"""

import ast
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from measure import median

import jqx

LAYERS, WIDTH, HEADS, VOCABULARY = 4, 256, 4, 1024
BATCHES, BATCH, LENGTH = 32, 8, 128

Mark = Callable[[str, Any], None]


def linen_jqx(model: nn.Module, variables: Any, batches: Sequence[jax.Array], mark: Mark) -> Any:
    stats = jqx.calibrate(model.apply, variables, batches, "int8")
    mark("calibration", stats)
    quantized = jqx.quantize(variables, "int8", stats)
    mark("quantization", quantized)
    return jax.jit(jqx.quantized(model.apply)), quantized


def linen_qwix(model: nn.Module, variables: Any, batches: Sequence[jax.Array], mark: Mark) -> Any:
    rule = qwix.QuantizationRule(
        op_names=("dot_general",),
        weight_qtype="int8",
        act_qtype="int8",
        act_static_scale=True,
        act_batch_axes=(0, 1),
    )
    qt = qwix.quantize_model(model, qwix.QtProvider([rule]))
    shapes = jax.eval_shape(qt.init, jax.random.key(0), batches[0])["quant_stats"]
    stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    @jax.jit
    def step(params: Any, stats: Any, ids: jax.Array) -> Any:
        variables = {"params": params, "quant_stats": stats}
        return qt.apply(variables, ids, mutable="quant_stats")[1]["quant_stats"]

    for ids in batches:
        stats = step(variables["params"], stats, ids)
    mark("calibration", stats)
    ptq = qwix.quantize_model(model, qwix.PtqProvider([rule]))
    template = jax.eval_shape(ptq.init, jax.random.key(0), batches[0])["params"]
    params = qwix.quantize_params(variables["params"], template, stats)
    mark("quantization", params)
    return jax.jit(ptq.apply), {"params": params}


def nnx_jqx(model: nnx.Module, batches: Sequence[jax.Array], mark: Mark) -> Any:
    graph, state = nnx.split(model)

    def apply(state: Any, ids: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(ids)

    stats = jqx.calibrate(apply, state, batches, "int8")
    mark("calibration", stats)
    quantized = jqx.quantize(state, "int8", stats)
    mark("quantization", quantized)
    return jax.jit(jqx.quantized(apply)), quantized


def nnx_qwix(model: nnx.Module, batches: Sequence[jax.Array], mark: Mark) -> Any:
    rule = qwix.QuantizationRule(
        op_names=("dot_general",),
        weight_qtype="int8",
        act_qtype="int8",
        act_static_scale=True,
        act_batch_axes=(0, 1),
    )

    @nnx.jit
    def counted(model: nnx.Module, ids: jax.Array) -> nnx.Module:
        return qwix.quantize_model(model, qwix.QtProvider([rule]), ids)

    @nnx.jit
    def step(model: nnx.Module, ids: jax.Array) -> None:
        model(ids)

    qt = counted(model, batches[0])
    for ids in batches:
        step(qt, ids)
    mark("calibration", nnx.state(qt))

    @nnx.jit
    def stored(model: nnx.Module, ids: jax.Array) -> nnx.Module:
        return qwix.quantize_model(model, qwix.PtqProvider([rule]), ids)

    quantized = stored(qt, batches[0])
    mark("quantization", nnx.state(quantized))
    return nnx.jit(lambda model, ids: model(ids)), quantized


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        x = nn.LayerNorm(name="norm1")(h)
        h = h + nn.MultiHeadDotProductAttention(HEADS, name="attention")(x)
        x = nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm(name="norm2")(h)))
        return h + nn.Dense(WIDTH, name="down")(x)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        h = nn.Embed(VOCABULARY, WIDTH, name="embed")(ids)
        for i in range(LAYERS):
            h = LinenBlock(name=f"layer{i}")(h)
        return nn.Dense(VOCABULARY, use_bias=False, name="head")(nn.LayerNorm(name="norm")(h))


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, h: jax.Array) -> jax.Array:
        h = h + self.attention(self.norm1(h))
        return h + self.down(nnx.gelu(self.up(self.norm2(h))))


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h))


class Batches(list[jax.Array]):
    """Batches that note when they are asked for: the second, when a step has been compiled."""

    asked: list[float]

    def __iter__(self) -> Iterator[jax.Array]:
        self.asked = []
        for x in super().__iter__():
            self.asked.append(time.perf_counter())
            yield x


class Case(NamedTuple):
    """One kind of model: what the programs take before batches, and how it runs as it is."""

    programs: dict[str, Callable[..., Any]]
    model: tuple[Any, ...]
    dense: tuple[Callable[..., jax.Array], Any]


def compare(repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Kind of model -> what is measured -> jqx, qwix, and qwix / jqx, medians of runs in turn."""
    keys = jax.random.split(jax.random.key(1), BATCHES + 1)
    *batches, held = [jax.random.randint(key, (BATCH, LENGTH), 0, VOCABULARY) for key in keys]
    linen, module = LinenModel(), NnxModel(nnx.Rngs(0))
    variables = jax.jit(linen.init)(jax.random.key(0), held)
    cases = {
        "linen": Case(
            {"jqx": linen_jqx, "qwix": linen_qwix},
            (linen, variables),
            (jax.jit(linen.apply), variables),
        ),
        "nnx": Case(
            {"jqx": nnx_jqx, "qwix": nnx_qwix},
            (module,),
            (nnx.jit(lambda model, ids: model(ids)), module),
        ),
    }
    return {kind: _compared(case, batches, held, repeats) for kind, case in cases.items()}


def _compared(
    case: Case, batches: list[jax.Array], held: jax.Array, repeats: int
) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, list[float]]] = {}

    def add(name: str, row: dict[str, float]) -> None:
        for what, value in row.items():
            rows.setdefault(what, {}).setdefault(name, []).append(value)

    run, params = case.dense
    exact = run(params, held)
    for i in range(repeats):
        ready, order = {"float": case.dense}, list(case.programs)[:: (-1) ** i]
        for name in order:
            row, ready[name] = _quantized(case.programs[name], case.model, batches)
            add(name, row)
        for name in ("float", *order):
            out, seconds = _timed(*ready[name], held)
            add(name, {"forward, first": seconds, "mean error": float(_error(out, exact))})
        for name in ("float", *order) * 10:
            add(name, {"forward": _timed(*ready[name], held)[1]})
    for name, program in case.programs.items():
        add(name, {"int8 matrices": _matrices(ready[name][1]), "lines": _lines(program)})
    return {what: _summary(columns) for what, columns in rows.items()}


def _quantized(
    program: Callable[..., Any], model: tuple[Any, ...], batches: list[jax.Array]
) -> tuple[dict[str, float], Any]:
    """Seconds of the steps of a program, nothing being compiled yet, and what it returns."""
    jax.clear_caches()
    asked, ends = Batches(batches), {"start": time.perf_counter()}

    def mark(what: str, result: Any) -> None:
        jax.block_until_ready(result)
        ends[what] = time.perf_counter()

    out = program(*model, asked, mark)
    start, calibrated, quantized = ends.values()
    steps = (calibrated - asked.asked[1]) * len(batches) / (len(batches) - 1)
    return {
        "calibration": calibrated - start,
        "calibration, compiled": steps,
        "quantization": quantized - calibrated,
    }, out


def _timed(run: Callable[..., jax.Array], params: Any, ids: jax.Array) -> tuple[jax.Array, float]:
    start = time.perf_counter()
    out = jax.block_until_ready(run(params, ids))
    return out, time.perf_counter() - start


def _matrices(params: Any) -> int:
    return sum(x.dtype == jnp.int8 for x in jax.tree.leaves(params))


def _error(out: jax.Array, exact: jax.Array) -> jax.Array:
    """Of logits, and of the size that they have in the mean."""
    return jnp.mean(jnp.abs(out - exact)) / jnp.mean(jnp.abs(exact))


def _lines(program: Callable[..., Any]) -> int:
    """Lines of the body as they stand here, without the marks."""
    source = inspect.getsource(program)
    body = source.splitlines()[ast.parse(source).body[0].body[0].lineno - 1 :]
    return sum(bool(line.strip()) and not line.strip().startswith("mark(") for line in body)


def _summary(columns: dict[str, list[float]]) -> dict[str, float]:
    pairs = zip(columns["jqx"], columns["qwix"], strict=True)
    medians = {name: median(values) for name, values in columns.items()}
    return medians | {"qwix / jqx": median([theirs / ours for ours, theirs in pairs])}


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """What `compare` returns, for people."""
    names = ("jqx", "qwix", "qwix / jqx", "float")
    lines = []
    for kind, rows in found.items():
        lines.append(f"{kind:24}" + "".join(f"{name:>12}" for name in names))
        for what, row in rows.items():
            cells = (f"{row[name]:12.3f}" if name in row else " " * 12 for name in names)
            lines.append(f"{what:24}" + "".join(cells))
    return "\n".join(lines)
