# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts from a config: which layers have them, how many, and who chooses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jqx import InputError
from jqx.models import Experts, Mlp, Router

from .reader import Reader

MOST_EXPERTS = 10_000
"""More are a damaged config."""

Layers = Callable[[Reader, int], bool]


def every(read: Reader, i: int) -> bool:
    """All layers have experts."""
    return True


def mixture(  # noqa: PLR0913  one call a family
    router: Callable[[Reader], Router],
    number: str = "num_experts",
    inner: str = "intermediate_size",
    layers: Layers = every,
    form: str | None = None,
    **more: Any,
) -> Callable[[Reader, Mlp, int], Mlp | Experts]:
    """`Family.experts` of a family whose config has the number of experts under the key `number`
    and their size under `inner`; `form`: that of experts, where it is not that of a dense layer;
    `more` are fields of Experts, or functions of what is read and of one expert.
    """

    def experts(read: Reader, mlp: Mlp, i: int) -> Mlp | Experts:
        of_experts = {key: positive(read, key) for key in (number, inner, "num_experts_per_tok")}
        each = replace(mlp, inner=of_experts[inner], form=form or mlp.form)
        chosen = router(read)
        given = {k: value(read, each) if callable(value) else value for k, value in more.items()}
        if not layers(read, i):
            return mlp
        top_k = of_experts["num_experts_per_tok"]
        fields = {"each": each, "router": chosen, **given}
        return Experts(number=of_experts[number], top_k=top_k, **fields)

    return experts


def positive(read: Reader, key: str) -> int:
    """The whole number `key`. Raises InputError where it is none, or not from 1."""
    value = read(key)
    if value is None:
        raise InputError(f"config of model_type {read.row.model_type!r} lacks {read.keys(key)[0]}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(
            f"config needs positive integers, but has {read.keys(key)[0]} = {value!r:.60}"
        )
    return value


def check_experts(read: Reader, row: Experts) -> None:
    """Raise InputError for numbers of experts, choices and groups that do not fit together."""
    router, kind = row.router, read.row.model_type
    if row.number > MOST_EXPERTS:
        raise InputError(f"config has {row.number} experts; no model has more than {MOST_EXPERTS}")
    if row.top_k > row.number:
        raise InputError(
            f"config of model_type {kind!r} sends every token to {row.top_k} experts of "
            f"{row.number}: it can choose no more than there are"
        )
    if router.groups < 1 or row.number % router.groups:
        raise InputError(
            f"config has {row.number} experts in {router.groups} groups: the groups are not equal"
        )
    within = row.number // router.groups * router.top_groups
    if not 1 <= router.top_groups <= router.groups or within < row.top_k:
        raise InputError(
            f"config chooses {row.top_k} experts from {router.top_groups} of {router.groups} "
            f"groups of {row.number // router.groups}: there are not so many"
        )
