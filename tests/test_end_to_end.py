# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in, a quantized checkpoint out: byte for byte what the reference tool writes."""

import json
import shutil
from pathlib import Path

import exports
import numpy as np
import pytest
from exports import EXPORTS, Export

import jqx
import jqx_interop as ji
from jqx_interop.checkpoints import open_checkpoint
from jqx_interop.recipe_files import read_recipe

STEP = 2.0**-7
"""At most this far apart, relative to the smaller, are neighbouring bfloat16 numbers."""


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """Every tiny checkpoint, the calibration ids beside it, and the recorded inputs of two."""
    folder = tmp_path_factory.mktemp("models")
    for model in exports.MODELS:
        exports.write_base(folder / model, model)
    for model in exports.BATCHES:
        exports.write_activations(folder / f"{model}-acts.safetensors", model)
    return folder


def settings(root: Path, model: str, *, recorded: bool = True) -> dict:
    given: dict = {"calib": root / f"{model}-ids.npy"}
    if recorded and model in exports.BATCHES:
        given["activations"] = root / f"{model}-acts.safetensors"
    return given


def quantized(root: Path, out: Path, row: Export, **more) -> dict[str, str]:
    """File -> digest of the export `row` made here."""
    ji.ptq(
        *(root / row.model, out, recipe_of(root, row)),
        **{"kv_cache": row.kv, "max_shard_size": row.shard, **settings(root, row.model), **more},
    )
    return {
        file.name: exports.short(file.read_bytes()) for file in sorted(out.glob("*.safetensors"))
    }


def recipe_of(root: Path, row: Export) -> str | jqx.Recipe:
    if row.recipe != "mixed":
        return row.recipe
    (root / "mixed.yaml").write_text(exports.MIXED)
    return read_recipe(root / "mixed.yaml")


def same_tensors(out: Path, row: Export) -> set[str]:
    """The tensors of `out` that differ from those of the reference tool. Names must be the same."""
    have, want = exports.digests(out), exports.answers()["exports"][row.key]["tensors"]
    assert set(have) == set(want)
    return {name for name in have if have[name] != want[name]}


def check_descriptions(out: Path, row: Export) -> None:
    """The JSON files say the same in the same order, and the source's generation_config.json came
    along.
    """
    want = exports.answers()["exports"][row.key]
    source = exports.answers()["models"][row.model]["files"]
    config = json.loads((out / "config.json").read_text())
    expected = {
        **json.loads(source["config.json"]),
        "quantization_config": want["quantization_config"],
    }
    assert json.dumps(config) == json.dumps(expected)
    for name, text in want["texts"].items():
        assert (out / name).read_text() == text
    assert (out / "generation_config.json").read_text() == source["generation_config.json"]
    kept = ("config.json", "generation_config.json", *want["texts"], *want["files"])
    assert sorted(file.name for file in out.iterdir()) == sorted(kept)


def test_the_checkpoints_are_those_that_were_exported(root: Path):
    for model, kept in exports.answers()["models"].items():
        assert exports.short((root / model / "model.safetensors").read_bytes()) == kept["weights"]


OTHERS = {
    "mxfp6": "is not exported",
    "mxint8": "is not exported",
    "nvfp4_experts_only": "selects nothing in a dense model",
    "nvfp4_fp8_mha": "nvfp4 with an FP8 cache",
    "nvfp4_deepseek": "nvfp4_omlp_only with an FP8 cache",
    "mamba_moe_fp8_aggressive": "fp8 for other linears",
    "mamba_moe_fp8_conservative": "fp8 for other linears",
    "mamba_moe_nvfp4_aggressive": "nvfp4 for other linears",
    "mamba_moe_nvfp4_conservative": "nvfp4 for other linears",
}
"""Recipes of largest magnitudes without an export of their own, and why."""


