# SPDX-License-Identifier: Apache-2.0
"""Reading a token at a time with kept keys and values gives what reading the whole text gives."""

from dataclasses import replace
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from golden import make_models as golden

import jqx
from jqx import models
from jqx.models import BF16, COMPUTES, FLOAT32
from jqx.models import cache as slots
from jqx.models import generate as generation
from jqx.models.generate import Session, pieces
from jqx.models.sampling import Draw
from jqx_interop.families import spec_from_config

WIDTH = 32  # whole texts are padded to it on the right: one program
CASES = (
    "llama_biases",
    "llama_llama3_old_layout",  # one key and value head
    "mistral_window",
    "qwen2_window_from_1",
    "qwen3_layer_types",
    "gemma",
)
TEXTS = [
    np.random.default_rng(i).integers(0, golden.VOCAB, n).tolist() for i, n in enumerate((5, 1, 9))
]


@cache
def model(case, dtype="float32", **changes):
    """Spec and parameters of a small model of the family of `case`."""
    spec = spec_from_config(golden.CASES[case] | changes)
    shapes = models.param_shapes(spec)
    leaves = {name: jnp.asarray(golden.weight(name, s), dtype) for name, s in shapes.items()}
    return spec, unflatten_dict(leaves, sep=".")


def without_cache(spec, params, texts, compute=FLOAT32):
    """The logits after each text, read as a whole."""
    ids, mask = np.zeros((len(texts), WIDTH), np.int32), np.zeros((len(texts), WIDTH), bool)
    for row, seen, text in zip(ids, mask, texts, strict=True):
        row[: len(text)], seen[: len(text)] = text, True
    positions = models.positions_of(jnp.asarray(mask))
    logits = models.forward(spec, params, jnp.asarray(ids), compute, positions)
    return np.stack([np.asarray(logits)[i, len(text) - 1] for i, text in enumerate(texts)])


def distance(got, wanted):
    """Largest difference over the largest of the wanted logits."""
    return np.max(np.abs(np.asarray(got) - wanted)) / np.max(np.abs(wanted))


def follow(spec, params, texts, compute=FLOAT32, steps=6):
    """Greedy tokens with the cache; yields (logits with, logits without) before each."""
    session = Session(spec, params, compute, max(map(len, texts)) + steps)
    session.read(texts)
    texts = [list(text) for text in texts]
    for _ in range(steps):
        got, wanted = np.asarray(session.logits()), without_cache(spec, params, texts, compute)
        yield got, wanted
        ids = np.argmax(wanted, -1).astype(np.int32)
        for text, token in zip(texts, ids.tolist(), strict=True):
            text.append(token)
        session.add(ids)


@pytest.mark.parametrize("case", CASES)
def test_with_the_cache_as_without(case):
    """Three texts of different lengths, windows shorter than the texts, token by token."""
    for got, wanted in follow(*model(case), TEXTS):
        assert distance(got, wanted) <= 1e-5
        np.testing.assert_array_equal(np.argmax(got, -1), np.argmax(wanted, -1))


@pytest.mark.parametrize("case", ["mistral_window", "qwen3_layer_types"])
def test_prompts_in_pieces_and_more_slots(case, monkeypatch):
    """Pieces of 32 and slots in steps of 32: windows reach across pieces, some pieces of a short
    prompt are padding alone.
    """
    monkeypatch.setattr(generation, "PIECES", {"chunks": 64, "batched": 64})
    monkeypatch.setattr(slots, "FEWEST", 32)
    monkeypatch.setattr(slots, "STEP", 32)
    spec, params = model(case)
    texts = [
        np.random.default_rng(i).integers(0, golden.VOCAB, n).tolist()
        for i, n in ((0, 90), (1, 20))
    ]
    session = Session(spec, params, FLOAT32, 96)
    session.read(texts)
    for _ in range(7):
        got = np.asarray(session.logits())
        for row, text in zip(got, texts, strict=True):
            alone = models.forward(spec, params, jnp.asarray([text + [0] * (100 - len(text))]))
            assert distance(row, np.asarray(alone)[0, len(text) - 1]) <= 1e-5
        for text, token in zip(texts, np.argmax(got, -1).tolist(), strict=True):
            text.append(token)
        if max(map(len, texts)) <= 96:
            session.add(np.argmax(got, -1).astype(np.int32))


def test_sizes_of_pieces_and_slots():
    for tokens in (1, 31, 32, 33, 100, 511, 512, 513, 5000):
        for most in (1, 32, 170, 512):
            sizes = pieces(tokens, most)
            assert sum(sizes) >= tokens
            assert sum(sizes) - sizes[0] < tokens
            assert all(size & (size - 1) == 0 and size >= generation.SHORTEST for size in sizes)
            assert max(sizes) <= max(most, generation.SHORTEST)
            assert sizes == sorted(sizes)
            assert slots.slots_for(sizes[0], sum(sizes) + 1) >= sizes[0]
    assert slots.slots_for(10, 40) == slots.STEP
    assert slots.slots_for(300, 10_000) == 512
    assert slots.slots_for(300, 400) == 512
    assert slots.slots_for(300, 310) == 384


