# SPDX-License-Identifier: Apache-2.0
"""FAMILIES: the model types that are defined here."""

from collections.abc import Mapping
from types import MappingProxyType

from . import alibi, fused, gemma, glm, gpt, llama, mixtures, nemotron, phi, placed
from .family import Family

_LINEAGES = (llama, gemma, gpt, alibi, phi, nemotron, glm, fused, placed, mixtures)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {row.model_type: row for lineage in _LINEAGES for row in lineage.ROWS}
)
"""model_type -> row."""