def test_every_recipe_has_an_export():
    plain = {n for n, r in jqx.RECIPES.items() if {s.method for s in r.config.steps} <= {"max"}}
    assert set(exports.CONFIGS) == plain - set(OTHERS)
    assert set(OTHERS) <= plain
    for recipe, constant in exports.CONFIGS.items():
        assert constant in jqx.RECIPES[recipe].aliases
    assert {row.kv for row in EXPORTS} == {"none", *jqx.config.KV_FORMATS}


FROM_RECORDED = [row for row in EXPORTS if row.model in exports.BATCHES]
DATA_FREE = [row for row in EXPORTS if row.model not in exports.BATCHES and row.recipe != "fp8"]


@pytest.mark.parametrize("row", FROM_RECORDED + DATA_FREE, ids=lambda row: row.key)
def test_files_are_those_of_the_reference_tool(root: Path, tmp_path: Path, row: Export):
    files = quantized(root, tmp_path / "out", row)
    want = exports.answers()["exports"][row.key]
    if "tensors" in want:
        assert same_tensors(tmp_path / "out", row) == set()
    assert files == want["files"]
    check_descriptions(tmp_path / "out", row)


# --- from token ids: the arithmetic of the forward pass is another, so scales may move


def steps_apart(out: Path, row: Export) -> np.ndarray:
    """How many bfloat16 steps of amax each scale of an activation is from the reference tool's."""
    have, want = exports.calibrated(out), exports.answers()["exports"][row.key]["calibrated"]
    scales = [name for name in want if name.endswith("_scale")]
    a, b = (np.array([side[name][0] for name in scales]) for side in (have, want))
    return np.abs(a - b) / b / STEP


IDS = [
    *(
        Export(model="llama", recipe=recipe)
        for recipe in ("fp8", "int8", "nvfp4", "w4a8_nvfp4_fp8")
    ),
    *(Export(model="llama", recipe="fp8", kv=kv) for kv in ("fp8", "fp8_affine")),
    *(Export(model=model, recipe="fp8") for model in ("llama_f16", "llama_f32")),
]


@pytest.mark.parametrize("row", IDS, ids=lambda row: row.key)
def test_from_token_ids_only_scales_of_activations_move(root: Path, tmp_path: Path, row: Export):
    near = {}
    for compute in ("float32", "bf16") if row.model == "llama" else ("float32",):
        out = tmp_path / compute
        ji.ptq(
            *(root / row.model, out, row.recipe),
            **{"kv_cache": row.kv, "compute": compute, **settings(root, row.model, recorded=False)},
        )
        assert all(name.endswith(exports.CALIBRATED) for name in same_tensors(out, row))
        check_descriptions(out, row)
        near[compute] = steps_apart(out, row)
        assert np.median(near[compute]) <= 1
        assert near[compute].max() <= 6
    assert near.get("bf16", near["float32"]).sum() <= near["float32"].sum()


# --- what must not change a byte


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory) -> Path:
    """A run over the calibration ids with affine keys and values, whose result depends on batches
    and their order.
    """
    return _from_ids(root, tmp_path_factory.mktemp("whole") / "out")


def _from_ids(root: Path, out: Path, **more) -> Path:
    given = settings(root, "llama", recorded=False)
    ji.ptq(root / "llama", out, "nvfp4", **{"kv_cache": "nvfp4_affine", **given, **more})
    return out


CHANGES = {
    "one at a time": {"batch_size": 1},
    "three at a time": {"batch_size": 3},
    "more than there are": {"batch_size": 64},
    "spilled": {"max_memory": 1},
    "spilled, one at a time": {"max_memory": "1KiB", "batch_size": 1},
}


@pytest.mark.parametrize("more", CHANGES.values(), ids=CHANGES.keys())
def test_how_it_runs_changes_no_byte(root: Path, whole: Path, tmp_path: Path, more: dict):
    out = _from_ids(root, tmp_path / "out", **more)
    assert _content(out) == _content(whole)