def test_rows_do_not_see_each_other():
    """A row is the same, to the bit, whatever the others say; and nearly so alone."""
    spec, params = model("llama_biases")
    runs = []
    for other in ([1], [3, 1, 4, 1, 5, 9, 2, 6], [7] * 9):
        session = Session(spec, params, FLOAT32, 20)
        session.read([TEXTS[0], other, TEXTS[2]])
        session.add(np.array([1, other[0], 2], np.int32))
        runs.append(np.asarray(session.logits())[[0, 2]])
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])
    session = Session(spec, params, FLOAT32, 20)
    session.read([TEXTS[0]])
    session.add(np.array([1], np.int32))
    assert distance(session.logits(), runs[0][:1]) <= 1e-5


def test_greedy_tokens_are_those_of_the_whole_model():
    spec, params = model("llama_biases")
    session = Session(spec, params, FLOAT32, 20)
    session.read(TEXTS)
    texts = [list(text) for text in TEXTS]
    for _, ids in zip(range(8), session.tokens(Draw(), None), strict=False):
        wanted = np.argmax(without_cache(spec, params, texts), -1)
        np.testing.assert_array_equal(ids, wanted)
        for text, token in zip(texts, ids.tolist(), strict=True):
            text.append(token)


FORMATS = {
    "q": ("fp8", "fp8"),
    "k": ("int8", "int8"),
    "v": ("nvfp4", "nvfp4"),
    "out": ("fp8_channel", "fp8_token"),
    "gate": ("mxfp8", "mxfp8"),
    "up": ("int4_b32", None),
    "down": ("int8", None),
}
"""A linear of a block -> format of its weight, format of its input."""


def quantized(spec, params, rounded):
    """`params` with the linears of blocks stored as FORMATS says, inputs `rounded` or not."""
    leaves = flatten_dict(params, sep=".")
    for i, (name, (fmt, inputs)) in product(range(len(spec.blocks)), FORMATS.items()):
        at = f"{models.block_prefix(spec, i)}.{getattr(spec.names, name)}.weight"
        q = jax.jit(partial(jqx.QTensor.quantize, fmt=fmt))(leaves[at])
        if rounded and inputs is not None:
            static = jqx.config.INPUT_FORMATS[inputs].bound is not None
            scale = jnp.float32(0.02) if static else None
            q = q.replace(input_format=inputs, input_scale=scale)
        leaves[at] = q
    return unflatten_dict(leaves, sep=".")


def test_quantized_weights_with_the_cache_as_without():
    spec, params = model("llama_biases", "bfloat16", intermediate_size=64)
    for got, wanted in follow(spec, quantized(spec, params, False), TEXTS, steps=4):
        assert distance(got, wanted) <= 1e-5


def test_quantized_inputs_with_the_cache_as_without():
    """A sum in another order can move an input across a rounding boundary: most logits are as near
    as elsewhere, and none is far.
    """
    spec, params = model("llama_biases", "bfloat16", intermediate_size=64)
    pairs = follow(spec, quantized(spec, params, True), TEXTS, steps=4)
    far = [distance(a, b) for got, wanted in pairs for a, b in zip(got, wanted, strict=True)]
    assert np.median(far) <= 1e-5
    assert max(far) <= 0.1


@pytest.mark.parametrize("kv", ["fp8_affine", "nvfp4_cast"])
def test_quantized_keys_and_values(kv):
    """Kept rounded, they are what is rounded without a cache; and the rounding is not forgotten."""
    spec, params = model("llama_biases", "bfloat16", intermediate_size=64)
    plain = without_cache(spec, params, TEXTS)
    leaves = flatten_dict(params, sep=".")
    row = spec.blocks[0].attention
    for i in range(len(spec.blocks)):
        for letter in "kv" if "cast" not in kv else "":
            at = f"model.layers.{i}.self_attn.{letter}_proj.{letter}"
            leaves[f"{at}_scale"] = jnp.float32(0.01)
            if "affine" in kv:
                shape = (1, row.kv_heads, 1, row.head_dim)
                leaves[f"{at}_bias"] = jnp.full(shape, 0.1, jnp.bfloat16)
    spec, params = replace(spec, kv_cache=kv), unflatten_dict(leaves, sep=".")
    far = [distance(*pair) for pair in follow(spec, params, TEXTS, steps=4)]
    assert np.median(far) <= 1e-5
    assert max(far) <= 0.1
    assert distance(without_cache(spec, params, TEXTS), plain) > 1e-3


@pytest.mark.parametrize("compute", [BF16, COMPUTES["bf16", "accelerator"]], ids=["cpu", "native"])
def test_bf16_with_the_cache_as_without(compute):
    spec, params = model("qwen3_layer_types", "bfloat16")
    for got, wanted in follow(spec, params, TEXTS, compute, steps=3):
        assert distance(got, wanted) <= 0.05
