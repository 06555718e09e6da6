# SPDX-License-Identifier: Apache-2.0
"""--plan: what would be done and what it costs, from headers alone."""

import json
import math
from pathlib import Path

import exports
import pytest
from command import jqx, snapshot
from exports import Export

import jqx_interop as ji
from jqx.recipes import RECIPES
from jqx_interop.checkpoints import MappedTensors
from jqx_interop.job import prepare
from jqx_interop.plan import Plan, make_plan
from jqx_interop.settings import Settings


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for model in ("llama", "qwen2", "wide"):
        exports.write_base(folder / model, model)
    exports.write_activations(folder / "llama-acts.safetensors", "llama")
    return folder


@pytest.fixture(scope="module")
def plan(root: Path):
    """Plans; the two rates that are measured for the time are measured once."""
    patch = pytest.MonkeyPatch()
    patch.setattr("jqx_interop.plan._best", lambda work: 1e-3)

    def make(row: Export, tokens: int = 0, **settings) -> Plan:
        job = prepare(root / row.model, row.recipe, Settings(kv_cache=row.kv, **settings))
        return make_plan(job, tokens)

    yield make
    patch.undo()


RUNS = (
    *(
        Export(model="llama", recipe=recipe)
        for recipe in ("nvfp4", "int8", "fp8_pc_pt", "mxfp4_mlp_wo")
    ),
    Export(model="llama", recipe="fp8", kv="fp8_affine", shard="60KB"),
    Export(model="wide", recipe="fp8_pb_wo"),
    Export(model="qwen2", recipe="w4a16_nvfp4", shard="100KB"),
)


@pytest.mark.parametrize("row", RUNS, ids=lambda row: row.key)
def test_the_plan_is_what_happens(root: Path, tmp_path: Path, plan, row: Export):
    settings: dict = {"max_shard_size": row.shard}
    if row.model == "llama":
        settings |= {"activations": root / "llama-acts.safetensors"}
    planned = plan(row, **settings)
    report = ji.ptq(root / row.model, tmp_path / "out", row.recipe, kv_cache=row.kv, **settings)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert planned.output_bytes == sum(file.stat().st_size for file in files) == report.output_bytes
    assert planned.files == len(files)
    assert planned.source_bytes == report.source_bytes
    assert planned.coverage == report.coverage
    tensors = exports.read_tensors(tmp_path / "out")
    quantized = {name.removesuffix("_scale") for name in tensors if name.endswith(".weight_scale")}
    assert {linear.path + ".weight" for linear in planned.linears} == quantized
    for linear in planned.linears:
        own = [name for name in tensors if name.rpartition(".")[0] == linear.path]
        assert linear.bytes == sum(len(tensors[name][2]) for name in own)
        assert linear.shape == exports.shapes(exports.MODELS[row.model])[linear.path + ".weight"]


def is_stored(recipe: str) -> bool:
    """Whether the layout has a name for it, and the small model what it selects."""
    return recipe not in ("mxfp6", "mxint8", "nvfp4_experts_only")


@pytest.mark.parametrize("recipe", [*filter(is_stored, RECIPES)])
def test_no_weight_is_read(root: Path, plan, monkeypatch, recipe: str):
    def read(*_: object) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(MappedTensors, "read", read)
    model = "wide" if recipe == exports.BLOCKS else "llama"
    planned = plan(Export(model=model, recipe=recipe))
    choice = RECIPES[recipe].config.rules[0]
    assert {(linear.weight, linear.input) for linear in planned.linears} == {
        (choice.weight, choice.input)
    }


def test_weights_may_be_anything(tmp_path: Path, root: Path, plan):
    folder = exports.write_base(tmp_path / "holes", "llama")
    raw = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    (folder / "model.safetensors").write_bytes(raw[:header] + b"\xff" * (len(raw) - header))
    job = prepare(folder, "nvfp4", Settings())
    assert make_plan(job).linears == plan(Export(model="llama", recipe="nvfp4")).linears


# --- the forecast


def test_more_work_takes_more(plan):
    row = Export(model="llama", recipe="nvfp4")
    plans = [plan(row, tokens) for tokens in (0, 1_000, 100_000, 1_000_000)]
    for less, more in zip(plans, plans[1:], strict=False):
        assert less.seconds <= more.seconds
        assert less.peak_memory_bytes <= more.peak_memory_bytes
        assert less.output_bytes == more.output_bytes
        assert more.tokens > less.tokens
    assert plans[0].seconds < plans[-1].seconds
    assert plans[1].peak_memory_bytes < plans[2].peak_memory_bytes
    narrow, wide = plan(Export(model="qwen2", recipe="nvfp4"), 1_000), plans[1]
    assert narrow.peak_memory_bytes < wide.peak_memory_bytes


def test_states_that_do_not_fit_go_to_disk(plan):
    row, tokens = Export(model="llama", recipe="fp8"), 1_000_000
    inside, outside = (
        plan(row, tokens, max_memory=size, compute="float32") for size in ("4GiB", "1MiB")
    )
    states = tokens * 128 * 4
    assert inside.spilled_bytes == 0
    assert outside.spilled_bytes == 2 * states  # two files take turns
    assert outside.peak_memory_bytes == inside.peak_memory_bytes - states


def test_fewer_bits_take_less_room(plan):
    sizes = [plan(Export(model="llama", recipe=r)).output_bytes for r in ("mxfp4", "nvfp4", "fp8")]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


# --- the command


def test_the_command_changes_nothing(root: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("jqx_interop.plan._best", lambda work: 1e-3)
    before = snapshot(root)
    given = ("quantize", root / "llama", "--calib", root / "llama-ids.npy", "--plan")
    code, out, err = jqx(*given, "--qformat", "nvfp4", "--kv-cache", "fp8")
    assert (code, err) == (0, "")
    for phrase in (
        "nvfp4",
        "model.layers.*.mlp.down_proj (x2)",
        "128 x 256",
        "64 tokens",
        "MiB",
        "lm_head",
    ):
        assert phrase in out
    code, out, err = jqx(*given, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["tokens"] == 64
    assert said["recipe"] == "fp8"
    assert len(said["linears"]) == said["coverage"]["linears"] == 14
    numel = sum(math.prod(linear["shape"]) for linear in said["linears"])
    assert said["coverage"]["share"] == numel / said["coverage"]["parameters"]
    assert snapshot(root) == before


def test_time_is_measured(root: Path):
    job = prepare(root / "llama", "fp8", Settings())
    measured = make_plan(job, 64)
    assert 0 < measured.seconds < 60
    assert measured.free_bytes > 0
