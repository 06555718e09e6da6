# SPDX-License-Identifier: Apache-2.0
"""Tied heads that a checkpoint ships all the same, biases of keys in the model's dtype, and what is
said when calibration met nothing but zeros.
"""

import json

import exports
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jqx_interop as ji
from jqx_interop.progress import Silent


@pytest.fixture
def tied(tmp_path):
    """A tied checkpoint that ships a head; `make(scale)` says by what it differs."""

    def make(scale, model_type="llama"):
        folder = exports.write_base(tmp_path / "base", "llama")
        config = json.loads((folder / "config.json").read_text())
        config |= {"tie_word_embeddings": True, "model_type": model_type}
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = (embedding * np.float32(scale)).astype(embedding.dtype)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("model_type", ["llama", "nobody_knows"])
@pytest.mark.parametrize(("scale", "kept"), [(1, False), (2, True)])
def test_a_tied_head_is_kept_only_if_it_differs(tied, tmp_path, model_type, scale, kept):
    report = ji.ptq(tied(scale, model_type), tmp_path / "out", "mxfp4")
    assert ("lm_head.weight" in exports.read_tensors(tmp_path / "out")) == kept
    described = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert "lm_head" in described["quantization"]["exclude_modules"]
    assert report.coverage.linears == 14


@pytest.mark.parametrize(("model", "dtype"), [("llama_f16", "F16"), ("llama_f32", "F32")])
def test_key_biases_have_the_dtype_of_the_model(tmp_path, model, dtype):
    base = exports.write_base(tmp_path / "base", model)
    ids = tmp_path / "base-ids.npy"
    ji.ptq(base, tmp_path / "out", "fp8", kv_cache="fp8_affine", calib=ids)
    found = exports.read_tensors(tmp_path / "out")
    kinds = {found[name][0] for name in found if name.endswith(("k_bias", "v_bias"))}
    assert kinds == {dtype}


class Notes(Silent):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


def test_inputs_that_are_always_zero_are_named(tmp_path):
    """A norm of zeros feeds q, k and v nothing: their scale is a guess, and the run says so."""
    base = exports.write_base(tmp_path / "base", "llama")
    tensors = load_file(base / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    tensors[norm] = np.zeros_like(tensors[norm])
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    notes = Notes()
    ji.ptq(base, tmp_path / "out", "fp8", calib=tmp_path / "base-ids.npy", progress=notes)
    said = [line.split()[0] for line in notes.lines if "only zeros" in line]
    prefix = "model.layers.1.self_attn."
    assert {prefix + name for name in ("q_proj", "k_proj", "v_proj")} <= set(said)
    scale = exports.read_tensors(tmp_path / "out")[prefix + "q_proj.input_scale"]
    assert np.frombuffer(scale[2], np.float32) == 1
