# SPDX-License-Identifier: Apache-2.0
"""What several lineages have in common, as functions of what is read."""

import math
from dataclasses import replace

from jqx.models import Attention, BlockKind, ModelSpec

from .reader import Reader


def embedding_by_width(read: Reader, spec: ModelSpec) -> ModelSpec:
    """Embeddings times the square root of their width."""
    return replace(spec, embedding_scale=math.sqrt(spec.hidden))


def scale_by_scalar(read: Reader, row: Attention) -> Attention:
    """Scores divided by the root of a number in the config, not by that of the head's width."""
    return replace(row, scale=read("query_pre_attn_scalar") ** -0.5)


def without_rope(kind: BlockKind) -> BlockKind:
    """The same without positions."""
    assert isinstance(kind.attention, Attention)
    return replace(kind, attention=replace(kind.attention, rope=None))


def four_times(read: Reader) -> int:
    """The usual inner size of an MLP that is not gated."""
    return 4 * read("hidden_size")
