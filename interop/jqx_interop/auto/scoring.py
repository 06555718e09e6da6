# SPDX-License-Identifier: Apache-2.0
"""Scores of one block: how much the loss would change if a linear took a candidate.

    score = sum of (dL/dY * D)^2        Y = x W^T the outputs of the linear, D = Q(x) Q(W)^T - Y

over all outputs, with the gradient of the loss of the batch they are in (the mean of the tokens'
cross entropies), the rest of the model as it is. Q is what ModelOpt simulates, which differs from
what it stores by a rounding: FP8 scores up to 15 % otherwise. Products are clipped to 1e10.
(ModelOpt 0.47, auto_quantize with method "gradient".)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jqx.algorithms import Linear
from jqx.algorithms.simulate import simulate
from jqx.config import INPUT_FORMATS
from jqx.formats import Format, find_format
from jqx.models import BlockKind, Compute, ModelSpec, block, head
from jqx.transforms import Use, observe, probe, probes

LIMIT = 1e10


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "pre_quant_scale", "input_amax"],
    meta_fields=["input_format"],
)
@dataclass(frozen=True)
class Simulated:
    """A linear as ModelOpt simulates it: its rounded weight, what inputs are multiplied by, the
    largest magnitude that a scale of them reaches, and their format.
    """

    weight: Float[Array, "n k"]
    pre_quant_scale: Float[Array, "k"] | None
    input_amax: Float32[Array, ""] | None
    input_format: str | None

    @classmethod
    def of(cls, linear: Linear, fmt: Format, input_format: str | None) -> "Simulated":
        """That of a linear before its codes, in the format `fmt`."""
        weight = simulate(linear.weight, fmt, linear.amax, linear.tensor_amax)
        return cls(weight, linear.pre_quant_scale, linear.input_amax, input_format)

    def inputs(self, x: Float[Array, "... k"]) -> Float[Array, "... k"]:
        """`x`, in the dtype of the model, as the linear reads it."""
        if self.pre_quant_scale is not None:
            x = x * jnp.broadcast_to(self.pre_quant_scale, x.shape)
        if self.input_format is None:
            return x
        row = INPUT_FORMATS[self.input_format]
        fmt, flat = find_format(row.format), x.reshape(-1, x.shape[-1])
        bound = self.input_amax if row.bound is not None else None
        amax = (None, bound) if fmt.tensor_bound is not None else (bound, None)
        return simulate(flat, fmt, *amax).reshape(x.shape)


Linears = Mapping[str, Mapping[str, Simulated]]
"""Candidate -> linear, by its name in the block -> what it would be."""


@dataclass(frozen=True, slots=True)
class Program:
    """What one compiled program depends on."""

    spec: ModelSpec
    kind: BlockKind
    compute: Compute


@partial(jax.jit, static_argnames=("program",))
def run_block(params: Any, h: Float[Array, "b t k"], *, program: Program) -> Float[Array, "b t k"]:
    """The states after a block."""
    return _block(program, params, h)


def _block(program: Program, params: Any, h: Array) -> Array:
    positions = jnp.broadcast_to(jnp.arange(h.shape[1], dtype=jnp.int32)[None, :], h.shape[:2])
    return block(program.spec, program.kind, params, h, positions, program.compute)


@partial(jax.jit, static_argnames=("program",))
def block_scores(
    params: Any,
    linears: Linears,
    h: Float[Array, "b t k"],
    g: Float[Array, "b t k"],
    *,
    program: Program,
) -> tuple[Float[Array, "b t k"], dict[str, dict[str, Float32[Array, ""]]]]:
    """The gradient to the states before a block, `g` being that to the states after it, and the
    scores by candidate and linear.
    """
    run = partial(_block, program)
    weights = {f"{path}.weight" for row in linears.values() for path in row}
    added = probes(run, params, h, paths=weights)
    _, back = jax.vjp(lambda added, h: probe(run)(params, added, h), added, h)
    to_outputs, to_states = back(g.astype(h.dtype))

    def inputs(use: Use, x: Array) -> Array | None:
        return x if use.op == "dot" and use.path in weights else None

    _, met = observe(run, inputs, merge=lambda a, b: a)(params, h)
    found = {
        name: {
            path: _score(linear, _leaf(program, params, path), met[f"{path}.weight"], gradient)
            for path, linear in row.items()
            for gradient in to_outputs[f"{path}.weight"]
        }
        for name, row in linears.items()
    }
    return to_states, found


def _leaf(program: Program, params: Any, path: str) -> Float[Array, "n k"]:
    for part in path.split("."):
        params = params[part]
    return params["weight"].T if program.kind.transposed else params["weight"]


def _score(linear: Simulated, w: Array, x: Array, gradient: Array) -> Float32[Array, ""]:
    def outputs(x: Array, w: Array) -> Float32[Array, "... n"]:
        wide = x.astype(jnp.float32), w.astype(jnp.float32)
        return jnp.einsum("...k,nk->...n", *wide, precision=jax.lax.Precision.HIGHEST)

    rounded = linear.inputs(x.astype(linear.weight.dtype))
    change = outputs(rounded, linear.weight) - outputs(x, w)
    product = jnp.clip(gradient.reshape(change.shape).astype(jnp.float32) * change, -LIMIT, LIMIT)
    return jnp.sum(jnp.square(product))


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
        logits = head(program.spec, params, h[None], program.compute)[0]
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]
        return jnp.sum(jnp.where(share > 0, entropy, 0) * share)

    value, gradient = jax.value_and_grad(loss)(h)
    return gradient, value
