# SPDX-License-Identifier: Apache-2.0
"""Stored stacks for rows in groups, and what a grouped product is to be."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from matmul_cases import DEVICES, FORMATS, check_sum, decoded, spec, storage_of, stored

from jqx_kernels.grouped_matmul import grouped_matmul

PALLAS = ("triton", "tpu")


def members(name, experts, n, k):
    """The stored matrices of a stack, one by one."""
    return [stored(name, n, k, seed=10 + e) for e in range(experts)]


def stacked(matrices):
    return jax.tree.map(lambda *a: jnp.stack(a), *matrices)


def integers(*sizes):
    return jnp.asarray(sizes, jnp.int32)


def grouped(name, row, weight_dtype="bfloat16", **more):
    """The product by one row of the table, Pallas kernels interpreted."""
    how = {
        "storage": storage_of(name),
        "weight_dtype": weight_dtype,
        "implementation": row,
        "device": DEVICES[row],
        "interpret": row in PALLAS,
    }
    return partial(grouped_matmul, **(how | more))


def rows_of_groups(sizes, m):
    """(number of the matrix, its rows) of every group, and the rows beyond them all."""
    ends = np.minimum(np.cumsum(sizes), m)
    groups = list(enumerate(map(slice, [0, *ends[:-1]], ends)))
    return groups, slice(int(ends[-1]), m)


def check_groups(y, x, matrices, sizes, dtype, back=False):
    """`y` is what the definition says: the rows of every group times the transpose of its matrix
    (`back`: times the matrix), zeros beyond; `matrices` are decoded, in NumPy.
    """
    x = np.asarray(x.astype(jnp.float32))
    groups, beyond = rows_of_groups(np.asarray(sizes), len(x))
    assert y.shape == (len(x), matrices[0].shape[1 if back else 0])
    for e, rows in groups:
        w = matrices[e].T if back else matrices[e]
        check_sum(y[rows], x[rows], w, jnp.dtype(dtype)) if rows.start < rows.stop else None
    assert not np.any(np.asarray(y[beyond]))


def all_decoded(matrices, name, dtype="bfloat16"):
    return [decoded(one, name, dtype) for one in matrices]


def stack_spec(name, experts, n, k):
    """The shapes of a stack."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((experts, *a.shape), a.dtype), spec(name, n, k)
    )


def grouped_cases(platform):
    """Name -> (function, abstract arguments) of products with every stored stack by the kernels of
    a platform, of few rows and of more.
    """
    row = {"cuda": "triton", "tpu": "tpu"}[platform]
    found = {}
    for name in FORMATS:
        f = grouped(name, row, interpret=False)
        for m in (4, 256):
            x = jax.ShapeDtypeStruct((m, 1024), jnp.bfloat16)
            sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
            found[f"grouped_matmul {name} of {m}"] = f, (x, *stack_spec(name, 8, 512, 1024), sizes)
    return found
