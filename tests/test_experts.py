# SPDX-License-Identifier: Apache-2.0
"""Blocks with experts: the three parts are the whole, experts are as written out one token at a
time, and only those that tokens chose are met.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import IDS, params_of, spec_of

from jqx import models
from jqx.models import COMPUTES, FLOAT32, Experts
from jqx.models.experts import GROUPINGS, Routed, tiles_of
from jqx.models.layers import Inside, module
from jqx.models.stores import member, stacks
from jqx.tensors import QTensor
from jqx.transforms import observe

MIXED = ("mixtral", "qwen2_moe", "granitemoe", "phimoe", "deepseek_v3", "llama4_text_listed")
MIXED += ("gpt_oss", "dbrx", "arctic")
ROWS = 40  # of one call: more than any expert has, so that one program is compiled


def block_of(case: str):
    """The last block with experts: its kind, its parameters, and states before it."""
    spec = spec_of(case)
    i = max(i for i, kind in enumerate(spec.blocks) if isinstance(kind.mlp, Experts))
    params = module(params_of(case), models.block_prefix(spec, i))
    h = jax.random.normal(jax.random.key(0), (*IDS.shape, spec.hidden))
    positions = jnp.broadcast_to(jnp.arange(IDS.shape[1])[None], IDS.shape)
    return spec, spec.blocks[i], params, h, positions


def with_leaves(params, change):
    """The tree with `change(path, leaf)` in the place of every leaf that it is not None for."""

    def new(path, leaf):
        found = change(jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        return leaf if found is None else found

    return jax.tree_util.tree_map_with_path(new, params)


@pytest.mark.parametrize("case", MIXED)
def test_a_block_is_its_front_its_experts_and_what_they_add_up_to(case):
    spec, kind, params, h, positions = block_of(case)
    wanted = models.block(spec, kind, params, h, positions)
    own = models.front_shapes(spec, kind)
    few = models.front(spec, kind, subtree(params, own), h, positions)
    total = np.zeros(few.given.x.shape, np.float32)
    each = stacks(kind.mlp, spec.names, params)
    ids, weights = np.asarray(few.given.ids), np.asarray(few.given.weights)
    for e in range(kind.mlp.number):
        rows, choice = np.nonzero(ids == e)
        fill = ROWS - len(rows)
        x = jnp.pad(few.given.x[rows], ((0, fill), (0, 0)), constant_values=jnp.nan)
        w = jnp.pad(jnp.asarray(weights[rows, choice]), (0, fill))
        real = jnp.arange(ROWS) < len(rows)
        y = np.asarray(models.expert(spec, kind, member(each, jnp.int32(e)), x, w, real))
        assert (y[len(rows) :] == 0).all()
        np.add.at(total, rows, y[: len(rows)])
    got = models.combine(spec, kind, params, few, jnp.asarray(total))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * float(jnp.std(wanted)))
    assert len(np.unique(ids)) > kind.mlp.top_k


def subtree(params, names):
    """Only these leaves."""
    tree = {}
    for name in names:
        *path, leaf = name.split(".")
        node, source = tree, params
        for part in path:
            node, source = node.setdefault(part, {}), source[part]
        node[leaf] = source[leaf]
    return tree


@pytest.mark.parametrize("case", MIXED)
def test_groups_of_rows_are_as_tiles_of_rows(case):
    """What accelerators do is what CPUs do."""
    spec, kind, params, h, positions = block_of(case)
    given = models.front(spec, kind, params, h, positions).given
    inside = Inside(spec.names, params, FLOAT32)
    inside = inside._replace(params=stacks(kind.mlp, spec.names, params))
    tiles, groups = (f(kind.mlp, inside, given) for f in GROUPINGS.values())
    np.testing.assert_allclose(tiles, groups, rtol=0, atol=1e-5 * float(jnp.std(groups)))


@pytest.mark.parametrize("rows", [1, 2, 4, 64])
@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 2, 8), (13, 2, 3), (40, 4, 5), (7, 1, 1)])
def test_every_pair_has_a_place_in_a_tile_of_its_expert(tokens, k, experts, rows):
    draw = np.random.default_rng(tokens)
    ids = np.stack([draw.permutation(experts)[:k] for _ in range(tokens)]).astype(np.int32)
    ids[: tokens // 2] = ids[0]  # some have most of the tokens
    tiles = jax.tree.map(np.asarray, tiles_of(jnp.asarray(ids), experts, rows))
    flat = ids.reshape(-1)
    assert len(set(tiles.place.tolist())) == flat.size
    for pair, place in enumerate(tiles.place):
        tile, row = divmod(int(place), rows)
        assert tiles.real[tile, row]
        assert tiles.pairs[tile, row] == pair
        assert tiles.expert[tile] == flat[pair]
    assert tiles.real.sum() == flat.size
    assert tiles.expert.max() < experts
    assert len(tiles.expert) <= flat.size


def test_one_token_meets_the_experts_it_chose_alone():
    """Spoilt matrices of all others change nothing."""
    spec, kind, params, h, positions = block_of("mixtral")
    h, positions = h[:1, :1], positions[:1, :1]
    wanted = models.block(spec, kind, params, h, positions)
    ids = np.asarray(models.front(spec, kind, params, h, positions).given.ids)

    def spoil(path, leaf):
        others = np.setdiff1d(np.arange(kind.mlp.number), ids)
        return leaf.at[others].set(jnp.nan) if "{}" in path else None

    got = models.block(spec, kind, with_leaves(params, spoil), h, positions)
    np.testing.assert_array_equal(got, wanted)
    assert np.isfinite(wanted).all()


def test_gradients_are_those_of_all_experts_written_out():
    spec, kind, params, h, positions = block_of("qwen3_moe")
    row = kind.mlp

    def in_tiles(params, x, weights):
        inside = Inside(spec.names, stacks(row, spec.names, params), FLOAT32)
        return GROUPINGS["chunks"](row, inside, Routed(x, ids, weights))

    def written_out(params, x, weights):
        own = stacks(row, spec.names, params)
        total = 0
        for e in range(row.number):
            w = {name: part["weight"][e] for name, part in own.items()}
            y = (jax.nn.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"].T
            total += y * jnp.sum(jnp.where(ids == e, weights, 0), -1, keepdims=True)
        return total

    given = models.front(spec, kind, params, h, positions).given
    ids, own = given.ids, {"mlp": {"experts": params["mlp"]["experts"]}}
    ys, back = zip(
        *(jax.vjp(f, own, given.x, given.weights) for f in (in_tiles, written_out)), strict=True
    )
    np.testing.assert_allclose(*ys, atol=1e-4)
    found = [f(jnp.cos(ys[1])) for f in back]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4", "int8"])
def test_stored_stacks_run_as_what_they_stand_for(fmt):
    spec, kind, params, h, positions = block_of("mixtral")

    def store(path, leaf):
        return QTensor.quantize(leaf, fmt, axis=-1, stack=(0,)) if "{}" in path else None

    stored = with_leaves(params, store)
    plain = jax.tree.map(
        lambda a: a.decode() if isinstance(a, QTensor) else a,
        stored,
        is_leaf=lambda a: isinstance(a, QTensor),
    )
    for t in (IDS.shape[1], 1):
        given = h[:, :t], positions[:, :t]
        got = models.block(spec, kind, stored, *given)
        wanted = models.block(spec, kind, plain, *given)
        np.testing.assert_allclose(got, wanted, atol=2e-5)
        in_groups = models.block(spec, kind, stored, *given, COMPUTES["float32", "accelerator"])
        np.testing.assert_allclose(in_groups, wanted, atol=2e-5)
    d = [
        jax.vjp(lambda h, p=p: models.block(spec, kind, p, h, positions), h)[1](h)[0]
        for p in (stored, plain)
    ]
    np.testing.assert_allclose(*d, atol=1e-4)


def test_what_experts_meet_is_observed_member_by_member():
    """Rows that fill tiles up count for nothing."""
    spec, kind, params, h, positions = block_of("mixtral")

    def run(params, h):
        return models.block(spec, kind, params, h, positions)

    def largest(use, x):
        return jnp.max(jnp.abs(x)) if use.op == "dot" else None

    _, found = jax.jit(lambda p, h: observe(run, largest)(p, h))(params, h)
    given = models.front(spec, kind, params, h, positions).given
    each, own = stacks(kind.mlp, spec.names, params), "block_sparse_moe.experts.{}"
    for e in range(kind.mlp.number):
        rows = np.nonzero((np.asarray(given.ids) == e).any(-1))[0]
        x, w = given.x[rows], member(each, jnp.int32(e))
        inner = jax.nn.silu(x @ w["gate"]["weight"].T) * (x @ w["up"]["weight"].T)
        met = {"w1": x, "w3": x, "w2": inner}
        for name, rows in met.items():
            np.testing.assert_allclose(
                found[f"{own}.{name}.weight"][e], jnp.max(jnp.abs(rows)), rtol=1e-5
            )
    assert {"self_attn.q_proj.weight", "block_sparse_moe.gate.weight"} <= set(found)
