# SPDX-License-Identifier: Apache-2.0
"""What is measured: an operation, how its matrix is stored, and how many rows meet it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jqx_kernels.matmul import MatmulRequest
from jqx_kernels.matmul import gpu as matmul_gpu
from jqx_kernels.matmul import tpu as matmul_tpu
from jqx_kernels.matmul.tiles import FEW, Tiles
from jqx_kernels.scaled_matmul import gpu as scaled_gpu
from jqx_kernels.scaled_matmul import tpu as scaled_tpu
from jqx_kernels.scaled_matmul.kinds import KINDS, ScaledRequest, Stored
from jqx_kernels.storage import Storage

STORAGES = {
    s.element: s
    for s in (
        Storage("int4", (1, 128), "float32", "rows", 7.0),
        Storage("e2m1", (1, 16), "e4m3", "columns", 6.0),
        Storage("e2m1_down", (1, 32), "e8m0", "columns", 6.0),
        Storage("e4m3", (None, None), "float32", "bytes", 448.0),
        Storage("int8", (1, None), "float32", "bytes", 127.0),
        Storage("e3m2", (1, 32), "e8m0", "bytes", 28.0),
        Storage("nf4", (1, 64), "float32", "columns_high", 1.0),
    )
}
"""Element -> how a matrix of it is mostly stored."""

ROWS = {"decode": 1, "tile": 64}
"""Size -> rows of activations that are measured."""

assert ROWS["decode"] <= FEW < ROWS["tile"]


class Trial(NamedTuple):
    """One entry of a table of tiles."""

    op: str
    element: str
    size: str

    def __str__(self) -> str:
        """As it is told."""
        return f"{self.op} {self.element} {self.size}"


TRIALS = tuple(
    Trial(op, element, size)
    for op, elements in {"matmul": tuple(STORAGES), "scaled_matmul": ("e4m3", "int8")}.items()
    for element in elements
    for size in ROWS
)
"""All of them."""


class Operands(NamedTuple):
    """The activations, and the arrays of one stored matrix."""

    x: Any
    stored: tuple[Any, ...]


def stored_bytes(trial: Trial, shape: tuple[int, int]) -> int:
    """How much of a matrix of this shape is read."""
    return sum(a.size * a.dtype.itemsize for a in jax.eval_shape(partial(_stored, trial, shape)))


def operands(trial: Trial, shape: tuple[int, int], copies: int) -> list[Operands]:
    """Activations, and as many matrices of codes drawn at random."""
    x = jnp.ones((ROWS[trial.size], shape[1]), jnp.bfloat16)
    if trial.op == "scaled_matmul":
        x = jnp.ones(x.shape, KINDS[_kind(trial)].dtype)
    return [Operands(x, _stored(trial, shape, seed)) for seed in range(copies)]


def _stored(trial: Trial, shape: tuple[int, int], seed: int = 0) -> tuple[Array, Array]:
    (n, k), storage = shape, STORAGES[trial.element]
    rows, columns = storage.per_byte
    # without the highest bits of both halves no code is a NaN
    codes = jax.random.bits(jax.random.key(seed), (n // rows, k // columns), jnp.uint8) & 0x77
    blocks = zip(shape, storage.block, strict=True)
    grid = [1 if size is None else axis // size for axis, size in blocks]
    kinds = {"float32": (jnp.float32, 1), "e4m3": (jnp.uint8, 0x38), "e8m0": (jnp.uint8, 127)}
    dtype, one = kinds[storage.scale]
    return codes, jnp.full(grid, one, dtype)


def _kind(trial: Trial) -> str:
    return {"e4m3": "fp8", "int8": "int8"}[trial.element]


def _weight_only(
    platform: str, trial: Trial, tiles: Tiles, interpret: bool
) -> Callable[[Operands], Array]:
    row = {"gpu": matmul_gpu.matmul, "tpu": matmul_tpu.matmul}[platform]
    storage, table = STORAGES[trial.element], {(trial.element, trial.size): tiles}

    def run(at: Operands) -> Array:
        codes, scale = at.stored
        shape = (codes.shape[0] * storage.per_byte[0], at.x.shape[1])
        request = MatmulRequest(at.x.shape, at.x.dtype.name, storage, shape, interpret=interpret)
        return row(at.x, codes, scale, jnp.float32(1), request, table)

    return run


def _scaled(
    platform: str, trial: Trial, tiles: Tiles, interpret: bool
) -> Callable[[Operands], Array]:
    row = {"gpu": scaled_gpu.multiply, "tpu": scaled_tpu.multiply}[platform]
    kind, table = _kind(trial), {(trial.element, trial.size): tiles}

    def run(at: Operands) -> Array:
        codes, _ = at.stored
        one = jnp.ones((1, 1), jnp.float32)
        x = Stored(jax.lax.bitcast_convert_type(at.x, jnp.uint8), one)
        request = ScaledRequest(kind, at.x.shape, codes.shape, "bfloat16", interpret)
        return row(x, Stored(codes, one), jnp.float32(1), request, table)

    return run


_RUNS = {"matmul": _weight_only, "scaled_matmul": _scaled}


def run_of(
    trial: Trial, platform: str, tiles: Tiles, interpret: bool = False
) -> Callable[[Operands], Array]:
    """The product with these tiles, of `Operands`."""
    return _RUNS[trial.op](platform, trial, tiles, interpret)


def lacking(trial: Trial, device: Any, shape: tuple[int, int]) -> str | None:
    """Why a device has no kernel for it; None if it has one."""
    m, k = ROWS[trial.size], shape[1]
    if trial.op == "scaled_matmul":
        lacks = {"gpu": scaled_gpu.lacks, "tpu": scaled_tpu.lacks}[device.platform]
        return lacks(device, ScaledRequest(_kind(trial), (m, k), shape, "bfloat16"))
    lacks = {"gpu": matmul_gpu.lacks, "tpu": matmul_tpu.lacks}[device.platform]
    return lacks(device, MatmulRequest((m, k), "bfloat16", STORAGES[trial.element], shape))


def bfloat16_operands(size: str, shape: tuple[int, int], copies: int) -> list[Operands]:
    """The same for a product with bfloat16 matrices."""
    x = jnp.ones((ROWS[size], shape[1]), jnp.bfloat16)
    draw = partial(jax.random.normal, shape=shape, dtype=jnp.bfloat16)
    return [Operands(x, (draw(jax.random.key(seed)),)) for seed in range(copies)]


def bfloat16_run(at: Operands) -> Array:
    """What products with stored matrices are beside."""
    return jax.lax.dot_general(at.x, at.stored[0], (((1,), (1,)), ((), ())))


def copy_run(at: Array) -> Array:
    """Memory read and written once."""
    return at ^ 1
