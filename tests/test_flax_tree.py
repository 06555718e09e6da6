# SPDX-License-Identifier: Apache-2.0
"""The parameter tree is an ordinary Flax tree: Linen, NNX, optax, orbax and serialization take it
unmodified.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.traverse_util import flatten_dict, unflatten_dict

from jqx.models import BF16, FLOAT32, forward, param_shapes
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
    with pytest.raises(Exception, match="shape"):
        MODEL.apply({"params": wrong}, IDS)


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
