# SPDX-License-Identifier: Apache-2.0
"""What products would be with stored weights, beside those of a function: all candidates at once
for gradients, or one of them by a number that the running program is given.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from jqx.errors import InputError
from jqx.tensors import QTensor
from jqx.transforms.inputs import Treatment, treated, treatment_of
from jqx.transforms.interpret import PRODUCTS, Acts, Met, Walk, interpret
from jqx.transforms.low_rank import low_rank_product
from jqx.transforms.placing import seen
from jqx.transforms.primitives import PRIMITIVES

from .taps import Outputs

Stored = Mapping[str, Sequence[QTensor]]
"""Path of a parameter -> what every candidate stores of it."""


def outputs_of(path: str, q: QTensor) -> Outputs:
    """The result of products of the parameter at `path` if `q` were stored in its place."""
    return partial(_output, q=q, treatment=treatment_of(path, q))


def _output(met: Met, q: QTensor, treatment: Treatment | None) -> Array:
    if met.view is None:
        raise InputError(f"{met.use.path} is not followed to its product: leave it out")
    x = met.x if treatment is None else treated(treatment, met)
    y = met.apply(x, seen(met.view, q.decode()).astype(met.w.dtype))
    if treatment is None or treatment.low_rank is None:
        return y
    return y + low_rank_product(treatment, met, lambda x: x)


def switched(f: Callable[..., Any], stored: Stored) -> Callable[..., Any]:
    """The function `(params, switches, *args) -> f(params, *args)` in which the parameter at a path
    counts as it is where `switches[path]`, an int32, is 0, and else as that one of its stored
    forms. Only what is chosen is computed.
    """

    def change(met: Met, walk: Walk) -> Array | None:
        switch = walk.beside.get(met.use.path)
        if met.use.op not in PRODUCTS or switch is None:
            return None
        ways = [outputs_of(met.use.path, q) for q in stored[met.use.path]]
        plain = partial(met.apply, met.x, met.w)
        return jax.lax.switch(switch, [plain, *(partial(way, met) for way in ways)])

    def run(params: Any, switches: Mapping[str, Any], *args: Any) -> Any:
        walk = Walk(PRIMITIVES, Acts(change=change), beside=switches)
        return interpret(f, walk, params, args)[0]

    return run
