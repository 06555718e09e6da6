# SPDX-License-Identifier: Apache-2.0
"""quantized: the function that runs on stored weights, as the stored formats say.

A function of dense parameters becomes one of parameters among which there are QTensors: every
matrix product multiplies the decoded weight with the activation as its linear quantizes it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array

from jqx.errors import InputError

from .decoding import split
from .inputs import check_all_met, treated, treatment_of
from .interpret import PRODUCTS, Acts, Met, Record, Walk, interpret
from .low_rank import check_lookup, low_rank_product
from .primitives import PRIMITIVES
from .products import has_kernels, kernel_product, stacks

Named = Mapping[str, Callable[[Array], Array]]
Product = Callable[[Met], Array | None]


def quantized(
    f: Callable[..., Any],
    named: Named | None = None,
    product: Product | None = None,
    settle: Callable[[Array], Array] | None = None,
    implementation: str | None = None,
) -> Callable[..., Any]:
    """The function `(params, *args) -> f(dense params, *args)` for `params` with QTensor leaves.

    Where a QTensor is multiplied with an activation, the activation is first multiplied by
    `pre_quant_scale` and quantized as `input_format` says; the gradient goes straight through. The
    matrix of `low_rank` meets the activation as it is before it is quantized, and is added.
    Nothing else is done with activations: a lookup of rows, for one, is that of the decoded matrix.
    `named` are functions of the activations that `f` gave a name with `checkpoint_name`; what they
    return takes the activation's place. `product` may compute the product of an activation and a
    parameter, stored or not, in its own way; where it returns None the operation is as in `f`.
    `settle` is applied to quantized inputs, as `f` does to the results of its own operations where
    it rounds them: without it they have the precision of their dtype. `implementation`: the one of
    `jqx_kernels` for products of activations with one stored matrix each, and of rows in groups
    with a stored stack (`jax.lax.ragged_dot`); without it GPUs and TPUs use the first that can do
    it, and CPUs multiply the decoded matrix, those of a stack one after another. Where inputs and
    weight are both FP8 or INT8 with scales for whole rows, those multiply codes with codes.

    Weights are decoded, in their own dtype, where `f` is run: call it inside `jit`, where a decoded
    weight lives as long as its product, and of a stack that `f` scans over or indexes one member.
    Without QTensors, names and `product` it is `f`.

    Raises InputError, naming the parameter, where the result would not be what the formats say: a
    QTensor that quantizes its input, or has a low-rank part, and meets an activation in another
    way than as it is, in a product over its contraction axis (scaled, a part of its inputs, in one
    product of a whole stack whose members have scales of their own); a lookup of rows of one with a
    low-rank part; a name that `f` does not give.
    Differentiating through a function with a gradient of its own (`custom_jvp`, `custom_vjp`) in
    which an input is quantized is refused, too.
    """
    named = {} if named is None else named
    settled = (lambda x: x) if settle is None else settle

    def run(params: Any, *args: Any) -> Any:
        shapes, stored = split(params)
        if not named and product is None and not stored:
            return f(params, *args)
        ways = {name: treatment_of(name, q) for name, q in stored.items()}
        treatments = {name: way for name, way in ways.items() if way is not None}

        def change(met: Met, walk: Walk) -> Any:
            if met.use.op == "name":
                wanted = named.get(met.use.path)
                return None if wanted is None else met.apply(wanted(met.x), None)
            treatment = walk.beside.get(met.use.path)
            check_lookup(treatment, met)
            if met.use.op not in PRODUCTS or not met.active:
                return None
            x = met.x if treatment is None else settled(treated(treatment, met))
            now = met._replace(x=x)
            out = None if product is None else product(now)
            out = kernel_product(now, implementation, treatment) if out is None else out
            out = met.apply(x, met.w) if out is None else out
            if treatment is None or treatment.low_rank is None:
                return out
            return out + low_rank_product(treatment, met, settled)

        walk = Walk(PRIMITIVES, Acts(change=change), stored=stored, beside=treatments)
        all_met = product is not None or has_kernels(implementation)
        followed = None if all_met else treatments.keys() | stacks(stored)
        out, _ = interpret(f, walk, shapes, args, followed)
        check_all_met(walk.record, treatments)
        _check_names(walk.record, named)
        return out

    return run


def _check_names(record: Record, named: Named) -> None:
    """Raises InputError if `f` does not give one of these names."""
    met = {u.path for u in record.uses if u.op == "name"} - record.untracked.keys()
    for name in named:
        if name not in met:
            raise InputError(
                f"no activation is called {name}, or one in a construct that cannot be walked is; "
                f"there are {', '.join(sorted(met)) or 'none'}"
            )
