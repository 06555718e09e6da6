# SPDX-License-Identifier: Apache-2.0
"""max: every scale reaches exactly the largest magnitude of what it covers. Nothing is searched."""

from dataclasses import dataclass

from jqx.formats import Format

from .linear import InputStats, Linear


@dataclass(frozen=True, kw_only=True, slots=True)
class Max:
    """No parameters."""


def max_calibrate(linear: Linear, fmt: Format, stats: InputStats, params: Max) -> Linear:
    """Forget what scales were chosen: they will be found from the weight."""
    return linear._replace(amax=None, tensor_amax=None)
