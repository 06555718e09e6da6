# SPDX-License-Identifier: Apache-2.0
"""Texts going on: a batch of prompts is read in pieces of bounded size, then a token at a time.

A `Session` runs one compiled program per kind of block, shape of the piece and number of slots: one
for all single tokens where the text fits the slots it began with. Weights that are QTensors are
decoded inside the program of their block.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from .cache import Kept, Past, Slots, empty, grown, slots_for
from .compute import Compute
from .decoder import cached_block, embed, next_logits
from .layers import Params, module
from .layout import block_prefix, embed_tensors, head_tensors
from .sampling import Draw, next_tokens, step_keys
from .spec import BlockKind, ModelSpec

PIECES = {"chunks": 512, "batched": 4096}
"""Compute.attention -> tokens of prompts in one call: what is computed in it takes memory."""

SHORTEST = 32
"""Tokens of the shortest piece. All are powers of two, so that few programs are compiled."""


_FLOAT8 = (jnp.dtype("float8_e4m3fn"),)


class Session:
    """A batch of sequences read so far: what the blocks keep of them, and the states after their
    last tokens.
    """

    def __init__(self, spec: ModelSpec, params: Params, compute: Compute, most: int):
        """Nothing is read yet. `params` as for `forward`; no sequence will have more than `most`
        tokens.
        """
        self._spec, self._compute, self._most = spec, compute, most
        first, last = (_part(params, f(spec)) for f in (embed_tensors, head_tensors))
        self._embed = _bound(_embedding, first, spec, compute)
        self._head = _bound(_logits, last, spec, compute)
        self._draw = _bound(_drawing, last, spec, compute)
        self._blocks = [
            _bound(_kept_block, module(params, block_prefix(spec, i), {}), spec, compute, kind)
            for i, kind in enumerate(spec.blocks)
        ]

    def read(self, prompts: Sequence[Sequence[int]]) -> None:
        """Begin with these token ids, a sequence a row, none of them empty."""
        tokens = max(map(len, prompts))
        sizes = pieces(tokens, PIECES[self._compute.attention] // len(prompts))
        width = sum(sizes)
        ids = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[width - len(prompt) :] = prompt
        self._pads = jnp.asarray([width - len(prompt) for prompt in prompts], jnp.int32)
        self._last = self._most + width - tokens
        self._start = 0
        self._slots = slots_for(sizes[0], self._last)
        rows, kinds = len(prompts), self._spec.blocks
        self._kept = [empty(kind, rows, self._slots, self._compute) for kind in kinds]
        for size in sizes:
            self._run(ids[:, self._start : self._start + size])

    def add(self, ids: Int[Array | np.ndarray, "b"]) -> None:
        """One more token of every sequence."""
        self._run(ids)

    def logits(self) -> Float[Array, "b v"]:
        """Float32 logits of the next tokens."""
        return self._head(self._h)

    def tokens(self, draw: Draw, keys: Key[Array, "b"] | None) -> Iterator[Int[np.ndarray, "b"]]:
        """The next tokens of all sequences, and the next, for as long as they are asked for.

        `keys`: one for each sequence, as `sequence_keys` makes them; None where nothing is drawn.
        """
        step = 0
        while True:
            ids = self._draw(self._h, keys, np.int32(step), draw)
            yield np.asarray(ids)
            self.add(ids)
            step += 1

    def _run(self, ids: Any) -> None:
        """Read the tokens `ids`, [b, t] or [b]. Every operation here is a compiled one: others take
        as long as a block.
        """
        stop = self._start + (ids.shape[1] if ids.ndim > 1 else 1)
        if stop > self._slots:
            self._grow(slots_for(stop, self._last))
        slots = Slots(jax.device_put(np.int32(self._start)), self._pads)
        h = self._embed(ids, slots)
        for i, run in enumerate(self._blocks):
            h, self._kept[i] = run(h, slots, self._kept[i])
        self._h, self._start = _last(h) if ids.ndim > 1 else h, stop

    def _grow(self, slots: int) -> None:
        self._slots = slots
        self._kept = [None if kept is None else grown(kept, slots) for kept in self._kept]


@jax.jit
def _last(h: Float[Array, "b t k"]) -> Float[Array, "b 1 k"]:
    return h[:, -1:]


def pieces(tokens: int, most: int) -> list[int]:
    """Sizes of the pieces in which `tokens` tokens are read, padding included: powers of two up to
    `most`, the first one the smallest.
    """
    most = max(SHORTEST, 1 << (max(1, most).bit_length() - 1))
    whole, rest = divmod(tokens, most)
    first = [max(SHORTEST, 1 << (rest - 1).bit_length())] if rest else []
    return first + whole * [most]


def _part(params: Params, tensors: Iterable[str]) -> dict[str, Any]:
    """The tree that holds only these tensors."""
    tree: dict[str, Any] = {}
    for name in tensors:
        path, _, leaf = name.rpartition(".")
        node = tree
        for part in path.split("."):
            node = node.setdefault(part, {})
        node[leaf] = module(params, path)[leaf]
    return tree


def _bound(make: Callable[..., Any], params: Params, *static: Any) -> Callable[..., Any]:
    """The program that `make` gives for the structure of `params`, called with their arrays.

    The tree is taken apart once: it is large, and looked at again in every call of a jitted
    function.
    """
    leaves, structure = jax.tree.flatten(params)
    leaves = [_as_bytes(leaf) if leaf.dtype in _FLOAT8 else leaf for leaf in leaves]
    program = make(structure, *static)
    return lambda *args: program(leaves, *args)


def _as_bytes(codes: Array) -> Array:
    """The same memory as uint8, which QTensors take as well: XLA on a CPU would first make float16
    of float8, all of it, to read a part.
    """
    if codes.devices() != {jax.devices("cpu")[0]}:
        return codes
    return jax.device_put(np.asarray(codes).view(np.uint8), may_alias=True)


@cache
def _embedding(structure: Any, spec: ModelSpec, compute: Compute) -> Callable[..., Any]:
    def run(leaves: Any, ids: Array, slots: Slots) -> Array:
        ids = ids.reshape(len(ids), -1)
        at = slots.positions(ids.shape[1])
        return embed(spec, structure.unflatten(leaves), ids, compute, at)

    return jax.jit(run)


@cache
def _kept_block(
    structure: Any, spec: ModelSpec, compute: Compute, kind: BlockKind
) -> Callable[..., Any]:
    def run(leaves: Any, h: Array, slots: Slots, kept: Kept | None) -> tuple[Array, Kept | None]:
        return cached_block(spec, kind, structure.unflatten(leaves), h, Past(kept, slots), compute)

    return jax.jit(run, donate_argnums=3)


@cache
def _logits(structure: Any, spec: ModelSpec, compute: Compute) -> Callable[..., Any]:
    return jax.jit(lambda leaves, h: next_logits(spec, structure.unflatten(leaves), h, compute))


@cache
def _drawing(structure: Any, spec: ModelSpec, compute: Compute) -> Callable[..., Any]:
    def run(leaves: Any, h: Array, keys: Any, step: Array, draw: Draw) -> Array:
        logits = next_logits(spec, structure.unflatten(leaves), h, compute)
        return next_tokens(logits, None if keys is None else step_keys(keys, step), draw)

    return jax.jit(run)
