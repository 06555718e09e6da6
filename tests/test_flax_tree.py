# SPDX-License-Identifier: Apache-2.0
"""The parameter tree is an ordinary Flax tree: Linen, NNX, optax, orbax and serialization take it
unmodified.
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import reference
from flax import nnx, serialization
from flax.traverse_util import flatten_dict, unflatten_dict

from jqx import InputError, QTensor, observe, quantized
from jqx.config import KV_FORMATS
from jqx.models import BF16, FLOAT32, block, forward, param_shapes
from jqx.models.linen import CausalLM, init_params
from jqx_interop.families import spec_from_config

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}
SPEC = spec_from_config(CONFIG)
MODEL = CausalLM(SPEC)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 9)), jnp.int32)


@pytest.fixture(scope="module")
def params():
    return init_params(SPEC, jax.random.key(0))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_linen_init_draws_the_checkpoints_tree(params):
    drawn = MODEL.init(jax.random.key(0), IDS)
    assert set(drawn) == {"params"}
    same(drawn["params"], params)
    flat = flatten_dict(params, sep=".")
    assert {name: leaf.shape for name, leaf in flat.items()} == param_shapes(SPEC)
    weights = np.concatenate([np.ravel(x) for n, x in flat.items() if n.endswith("proj.weight")])
    assert abs(weights.std() - 0.3) < 0.01
    assert np.all(flat["model.layers.1.self_attn.q_proj.bias"] == 0)
    assert np.all(flat["model.norm.weight"] == 1)


def test_fresh_norms_change_nothing_whatever_they_store():
    gemma = spec_from_config(CONFIG | {"model_type": "gemma", "head_dim": 8})
    assert np.all(np.asarray(init_params(gemma, jax.random.key(0))["model"]["norm"]["weight"]) == 0)


def test_linen_apply_is_forward(params):
    logits = MODEL.apply({"params": params}, IDS)
    assert logits.shape == (2, 9, 32)
    np.testing.assert_array_equal(logits, forward(SPEC, params, IDS))
    jitted = jax.jit(MODEL.apply)({"params": params}, IDS)
    np.testing.assert_allclose(jitted, logits, atol=1e-5)
    rounded = CausalLM(SPEC, BF16).apply({"params": params}, IDS)
    np.testing.assert_array_equal(rounded, forward(SPEC, params, IDS, BF16))


def test_linen_refuses_a_tree_of_other_shapes(params):
    wrong = jax.tree.map(lambda x: x, params)
    wrong["lm_head"]["weight"] = jnp.zeros((31, 16))
    message = r"^lm_head.weight has the shape \(31, 16\), and the model needs one of \(32, 16\)"
    with pytest.raises(InputError, match=message):
        MODEL.apply({"params": wrong}, IDS)
    del wrong["lm_head"]["weight"]
    with pytest.raises(InputError, match=r"^lm_head.weight is missing, .* one of \(32, 16\)"):
        MODEL.apply({"params": wrong}, IDS)
    with pytest.raises(InputError, match=r"^model.embed_tokens.weight is missing"):
        MODEL.apply({"params": {"lm_head": wrong["lm_head"]}}, IDS)


def test_linen_takes_leaves_in_boxes(params):
    """As `nn.with_partitioning` leaves them."""
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), params)
    np.testing.assert_array_equal(MODEL.apply({"params": boxed}, IDS), forward(SPEC, params, IDS))


@partial(jax.jit, static_argnames="weight")
def stored(params, weight="fp8_channel", **fields):
    """The tree with its projections as QTensors."""

    def store(path, x):
        if "proj" not in jax.tree_util.keystr(path) or x.ndim != 2:
            return x
        return QTensor.quantize(x, weight).replace(**fields)

    return jax.tree_util.tree_map_with_path(store, params)


def decoded(tree):
    is_stored = {"is_leaf": lambda x: isinstance(x, QTensor)}
    return jax.tree.map(lambda x: x.decode() if isinstance(x, QTensor) else x, tree, **is_stored)


def test_linen_runs_stored_weights(params):
    tree = stored(params)
    assert isinstance(tree["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"], QTensor)
    logits = MODEL.apply({"params": tree}, IDS)
    np.testing.assert_array_equal(logits, forward(SPEC, tree, IDS))
    np.testing.assert_allclose(logits, forward(SPEC, jax.jit(decoded)(tree), IDS), atol=1e-5)
    assert np.abs(logits - forward(SPEC, params, IDS)).max() > 1e-3
    wrong = jax.tree.map(lambda x: x, tree)
    attention = wrong["model"]["layers"]["1"]["self_attn"]
    attention["q_proj"] = {"weight": attention["v_proj"]["weight"]}
    with pytest.raises(InputError, match=r"1.self_attn.q_proj.weight has the shape \(8, 16\)"):
        MODEL.apply({"params": wrong}, IDS)


def test_linen_quantizes_inputs_as_the_weights_say(params):
    """In the program of a whole model, and under grad: only the inputs of stored weights."""
    tree = stored(params)
    named = jax.tree.map(
        lambda q: q.replace(input_format="fp8_token") if isinstance(q, QTensor) else q,
        tree,
        is_leaf=lambda x: isinstance(x, QTensor),
    )
    found = jax.jit(lambda p, ids: observe(MODEL.apply, _input)({"params": p}, ids))
    plain, seen = found(jax.jit(decoded)(tree), IDS)
    logits = jax.jit(MODEL.apply)({"params": named}, IDS)
    assert np.abs(logits - plain).max() > 1e-3
    x = seen["model.layers.0.self_attn.q_proj.weight"]
    first = jnp.asarray(reference.activation(np.asarray(x), "fp8_token"))
    q = tree["model"]["layers"]["0"]["self_attn"]["q_proj"]["weight"]
    run = jax.jit(quantized(lambda q, x: x @ q.T))
    got = run(q.replace(input_format="fp8_token"), x)
    np.testing.assert_allclose(got, first @ q.decode().T, atol=1e-5)

    def loss(norm):
        model = {**named["model"], "norm": {"weight": norm}}
        return MODEL.apply({"params": {**named, "model": model}}, IDS).sum()

    gradient = jax.jit(jax.grad(loss))(named["model"]["norm"]["weight"])
    assert np.abs(gradient).min() > 0


def _input(use, x):
    return x if use.op == "dot" else None


@pytest.mark.parametrize("cache", ["fp8", "fp8_cast", "nvfp4_affine"])
def test_keys_and_values_are_rounded_with_the_scales_beside_their_projections(params, cache):
    row = KV_FORMATS[cache]
    wide = spec_from_config(CONFIG | {"head_dim": 16})
    spec = dataclasses.replace(wide, kv_cache=cache)
    tree = init_params(wide, jax.random.key(3))
    beside = {
        "k": {"k_scale": jnp.float32(0.003), "k_bias": jnp.full((1, 1, 1, 16), 0.25)},
        "v": {"v_scale": jnp.float32(0.002), "v_bias": jnp.full((1, 1, 1, 16), -0.5)},
    }
    wanted = {"scale": not row.cast, "bias": row.affine}
    for letter, leaves in beside.items():
        kept = {name: x for name, x in leaves.items() if wanted[name[2:]]}
        tree["model"]["layers"]["0"]["self_attn"][f"{letter}_proj"] |= kept
    block_tree = tree["model"]["layers"]["0"]
    h = jax.random.normal(jax.random.key(1), (2, 5, 16))
    positions = jnp.broadcast_to(jnp.arange(5)[None], (2, 5))

    def seen(spec):
        run = partial(block, spec, spec.blocks[0], positions=positions)
        what = observe(lambda p, h: run(p, h), lambda use, x: x if use.op == "name" else None)
        return jax.jit(what)(block_tree, h)

    (plain, before), (rounded, after) = seen(wide), seen(spec)
    for letter, leaves in beside.items():
        given = {n[2:]: np.asarray(x) for n, x in leaves.items() if wanted[n[2:]]}
        defined = reference.cached(np.asarray(before[f"self_attn.{letter}"]), cache, **given)
        np.testing.assert_allclose(after[f"self_attn.{letter}"], defined, rtol=1e-6, atol=1e-7)
    assert np.abs(plain - rounded).max() > 1e-4


def test_flatten_and_unflatten(params):
    flat = flatten_dict(params, sep=".")
    assert "model.layers.0.self_attn.q_proj.weight" in flat
    same(unflatten_dict(flat, sep="."), params)


def test_serialization_round_trip(params):
    same(serialization.from_bytes(params, serialization.to_bytes(params)), params)


def test_orbax_round_trip(params, tmp_path):
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "tree", params)
        saver.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, params)
        same(saver.restore(tmp_path / "tree", abstract), params)


@pytest.mark.parametrize("compute", [FLOAT32, BF16], ids=["float32", "bf16"])
def test_optax_trains_it(params, compute):
    """Rounding to bfloat16 has the gradient of a cast, not that of its bits."""
    optimizer = optax.adam(1e-2)
    model = CausalLM(SPEC, compute)

    @jax.jit
    def step(params, state):
        def loss_of(params):
            logits = model.apply({"params": params}, IDS[:, :-1])
            wanted = IDS[:, 1:]
            return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

        loss, gradient = jax.value_and_grad(loss_of)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
            update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(6):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


def test_nnx_bridge_takes_the_module_and_the_tree(params):
    bridged = nnx.bridge.ToNNX(MODEL, rngs=nnx.Rngs(1))
    bridged.lazy_init(IDS)
    graph, state, rest = nnx.split(bridged, nnx.Param, ...)
    assert jax.tree.structure(nnx.to_pure_dict(state)) == jax.tree.structure(params)
    nnx.replace_by_pure_dict(state, params)
    np.testing.assert_array_equal(nnx.merge(graph, state, rest)(IDS), forward(SPEC, params, IDS))
