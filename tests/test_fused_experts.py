# SPDX-License-Identifier: Apache-2.0
"""Experts that lie in one tensor: written in one where ModelOpt does and where they are left alone,
read again, and checked; and apart where that is asked for.
"""

import json
from pathlib import Path

import exports
import family_checkpoints
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from command import jqx as run
from damage import arrays
from golden import make_families
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny_families import ONE_EACH

import jqx_interop as ji
from jqx_interop.checkpoints import Part, ShardWriter, TensorOut, open_checkpoint, plan_shards
from jqx_interop.job import prepare
from jqx_interop.pipeline import _names_in
from jqx_interop.settings import Settings

IDS = jnp.asarray(np.random.RandomState(2).randint(0, make_families.VOCAB, (2, 12)), jnp.int32)
IN_COLUMNS = ("llama4_text", "gpt_oss")
ALL = (*IN_COLUMNS, "llama4", "granitemoe", "dbrx")
MAX = 448.0
LEFT = ("*experts*", "*head*", "*router*", "*block_sparse_moe*")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """model_type -> its checkpoint, made once."""
    return family_checkpoints.made_once(
        tmp_path_factory, lambda folder, kind: family_checkpoints.write(folder, ONE_EACH[kind])
    )


def quantized(source: Path, out: Path, *options) -> Path:
    done = run("quantize", source, out, "--calib", source.parent / "ids.npy", *options)
    assert done.code == 0, done.err
    return out


def logits(folder: Path) -> np.ndarray:
    model = ji.load(folder)
    return np.asarray(model.apply({"params": model.params}, IDS))


def of_experts(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: a for name, a in found.items() if ".experts." in name}


# --- what is written


@pytest.mark.parametrize("kind", IN_COLUMNS)
def test_fp8_codes_are_quotients_by_one_scale_of_all_experts(originals, tmp_path: Path, kind: str):
    source = originals(kind)
    before, after = arrays(source), arrays(quantized(source, tmp_path / "o", "--qformat", "fp8"))
    checked = 0
    for name, w in of_experts(before).items():
        if not name.endswith("_proj"):
            np.testing.assert_array_equal(after[name], w)  # biases
            continue
        w = w.astype(np.float32)
        scale = np.float32(np.abs(w).max()) / np.float32(MAX)
        np.testing.assert_array_equal(after[f"{name}_weight_scale"], scale)
        assert after[f"{name}_weight_scale"].shape == after[f"{name}_input_scale"].shape == ()
        codes = (w / scale).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(after[name].view(np.uint8), codes.view(np.uint8))
        checked += 1
    assert checked >= 4


