# SPDX-License-Identifier: Apache-2.0
"""What every row of SOURCES decodes to, against its definition, and against what others decode."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import reference
from foreign import (
    BF16,
    E8M0,
    F8,
    Arrays,
    awq_words,
    fp8,
    infos,
    integers,
    mxfp4,
    stream,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from jqx.formats import find_format
from jqx.tensors import QTensor
from jqx_interop import carrying
from jqx_interop.sources import SOURCES, Weight
from jqx_interop.sources.weight import Given

F32 = np.dtype(np.float32)
GOLDEN = dict(np.load(Path(__file__).with_name("golden") / "sources.npz"))
SIZES = st.integers(1, 300)
SEEDS = st.integers(0, 99)


def found(row: str, arrays: Arrays, said: dict[str, Any] | None = None, **more: Any) -> list:
    """Weights and problems of tensors that lie in no file."""
    given = Given(
        said=said or {}, file=None, tensors=infos(arrays), read=arrays.__getitem__, dtype=BF16
    )
    return list(SOURCES[row].weights(given))


def floats(row: str, arrays: Arrays, said: dict[str, Any] | None = None, dtype: np.dtype = F32):
    """Name -> decoded tensor."""
    weights = found(row, arrays, said)
    assert all(isinstance(w, Weight) for w in weights), weights
    out = {
        w.name: w.floats({leaf: arrays[n] for leaf, n in w.parts.items()}, dtype) for w in weights
    }
    assert {n: a.shape for n, a in out.items()} == {w.name: w.shape for w in weights}
    return out


def same(mine: np.ndarray, defined: np.ndarray) -> None:
    assert mine.dtype == defined.dtype
    np.testing.assert_array_equal(mine.astype(np.float32), defined.astype(np.float32))


def codes_of(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Any E4M3 numbers."""
    raw = rng.integers(0, 256, shape).astype(np.uint8)
    return np.where((raw & 127) == 127, raw - 1, raw).astype(np.uint8).view(F8)


# --- FP8


