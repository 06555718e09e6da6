# SPDX-License-Identifier: Apache-2.0
"""ALGORITHMS, as rows, and what a list of them needs and leaves."""

from collections.abc import Iterable

from jqx.config import Algorithm
from jqx.errors import InputError, nearest
from jqx.formats import Format, find_format
from jqx.formats.elements import E4M3, FLOAT32

from .awq import (
    AwqClip,
    AwqFull,
    AwqLite,
    awq_clip,
    awq_full,
    awq_lite,
    clip_needs,
    full_parts,
    lite_needs,
)
from .gptq import Gptq, gptq
from .headroom import Headroom, headroom, headroom_needs
from .histogram import (
    INPUTS,
    FromBin,
    Percentile,
    entropy,
    histogram_mse,
    histogram_needs,
    percentile,
)
from .local_hessian import LocalHessian, local_hessian, local_hessian_needs
from .max import Max, max_calibrate
from .mse import Mse, mse, searches
from .row import AlgorithmRow
from .smoothquant import SmoothQuant, smoothquant, smoothquant_needs
from .svdquant import SvdQuant, refitted, svdquant, svdquant_needs
from .weighted import Weighted, weighted, weighted_needs


def four_bits(fmt: Format, params: object) -> bool:
    """Whether AWQ and SVDQuant have something to gain."""
    return fmt.element.bits == 4


def clipped(fmt: Format, params: object) -> bool:
    """Whether there are scales that may be smaller than the largest magnitudes ask for."""
    return fmt.element.bits == 4 and fmt.scale in (FLOAT32, E4M3)


def eight_bits(fmt: Format, params: object) -> bool:
    """Whether SmoothQuant has: it is for weights and inputs of eight bits."""
    return fmt.element.bits == 8


ALGORITHMS = {
    row.name: row
    for row in (
        AlgorithmRow(
            name="max",
            run=max_calibrate,
            params=Max,
            about="scales reach the largest magnitudes",
        ),
        AlgorithmRow(
            name="mse",
            run=mse,
            params=Mse,
            about="scales with the smallest squared error of the weights",
            bounded=True,
            applies=searches,
        ),
        AlgorithmRow(
            name="local_hessian",
            run=local_hessian,
            params=LocalHessian,
            about="scales with the smallest error of the outputs, block by block",
            needs=local_hessian_needs,
            bounded=True,
            applies=searches,
        ),
        AlgorithmRow(
            name="wmse",
            run=weighted,
            params=Weighted,
            about="scales with the smallest error of what is stored, weighted with the inputs",
            needs=weighted_needs,
            bounded=True,
        ),
        AlgorithmRow(
            name="nvfp4_act_headroom",
            run=headroom,
            params=Headroom,
            about="a tensor scale of NVFP4 inputs with room for larger values",
            needs=headroom_needs,
            bounded=True,
            applies=lambda fmt, params: fmt.scale == E4M3,
            of_inputs=True,
        ),
        AlgorithmRow(
            name="percentile",
            run=percentile,
            params=Percentile,
            about="a scale of inputs that clips the largest few",
            needs=histogram_needs,
            of_inputs=True,
        ),
        AlgorithmRow(
            name="histogram_mse",
            run=histogram_mse,
            params=FromBin,
            about="the scale of inputs with the smallest squared error",
            needs=histogram_needs,
            applies=lambda fmt, params: fmt.element.name in INPUTS,
            of_inputs=True,
        ),
        AlgorithmRow(
            name="entropy",
            run=entropy,
            params=FromBin,
            about="the scale of int8 inputs that loses least information",
            needs=histogram_needs,
            applies=lambda fmt, params: fmt.element.name == "int8",
            of_inputs=True,
        ),
        AlgorithmRow(
            name="smoothquant",
            run=smoothquant,
            params=SmoothQuant,
            about="moves what is hard to round from inputs into weights",
            needs=smoothquant_needs,
            variant="smooth",
            applies=eight_bits,
        ),
        AlgorithmRow(
            name="awq_lite",
            run=awq_lite,
            params=AwqLite,
            products=11,
            about="scales input channels by how much they matter",
            needs=lite_needs,
            variant="awq",
            applies=four_bits,
        ),
        AlgorithmRow(
            name="awq_clip",
            run=awq_clip,
            params=AwqClip,
            products=25,
            about="clips blocks where that lowers the error of the outputs",
            needs=clip_needs,
            applies=clipped,
        ),
        AlgorithmRow(
            name="awq_full",
            run=awq_full,
            params=AwqFull,
            products=36,
            about="awq_lite, then awq_clip",
            needs=lite_needs,
            variant="awq",
            applies=clipped,
            parts=full_parts,
        ),
        AlgorithmRow(
            name="gptq",
            run=gptq,
            params=Gptq,
            products=4,
            about="rounds column by column; later columns make up for what earlier ones lost",
            needs=lambda fmt, params: ("gram",),
            bounded=True,
            small_loops=True,
        ),
        AlgorithmRow(
            name="svdquant",
            run=svdquant,
            finish=refitted,
            params=SvdQuant,
            products=30,
            about="awq_lite, then keeps the largest part of the weight in two narrow factors",
            needs=svdquant_needs,
            variant="svd",
            applies=four_bits,
        ),
    )
}


