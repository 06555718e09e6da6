# SPDX-License-Identifier: Apache-2.0
"""Every rule of the walker is needed: without it, some case of the zoo is seen in another way."""

from functools import lru_cache

import jax
import pytest
import zoo_constructs
import zoo_models
import zoo_sharded
from jax.extend import core as jex

from jqx.transforms.interpret import arrays_of
from jqx.transforms.observe import record
from jqx.transforms.primitives import PRIMITIVES
from jqx.transforms.rearrange import VIEWS

CASES = {**zoo_constructs.CASES, **zoo_sharded.CASES, **zoo_models.CASES}

SPELLINGS = {
    "checkpoint": ("remat2",),
    "remat": ("remat2",),
    "pjit": ("jit",),
    "copy_p": ("copy",),
    "pcast": ("pvary",),
    "ragged_dot": ("ragged_dot_general",),
    "expand_dims": ("broadcast_in_dim",),
    "core_call": ("closed_call", "eval_jaxpr"),
    "closed_call": ("eval_jaxpr",),
    "eval_jaxpr": ("closed_call",),
}
"""Names of primitives that some versions of JAX do not have -> the names of what they have instead,
one or another, for which the rule is the same.
"""


@lru_cache
def made(name):
    return CASES[name]()


def seen(name):
    """What tracing tells: uses, in their order, and what is not followed."""
    case = made(name)
    found = record(case.f, case.params, case.args)
    return list(found.uses), list(found.untracked)


@lru_cache
def seen_with_all_rules(name):
    return seen(name)


@lru_cache
def primitives(name):
    """The names of all primitives in a case."""
    case = made(name)
    arrays, rebuild = arrays_of((case.params, case.args))

    def run(xs):
        params, args = rebuild(xs)
        return arrays_of(case.f(params, *args))[0]

    def inside(jaxpr):
        inner = (j for eqn in jaxpr.eqns for j in jex.jaxprs_in_params(eqn.params))
        return {eqn.primitive.name for eqn in jaxpr.eqns}.union(*map(inside, inner))

    return inside(jax.make_jaxpr(run)(arrays).jaxpr)


def having(primitive):
    return [name for name in CASES if primitive in primitives(name)]


def is_noticed(primitive, remove):
    """Whether `remove()` changes how a case that has the primitive is seen. Where none has it, it
    is another spelling of one that is there.
    """
    cases = having(primitive)
    if not cases:
        others = [other for other in SPELLINGS[primitive] if having(other)]
        return any(PRIMITIVES[primitive] is PRIMITIVES[other] for other in others)
    whole = {name: seen_with_all_rules(name) for name in cases}
    remove()
    return any(seen(name) != whole[name] for name in cases)


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_a_rule_that_is_missing_is_noticed(primitive, monkeypatch):
    assert is_noticed(primitive, lambda: monkeypatch.delitem(PRIMITIVES, primitive))


@pytest.mark.parametrize("primitive", VIEWS)
def test_a_view_that_is_missing_is_noticed(primitive, monkeypatch):
    none = lambda *_: None  # noqa: E731
    assert is_noticed(primitive, lambda: monkeypatch.setitem(VIEWS, primitive, none))
