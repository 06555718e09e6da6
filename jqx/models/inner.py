# SPDX-License-Identifier: Apache-2.0
"""What happens in a block, on parameters that are arrays: attention, then an MLP or experts, with
norms where LAYOUTS says.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Float32

from jqx.transforms import fake_kv

from .compute import Compute
from .experts import Routed, all_experts, beside, residual, routed
from .layers import Inside, Params, module, settle, wide
from .mlp import mlp
from .spec import LAYOUTS, Attention, BlockKind, Experts, Mlp, ModelSpec

Attend = Callable[..., tuple[Array, Any]]


class Front(NamedTuple):
    """A block with experts before they are run: the states their sums are added to, what experts
    read, and what is added to their sums first, if anything.
    """

    h: Float[Array, "b t k"]
    given: Routed
    beside: Float[Array, "b t k"] | None


def through(
    kind: BlockKind, inside: Inside, h: Float[Array, "b t k"], attend: Attend
) -> tuple[Float[Array, "b t k"], Any]:
    """The states after a block, and what `attend` keeps besides its result."""
    if isinstance(kind.mlp, Experts):
        front, kept = before_experts(kind, inside, h, attend)
        total = all_experts(kind.mlp, inside, front.given)
        return after_experts(kind, inside, front, total), kept
    names, row = inside.names, LAYOUTS[kind.layout]
    attention = partial(_attention, kind, inside, attend)
    if row.parallel:
        x = inside.norm(kind.norm, names.input_norm, h)
        other = inside.norm(kind.norm, names.mlp_norm, h) if row.own else x
        y, kept = attention(x)
        both = _sum(y, _mlp(kind, inside, other), inside.compute)
        return _added(kind, h, both, inside.compute), kept
    h, kept = _attended(kind, inside, h, attend)
    if kind.mlp is not None:
        ends = names.mlp_norm, names.mlp_end
        h, _ = _step(kind, inside, ends, h, lambda x: (_mlp(kind, inside, x), None))
    return h, kept


def before_experts(
    kind: BlockKind, inside: Inside, h: Float[Array, "b t k"], attend: Attend
) -> tuple[Front, Any]:
    """A block up to its experts, and what `attend` keeps."""
    assert isinstance(kind.mlp, Experts)
    names, row = inside.names, LAYOUTS[kind.layout]
    after, kept = _attended(kind, inside, h, attend)
    x = inside.norm(kind.norm, names.mlp_norm, h if row.aside else after)
    if row.aside:
        own = inside.norm(kind.norm, names.residual_norm, after)
        after = _sum(after, residual(kind.mlp, inside, own), inside.compute)
    return Front(after, routed(kind.mlp, inside, x), beside(kind.mlp, inside, x)), kept


def after_experts(
    kind: BlockKind, inside: Inside, front: Front, total: Float32[Array, "rows k"]
) -> Float[Array, "b t k"]:
    """The states after the block; `total`: the sums of what experts made of every token."""
    y = settle(total, inside.compute).reshape(front.h.shape)
    if front.beside is not None:
        y = _sum(y, front.beside, inside.compute)
    return _ended(kind, inside, inside.names.mlp_end, front.h, y)


def _attended(kind: BlockKind, inside: Inside, h: Array, attend: Attend) -> tuple[Array, Any]:
    """The states after attention, and what it keeps."""
    if kind.attention is None:
        return h, None
    ends = inside.names.input_norm, inside.names.attention_end
    return _step(kind, inside, ends, h, partial(_attention, kind, inside, attend))


def _step(
    kind: BlockKind, inside: Inside, norms: tuple[str, str], h: Array, run: Attend
) -> tuple[Array, Any]:
    """The states after attention or an MLP, and what it keeps; `norms` are those before and after
    it.
    """
    before, after = norms
    x = inside.norm(kind.norm, before, h) if LAYOUTS[kind.layout].before else h
    y, kept = run(x)
    return _ended(kind, inside, after, x if kind.normed_residual else h, y), kept


def _ended(kind: BlockKind, inside: Inside, norm: str, h: Array, y: Array) -> Array:
    row = LAYOUTS[kind.layout]
    y = inside.norm(kind.norm, norm, y) if row.after else y
    h = _added(kind, h, y, inside.compute)
    return inside.norm(kind.norm, norm, h) if row.summed else h


def _added(kind: BlockKind, h: Array, y: Array, compute: Compute) -> Array:
    if kind.residual_scale != 1.0:
        y = settle(wide(y) * kind.residual_scale, compute)
    return _sum(h, y, compute)


def _sum(a: Array, b: Array, compute: Compute) -> Array:
    return settle(wide(a) + wide(b), compute)


def _attention(kind: BlockKind, inside: Inside, attend: Attend, x: Array) -> tuple[Array, Any]:
    if isinstance(kind.attention, Attention):
        return attend(kind.attention, inside, x)
    return inside.linear(inside.names.replaced_attention, x), None


def _mlp(kind: BlockKind, inside: Inside, x: Array) -> Array:
    if isinstance(kind.mlp, Mlp):
        return mlp(kind.mlp, inside, x)
    return inside.linear(inside.names.replaced_mlp, x)


def settling(compute: Compute) -> Callable[[Array], Array]:
    """What is done to rounded inputs, keys and values: they are results of operations too."""
    return lambda x: settle(wide(x), compute)


def stored_kv(
    spec: ModelSpec, kind: BlockKind, params: Params, compute: Compute
) -> dict[str, Callable[[Array], Array]]:
    """What is done to keys and values, by the names they are kept under: rounded as the cache
    stores them.
    """
    names, cache = spec.names, spec.kv_cache
    if cache is None or not isinstance(kind.attention, Attention):
        return {}

    def stored(name: str, letter: str) -> Callable[[Array], Array]:
        beside = module(params, name, {})
        scale, bias = beside.get(f"{letter}_scale"), beside.get(f"{letter}_bias")
        return lambda x: settling(compute)(fake_kv(x, cache, scale, bias))

    return {names.kept_k: stored(names.k, "k"), names.kept_v: stored(names.v, "v")}
