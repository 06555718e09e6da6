# SPDX-License-Identifier: Apache-2.0
"""What linears have in common: one pre_quant_scale and shared scales where they read the same
input, and factors that move into the weight before them.

    p = mean of the members' p          W_i' = W_i * p_i / p
    gain' = gain * p                    of the norm that feeds them all
    W_up' = W_up * p_down by rows       where a linear feeds another channel by channel

(ModelOpt 0.47, the fusion pass of its export.)
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jqx.formats import Format, block_amax, weight_amax
from jqx_kernels.bits import divide, round_to

from .linear import Linear, scale_amax
from .svdquant import low_rank, product


@partial(jax.jit, static_argnames=("fmt",))
def unified(members: Sequence[Linear], *, fmt: Format) -> list[Linear]:
    """Linears of one format that read one input, with one pre_quant_scale, input_amax and
    tensor_amax.

    Where the pre_quant_scale of a member changes, what its scales reach is found anew from its
    weight. Linears with a low-rank part get one new part together, whose inner factor they share.
    """
    out = list(members)
    if all(m.pre_quant_scale is not None for m in out):
        out = _one_factor(out, fmt)
    if all(m.input_amax is not None for m in out):
        most = jnp.max(jnp.stack([m.input_amax for m in out if m.input_amax is not None]))
        out = [m._replace(input_amax=most) for m in out]
    if fmt.block == (None, None):
        whole = [weight_amax(m.weight) if m.amax is None else m.amax.reshape(()) for m in out]
        out = [m._replace(amax=jnp.max(jnp.stack(whole))) for m in out]
    if fmt.tensor_bound is not None:
        reach = [weight_amax(m.weight) if m.tensor_amax is None else m.tensor_amax for m in out]
        out = [m._replace(tensor_amax=jnp.max(jnp.stack(reach))) for m in out]
    return out


def _one_factor(members: list[Linear], fmt: Format) -> list[Linear]:
    scales = [m.pre_quant_scale for m in members if m.pre_quant_scale is not None]
    dtype = members[0].weight.dtype
    stacked = jnp.stack([p.astype(jnp.float32) for p in scales])
    p = round_to(divide(jnp.sum(stacked, axis=0), float(len(scales))), dtype)
    if all(m.low_rank is not None for m in members):
        return _one_low_rank(members, stacked, p)
    return [_moved(m, fmt, old, p) for m, old in zip(members, stacked, strict=True)]


def _moved(linear: Linear, fmt: Format, old: Float[Array, "k"], new: Float[Array, "k"]) -> Linear:
    """`linear` with the factor `new` for its inputs in place of `old`."""
    dtype = linear.weight.dtype
    weight = divide(linear.weight.astype(jnp.float32) * old[None, :], new[None, :]).astype(dtype)
    same = jnp.all(old == new)
    kept = {"weight": jnp.where(same, linear.weight, weight)}
    for field in ("amax", "tensor_amax"):  # chosen for the weight before
        if (value := getattr(linear, field)) is not None:
            block = (None, None) if field == "tensor_amax" or not value.shape else fmt.block
            largest = block_amax(weight, block).reshape(value.shape)
            kept[field] = jnp.where(same, value, largest)
    return linear._replace(pre_quant_scale=new.astype(dtype), **kept)


def _one_low_rank(
    members: list[Linear], old: Float[Array, "m k"], new: Float[Array, "k"]
) -> list[Linear]:
    """One low-rank part of all members together, found anew under one factor."""
    whole, rank = [], 0
    for member, p in zip(members, old, strict=True):
        assert member.low_rank is not None
        wide = member.weight.astype(jnp.float32) + product(*member.low_rank)
        whole.append(wide * divide(p, new)[None, :])
        rank = member.low_rank[1].shape[0]
    joint, dtype = jnp.concatenate(whole), members[0].weight.dtype
    outer, inner = low_rank(joint, rank)
    rest = (joint - product(outer, inner)).astype(dtype)
    found, row = [], 0
    for member in members:
        end = row + member.weight.shape[0]
        parts = (outer[row:end].astype(dtype), inner.astype(dtype))
        changed = {"amax": None, "tensor_amax": None, "pre_quant_scale": new.astype(dtype)}
        found.append(member._replace(weight=rest[row:end], low_rank=parts, **changed))
        row = end
    return found


@jax.jit
def rows_scaled(linear: Linear, p: Float[Array, "n"]) -> Linear:
    """`linear` with its outputs multiplied by `p`; what its scales reach is found anew."""
    dtype = linear.weight.dtype
    weight = (linear.weight.astype(jnp.float32) * p.astype(jnp.float32)[:, None]).astype(dtype)
    return linear._replace(weight=weight, amax=None, tensor_amax=None)


@jax.jit
def not_above_one(linear: Linear) -> Linear:
    """`linear` with the power of two taken off its pre_quant_scale that leaves none above 1, and
    put into its weight: nothing is rounded.
    """
    p = linear.pre_quant_scale
    assert p is not None
    wide = p.astype(jnp.float32)
    power = jnp.ldexp(jnp.float32(1), jnp.frexp(jnp.max(wide))[1])
    weight = linear.weight.astype(jnp.float32) * power
    return linear._replace(
        pre_quant_scale=divide(wide, power).astype(p.dtype),
        weight=weight.astype(linear.weight.dtype),
        amax=None,
        tensor_amax=None,
    )


@jax.jit
def with_input_amax(linear: Linear, channel_amax: Float[Array, "k"]) -> Linear:
    """`linear` with the largest magnitude of its inputs after its pre_quant_scale, `channel_amax`
    being that of every channel before it.
    """
    p, dtype = linear.pre_quant_scale, linear.weight.dtype
    assert p is not None
    met = round_to(channel_amax.astype(jnp.float32), dtype) * p.astype(jnp.float32)
    return linear._replace(input_amax=jnp.max(round_to(met, dtype)))


@partial(jax.jit, static_argnames=("fmt",))
def half_scaled(linear: Linear, *, fmt: Format) -> Linear:
    """`linear` with scales that float16 holds, for layouts that store them in it."""
    scale = divide(scale_amax(linear, fmt), jnp.float32(fmt.element.max))
    half, limits = round_to(scale, jnp.float16), jnp.finfo(jnp.float16)
    half = jnp.clip(half, jnp.float32(limits.smallest_subnormal), jnp.float32(limits.max))
    return linear._replace(amax=half * jnp.float32(fmt.element.max))


@partial(jax.jit, static_argnames=("plus_one",))
def gain_scaled(
    gain: Float[Array, "k"], p: Float[Array, "k"], *, plus_one: bool = False
) -> Float[Array, "k"]:
    """The gain (or the bias) of a norm whose outputs are multiplied by `p`. `plus_one`: of norms
    that multiply by gain + 1.
    """
    wide, factor = gain.astype(jnp.float32), p.astype(jnp.float32)
    if plus_one:
        return ((wide + 1) * factor - 1).astype(gain.dtype)
    return (wide * factor).astype(gain.dtype)
