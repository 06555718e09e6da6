# SPDX-License-Identifier: Apache-2.0
"""Keys and values kept in eight bits: what is stored, how near the logits are, and the command."""

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
from jqx.models import BF16, COMPUTES, FLOAT32
from jqx.models.cache import CACHE_FORMATS, Kept, check_cache_format, empty, grown
from jqx.models.generate import Session
from jqx_kernels.bits import divide

ROUNDED = {
    "fp8": lambda q: q.astype(ml_dtypes.float8_e4m3fn).astype(np.float32),
    "int8": np.rint,
}
MOST = {"fp8": 448.0, "int8": 127.0}


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
        scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(MOST[name]), 1e-37)
        wanted = np.zeros((shape[0], 8, shape[2]), np.float32)
        wanted[:, 4:7] = ROUNDED[name](x / scale) * scale
        np.testing.assert_array_equal(np.asarray(got), wanted)
    assert kept.slots == 8
    more = grown(kept, 16)
    assert more.slots == 16
    np.testing.assert_array_equal(more.read(compute)[0][:, :8], read[0])
    assert not np.asarray(more.read(compute)[0][:, 8:]).any()


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_it_takes_eight_bits_a_number(name):
    kind = block_kind()
    plain, small = (empty(kind, 4, 256, replace(FLOAT32, cache=c)) for c in (None, name))
    sizes = [sum(a.nbytes for a in jax.tree.leaves(kept)) for kept in (plain, small)]
    d = kind.attention.head_dim
    assert sizes[1] == sizes[0] * (d + 4) / (4 * d)


def rounded(x, name):
    """Every vector of the last axis with a scale of its own."""
    largest = jnp.max(jnp.abs(x), -1, keepdims=True)
    scale = jnp.maximum(divide(largest, MOST[name]), jnp.float32(1e-37))
    q = divide(x, scale)
    near = {"fp8": lambda q: q.astype(jnp.float8_e4m3fn).astype(jnp.float32), "int8": jnp.round}
    return near[name](q) * scale


@pytest.mark.parametrize("name", CACHE_FORMATS)
@pytest.mark.parametrize("case", ["llama_biases", "mistral_window", "gemma"])
def test_logits_are_those_of_the_whole_text_with_rounded_keys_and_values(case, name):
    """As they differ from one program to another, before they are rounded, by float32's last bits,
    a number in a million lands on the next code.
    """
    spec, params = model(case)

    def whole(params, ids, positions):
        return models.forward(spec, params, ids, FLOAT32, positions)

    kept = dict.fromkeys((spec.names.kept_k, spec.names.kept_v), partial(rounded, name=name))
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


@pytest.mark.parametrize("compute", [BF16, COMPUTES["bf16", "accelerator"]])
def test_numbers_are_those_of_the_arithmetic(compute):
    compute = replace(compute, cache="int8")
    spec, params = model("llama_biases")
    session = Session(spec, params, compute, 40)
    session.read(TEXTS)
    assert np.isfinite(np.asarray(session.logits())).all()
    for array in session._kept[0].read(compute):
        wide = np.asarray(array.astype(jnp.float32))
        np.testing.assert_array_equal(wide, wide.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_what_is_not_a_number_stays_so():
    kind, compute = block_kind(), replace(FLOAT32, cache="int8")
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
    check_cache_format(None)
    done = jqx("quantize", talker, tmp_path / "out", "--qformat", "fp8", "--kv-cache", "fp8_cast")
    assert done.code == 0, done.err
    words = ("generate", tmp_path / "out", "--prompt", "abc", "-n", 5)
    assert jqx(*words).code == 0
    refused(*words, "--kv-cache", "int8", saying=("kept in fp8", "leave it out"))
