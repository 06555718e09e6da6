# SPDX-License-Identifier: Apache-2.0
"""Programs for devices that are not here: what kernels are called with, and how they are lowered.

The arrays are abstract; storage follows the library's formats.
"""

import contextlib
import warnings
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jqx.formats import FORMATS, storage_of
from jqx_kernels.decode import decode
from jqx_kernels.dispatch import Device
from jqx_kernels.encode import codes, encode


class Target(NamedTuple):
    """The kernels of one compiler: the row that is asked for, a device that can run it, the
    platform that programs are lowered for, and what is in their text.
    """

    row: str
    device: Device
    platform: str
    call: str


TARGETS = {
    t.platform: t
    for t in (
        Target("triton", Device("gpu", "NVIDIA H200", (9, 0)), "cuda", "xla.gpu.triton"),
        Target("tpu", Device("tpu", "TPU v5 lite"), "tpu", "tpu_custom_call"),
    )
}


SAME = ("int4_fp8", "nvfp4_46", "nvfp4_b32_fp8")  # as others, but for the tensor scale
STORAGES = {
    f.name: storage_of(f)
    for f in FORMATS.values()
    if f.scale.name != "double" and f.name not in SAME
}
N, K = 64, 768
DTYPES = ("bfloat16", "float16", "float32")


def grid_shape(storage, n=N, k=K):
    rows, columns = storage.block
    return -(-n // (rows or n)), -(-k // (columns or k))


def encode_cases(target):
    how = {"implementation": target.row, "device": target.device}
    outer = jax.ShapeDtypeStruct((), jnp.float32)
    for name, storage in STORAGES.items():
        for dtype in DTYPES:
            w = jax.ShapeDtypeStruct((N, K), jnp.dtype(dtype))
            step = jax.ShapeDtypeStruct(grid_shape(storage), jnp.float32)
            if storage.block[0] == 1:
                f = partial(encode, storage=storage, double_rounding=name == "nf4", **how)
                yield f"encode {name} {dtype}", f, (w, outer)
            f = partial(codes, storage=storage, double_rounding=True, **how)
            yield f"codes {name} {dtype}", f, (w, step)


def decode_cases(target):
    outer = jax.ShapeDtypeStruct((), jnp.float32)
    for name, storage in STORAGES.items():
        rows, columns = storage.per_byte
        packed = jax.ShapeDtypeStruct((N // rows, K // columns), jnp.uint8)
        kind = jnp.float32 if storage.scale == "float32" else jnp.uint8
        scale = jax.ShapeDtypeStruct(grid_shape(storage), kind)
        for dtype in DTYPES:
            how = {"implementation": target.row, "device": target.device, "dtype": dtype}
            f = partial(decode, storage=storage, **how)
            yield f"decode {name} {dtype}", f, (packed, scale, outer)


MAKERS = (encode_cases, decode_cases)
"""Functions from a target to (name, function, its abstract arguments)."""


def cases(platform: str) -> dict:
    """Name -> (function, abstract arguments) of everything there is a kernel for."""
    return {name: (f, args) for make in MAKERS for name, f, args in make(TARGETS[platform])}


@contextlib.contextmanager
def in_mind(platform: str, kind: str):
    """A context in which programs are for a device of this `kind`, which newer JAX wants to know of
    GPUs.
    """
    if platform != "cuda":
        yield
        return
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    mesh = AbstractMesh((), (), (), abstract_device=device)
    with use_abstract_mesh(mesh), warnings.catch_warnings():
        # JAX 0.12 says so of every kernel
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
        yield


def lowered(f, args, platform: str) -> str:
    """The program that `f` becomes on a platform that is not here, as text."""
    with in_mind(platform, TARGETS[platform].device.kind):
        return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
