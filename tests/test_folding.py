# SPDX-License-Identifier: Apache-2.0
"""Factors of inputs that go into the weights before: the model computes the same without them, and
nothing is left beside the codes.
"""

import json
from pathlib import Path

import exports
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import write
from command import jqx, refused
from damage import arrays

import jqx_interop as ji
from jqx.algorithms.linear import Linear
from jqx.algorithms.shared import not_above_one
from jqx.models import forward
from jqx.tensors import QTensor
from jqx.tensors.paths import flatten, unflatten
from jqx_interop import searched
from jqx_interop.targets import METHOD

BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
MODELS = {
    "grouped": BASE,
    "one key head": BASE | {"num_key_value_heads": 1},
    "as many": BASE | {"num_key_value_heads": 4},
    "biases": BASE | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "gain plus one": BASE
    | {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "head_dim": 16,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
}
IDS = np.random.default_rng(3).integers(0, 96, (3, 2, 14)).astype(np.int64)


def made(folder: Path, name: str, dtype: str = "float32") -> Path:
    """A model whose input channels matter unequally."""
    config = MODELS[name] | {"torch_dtype": dtype}
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype("f4")
    found = {n: exports.draw(n, s, kind) for n, s in exports.shapes(config).items()}
    folder.mkdir(parents=True)
    write(folder, found)
    (folder / "config.json").write_text(json.dumps(config))
    np.save(folder.with_name("ids.npy"), IDS)
    return folder


CASES = {
    "int4_awq": ("int4_awq", {"block": "32"}, METHOD),
    "awq_full": ("int4_awq", {"block": "32", "algorithm": "awq_full"}, METHOD),
    "awq, gptq": ("awq_gptq", {}, METHOD),
    "nvfp4_awq": ("nvfp4_awq_lite", {}, "modelopt"),
    "smoothquant": ("int8_smoothquant", {"alpha": "0.6"}, METHOD),
    "smoothquant, tokens": ("tokens", {"alpha": "0.4"}, METHOD),
    "smoothquant, fp8": ("fp8", {"algorithm": "smoothquant", "alpha": "0.3"}, METHOD),
    "awq layout": ("int4_awq", {"block": "32"}, "awq"),
}
FILES = {
    "awq_gptq": "extends: int4_awq\nalgorithm: [awq_lite, gptq]\n"
    "rules:\n  - {path_glob: '*_proj*', weight: int4_b32}\n",
    "tokens": "extends: int8_smoothquant\nrules:\n  - {path_glob: '*_proj*', input: int8_token}\n",
}


def settings(case: str, folder: Path, **more: object) -> tuple[object, dict]:
    """The recipe, and how `ptq` is told the rest."""
    from jqx_interop.recipe_files import read_recipe

    name, options, target = CASES[case]
    recipe: object = name
    if name in FILES:
        (folder / "recipe.yaml").write_text(FILES[name])
        recipe = read_recipe(folder / "recipe.yaml")
    given = {k: v for k, v in options.items() if k != "algorithm"}
    said = {"options": tuple(given.items()), "algorithm": options.get("algorithm")}
    said |= {"target": target, "fold": True, "calib": folder / "ids.npy"}
    return recipe, said | {"calib_size": 6, "calib_seq": 14} | more


def uncoded(monkeypatch) -> dict[str, np.ndarray]:
    """Where the weights of linears are kept as they are before they are rounded to codes."""
    kept, finished = {}, searched.Search._finished

    def keeping(self, path):
        kept[f"{path}.weight"] = np.asarray(self._linears[path].weight)
        assert self._linears[path].pre_quant_scale is None
        return finished(self, path)

    monkeypatch.setattr(searched.Search, "_finished", keeping)
    return kept


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", [case for case in CASES if "gptq" not in case])
def test_the_model_computes_the_same(tmp_path, monkeypatch, model, case):
    """Before weights are rounded to codes, that is."""
    base = made(tmp_path / "model", model)
    kept = uncoded(monkeypatch)
    recipe, said = settings(case, tmp_path)
    ji.ptq(base, tmp_path / "out", recipe, **said)
    plain = ji.load(base)
    changed = arrays(tmp_path / "out")
    params = {
        name: kept.get(name, changed.get(name, leaf))
        for name, leaf in flatten(plain.params).items()
    }
    assert len(kept) == 14
    moved = [n for n in params if np.any(np.asarray(params[n]) != arrays(base)[n])]
    parts = ("up_proj", "down_proj", "o_proj", "v_proj", "input_layernorm", "post_attention_layern")
    for part in parts:
        assert any(f".0.{group}{part}" in n for n in moved for group in ("mlp.", "self_attn.", ""))
    for i in range(IDS.shape[0]):
        wanted = forward(plain.spec, plain.params, jnp.asarray(IDS[i]))
        found = forward(plain.spec, unflatten(params), jnp.asarray(IDS[i]))
        np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_beside_the_codes(tmp_path, case):
    base = made(tmp_path / "model", "grouped", "bfloat16")
    recipe, said = settings(case, tmp_path)
    ji.ptq(base, tmp_path / "out", recipe, **said)
    assert not [n for n in arrays(tmp_path / "out") if "pre_quant_scale" in n]
    model = ji.load(tmp_path / "out")
    stored = [q for q in flatten(model.params).values() if isinstance(q, QTensor)]
    assert len(stored) == 14
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said.get("quant_algo") in ((None, "NVFP4") if case == "nvfp4_awq" else (None,))


def divergence(model, base) -> float:
    """The mean KL divergence on the calibration ids."""
    total = 0.0
    for ids in IDS:
        p, q = (
            np.asarray(m.apply({"params": m.params}, jnp.asarray(ids)), np.float64)
            for m in (base, model)
        )
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
        total += float(np.mean(np.sum(np.exp(p) * (p - q), -1)))
    return total / len(IDS)


@pytest.mark.parametrize("model", ["grouped", "biases"])
def test_it_is_better_than_to_round(tmp_path, model):
    base = made(tmp_path / "model", model, "bfloat16")
    recipe, said = settings("int4_awq", tmp_path)
    ji.ptq(base, tmp_path / "folded", recipe, **said)
    rounded = "int4_blockwise_weight_only"
    ji.ptq(base, tmp_path / "rounded", rounded, **(said | {"target": METHOD, "algorithm": "max"}))
    plain = ji.load(base)
    found = {n: divergence(ji.load(tmp_path / n), plain) for n in ("folded", "rounded")}
    assert found["folded"] < found["rounded"] / 2


def test_stored_values_do_not_grow(tmp_path, monkeypatch):
    base = made(tmp_path / "model", "grouped")
    kept = uncoded(monkeypatch)
    recipe, said = settings("int4_awq", tmp_path, kv_cache="fp8")
    ji.ptq(base, tmp_path / "out", recipe, **said)
    gains = [arrays(base)["model.layers.0.input_layernorm.weight"]]
    gains.append(arrays(tmp_path / "out")["model.layers.0.input_layernorm.weight"])
    name = "model.layers.0.self_attn.v_proj.weight"
    before, after = arrays(base)[name] * gains[0], kept[name] * gains[1]
    rows = np.abs(after).max(1) / np.abs(before).max(1)
    assert rows.max() <= 1 + 1e-6
    assert rows.min() < 0.9


def test_a_power_of_two_is_taken_off_exactly():
    for most in (0.3, 0.5, 1.0, 1.5, 7.0, 1e-6, 3e5):
        p = jnp.asarray([most, most / 3, most / 7], jnp.bfloat16)
        w = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.bfloat16)
        found = not_above_one(Linear(w, pre_quant_scale=p))
        assert float(jnp.max(found.pre_quant_scale)) <= 1
        pair = (found.weight, found.pre_quant_scale)
        products = [np.float32(a) * np.float32(b) for a, b in ((w, p), pair)]
        np.testing.assert_array_equal(*products)


