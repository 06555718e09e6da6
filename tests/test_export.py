# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the layout of compressed-tensors: written from memory and from ModelOpt's, there
and back with the same bytes, and what is refused.
"""

import json
import shutil
from pathlib import Path

import exports
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write
from command import jqx, refused, snapshot
from damage import arrays
from exports import Export
from safetensors import safe_open
from stored_trees import ROWS, model_of

import jqx_interop as ji
from jqx.errors import InputError
from jqx_interop.evaluation.result import bits_per_weight
from jqx_interop.job import prepare
from jqx_interop.pipeline import _names_in
from jqx_interop.settings import Settings
from jqx_interop.stored import open_model
from jqx_interop.targets import METHOD, TARGETS

HELD = [row for row in ROWS if row.kv in ("none", "fp8", "fp8_cast")]
HELD = [row for row in HELD if not row.recipe.startswith(("w4a8", "nvfp4_mlp_weight"))]


def bits(x):
    return np.asarray(x).tobytes()


# --- checkpoints


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """row -> its export in ModelOpt's layout, made once."""
    root, made = tmp_path_factory.mktemp("exports"), {}

    def folder(row: Export) -> Path:
        if row.key not in made:
            if not (root / row.model).exists():
                exports.write_base(root / row.model, row.model)
            model = model_of(row, root / row.model)
            made[row.key] = ji.save(model, root / f"out-{row.key}", max_shard_size=row.shard)
        return made[row.key]

    return folder


@pytest.mark.parametrize("row", HELD, ids=lambda row: row.key)
def test_there_and_back_with_the_same_bytes(folders, tmp_path, row):
    source = folders(row)
    done = ji.export(source, tmp_path / "ct", METHOD, max_shard_size=row.shard)
    assert (done.source, done.target) == ("modelopt", METHOD)
    assert not (tmp_path / "ct" / "hf_quant_config.json").exists()
    ji.export(tmp_path / "ct", tmp_path / "back", "modelopt", max_shard_size=row.shard)
    assert snapshot(tmp_path / "back") == snapshot(source)
    ji.export(tmp_path / "back", tmp_path / "again", METHOD, max_shard_size=row.shard)
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "ct")


FEW = [row for row in HELD if row.model == "llama"]
FEW = [r for r in FEW if r.recipe in ("nvfp4", "int8", "int4_blockwise_weight_only", "fp8")]


@pytest.mark.parametrize("row", FEW, ids=lambda row: row.key)
def test_it_is_the_same_model(folders, tmp_path, row):
    source = folders(row)
    ji.export(source, tmp_path / "ct", METHOD)
    models = ji.load(source), ji.load(tmp_path / "ct")
    assert jax.tree.structure(models[0].params) == jax.tree.structure(models[1].params)
    for mine, its in zip(*(jax.tree.leaves(m.params) for m in models), strict=True):
        assert bits(mine) == bits(its)
    assert models[0].spec == models[1].spec
    saved = ji.save(models[1], tmp_path / "saved", target=METHOD)
    assert exports.read_tensors(saved) == exports.read_tensors(tmp_path / "ct")
    assert (saved / "config.json").read_text() == (tmp_path / "ct" / "config.json").read_text()


@pytest.mark.parametrize("recipe", ["nvfp4", "int8_weight_only", "fp8"])
def test_quantizing_to_it_is_exporting_to_it(folders, tmp_path, recipe):
    base = exports.write_base(tmp_path / "llama", "llama")
    acts = exports.write_activations(tmp_path / "acts.safetensors", "llama")
    given_kv = {"kv_cache": "fp8", "activations": acts} if recipe != "int8_weight_only" else {}
    ji.ptq(base, tmp_path / "mo", recipe, **given_kv)
    ji.ptq(base, tmp_path / "ct", recipe, target=METHOD, **given_kv)
    ji.export(tmp_path / "mo", tmp_path / "exported", METHOD)
    assert exports.read_tensors(tmp_path / "ct") == exports.read_tensors(tmp_path / "exported")
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("ct", "exported")]
    assert configs[0] == configs[1]
    found, wanted = (bits_per_weight(open_model(tmp_path / folder)) for folder in ("ct", "mo"))
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("recipe", ["fp8", "fp8_per_channel_per_token", "int8_weight_only"])
def test_scales_in_the_dtype_of_the_model(tmp_path, recipe):
    """As llm-compressor stores them, those of inputs, keys and values too."""
    base = exports.write_base(tmp_path / "llama", "llama")
    acts = exports.write_activations(tmp_path / "acts.safetensors", "llama")
    ji.ptq(base, tmp_path / "ct", recipe, target=METHOD, kv_cache="fp8", activations=acts)
    short = {
        name: a.astype(jnp.bfloat16) if name.endswith("_scale") else a
        for name, a in arrays(tmp_path / "ct").items()
    }
    assert {"k_scale", "v_scale", "weight_scale"} <= {n.rpartition(".")[2] for n in short}
    wide = {n: a.astype(np.float32) if n.endswith("_scale") else a for n, a in short.items()}
    models = []
    for folder, tensors in (("short", short), ("wide", wide)):
        shutil.copytree(tmp_path / "ct", tmp_path / folder)
        write(tmp_path / folder, tensors)
        models.append(ji.load(tmp_path / folder))
        ji.export(tmp_path / folder, tmp_path / f"{folder} there", "modelopt")
    for mine, its in zip(*(jax.tree.leaves(m.params) for m in models), strict=True):
        assert mine.dtype == its.dtype
        assert bits(mine) == bits(its)
    assert snapshot(tmp_path / "short there") == snapshot(tmp_path / "wide there")


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_that_goes_on_knows_what_is_there(tmp_path, target):
    base = exports.write_base(tmp_path / "llama", "llama")
    acts = exports.write_activations(tmp_path / "acts.safetensors", "llama")
    recipe, kv = ("fp8", "fp8") if "fp8" in TARGETS[target].kv_formats else ("int4_wmse", "none")
    job = prepare(base, recipe, Settings(target=target, kv_cache=kv, activations=acts))
    every = [_names_in(job, {unit}) for unit in range(len(job.inventory.units))]
    assert set.union(*every) == {tensor.name for tensor in job.outputs}
    assert sum(map(len, every)) == len(job.outputs)


