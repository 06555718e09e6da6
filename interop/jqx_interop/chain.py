# SPDX-License-Identifier: Apache-2.0
"""Rows of token ids on their way through a chain of blocks: what calibration and evaluation share.

A call takes a fixed number of rows, so all calls of one kind of block run one compiled program; the
last is filled up by repeating a row.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jqx.models import Compute, ModelSpec, embed, embed_tensors
from jqx.tensors.paths import unflatten

from .device import callers
from .hidden import HiddenStates

ROWS_PER_CALL = 512
"""Tokens in one call: fewer leave a CPU's matrix products short; with more, temporaries outgrow its
caches and what its allocator keeps, which cost more than longer products gain (measured).
"""


def rows_per_call(n: int, tokens: int, batch_size: int) -> int:
    """How many of `n` rows of `tokens` ids one call takes: `batch_size`, or chosen where 0. All
    calls but the last are full.
    """
    rows = batch_size or max(1, ROWS_PER_CALL // tokens)
    return -(-n // -(-n // min(rows, n)))


def used_rows(
    spec: ModelSpec, read: Callable[[str], np.ndarray], ids: Int[np.ndarray, "n t"]
) -> tuple[Int[np.ndarray, "n t"], dict[str, Any]]:
    """`ids` as rows of a table of embeddings that has only those that occur, and the parameters of
    `embed` with it; no others are read.
    """
    used, inverse = np.unique(ids, return_inverse=True)
    table, *others = embed_tensors(spec)
    leaves = {table: jnp.asarray(read(table)[used])}
    params = unflatten(leaves | {name: jnp.asarray(read(name)) for name in others})
    return inverse.reshape(ids.shape).astype(np.int32), params


def embed_rows(
    spec: ModelSpec,
    read: Callable[[str], np.ndarray],
    ids: Int[np.ndarray, "n t"],
    hidden: HiddenStates,
    compute: Compute,
) -> None:
    """Put the embeddings of `ids` into `hidden`, which is then before block 0. `read` gives tensors
    by name.
    """
    rows, params = used_rows(spec, read, ids)
    hidden.block = -1
    for i, part in enumerate(hidden.batches(rows)):
        hidden.put(i, embed(spec, params, jnp.asarray(part), compute))
    hidden.turn()


def side_by_side(
    call: Callable[[int], Any], count: int, workers: int | None = None
) -> Iterator[Any]:
    """The results of `call(0)` to `call(count - 1)`, in order, `workers` at a time (None: as many
    as suit the device).

    The first runs alone, since it compiles the program and makes the files. No more than a few are
    ahead of what is taken.
    """
    yield call(0)
    workers = callers() if workers is None else workers
    rest, ahead = range(1, count), 4 * workers
    with ThreadPoolExecutor(workers, thread_name_prefix="jqx-block") as pool:
        for start in range(0, len(rest), ahead):
            yield from pool.map(call, rest[start : start + ahead])
