# SPDX-License-Identifier: Apache-2.0
"""Experts that are searched together: each as if it were alone, whatever is beside it."""

from functools import partial
from pathlib import Path

import family_checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import jqx, snapshot
from outputs import read
from tiny_families import ONE_EACH

from jqx.algorithms import Linear, calibrated, lanes_for, of_each, stored
from jqx.config import Algorithm
from jqx.errors import InputError
from jqx.formats import find_format
from jqx_interop import together
from jqx_interop.job import prepare
from jqx_interop.settings import Settings
from jqx_interop.together import bunched
from jqx_interop.weights import linear_groups

STORED = jax.jit(stored, static_argnames="fmt")


def members(count=8, n=24, k=64, seed=0):
    """Weights [count, n, k], and statistics of inputs whose channels differ in size."""
    r = np.random.RandomState(seed)
    w = (r.standard_normal((count, n, k)) / 8).astype(jnp.bfloat16)
    x = r.standard_normal((count, 200, k)) * np.exp(r.standard_normal((count, 1, k)))
    x = x.astype(np.float32)
    stats = {
        "gram": np.einsum("eti,etj->eij", x, x),
        "channel_mean": np.abs(x).mean(1),
        "channel_amax": np.abs(x).max(1),
    }
    return Linear(w, input_amax=np.abs(x).max((1, 2))), stats


def at(tree, i):
    return jax.tree.map(lambda a: jnp.asarray(a[i]), tree)


def bits(q) -> dict[str, bytes]:
    return {
        jax.tree_util.keystr(path): np.asarray(a).tobytes()
        for path, a in jax.tree_util.tree_leaves_with_path(q)
    }


@pytest.mark.parametrize(
    ("method", "lanes"),
    [("gptq", 1), ("gptq", 4), ("awq_full", 1), ("wmse", 1), ("svdquant", 1)],
)
@pytest.mark.parametrize("fmt", ["int4_b32", "nvfp4"])
def test_each_is_as_if_it_were_alone(method: str, fmt: str, lanes: int):
    """The same codes, and scales of no other numbers than the last bits of sums. Side by side sums
    may be rounded otherwise, which here moves no code: a fault would move a part of them.
    """
    row, steps = find_format(fmt), (Algorithm.of(method),)
    linears, stats = members()
    found = of_each(linears, stats, run=calibrated, fmt=row, steps=steps, lanes=lanes)
    for i in range(8):
        alone = calibrated(at(linears, i), at(stats, i), fmt=row, steps=steps)
        wanted, got = (STORED(one._replace(facts={}), fmt=row) for one in (alone, at(found, i)))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            same = np.testing.assert_array_equal
            if a.dtype == jnp.float32:  # a scale may be a quotient of two sums
                same = partial(np.testing.assert_array_max_ulp, maxulp=4)
            same(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("lanes", [1, 4])
def test_what_is_beside_a_linear_changes_nothing(lanes: int):
    row, steps = find_format("int4_b32"), (Algorithm.of("gptq"),)
    linears, stats = members()
    given = {"run": calibrated, "fmt": row, "steps": steps, "lanes": lanes}
    found = of_each(linears, stats, **given)
    for order in (np.arange(8)[::-1], np.array([5, 5, 0, 2]), np.arange(4)):
        other = of_each(at(linears, order), at(stats, order), **given)
        assert bits(other) == bits(at(found, order))


def test_a_linear_without_a_root_spoils_no_other():
    """One whose second moments have no Cholesky root up to a large damping."""
    row, steps = find_format("int4_b32"), (Algorithm.of("gptq"),)
    linears, stats = members(count=4)
    stats["gram"] = stats["gram"].copy()
    own = np.diag(np.diagonal(stats["gram"][1]))
    stats["gram"][1] = own + 9 * (stats["gram"][1] - own)
    given = {"run": calibrated, "fmt": row, "steps": steps}
    found = of_each(linears, stats, **given, lanes=4)
    damping = np.asarray(found.facts["damping"])
    assert damping[1] > 0.01
    assert (damping[[0, 2, 3]] == np.float32(0.01)).all()
    for i in (0, 2, 3):
        alone = calibrated(at(linears, i), at(stats, i), fmt=row, steps=steps)
        assert np.array_equal(found.weight[i], alone.weight)


def test_lanes_are_for_small_loops_alone():
    gptq, awq = (Algorithm.of("gptq"),), (Algorithm.of("awq_lite"),)
    assert [lanes_for((size, size), gptq) for size in (32, 64, 128, 256, 512)] == [8, 8, 4, 1, 1]
    assert lanes_for((32, 32), awq) == 1
    linears, stats = members(count=6)
    with pytest.raises(ValueError, match="4 lanes do not divide 6 linears"):
        of_each(linears, stats, run=calibrated, fmt=find_format("int4_b32"), steps=gptq, lanes=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return family_checkpoints.write(tmp_path_factory.mktemp("moe") / "model", ONE_EACH["qwen3_moe"])


def quantized(source: Path, out: Path, *options: str) -> Path:
    done = jqx("quantize", source, out, "--calib", source.parent / "ids.npy", "--qformat", *options)
    assert done.code == 0, done.err
    return out


OPTIONS = {
    "gptq": ("int4", "--set", "block=32", "--algorithm", "gptq"),
    "awq": ("nvfp4_awq",),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_slices_change_no_byte(source: Path, tmp_path: Path, options, monkeypatch):
    wanted = snapshot(quantized(source, tmp_path / "whole", *options))
    monkeypatch.setattr(together, "SLICE", 1)
    assert snapshot(quantized(source, tmp_path / "one", *options)) == wanted
    monkeypatch.setattr(together, "SLICE", 1 << 26)
    monkeypatch.setattr(together, "SIZES", (2,))
    assert snapshot(quantized(source, tmp_path / "two", *options)) == wanted


def test_slices_are_bounded_and_whole(source: Path, monkeypatch):
    job = prepare(source, "int8_sq", Settings())
    groups = linear_groups(job, job.inventory.tensors)
    monkeypatch.setattr(together, "SIZES", (3,))
    bunches = list(bunched(job, groups))
    assert sorted(g for bunch in bunches for g in bunch) == sorted(groups)
    assert max(map(len, bunches)) == 3
    for bunch in bunches:
        assert len(bunch) == 1 or all(".experts." in path for group in bunch for path in group)
        assert len({tuple(job.modules[p].shape for p in group) for group in bunch}) == 1
    monkeypatch.setattr(together, "SLICE", 1)
    assert max(map(len, bunched(job, groups))) == 1


def test_experts_are_as_one_after_the_other(source: Path, tmp_path: Path, monkeypatch):
    """Against programs of single linears: the same codes."""
    together_ = read(quantized(source, tmp_path / "together", *OPTIONS["gptq"]))
    monkeypatch.setattr(together, "linears_of_experts", lambda spec: frozenset())
    alone = read(quantized(source, tmp_path / "alone", *OPTIONS["gptq"]))
    assert together_.keys() == alone.keys()
    changed = [name for name in alone if alone[name].tobytes() != together_[name].tobytes()]
    assert not changed


def test_statistics_that_do_not_suffice_are_named(source: Path):
    job = prepare(source, "int4_gptq", Settings(options=(("block", "32"),)))
    path = next(p for p in job.choices if ".experts." in p)
    n, k = job.modules[path].shape
    asked = {path: together.Asked(Linear(jnp.zeros((n, k), jnp.bfloat16)), {}, job.config.steps)}
    with pytest.raises(InputError, match=rf"{path}: gptq needs second moments"):
        list(together.each(job, calibrated, asked))
