# SPDX-License-Identifier: Apache-2.0
"""What a row of ALGORITHMS says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jqx.config import Algorithm
from jqx.formats import Format

from .linear import InputStats, Linear

Run = Callable[[Linear, Format, InputStats, Any], Linear]


@dataclass(frozen=True, kw_only=True, slots=True)
class AlgorithmRow:
    """One algorithm.

    `params`: a frozen dataclass of its parameters, with their defaults; making one raises
    InputError for values out of range. `run`: a pure function under jit, with format and parameters
    static. `needs`: the kinds of statistics of inputs it cannot do without, of linears in this
    format. `applies`: whether it does anything for weights in this format. `of_inputs`: whether
    what it chooses is the scale of inputs that is stored. `bounded`: whether it searches scales of
    blocks below a tensor scale that linears with one input share from the start.
    `finish`: what comes after all steps, once everything is settled that linears share.
    `small_loops`: whether most of it is loops of small operations, which a few linears side by side
    fill better.
    `parts`: the steps that it is, one after the other, where it is several.
    `variant`: the row of VARIANTS for what it leaves beside codes and scales. `products`: about as
    many products of the weight with all second moments is its work. `about`: one line for people.
    """

    name: str
    run: Run
    params: type
    about: str
    needs: Callable[[Format, Any], tuple[str, ...]] = lambda fmt, params: ()
    applies: Callable[[Format, Any], bool] = lambda fmt, params: True
    of_inputs: bool = False
    bounded: bool = False
    small_loops: bool = False
    finish: Run | None = None
    variant: str | None = None
    products: int = 0
    parts: Callable[[Any], tuple[Algorithm, ...]] | None = None
