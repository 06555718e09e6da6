# SPDX-License-Identifier: Apache-2.0
"""The decoder against transformers: logits of tiny random models, drawn by name, made by
golden/make_models.py.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from golden import make_models as golden
from jax.extend.core import jaxprs_in_params

from jqx import models
from jqx.models import BF16, COMPUTES, FLOAT32
from jqx.models.attention import ATTENTIONS, Sight
from jqx_interop.families import spec_from_config

CASES = list(golden.CASES)
IDS = jnp.asarray(golden.token_ids(), jnp.int32)
jitted_forward = jax.jit(models.forward, static_argnames=("spec", "compute"))


@pytest.fixture(scope="module")
def recorded():
    with np.load(golden.FIXTURE) as arrays:
        return dict(arrays)


@cache
def spec_of(case):
    return spec_from_config(golden.CASES[case])


@cache
def params_of(case, dtype="float32"):
    shapes = models.param_shapes(spec_of(case))
    leaves = {name: jnp.asarray(golden.weight(name, s), dtype) for name, s in shapes.items()}
    return unflatten_dict(leaves, sep=".")


def distance(got, wanted):
    """Largest difference over the spread of the wanted logits."""
    return np.max(np.abs(np.asarray(got) - wanted)) / np.std(wanted)


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_equal_transformers(case, recorded):
    logits = models.forward(spec_of(case), params_of(case), IDS)
    assert logits.dtype == jnp.float32
    assert distance(logits, recorded[f"{case}|float32"]) <= 3e-5  # measured: 1.1e-5 at most


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_equal_transformers_live(case):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    logits = models.forward(spec_of(case), params_of(case), IDS)
    assert distance(logits, golden.peer_logits(golden.CASES[case], "float32")) <= 3e-5


@pytest.mark.parametrize("case", CASES)
def test_bf16_rounds_where_torch_rounds(case, recorded):
    """Rounding after every operation halves the distance to torch's bfloat16; only its fast exp is
    not reproduced.
    """
    wanted = recorded[f"{case}|bfloat16"].view(ml_dtypes.bfloat16).astype(np.float32)
    rounded = models.forward(spec_of(case), params_of(case, "bfloat16"), IDS, BF16)
    unrounded = recorded[f"{case}|float32"]
    off, at_most = (np.mean(np.abs(x - wanted)) for x in (np.asarray(rounded), unrounded))
    assert off < 0.6 * at_most


@pytest.mark.parametrize("case", ["gemma", "qwen3_layer_types"])
def test_native_bf16_equals_rounded_float32(case):
    """Two carriers of the same values; a CPU sums their products in different orders."""
    params = params_of(case, "bfloat16")
    native = models.forward(spec_of(case), params, IDS, COMPUTES["bf16", "accelerator"])
    rounded = np.asarray(models.forward(spec_of(case), params, IDS, BF16))
    assert np.mean(np.asarray(native) == rounded) > 0.5
    assert distance(native, rounded) < 0.05


@pytest.mark.parametrize(
    ("case", "compute"),
    [("llama_dynamic_old_layout", FLOAT32), ("qwen3_layer_types", BF16)],
    ids=["dynamic", "qwen3-bf16"],
)
def test_one_program_equals_block_by_block(case, compute):
    params, spec = params_of(case, "bfloat16"), spec_of(case)
    whole = jitted_forward(spec, params, IDS, compute)
    assert distance(whole, np.asarray(models.forward(spec, params, IDS, compute))) <= 1e-5


@pytest.mark.parametrize("case", ["llama_biases", "gemma"])
def test_jit_equals_eager(case):
    ids = IDS[:1, :3]
    with jax.disable_jit():
        eager = models.forward(spec_of(case), params_of(case), ids)
    assert distance(models.forward(spec_of(case), params_of(case), ids), np.asarray(eager)) <= 1e-5


def test_left_padding_changes_nothing_for_the_tokens(recorded):
    case = "qwen2_window_from_1"
    mask = golden.padding_mask()
    positions = models.positions_of(jnp.asarray(mask))
    got = models.forward(spec_of(case), params_of(case), IDS, FLOAT32, positions)
    assert distance(np.asarray(got)[mask], recorded[f"{case}|padded"][mask]) <= 3e-5
    pad = golden.PADDING[0]
    alone = models.forward(spec_of(case), params_of(case), IDS[:1, pad:])
    assert distance(got[:1, pad:], np.asarray(alone)) <= 3e-5


def attention_by_definition(row, q, k, v, seen):
    """Softmax attention, one query at a time."""
    b, h, g, t, _ = q.shape
    out = np.zeros_like(q)
    for i, j, m, n in np.ndindex(b, h, g, t):
        first = 0 if row.window is None else max(0, n - row.window + 1)
        keys = [e for e in range(first, n + 1) if seen[i, e]]
        scores = row.scale * (k[i, j, keys] @ q[i, j, m, n])
        weights = np.exp(scores - scores.max())
        out[i, j, m, n] = weights @ v[i, j, keys] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 1, 140])
@pytest.mark.parametrize("form", list(ATTENTIONS))
def test_attention_follows_the_definition(form, window):
    """Lengths that chunks do not divide, windows within a chunk and across chunks, grouped heads,
    padding.
    """
    t, row = 300, replace(spec_of("mistral_full").blocks[0].attention, window=window, scale=0.3)
    draw = np.random.default_rng(1)
    q = draw.standard_normal((2, 2, 2, t, 4), np.float32)
    k, v = draw.standard_normal((2, 2, 2, t, 4), np.float32)
    seen = np.arange(t)[None] >= np.array([[0], [3]])
    attend = jax.jit(partial(ATTENTIONS[form], row, compute=FLOAT32))
    heads = [a.reshape(4, *a.shape[2:]) for a in (q, k, v)]
    real = np.repeat(seen, 2, axis=0)
    got = np.asarray(attend(*heads, Sight(real))).reshape(q.shape)
    wanted = attention_by_definition(row, q[:1], k[:1], v[:1], seen[:1])
    np.testing.assert_allclose(got[:1], wanted, atol=3e-6)
    wanted = attention_by_definition(
        row, q[1:, ..., 3:, :], k[1:, :, 3:], v[1:, :, 3:], seen[1:, 3:]
    )
    np.testing.assert_allclose(got[1:, ..., 3:, :], wanted, atol=3e-6)
    late = attend(heads[0][:, :, 100:240], *heads[1:], Sight(real, np.int32(100)))
    np.testing.assert_allclose(late.reshape(*q.shape[:3], 140, 4), got[..., 100:240, :], atol=3e-6)


def named_values(jaxpr, found):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name":
            found[eqn.params["name"]] = eqn.outvars[0].aval.shape
        for inner in jaxprs_in_params(eqn.params):
            named_values(inner, found)
    return found


def test_keys_and_values_are_named_and_can_be_projected_alone():
    case = "qwen3_layer_types"
    spec, params = spec_of(case), params_of(case)
    kind, block_params = spec.blocks[0], params["model"]["layers"]["0"]
    h, positions = models.embed(spec, params, IDS), jnp.broadcast_to(jnp.arange(24)[None], (2, 24))
    run = partial(models.block, spec, kind)
    jaxpr = jax.make_jaxpr(run)(block_params, h, positions).jaxpr
    shape = (2, kind.attention.kv_heads, 24, kind.attention.head_dim)
    assert named_values(jaxpr, {}) == {"self_attn.k": shape, "self_attn.v": shape}

    x = models.layers.norm(kind.norm, block_params["input_layernorm"], h, FLOAT32)
    k, v = models.project_kv(spec, kind, block_params, x, positions)
    assert k.shape == v.shape == shape
    weight = np.asarray(block_params["self_attn"]["v_proj"]["weight"])
    bias = np.asarray(block_params["self_attn"]["v_proj"]["bias"])
    by_hand = np.asarray(x) @ weight.T + bias
    np.testing.assert_allclose(
        np.asarray(v).transpose(0, 2, 1, 3).reshape(2, 24, -1), by_hand, atol=1e-5
    )
    lengths = np.linalg.norm(np.asarray(k), axis=-1)  # a rotation keeps them, position 0 keeps all
    at_zero = models.project_kv(spec, kind, block_params, x, jnp.zeros_like(positions))[0]
    np.testing.assert_allclose(lengths, np.linalg.norm(np.asarray(at_zero), axis=-1), rtol=1e-5)
    assert not np.allclose(np.asarray(k)[:, :, 5:], np.asarray(at_zero)[:, :, 5:], atol=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_listed_as_checkpoints_list_them(case, recorded):
    """Same names, same order: layer 2 before layer 10. A tied model lists no head, though
    state_dict shows one.
    """
    spec = spec_of(case)
    wanted = [str(name) for name in recorded[f"{case}|names"]]
    if spec.tied:
        assert models.is_ignored(spec, wanted.pop())
    assert list(models.param_shapes(spec)) == wanted
    assert not any(models.is_ignored(spec, name) for name in wanted)


def test_layers_run_in_order_not_sorted():
    """Twelve layers whose tree lists 0, 1, 10, 11, 2 compute the same."""
    case = "llama_12_layers"
    spec, flat = spec_of(case), flatten_dict(params_of(case), sep=".")
    shuffled = unflatten_dict({name: flat[name] for name in sorted(flat)}, sep=".")
    assert list(shuffled["model"]["layers"])[:4] == ["0", "1", "10", "11"]
    logits = models.forward(spec, shuffled, IDS[:1, :6])
    wanted = np.asarray(models.forward(spec, params_of(case), IDS[:1, :6]))
    np.testing.assert_array_equal(np.asarray(logits), wanted)
    assert [models.block_prefix(spec, i) for i in (2, 10)] == ["model.layers.2", "model.layers.10"]


def test_linears_of_a_block_and_what_shares_an_input():
    spec = spec_of("llama_biases")
    assert models.kinds(spec) == spec.blocks
    groups = models.input_groups(spec, spec.blocks[0])
    assert [len(group) for group in groups] == [3, 1, 2, 1]
    in_order = [
        name.removesuffix(".weight")
        for name, s in models.block_shapes(spec, spec.blocks[0]).items()
        if len(s) == 2
    ]
    assert list(models.linears(spec, spec.blocks[0])) == in_order


def test_buffers_of_old_checkpoints_are_ignored():
    untied = spec_of("llama_biases")
    assert models.is_ignored(untied, "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not models.is_ignored(untied, "lm_head.weight")
    assert models.is_ignored(spec_of("gemma"), "lm_head.weight")


def test_embedding_scale_is_rounded_to_the_weight_dtype():
    """sqrt(24) is 4.899 in float32 and 4.90625 in bfloat16, in which early and late checkpoints are
    kept.
    """
    spec = spec_of("gemma")
    for dtype, scale in (("float32", np.float32(np.sqrt(24))), ("bfloat16", 4.90625)):
        params = params_of("gemma", dtype)
        got = np.asarray(models.embed(spec, params, IDS))
        rows = np.asarray(params["model"]["embed_tokens"]["weight"], np.float32)[np.asarray(IDS)]
        np.testing.assert_array_equal(got, rows * np.float32(scale))
