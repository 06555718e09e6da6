# SPDX-License-Identifier: Apache-2.0
"""Parameters in every kind of tree are calibrated, quantized, run and decoded alike, by rules with
paths as people write them.
"""

import dataclasses
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameter_trees import LAYERS, TREES, model, nested
from zoo import Draws

import jqx
from jqx import QTensor, QuantConfig, Rule
from jqx.config import from_json, to_json
from jqx.tensors.paths import leaf_names, named_leaves

X = Draws(1)(5, 32)
BATCHES = [(X,), (2 * X,)]
ATTENTION = QuantConfig(
    rules=(
        Rule(path_glob="layers/*/attn", weight="int8", input="fp8"),
        Rule(path_glob="layers/1/attn/o_proj", weight="nvfp4", input="nvfp4"),
    )
)
KERNELS = [f"layers.{i}.attn.{name}.kernel" for i in range(LAYERS) for name in ("q_proj", "o_proj")]
each_tree = pytest.mark.parametrize("kind", TREES)
jitted_model = eqx.filter_jit(jqx.quantized(model))


def stored(x):
    return isinstance(x, QTensor)


@cache
def quantized(kind):
    """The tree, its statistics and the quantized tree."""
    params = TREES[kind](nested())
    stats = jqx.calibrate(model, params, BATCHES, ATTENTION)
    return params, stats, jqx.quantize(params, ATTENTION, stats)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if hasattr(x, "shape"):
            np.testing.assert_array_equal(x, y)
        else:
            assert x is y


@each_tree
def test_what_is_selected_becomes_a_qtensor_and_all_else_stays_itself(kind):
    params, stats, qparams = quantized(kind)
    assert type(qparams) is type(params)
    assert jax.tree.structure(qparams, is_leaf=stored) == jax.tree.structure(params)
    assert leaf_names(params) == [name for name, _ in named_leaves(qparams, stored)]
    before = dict(named_leaves(params))
    for name, x in named_leaves(qparams, stored):
        assert stored(x) if name in KERNELS else x is before[name]
    assert set(stats.entries) == set(KERNELS)


@each_tree
def test_all_trees_give_the_same_numbers(kind):
    plain_stats, plain = quantized("dict")[1:]
    _, stats, qparams = quantized(kind)
    assert stats.meta["axes"] == plain_stats.meta["axes"]
    same(stats.entries, plain_stats.entries)
    mine, theirs = (dict(named_leaves(tree, stored)) for tree in (qparams, plain))
    for name in KERNELS:
        same(mine[name], theirs[name])
    np.testing.assert_array_equal(jitted_model(qparams, X), jitted_model(plain, X))


@each_tree
def test_quantized_runs_what_is_stored(kind):
    params, stats, qparams = quantized(kind)
    got = jitted_model(qparams, X)
    faked = eqx.filter_jit(jqx.fake_quantized(model, ATTENTION, stats))(params, X)
    np.testing.assert_allclose(got, faked, rtol=1e-5, atol=1e-5)
    assert 1e-3 < np.abs(got - model(params, X)).max() < 0.5


@each_tree
def test_dequantized_is_the_tree_again(kind):
    params, _, qparams = quantized(kind)
    dense = jqx.dequantize(qparams)
    assert jax.tree.structure(dense) == jax.tree.structure(params)
    before = dict(named_leaves(params))
    for name, x in named_leaves(dense):
        if name in KERNELS:
            assert x.dtype == before[name].dtype
            assert 0 < np.abs(x - before[name]).max() < 0.1
        else:
            assert x is before[name]
    same(eqx.filter_jit(jqx.dequantize)(qparams), dense)


@each_tree
def test_qtensors_survive_whatever_is_done_to_trees(kind):
    _, _, qparams = quantized(kind)
    leaves, structure = jax.tree.flatten(qparams)
    same(jax.tree.unflatten(structure, leaves), qparams)
    same(eqx.filter_jit(lambda tree: tree)(qparams), qparams)
    same(eqx.combine(*eqx.partition(qparams, eqx.is_array)), qparams)
    halves = [jax.tree.map(lambda x: x, qparams) for _ in range(2)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs) if eqx.is_array(xs[0]) else xs[0], *halves)
    each = eqx.filter_vmap(jitted_model, in_axes=(eqx.if_array(0), None))(stacked, X)
    np.testing.assert_allclose(each[1], jitted_model(qparams, X), rtol=1e-5, atol=1e-5)


GLOBS = {
    "layers/*/attn/q_proj": KERNELS[::2],
    "layers.*.attn.q_proj": KERNELS[::2],
    "layers/*/attn/q_proj/kernel": KERNELS[::2],
    "*q_proj*": KERNELS[::2],
    "*/attn": KERNELS,
    "layers/1": KERNELS[2:],
    "layers.[1-9].attn.?_proj": KERNELS[2:],
    "layers/0/attn/o_proj/kernel": KERNELS[1:2],
    "lm_head": ["lm_head.kernel"],
    "*": [*KERNELS, "lm_head.kernel"],
}


def selected(params, config, **given):
    qparams = jqx.quantize(params, config, **given)
    return {name: x.format.name for name, x in named_leaves(qparams, stored) if stored(x)}


@pytest.mark.parametrize("glob", GLOBS)
@pytest.mark.parametrize("kind", ["params", "dataclass"])
def test_paths_as_people_write_them(kind, glob):
    params = quantized(kind)[0]
    config = QuantConfig(rules=(Rule(path_glob=glob, weight="int8"),))
    found = selected(params, config, axes=jqx.axes(model, params, X))
    assert found == dict.fromkeys(GLOBS[glob], "int8")


@pytest.mark.parametrize("kind", ["dict", "Equinox module"])
def test_a_recipe_by_name_and_as_a_configuration(kind):
    params = quantized(kind)[0]
    stats = jqx.calibrate(model, params, BATCHES, "nvfp4")
    want = dict.fromkeys(KERNELS, "nvfp4")
    config = jqx.RECIPES["nvfp4"].config
    same(jqx.quantize(params, "nvfp4", stats), jqx.quantize(params, config, stats))
    assert selected(params, "NVFP4_DEFAULT_CFG", stats=stats) == want
    assert selected(params, from_json(to_json(config)), stats=stats) == want
    more = (*config.rules, Rule(path_glob="lm_head", weight="fp8_block", input=None))
    everywhere = dataclasses.replace(config, rules=more)
    assert selected(params, everywhere, stats=stats)["lm_head.kernel"] == "fp8_block"


def test_a_low_rank_pair_learns_beside_a_quantized_base():
    def adapted(params, x):
        base, (a, b) = params["base"], params["pair"]
        return model(base, x + (x @ a) @ b)

    base, _, qbase = quantized("nnx.State")
    draw = Draws(2)
    pair = (draw.weight(32, 4), draw.weight(4, 32))

    def loss(f, base):
        return lambda pair: jnp.sum(jnp.square(f({"base": base, "pair": pair}, X)))

    mine = jax.grad(loss(jqx.quantized(adapted), qbase))(pair)
    assert [x.shape for x in mine] == [(32, 4), (4, 32)]
    exact = jax.grad(loss(adapted, base))(pair)
    for got, near in zip(mine, exact, strict=True):
        assert 0 < np.abs(got - near).max() < 0.2 * np.abs(near).max()
