# SPDX-License-Identifier: Apache-2.0
"""Attention to stored keys and values: every row of the table against NumPy, Pallas kernels
interpreted, and lowered for devices that are not here.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kv_attention_cases import (
    STORAGES,
    Case,
    arguments,
    check,
    kv_attention_cases,
    looking,
)
from lowering import lowered
from matmul_cases import B200, DEVICES, H200

import jqx
from jqx_kernels.dispatch import CPU, Device, Unsupported
from jqx_kernels.kv_attention import KV_ATTENTION, AttentionRequest, Stored, kv_attention
from jqx_kernels.kv_attention import gpu as triton
from jqx_kernels.kv_attention import tpu as mosaic
from jqx_kernels.kv_attention import xla as loops
from jqx_kernels.storage import Storage

ROWS = [row.name for row in KV_ATTENTION]
PALLAS = ("triton", "tpu")
CASES = {
    "a few, in a window": Case(t=3, window=9),
    "all slots": Case(slots=165, start=164),
    "no power of two": Case(n=2, g=1, t=2, d=48, slots=40, start=21, pads=(3, 0), window=4),
}
PLAIN = Case(n=2, slots=48, start=40, pads=(0, 3))


def numpy(arrays):
    return jax.tree.map(np.asarray, arrays)


def checked(case, name, row, of="float32", **how):
    """What queries of the dtype `of` find."""
    q, keys, values, *where = arguments(case, name, of)
    y = jax.jit(looking(case, name, row, **how))(q, keys, values, *where)
    check(y, q, numpy((keys, values)), name, case, how.get("dtype", of))
    return y


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_found_is_what_the_definition_says(case, name, row):
    checked(case, name, row)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", STORAGES)
def test_keys_values_and_exponentials_are_rounded(name, row):
    """To the dtype of the queries."""
    assert checked(Case(t=2), name, row, "bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize("row", ROWS)
def test_other_dtypes_may_be_asked_for(row):
    assert checked(PLAIN, "int8", row, "bfloat16", out_dtype="float32").dtype == jnp.float32
    assert checked(PLAIN, "nvfp4", row, "float32", dtype="bfloat16").dtype == jnp.float32


@pytest.mark.parametrize("row", ["triton", "xla", "reference"])
def test_float16(row):
    checked(PLAIN, "int8", row, "float16")


@pytest.mark.parametrize("row", ROWS)
def test_nothing_is_lost_where_scores_are_large(row):
    """Exponentials of differences of hundreds, whichever chunk has the largest score."""
    checked(Case(slots=165, start=160, scale=30.0), "int8", row)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_what_no_query_sees_may_be_anything(name, row):
    case = Case(t=2, window=20, pads=(0, 5, 69, 17))
    q, *stored, start, pads = arguments(case, name, "float32")
    slot = np.arange(case.slots)
    unseen = (slot >= 72) | (slot < np.maximum(np.asarray(case.pads), 51)[:, None])

    def spoilt(a):
        bad = jnp.asarray(jnp.nan if a.dtype == jnp.float32 else 0x7F, a.dtype)
        return jnp.where(unseen[:, :, None], bad, a)

    run = jax.jit(looking(case, name, row))
    wanted = run(q, *stored, start, pads)
    assert np.isfinite(np.asarray(wanted)).all()
    np.testing.assert_array_equal(run(q, *jax.tree.map(spoilt, stored), start, pads), wanted)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_a_number_that_is_none_is_found_by_those_who_see_it(name, row):
    """In a key: all that its queries find; in the heads of others nothing."""
    q, keys, values, *where = arguments(PLAIN, name, "float32")
    last = keys._fields.index("outer") if name == "nvfp4" else 1
    arrays = list(keys)
    arrays[last] = arrays[last].at[1, 20].set(jnp.nan)
    y = np.asarray(jax.jit(looking(PLAIN, name, row))(q, Stored(*arrays), values, *where))
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[0]).all()


@pytest.mark.parametrize("row", ROWS)
def test_a_query_that_sees_nothing_finds_zero(row):
    y = np.asarray(checked(PLAIN._replace(pads=(41, 0)), "int8", row))
    assert not y[0].any()
    assert y[1].any()


@pytest.mark.parametrize("row", ROWS)
def test_one_slot_gives_its_value(row):
    case = Case(n=1, g=1, d=16, slots=32, start=11, pads=(11,))
    q, keys, values, *where = arguments(case, "int8", "float32")
    y = jax.jit(looking(case, "int8", row))(q, keys, values, *where)
    exact = np.asarray(values.codes).view(np.int8)[0, 11] * np.asarray(values.scale)[0, 11]
    np.testing.assert_array_equal(np.asarray(y)[0, 0, 0], exact)


@pytest.mark.parametrize("row", ROWS)
def test_a_program_serves_every_start(row):
    q, keys, values, _, pads = arguments(PLAIN, "int8", "float32")
    run = jax.jit(looking(PLAIN, "int8", row))
    for start in (0, 17, 47):
        y = run(q, keys, values, jnp.int32(start), pads)
        check(y, q, numpy((keys, values)), "int8", PLAIN._replace(start=start), "float32")
    assert run._cache_size() == 1


@pytest.mark.parametrize("row", ["xla", "tpu"])
@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_chunks_need_not_divide_the_slots(name, row, monkeypatch):
    """The first of them are in front of a window."""
    monkeypatch.setattr(loops, "AT_ONCE", 1)
    monkeypatch.setattr(mosaic, "CHUNK", 32)
    checked(Case(slots=65, start=64), name, row)
    checked(Case(slots=150, start=148, t=2, window=70, scale=2.0), name, row)


@pytest.mark.parametrize(("tile", "splits"), [(16, 1), (32, 9)])
@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_other_plans_are_for_tuning(name, tile, splits):
    """More splits than tiles, too."""
    case = Case(t=2, window=50)
    q, keys, values, start, pads = arguments(case, name, "float32")
    storage = STORAGES[name]
    f32 = "float32"
    request = AttentionRequest(
        q.shape, f32, case.slots, storage, f32, f32, case.scale, case.window, True
    )
    plan = triton.plan_for(request, tile, splits)
    y = triton.attention(q, keys, values, start, pads, request, plan)
    check(y, q, numpy((keys, values)), name, case, f32)


@pytest.mark.parametrize("row", ROWS)
def test_a_batch_is_many_calls(row):
    q, *rest = arguments(PLAIN, "nvfp4", "float32")
    both = jnp.stack([q, q[:, :, :, ::-1]])
    run = looking(PLAIN, "nvfp4", row)
    y = jax.jit(jax.vmap(lambda q: run(q, *rest)))(both)
    for one, its in zip(y, both, strict=True):
        check(one, its, numpy(rest[:2]), "nvfp4", PLAIN, "float32")


@pytest.mark.parametrize("row", ROWS)
def test_it_runs_inside_of_stored_models(row):
    q, *rest = arguments(PLAIN, "int8", "float32")
    w = jnp.eye(64)
    run = looking(PLAIN, "int8", row)

    def model(params, q, *rest):
        return run(q @ params["w"], *rest)

    y = jax.jit(jqx.quantized(model))({"w": w}, q, *rest)
    check(y, q, numpy(rest[:2]), "int8", PLAIN, "float32")


# what is chosen, and what is refused


def chosen(device, case=PLAIN, name="int8", q_dtype="bfloat16"):
    shape = (case.n, case.g, case.t, case.d)
    request = AttentionRequest(
        shape, q_dtype, case.slots, STORAGES[name], q_dtype, q_dtype, case.scale
    )
    return next(row.name for row in KV_ATTENTION if row.lacks(device, request) is None)


def test_the_first_row_that_can_is_taken():
    assert chosen(H200) == chosen(B200) == "triton"
    assert chosen(Device("gpu", "Tesla T4", (7, 5))) == "reference"
    a100 = Device("gpu", "NVIDIA A100", (8, 0))
    assert (chosen(a100), chosen(a100, name="fp8")) == ("triton", "reference")
    assert chosen(DEVICES["tpu"]) == "tpu"
    assert chosen(DEVICES["tpu"], q_dtype="float16") == "reference"
    assert chosen(CPU) == "xla"
    assert chosen(H200, PLAIN._replace(t=30)) == "reference"
    assert chosen(H200, PLAIN._replace(d=512)) == "reference"
    assert chosen(H200, PLAIN._replace(d=512), "nvfp4") == "triton"


def test_few_heads_are_split_further_than_many():
    def splits(n):
        case = PLAIN._replace(n=n, slots=8192)
        shape = (case.n, case.g, case.t, case.d)
        f32 = "float32"
        request = AttentionRequest(shape, f32, case.slots, STORAGES["int8"], f32, f32, case.scale)
        return triton.plan_for(request).splits

    assert splits(1) == 128
    assert splits(12) == 44
    assert splits(1000) == 1


def call(row=None, device=CPU, name="int8", case=PLAIN, **replaced):
    q, keys, values, start, pads = arguments(case, name, "float32")
    given = {"q": q, "keys": keys, "values": values, "start": start, "pads": pads}
    how = {"storage": STORAGES[name], "scale": 1.0, "implementation": row, "device": device}
    arrays = {k: replaced.pop(k, v) for k, v in given.items()}
    run = partial(kv_attention, **(how | replaced))
    return jax.eval_shape(run, *arrays.values())


def test_a_row_that_cannot_says_why():
    with pytest.raises(Unsupported) as refused:
        call("triton")
    told = str(refused.value)
    assert "kv_attention of float32 queries (2, 3, 1, 64) to 48 slots of int8 with float32" in told
    assert "triton: needs a CUDA GPU, not cpu" in told
    with pytest.raises(Unsupported, match="tpu: needs a TPU, not gpu"):
        call("tpu", H200)
    with pytest.raises(Unsupported, match="xla: loops over what the caches of a CPU hold"):
        call("xla", H200)
    with pytest.raises(Unsupported, match="holds 64 queries of a head in registers, not 3 x 30"):
        call("triton", H200, case=PLAIN._replace(t=30))
    with pytest.raises(Unsupported, match="holds 256 queries of a head, not 3 x 90"):
        call("tpu", DEVICES["tpu"], case=PLAIN._replace(t=90, slots=128))
    with pytest.raises(Unsupported, match="holds 256 bytes of a token"):
        call("triton", H200, case=PLAIN._replace(d=512))
    with pytest.raises(Unsupported, match="multiplies bfloat16, float16, float32, not float64"):
        call("reference", dtype="float64")
    with pytest.raises(Unsupported, match="no implementation 'cutlass'; there are triton, tpu"):
        call("cutlass")


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        (Storage("e5m2", (1, None), "float32", "bytes", 1.0), "no element 'e5m2'"),
        (Storage("int8", (1, None), "double", "bytes", 1.0), "no scales in 'double'"),
        (Storage("int8", (1, 48), "float32", "bytes", 1.0), "a power of two that hold whole bytes"),
    ],
)
def test_other_storage_is_left_to_others(storage, reason):
    request = AttentionRequest(
        (2, 3, 1, 48), "float32", 8, storage, "float32", "float32", 1.0, None, True
    )
    for row in KV_ATTENTION[:3]:
        device = DEVICES[row.name] or CPU
        assert reason in (row.lacks(device, request) or "")


def test_arrays_that_do_not_belong_together_are_refused():
    q, keys, values, start, pads = arguments(PLAIN, "int8", "float32")
    nv = arguments(PLAIN, "nvfp4", "float32")[1]
    for said, replaced in (
        ("Queries are \\[n, g, t, d\\]", {"q": q[0]}),
        ("Keys: codes are of shape \\(2, 48, 64\\) here", {"keys": keys._replace(codes=nv.codes)}),
        ("Values: scales are of shape", {"values": values._replace(scale=values.scale[:, :1])}),
        ("Keys: codes are bytes", {"keys": keys._replace(codes=keys.codes.astype(jnp.int32))}),
        ("float32 come as float32, not bfloat16",
         {"keys": keys._replace(scale=keys.scale.astype(jnp.bfloat16))}),
        ("start are of shape|start is", {"start": jnp.zeros(2, jnp.int32)}),
        ("pads are of shape \\(2,\\)", {"pads": pads[:1]}),
        ("start is int32, not float32", {"start": jnp.float32(3)}),
        ("window of 0 slots shows nothing", {"window": 0}),
        ("more than there are slots", {"q": jnp.zeros((2, 3, 50, 64))}),
        ("Every token is stored by itself",
         {"storage": Storage("int8", (None, None), "float32", "bytes", 127.0)}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            call(**replaced)
    with pytest.raises(ValueError, match="lie below one of each token; it is None"):
        call(name="nvfp4", keys=nv._replace(outer=None))
    with pytest.raises(ValueError, match="blocks of 16, which do not divide 40"):
        call(name="nvfp4", q=jnp.zeros((2, 3, 1, 40)))


def test_eight_bits_may_come_as_float8():
    q, keys, values, *where = arguments(PLAIN, "fp8", "float32")
    run = looking(PLAIN, "fp8", "xla")
    as_floats = [s._replace(codes=s.codes.view(jnp.float8_e4m3fn)) for s in (keys, values)]
    np.testing.assert_array_equal(run(q, *as_floats, *where), run(q, keys, values, *where))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_every_storage_lowers(platform):
    program = {"cuda": "xla.gpu.triton", "tpu": "tpu_custom_call"}[platform]
    for f, args in kv_attention_cases(platform).values():
        text = lowered(f, args, platform)
        assert program in text
        assert "kv_attention" in text
