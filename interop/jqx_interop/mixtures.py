# SPDX-License-Identifier: Apache-2.0
"""What is not done yet with mixtures of experts."""

from jqx.errors import InputError
from jqx.models import Experts, ModelSpec

from .settings import Settings


def refuse_experts(spec: ModelSpec | None, settings: Settings, calibrated: bool) -> None:
    """Raise InputError for experts that would not be quantized, or whose inputs would not be found
    where the format is `calibrated`.
    """
    blocks = () if spec is None else spec.blocks
    rows = [kind.mlp for kind in blocks if isinstance(kind.mlp, Experts)]
    told = "" if spec is None else f"model_type {spec.family!r}"
    if any(row.store != "separate" for row in rows):
        raise InputError(f"{told} keeps its experts in one tensor, which is not quantized here yet")
    recorded = settings.activations is not None or settings.stats is not None
    if rows and calibrated and not recorded:
        raise InputError(
            f"the inputs of experts are not calibrated here yet, and {told} has some: take a "
            "format that needs no calibration, or give recorded inputs (--activations)"
        )
