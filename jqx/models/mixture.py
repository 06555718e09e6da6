# SPDX-License-Identifier: Apache-2.0
"""A block with experts in three programs, so that not all of its experts need be in memory:

    front = front(h);  total = sums of expert(x[rows], weights) over experts;  h = combine(front)

`block` gives what they give one after another. Each takes the parameters that it needs.
"""

from functools import partial

import jax
from jaxtyping import Array, Bool, Float, Float32, Int

from jqx.transforms import quantized

from .attention import self_attention
from .compute import FLOAT32, Compute
from .experts import one_expert
from .inner import Front, after_experts, before_experts, settling, stored_kv
from .layers import Inside, Params
from .spec import BlockKind, Experts, ModelSpec

_jit_part = partial(jax.jit, static_argnames=("spec", "kind", "compute"))


@_jit_part
def front(
    spec: ModelSpec,
    kind: BlockKind,
    block_params: Params,
    h: Float[Array, "b t k"],
    positions: Int[Array, "b t"],
    compute: Compute = FLOAT32,
) -> Front:
    """A block up to its experts. `block_params` need none of those of experts
    (`layout.front_shapes`).
    """

    def run(params: Params, h: Array, positions: Array) -> Front:
        inside = Inside(spec.names, params, compute, kind.transposed)
        return before_experts(kind, inside, h, partial(self_attention, positions=positions))[0]

    named = stored_kv(spec, kind, block_params, compute)
    return quantized(run, named, settle=settling(compute))(block_params, h, positions)


@_jit_part
def expert(  # noqa: PLR0913  what is static, then what is not
    spec: ModelSpec,
    kind: BlockKind,
    expert_params: Params,
    x: Float[Array, "r k"],
    weights: Float[Array, "r"],
    real: Bool[Array, "r"] | None = None,
    compute: Compute = FLOAT32,
) -> Float32[Array, "r k"]:
    """What one expert adds to the sum of each of its rows, which are rows of `Front.given.x`, with
    these weights. Rows that are not `real` add zeros, and are zeros wherever they are observed.

    `expert_params` is the tree of one expert, each linear [n, k]: see `stores.expert_tensors`.
    """

    def run(params: Params, x: Array, weights: Array, real: Array | None) -> Array:
        assert isinstance(kind.mlp, Experts)
        return one_expert(kind.mlp, Inside(spec.names, params, compute), x, weights, real)

    return quantized(run, settle=settling(compute))(expert_params, x, weights, real)


@_jit_part
def combine(
    spec: ModelSpec,
    kind: BlockKind,
    block_params: Params,
    front: Front,
    total: Float32[Array, "rows k"],
    compute: Compute = FLOAT32,
) -> Float[Array, "b t k"]:
    """The states after the block: `total` holds the sums of what experts made of every token.
    `block_params` may be empty where no norm comes after them.
    """
    inside = Inside(spec.names, block_params, compute, kind.transposed)
    return after_experts(kind, inside, front, total)