@pytest.mark.parametrize("kind", IN_COLUMNS)
def test_nvfp4_blocks_lie_along_the_rows(originals, tmp_path: Path, kind: str):
    source = originals(kind)
    before, after = arrays(source), arrays(quantized(source, tmp_path / "o", "--qformat", "nvfp4"))
    for name, w in of_experts(before).items():
        if not name.endswith("_proj"):
            continue
        (e, k, n), w = w.shape, w.astype(np.float32)
        outer = after[f"{name}_weight_scale_2"]
        np.testing.assert_array_equal(outer, np.float32(np.abs(w).max()) / np.float32(6 * MAX))
        inner = after[f"{name}_weight_scale"]
        assert inner.shape == (e, k // 16, n)
        packed = after[name]
        assert packed.shape == (e, k // 2, n)
        codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(e, k, n)
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        decoded = values[codes & 7] * np.where(codes & 8, -1, 1)
        scale = np.repeat(inner.astype(np.float32), 16, axis=1) * outer
        error = np.abs(decoded * scale - w)
        assert np.all(error <= 1.07 * scale + 1e-6)  # half the widest step, and that of the scale
        np.testing.assert_array_equal(
            inner.astype(np.float32).max(), 448.0
        )  # the block of the largest weight of all experts


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("target", ["modelopt", "compressed-tensors"])
def test_experts_that_are_left_alone_stay_as_they_lie(
    originals, tmp_path: Path, kind: str, target: str
):
    source = originals(kind)
    recipe = tmp_path / "r.json"
    rules = [{"path_glob": "*", "kind": "linear", "weight": "fp8", "input": "fp8"}]
    rules += [{"path_glob": glob, "weight": None} for glob in LEFT]
    recipe.write_text(json.dumps({"rules": rules}))
    out = quantized(source, tmp_path / "o", "--recipe", recipe, "--target", target)
    before, after = of_experts(arrays(source)), of_experts(arrays(out))
    before = before or {n: a for n, a in arrays(source).items() if "block_sparse_moe" in n}
    for name, array in before.items():
        if "gate.weight" not in name and "router" not in name:
            np.testing.assert_array_equal(arrays(out)[name], array)
    assert not any("experts.0." in name for name in after)
    assert np.isfinite(logits(out)).all()


@pytest.mark.parametrize("kind", ["llama4_text", "gpt_oss"])
@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
def test_each_has_tensors_of_its_own_where_that_is_asked(
    originals, tmp_path: Path, kind: str, recipe: str
):
    source = originals(kind)
    out = quantized(source, tmp_path / "o", "--qformat", recipe, "--no-fuse-experts")
    names = of_experts(arrays(out))
    assert any(name.endswith("experts.0.gate_proj.weight_scale") for name in names)
    assert not any("gate_up_proj" in name for name in names)
    said = json.loads(run("inspect", out, "--engine", "vllm", "--json").out)
    assert said["engines"]["vllm"]["loads"], said["engines"]["vllm"]["problems"]


@pytest.mark.parametrize("algorithm", ["awq", "gptq"])
def test_what_is_searched_keeps_the_scale_of_all(originals, tmp_path: Path, algorithm: str):
    """Factors of inputs have no place in one tensor; scales below that of all experts have."""
    source = originals("llama4_text")
    recipe = ("--qformat", "nvfp4_awq") if algorithm == "awq" else ("--qformat", "nvfp4")
    more = () if algorithm == "awq" else ("--algorithm", algorithm)
    found = of_experts(arrays(quantized(source, tmp_path / "o", *recipe, *more)))
    fused = {name: a for name, a in found.items() if "gate_up_proj" in name}
    assert bool(fused) == (algorithm != "awq")
    plain = of_experts(arrays(quantized(source, tmp_path / "p", "--qformat", "nvfp4")))
    for name, array in fused.items():
        if name.endswith(("_scale_2", "_input_scale")):
            np.testing.assert_array_equal(array, plain[name])
        elif not name.endswith("_weight_scale"):
            assert np.any(array != plain[name])


# --- the same whatever the way


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
def test_ways_that_lead_to_the_same_bytes(originals, tmp_path: Path, recipe: str):
    source = originals("gpt_oss")
    once = exports.digests(quantized(source, tmp_path / "once", "--qformat", recipe))
    for name, options in {
        "reported": ("--report", tmp_path / "report"),
        "alone": ("--batch-size", "1"),
    }.items():
        out = quantized(source, tmp_path / name, "--qformat", recipe, *options)
        assert exports.digests(out) == once
    sharded = ("--max-shard-size", "20KB")
    out = quantized(source, tmp_path / "sharded", "--qformat", recipe, *sharded)
    assert len(list(out.glob("*.safetensors"))) > 3
    assert exports.digests(out) == once


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [("llama4_text", "nvfp4"), ("gpt_oss", "fp8"), ("gpt_oss", "w4a16_nvfp4")],
)
def test_there_and_back(originals, tmp_path: Path, kind: str, recipe: str):
    out = quantized(originals(kind), tmp_path / "o", "--qformat", recipe)
    got = logits(out)
    model = ji.load(out)
    ji.save(model, tmp_path / "saved")
    assert exports.digests(tmp_path / "saved") == exports.digests(out)
    there, back = tmp_path / "there", tmp_path / "back"
    assert run("export", out, there, "--target", "compressed-tensors").code == 0
    assert any("experts.1.up_proj" in name for name in arrays(there))
    np.testing.assert_array_equal(logits(there), got)
    assert run("export", there, back, "--target", "modelopt").code == 0
    assert exports.digests(back) == exports.digests(out)
    apart = quantized(originals(kind), tmp_path / "a", "--qformat", recipe, "--no-fuse-experts")
    assert 0 < np.mean(np.abs(logits(apart) - got)) < np.std(got)


def test_layers_that_differ_stay_apart(originals, tmp_path: Path):
    """Descriptions of mixed formats name linears, and no tensor of all experts is one."""
    recipe = tmp_path / "r.json"
    rules = [{"path_glob": "*", "kind": "linear", "weight": "fp8", "input": "fp8"}]
    rules += [{"path_glob": "*self_attn*", "weight": "nvfp4", "input": "nvfp4"}]
    rules += [{"path_glob": glob, "weight": None} for glob in ("*head*", "*router*")]
    recipe.write_text(json.dumps({"rules": rules}))
    found = arrays(quantized(originals("gpt_oss"), tmp_path / "o", "--recipe", recipe))
    assert any("experts.0.gate_proj.weight_scale" in name for name in found)


# --- unfinished runs, parts of tensors


def test_finished_units_are_known_by_the_names_that_are_written(originals, tmp_path: Path):
    job = prepare(originals("llama4_text"), "nvfp4", Settings())
    units = range(len(job.inventory.units))
    each = [_names_in(job, {unit}) for unit in units]
    assert set().union(*each) == {tensor.name for tensor in job.outputs}
    assert sum(map(len, each)) == len(job.outputs)
    assert any(name.endswith("experts.gate_up_proj_weight_scale_2") for name in each[1] | each[2])


@given(data=st.data())
def test_parts_make_the_whole(tmp_path_factory, data):
    e, a, b = (data.draw(st.integers(1, 4)) for _ in range(3))
    dtype = data.draw(st.sampled_from(["U8", "BF16", "F32"]))
    folder = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    whole = rng.integers(0, 200, (e, a, 2 * b)).astype(
        {"U8": np.uint8, "BF16": ml_dtypes.bfloat16, "F32": np.float32}[dtype]
    )
    step = data.draw(st.booleans())
    halves = (slice(0, None, 2), slice(1, None, 2)) if step else (slice(0, b), slice(b, 2 * b))
    parts = [(i, (slice(None), half)) for i in range(e) for half in halves]
    plans = plan_shards([TensorOut("w", dtype, whole.shape), TensorOut("x", "U8", (3,))])
    with ShardWriter(folder, plans) as writer:
        writer.write("x", np.arange(3, dtype=np.uint8))
        for i, at in data.draw(st.permutations(parts)):
            with pytest.raises(ValueError, match="never written"):
                writer.finish()
            writer.write_part("w", Part(i, (a, 2 * b), at), whole[i][at])
        writer.finish()
    (folder / "config.json").write_text("{}")
    read = open_checkpoint(folder)
    np.testing.assert_array_equal(read.read("w"), whole)
    np.testing.assert_array_equal(read.read("x"), np.arange(3))


def test_a_part_that_does_not_fit_is_refused(tmp_path: Path):
    part = Part(0, (2, 4), (slice(None), slice(0, 2)))
    with ShardWriter(tmp_path, plan_shards([TensorOut("w", "U8", (2, 2, 4))])) as writer:
        for bad in (np.zeros((2, 3), np.uint8), np.zeros((2, 2), np.float32)):
            with pytest.raises(ValueError, match="of w is uint8"):
                writer.write_part("w", part, bad)


# --- the verifier


def damaged(folder: Path, change) -> dict:
    tensors = {name: np.array(a) for name, a in arrays(folder).items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = run("inspect", folder, "--engine", "vllm", "--json")
    assert done.code == 1
    return {p["rule"]: p["text"] for p in json.loads(done.out)["faults"]}


STACK = "model.layers.1.feed_forward.experts.down_proj"
FAULTS = {
    "a scale is gone": (
        lambda t: t.pop(f"{STACK}_weight_scale_2"),
        {"missing-tensor": "down_proj.weight_scale_2 is missing"},
    ),
    "codes are gone": (
        lambda t: t.pop(STACK),
        {"missing-tensor": "down_proj.weight is missing, and so are codes"},
    ),
    "a scale of other blocks": (
        lambda t: t.update({f"{STACK}_weight_scale": t[f"{STACK}_weight_scale"][:, :3]}),
        {"group-size": "has a scale for"},
    ),
    "a scale of NaN": (
        lambda t: t.update({f"{STACK}_input_scale": np.array(np.nan, "f4")}),
        {"scale-numbers": "down_proj_input_scale: it is NaN"},
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_faults_of_experts_in_one_tensor_are_found(originals, tmp_path: Path, what: str):
    change, wanted = FAULTS[what]
    found = damaged(
        quantized(originals("llama4_text"), tmp_path / "o", "--qformat", "nvfp4"), change
    )
    for rule, text in wanted.items():
        assert text in found.get(rule, ""), found


READ_IN_ONE = {
    ("llama4", "fp8"): {"vllm": True, "sglang": True, "trtllm": True},
    ("llama4", "nvfp4"): {"vllm": True, "sglang": False, "trtllm": True},
    ("llama4_text", "nvfp4"): {"vllm": False, "sglang": None, "trtllm": None},
    ("gpt_oss", "fp8"): {"vllm": False, "sglang": None, "trtllm": None},
}


@pytest.mark.parametrize(("kind", "recipe"), READ_IN_ONE)
def test_engines_that_read_them_are_told(originals, tmp_path: Path, kind: str, recipe: str):
    out = quantized(originals(kind), tmp_path / "o", "--qformat", recipe)
    said = json.loads(run("inspect", out, "--engine", "all", "--json").out)
    assert [p for p in said["faults"] if p["rule"] != "tokenizer"] == []
    for engine, loads in READ_IN_ONE[kind, recipe].items():
        verdict = said["engines"][engine]
        told = [p for p in verdict["problems"] if p["rule"] == "stacked-experts"]
        assert (told == []) == bool(loads), (engine, verdict)
        if not loads:
            assert told[0]["loads"] is loads
            assert "--no-fuse-experts" in told[0]["way_out"]
