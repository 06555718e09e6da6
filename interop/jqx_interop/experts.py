# SPDX-License-Identifier: Apache-2.0
"""Which linears of a checkpoint belong to experts."""

from functools import lru_cache

from jqx.models import Experts, ModelSpec, block_prefix, expert_tensors, kinds
from jqx.tensors.stacks import EACH, member_name


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
