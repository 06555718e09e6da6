# SPDX-License-Identifier: Apache-2.0
"""`jqx rotate`: the same model in another basis, for every family, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from command import jqx, refused
from golden import make_models as golden
from numpy.typing import DTypeLike
from safetensors.numpy import load_file, save_file
from source import edit, untouched

import jqx_interop as ji
from jqx.errors import InputError
from jqx.models import param_shapes
from jqx_interop import rotating as module
from jqx_interop.families import spec_from_config
from jqx_interop.rotating import roles_of

IDS = jnp.asarray(golden.token_ids(), jnp.int32)


def written(folder: Path, case: str, dtype: DTypeLike = np.float32) -> Path:
    config = golden.CASES[case]
    folder.mkdir()
    shapes = param_shapes(spec_from_config(config))
    tensors = {name: golden.weight(name, shape).astype(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {**config, "torch_dtype": np.dtype(dtype).name}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text("{}")
    return folder


def logits(folder: Path) -> np.ndarray:
    model = ji.load(folder)
    return np.asarray(model.apply({"params": model.params}, IDS))


@pytest.mark.parametrize("case", golden.CASES)
def test_a_rotated_model_has_the_same_outputs(case: str, tmp_path: Path):
    source, out = written(tmp_path / "source", case), tmp_path / "out"
    done = ji.rotate(source, out, seed=3)
    before, after = logits(source), logits(out)
    assert np.max(np.abs(after - before)) <= 3e-5 * np.std(before)
    config = golden.CASES[case]
    assert done["channels"] == config["hidden_size"]
    kept = {**config, "torch_dtype": "float32", "tie_word_embeddings": False}
    assert json.loads((out / "config.json").read_text()) == kept
    assert (out / "special_tokens_map.json").read_text() == "{}"
    assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in source.iterdir())


@pytest.mark.parametrize("case", ["gemma", "llama_biases"])
def test_what_reads_or_writes_the_stream_is_turned_and_gains_are_gone(case: str, tmp_path: Path):
    source, out = written(tmp_path / "source", case), tmp_path / "out"
    ji.rotate(source, out)
    before, after = (load_file(f / "model.safetensors") for f in (source, out))
    same = [name for name in before if np.array_equal(before[name], after[name])]
    layers = range(golden.CASES[case]["num_hidden_layers"])
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")
    untouched = {f"model.layers.{i}.{name}.bias" for i in layers for name in names}
    assert set(same) == untouched & set(before)
    for name, gain in after.items():
        if name.endswith("norm.weight"):
            assert (gain == (0 if case == "gemma" else 1)).all()
    assert set(after) == {*before, "lm_head.weight"}


def test_the_seed_draws_the_rotation(tmp_path: Path):
    source = written(tmp_path / "source", "mistral_full")
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        ji.rotate(source, tmp_path / name, seed)
    one, same, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "same", "other")
    )
    assert one == same
    assert one != other


def test_large_tensors_are_turned_in_slices(tmp_path: Path, monkeypatch):
    source = written(tmp_path / "source", "qwen2_window_from_1")
    ji.rotate(source, tmp_path / "whole")
    monkeypatch.setattr(module, "CHUNK", 9 * 32)  # no multiple of a head, nor of the vocabulary
    ji.rotate(source, tmp_path / "slices")
    whole, slices = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "slices"))
    for name, array in whole.items():
        np.testing.assert_allclose(slices[name], array, atol=1e-6, err_msg=name)


def test_tensors_keep_their_dtype_and_are_rounded_once(tmp_path: Path):
    half = np.dtype(ml_dtypes.bfloat16)
    source = written(tmp_path / "half", "mistral_full", half)
    wide = written(tmp_path / "wide", "mistral_full")  # the same numbers
    ji.rotate(source, tmp_path / "half_out")
    ji.rotate(wide, tmp_path / "wide_out")
    rounded, exact = (
        load_file(tmp_path / n / "model.safetensors") for n in ("half_out", "wide_out")
    )
    for name, array in exact.items():
        assert rounded[name].dtype == half
        np.testing.assert_array_equal(rounded[name], array.astype(half), err_msg=name)


def test_a_rotated_checkpoint_is_quantized_like_any(tmp_path: Path):
    source = written(tmp_path / "source", "qwen2_window_from_1", np.dtype(ml_dtypes.bfloat16))
    code, said, err = jqx("rotate", source, tmp_path / "turned", "--seed", 5, "--json")
    assert (code, json.loads(said)["seed"]) == (0, 5), err
    assert json.loads(said)["head"] == "its own"
    ji.ptq(tmp_path / "turned", tmp_path / "out", "int8_weight_only")
    assert np.isfinite(logits(tmp_path / "out")).all()
    code, said, err = jqx("rotate", source, tmp_path / "again")
    assert code == 0, err
    assert "32 channels rotated" in said


def test_norms_that_are_no_root_mean_squares_are_refused():
    spec = spec_from_config(golden.CASES["mistral_full"])
    kind = spec.blocks[0]
    layer = replace(kind, norm=replace(kind.norm, kind="layer"))
    with pytest.raises(InputError, match="norms of kind layer are not the same in another basis"):
        roles_of(replace(spec, blocks=(kind, layer)))


def test_bad_input_is_refused_in_one_line(here: Path):
    untouched(here, "rotate", "nowhere", "out", saying="nowhere")
    untouched(here, "rotate", "source", "source", saying="is the model itself")
    untouched(here, "rotate", "source", "out", "--seed", -1, saying="seed is -1")
    untouched(here, "rotate", "source", "out", "--seed", 2**70, saying="seed is 11805")
    edit(here / "source", model_type="lama")
    untouched(here, "rotate", "source", "out", saying=("unknown model_type 'lama'", "source"))
    edit(here / "source", model_type="llama", quantization_config={"quant_method": "fp8"})
    untouched(here, "rotate", "source", "out", saying="no weight is quantized")


def test_damaged_numbers_are_refused(here: Path):
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(here / "source" / "model.safetensors")
    tensors[name] = tensors[name].copy()
    tensors[name][3, 4] = np.nan
    save_file(tensors, here / "source" / "model.safetensors", {"format": "pt"})
    refused("rotate", "source", "out", saying=(name, "NaN"))
    assert not (here / "out").exists()
