# SPDX-License-Identifier: Apache-2.0
"""How long a function takes on the device that is here."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

CALLS, ROUNDS = 10, 5
"""Calls that are timed together, and how often that is done; the shortest time counts."""

READ = 1 << 28
"""Bytes that are read before any of them is read again: more than a cache holds."""


def copies_for(size: int, most: int = 16) -> int:
    """How many matrices of `size` bytes are as much as READ, at least two and `most` at most."""
    return min(max(READ // max(size, 1), 2), most)


def seconds(
    run: Callable[[Any], Any],
    arguments: Sequence[Any],
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds that `run` takes for one of `arguments`, all of which one program goes through: the
    time of a call is shared by them.
    """
    program = jax.jit(lambda each: [run(one) for one in each])
    program = program.lower(list(arguments)).compile()
    jax.block_until_ready(program(list(arguments)))
    best = float("inf")
    for _ in range(ROUNDS):
        start, result = clock(), None
        for _ in range(CALLS):
            result = program(list(arguments))
        jax.block_until_ready(result)
        best = min(best, clock() - start)
    return best / (CALLS * len(arguments))
