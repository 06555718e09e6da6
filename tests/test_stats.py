# SPDX-License-Identifier: Apache-2.0
"""Statistics as a pytree, their merging and flat form, and the names of the leaves of a tree."""

import json
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.linen import Partitioned
from hypothesis import given
from hypothesis import strategies as st

from jqx import InputError
from jqx.tensors import paths
from jqx.tensors.stats import KINDS, Stats, from_flat, merge, to_flat

# Whole numbers, so that sums are exact in any order.
numbers = st.integers(-1000, 1000).map(np.float32)
entries = st.dictionaries(
    st.sampled_from(["a.weight", "b.weight", "c"]),
    st.dictionaries(
        st.sampled_from([n for n, kind in KINDS.items() if kind.merge in ("max", "sum")]),
        numbers,
        min_size=1,
    ),
)


def plain(stats):
    return {p: {k: float(v) for k, v in kinds.items()} for p, kinds in stats.entries.items()}


def defined(*runs):
    """Merging as the kinds say, on plain numbers."""
    out = {}
    for run in runs:
        for path, kinds in run.items():
            for kind, value in kinds.items():
                old = out.setdefault(path, {}).get(kind)
                together = max if KINDS[kind].merge == "max" else (lambda a, b: a + b)
                out[path][kind] = float(value if old is None else together(old, value))
    return out


@given(entries, entries, entries)
def test_merging_is_associative_and_free_of_order(a, b, c):
    x, y, z = Stats.of(a), Stats.of(b), Stats.of(c)
    want = defined(a, b, c)
    assert plain(merge(merge(x, y), z)) == want
    assert plain(merge(x, merge(y, z))) == want
    assert plain(merge(z, merge(y, x))) == want


def test_merging_under_jit():
    a = Stats.of({"w": {"channel_amax": np.float32([1, 5, np.nan]), "tokens": np.int32(3)}}, seed=1)
    b = Stats.of({"w": {"channel_amax": np.float32([4, 2, 9]), "tokens": np.int32(4)}}, seed=1)
    for run in (merge, jax.jit(merge)):
        out = run(a, b)
        np.testing.assert_array_equal(out.get("w", "channel_amax"), np.float32([4, 5, np.nan]))
        assert int(out.get("w", "tokens")) == 7
        assert out.meta == {"seed": 1}


ORDERED = ["channel_mean", "histogram", "histogram_width", "affine_bias", "affine_amax"]


@pytest.mark.parametrize("kind", ORDERED)
def test_what_depends_on_the_order_of_batches_is_not_merged(kind):
    one = Stats.of({"w": {kind: np.float32(1)}})
    with pytest.raises(InputError, match=f"{kind} of w depends on the order"):
        merge(one, one)


def test_rows_are_put_one_after_the_other():
    runs = [Stats.of({"w": {"root": np.full((n, 3), n, np.float32)}}) for n in (1, 2, 4)]
    a, b, c = runs
    wanted = np.repeat(np.float32([1, 2, 4]), [1, 2, 4])[:, None] * np.ones(3, np.float32)
    for out in (merge(merge(a, b), c), merge(a, merge(b, c)), jax.jit(merge)(merge(a, b), c)):
        np.testing.assert_array_equal(out.get("w", "root"), wanted)
    other = merge(c, merge(b, a)).get("w", "root")
    np.testing.assert_array_equal(other.T @ other, wanted.T @ wanted)
    with pytest.raises(InputError, match=r"root of w has shape \(1, 3\).*\(1, 4\)"):
        merge(a, Stats.of({"w": {"root": np.ones((1, 4), np.float32)}}))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"k": {"affine_bias": 1.0}}, {"k": {"affine_bias": 1.0}}, "affine_bias of k depends"),
        ({"k": {"affine_amax": 1.0}}, {"k": {"affine_amax": 1.0}}, "affine_amax of k depends"),
        ({"w": {"amax": np.ones(2)}}, {"w": {"amax": np.ones(3)}}, r"amax of w.*\(2,\).*\(3,\)"),
    ],
)
def test_what_cannot_be_merged_is_refused(a, b, message):
    with pytest.raises(InputError, match=message):
        merge(Stats.of(a), Stats.of(b))
    assert merge(Stats.of(a), Stats.of({})).entries == a


def test_runs_with_different_facts_are_not_merged():
    with pytest.raises(InputError, match="length is 512 and 64"):
        merge(Stats.of({}, length=512, model="m"), Stats.of({}, length=64))
    assert merge(Stats.of({}, a=1), Stats.of({}, b=[2])).meta == {"a": 1, "b": [2]}


def test_stats_are_a_pytree():
    stats = Stats.of({"w": {"amax": np.float32(2)}, "v": {"amax": np.float32(3)}}, data="text")
    twice = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(stats)
    assert plain(twice) == {"w": {"amax": 4}, "v": {"amax": 6}}
    assert twice.meta == {"data": "text"}
    assert len(jax.tree.leaves(stats)) == 2


