# SPDX-License-Identifier: Apache-2.0
"""What linears have in common, and factors that move to where they cost nothing: what a model
computes stays, to rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulated import rounded

from jqx.algorithms import Linear, calibrated
from jqx.algorithms.shared import gain_scaled, rows_scaled, unified
from jqx.config import Algorithm, Choice
from jqx.formats import find_format
from jqx_interop.families import spec_from_config
from jqx_interop.folding import plan_folds

K, SIZES = 64, (24, 16, 8)
NVFP4, INT4, INT8 = (find_format(name) for name in ("nvfp4", "int4_b32", "int8"))


def f32(a):
    return np.asarray(a).astype(np.float32)


def drawn(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def scaled(seed=0, dtype="float32", **fields):
    """Linears that read one input, each with a factor of its own, and their weights before."""
    weights = [drawn(seed + i, n, K) * np.float32(i + 1) for i, n in enumerate(SIZES)]
    factors = [np.exp(drawn(seed + 10 + i, K) / 2) for i in range(len(SIZES))]
    members = [
        Linear(
            jnp.asarray(w / p[None, :], jnp.dtype(dtype)),
            pre_quant_scale=jnp.asarray(p, jnp.dtype(dtype)),
            input_amax=jnp.float32(i + 1.5),
            **fields,
        )
        for i, (w, p) in enumerate(zip(weights, factors, strict=True))
    ]
    return members, weights


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-6), ("bfloat16", 0.02)])
def test_one_factor_leaves_what_they_compute(dtype, near):
    members, weights = scaled(dtype=dtype)
    got = unified(members, fmt=INT8)
    wanted = np.mean([f32(m.pre_quant_scale) for m in members], axis=0, dtype=np.float32)
    for linear, w in zip(got, weights, strict=True):
        assert linear.weight.dtype == linear.pre_quant_scale.dtype == dtype
        np.testing.assert_allclose(f32(linear.pre_quant_scale), wanted, rtol=near)
        np.testing.assert_array_equal(f32(linear.pre_quant_scale), f32(got[0].pre_quant_scale))
        back = f32(linear.weight) * f32(linear.pre_quant_scale)
        np.testing.assert_allclose(back, w, rtol=near, atol=near / 100)
        assert linear.input_amax == 3.5


def test_weights_are_rounded_once_as_the_reference_tool_does():
    members, _ = scaled(dtype="bfloat16")
    got = unified(members, fmt=INT8)
    old = [f32(m.pre_quant_scale) for m in members]
    p = rounded((old[0] + old[1] + old[2]) / np.float32(3), jnp.bfloat16)
    np.testing.assert_array_equal(f32(got[0].pre_quant_scale), p)
    for linear, member, mine in zip(got, members, old, strict=True):
        wanted = rounded(f32(member.weight) * mine / p, jnp.bfloat16)
        np.testing.assert_array_equal(f32(linear.weight), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_members_with_the_same_factor_stay_bit_for_bit(dtype):
    members, _ = scaled(dtype=dtype)
    p = members[0].pre_quant_scale
    grids = [jnp.asarray(np.abs(drawn(5, n, K // 32))) for n in SIZES]
    alike = [m._replace(pre_quant_scale=p, amax=a) for m, a in zip(members, grids, strict=True)]
    alike = alike[:2]  # three equal numbers have a mean that may be rounded
    for linear, before in zip(unified(alike, fmt=INT4), alike, strict=True):
        for field in ("weight", "amax", "pre_quant_scale"):
            np.testing.assert_array_equal(f32(getattr(linear, field)), f32(getattr(before, field)))


def test_what_scales_reach_is_found_anew_where_a_factor_changes():
    members, _ = scaled(dtype="bfloat16")
    clipped = [m._replace(amax=jnp.ones((n, K // 32))) for m, n in zip(members, SIZES, strict=True)]
    for linear in unified(clipped, fmt=INT4):
        blocks = np.abs(f32(linear.weight)).reshape(len(linear.weight), -1, 32)
        np.testing.assert_array_equal(f32(linear.amax), blocks.max(2))
    bounded = [m._replace(tensor_amax=jnp.float32(0.5)) for m in members]
    for linear in unified(bounded, fmt=NVFP4):
        assert linear.tensor_amax == max(
            np.abs(f32(m.weight)).max() for m in unified(members, fmt=INT8)
        )


def test_tensor_scales_are_those_of_the_largest():
    members = [Linear(m.weight, input_amax=m.input_amax) for m in scaled()[0]]
    got = unified(members, fmt=NVFP4)
    most = max(np.abs(f32(m.weight)).max() for m in members)
    assert [float(m.tensor_amax) for m in got] == [most] * 3
    assert [float(m.input_amax) for m in got] == [3.5] * 3
    assert all(m.pre_quant_scale is None for m in got)
    chosen = [members[0]._replace(tensor_amax=jnp.float32(99)), *members[1:]]
    assert [float(m.tensor_amax) for m in unified(chosen, fmt=NVFP4)] == [99] * 3
    assert all(m.tensor_amax is None for m in unified(members, fmt=INT8))
    silent = [members[0]._replace(input_amax=None), *members[1:]]
    assert [m.input_amax for m in unified(silent, fmt=INT8)][0] is None


def low_rank_members(dtype):
    """Linears as SVDQuant leaves them, and their weights before."""
    weights = [jnp.asarray(drawn(i, n, K), jnp.dtype(dtype)) for i, n in enumerate(SIZES)]
    x = drawn(20, 200, K) * np.exp(drawn(21, K))
    stats = {"channel_amax": np.abs(x).max(0), "gram": x.T @ x}
    steps, members = (Algorithm.of("svdquant", lowrank=6),), []
    for i, w in enumerate(weights):  # each with a mean of its own, so that factors differ
        mean = np.abs(x).mean(0) ** (1 + i / 2)
        kinds = {
            k: jnp.asarray(v, jnp.float32) for k, v in (stats | {"channel_mean": mean}).items()
        }
        members.append(calibrated(Linear(w), kinds, fmt=NVFP4, steps=steps))
    return members, [f32(w) for w in weights]


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_low_rank_parts_share_their_inner_factor(dtype, near):
    members, weights = low_rank_members(dtype)
    got = unified(members, fmt=NVFP4)
    assert any((f32(m.pre_quant_scale) != f32(got[0].pre_quant_scale)).any() for m in members)
    inner, joint = f32(got[0].low_rank[1]), []
    for linear, w in zip(got, weights, strict=True):
        outer, mine = linear.low_rank
        assert (outer.shape, mine.shape) == ((len(w), 6), (6, K))
        assert outer.dtype == mine.dtype == linear.weight.dtype == dtype
        np.testing.assert_array_equal(f32(mine), inner)
        whole = f32(linear.weight) + f32(outer) @ inner
        joint.append(whole)
        np.testing.assert_allclose(
            whole * f32(linear.pre_quant_scale), w, atol=near * np.abs(w).max()
        )
    values = np.linalg.svd(np.concatenate(joint).astype(np.float64), compute_uv=False)
    left = np.square(np.concatenate([f32(m.weight) for m in got])).sum()
    assert left == pytest.approx(np.square(values[6:]).sum(), rel=0.01)  # no better one of rank 6


# --- factors that move


def rms(x, gain, offset=0.0):
    return x / np.sqrt(np.square(x).mean(1, keepdims=True)) * (gain + np.float32(offset))


@pytest.mark.parametrize("offset", [0, 1])
def test_a_norm_takes_a_factor(offset):
    x, gain, w = drawn(1, 9, K), drawn(2, K), drawn(3, 5, K)
    p = np.exp(drawn(4, K) / 2)
    folded = f32(gain_scaled(jnp.asarray(gain), jnp.asarray(p), plus_one=bool(offset)))
    before, after = rms(x, gain, offset) * p, rms(x, folded, offset)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after @ (w / p).T, rms(x, gain, offset) @ w.T, rtol=1e-4, atol=1e-4)


def test_a_norm_with_a_bias_takes_it_twice():
    x, gain, bias = drawn(1, 9, K), drawn(2, K), drawn(3, K)
    p = np.exp(drawn(4, K) / 2)
    parts = [f32(gain_scaled(jnp.asarray(part), jnp.asarray(p))) for part in (gain, bias)]
    np.testing.assert_allclose(x * parts[0] + parts[1], (x * gain + bias) * p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gains_are_rounded_once(dtype):
    gain, p = (jnp.asarray(np.abs(drawn(i, K)), jnp.dtype(dtype)) for i in (1, 2))
    got = gain_scaled(gain, p)
    assert got.dtype == dtype
    np.testing.assert_array_equal(f32(got), rounded(f32(gain) * f32(p), jnp.dtype(dtype)))
    got = gain_scaled(gain, p, plus_one=True)
    wanted = (f32(gain) + np.float32(1)) * f32(p) - np.float32(1)
    np.testing.assert_array_equal(f32(got), rounded(wanted, jnp.dtype(dtype)))


def test_rows_of_the_linear_before_take_a_factor():
    gate, up, down = drawn(1, 32, K), drawn(2, 32, K), drawn(3, K, 32)
    bias, p, x = drawn(4, 32), np.exp(drawn(5, 32) / 2), drawn(6, 9, K)
    before = Linear(
        jnp.asarray(up),
        amax=jnp.ones((32, 4)),
        tensor_amax=jnp.float32(9),
        input_amax=jnp.float32(2),
    )
    got = rows_scaled(before, jnp.asarray(p))
    moved = f32(gain_scaled(jnp.asarray(bias), jnp.asarray(p)))
    act = np.tanh(x @ gate.T)
    wanted = (act * (x @ up.T + bias)) @ down.T
    found = (act * (x @ f32(got.weight).T + moved)) @ (down / p[None, :]).T
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    assert got.amax is got.tensor_amax is None
    assert got.input_amax == 2
    half = Linear(jnp.asarray(up, jnp.bfloat16))
    got = rows_scaled(half, jnp.asarray(p, jnp.bfloat16))
    wanted = rounded(f32(half.weight) * f32(jnp.asarray(p, jnp.bfloat16))[:, None], jnp.bfloat16)
    np.testing.assert_array_equal(f32(got.weight), wanted)


# --- what is planned

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
AWQ = Choice(weight="int4", variant="awq")
NVFP4_AWQ = Choice(weight="nvfp4", input="nvfp4", variant="awq")
BLOCK = "model.layers.1"
QKV = tuple(f"self_attn.{letter}_proj" for letter in "qkv")
MLP = ("mlp.gate_proj", "mlp.up_proj")
ALL = (*QKV, "self_attn.o_proj", *MLP, "mlp.down_proj")


def folds(choice=AWQ, without=(), other=None, **config):
    """The plan where everything is quantized alike but `without` (or `other` in block 1)."""
    spec = spec_from_config(CONFIG | config)
    choices = {f"model.layers.{i}.{name}": choice for i in range(2) for name in ALL}
    for name in without:
        if other is None:
            del choices[f"{BLOCK}.{name}"]
        else:
            choices[f"{BLOCK}.{name}"] = other
    return plan_folds(spec, choices)


def norms_of(found, block=BLOCK):
    return {
        p.removeprefix(f"{block}."): n.removeprefix(f"{block}.")
        for p, n in found.norms.items()
        if p.startswith(block)
    }


ATTENTION = dict.fromkeys(QKV, "input_layernorm")
FEED = dict.fromkeys(MLP, "post_attention_layernorm")


def test_norms_take_the_factor_of_all_their_readers():
    found = folds()
    for i in range(2):
        assert norms_of(found, f"model.layers.{i}") == ATTENTION | FEED
    assert (dict(found.rows), found.plus_one) == ({}, frozenset())
    assert not found.keeps(f"{BLOCK}.mlp.up_proj")
    assert found.keeps(f"{BLOCK}.mlp.down_proj")
    assert found.keeps(f"{BLOCK}.self_attn.o_proj")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("other", [None, Choice(weight="int8"), Choice(weight="int4")], ids=str)
def test_a_reader_that_has_no_factor_prevents_it(name, other):
    """It would read scaled inputs."""
    found = folds(without=(name,), other=other)
    stays = (ATTENTION if name not in QKV else {}) | (FEED if name not in MLP else {})
    assert norms_of(found) == stays
    assert norms_of(found, "model.layers.0") == ATTENTION | FEED


def test_norms_that_add_one_are_known():
    found = folds(model_type="gemma", head_dim=8)
    assert norms_of(found) == ATTENTION | FEED
    assert found.plus_one == set(found.norms.values())
    assert len(found.plus_one) == 4


def test_rows_take_factors_where_the_reference_tool_does_that():
    down, out = "mlp.down_proj", "self_attn.o_proj"
    rows = {f"model.layers.{i}.{down}": f"model.layers.{i}.mlp.up_proj" for i in range(2)}
    values = {f"model.layers.{i}.{out}": f"model.layers.{i}.self_attn.v_proj" for i in range(2)}
    assert folds(NVFP4_AWQ).rows == rows | values
    shared = folds(NVFP4_AWQ, num_key_value_heads=2)  # a value feeds several heads
    assert shared.rows == rows
    assert shared.keeps(f"{BLOCK}.{out}")
    assert folds(AWQ).rows == {}  # only nvfp4
    left = folds(NVFP4_AWQ, without=("mlp.up_proj",))
    assert f"{BLOCK}.{down}" not in left.rows
    other = folds(NVFP4_AWQ, without=(down,), other=AWQ)
    assert f"{BLOCK}.{down}" not in other.rows


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_families_in_which_rows_stay(family):
    """Of those whose blocks are Llama's."""
    found = folds(NVFP4_AWQ, model_type=family, head_dim=8)
    assert bool(found.rows) == (family in ("llama", "qwen3"))
    assert norms_of(found) == ATTENTION | FEED


@pytest.mark.parametrize(
    "choice",
    [
        Choice(weight="int8", input="int8", variant="smooth"),
        Choice(weight="nvfp4", input="nvfp4", variant="svd"),
        Choice(weight="int4"),
        Choice(weight="nvfp4", input="nvfp4"),
    ],
    ids=str,
)
def test_other_factors_stay_where_they_are(choice):
    found = folds(choice)
    assert (dict(found.norms), dict(found.rows)) == ({}, {})


def test_a_model_that_is_not_known_folds_nothing():
    found = plan_folds(None, {"a": AWQ})
    assert (dict(found.norms), dict(found.rows), found.plus_one) == ({}, {}, frozenset())


def test_without_jit():
    members, _ = scaled(dtype="bfloat16")
    with jax.disable_jit():
        eager = unified(members, fmt=NVFP4)
    for mine, compiled in zip(eager, unified(members, fmt=NVFP4), strict=True):
        for field in ("weight", "pre_quant_scale", "input_amax", "tensor_amax"):
            np.testing.assert_array_equal(f32(getattr(mine, field)), f32(getattr(compiled, field)))