def test_linears_without_a_place_for_a_factor_are_not_scaled(tmp_path, monkeypatch):
    """The keys stay as they are, so the norm takes no factor; values may still be scaled."""
    base = made(tmp_path / "model", "grouped")
    kept = uncoded(monkeypatch)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "extends: int4_awq\nrules:\n  - {path_glob: '*_proj*', weight: int4_b32}\n"
        "  - {path_glob: '*.k_proj*', weight: null}\n"
        "  - {path_glob: '*.1.mlp.up_proj*', weight: null}\n"
    )
    asked = ("--recipe", recipe, "--calib", tmp_path / "ids.npy", "--target", METHOD)
    code, _, err = jqx("quantize", base, tmp_path / "out", *asked)
    assert code == 0, err
    found, source = arrays(tmp_path / "out"), arrays(base)
    for name in ("0.input_layernorm", "1.post_attention_layernorm"):
        name = f"model.layers.{name}.weight"
        np.testing.assert_array_equal(found[name], source[name])
    for name in ("0.self_attn.q_proj", "1.mlp.gate_proj", "1.mlp.down_proj"):
        name = f"model.layers.{name}.weight"
        np.testing.assert_array_equal(kept[name], source[name])
    for name in ("0.self_attn.v_proj", "0.mlp.up_proj", "0.mlp.down_proj"):
        assert np.any(kept[f"model.layers.{name}.weight"] != source[f"model.layers.{name}.weight"])


