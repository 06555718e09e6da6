# SPDX-License-Identifier: Apache-2.0
"""What compiled programs of calibration depend on."""

from dataclasses import dataclass

from jqx.config import KVFormat
from jqx.models import BlockKind, Compute, ModelSpec


@dataclass(frozen=True, slots=True)
class Program:
    """What one compiled program of a block, or of one of its experts, depends on.

    `dtype`: the model's, in which magnitudes are taken; `kv`: how keys and values will be stored,
    if statistics of them are needed; `whole`: linears whose inputs are returned as they are.
    """

    spec: ModelSpec
    kind: BlockKind
    compute: Compute
    dtype: str
    kv: KVFormat | None = None
    whole: frozenset[str] = frozenset()
