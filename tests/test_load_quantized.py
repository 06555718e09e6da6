# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints are read as they are stored, whole or in parts, whatever their two
descriptions leave out.
"""

import json
import shutil
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import exports
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checkpoints import write
from exports import Export
from hypothesis import given
from hypothesis import strategies as st
from stored_trees import ROWS, amax_of, drawn, leaves, model_of

import jqx_interop as ji
from jqx.config import Choice
from jqx.formats import Format, find_format, grid_shape
from jqx.models import BF16, FLOAT32, block_prefix, forward
from jqx.models.layers import module
from jqx.tensors import QTensor
from jqx.tensors.paths import flatten, unflatten
from jqx_interop.checkpoints import MappedTensors
from jqx_interop.checkpoints.layout import read_header
from jqx_interop.stored import open_model, read_params
from jqx_interop.stored_blocks import read_block
from jqx_interop.targets import TARGETS
from jqx_interop.targets.modelopt import ALGOS, KV_ALGOS, VARIANT_ALGOS
from jqx_interop.targets.modelopt_choices import choices_of, kv_of
from jqx_interop.targets.modelopt_read import read_stated


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """`stored(row)`: the directory of an export, which test_save.py shows to be the reference
    tool's.
    """
    root = tmp_path_factory.mktemp("stored")
    return cache(lambda row: ji.save(model_of(row), root / row.key, max_shard_size=row.shard))


def same(a, b) -> None:
    """Leaves, their kinds and what is static about them."""
    assert list(flatten(a)) == list(flatten(b))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(x, y)


def edit(folder: Path, name: str, **changes: object) -> None:
    """Change keys of the description `name`; None takes one out."""
    said = json.loads((folder / name).read_text())
    part = said["quantization_config" if name == "config.json" else "quantization"]
    part |= changes
    for key in [key for key, value in changes.items() if value is None]:
        part.pop(key, None)
    (folder / name).write_text(json.dumps(said))


# --- the numbers


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_leaves_are_what_was_stored(stored, row: Export):
    model = ji.load(stored(row))
    same(model.params, model_of(row).params)
    assert model.spec == model_of(row).spec
    assert model.path == stored(row)


FORMAT_ROWS = [
    Export(model="wide", recipe="fp8_2d_blockwise_weight_only"),
    *(Export(model="llama", recipe=r) for r in ("fp8", "fp8_per_channel_per_token", "int8")),
    *(Export(model="llama", recipe=r) for r in ("int4_blockwise_weight_only", "mxfp4", "mxfp8")),
    *(Export(model="llama", recipe=r) for r in ("nvfp4", "nvfp4_mlp_weight_only")),
    Export(model="llama", recipe="w4a8_nvfp4_fp8"),
]
decode = jax.jit(lambda q: q.decode(jnp.float32))


@partial(jax.jit, static_argnames="fmt")
def stored_again(w: jax.Array, amax: jax.Array | None, fmt: Format) -> jax.Array:
    return QTensor.quantize(w, fmt, amax).decode(jnp.float32)


@pytest.mark.parametrize("row", FORMAT_ROWS, ids=lambda row: row.key)
def test_weights_decode_by_the_definition(stored, row: Export):
    path = "model.layers.0.mlp.up_proj"
    q = flatten(ji.load(stored(row)).params)[f"{path}.weight"]
    w, amax = drawn(row.model)[f"{path}.weight"], amax_of(row, path)
    got = decode(q)
    np.testing.assert_array_equal(got, reference.decode(w, q.format.name, amax))
    whole = None if amax is None else jnp.float32(amax)
    np.testing.assert_array_equal(got, stored_again(jnp.asarray(w), whole, q.format))


ERRORS = {
    ("fp8", "none"): (0.01, 0.2),
    ("nvfp4", "nvfp4"): (0.1, 0.7),
    ("w4a8_mxfp4_fp8", "none"): (0.1, 0.7),
}
"""Recipe and cache -> how far logits of the tiny model may be from those of the original, relative.
Measured, with room: weights drawn from loud channels lose much.
"""


@pytest.mark.parametrize(("recipe", "kv"), ERRORS)
def test_logits_are_near_those_of_the_original(stored, recipe: str, kv: str):
    model = ji.load(stored(Export(model="llama", recipe=recipe, kv=kv)))
    original = {name: jnp.asarray(array) for name, array in drawn("llama").items()}
    ids = exports.token_ids("llama")[0]
    run = jax.jit(model.apply) if kv == "none" else model.apply
    logits = np.asarray(run({"params": model.params}, ids))
    plain = replace(model.spec, kv_cache=None)
    wanted = np.asarray(forward(plain, unflatten(original), jnp.asarray(ids)))
    assert np.isfinite(logits).all()
    low, high = ERRORS[recipe, kv]
    assert low < np.linalg.norm(logits - wanted) / np.linalg.norm(wanted) < high


def test_weights_err_as_the_reference_tool_measured(shared: Path):
    """Its mean squared error of the outputs of a linear on recorded inputs, relative. Factors on
    inputs belong to it; what was folded into a norm shows elsewhere, so o_proj is looked at.
    """
    golden, path, checked = shared / "golden", "model.layers.0.self_attn.o_proj", 0
    recorded = open_tensors(golden / "acts.safetensors")
    x = np.concatenate([a.reshape(-1, 256) for n, a in recorded.items() if n.startswith(path)])
    x = x.astype(np.float32)
    wanted = x @ read_dense(golden / "base", path).T
    for folder in sorted(file.parent for file in golden.glob("*/golden.json")):
        if path not in (source := open_model(folder)).choices:
            continue
        q = flatten(read_params(source, [f"{path}.weight"]))[f"{path}.weight"]
        factor = 1 if q.pre_quant_scale is None else np.asarray(q.pre_quant_scale, np.float32)
        w = np.asarray(decode(q))
        if q.low_rank is not None:
            w = w + np.matmul(*(np.asarray(part, np.float32) for part in q.low_rank))
        got = (x * factor) @ w.T
        error = np.square(got - wanted).sum() / np.square(wanted).sum()
        said = json.loads((folder / "golden.json").read_text())["output_error"][path]
        assert abs(error / said - 1) < 0.02, folder.name
        checked += 1
    assert checked > 30


def read_dense(folder: Path, path: str) -> np.ndarray:
    return open_tensors(folder / "model.safetensors")[f"{path}.weight"].astype(np.float32)


def open_tensors(file: Path) -> dict[str, np.ndarray]:
    found = read_header(file).tensors
    return {tensor.name: MappedTensors(found).read(tensor.name) for tensor in found}


def test_weights_alone_run_as_their_decoded_selves(stored):
    model = ji.load(stored(Export(model="llama", recipe="mxfp4_mlp_weight_only")))
    dense = {
        name: leaf.decode() if isinstance(leaf, QTensor) else leaf
        for name, leaf in flatten(model.params).items()
    }
    ids = exports.token_ids("llama")[0]
    np.testing.assert_array_equal(
        model.apply({"params": model.params}, ids), model.apply({"params": unflatten(dense)}, ids)
    )


# --- in parts


@pytest.mark.parametrize("compute", [FLOAT32, BF16], ids=["float32", "bf16"])
def test_blocks_are_those_of_the_whole(stored, compute):
    row = Export(model="llama", recipe="nvfp4_mlp_only")
    source = open_model(stored(row))
    whole = ji.load(stored(row)).params
    for i in range(2):
        got = flatten(read_block(source, i, compute))
        want = flatten(module(whole, block_prefix(source.spec, i)))
        assert list(got) == list(want)
        for name, leaf in want.items():
            plain = not isinstance(leaf, QTensor) and leaf.ndim > 1
            same({"a": got[name]}, {"a": leaf.astype(compute.carrier) if plain else leaf})


def test_keys_and_values_come_with_their_projection(stored):
    source = open_model(stored(Export(model="llama", recipe="nvfp4", kv="nvfp4_affine")))
    name = "model.layers.1.self_attn.v_proj.weight"
    found = flatten(read_params(source, [name]))
    prefix = name.removesuffix("weight")
    assert set(found) == {name, f"{prefix}v_scale", f"{prefix}v_bias"}
    assert found[f"{prefix}v_bias"].shape == (1, 2, 1, 32)
    assert source.choices[prefix[:-1]] == Choice(weight="nvfp4", input="nvfp4")


def test_only_names_asked_for_are_read(stored):
    source = open_model(stored(Export(model="llama", recipe="int8")))
    found = read_params(source, ["model.norm.weight", "lm_head.weight"], jnp.float32)
    assert found["model"]["norm"]["weight"].dtype == jnp.bfloat16
    assert found["lm_head"]["weight"].dtype == jnp.float32
    assert set(flatten(found)) == {"model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("scale", [1, 2])
def test_a_tied_head_is_read_only_if_it_differs(stored, tmp_path: Path, scale: int):
    folder = shutil.copytree(stored(Export(model="llama", recipe="mxfp4")), tmp_path / "copy")
    tensors = exports.load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = (embedding * np.float32(scale)).astype(embedding.dtype)
    exports.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = ji.load(folder)
    assert model.spec.tied == (scale == 1)
    assert ("lm_head" in model.params) == (scale == 2)


def test_pages_are_released_once_they_are_copied(stored, monkeypatch):
    row, released = Export(model="llama", recipe="nvfp4"), set()
    monkeypatch.setattr(MappedTensors, "release", lambda self, name: released.add(name))
    ji.load(stored(row))
    assert released == set(open_model(stored(row)).checkpoint.tensors)


def test_a_file_that_changes_later_changes_no_parameter(stored, tmp_path: Path):
    """Tensors at addresses that JAX would share are copied too."""
    for row in (row for row in ROWS if row.model == "llama" and row.shard == "10GB"):
        tensors = open_model(stored(row)).checkpoint.tensors.values()
        if any(tensor.start % 64 == 0 and len(tensor.shape) == 2 for tensor in tensors):
            break
    else:
        raise AssertionError("no export has a matrix at such an address")
    folder = shutil.copytree(stored(row), tmp_path / "model")
    model = ji.load(folder)
    file = folder / "model.safetensors"
    with open(file, "r+b") as weights:
        weights.write(bytes(file.stat().st_size))
    same(model.params, model_of(row).params)


# --- descriptions that say less


SAID_ONCE = [row for row in ROWS if row.model == "llama" and row.shard == "10GB"]


@pytest.mark.parametrize("row", SAID_ONCE, ids=lambda row: row.key)
def test_one_description_is_enough(stored, tmp_path: Path, row: Export):
    """config.json alone, hf_quant_config.json alone, and both without the size of blocks."""
    whole = open_model(stored(row))
    inline = shutil.copytree(stored(row), tmp_path / "inline")
    (inline / "hf_quant_config.json").unlink()
    file = shutil.copytree(stored(row), tmp_path / "file")
    config = json.loads((file / "config.json").read_text())
    del config["quantization_config"]
    (file / "config.json").write_text(json.dumps(config))
    edit(file, "hf_quant_config.json", group_size=None)
    for folder in (inline, file):
        source = open_model(folder)
        assert (source.choices, source.spec) == (whole.choices, whole.spec)


def test_single_numbers_may_be_arrays_of_one(stored, tmp_path: Path):
    row = Export(model="llama", recipe="nvfp4", kv="nvfp4")
    folder = shutil.copytree(stored(row), tmp_path / "model")
    arrays = open_tensors(folder / "model.safetensors")
    write(folder, {name: a.reshape(a.shape or (1,)).copy() for name, a in arrays.items()})
    same(ji.load(folder).params, model_of(row).params)


def test_factors_and_names_of_awq(stored, tmp_path: Path):
    """NVFP4_AWQ is NVFP4 with factors on some inputs, and names may be in another case."""
    row, name = Export(model="llama", recipe="nvfp4"), "model.layers.0.self_attn.o_proj"
    folder = shutil.copytree(stored(row), tmp_path / "model")
    for description in ("config.json", "hf_quant_config.json"):
        edit(folder, description, quant_algo="nvfp4_awq")
    factor = np.linspace(0.5, 2, 128).astype(jnp.bfloat16)
    arrays = open_tensors(folder / "model.safetensors")
    write(folder, {n: a.copy() for n, a in arrays.items()} | {f"{name}.pre_quant_scale": factor})
    model = ji.load(folder)
    found = flatten(model.params)[f"{name}.weight"]
    assert {choice.variant for choice in open_model(folder).choices.values()} == {"awq"}
    np.testing.assert_array_equal(found.pre_quant_scale, factor)
    same({"a": found.replace(pre_quant_scale=None)}, {"a": leaves(row)[f"{name}.weight"]})


def test_a_head_may_be_quantized(tmp_path: Path):
    """No recipe here does it; other people's do."""
    row = Export(model="llama", recipe="int8_weight_only")
    model, name = model_of(row), "lm_head.weight"
    q = jax.jit(lambda w: QTensor.quantize(w, "int8"))(model.params["lm_head"]["weight"])
    model = replace(model, params=unflatten(flatten(model.params) | {name: q}))
    again = ji.load(ji.save(model, tmp_path / "out"))
    same(again.params, model.params)
    assert open_model(tmp_path / "out").choices["lm_head"] == Choice(weight="int8")


