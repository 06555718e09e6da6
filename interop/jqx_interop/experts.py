# SPDX-License-Identifier: Apache-2.0
"""Which linears of a checkpoint belong to experts."""

import math
from collections.abc import Collection, Mapping
from functools import lru_cache

from jqx.errors import InputError
from jqx.models import Experts, ModelSpec, block_prefix, expert_tensors, kinds
from jqx.tensors.stacks import EACH, member_name

from .checkpoints import TensorInfo

INSIDE = ".experts."
"""What is in the names of tensors of experts, whatever the architecture."""


def expert_linears(spec: ModelSpec, i: int) -> list[dict[str, str]]:
    """Of every expert of block `i`, if it has any: linear -> what it is called in the checkpoint.
    No linears where all experts lie in one tensor.
    """
    row, prefix = kinds(spec)[i].mlp, block_prefix(spec, i)
    if not isinstance(row, Experts):
        return []
    tensors = expert_tensors(row, spec.names, spec.hidden)
    own = {p: t for p, t in tensors.items() if p.endswith(".weight") and EACH in t}
    return [
        {
            path.removesuffix(".weight"): f"{prefix}.{member_name(t, e)}".removesuffix(".weight")
            for path, t in own.items()
        }
        for e in range(row.number)
    ]


@lru_cache(maxsize=8)
def linears_of_experts(spec: ModelSpec | None) -> frozenset[str]:
    """The linears of all experts of all blocks, as they are called in the checkpoint."""
    if spec is None:
        return frozenset()
    blocks = (expert_linears(spec, i) for i in range(len(kinds(spec))))
    return frozenset(path for experts in blocks for own in experts for path in own.values())


def room_for_states(spec: ModelSpec, most: int) -> int:
    """Bytes of hidden states up to which they stay in memory, of `most` in all: of blocks with
    experts four times as much lies beside them, part of it in files.
    """
    return most // 4 if any(isinstance(kind.mlp, Experts) for kind in kinds(spec)) else most


def check_coverage(
    tensors: Mapping[str, TensorInfo], quantized: Collection[str], least: float | None
) -> None:
    """Raise InputError where less than the share `least` of the weights of experts is of linears
    that are `quantized`.
    """
    if least is None:
        return
    own = {
        name: math.prod(info.shape)
        for name, info in tensors.items()
        if INSIDE in name and len(info.shape) > 1 and not name.endswith("bias")
    }
    left = [name for name in own if name.removesuffix(".weight") not in quantized]
    total, missed = sum(own.values()), sum(own[name] for name in left)
    if total == 0:
        raise InputError("--expert-coverage is given, and the model has no experts: leave it out")
    if missed > (1 - least) * total:
        raise InputError(
            f"{100 * (1 - missed / total):.4g}% of the weights of experts would be quantized, and "
            f"--expert-coverage asks for {100 * least:g}%: {left[0]} and {len(left) - 1} more "
            "would be left as they are; take a recipe that selects them"
        )
