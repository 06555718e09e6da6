# SPDX-License-Identifier: Apache-2.0
"""The story in order: calibrate, quantize, run, go back; and train as if quantized.

    stats = jqx.calibrate(apply_fn, params, batches, "nvfp4")
    qparams = jqx.quantize(params, "nvfp4", stats)
    out = jax.jit(jqx.quantized(apply_fn))(qparams, *batch)
    params = jqx.dequantize(qparams)

`params` is any pytree: dicts, a FrozenDict, an nnx.State, an Equinox module, dataclasses. Weights
become QTensors, and everything else stays what it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jqx.calibration import input_scale
from jqx.config import KV_FORMATS, QuantConfig
from jqx.errors import InputError
from jqx.formats import FORMATS
from jqx.leaves import check_floats, faked_leaf, known_amax, stored_leaf
from jqx.patterns import picked
from jqx.selection import check_rules, choose, config_of, kept
from jqx.tensors import Stats
from jqx.tensors.paths import named_leaves
from jqx.transforms.axes import Axes, axes_from, axes_from_json, axes_given
from jqx.transforms.decoding import is_stored
from jqx.transforms.fake import with_fakes
from jqx.transforms.interpret import named_arrays
from jqx.transforms.observe import record
from jqx.transforms.stored import fake_kv

AxesLike = Mapping[str, Axes | int | tuple[int, ...]]


def quantize(
    params: Any,
    cfg: QuantConfig | str,
    stats: Stats | None = None,
    axes: AxesLike | int | tuple[int, ...] | None = None,
) -> Any:
    """`params` with the weights that `cfg` selects as QTensors, their codes and scales those of
    ModelOpt's arithmetic.

    `cfg`: a QuantConfig or the name of a recipe. `stats` come from `jqx.calibrate` with the same
    function: the scales of inputs, and along which axes each weight is contracted. Without them
    `axes` says the latter: what `jqx.axes` returns, or a mapping from paths to the contraction axes
    (an int or several), or these for all leaves with at least two axes; other axes but one are a
    stack then. A QTensor in the format that `cfg` gives it keeps its codes, and gets the scale of
    its inputs.

    Keys and values are no parameters: see `jqx.kv_rounding`. Codes are found on the CPU, where
    division is exact, and come back to the devices of the weight; they are sharded as it is.

    Raises InputError, naming paths, for a rule that matches nothing; for a selected parameter that
    is not followed through the function, or is used in two ways that need two formats; for shapes
    that do not fit; for a stored input scale without statistics; and if neither `stats` nor `axes`
    is given.
    """
    config = config_of(cfg)
    _check_stats(stats)
    leaves = named_leaves(params, is_stored)
    structure = jax.tree.structure(params, is_leaf=is_stored)
    arrays = _by_name(leaves)
    seen = _seen(arrays, stats, axes)
    chosen = choose(config, seen, stats.meta.get("names", ()) if stats else ())
    found = {
        path: stored_leaf(path, arrays[path], choice, seen[path], config.steps, stats)
        for path, choice in chosen.items()
    }
    return structure.unflatten([found.get(path, x) for path, x in leaves])


def compress(
    params: Any,
    patterns: Any = None,
    *,
    config: QuantConfig | str,
    stats: Stats | None = None,
    axes: AxesLike | int | tuple[int, ...] | None = None,
) -> Any:
    """`params` with those weights that `config` selects and `patterns` say yes to as QTensors whose
    scales reach the largest magnitudes: for models that do not fit otherwise.

    `patterns`: a mapping of globs, as in rules, to bool; the last match wins, no match is no; None:
    all. `axes` as in `quantize`. Without `stats` stored scales of inputs are left out, and found in
    each activation, until `quantize` adds them: `stats = jqx.calibrate(apply_fn, compressed,
    batches, config)`, then `jqx.quantize(compressed, config, stats)`.

    Raises InputError as `quantize` does; for an algorithm other than "max"; for patterns that are
    none or match nothing.
    """
    config = config_of(config)
    if searched := [step.method for step in config.steps if step.method != "max"]:
        raise InputError(
            f"compress stores the largest magnitudes, and {', '.join(searched)} chooses others: "
            'take jqx.quantize, or a configuration with algorithm="max"'
        )
    _check_stats(stats)
    seen = _seen(_by_name(named_leaves(params, is_stored)), stats, axes)
    check_rules(config, seen, stats.meta.get("names", ()) if stats else [])
    wanted = picked({"*": True} if patterns is None else patterns, config, seen)
    narrowed = replace(
        config,
        rules=tuple(replace(rule, optional=True) for rule in config.rules),  # checked already
        algorithm=None if stats is None else config.algorithm,
    )
    return quantize(params, narrowed, stats, {path: seen[path] for path in wanted})


def dequantize(params: Any) -> Any:
    """`params` with every QTensor as the array it stands for, in its own dtype."""
    decode = lambda x: x.decode() if is_stored(x) else x  # noqa: E731
    return jax.tree.map(decode, params, is_leaf=is_stored)


def fake_quantized(
    f: Callable[..., Any], cfg: QuantConfig | str, stats: Stats | None = None
) -> Callable[..., Any]:
    """The function `(params, *args) -> f(params, *args)` of dense parameters that computes what the
    quantized ones would: for quantization-aware training.

    Weights and inputs that `cfg` selects are rounded to what their formats can hold, with scales
    that follow the weights; those of inputs come from `stats`, or are found in each activation. The
    gradient is that of the identity (straight-through), and reaches weights, inputs and everything
    else.

    Raises InputError as `quantize` does; for an algorithm other than "max", whose scales would not
    follow; and where a gradient is taken through a function with a gradient of its own in which an
    input is quantized.
    """
    config = config_of(cfg)
    _check_stats(stats)
    searched = [step.method for step in config.steps if step.method != "max"]
    if searched:
        raise InputError(
            f"fake_quantized rounds with scales that follow the weights, and {', '.join(searched)} "
            'chooses scales once: give a configuration with algorithm="max"'
        )

    def run(params: Any, *args: Any) -> Any:
        told, arrays = record(f, params, args), named_arrays(params)
        seen = axes_from(told, {path: tuple(x.shape) for path, x in arrays.items()})
        chosen = choose(config, seen, [u.path for u in told.uses if u.op == "name"])
        for path in chosen:
            check_floats(path, arrays[path])
        fakes = {p: faked_leaf(p, choice, seen[p], stats) for p, choice in chosen.items()}
        return with_fakes(f, fakes)(params, *args)

    return run


def kv_rounding(cfg: QuantConfig | str, stats: Stats) -> dict[str, Callable[[Any], Any]]:
    """What a cache in the format of `cfg` does to keys and values, by the names the function gives
    them (`PATH.k` and `PATH.v`, [batch, heads, time, channels]): the `named` of `jqx.quantized`.

    Their scales are in `stats`, made with the same `cfg`. Raises InputError if they are not.
    """

    _check_stats(stats)

    def rounding(name: str, kv: str) -> Callable[[Any], Any]:
        scale = None
        if not KV_FORMATS[kv].cast:
            amax = known_amax(stats, name, f"keys and values in {kv}")
            if amax.shape:
                raise InputError(
                    f"{name} has statistics of {amax.shape} layers that one scan runs: keys and "
                    "values of scanned layers have no names of their own. Unroll the layers to "
                    "round them"
                )
            scale = jnp.float32(input_scale(amax[()], KV_FORMATS[kv].bound, name))
        block = FORMATS[KV_FORMATS[kv].format].block[1] or 1

        def rounded(x: Any) -> Any:
            if x.shape[-1] % block:
                raise InputError(
                    f"{name} {x.shape} has {x.shape[-1]} channels, and {kv} shares one scale over "
                    f"{block}: take fp8"
                )
            return fake_kv(x, kv, scale, None)

        return rounded

    named = kept(config_of(cfg), stats.meta.get("names", ()))
    return {name: rounding(name, kv) for name, kv in named.items()}


def _by_name(leaves: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The leaves that are arrays. Raises InputError if two have one name."""
    arrays: dict[str, Any] = {}
    for name, x in leaves:
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            if name in arrays:
                raise InputError(f"two parameters are called {name}: rename one of them")
            arrays[name] = x
    return arrays


def _check_stats(stats: Any) -> None:
    if stats is not None and not isinstance(stats, Stats):
        raise InputError(
            f"stats is a {type(stats).__name__}: give what jqx.calibrate returns, a jqx.Stats"
        )


def _seen(arrays: Mapping[str, Any], stats: Stats | None, axes: Any) -> dict[str, Axes]:
    """How each parameter is used, from whatever tells it."""
    if axes is not None:
        seen = axes_given(axes, arrays)
    elif stats is not None and "axes" in stats.meta:
        seen = {path: axes_from_json(row) for path, row in stats.meta["axes"].items()}
    else:
        raise InputError(
            "Along which axes weights are contracted is read from a function: give stats from "
            "jqx.calibrate, or axes=jqx.axes(apply_fn, params, *batch), or axes=-2 for kernels "
            "[in, out], -1 for weights [out, in]"
        )
    for path, row in seen.items():
        have = tuple(arrays[path].shape) if path in arrays else None
        if have != row.shape:
            told = f"{path} is not in params" if have is None else f"{path} has the shape {have}"
            raise InputError(
                f"{told}, and {row.shape} where its use was read: give the params that the "
                "function was calibrated with"
            )
    return seen