def test_other_readers_see_the_notes(folders, tmp_path):
    """And nothing else: a note is metadata."""
    row = next(row for row in HELD if row.recipe == "nvfp4" and row.kv == "none")
    done = ji.export(folders(row), tmp_path / "ct", METHOD)
    assert done.notes > 0
    with safe_open(tmp_path / "ct" / "model.safetensors", "numpy") as file:
        notes = file.metadata()
    assert len(notes) == done.notes + 1
    assert notes["format"] == "pt"
    source = arrays(folders(row))
    for name, text in notes.items():
        if name != "format":
            assert np.float32(float.fromhex(text)) == source[name.removeprefix("jqx:")]


def test_notes_survive_a_copy(folders, tmp_path):
    row = next(row for row in HELD if row.recipe == "nvfp4" and row.kv == "none")
    done = ji.export(folders(row), tmp_path / "ct", METHOD)
    again = ji.export(tmp_path / "ct", tmp_path / "copy", METHOD)
    assert again.notes == done.notes > 0
    ji.export(tmp_path / "copy", tmp_path / "back", "modelopt")
    assert exports.read_tensors(tmp_path / "back") == exports.read_tensors(folders(row))


# --- what is refused, and the command


@pytest.fixture(scope="module")
def nvfp4(folders):
    return folders(next(row for row in HELD if row.recipe == "nvfp4" and row.kv == "none"))


def test_the_command(nvfp4, tmp_path):
    code, out, err = jqx("export", nvfp4, tmp_path / "ct", "--target", METHOD, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert (said["linears"], said["target"]) == (14, METHOD)
    assert said["bytes"] == sum(a.nbytes for a in arrays(tmp_path / "ct").values())
    code, out, err = jqx("export", tmp_path / "ct", tmp_path / "back", "--target", "modelopt")
    assert code == 0
    assert "14 linears from compressed-tensors to modelopt" in out
    assert snapshot(tmp_path / "back") == snapshot(nvfp4)


def test_what_cannot_be_exported(folders, nvfp4, tmp_path):
    out = tmp_path / "out"
    base = exports.write_base(tmp_path / "llama", "llama")
    refused("export", nvfp4, out, "--target", "awqq", saying="unknown target 'awqq'")
    refused("export", base, out, "--target", METHOD, saying="is not quantized: jqx quantize --tar")
    refused("export", nvfp4, nvfp4, "--target", METHOD, saying="out")
    rows = {row.recipe: row for row in ROWS if row.model == "llama"}
    for recipe in ("w4a8_mxfp4_fp8", "w4a8_nvfp4_fp8"):
        source = folders(rows[recipe])
        refused(
            "export", source, out, "--target", METHOD, saying="compressed-tensors has no name for"
        )
    kv = next(row for row in ROWS if row.kv == "nvfp4")
    refused("export", folders(kv), out, "--target", METHOD, saying="keys and values are in nvfp4")
    asked = ("--qformat", "nvfp4", "--kv-cache", "nvfp4", "--target", METHOD)
    refused("quantize", base, out, *asked, saying="holds keys and values in fp8, fp8_cast, not in")
    asked = ("--qformat", "int4_awq", "--set", "block=64", "--target", METHOD, "--no-fold")
    told = "int4_b64 with plain inputs and awq factors: leave --no-fold out"
    refused("quantize", base, out, *asked, saying=told)
    assert not out.exists()


def test_a_checkpoint_that_is_half_there(nvfp4, tmp_path):
    broken, out = tmp_path / "broken", tmp_path / "out"
    ji.export(nvfp4, broken, METHOD)
    tensors = arrays(broken)
    lost = "model.layers.0.mlp.up_proj.weight_scale"
    write(broken, {k: v for k, v in tensors.items() if k != lost})
    refused("export", broken, out, "--target", "modelopt", saying=f"{lost} is missing")
    write(broken, tensors | {lost: tensors[lost][:, :-1]})
    refused("export", broken, out, "--target", "modelopt", saying=f"{lost} has shape")
    assert not out.exists()


def test_scales_that_are_none(nvfp4, tmp_path):
    broken = tmp_path / "broken"
    ji.export(nvfp4, broken, METHOD)
    name = "model.layers.1.mlp.up_proj.weight_global_scale"
    write(broken, arrays(broken) | {name: np.float32([np.nan])})
    with pytest.raises(InputError, match="weight_global_scale are not positive and finite"):
        ji.load(broken)


def test_a_note_that_is_none(nvfp4, tmp_path):
    ji.export(nvfp4, tmp_path / "ct", METHOD)
    file = tmp_path / "ct" / "model.safetensors"
    raw = file.read_bytes()
    at = raw.index(b"0x1.")
    file.write_bytes(raw[:at] + b"0y1." + raw[at + 4 :])
    refused("export", tmp_path / "ct", tmp_path / "out", "--target", "modelopt",
            saying=("its note jqx:model.layers", "is '0y1.", "not a number"))  # fmt: skip