@settings(max_examples=15)
@given(n=SIZES, k=SIZES, seed=st.integers(0, 99), block=st.sampled_from([(128, 128), (64, 32)]))
def test_blocks_of_fp8(n: int, k: int, seed: int, block: tuple[int, int]):
    rng = np.random.default_rng(seed)
    scale = rng.random((-(-n // block[0]), -(-k // block[1])), np.float32) + np.float32(0.1)
    arrays = {"a.weight": codes_of(rng, (n, k)), "a.weight_scale_inv": scale}
    said = {"weight_block_size": list(block)}
    defined = fp8(arrays["a.weight"], scale, block)
    same(floats("fp8-blocks", arrays, said)["a.weight"], defined)
    same(floats("fp8-blocks", arrays, said, BF16)["a.weight"], defined.astype(BF16))


def test_the_last_block_of_rows_is_smaller():
    """576 rows are 4 blocks of 128 and one of 64, not 5 of 116."""
    rng = np.random.default_rng(0)
    scale = np.arange(1, 6, dtype=np.float32)[:, None]
    arrays = {"kv_a.weight": codes_of(rng, (576, 128)), "kv_a.weight_scale_inv": scale}
    got = floats("fp8-blocks", arrays)["kv_a.weight"]
    values = reference.value("e4m3", arrays["kv_a.weight"].view(np.uint8))
    for r in (0, 127, 128, 511, 512, 575):
        np.testing.assert_array_equal(got[r], values[r] * (r // 128 + 1))


@pytest.mark.parametrize("dtype", [E8M0, np.dtype(np.uint8)], ids=["e8m0", "bytes"])
def test_scales_that_are_powers_of_two(dtype: np.dtype):
    rng = np.random.default_rng(1)
    exponents = rng.integers(100, 140, (2, 3)).astype(np.uint8)
    arrays = {"a.weight": codes_of(rng, (200, 300)), "a.weight_scale_inv": exponents.view(dtype)}
    scale = np.exp2(exponents.astype(np.float32) - 127)
    same(floats("fp8-blocks", arrays)["a.weight"], fp8(arrays["a.weight"], scale, (128, 128)))


SCALES = {"[]": (), "[1]": (1,), "[1, 1]": (1, 1), "[n]": (200,), "[n, 1]": (200, 1)}


@pytest.mark.parametrize("ending", ["_scale", "_scale_inv"])
@pytest.mark.parametrize("shape", SCALES.values(), ids=SCALES)
def test_scales_of_tensors_and_of_rows(shape: tuple[int, ...], ending: str):
    rng = np.random.default_rng(2)
    scale = rng.random(shape, np.float32) + np.float32(0.1)
    arrays = {"a.weight": codes_of(rng, (200, 300)), f"a.weight{ending}": np.asarray(scale)}
    arrays["a.activation_scale"] = np.ones((), np.float32)
    wide = np.broadcast_to(np.reshape(scale, (-1, 1)), (200, 1))
    same(floats("fp8", arrays)["a.weight"], fp8(arrays["a.weight"], wide, (1, 300)))


def test_experts_in_one_tensor_of_fp8():
    rng = np.random.default_rng(3)
    codes, scale = codes_of(rng, (3, 130, 70)), rng.random((3, 2, 1), np.float32)
    got = floats("fp8-blocks", {"e.up_proj": codes, "e.up_proj_scale_inv": scale})["e.up_proj"]
    for e in range(3):
        same(got[e], fp8(codes[e], scale[e], (128, 128)))


# --- MXFP4


def blocks_of(rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    scales = rng.integers(90, 160, shape).astype(np.uint8)
    return rng.integers(0, 256, (*shape, 16)).astype(np.uint8), scales


@settings(max_examples=10)
@given(rows=st.integers(1, 9), groups=st.integers(1, 5), seed=st.integers(0, 99))
def test_blocks_of_mxfp4(rows: int, groups: int, seed: int):
    blocks, scales = blocks_of(np.random.default_rng(seed), rows, groups)
    got = floats("mxfp4", {"a.weight_blocks": blocks, "a.weight_scales": scales}, dtype=BF16)
    same(got["a.weight"], mxfp4(blocks, scales).astype(BF16))
    assert (got["a.weight"].astype(np.float32) == mxfp4(blocks, scales)).all()  # bfloat16 is enough


@settings(max_examples=10)
@given(
    experts=st.integers(1, 3),
    rows=st.integers(1, 6),
    groups=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_experts_of_mxfp4_are_turned(experts: int, rows: int, groups: int, seed: int):
    blocks, scales = blocks_of(np.random.default_rng(seed), experts, rows, groups)
    name = "mlp.experts.gate_up_proj"
    got = floats("mxfp4", {f"{name}_blocks": blocks, f"{name}_scales": scales})[name]
    assert got.shape == (experts, 32 * groups, rows)
    for e in range(experts):
        same(got[e], mxfp4(blocks[e], scales[e]).T)


# --- experts of ModelOpt


@settings(max_examples=10)
@given(
    e=st.integers(1, 3), groups=st.integers(1, 4), out=st.integers(1, 6), seed=st.integers(0, 99)
)
def test_experts_of_nvfp4(e: int, groups: int, out: int, seed: int):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (e, 8 * groups, out)).astype(np.uint8)
    scale = np.abs(codes_of(rng, (e, groups, out)).astype(np.float32)).astype(F8)
    name, outer = "mlp.experts.down_proj", np.float32(0.37)
    arrays = {name: codes, f"{name}_weight_scale": scale}
    arrays[f"{name}_weight_scale_2"] = np.asarray(outer)
    got = floats("modelopt", arrays)[name]
    for x, i, j in np.ndindex(got.shape):
        code = int(codes[x, i // 2, j]) >> (4 * (i % 2)) & 15
        step = np.float32(scale[x, i // 16, j].astype(np.float32) * outer)
        sign = np.float32(-1 if code >= 8 else 1)
        assert got[x, i, j] == sign * np.float32(reference.E2M1[code & 7]) * step


def test_experts_of_fp8():
    rng = np.random.default_rng(4)
    codes, name = codes_of(rng, (2, 5, 7)), "mlp.experts.gate_up_proj"
    arrays = {name: codes, f"{name}_weight_scale": np.asarray(np.float32(0.3))}
    same(floats("modelopt", arrays)[name], codes.astype(np.float32) * np.float32(0.3))


# --- integers


def drawn(seed: int, bits: int, n: int, k: int, blocks: int) -> tuple[np.ndarray, ...]:
    """Codes [n, k], zero points and float16 scales [n, blocks]."""
    rng = np.random.default_rng(seed)
    codes, zeros = (rng.integers(0, 1 << bits, s).astype(np.uint8) for s in ((n, k), (n, blocks)))
    return codes, zeros, (rng.random((n, blocks)) + 0.01).astype(np.float16)


@settings(max_examples=8)
@given(n=st.integers(1, 3), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_awq(n: int, blocks: int, seed: int):
    codes, zeros, scale = drawn(seed, 4, 8 * n, 16 * blocks, blocks)
    arrays = {
        "a.qweight": awq_words(codes.T),
        "a.qzeros": awq_words(zeros.T),
        "a.scales": np.ascontiguousarray(scale.T),
    }
    said = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
    index = np.arange(16 * blocks) // 16
    same(floats("awq", arrays, said)["a.weight"], integers(codes, zeros, scale, index))


@pytest.mark.parametrize("ordered", [True, False], ids=["in order", "desc_act"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, version: str, ordered: bool):
    n, k, blocks = 32, 64, 4
    codes, zeros, scale = drawn(bits, bits, n, k, blocks)
    less = 1 if version == "gptq" else 0
    zeros = np.maximum(zeros, less)  # the first version stores one less
    index = np.arange(k, dtype=np.int32) // (k // blocks)
    if not ordered:
        index = np.random.default_rng(9).permutation(index)
    arrays = {
        "a.qweight": stream(codes, bits).T.copy(),
        "a.qzeros": stream((zeros - less).T, bits),
        "a.scales": np.ascontiguousarray(scale.T),
        "a.g_idx": index,
    }
    said = {"quant_method": "gptq", "bits": bits, "group_size": 16, "checkpoint_format": version}
    same(floats("gptq", arrays, said)["a.weight"], integers(codes, zeros, scale, index))


PACKED = {4: "int4", 8: "int8"}


@pytest.mark.parametrize("ordered", [True, False], ids=["in order", "actorder"])
@pytest.mark.parametrize("shifted", [True, False], ids=["zero points", "symmetric"])
def test_packed_integers_of_compressed_tensors(shifted: bool, ordered: bool):
    n, k, blocks = 16, 96, 3
    codes, zeros, scale = drawn(5, 4, n, k, blocks)
    zeros = zeros if shifted else np.full_like(zeros, 8)
    index = np.arange(k, dtype=np.int32) // 32
    arrays = {
        "a.weight_packed": stream(codes, 4),
        "a.weight_scale": scale.astype(BF16),
        "a.weight_shape": np.array([n, k], np.int64),
    }
    if shifted:
        arrays["a.weight_zero_point"] = stream(zeros.T, 4).T.copy()
    if not ordered:
        index = arrays["a.weight_g_idx"] = np.random.default_rng(9).permutation(index)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    weights |= {"symmetric": not shifted} | ({} if ordered else {"actorder": "group"})
    said = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    step = scale.astype(BF16).astype(np.float32)
    got = floats("compressed-tensors", arrays, said)["a.weight"]
    same(got, integers(codes, zeros, step, index))


def test_integers_of_compressed_tensors_with_zero_points():
    rng = np.random.default_rng(6)
    codes, zeros = (rng.integers(-128, 128, s).astype(np.int8) for s in ((6, 40), (6, 1)))
    scale = rng.random((6, 1), np.float32)
    arrays = {"a.weight": codes, "a.weight_scale": scale, "a.weight_zero_point": zeros}
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}
    inputs = {
        "num_bits": 8,
        "type": "int",
        "strategy": "token",
        "dynamic": True,
        "symmetric": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    said = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    got = floats("compressed-tensors", arrays, said)["a.weight"]
    same(got, integers(codes, zeros, scale, np.zeros(40, int)))
    (weight,) = found("compressed-tensors", arrays, said)
    assert weight.choice is None
    arrays["a.weight_zero_point"] = zeros[:3]
    assert found("compressed-tensors", arrays, said) == [
        "tensor a.weight_zero_point is I8 (3, 1), not I8 (6, 1)"
    ]


# --- what the code of others decodes


def answers(case: str) -> Arrays:
    return {k.split("|")[1]: a for k, a in GOLDEN.items() if k.startswith(f"{case}|")}


def test_blocks_of_fp8_are_what_transformers_decodes():
    case = answers("fp8 blocks")
    arrays = {"a.weight": case["weight"].view(F8), "a.weight_scale_inv": case["scale"]}
    same(floats("fp8-blocks", arrays, dtype=BF16)["a.weight"], case["decoded"].view(BF16))


def test_experts_of_mxfp4_are_what_transformers_decodes():
    case = answers("mxfp4")
    arrays = {"e_blocks": case["blocks"], "e_scales": case["scales"]}
    same(floats("mxfp4", arrays, dtype=BF16)["e"], case["decoded"].view(BF16))


GPTQ = [("gptq", bits) for bits in (2, 3, 4, 8)] + [("gptq_v2", bits) for bits in (3, 4)]


@pytest.mark.parametrize(("version", "bits"), GPTQ)
def test_gptq_is_what_auto_round_decodes(version: str, bits: int):
    case = answers(f"{version} {bits}")
    arrays = {f"a.{n}": case[n] for n in ("qweight", "qzeros")}
    arrays["a.scales"] = case["scales"].astype(np.float16)
    said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": version}
    got = floats("gptq", arrays, said)["a.weight"]
    np.testing.assert_allclose(got, case["decoded"], rtol=2.0**-10)  # that code has half precision
    assert (got.astype(np.float16) == case["decoded"].astype(np.float16)).mean() > 0.999


@pytest.mark.parametrize("case", ["cast", "cast beyond"])
def test_mxfp4_becomes_the_nvfp4_of_modelopt(case: str):
    made = answers(case)
    q = QTensor(made["packed"], made["scales"], None, format=find_format("mxfp4"), dtype=BF16)
    mine = carrying.cast(q, carrying.top_of(made["scales"]), find_format("nvfp4"))
    np.testing.assert_array_equal(mine.codes, made["codes"])
    np.testing.assert_array_equal(np.asarray(mine.scale).view(np.uint8), made["scale"])
    assert mine.tensor_scale == made["outer"]
    wide, near = (np.asarray(jax.jit(lambda q: q.decode(np.float32))(x)) for x in (q, mine))
    wrong = (wide != near).reshape(*made["scales"].shape, -1).any(-1)
    blocks, exact = made["exact"]
    beyond = made["scales"].astype(int) < made["scales"].max() - 17
    assert not wrong[~beyond].any()
    assert wrong.any() == (exact < blocks)
