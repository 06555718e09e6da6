# SPDX-License-Identifier: Apache-2.0
"""Stored weights become arrays as late as they can, so that a program holds few of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float

from jqx.errors import InputError
from jqx.tensors import QTensor
from jqx.tensors.paths import leaf_names

from .entries import vary, varying


def is_stored(x: Any) -> bool:
    """Whether a leaf is a QTensor."""
    return isinstance(x, QTensor)


def abstract(q: QTensor) -> jax.ShapeDtypeStruct:
    """The array it stands for, with all that types tell on a mesh with explicit or manual axes."""
    kinds = set(jax.typeof(q.codes).sharding.mesh.axis_types or ())
    if kinds & {AxisType.Explicit, AxisType.Manual}:
        return jax.eval_shape(QTensor.decode, q)
    return jax.ShapeDtypeStruct(q.shape, q.dtype)


def split(params: Any) -> tuple[Any, dict[str, QTensor]]:
    """`params` with the shapes of arrays in place of its QTensors, and these by name: what
    `interpret` takes, with the latter as `Walk.stored`.
    """
    leaves, structure = jax.tree.flatten(params, is_leaf=is_stored)
    if not any(map(is_stored, leaves)):
        return params, {}
    shapes = structure.unflatten([abstract(x) if is_stored(x) else x for x in leaves])
    named = zip(leaf_names(shapes), leaves, strict=True)
    return shapes, {name: x for name, x in named if is_stored(x)}


def split_to_observe(params: Any) -> tuple[Any, dict[str, QTensor]]:
    """`split` for a function that runs on decoded weights, with inputs as they are.

    Raises InputError for a QTensor that changes its inputs before they are rounded.
    """
    shapes, stored = split(params)
    for name, q in stored.items():
        if q.pre_quant_scale is not None or q.low_rank is not None:
            beside = "a low-rank part" if q.pre_quant_scale is None else "a pre_quant_scale"
            raise InputError(
                f"{name} is quantized with {beside}, which was chosen with its inputs: give dense "
                "parameters to calibrate (jqx.dequantize)"
            )
    return shapes, stored


def dense(data: Any) -> Any:
    """The array that is, or is stored in, `data`."""
    return data.decode() if isinstance(data, QTensor) else data


def decoded_after(latest: Any, data: Any) -> Any:
    """`dense(data)`, not computed before the activation `latest` is there; None for none.

    XLA schedules for concurrency on a CPU: it would decode all weights of a program at once, and
    hold them. It drops optimization barriers before that, so what orders it is a case that never
    comes.
    """
    if latest is None or not isinstance(data, QTensor) or _cut(latest, data):
        return dense(data)
    two_levels = data.tensor_scale is not None and data.format.scale.name != "float32"
    name = "tensor_scale" if two_levels else "scale"
    scale = getattr(data, name)
    never = _never(lax.stop_gradient(latest))
    held = jax.tree.map(lambda a: jnp.where(never, jnp.zeros_like(a), a), scale)
    return data.replace(**{name: held}).decode()


@custom_vmap
def _never(x: Float[Array, "..."]) -> Bool[Array, ""]:
    """False, which a CPU does not know before it has `x`."""
    return lax.platform_dependent(
        x,
        cpu=lambda x: x.reshape(-1)[0] > jnp.inf,
        default=lambda x: vary(jnp.bool(False), varying(x)),
    )


@_never.def_vmap
def _never_in_a_batch(size: int, batched: Sequence[bool], x: jax.Array) -> tuple[jax.Array, bool]:
    """Not one for every example, or each would decode the weights."""
    return _never(x[0]), False


def _cut(x: Any, q: QTensor) -> bool:
    """Whether the types say that devices have parts of `x`, and all the same of the array: it has
    no first number then, or one that would make the array differ, too.
    """
    own = frozenset().union(*map(varying, jax.tree.leaves((q.codes, q.scale, q.tensor_scale))))
    return any(jax.typeof(x).sharding.spec) or not varying(x) <= own
