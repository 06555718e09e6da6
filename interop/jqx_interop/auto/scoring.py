# SPDX-License-Identifier: Apache-2.0
"""The programs that score linears: of one block, and of what comes after the last.

    gradient   sum of (g * D)^2              g the gradient of the loss to the outputs of a linear,
    fisher     (sum of g * D)^2 / 2          D = Q(x) Q(W)^T - x W^T
    kl         sum of KL(p || p') a token    p' of the model with one group of linears as Q has it

The experts of a block are one linear to the first two: its outputs are the sums of what all of them
make of a token, and D what those become where every expert is quantized.

The loss of "gradient" is the cross entropy of the text's next tokens, the mean of a batch (ModelOpt
0.47, auto_quantize). That of "fisher" is, with signs s drawn for every word v of the vocabulary at
every place,

    L = sum of s_v sqrt(p_v) log p_v, sqrt(p_v) held fixed      E[(sum of g * D)^2] = D^T F D

with the Fisher matrix F of the outputs, and D^T F D / 2 is the KL divergence that D causes, up to
third order (Amari 1998, Natural gradient works efficiently in learning). Words drawn by their
probability have the same expectation, and more variance. Sums are over WINDOW tokens: the sum of a
sequence has that expectation, and far too few draws; that of a token leaves out what errors of
neighbours share.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from jqx.auto.sensitivity import WINDOW, squares
from jqx.auto.simulated import Simulated, simulated
from jqx.auto.taps import Reduce, tap, tapped
from jqx.models import (
    BlockKind,
    Compute,
    ModelSpec,
    Routed,
    block,
    combine,
    expert,
    expert_sums,
    front,
    head,
)

Linears = Mapping[str, Mapping[str, Simulated]]
"""Candidate -> linear, by its name in the block -> what it would be."""

EXPERTS = "{}"
"""What all experts of a block are called where linears are by their names in it."""

Sums = Float32[Array, "rows k"]
Given = dict[str, dict[str, Float32[Array, "..."]]]
"""Linear, or EXPERTS -> candidate -> what it gives to a score."""


@dataclass(frozen=True, slots=True)
class Program:
    """What one compiled program depends on."""

    spec: ModelSpec
    kind: BlockKind
    compute: Compute
    method: str = "gradient"


@partial(jax.jit, static_argnames=("program",))
def run_block(
    params: Any,
    h: Float[Array, "b t k"],
    linears: Mapping[str, Simulated] | None = None,
    change: Sums | None = None,
    *,
    program: Program,
) -> Float[Array, "b t k"]:
    """The states after a block, some of whose linears are simulated; `change`: of the sums of its
    experts.
    """
    if change is not None:
        return _mixture(program, params, h, params, lambda total: total + change)
    run = partial(_block, program)
    if linears:
        run = simulated(run, _by_weight(linears))
    return run(params, h)


def _by_weight(linears: Mapping[str, Simulated]) -> dict[str, Simulated]:
    return {f"{name}.weight": row for name, row in linears.items()}


def _positions(h: Array) -> Int[Array, "b t"]:
    return jnp.broadcast_to(jnp.arange(h.shape[1], dtype=jnp.int32)[None, :], h.shape[:2])


def _block(program: Program, params: Any, h: Array) -> Array:
    return block(program.spec, program.kind, params, h, _positions(h), program.compute)


def _mixture(
    program: Program, params: Any, h: Array, stacks: Any, change: Callable[[Array], Array]
) -> Array:
    """`_block` of a block with experts, whose sums change; `stacks` has their parameters."""
    same = program.spec, program.kind
    found = front(*same, params, h, _positions(h), program.compute)
    total = change(expert_sums(*same, stacks, found.given, program.compute))
    return combine(*same, params, found, total, program.compute)


@partial(jax.jit, static_argnames=("program",))
def front_given(params: Any, h: Float[Array, "b t k"], *, program: Program) -> Routed:
    """What the experts of a block read of the states before it."""
    same = program.spec, program.kind
    return front(*same, params, h, _positions(h), program.compute).given


@partial(jax.jit, static_argnames=("program",))
def expert_changes(
    params: Any,
    linears: Linears,
    x: Float[Array, "r k"],
    weights: Float32[Array, "r"],
    real: Bool[Array, "r"],
    *,
    program: Program,
) -> dict[str, Float32[Array, "r k"]]:
    """What becomes different in what one expert adds to the sums of its rows, by candidate."""

    def run(params: Any, x: Array) -> Array:
        return expert(program.spec, program.kind, params, x, weights, real, program.compute)

    y = run(params, x)
    return {name: simulated(run, _by_weight(row))(params, x) - y for name, row in linears.items()}


def _products(rows: int, g: Array, change: Array) -> Float32[Array, "rows windows"]:
    product = g.astype(jnp.float32) * change.astype(jnp.float32)
    tokens = jnp.sum(product.reshape(rows, -1, product.shape[-1]), axis=-1)
    padded = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % WINDOW)))
    return jnp.sum(padded.reshape(rows, -1, WINDOW), axis=-1)


REDUCES: dict[str, Callable[[int, Array, Array], Array]] = {
    "gradient": lambda rows, g, change: squares(g, change),
    "fisher": _products,
}
"""Method -> what a linear gives, of the gradients and changes of so many sequences."""


@partial(jax.jit, static_argnames=("program",))
def block_scores(
    params: Any,
    linears: Linears,
    h: Float[Array, "b t k"],
    g: Float[Array, "b t k"],
    changes: Mapping[str, Sums] | None = None,
    *,
    program: Program,
) -> tuple[Float[Array, "b t k"], Given]:
    """The gradient to the states before a block, `g` being that to the states after it, and what
    its linears give, by linear and candidate. `changes`: of the sums of its experts, by candidate.
    """
    rows, paths = h.shape[0], dict.fromkeys(path for row in linears.values() for path in row)
    reduce = partial(REDUCES[program.method], rows)
    mine = {p: {name: row[p] for name, row in linears.items() if p in row} for p in paths}
    outputs = {f"{p}.weight": [row.outputs for row in found.values()] for p, found in mine.items()}
    zero = jax.eval_shape(reduce, h, h)
    taps = {p: [jnp.zeros(zero.shape, zero.dtype) for _ in row] for p, row in outputs.items()}
    own = [jnp.zeros(zero.shape, zero.dtype) for _ in changes or ()]
    sums = ExpertSums([*changes.values()]) if changes else None
    run = tapped(partial(tapped_block, program, reduce, sums), outputs, reduce)
    found, of_experts, to_states = gone_back(run, params, (taps, own), h, g)
    given = {p: dict(zip(row, found[f"{p}.weight"], strict=True)) for p, row in mine.items()}
    if changes:
        given[EXPERTS] = dict(zip(changes, of_experts, strict=True))
    return to_states, given


def gone_back(
    run: Callable[..., Array], params: Any, taps: tuple[Any, list[Array]], h: Array, g: Array
) -> tuple[Any, list[Array], Array]:
    """What comes to the taps of linears, to those of the sums of experts and to the states `h` of a
    `tapped_block`, of the gradient `g` to the states after it.
    """
    linears, own = taps
    stacks = params if own else {}  # beside those that are followed to their products
    _, back = jax.vjp(lambda taps, own, h: run(params, taps, h, (stacks, own)), linears, own, h)
    return back(g.astype(h.dtype))


class ExpertSums(NamedTuple):
    """The sums of the experts of a block: the `changes` that have taps, and what is added to them
    in the first place.
    """

    changes: list[Sums]
    mine: Sums | None = None


def tapped_block(
    program: Program,
    reduce: Reduce,
    sums: ExpertSums | None,
    params: Any,
    h: Array,
    given: tuple[Any, list[Array] | None],
) -> Array:
    """A block, with taps at the sums of its experts if there are `sums`: `given` are the parameters
    of experts, and a tap for every change, or None without.
    """
    if sums is None:
        return _block(program, params, h)
    stacks, taps = given

    def change(total: Array) -> Array:
        y = total if sums.mine is None else total + sums.mine
        return y if taps is None else tap(reduce, y, sums.changes, taps)

    return _mixture(program, params, h, stacks, change)


@partial(jax.jit, static_argnames=("program",))
def head_gradient(
    params: Any,
    h: Float[Array, "c k"],
    targets: Int[Array, "c"],
    share: Float32[Array, "c"],
    *,
    program: Program,
) -> tuple[Float[Array, "c k"], Float32[Array, ""]]:
    """The gradient of the loss to the states `h` after the last block, and the loss: the sum of the
    cross entropies of `targets`, each times its `share`.
    """

    def loss(h: Array) -> Array:
        return _entropy(_log_p(program, params, h), targets, share)

    value, gradient = jax.value_and_grad(loss)(h)
    return gradient, value


def _log_p(program: Program, params: Any, h: Array) -> Float[Array, "c v"]:
    return jax.nn.log_softmax(head(program.spec, params, h[None], program.compute)[0])


def _entropy(log_p: Array, targets: Array, share: Array) -> Float32[Array, ""]:
    """The sum of the cross entropies of `targets`, each times its share."""
    each = -jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.where(share > 0, each, 0) * share)


def signs(key: Array, shape: tuple[int, ...]) -> Float32[Array, "..."]:
    """Draws of 1 and -1."""
    return jax.random.rademacher(key, shape, jnp.float32)


@partial(jax.jit, static_argnames=("program",))
def head_draw(
    params: Any,
    h: Float[Array, "c k"],
    given: tuple[Int[Array, "c"], Float32[Array, "c"], Array],
    *,
    program: Program,
) -> tuple[Float[Array, "c k"], Float32[Array, ""]]:
    """A draw of the gradient of "fisher" to the states `h` after the last block, 0 where their
    share is, and the loss of `head_gradient`. `given`: its targets and shares, and a key.
    """
    targets, share, key = given

    def loss(h: Array) -> tuple[Array, Array]:
        log_p = _log_p(program, params, h)
        fixed = jax.lax.stop_gradient(jnp.exp(log_p / 2)) * signs(key, log_p.shape)
        drawn = jnp.sum(jnp.where(share > 0, jnp.sum(fixed * log_p, axis=-1), 0))
        return drawn, _entropy(log_p, targets, share)

    return jax.grad(loss, has_aux=True)(h)


@partial(jax.jit, static_argnames=("program",))
def head_divergence(
    params: Any,
    h: Float[Array, "c k"],
    changed: Float[Array, "s c k"],
    share: Float32[Array, "c"],
    *,
    program: Program,
) -> Float32[Array, "s"]:
    """The sum of KL(p || p') over tokens, each times its `share`: p is predicted by the states `h`
    after the last block, p' by each of `changed`.
    """
    log_mine = _log_p(program, params, h)

    def divergence(other: Array) -> Array:
        return _divergence(log_mine, _log_p(program, params, other), share)

    return jax.lax.map(divergence, changed)


@partial(jax.jit, static_argnames=("program",))
def divergence_gradient(
    params: Any,
    h: Float[Array, "c k"],
    changed: Float[Array, "c k"],
    share: Float32[Array, "c"],
    *,
    program: Program,
) -> tuple[Float[Array, "c k"], Float32[Array, ""]]:
    """The gradient to `changed` of what `head_divergence` finds of it, and that."""
    log_mine = _log_p(program, params, h)

    def divergence(changed: Array) -> Array:
        return _divergence(log_mine, _log_p(program, params, changed), share)

    value, gradient = jax.value_and_grad(divergence)(changed)
    return gradient, value


def _divergence(log_mine: Array, log_other: Array, share: Array) -> Float32[Array, ""]:
    """The sum of KL(p || p') over tokens, each times its share."""
    each = jnp.sum(jnp.exp(log_mine) * (log_mine - log_other), axis=-1)
    return jnp.sum(jnp.where(share > 0, each, 0) * share)