# --- FP8 with one scale for linears that read one input


@pytest.mark.parametrize("algorithm", ["max", "mse", "wmse"])
def test_one_scale_for_linears_that_engines_fuse(tmp_path, algorithm):
    base = made(tmp_path / "model", "grouped", "bfloat16")
    asked = {"calib": tmp_path / "ids.npy", "calib_size": 6, "calib_seq": 14}
    asked |= {"algorithm": algorithm}
    ji.ptq(base, tmp_path / "own", "fp8", **asked)
    ji.ptq(base, tmp_path / "one", "fp8", **asked, unify_fp8=True)
    own, one = arrays(tmp_path / "own"), arrays(tmp_path / "one")
    for i in (0, 1):
        for parent, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            paths = [f"model.layers.{i}.{parent}.{name}_proj" for name in names]
            for leaf in ("weight_scale", "input_scale"):
                wanted = max(float(own[f"{path}.{leaf}"]) for path in paths)
                assert [float(one[f"{path}.{leaf}"]) for path in paths] == [wanted] * len(paths)
        path = f"model.layers.{i}.mlp.down_proj.weight_scale"
        np.testing.assert_array_equal(one[path], own[path])
    name = "model.layers.0.self_attn.k_proj.weight"
    w = arrays(base)[name].astype(np.float32)
    step = one["model.layers.0.self_attn.k_proj.weight_scale"]
    assert np.abs(one[name].astype(np.float32) * step - w).max() <= np.abs(w).max() / 16 + step


# --- what is refused


def test_what_cannot_be_folded(tmp_path):
    base = made(tmp_path / "model", "grouped", "bfloat16")
    out, calib = tmp_path / "out", ("--calib", tmp_path / "ids.npy")
    told = "compressed-tensors has no name for nvfp4 with nvfp4 inputs and svd factors"
    asked = ("--qformat", "nvfp4_svdquant", "--set", "lowrank=8", "--target", METHOD)
    refused("quantize", base, out, *asked, *calib, saying=told)
    asked = ("--qformat", "nvfp4_svdquant", "--set", "lowrank=8", "--fold")
    refused("quantize", base, out, *asked, *calib, saying="a low-rank part folds into nothing")
    asked = ("--qformat", "nvfp4", "--unify-fp8")
    refused("quantize", base, out, *asked, *calib, saying="--unify-fp8 is for weights in fp8")
    asked = ("--qformat", "int4_awq", "--set", "block=32", "--target", METHOD, "--no-fold")
    told = "compressed-tensors has no name for int4_b32 with plain inputs and awq factors"
    refused("quantize", base, out, *asked, *calib, saying=told)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "unheard"}))
    acts = {}
    for name, array in arrays(base).items():
        if name.endswith("_proj.weight"):
            x = np.ones((1, 8, array.shape[1]), np.float32)
            acts[f"{name.removesuffix('.weight')}|0"] = x
    from safetensors.numpy import save_file

    save_file(acts, tmp_path / "acts.safetensors")
    asked = ("--qformat", "int4_awq", "--set", "block=32", "--target", METHOD)
    asked += ("--activations", tmp_path / "acts.safetensors")
    refused("quantize", base, out, *asked, saying=("'unheard' is not defined here", "--no-fold"))
    assert not out.exists()
