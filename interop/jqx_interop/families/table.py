# SPDX-License-Identifier: Apache-2.0
"""FAMILIES: the model types that are defined here."""

from collections.abc import Mapping
from types import MappingProxyType

from . import (
    alibi,
    arctic,
    dbrx,
    deepseek,
    fused,
    gemma,
    glm,
    gpt,
    gpt_oss,
    llama,
    llama4,
    mixtures,
    nemotron,
    phi,
    placed,
)
from .family import Family

_DENSE = (llama, gemma, gpt, alibi, phi, nemotron, glm, fused, placed)
_MIXED = (mixtures, deepseek, llama4, gpt_oss, dbrx, arctic)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {row.model_type: row for lineage in (*_DENSE, *_MIXED) for row in lineage.ROWS}
)
"""model_type -> row."""
