# SPDX-License-Identifier: Apache-2.0
"""What is known of a grouped product before it is computed, and what refuses it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float32

from jqx_kernels.dispatch import Device
from jqx_kernels.matmul.request import MatmulRequest, check_shapes, lacks_blocks, lacks_meaning
from jqx_kernels.storage import Storage


class GroupedRequest(NamedTuple):
    """The static facts about one grouped product: `one`, that of all rows with a single matrix;
    `experts`, how many matrices there are.
    """

    one: MatmulRequest
    experts: int

    def __str__(self) -> str:
        """As it is told in errors."""
        return f"{self.one}, one of {self.experts} for every group of rows"


class Stack(NamedTuple):
    """The stored matrices as they are given. `codes`: of eight bits, [e, ...]; `scale`: [e, blocks
    of rows, blocks of columns]; `outer`: their tensor scales, float32 [e].
    """

    codes: Array
    scale: Array
    outer: Float32[Array, "e"]


def lacks_any(device: Device, request: GroupedRequest) -> str | None:
    """Why nothing here can compute it on any device; None where something can."""
    return lacks_meaning(device, request.one)


def lacks_tiles(device: Device, request: GroupedRequest) -> str | None:
    """Why kernels that work on tiles of bytes cannot; None where they can."""
    return lacks_any(device, request) or lacks_blocks(request.one)


def check_stack(
    x: Array, codes: Array, scale: Array, group_sizes: Array, storage: Storage
) -> tuple[int, ...]:
    """The shape [n, k] of one stored matrix. Raises ValueError where the arrays do not belong
    together.
    """
    if codes.ndim != 3 or scale.ndim < 1:
        raise ValueError(
            f"A grouped product takes a stack of matrices, not codes {codes.shape} and scales "
            f"{scale.shape}."
        )
    counts = codes.shape[0], scale.shape[0], *group_sizes.shape
    if len(counts) != 3 or len(set(counts)) > 1 or not counts[0]:
        raise ValueError(
            f"Codes {codes.shape}, scales {scale.shape} and group sizes {group_sizes.shape} are "
            "not of one number of matrices: the first axis of each is it."
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"Group sizes are integers, not {group_sizes.dtype}.")
    return check_shapes(x, codes[0], scale[0], storage)


def outer_scales(tensor_scale: Array | None, kind: str, experts: int) -> Float32[Array, "e"]:
    """The tensor scale of every matrix, 1 for kinds of scales that know none.

    Raises ValueError where it is missing, and for more or fewer than one for all or one for each.
    """
    if kind != "e4m3":
        return jnp.ones(experts, jnp.float32)
    if tensor_scale is None or tensor_scale.shape not in ((), (1,), (experts,)):
        given = "none" if tensor_scale is None else f"an array {tensor_scale.shape}"
        raise ValueError(
            f"Scales in e4m3 lie below a tensor scale, one for all matrices or ({experts},); there "
            f"is {given}."
        )
    return jnp.broadcast_to(tensor_scale.reshape(-1).astype(jnp.float32), (experts,))