def test_shards_hold_the_same_tensors(root: Path, whole: Path, tmp_path: Path):
    out = _from_ids(root, tmp_path / "out", max_shard_size="40KB")
    assert len(list(out.glob("*.safetensors"))) > 3
    assert exports.digests(out) == exports.digests(whole)
    assert open_checkpoint(out).tensors.keys() == open_checkpoint(whole).tensors.keys()


def test_the_source_may_be_sharded(root: Path, whole: Path, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(root / "llama" / "config.json", source)
    shutil.copy(root / "llama" / "generation_config.json", source)
    weights = exports.tensors("llama")
    parts = {f"model-0000{i}-of-00003.safetensors": list(weights)[i - 1 :: 3] for i in (1, 2, 3)}
    for file, names in parts.items():
        exports.save_file({name: weights[name] for name in names}, source / file, {"format": "pt"})
    weight_map = {name: file for file, names in parts.items() for name in names}
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    ji.ptq(
        source,
        tmp_path / "out",
        "nvfp4",
        **{"kv_cache": "nvfp4_affine", "calib": root / "llama-ids.npy"},
    )
    assert _content(tmp_path / "out") == _content(whole)


def _content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- what else is in a model directory


def test_small_files_come_along_and_pickles_and_code_do_not(root: Path, tmp_path: Path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(root / "llama", source)
    kept = {
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b'{"a": 1}',
        "chat_template.jinja": b"{{ x }}",
    }
    kept |= {"LICENSE": b"free\n", "README.md": b"words\n", "special_tokens_map.json": b"{}"}
    left = {
        "pytorch_model.bin": b"\x80\x04",
        "modeling_x.py": b"boom",
        "training_args.pt": b"\x80",
        ".hidden": b"",
    }
    for name, content in {**kept, **left}.items():
        (source / name).write_bytes(content)
    (source / "folder").mkdir()
    ji.ptq(source, out, "mxfp8")
    described = {
        "config.json",
        "hf_quant_config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert {file.name for file in out.iterdir()} == described | set(kept)
    assert {name: (out / name).read_bytes() for name in kept} == kept


def test_a_report_counts_what_was_written(root: Path, tmp_path: Path):
    report = ji.ptq(root / "llama", tmp_path / "out", "mxfp8")
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")}
    assert report.files == tuple(sizes)
    assert report.output_bytes == sum(sizes.values())
    assert report.source_bytes == (root / "llama" / "model.safetensors").stat().st_size
    shapes = exports.shapes(exports.MODELS["llama"])
    linears = {n: s for n, s in shapes.items() if n.endswith("_proj.weight")}
    assert report.coverage.linears == len(linears) == 14
    assert report.coverage.quantized == sum(np.prod(s) for s in linears.values())
    assert report.coverage.parameters == sum(np.prod(s) for s in shapes.values())
    assert report.coverage.left == ("lm_head",)


# --- architectures that jqx does not define


@pytest.fixture(scope="session")
def stranger(root: Path, tmp_path_factory) -> Path:
    """The same weights under another model_type."""
    folder = tmp_path_factory.mktemp("stranger") / "model"
    shutil.copytree(root / "llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "strange"}, indent=2))
    return folder


STRANGE = [
    *(
        Export(model="llama", recipe=recipe)
        for recipe in exports.CONFIGS
        if recipe != exports.BLOCKS
    ),
    Export(model="llama", recipe="fp8", kv="fp8_cast"),
    Export(model="llama", recipe="nvfp4", kv="nvfp4_cast"),
]


@pytest.mark.parametrize("row", STRANGE, ids=lambda row: row.key)
def test_an_unknown_architecture_is_quantized_by_tensor_names(
    root: Path, stranger: Path, tmp_path: Path, row: Export
):
    out = tmp_path / "out"
    ji.ptq(stranger, out, row.recipe, **{"kv_cache": row.kv, **settings(root, "llama")})
    assert same_tensors(out, row) == set()
    want = exports.answers()["exports"][row.key]
    assert (out / "hf_quant_config.json").read_text() == want["texts"]["hf_quant_config.json"]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == want["quantization_config"]
    assert config["model_type"] == "strange"
