# SPDX-License-Identifier: Apache-2.0
"""Keys and values kept in eight or four bits: what is stored, how near the logits are, and the
command.
"""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from command import jqx, refused
from generating import followers, write_model
from test_cache import TEXTS, distance, model

from jqx import models, quantized
from jqx.errors import InputError
from jqx.models import BF16, COMPUTES, FLOAT32
from jqx.models.attention import looked_back
from jqx.models.cache import (
    CACHE_FORMATS,
    Kept,
    Slots,
    check_cache_format,
    check_heads,
    empty,
    grown,
)
from jqx.models.generate import Session
from jqx_interop.cli.generate import complete_cache

E4M3 = ml_dtypes.float8_e4m3fn
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
MOST = {"fp8": 448.0, "int8": 127.0, "nvfp4": 6.0 * 448.0}
BYTES = {"fp8": 64 + 4, "int8": 64 + 4, "nvfp4": 32 + 4 + 4}
"""Of 64 channels."""


def nearest_e2m1(q):
    """Numbers beside the nearest of E2M1; of two that are as near the one with an even code."""
    off = np.abs(np.abs(q)[..., None] - E2M1)
    even, odd = (off[..., i::2].argmin(-1) * 2 + i for i in (0, 1))
    nearer = off[..., 1::2].min(-1) < off[..., ::2].min(-1)
    return np.copysign(E2M1[np.where(nearer, odd, even)], q)


def in_blocks(x, scale):
    """As NVFP4 has a matrix, with `scale` for the tensor."""
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    amax = np.abs(blocks).max(-1, keepdims=True)
    stored = np.where(amax == 0, 1, amax / (np.float32(6) * scale[..., None]))
    step = np.clip(stored, 2.0**-9, 448).astype(E4M3).astype(np.float32) * scale[..., None]
    return (nearest_e2m1(blocks / step) * step).reshape(x.shape)


ROUNDED = {
    "fp8": lambda x, scale: (x / scale).astype(E4M3).astype(np.float32) * scale,
    "int8": lambda x, scale: np.rint(x / scale) * scale,
    "nvfp4": in_blocks,
}
"""(values, scale of each token) -> what is read again."""


def rounded(x, name):
    """Every vector of the last axis by itself."""
    x = np.asarray(x)
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(MOST[name]), 1e-37)
    return ROUNDED[name](x, scale.astype(np.float32))


def block_kind():
    return model("llama_biases")[0].blocks[0]


def drawn(seed, *shape):
    r = np.random.default_rng(seed)
    return (r.standard_normal(shape) * np.exp(r.standard_normal(shape[:-1]))[..., None]).astype(
        "f4"
    )


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_every_token_of_every_head_has_a_scale(name):
    kind, compute = block_kind(), replace(FLOAT32, cache=name)
    row = kind.attention
    kept = empty(kind, 2, 8, compute)
    shape = (2 * row.kv_heads, 3, row.head_dim)
    k, v = drawn(1, *shape), drawn(2, *shape)
    k[0, 1] = 0
    put = jax.jit(Kept.with_tokens, static_argnames="compute")
    kept = put(kept, jnp.asarray(k), jnp.asarray(v), jnp.int32(4), compute=compute)
    read = jax.jit(Kept.read, static_argnames="compute")(kept, compute=compute)
    for got, x in zip(read, (k, v), strict=True):
        wanted = np.zeros((shape[0], 8, shape[2]), np.float32)
        wanted[:, 4:7] = rounded(x, name)
        np.testing.assert_array_equal(np.asarray(got), wanted)
    assert kept.slots == 8
    more = grown(kept, 16)
    assert more.slots == 16
    np.testing.assert_array_equal(more.read(compute)[0][:, :8], read[0])
    assert not np.asarray(more.read(compute)[0][:, 8:]).any()


def wide_kind():
    """Heads of 64 channels."""
    kind = block_kind()
    return replace(kind, attention=replace(kind.attention, head_dim=64))


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_bytes_of_a_token(name):
    kind = wide_kind()
    kept = empty(kind, 4, 256, replace(FLOAT32, cache=name))
    vectors = 2 * 256 * 4 * kind.attention.kv_heads
    assert sum(a.nbytes for a in jax.tree.leaves(kept)) == vectors * BYTES[name]


