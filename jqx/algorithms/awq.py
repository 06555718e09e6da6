# SPDX-License-Identifier: Apache-2.0
"""AWQ: input channels are scaled so that those that matter are rounded finely, and blocks clipped.

    s = x^alpha / w^(1 - alpha)       x: mean magnitude of an input channel, w: of a weight column
    y = (x / s) Q(W s)^T              alpha: that of a grid with the smallest error of the outputs

(Lin et al. 2023, arXiv 2306.00978; the grids and roundings of ModelOpt 0.47.) Errors come from
second moments, so a candidate costs one product whatever the number of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from jqx.config import Algorithm
from jqx.errors import InputError
from jqx.formats import Format, block_amax, fake_quantize
from jqx_kernels.bits import divide, round_to
from jqx_kernels.blocks import from_blocks, spread, to_blocks

from .linear import InputStats, Linear, known, smoothed, tied
from .power import power
from .quadratic import block_gram, gram, least, output_error, scaled
from .simulate import simulate

TINY = jnp.finfo(jnp.float32).tiny
LEAST, MOST = 1e-4, 1e4  # of a scale
TOGETHER = 1 << 25  # numbers of candidates that are held together
SWEEPS = 2  # more gain nothing that counts
HIGHEST = lax.Precision.HIGHEST


@dataclass(frozen=True, kw_only=True, slots=True)
class AwqLite:
    """`alpha_step`: distance of the exponents that are tried, from 0 to 1."""

    alpha_step: float = 0.1

    def __post_init__(self) -> None:
        """Raise InputError for a step that leaves nothing to try."""
        if not 0 < self.alpha_step <= 1:
            raise InputError(f"alpha_step is {self.alpha_step}; give a number in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class AwqClip:
    """The shares of its largest magnitude at which a block may be clipped: from `min_clip_ratio` to
    1 in steps of `shrink_step`.
    """

    min_clip_ratio: float = 0.5
    shrink_step: float = 0.05

    def __post_init__(self) -> None:
        """Raise InputError for shares out of range."""
        if not 0 < self.min_clip_ratio <= 1:
            raise InputError(f"min_clip_ratio is {self.min_clip_ratio}; give a number in (0, 1]")
        if not 0 < self.shrink_step <= 1:
            raise InputError(f"shrink_step is {self.shrink_step}; give a number in (0, 1]")

    @property
    def ratios(self) -> np.ndarray:
        """The shares in ascending order, 1 included."""
        count = int(np.ceil((1 - self.min_clip_ratio) / self.shrink_step - 1e-9))
        found = self.min_clip_ratio + self.shrink_step * np.arange(count + 1)
        return np.minimum(found, 1.0).astype(np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class AwqFull:
    """The parameters of both."""

    alpha_step: float = 0.1
    min_clip_ratio: float = 0.5
    shrink_step: float = 0.05

    def __post_init__(self) -> None:
        """Raise InputError as both do."""
        _ = self.lite, self.clip

    @property
    def lite(self) -> AwqLite:
        """Those of the first part."""
        return AwqLite(alpha_step=self.alpha_step)

    @property
    def clip(self) -> AwqClip:
        """Those of the second."""
        return AwqClip(min_clip_ratio=self.min_clip_ratio, shrink_step=self.shrink_step)


def lite_needs(fmt: Format, params: AwqLite | AwqFull) -> tuple[str, ...]:
    """Mean and largest magnitudes of channels, and all second moments."""
    return ("channel_mean", "channel_amax", "gram")


def clip_needs(fmt: Format, params: AwqClip) -> tuple[str, ...]:
    """All second moments, where there are blocks to clip."""
    return () if fmt.block[1] is None or fmt.block[0] != 1 else ("gram",)


def awq_lite(linear: Linear, fmt: Format, stats: InputStats, params: AwqLite) -> Linear:
    """The input scales whose alpha gives the smallest error of the outputs, the first of equals.

    Inputs are not rounded in the search. Raises InputError for statistics that are not there.
    """
    x = tied(known(stats, "channel_mean", "awq_lite"), stats, jnp.mean)
    known(stats, "channel_amax", "awq_lite")
    w = tied(column_magnitudes(linear.weight, fmt), stats, jnp.mean)
    count = int(np.ceil((1.0 + params.alpha_step) / params.alpha_step - 1e-9))
    alphas = jnp.asarray(np.arange(count) * params.alpha_step, jnp.float32)

    def loss(alpha: Float32[Array, ""]) -> Float32[Array, ""]:
        return output_error(_error(linear.weight, scales_at(x, w, alpha), fmt), stats, "awq_lite")

    losses = lax.map(loss, alphas)
    best = least(losses)
    p = divide(jnp.ones_like(x), scales_at(x, w, alphas[best]))
    done = smoothed(linear, p, stats["channel_amax"])
    return done.told(alpha=alphas[best], loss=losses[best], losses=losses)


def awq_clip(linear: Linear, fmt: Format, stats: InputStats, params: AwqClip) -> Linear:
    """The share of its largest magnitude at which every block is clipped; with a scale of the whole
    tensor one share for all of it. Formats without blocks stay as they are.

    ModelOpt takes the share that is best for the block's own part of the outputs on a few tokens;
    from that of all tokens on, blocks are improved in turn by the error of the whole outputs, with
    the weight as it will be stored.
    """
    if fmt.block[1] is None or fmt.block[0] != 1:
        return linear
    ratios = jnp.asarray(params.ratios)
    if fmt.scale.name != "float32":
        return _clip_tensor(linear, fmt, stats, ratios)
    moments = gram(stats, "awq_clip")
    near = block_gram({"gram": moments}, fmt.block[1], "awq_clip")
    n, k = linear.weight.shape
    rows = _rows_together(n, k * len(params.ratios))

    def part(w: Float[Array, "rows k"]) -> tuple[Array, Array]:
        return _clip_rows(w, fmt, ratios, (moments, near))

    amax, chosen = lax.map(part, linear.weight.reshape(n // rows, rows, k))
    amax, chosen = amax.reshape(n, -1), chosen.reshape(n, -1)
    return linear._replace(amax=amax).told(ratio=jnp.mean(chosen))


def _rows_together(n: int, each: int) -> int:
    """How many of `n` rows, of which every one takes `each` numbers, are looked at together."""
    most = max(1, TOGETHER // each)
    return max(rows for rows in range(1, n + 1) if n % rows == 0 and rows <= max(most, 1))


def _clip_rows(
    w: Float[Array, "rows k"],
    fmt: Format,
    ratios: Float32[Array, "r"],
    moments: tuple[Float32[Array, "k k"], Float32[Array, "blocks b b"]],
) -> tuple[Float32[Array, "rows blocks"], Float32[Array, "rows blocks"]]:
    """What the scales of some rows reach, and the shares that it is."""
    amax, wide = block_amax(w, fmt.block), w.astype(jnp.float32)

    def simulated(chosen: Float32[Array, "n blocks"]) -> Float32[Array, "n k"]:
        return (simulate(w, fmt, _clipped(amax, chosen, w)) - w).astype(jnp.float32)

    def stored(chosen: Float32[Array, "n blocks"]) -> Float32[Array, "n k"]:
        return fake_quantize(wide, fmt, _clipped(amax, chosen, w)) - wide

    def sweep(_: Array, chosen: Float32[Array, "n blocks"]) -> Float32[Array, "n blocks"]:
        return _refined(chosen, stored, ratios, moments)

    alone = _each_alone(amax, simulated, ratios, moments[1])
    chosen = lax.fori_loop(0, SWEEPS, sweep, alone)
    return _clipped(amax, chosen, w), chosen


_Error = Callable[[Float32[Array, "n blocks"]], Float32[Array, "n k"]]


def _each_alone(
    amax: Float32[Array, "n blocks"],
    error: _Error,
    ratios: Float32[Array, "r"],
    near: Float32[Array, "blocks b b"],
) -> Float32[Array, "n blocks"]:
    """The share of every block by the error of its own part of the outputs, the smallest of equals:
    what ModelOpt chooses.
    """

    def step(best: tuple[Array, Array], ratio: Array) -> tuple[tuple[Array, Array], None]:
        lowest, chosen = best
        d = error(jnp.full_like(amax, ratio)).reshape(*amax.shape, -1)
        loss = jnp.sum(_within(d, near) * d, axis=-1)
        better = loss < lowest
        return (jnp.where(better, loss, lowest), jnp.where(better, ratio, chosen)), None

    start = (jnp.full(amax.shape, jnp.inf, jnp.float32), jnp.ones(amax.shape, jnp.float32))
    return lax.scan(step, start, ratios)[0][1]


def _refined(
    chosen: Float32[Array, "n blocks"],
    error: _Error,
    ratios: Float32[Array, "r"],
    moments: tuple[Float32[Array, "k k"], Float32[Array, "blocks b b"]],
) -> Float32[Array, "n blocks"]:
    """`chosen` after every block took, one after the other, the share that is best with the others
    as they are. The error of the outputs never grows.
    """
    whole, near = moments
    n, blocks = chosen.shape
    every = jax.vmap(lambda r: error(jnp.full_like(chosen, r)))(ratios)
    every = every.reshape(ratios.shape[0], n, blocks, -1)
    own = jnp.sum(_within(every, near) * every, axis=-1)  # [r, n, blocks]

    def one(j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        d, picked = state
        columns = lax.dynamic_slice_in_dim(whole, j * near.shape[1], near.shape[1], axis=1)
        mine = lax.dynamic_index_in_dim(d, j, axis=1, keepdims=False)
        others = jnp.matmul(d.reshape(n, -1), columns, precision=HIGHEST)
        others = others - jnp.matmul(mine, near[j], precision=HIGHEST)
        candidates = lax.dynamic_index_in_dim(every, j, axis=2, keepdims=False)  # [r, n, b]
        loss = own[:, :, j] + 2 * jnp.sum(candidates * others[None], axis=-1)
        best = least(loss)
        new = jnp.take_along_axis(candidates, best[None, :, None], axis=0)[0]
        return d.at[:, j].set(new), picked.at[:, j].set(ratios[best])

    d = error(chosen).reshape(n, blocks, -1)
    return lax.fori_loop(0, blocks, one, (d, chosen))[1]


def _within(d: Float32[Array, "... blocks b"], near: Float32[Array, "blocks b b"]) -> Array:
    """Every block times its own second moments."""
    return jnp.einsum("...kb,kbc->...kc", d, near, precision=HIGHEST)


def awq_full(linear: Linear, fmt: Format, stats: InputStats, params: AwqFull) -> Linear:
    """Scaling, then clipping of the scaled weight."""
    done = awq_lite(linear, fmt, stats, params.lite)
    assert done.pre_quant_scale is not None
    p = done.pre_quant_scale.astype(jnp.float32)
    if linear.pre_quant_scale is not None:
        p = divide(p, linear.pre_quant_scale.astype(jnp.float32))
    seen = scaled(stats, p)
    if fmt.block[1] is not None:
        # clipping looks at the inputs once more, as they come from the rounded factor
        met = round_to(seen["channel_amax"], done.weight.dtype)
        done = done._replace(input_amax=jnp.max(met))
    return awq_clip(done, fmt, seen, params.clip)


def full_parts(params: AwqFull) -> tuple[Algorithm, ...]:
    """Both steps by themselves."""
    clip = {"min_clip_ratio": params.min_clip_ratio, "shrink_step": params.shrink_step}
    lite = Algorithm.of("awq_lite", alpha_step=params.alpha_step)
    return lite, Algorithm.of("awq_clip", **clip)


def column_magnitudes(w: Float[Array, "n k"], fmt: Format) -> Float32[Array, "k"]:
    """The mean over rows of |w| / (largest magnitude of the block it is in), as ModelOpt rounds:
    every quotient, and the mean, to the dtype of `w`.
    """
    rows, columns = fmt.block
    block = (1, columns) if rows == 1 else (1, None)
    tiny = jnp.float32(jnp.finfo(w.dtype).tiny)
    wide = jnp.abs(to_blocks(w.astype(jnp.float32), block))
    largest = round_to(block_amax(w, block) + tiny, w.dtype)
    share = from_blocks(round_to(divide(wide, spread(largest)), w.dtype), w.shape)
    return round_to(divide(jnp.sum(share, axis=0), float(w.shape[0])), w.dtype)


def scales_at(
    x: Float32[Array, "k"], w: Float32[Array, "k"], alpha: Float32[Array, ""]
) -> Float32[Array, "k"]:
    """The scales of weight columns for one alpha, normalised so that the largest and the smallest
    are as far from 1.
    """
    s = divide(power(x, alpha), power(w, 1 - alpha) + TINY)
    s = jnp.clip(s, jnp.float32(LEAST), jnp.float32(MOST))
    return divide(s, jnp.sqrt(jnp.max(s) * jnp.min(s)))


def _error(w: Float[Array, "n k"], s: Float32[Array, "k"], fmt: Format) -> Float32[Array, "n k"]:
    """How far the scaled and rounded weight is off once its inputs are scaled back."""
    wide = w.astype(jnp.float32)
    up = (wide * round_to(s, w.dtype)[None, :]).astype(w.dtype)
    down = round_to(divide(jnp.ones_like(s), s), w.dtype)
    return simulate(up, fmt).astype(jnp.float32) * down[None, :] - wide


def _clipped(
    amax: Float32[Array, "..."], ratio: Float32[Array, "..."], w: Float[Array, "n k"]
) -> Float32[Array, "..."]:
    return round_to(amax * ratio, w.dtype)


def _clip_tensor(
    linear: Linear, fmt: Format, stats: InputStats, ratios: Float32[Array, "r"]
) -> Linear:
    """One share for the scale of the whole tensor."""
    w = linear.weight
    whole = jnp.max(block_amax(w, fmt.block)) if linear.tensor_amax is None else linear.tensor_amax

    def loss(ratio: Float32[Array, ""]) -> Float32[Array, ""]:
        error = simulate(w, fmt, _clipped(whole, ratio, w)) - w
        return output_error(error.astype(jnp.float32), stats, "awq_clip")

    ratio = ratios[least(jax.lax.map(loss, ratios))]
    return linear._replace(tensor_amax=_clipped(whole, ratio, w)).told(ratio=ratio)
