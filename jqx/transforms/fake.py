# SPDX-License-Identifier: Apache-2.0
"""fake_quantized: the function of dense parameters that computes as if they were stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float

from jqx.formats import Format, check_divides, fake_quantize
from jqx.tensors.layout import from_matrices, layout_of, to_matrices
from jqx.tensors.paths import leaf_names

from .inputs import Treatment, check_all_met, treated
from .interpret import PRODUCTS, Acts, Met, Walk, interpret
from .primitives import PRIMITIVES


@dataclass(frozen=True, kw_only=True)
class Fake:
    """What becomes of one parameter: its matrices in `format` (None: as they are), its inputs as
    `treatment` says (None: as they are). `columns` and `stack` are its contraction and stack axes.
    """

    columns: tuple[int, ...]
    stack: tuple[int, ...]
    format: Format | None
    treatment: Treatment | None


def with_fakes(f: Callable[..., Any], fakes: Mapping[str, Fake]) -> Callable[..., Any]:
    """`f`, with the parameters of `fakes` and their inputs rounded to what formats can hold. The
    gradient goes straight through; scales follow the parameters and have none.
    """
    treatments = {path: fake.treatment for path, fake in fakes.items() if fake.treatment}

    def change(met: Met, walk: Walk) -> Any:
        treatment = walk.beside.get(met.use.path)
        if met.use.op not in PRODUCTS or not met.active or treatment is None:
            return None
        return met.apply(treated(treatment, met), met.w)

    def run(params: Any, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(params)
        names = leaf_names(params)
        rounded = structure.unflatten(
            [
                rounded_weight(x, fakes[n]) if n in fakes else x
                for n, x in zip(names, leaves, strict=True)
            ]
        )
        walk = Walk(PRIMITIVES, Acts(change=change), beside=treatments)
        out, _ = interpret(f, walk, rounded, args, treatments)
        check_all_met(walk.record, treatments)
        return out

    return run


def rounded_weight(w: Float[Array, "..."], fake: Fake) -> Float[Array, "..."]:
    """A parameter as it would come back from storage, in its dtype."""
    fmt = fake.format
    if fmt is None:
        return w
    layout = layout_of(w.shape, fake.columns, fake.stack)
    matrices = to_matrices(w, layout)
    check_divides(fmt, matrices.shape)
    one = lambda m: fake_quantize(m, fmt)  # noqa: E731
    for _ in fake.stack:
        one = jax.vmap(one)
    return from_matrices(one(matrices), layout)