def test_how_far_off_each_is():
    """Root mean square error of normal numbers, relative to theirs."""
    kind, off = wide_kind(), {}
    shape = (kind.attention.kv_heads, 200, 64)
    x = jnp.asarray(np.random.default_rng(5).standard_normal(shape, np.float32))
    for name in CACHE_FORMATS:
        compute = replace(FLOAT32, cache=name)
        put = jax.jit(Kept.with_tokens, static_argnames="compute")
        kept = put(empty(kind, 1, 200, compute), x, x, jnp.int32(0), compute=compute)
        off[name] = float(jnp.sqrt(jnp.mean((kept.read(compute)[0] - x) ** 2)))
    assert 0.004 < off["int8"] < 0.008
    assert 0.02 < off["fp8"] < 0.03
    assert 0.08 < off["nvfp4"] < 0.11


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_a_token_is_added_in_place(name):
    """A step with a donated cache neither copies it nor decodes all of it at once."""
    kind, compute = wide_kind(), replace(FLOAT32, cache=name)
    row, slots = kind.attention, 1 << 16  # what is decoded at once is 2,048 of keys and of values
    kept = empty(kind, 1, slots, compute)
    size = sum(a.nbytes for a in jax.tree.leaves(kept))
    q = jnp.ones((row.kv_heads, row.heads // row.kv_heads, 1, 64))
    k, where = jnp.ones((row.kv_heads, 1, 64)), Slots(jnp.int32(3000), jnp.zeros(1, jnp.int32))

    def step(kept, q, k, where):
        kept = kept.with_tokens(k, k, where.start, compute)
        return kept, looked_back(row, q, kept, where, compute)

    program = jax.jit(step, donate_argnums=0).lower(kept, q, k, where).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 4
    old = jax.tree.leaves(kept)
    program(kept, q, k, where)
    assert all(a.is_deleted() for a in old)


@pytest.mark.parametrize("t", [1, 3, 12])
@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_what_is_not_seen_is_not_looked_at(name, t):
    """NaN after the last token, in more slots than a loop takes at once."""
    kind, compute = wide_kind(), replace(FLOAT32, cache=name)
    row, slots = kind.attention, 2048
    where = Slots(jnp.int32(1030), jnp.asarray([700], jnp.int32))
    x = jnp.asarray(drawn(3, row.kv_heads, slots, 64))
    kept = empty(kind, 1, slots, compute).with_tokens(x, -x, jnp.int32(0), compute)
    q = jnp.asarray(drawn(4, row.kv_heads, row.heads // row.kv_heads, t, 64))
    look = jax.jit(partial(looked_back, row, compute=compute))
    unseen = (jnp.arange(slots) < 700) | (jnp.arange(slots) >= 1030 + t)

    def spoilt(a):
        bad = jnp.asarray(jnp.nan if a.dtype == jnp.float32 else 0x7F, a.dtype)
        return jnp.where(unseen[None, :, None], bad, a)

    clean = look(q, kept, where)
    assert np.isfinite(np.asarray(clean)).all()
    np.testing.assert_array_equal(look(q, jax.tree.map(spoilt, kept), where), clean)


def rounding(x, name):
    """`rounded` in a program."""
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return jax.pure_callback(partial(rounded, name=name), shape, x)


@pytest.mark.parametrize("name", CACHE_FORMATS)
@pytest.mark.parametrize("case", ["llama_biases", "mistral_window", "gemma"])
def test_logits_are_those_of_the_whole_text_with_rounded_keys_and_values(case, name):
    """As they differ from one program to another, before they are rounded, by float32's last bits,
    a number in a million lands on the next code.
    """
    spec, params = model(case, **({"head_dim": 16} if name == "nvfp4" else {}))

    def whole(params, ids, positions):
        return models.forward(spec, params, ids, FLOAT32, positions)

    kept = dict.fromkeys((spec.names.kept_k, spec.names.kept_v), partial(rounding, name=name))
    whole = jax.jit(quantized(whole, kept))
    session = Session(spec, params, replace(FLOAT32, cache=name), 16)
    session.read(TEXTS)
    texts = [list(text) for text in TEXTS]
    for _ in range(4):
        ids, mask = np.zeros((3, 32), np.int32), np.zeros((3, 32), bool)
        for row, seen, text in zip(ids, mask, texts, strict=True):
            row[: len(text)], seen[: len(text)] = text, True
        logits = np.asarray(whole(params, ids, models.positions_of(jnp.asarray(mask))))
        wanted = np.stack([logits[i, len(text) - 1] for i, text in enumerate(texts)])
        assert distance(np.asarray(session.logits()), wanted) <= 1e-4
        tokens = np.argmax(wanted, -1).astype(np.int32)
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        session.add(tokens)


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
@pytest.mark.parametrize("compute", [BF16, COMPUTES["bf16", "accelerator"]])
def test_numbers_are_those_of_the_arithmetic(compute, name):
    compute = replace(compute, cache=name)
    spec, params = model("llama_biases")
    session = Session(spec, params, compute, 40)
    session.read(TEXTS)
    assert np.isfinite(np.asarray(session.logits())).all()
    for array in session._kept[0].read(compute):
        wide = np.asarray(array.astype(jnp.float32))
        np.testing.assert_array_equal(wide, wide.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_what_is_not_a_number_stays_so(name):
    kind, compute = block_kind(), replace(FLOAT32, cache=name)
    shape = (kind.attention.kv_heads, 1, kind.attention.head_dim)
    k = jnp.ones(shape).at[0, 0, 3].set(jnp.nan)
    kept = empty(kind, 1, 4, compute).with_tokens(k, k, jnp.int32(0), compute)
    assert np.isnan(np.asarray(kept.read(compute)[0])[0, 0, 3])


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("m") / "model", followers([b"uvwxyz", b"]st"]))


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_the_command(talker, name):
    words = ("generate", talker, "--prompt", "abc", "-n", 5, "--kv-cache", name)
    assert jqx(*words).out == "defgh\n"
    assert json.loads(jqx(*words, "--json").out)["completions"][0]["text"] == "defgh"


def test_formats_that_do_not_exist_are_refused(talker, tmp_path):
    words = ("generate", talker, "--prompt", "abc", "-n", 5, "--kv-cache")
    refused(*words, "int9", saying=("cache format", "int9", "int8"))
    refused(*words, "nvfp5", saying=("cache format", "nvfp5", "nvfp4"))
    check_cache_format(None)
    done = jqx("quantize", talker, tmp_path / "out", "--qformat", "fp8", "--kv-cache", "fp8_cast")
    assert done.code == 0, done.err
    words = ("generate", tmp_path / "out", "--prompt", "abc", "-n", 5)
    assert jqx(*words).code == 0
    refused(*words, "--kv-cache", "int8", saying=("kept in fp8", "leave it out"))


def test_blocks_that_do_not_divide_a_head_are_refused():
    spec = replace(model("llama_biases")[0], blocks=(wide_kind(),))
    check_heads("nvfp4", spec)
    kind = wide_kind()
    narrow = replace(kind, attention=replace(kind.attention, head_dim=40))
    spec = replace(spec, blocks=(kind, narrow))
    check_heads("int8", spec)
    check_heads(None, spec)
    with pytest.raises(InputError, match=r"16 channels, and heads have 40.* fp8 or int8"):
        check_heads("nvfp4", spec)


def test_the_formats_are_completed():
    assert complete_cache("nv") == ["nvfp4"]
    assert complete_cache("") == ["fp8", "int8", "nvfp4"]


def test_stored_weights_and_stored_keys(talker, tmp_path):
    assert jqx("quantize", talker, tmp_path / "out", "--qformat", "nvfp4").code == 0
    words = ("generate", tmp_path / "out", "--prompt", "abc", "-n", 5, "--kv-cache")
    assert jqx(*words, "nvfp4").out == jqx(*words, "fp8").out