NAMED = (*((*pair, None) for pair in ALGOS), *VARIANT_ALGOS)
CHOICES = [Choice(weight=w, input=i, variant=v) for w, i, v in sorted(NAMED, key=str)]
LINEARS = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("a.q", "a.qq", "mlp.up", "mlp.down")]
SHAPE = (8, 384)


@given(
    chosen=st.lists(st.sampled_from([None, *CHOICES]), min_size=8, max_size=8),
    one=st.booleans(),
    block=st.sampled_from([None, 48, 64]),
    kv=st.sampled_from([None, *KV_ALGOS]),
    left=st.sampled_from(["both", "config.json", "hf_quant_config.json"]),
)
def test_what_is_described_is_what_is_read(chosen, one, block, kv, left):
    """`choices_of` after `describe` is the identity, but for mxfp4, whose name says nothing of
    inputs.
    """
    if one:
        first = next((choice for choice in chosen if choice), Choice(weight="fp8", input="fp8"))
        chosen = [choice and first for choice in chosen]
    found = {}
    for path, choice in zip(LINEARS, chosen, strict=True):
        if choice is not None:
            vary = block and choice.weight in ("int4", "int4_fp8", "mxfp8")
            found[path] = replace(choice, weight=f"{choice.weight}_b{block}") if vary else choice
    if not found:
        return
    rest = [path for path in LINEARS if path not in found]
    target = TARGETS["modelopt"]
    inline = target.quantization_config(found, [*rest, "lm_head"], kv)
    file = target.files["hf_quant_config.json"](found, [*rest, "lm_head"], kv)
    stated = read_stated(
        None if left == "hf_quant_config.json" else inline, None if left == "config.json" else file
    )
    grids = {path: _scale_shape(choice) for path, choice in found.items()}
    read = choices_of(stated, dict.fromkeys(LINEARS, SHAPE), grids)
    assert list(read) == list(found)
    for path, choice in found.items():
        if choice.weight == "mxfp4" and choice.input != "fp8":
            assert read[path].weight == "mxfp4"
        else:
            assert read[path] == choice
    scales, biases = kv is not None and "cast" not in kv, kv is not None and "affine" in kv
    assert kv_of(stated.kv, scales=scales, biases=biases) == kv


def _scale_shape(choice: Choice) -> tuple[int, ...]:
    fmt = find_format(choice.weight)
    grid = grid_shape(fmt, SHAPE)
    return grid if fmt.block[1] and fmt.block[0] == 1 else grid[:-1]
