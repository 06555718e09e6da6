# SPDX-License-Identifier: Apache-2.0
"""quantized: the function that runs on stored weights, as the stored formats say.

A function of dense parameters becomes one of parameters among which there are QTensors: every
matrix product multiplies the decoded weight with the activation as its linear quantizes it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jqx.config import INPUT_FORMATS
from jqx.errors import InputError, nearest
from jqx.tensors import QTensor
from jqx.tensors.paths import leaf_names

from .interpret import Met, Record, Walk, interpret
from .primitives import PRIMITIVES
from .stored import block_of, fake_input

Named = Mapping[str, Callable[[Array], Array]]
Product = Callable[[Met], Array | None]


def quantized(
    f: Callable[..., Any],
    named: Named | None = None,
    product: Product | None = None,
    settle: Callable[[Array], Array] | None = None,
) -> Callable[..., Any]:
    """The function `(params, *args) -> f(dense params, *args)` for `params` with QTensor leaves.

    Where a QTensor is multiplied with an activation, the activation is first multiplied by
    `pre_quant_scale` and quantized as `input_format` says; the gradient goes straight through.
    Nothing else is done with activations: a lookup of rows, for one, is that of the decoded matrix.
    `named` are functions of the activations that `f` gave a name with `checkpoint_name`; what they
    return takes the activation's place. `product` may compute the product of an activation and a
    parameter, stored or not, in its own way; where it returns None the operation is as in `f`.
    `settle` is applied to quantized inputs, as `f` does to the results of its own operations where
    it rounds them: without it they have the precision of their dtype.

    Weights are decoded, in their own dtype, where `f` is run: call it inside `jit`, where a decoded
    weight lives as long as its product, and of a stack that `f` scans over one member. Without
    QTensors, names and `product` it is `f`. In functions with a gradient of their own
    (`custom_jvp`, `custom_vjp`) that such a weight enters, the gradient is that of the operations
    inside.

    Raises InputError, naming the parameter, where the result would not be what the formats say: a
    QTensor with a low-rank part; one that quantizes its input and meets an activation in another
    way than as it is, in a product over its contraction axis (sliced, scaled, in a branch, in one
    product of a whole stack whose members have scales of their own); a name that `f` does not give.
    """
    named = {} if named is None else named

    def run(params: Any, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(params, is_leaf=_is_stored)
        if not named and product is None and not any(map(_is_stored, leaves)):
            return f(params, *args)
        shapes = structure.unflatten([_abstract(x) if _is_stored(x) else x for x in leaves])
        stored = {n: x for n, x in zip(leaf_names(shapes), leaves, strict=True) if _is_stored(x)}
        for name, q in stored.items():
            _check(name, q)
        treated = {name for name, q in stored.items() if _treats_input(q)}

        def handler(met: Met) -> tuple[Any, Any]:
            x = met.x
            if met.use.op == "name" and met.use.path in named:
                x = named[met.use.path](x)
            if met.use.op == "dot" and met.active:
                if met.use.path in treated:
                    x = _input_of(stored[met.use.path], met)
                    x = x if settle is None else settle(x)
                if product is not None and (out := product(met._replace(x=x))) is not None:
                    return out, None
            return met.apply(x, met.w), None

        walk = Walk(PRIMITIVES, handler, jnp.maximum, stored=stored)
        out, _ = interpret(f, walk, shapes, args, None if product else treated)
        _check_all_met(walk.record, treated, named)
        return out

    return run


def _is_stored(x: Any) -> bool:
    return isinstance(x, QTensor)


def _abstract(q: QTensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(q.shape, q.dtype)


def _treats_input(q: QTensor) -> bool:
    return q.pre_quant_scale is not None or q.input_format is not None


def _check(name: str, q: QTensor) -> None:
    """Raises InputError for fields that do not fit each other."""
    if q.low_rank is not None:
        raise InputError(f"{name} has a low-rank part, which is not applied yet: decode it first")
    lead, k = tuple(q.codes.shape[:-2]), q.shape[q.axis]
    wanted = {"input_scale": lead, "pre_quant_scale": (*lead, k)}
    for field, shape in wanted.items():
        value = getattr(q, field)
        if value is not None and tuple(value.shape) != shape:
            raise InputError(f"{field} of {name} has the shape {tuple(value.shape)}, not {shape}")
    if q.input_format is None:
        return
    if q.input_format not in INPUT_FORMATS:
        raise nearest(q.input_format, INPUT_FORMATS, f"input format of {name}")
    block = block_of(INPUT_FORMATS[q.input_format])
    if k % block:
        raise InputError(
            f"{name} has {k} inputs, and {q.input_format} quantizes {block} together: "
            "leave this linear's input_format out"
        )


def _input_of(leaf: QTensor, met: Met) -> Float[Array, "..."]:
    """The activation as the linear of `leaf`, as it lies in the tree, sees it; in its own dtype."""
    path, axes, x, q = met.use.path, met.use.activation_axes, met.x, met.stored
    k = leaf.shape[leaf.axis]
    over = met.use.weight_axes, math.prod(x.shape[a] for a in axes)
    if over != ((leaf.ndim + leaf.axis,), k):
        raise InputError(
            f"{path} quantizes {k} inputs along axis {leaf.axis} of {leaf.shape}, and it is summed "
            f"over the axes {met.use.weight_axes}, {over[1]} inputs at once: store it along those"
        )
    if q is None or (q.codes.ndim > 2 and _by_member(q)):
        raise InputError(
            f"{path} is a stack {leaf.shape} whose members scale their inputs, and it is used as a "
            "whole or rearranged first: scan over it, or keep its members apart"
        )
    last = range(-len(axes), 0)
    moved = jnp.moveaxis(x, axes, last)
    channels = moved.reshape(*moved.shape[: x.ndim - len(axes)], k)
    if q.pre_quant_scale is not None:
        factor = q.pre_quant_scale.reshape((1,) * (channels.ndim - 1) + (k,))
        channels = (channels.astype(jnp.float32) * factor.astype(jnp.float32)).astype(x.dtype)
    if q.input_format is not None:
        scale = None if q.codes.ndim > 2 else q.input_scale
        channels = fake_input(channels, q.input_format, scale)
    return jnp.moveaxis(channels.reshape(moved.shape), last, axes)


def _by_member(q: QTensor) -> bool:
    """Whether members of a stack change the same activation in ways of their own."""
    row = INPUT_FORMATS.get(q.input_format or "")
    return q.pre_quant_scale is not None or (row is not None and row.bound is not None)


def _check_all_met(record: Record, treated: set[str], named: Named) -> None:
    """Raises InputError if an activation was passed over that had to be changed."""
    elsewhere = [u.path for u in record.uses if u.op == "elementwise"]
    for path in (*record.untracked, *elsewhere):
        if path in treated:
            raise InputError(
                f"{path} quantizes its inputs, and it meets an activation other than in a product "
                "as it is (it is sliced or changed first, or enters a branch or a loop): decode it "
                "first, or drop its input_format and pre_quant_scale"
            )
    met = {u.path for u in record.uses if u.op == "name"} - record.untracked.keys()
    for name in named:
        if name not in met:
            raise InputError(
                f"no activation is called {name}, or one in a branch or a loop is, where it cannot "
                f"be changed; there are {', '.join(sorted(met)) or 'none'}"
            )