def params_of(step: Algorithm) -> object:
    """The parameters of a step. Raises InputError for another name or parameter, with the nearest
    ones, and for a value that is out of range.
    """
    if step.method not in ALGORITHMS:
        raise nearest(step.method, ALGORITHMS, "algorithm")
    kind = ALGORITHMS[step.method].params
    allowed = list(kind.__dataclass_fields__)
    for key, _ in step.params:
        if key not in allowed:
            if not allowed:
                raise InputError(f"{step.method} has no parameters, and {key} is given")
            raise nearest(key, allowed, f"parameter of {step.method}")
    return kind(**dict(step.params))


def apart(steps: Iterable[Algorithm]) -> tuple[Algorithm, ...]:
    """`steps` with those that are several in a row as these."""
    found: list[Algorithm] = []
    for step in steps:
        parts = ALGORITHMS[step.method].parts
        found += [step] if parts is None else parts(params_of(step))
    return tuple(found)


def unscaled(steps: Iterable[Algorithm]) -> tuple[Algorithm, ...]:
    """Those of `steps` that leave nothing beside codes and scales."""
    return tuple(step for step in steps if ALGORITHMS[step.method].variant is None)


def applicable(steps: tuple[Algorithm, ...], fmt: Format) -> tuple[Algorithm, ...]:
    """Those of `steps` that do anything for weights in `fmt`."""
    return tuple(step for step in steps if ALGORITHMS[step.method].applies(fmt, params_of(step)))


def check_applicable(
    steps: tuple[Algorithm, ...], formats: Iterable[str], stored_inputs: bool = True
) -> None:
    """Raises InputError for a step that does nothing for weights in any of `formats`, or for scales
    of inputs where none is stored.
    """
    rows = [find_format(name) for name in dict.fromkeys(formats)]
    for step in steps:
        if rows and not any(ALGORITHMS[step.method].applies(row, params_of(step)) for row in rows):
            raise InputError(
                f"{step.method} is not for weights in {', '.join(row.name for row in rows)}, and "
                "the configuration has no others: take another algorithm, or another format"
            )
        if ALGORITHMS[step.method].of_inputs and not stored_inputs:
            raise InputError(
                f"{step.method} chooses scales of inputs, and the configuration stores none: take "
                "another algorithm, or a format of inputs with a scale"
            )


def needed(steps: tuple[Algorithm, ...], fmt: Format) -> tuple[str, ...]:
    """The kinds of statistics of inputs without which `steps` cannot store a weight in `fmt`."""
    found: dict[str, None] = {}
    for step in applicable(steps, fmt):
        found |= dict.fromkeys(ALGORITHMS[step.method].needs(fmt, params_of(step)))
    return tuple(found)


def variant_of(steps: tuple[Algorithm, ...], fmt: Format) -> str | None:
    """What `steps` leave beside codes and scales in `fmt`: a row of VARIANTS, the last one."""
    found = [ALGORITHMS[step.method].variant for step in applicable(steps, fmt)]
    return next((variant for variant in reversed(found) if variant is not None), None)
