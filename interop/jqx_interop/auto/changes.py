# SPDX-License-Identifier: Apache-2.0
"""What the sums of the experts of a block become where all of them are quantized, for every
candidate: one expert in memory at a time.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from jqx.models import Experts
from jqx_interop.blocks import load_expert
from jqx_interop.experts import expert_linears
from jqx_interop.mixtures import pieces_of, rows_for
from jqx_interop.routed import IN_MEMORY, RoutedTokens, Sent

from .passes import Passes
from .scoring import EXPERTS, expert_changes, front_given


class Changes:
    """Those of block `i` in some calls; nothing where its experts choose nothing."""

    def __init__(self, passes: Passes, i: int, calls: Sequence[int], params: dict):
        """`params`: those of the block; large arrays lie in files in the folder of the task."""
        self._passes, self._i, self._calls = passes, i, calls
        self._names = [c.name for c in passes.task.candidates]
        self._tokens: RoutedTokens | None = None
        self._changes: dict[str, np.ndarray] = {}
        row = passes.program(i).kind.mlp
        if isinstance(row, Experts) and (EXPERTS,) in passes.groups_of(i).values():
            self._tokens = self._routed(row, params)
            self._find(self._tokens)

    def _routed(self, row: Experts, params: dict) -> RoutedTokens:
        """What experts read in all calls."""
        passes, calls = self._passes, self._calls
        shape = (len(calls), *passes.shape[1:])
        large = 4 * int(np.prod(shape)) * (len(self._names) + 1) > IN_MEMORY
        folder = passes.task.folder if large else None
        real = sum(int(passes.real(n).sum()) for n in calls)
        tokens = RoutedTokens(row, shape, real, passes.compute, folder)
        for at, n in enumerate(calls):
            h = jnp.asarray(passes.states.get(self._i, n))
            tokens.take(at, front_given(params, h, program=passes.program(self._i)))
        for number, name in enumerate(self._names):
            self._changes[name] = tokens.states(f"change-{number}", np.dtype(np.float32))
        return tokens

    def _find(self, tokens: RoutedTokens) -> None:
        own = expert_linears(self._passes.spec, self._i)
        for e, sent in enumerate(tokens.sent()):
            if not len(sent.tokens):
                continue
            params = load_expert(self._passes.job, self._i, e, self._passes.compute)
            linears = {
                c.name: self._passes.of_expert(c, own[e]) for c in self._passes.task.candidates
            }
            for at, count in pieces_of(len(sent.tokens)):
                part = Sent(sent.tokens[at : at + count], sent.weights[at : at + count])
                found = self._of_piece(params, linears, tokens.rows(part.tokens), part)
                for name, change in found.items():
                    self._changes[name][part.tokens] += np.asarray(change)[:count]

    def _of_piece(self, params: dict, linears: dict, rows: np.ndarray, part: Sent) -> dict:
        """What becomes different in what one expert adds to the sums of some of its tokens."""
        count = len(part.tokens)
        fill = rows_for(count) - count
        x, weights = np.pad(rows, ((0, fill), (0, 0))), np.pad(part.weights, (0, fill))
        return expert_changes(
            params,
            linears,
            jnp.asarray(x),
            jnp.asarray(weights),
            jnp.arange(len(x)) < count,
            program=self._passes.program(self._i),
        )

    def of(self, at: int) -> dict[str, Float32[jax.Array, "rows k"]] | None:
        """Those of the call number `at`, by candidate."""
        if self._tokens is None:
            return None
        return {n: jnp.asarray(a[self._tokens.at(at)]) for n, a in self._changes.items()}

    def close(self) -> None:
        """Remove the files."""
        if self._tokens is not None:
            self._tokens.close()
