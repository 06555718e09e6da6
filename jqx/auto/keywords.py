# SPDX-License-Identifier: Apache-2.0
"""What `auto_quantize` is asked for, in its own words or ModelOpt's."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jqx.errors import InputError, nearest

from .ways import BIT_COUNTS
from .weighting import PLAIN_BITS, Weighting

CONSTRAINTS = ("effective_bits", "cost_model", "cost")
COST_MODELS = ("weight", "active_moe")
COSTS = ("active_moe_expert_ratio", "excluded_module_name_patterns")


@dataclass(frozen=True, kw_only=True)
class Request:
    """See `jqx.auto_quantize`. None for steps: all batches."""

    formats: tuple[Any, ...]
    bits: float = 4.8
    count: str = "modelopt"
    disabled_layers: tuple[str, ...] = ()
    num_calib_steps: int | None = None
    num_score_steps: int | None = None
    weighting: Weighting = field(default_factory=Weighting)


def request_of(own: Mapping[str, Any], more: Mapping[str, Any]) -> Request:
    """The request that keywords make. Raises InputError for one that is none, with the nearest, and
    for values that none can have.
    """
    given, other = dict(own), dict(more)
    constraints = other.pop("constraints", None)
    if constraints is not None:
        given |= _constrained(constraints)
    if "auto_quantize_bits" in other:
        given["bits"] = other.pop("auto_quantize_bits")
    if "quantization_formats" in other:
        given["formats"] = other.pop("quantization_formats")
    known = ("count", "disabled_layers", "num_calib_steps", "num_score_steps")
    names = (*known, "constraints", "auto_quantize_bits", "quantization_formats")
    for name in other:
        if name not in known:
            raise nearest(name, names, "keyword of auto_quantize")
    disabled = other.pop("disabled_layers", None) or ()
    given["disabled_layers"] = (disabled,) if isinstance(disabled, str) else tuple(disabled)
    formats = given["formats"]
    given["formats"] = (formats,) if isinstance(formats, str | Mapping) else tuple(formats)
    request = Request(**given, **other)
    _check(request)
    return request


def _constrained(constraints: Any) -> dict[str, Any]:
    if not isinstance(constraints, Mapping):
        raise InputError(
            f'constraints is a {type(constraints).__name__}: give {{"effective_bits": 4.8}}'
        )
    for name in constraints:
        if name not in CONSTRAINTS:
            raise nearest(name, CONSTRAINTS, "constraint")
    found: dict[str, Any] = {"weighting": _weighting(constraints)}
    if "effective_bits" in constraints:
        found["bits"] = constraints["effective_bits"]
    return found


def _weighting(constraints: Mapping[str, Any]) -> Weighting:
    model, cost = constraints.get("cost_model", "weight"), constraints.get("cost") or {}
    if model not in COST_MODELS:
        raise nearest(str(model), COST_MODELS, "cost model")
    for name in cost:
        if name not in COSTS:
            raise nearest(name, COSTS, "part of the cost")
    excluded = cost.get("excluded_module_name_patterns") or ()
    weighting = Weighting(excluded=(excluded,) if isinstance(excluded, str) else tuple(excluded))
    if model == "weight":
        return weighting
    ratio = cost.get("active_moe_expert_ratio")
    if ratio is None:
        raise InputError(
            'the cost model "active_moe" needs the share of experts that a token meets: give '
            '"cost": {"active_moe_expert_ratio": 0.25}'
        )
    return replace(weighting, experts=float(ratio))


def _check(request: Request) -> None:
    if not request.formats:
        raise InputError('no formats are given: name some, such as formats=("nvfp4", "fp8")')
    bits = request.bits
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits <= PLAIN_BITS:
        raise InputError(f"bits is {bits!r}; give a number in (0, 16]")
    if request.count not in BIT_COUNTS:
        raise nearest(request.count, BIT_COUNTS, "way to count bits")
    for name in ("num_calib_steps", "num_score_steps"):
        steps = getattr(request, name)
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise InputError(f"{name} is {steps!r}; give a number of batches, at least 1")
