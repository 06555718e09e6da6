# SPDX-License-Identifier: Apache-2.0
"""Bytes made by ModelOpt: a committed file of small weights in every format, and whole exports
where there are any.
"""

import importlib.util
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from jqx.formats import FORMATS, encode, grid_shape

RUN = jax.jit(encode, static_argnums=1)
HERE = Path(__file__).parent / "golden"
FIXTURE = dict(np.load(HERE / "formats.npz"))
CASES = sorted({tuple(key.split("|")[:3]) for key in FIXTURE})


def fixture_weights():
    spec = importlib.util.spec_from_file_location("make_formats", HERE / "make_formats.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.weights()


WEIGHTS = fixture_weights()


def as_bytes(a):
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)


def check(stored, exported, what):
    """All arrays that ModelOpt wrote, in its bytes; its shapes of scales differ by axes of one."""
    names = {n for n, a in stored._asdict().items() if a is not None}
    assert names == set(exported), what
    for name in names:
        mine, ref = np.asarray(getattr(stored, name)), exported[name]
        assert mine.size == ref.size, f"{what} {name}"
        np.testing.assert_array_equal(as_bytes(mine), as_bytes(ref), err_msg=f"{what} {name}")


NOT_HERE = {
    "int8_tensor": "is for inputs",
    "nf4": "is not exported",
    "nf4_double": "is not exported",
    "mxfp6": "is not exported",
    "mxint8": "is not exported",
    "int4_fp8": "int4 with a tensor scale more",
    "nvfp4_46": "nvfp4 whose blocks are searched for",
}


def test_the_file_has_every_format_that_modelopt_exports():
    assert {c[0] for c in CASES} == set(FORMATS) - set(NOT_HERE)
    assert {c[1:] for c in CASES} >= {(d, "max") for d in ("bfloat16", "float16", "float32")}
    assert {c[2] for c in CASES} == {"max", "amax", "ragged"}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_small_weights(case):
    name, dtype, kind = case
    fmt, key = FORMATS[name], "|".join(case)
    w = WEIGHTS["ragged" if kind == "ragged" else "weight"].astype(
        np.dtype(getattr(ml_dtypes, dtype, dtype))
    )
    exported = {
        k: FIXTURE[f"{key}|{k}"]
        for k in ("codes", "scale", "tensor_scale")
        if f"{key}|{k}" in FIXTURE
    }
    amax = FIXTURE.get(f"{key}|amax")
    if amax is not None:
        amax = amax.reshape(() if fmt.tensor_bound else grid_shape(fmt, w.shape))
        check(RUN(w, fmt, amax), exported, key)
    if kind != "amax" or amax is None:
        check(RUN(w, fmt), exported, key)


EXPORTS = {
    "fp8": "fp8",
    "fp8_pc_pt": "fp8_channel",
    "fp8_pb_wo": "fp8_block",
    "int8": "int8",
    "int8_wo": "int8",
    "int4_wo": "int4",
    "nvfp4": "nvfp4",
    "w4a16_nvfp4": "nvfp4",
    "w4a8_nvfp4_fp8": "nvfp4_b32_fp8",
    "nvfp4_mlp_only": "nvfp4",
    "nvfp4_mlp_wo": "nvfp4_b32",
    "mxfp4": "mxfp4",
    "w4a8_mxfp4_fp8": "mxfp4",
    "mxfp8": "mxfp8",
}
GROUPS = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
SAFETENSORS = {
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "I8": np.int8,
    "U8": np.uint8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}


def read(path):
    """All tensors of a safetensors file: a length, a JSON header, bytes."""
    raw = Path(path).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    out = {}
    for name, row in header.items():
        a, b = row["data_offsets"]
        out[name] = np.frombuffer(raw[start + a : start + b], SAFETENSORS[row["dtype"]]).reshape(
            row["shape"]
        )
    return out


def group_amax(base, path):
    """The largest magnitude of the linears that share a tensor scale with this one."""
    parent, _, name = path.rpartition(".")
    members = next((g for g in GROUPS if name in g), (name,))
    return max(np.abs(base[f"{parent}.{m}.weight"].astype(np.float32)).max() for m in members)


@pytest.mark.parametrize("export", EXPORTS)
def test_whole_exports(shared, export):
    fmt = FORMATS[EXPORTS[export]]
    base = read(shared / "golden/base/model.safetensors")
    exported = read(shared / f"golden/{export}/model.safetensors")
    paths = sorted(k.removesuffix(".weight_scale") for k in exported if k.endswith(".weight_scale"))
    assert len(paths) == (6 if "mlp" in export else 14)
    for path in paths:
        amax = group_amax(base, path) if fmt.tensor_bound else None
        names = {"codes": "weight", "scale": "weight_scale", "tensor_scale": "weight_scale_2"}
        theirs = {k: exported[f"{path}.{v}"] for k, v in names.items() if f"{path}.{v}" in exported}
        check(RUN(base[f"{path}.weight"], fmt, amax), theirs, path)
