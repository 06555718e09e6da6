# SPDX-License-Identifier: Apache-2.0
"""Linear: one weight on its way to storage. Algorithms take one and return one; `stored` ends it.

weight' = weight * diag(1 / pre_quant_scale) - low_rank     what codes are found for
y = (x * pre_quant_scale) weight'^T + low rank part         what runs
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jqx.errors import InputError
from jqx.formats import Format, block_amax, encode
from jqx.formats.format import grid_shape
from jqx.tensors import QTensor
from jqx_kernels.bits import divide, round_to

Reduce = Callable[[Array, int], Array]

InputStats = Mapping[str, Any]
"""Kind of statistic -> what is known of the inputs of one linear, an array."""


class Linear(NamedTuple):
    """One weight and what was chosen for it so far. A pytree; None is what nobody chose yet."""

    weight: Float[Array, "n k"]
    """In the dtype of the model, whatever an algorithm did to it."""
    amax: Float32[Array, "..."] | None = None
    """What scales reach, in the shape of the scales; None: the largest magnitudes of `weight`."""
    tensor_amax: Float32[Array, ""] | None = None
    """What the scale of the whole tensor reaches; None: the largest magnitude of `weight`."""
    pre_quant_scale: Float[Array, "k"] | None = None
    """What inputs are multiplied with first, in the dtype of the model."""
    input_amax: Float32[Array, ""] | None = None
    """The largest magnitude of the inputs after `pre_quant_scale`."""
    low_rank: tuple[Float[Array, "n r"], Float[Array, "r k"]] | None = None
    """Two factors whose product was taken off the weight."""
    facts: Mapping[str, Array] = {}  # noqa: RUF012
    """What a report tells of the search: "alpha", "ratio" (of clipping), "damping"..."""

    def told(self, **facts: Any) -> "Linear":
        """The same with more facts."""
        return self._replace(facts={**self.facts, **facts})


def known(stats: InputStats, kind: str, algorithm: str) -> Array:
    """The statistic `kind`. Raises InputError if `algorithm` needs it and it was not collected."""
    if kind not in stats:
        have = ", ".join(sorted(stats)) or "none"
        raise InputError(
            f"{algorithm} needs the statistic {kind!r} of the inputs, and there are: {have}. "
            f"Calibrate for {algorithm}"
        )
    return stats[kind]


TIED = "tied"
"""The statistic that says which input channels must have one factor: int32 [members, groups], the
channels of every group; every channel is in one.
"""


def tied(x: Float32[Array, "k"], stats: InputStats, over: Reduce) -> Float32[Array, "k"]:
    """`x`, one number a channel, with that of `over` of its group in the place of each where
    channels are tied.
    """
    if TIED not in stats:
        return x
    groups = stats[TIED]
    return jnp.zeros_like(x).at[groups].set(over(x[groups], 0)[None, :])


INVERSE = "inverse"
"""The fact of what a weight was multiplied by, float32 [k]."""


def scale_amax(linear: Linear, fmt: Format) -> Float32[Array, "..."]:
    """What the scales of `linear` reach, in their shape: what was chosen, or the largest
    magnitudes.
    """
    if linear.amax is not None:
        return linear.amax
    return block_amax(linear.weight, fmt.block).reshape(grid_shape(fmt, linear.weight.shape))


def smoothed(
    linear: Linear, p: Float32[Array, "k"], channel_amax: Float32[Array, "k"] | None
) -> Linear:
    """`linear` with its inputs multiplied by `p` more and its weight divided by it, as ModelOpt
    rounds: p to the dtype of the weight, the weight by the reciprocal of the unrounded one.

    `channel_amax`: the largest magnitude of each input channel before `p`. What scales reach is
    found anew.
    """
    dtype = linear.weight.dtype
    wide = linear.weight.astype(jnp.float32)
    inverse = divide(jnp.ones_like(p), p)
    weight = (wide * inverse[None, :]).astype(dtype)
    scale = p
    if linear.pre_quant_scale is not None:
        scale = linear.pre_quant_scale.astype(jnp.float32) * p
    found = linear.input_amax
    if channel_amax is not None:
        found = round_to(jnp.max(round_to(channel_amax, dtype) * p), dtype)
    done = linear._replace(
        weight=weight,
        pre_quant_scale=scale.astype(dtype),
        input_amax=found,
        amax=None,
        tensor_amax=None,
    )
    return done.told(inverse=linear.facts.get(INVERSE, jnp.ones_like(p)) * inverse)


def stored(linear: Linear, fmt: Format) -> QTensor:
    """The codes and scales of `linear` in `fmt`. `input_scale` is left to whoever knows the format
    of inputs.

    Raises InputError if the blocks of `fmt` do not divide the shape.
    """
    w = linear.weight
    codes, scale, tensor_scale = encode(w, fmt, linear.amax, linear.tensor_amax)
    return QTensor(
        codes,
        scale,
        tensor_scale,
        format=fmt,
        dtype=w.dtype,
        pre_quant_scale=linear.pre_quant_scale,
        low_rank=linear.low_rank,
    )