def test_asking_for_what_is_not_there_says_what_is():
    stats = Stats.of({"up.weight": {"amax": np.float32(2)}})
    assert stats.get("up.weight", "amax") == 2
    with pytest.raises(
        InputError, match=r"No statistics for ip\.weight.*nearest name is up\.weight"
    ):
        stats.get("ip.weight", "amax")
    with pytest.raises(InputError, match=r"up\.weight has amax but no channel_amax"):
        stats.get("up.weight", "channel_amax")
    with pytest.raises(InputError, match="'amx' is no kind.*'amax'"):
        Stats.of({"w": {"amx": 1.0}})


def test_the_flat_form_goes_through_json_and_back():
    kinds = {
        "amax": np.float32(1.5),
        "affine_bias": np.ones((1, 2, 1, 4), jnp.bfloat16),
        "tokens": np.int32(7),
    }
    stats = Stats.of({"model.layers.10.w": kinds, "k": {"amax": np.float32(np.nan)}}, ids=[1, 2])
    arrays, metadata = to_flat(stats)
    assert set(arrays) == {f"model.layers.10.w|{k}" for k in kinds} | {"k|amax"}
    back = from_flat(arrays, json.loads(json.dumps(metadata)))
    assert back.meta == stats.meta
    assert jax.tree.structure(back) == jax.tree.structure(stats)
    for mine, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(stats), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(InputError, match="jqx_stats is 2"):
        from_flat(arrays, {**metadata, "jqx_stats": 2})
    with pytest.raises(InputError, match="'w' is not named"):
        from_flat({"w": 1}, metadata)


TREE = {
    "model": {
        "layers": {str(i): {"up": {"weight": i}, "norm": {"weight": -i}} for i in (10, 2, 0)},
        "embed": {"weight": 7},
    }
}
NATURAL = [
    "model.embed.weight",
    *(f"model.layers.{i}.{part}.weight" for i in (0, 2, 10) for part in ("norm", "up")),
]


@pytest.mark.parametrize(
    "tree", [TREE, {"params": TREE}, FrozenDict(TREE), FrozenDict({"params": TREE})]
)
def test_names_of_a_nested_mapping(tree):
    named = paths.flatten(tree)
    assert list(named) == NATURAL
    assert named["model.layers.10.up.weight"] == 10
    assert paths.unflatten(named) == TREE
    order = ["model.layers.2.up.weight", "no.such.name", "model.embed.weight"]
    assert list(paths.flatten(tree, order)) == [
        "model.layers.2.up.weight",
        *(n for n in NATURAL if n != "model.layers.2.up.weight"),
    ]
    assert sorted(paths.leaf_names(tree)) == sorted(NATURAL)


def test_a_tree_that_only_contains_params_keeps_its_names():
    tree = {"params": {"w": 1}, "batch_stats": {"mean": 2}}
    assert paths.strip(tree) is tree
    assert paths.leaf_names(tree) == ["batch_stats.mean", "w"]
    assert paths.strip({"params": 3}) == {"params": 3}


def test_boxes_and_sequences_in_names():
    tree = {"w": Partitioned(jnp.ones(2), names=("a",)), "value": [1, (2, 3)]}
    assert paths.leaf_names(tree) == ["value.0", "value.1.0", "value.1.1", "w"]
    pair = namedtuple("Pair", ("key", "value"))
    assert paths.leaf_names({"w": pair(1, 2)}) == ["w.key", "w.value"]
    assert paths.leaf_names({"w": pair({"a": 1}, 2)}) == ["w.key.a", "w.value"]


@pytest.mark.parametrize("names", [["a", "a.b"], ["a.b", "a"], ["a.b", "a.b.c"], ["a", "a.b.c"]])
def test_a_name_inside_another_is_refused(names):
    with pytest.raises(InputError, match="leaf"):
        paths.unflatten(dict.fromkeys(names, 0))


def test_a_leaf_may_itself_be_a_dict_when_rebuilding():
    with pytest.raises(InputError, match="leaf"):
        paths.unflatten({"a": {"x": 1}, "a.b": 2})


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("*", NATURAL),
        ("*norm*", [n for n in NATURAL if "norm" in n]),
        ("model.layers.?.up.weight", ["model.layers.0.up.weight", "model.layers.2.up.weight"]),
        ("*.[01]*.up.*", ["model.layers.0.up.weight", "model.layers.10.up.weight"]),
        ("model", []),
        ("MODEL*", []),
    ],
)
def test_globs_match_whole_dotted_names(pattern, hits):
    assert paths.select(NATURAL, pattern) == hits


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=6, unique=True))
def test_numbers_in_names_sort_as_numbers(numbers):
    names = [f"layers.{n}.w" for n in numbers]
    assert sorted(names, key=paths.natural_key) == [f"layers.{n}.w" for n in sorted(numbers)]
    joined = [f"Dense_{n}.kernel" for n in numbers]
    assert sorted(joined, key=paths.natural_key) == [f"Dense_{n}.kernel" for n in sorted(numbers)]
