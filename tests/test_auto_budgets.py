# SPDX-License-Identifier: Apache-2.0
"""Budgets of mixed precision: bits, bytes, latencies; which weights count; what may choose."""

import json
import math
from pathlib import Path

import exports
import pytest
from command import jqx, refused

from jqx.auto import Weighting
from jqx.errors import InputError
from jqx_interop.auto import Limit, Scoring, chosen, limit_of, scored
from jqx_interop.auto.experts import active_ratio
from jqx_interop.auto.ways import read_table, ways_of
from jqx_interop.checkpoints import open_checkpoint
from jqx_interop.progress import Silent
from jqx_interop.settings import Settings

FORMATS = ("nvfp4", "fp8")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint in bfloat16, and beside it llama-ids.npy, [2 batches, 2, 16]."""
    return exports.write_base(tmp_path_factory.mktemp("budgets") / "llama", "llama")


def scores_of(model, folder, **more):
    given = Settings(calib=model.with_name("llama-ids.npy"))
    how = Scoring(recipes=FORMATS, **more)
    return scored(model, how, model.with_name(folder), given, Silent())


@pytest.fixture(scope="module")
def found(model):
    return scores_of(model, "scores")


def auto(model, out, *words):
    kept = ("--scores", model.with_name("scores"), "--calib", model.with_name("llama-ids.npy"))
    return jqx("auto", model, out, *kept, *words, "--json")


def shapes(model):
    tensors = open_checkpoint(model).tensors
    linears = [name for name in tensors if "_proj.weight" in name or name == "lm_head.weight"]
    return {name.removesuffix(".weight"): tensors[name].shape for name in linears}


def test_a_budget_in_bytes_is_what_is_written(model, found, tmp_path):
    way = ways_of(found, Weighting())["bytes"]
    budget = (way.least + sum(max(g.costs) for g in way.groups) + way.fixed) / 2
    code, out, err = auto(model, tmp_path / "out", "--max-bytes", int(budget))
    assert code == 0, err
    said = json.loads(out)["auto"]
    assert said["costs"]["bytes"] <= budget
    written = sum(t.nbytes for t in open_checkpoint(tmp_path / "out").tensors.values())
    scalars = 4 * 4 * len(said["choices"])  # scales of tensors and of inputs
    assert said["costs"]["bytes"] <= written <= said["costs"]["bytes"] + scalars
    assert set(said["choices"].values()) >= {"fp8"}
    assert said["curve"]["count"] == "bytes"


def table(model, path, times):
    rows = [
        {"format": name, "n": n, "k": k, "microseconds": time * n * k}
        for name, time in times.items()
        for n, k in {*shapes(model).values()}
    ]
    path.write_text(json.dumps({"device": "of a test", "rows": rows}))
    return path


def test_a_budget_in_time(model, found, tmp_path):
    """With times in proportion to bits it is the choice of that budget in bits."""
    costs = table(model, tmp_path / "costs.json", {"nvfp4": 4.5, "fp8": 8.0, "none": 16.0})
    numel = sum(math.prod(shape) for shape in shapes(model).values())
    limit = limit_of({"latency": 9.0 * numel}, table=costs)
    mine = chosen(found, limit)
    assert mine.costs["latency"] <= 9.0 * numel
    assert mine.choices == chosen(found, Limit(most=9.0, count="modelopt")).choices
    assert len(set(mine.choices.values())) > 1
    # a format that is slow is not taken, however good it is
    slow = table(model, tmp_path / "slow.json", {"nvfp4": 4.5, "fp8": 1000.0, "none": 16.0})
    other = chosen(found, limit_of({"latency": 9.0 * numel}, table=slow))
    assert "fp8" not in other.choices.values()
    code, out, err = auto(
        model, tmp_path / "out", "--max-latency", 9.0 * numel, "--latency-table", costs
    )
    assert code == 0, err
    assert json.loads(out)["auto"]["choices"] == mine.choices


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("{", "is no table of latencies"),
        ('{"rows": [{"format": "fp8"}]}', "KeyError 'n'"),
        ('{"rows": [{"format": "a", "n": 1, "k": 1, "microseconds": -1}]}', "is -1"),
        ('{"rows": []}', "only of other shapes: add a row"),
        (None, "no such file"),
    ],
    ids=["no json", "a row too short", "less than no time", "a shape that is missing", "no file"],
)
def test_tables_that_are_none(model, found, tmp_path, rows, told):
    if rows is not None:
        (tmp_path / "table.json").write_text(rows)
    with pytest.raises(InputError, match=told):
        chosen(found, limit_of({"latency": 1e9}, table=tmp_path / "table.json"))


def test_a_table_is_read(tmp_path):
    (tmp_path / "t.json").write_text(
        '{"rows": [{"format": "fp8", "n": 2, "k": 3, "microseconds": 4}]}'
    )
    assert read_table(tmp_path / "t.json") == {("fp8", 2, 3): 4.0}


def test_weights_that_do_not_count(model, found):
    """Excluded linears leave numerator and denominator; a group counts as long as a member does."""
    plain = ways_of(found, Weighting())["modelopt"]
    numel = {path: math.prod(shape) for path, shape in shapes(model).items()}
    assert plain.per == sum(numel.values())
    downs = Weighting(excluded=("*down_proj",))
    way = ways_of(found, downs)["modelopt"]
    off = sum(n for path, n in numel.items() if path.endswith("down_proj"))
    assert way.per == plain.per - off
    assert all(set(g.costs) == {0.0} for g in way.groups if g.name.endswith("down_proj"))
    some = ways_of(found, Weighting(excluded=("*q_proj",)))["modelopt"]
    assert some.per == plain.per
    choice = chosen(found, Limit(most=6.0, weighting=downs))
    assert {name for path, name in choice.choices.items() if path.endswith("down_proj")} == {"none"}


@pytest.mark.parametrize(
    ("path", "factor"),
    [
        ("model.layers.0.mlp.experts.3.up_proj", 0.25),
        ("experts.w1", 0.25),
        ("model.layers.0.mlp.shared_experts.up_proj", 1.0),
        ("model.layers.0.mlp.shared_expert.up_proj", 1.0),
        ("model.layers.0.self_attn.q_proj", 1.0),
    ],
)
def test_routed_experts_count_by_their_share(path, factor):
    assert Weighting(experts=0.25).of((path,)) == factor


@pytest.mark.parametrize(
    ("config", "ratio"),
    [
        ({"num_experts_per_tok": 2, "num_local_experts": 8}, 0.25),
        ({"num_experts_per_tok": 8, "n_routed_experts": 256}, 1 / 32),
        ({"text_config": {"num_experts_per_tok": 1, "num_local_experts": 16}}, 1 / 16),
        ({"top_k": 9, "num_experts": 8}, 1.0),
    ],
)
def test_the_share_of_experts_is_read(config, ratio):
    assert active_ratio(config) == ratio


def test_a_share_that_nobody_says():
    with pytest.raises(InputError, match="give the share .--expert-ratio"):
        active_ratio({"num_experts": 8})


def test_linears_that_are_disabled(model):
    """A group with a disabled member stays as it is, and counts as before."""
    found = scores_of(model, "disabled", disabled=("*layers.0.*k_proj", "*down_proj"))
    open_ = {path for group in found.groups for path in group}
    assert not any(path.endswith("down_proj") for path in open_)
    assert "model.layers.0.self_attn.q_proj" not in open_
    assert "model.layers.1.self_attn.q_proj" in open_
    whole = ways_of(found, Weighting())["modelopt"]
    assert whole.per == sum(math.prod(shape) for shape in shapes(model).values())


def test_options_change_the_recipes_that_know_them(model, tmp_path):
    words = ("--formats", "int4_awq,int8", "--set", "block=64", "--target", "compressed-tensors")
    kept = ("--scores", tmp_path / "kept", "--calib", model.with_name("llama-ids.npy"))
    code, _, err = jqx("auto", model, tmp_path / "out", *kept, *words, "--bits", "9")
    assert code == 0, err
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    groups = described["quantization_config"]["config_groups"].values()
    assert {g["weights"].get("group_size") for g in groups if g["weights"]["num_bits"] == 4} == {64}


WRONG = {
    "two budgets": (("--bits", "5", "--max-bytes", "1MiB"), "budgets of bits and bytes are given"),
    "no table": (("--max-latency", "5"), "latency is counted from a table: give one"),
    "no latency": (("--latency-table", "t.json"), "a table of latencies is given, and no latency"),
    "no size": (("--max-bytes", "many"), "many"),
    "too few bytes": (("--max-bytes", "1000"), ("1,000 bytes cannot be reached", "the least is")),
    "no glob": (("--disable", "*qq_proj"), "'*qq_proj' matches no linear of this model, such as"),
    "a share for nothing": (("--expert-ratio", "0.5"), "a share of experts is given, and all"),
    "a share of nothing": (("--cost-model", "active_moe"), "config.json does not say how many"),
    "another cost model": (("--cost-model", "wait"), "unknown cost model 'wait'"),
    "another method": (("--method", "gradients"), "unknown method 'gradients'"),
    "an option of none": (("--set", "alpha=0.5"), "alpha"),
    "a mixture that is read nowhere": (
        ("--formats", "int4_awq,int8"),
        ("no engine reads int4_awq and int8 mixed", "take --target compressed-tensors (vLLM"),
    ),
    "a share above 1": (
        ("--cost-model", "active_moe", "--expert-ratio", "2"),
        "the share of experts is 2; give a number in (0, 1]",
    ),
}


@pytest.mark.parametrize(("asked", "told"), WRONG.values(), ids=WRONG)
def test_what_is_refused(model, found, tmp_path, asked, told):
    kept = ("--scores", model.with_name("scores"), "--calib", model.with_name("llama-ids.npy"))
    refused("auto", model, tmp_path / "out", *kept, *asked, saying=told)
    assert not Path(tmp_path / "out").exists()
