# SPDX-License-Identifier: Apache-2.0
"""What becomes of one parameter that a configuration selects: its stored form, or the rounding that
stands for it, and how its inputs are quantized.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jqx.algorithms import Linear, calibrated, finished, stored
from jqx.calibration import input_scale
from jqx.config import INPUT_FORMATS, Algorithm, Choice
from jqx.errors import InputError
from jqx.formats import Format, find_format
from jqx.selection import wanted_kinds
from jqx.tensors import QTensor, Stats
from jqx.tensors.layout import Layout, layout_of, to_matrices
from jqx.tensors.on_gpu import quantize_on_gpu, stays_on_gpu
from jqx.transforms.axes import Axes
from jqx.transforms.fake import Fake
from jqx.transforms.inputs import Treatment
from jqx_kernels.bits import divide


def stored_leaf(
    path: str,
    w: Any,
    choice: Choice,
    axes: Axes,
    steps: tuple[Algorithm, ...],
    stats: Stats | None,
) -> QTensor:
    """The parameter `w` at `path` as a QTensor, on its devices and sharded as it is; one that is
    stored so already keeps its codes.

    Raises InputError for numbers that no scale covers, and for a scale of inputs that `stats` do
    not give.
    """
    if choice.weight is None:
        raise InputError(
            f"{path} gets the input format {choice.input} and no weight format, and stored weights "
            "carry both: give it one, or use jqx.fake_quantized"
        )
    layout, fmt = layout_of(axes.shape, axes.contracted, axes.stack), find_format(choice.weight)
    if isinstance(w, QTensor):
        _check_same(path, w, fmt, layout, steps)
    check_floats(path, w)
    treatment = _treatment(path, choice, axes, stats if steps else None, needed=bool(steps))
    if isinstance(w, QTensor):
        return _rescaled(w, choice, treatment)
    known = inputs_of(path, choice, axes, steps, stats)
    static = {"fmt": choice.weight, "layout": layout, "steps": steps, "input_format": choice.input}
    encode = partial(_encode, **static)
    scale = None if treatment is None else treatment.input_scale
    w = jax.device_put(w)  # a tracer where something is traced
    try:
        if isinstance(w, Tracer):
            return _with_inputs(encode(w, inputs=known)[0], choice, scale)
        if not _searched(steps) and stays_on_gpu(w, fmt):
            q, finite = quantize_on_gpu(w, fmt, layout), jnp.isfinite(w).all()
        else:  # wherever inputs were collected, they are needed where the parameter is encoded
            q, finite = _on_cpu(partial(encode, inputs=jax.device_get(known)), w)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not finite:
        raise InputError(
            f"{path} has NaN or infinite values, and no scale covers them: look at where the "
            "parameters come from"
        )
    return _placed(_with_inputs(q, choice, scale), w)


def _searched(steps: tuple[Algorithm, ...]) -> list[str]:
    """The algorithms that do more than to reach the largest magnitudes of the weights."""
    return [step.method for step in steps if step.method != "max"]


def _check_same(
    path: str, q: QTensor, fmt: Format, layout: Layout, steps: tuple[Algorithm, ...]
) -> None:
    """Raises InputError unless `q` can be what is asked for, with other scales of inputs."""
    told = f"{path} is quantized already"
    out = "dequantize it first (jqx.dequantize)"
    searched = _searched(steps)
    if q.format != fmt:
        raise InputError(f"{told}, to {q.format.name} and not to {fmt.name}: {out}")
    if searched:
        raise InputError(f"{told}, and {searched[0]} starts from the weight: {out}")
    if q.layout != layout:
        raise InputError(
            f"{told}, along the axes {q.columns} of {q.shape} and with the stack {q.stack}, which "
            f"is not how it is used: {out}"
        )
    if q.pre_quant_scale is not None or q.low_rank is not None:
        raise InputError(f"{told}, and what its inputs meet was chosen with them: {out}")


def _rescaled(q: QTensor, choice: Choice, treatment: Treatment | None) -> QTensor:
    """`q` with the format of its inputs and their scale, where there is one to give."""
    scale = None if treatment is None else treatment.input_scale
    if scale is None:
        known = q.input_scale if q.input_format == choice.input else None
        return q.replace(input_format=choice.input, input_scale=known)
    if isinstance(q.codes, Tracer) or not isinstance(q.codes, jax.Array):
        return q.replace(input_format=choice.input, input_scale=scale)
    if isinstance(where := q.codes.sharding, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec(*where.spec[: scale.ndim]))
    scale = jax.device_put(scale, where) if q.codes.committed else scale
    return q.replace(input_format=choice.input, input_scale=scale)


def _with_inputs(q: QTensor, choice: Choice, scale: Any) -> QTensor:
    """`q` with the format of its inputs, and their scale where the algorithm chose none."""
    chosen = scale if q.input_scale is None else q.input_scale
    return q.replace(input_format=choice.input, input_scale=chosen)


def inputs_of(
    path: str, choice: Choice, axes: Axes, steps: tuple[Algorithm, ...], stats: Stats | None
) -> dict[str, Any]:
    """What is known of the inputs of `path` and is needed, each with an axis for all members of its
    stack.

    Raises InputError if something is missing, or holds NaN, or if there were no tokens.
    """
    kinds = [kind for kind in wanted_kinds(choice, steps) if kind != "amax"]
    if not kinds:
        return {}
    methods = ", ".join(step.method for step in steps)
    have = {} if stats is None else stats.entries.get(path, {})
    if missing := [kind for kind in kinds if kind not in have]:
        raise InputError(
            f"{path}: {methods} needs the statistics {', '.join(missing)} of its inputs: give "
            "stats=jqx.calibrate(apply_fn, params, batches, cfg) with this cfg"
        )
    lead = tuple(axes.shape[a] for a in axes.stack)
    found = {}
    for kind in (*kinds, *(("amax",) if choice.static_input else ())):
        value = jnp.asarray(have[kind])
        if value.shape[: len(lead)] != lead:
            raise InputError(
                f"{path} has members {lead} along its stack axes {axes.stack}, and {kind} has the "
                f"shape {value.shape}: calibrate the function whose axes these are"
            )
        _check_known(path, kind, value, have.get("tokens"))
        found[kind] = value.reshape(-1, *value.shape[len(lead) :])
    return found


def _check_known(path: str, kind: str, value: Any, tokens: Any) -> None:
    if isinstance(value, Tracer):
        return
    if not bool(jnp.all(jnp.isfinite(value))):
        raise InputError(f"{path}: {kind} of its inputs holds NaN or infinities: calibrate again")
    if tokens is not None and not isinstance(tokens, Tracer) and not np.all(np.asarray(tokens)):
        raise InputError(
            f"{path}: some member met no tokens while calibrating, so nothing can be chosen for "
            'it: give more data, or take algorithm="max"'
        )


def check_floats(path: str, w: Any) -> None:
    """Raises InputError for a parameter that formats cannot hold."""
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise InputError(
            f"{path} is {w.dtype}, and formats hold floats: leave it out with "
            f'Rule(path_glob="{path}", weight=None, input=None)'
        )


def faked_leaf(path: str, choice: Choice, axes: Axes, stats: Stats | None) -> Fake:
    """What is done to a parameter and its inputs instead of storing it. Without `stats` the scales
    of inputs are found in them.
    """
    fmt = None if choice.weight is None else find_format(choice.weight)
    treatment = _treatment(path, choice, axes, stats, needed=False)
    return Fake(columns=axes.contracted, stack=axes.stack, format=fmt, treatment=treatment)


def known_amax(stats: Stats | None, path: str, what: str) -> np.ndarray:
    """The amax of `what` at `path`. Raises InputError if the statistics do not have it."""
    told = f"{path}: {what} have a stored scale, which needs statistics"
    if stats is None:
        raise InputError(
            f"{told}: give stats=jqx.calibrate(apply_fn, params, batches, cfg) with this cfg"
        )
    found = stats.entries.get(path, {}).get("amax")
    if found is None:
        raise InputError(f"{told}, and stats have no amax of them: calibrate with this cfg")
    if isinstance(found, Tracer):
        raise InputError(f"{told} that are known: close over stats, and trace params alone")
    return np.asarray(found, np.float32)


def _treatment(
    path: str, choice: Choice, axes: Axes, stats: Stats | None, needed: bool
) -> Treatment | None:
    """How the inputs of a parameter are quantized, None if they are not. `needed`: whether a scale
    that is stored must be known.
    """
    if choice.input is None:
        return None
    row, scale = INPUT_FORMATS[choice.input], None
    if row.bound is not None and (needed or stats is not None):
        amax = known_amax(stats, path, f"inputs in {choice.input}")
        lead = tuple(axes.shape[a] for a in axes.stack)
        flat = [input_scale(a, row.bound, path, row.code_max) for a in amax.reshape(-1)]
        if len(flat) != np.prod(lead, dtype=int):
            raise InputError(
                f"{path} has members {lead} along its stack axes {axes.stack}, and stats have "
                f"{amax.shape}: calibrate the function whose axes these are"
            )
        scale = jnp.asarray(np.array(flat, np.float32).reshape(lead))
    return Treatment(
        shape=axes.shape,
        columns=axes.contracted,
        stack=axes.stack,
        input_format=choice.input,
        input_scale=scale,
    )


def _on_cpu(encode: Callable[[jax.Array], Any], w: jax.Array) -> Any:
    """`encode(w)`, computed on a CPU, and on several devices of that kind where `w` is."""
    if not _is_on_cpu(w):
        return encode(jax.device_put(w, jax.devices("cpu")[0]))
    if not isinstance(w.sharding, NamedSharding):
        return encode(w)
    mesh, auto = w.sharding.mesh, (AxisType.Auto,) * len(w.sharding.mesh.axis_names)
    assert mesh.devices is not None  # of an array that is there
    # explicit axes of a mesh let some axes of an array not be folded
    free = Mesh(mesh.devices, mesh.axis_names, axis_types=auto)
    with jax.set_mesh(free):
        return encode(jax.device_put(w, NamedSharding(free, w.sharding.spec)))


def _is_on_cpu(w: jax.Array) -> bool:
    return {device.platform for device in w.devices()} == {"cpu"}


def _placed(q: QTensor, w: jax.Array) -> QTensor:
    """A stored parameter where `w` is."""
    if isinstance(w.sharding, NamedSharding):
        return jax.device_put(q, q.shardings(w.sharding))
    if w.committed:
        return jax.device_put(q, w.sharding)
    # whatever it meets decides where it is computed with, as for `w`
    there = q.codes.devices() == w.devices()
    return q if there else jax.tree.map(jnp.asarray, jax.device_get(q))


@partial(jax.jit, static_argnames=("fmt", "layout", "steps", "input_format"))
def _encode(
    w: Any,
    inputs: dict[str, Any],
    *,
    fmt: str,
    layout: Layout,
    steps: tuple[Algorithm, ...],
    input_format: str | None,
) -> tuple[QTensor, Any]:
    """The stored form, and whether all numbers are finite."""
    # a search of constants would divide by their reciprocals
    matrices, row = jax.lax.optimization_barrier(to_matrices(w, layout)), find_format(fmt)
    lead = matrices.shape[:-2]
    bound = None if input_format is None else INPUT_FORMATS[input_format].bound

    def one(m: Any, known: dict[str, Any]) -> QTensor:
        done = calibrated(Linear(m, input_amax=_amax_of(known)), known, fmt=row, steps=steps)
        q = stored(finished(done, known, fmt=row, steps=steps), row)
        if bound is None or done.input_amax is None:
            return q
        return q.replace(input_scale=_input_scale(done.input_amax, input_format or ""))

    if not lead:
        q = one(matrices, {k: v[0] for k, v in inputs.items()})
    else:
        flat = matrices.reshape(-1, *matrices.shape[-2:])
        q = _each(one, flat, inputs)
        q = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), q)
    return q.replace(layout=layout, dtype=w.dtype), jnp.isfinite(w).all()


def _each(one: Callable[..., Any], flat: Any, inputs: dict[str, Any]) -> Any:
    """`one` of every member; a search of one after the other: what it holds of a member is many
    times the member.
    """
    if inputs:
        return jax.lax.map(lambda member: one(*member), (flat, inputs))
    return jax.vmap(lambda m: one(m, {}))(flat)


def _amax_of(known: dict[str, Any]) -> Any:
    if "amax" in known:
        return known["amax"].astype(jnp.float32)
    return jnp.max(known["channel_amax"]) if "channel_amax" in known else None


def _input_scale(amax: Any, name: str) -> Any:
    """`jqx.calibration.input_scale` of a number that may not be known yet."""
    row = INPUT_FORMATS[name]
    assert row.bound is not None
    value = jnp.where(amax == 0, jnp.float32(row.code_max or row.bound), amax)
    if row.code_max is None:
        value = jnp.maximum(value, jnp.float32(np.finfo(np.float32).tiny))
    return divide(value, row.bound)
