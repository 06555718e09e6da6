# SPDX-License-Identifier: Apache-2.0
"""Calibrating on weights that are stored already: products multiply decoded weights, and inputs are
met as they are, before any rounding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jqx.errors import InputError
from jqx.tensors import QTensor
from jqx.tensors.paths import leaf_names
from jqx.transforms.decoding import abstract, is_stored
from jqx.transforms.entries import Entry
from jqx.transforms.interpret import Acts, Met, Use, Walk, interpret
from jqx.transforms.placing import entry
from jqx.transforms.primitives import PRIMITIVES


def apart(params: Any) -> tuple[Any, dict[str, QTensor]]:
    """`params` with the shapes of arrays in place of its QTensors, and these by name: what
    `interpret` takes, with the latter as `Walk.stored`.

    Raises InputError for a QTensor that changes its inputs before they are rounded.
    """
    leaves, structure = jax.tree.flatten(params, is_leaf=is_stored)
    if not any(map(is_stored, leaves)):
        return params, {}
    shapes = structure.unflatten([abstract(x) if is_stored(x) else x for x in leaves])
    stored = {n: x for n, x in zip(leaf_names(shapes), leaves, strict=True) if is_stored(x)}
    for name, q in stored.items():
        if q.pre_quant_scale is not None or q.low_rank is not None:
            beside = "a low-rank part" if q.pre_quant_scale is None else "a pre_quant_scale"
            raise InputError(
                f"{name} is quantized with {beside}, which was chosen with its inputs: give dense "
                "parameters to calibrate (jqx.dequantize)"
            )
    return shapes, stored


def observe_compressed(
    f: Callable[..., Any], collect: Callable[[Use, Any], Any]
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`jqx.observe` of a function whose parameters may be QTensors; what is collected at several
    uses is merged by its maximum.
    """

    def taken(met: Met, walk: Walk) -> Entry | None:
        x = met.x if met.groups is None else (met.x, met.groups)
        what = collect(met.use, x)
        return None if what is None else entry(met, what, 0, walk.stacks)

    def observed(params: Any, *args: Any) -> tuple[Any, dict[str, Any]]:
        shapes, stored = apart(params)
        acts = Acts(collect=taken, merge=partial(jax.tree.map, jnp.maximum))
        return interpret(f, Walk(PRIMITIVES, acts, stored=stored), shapes, args)

    return observed
