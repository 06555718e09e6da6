# SPDX-License-Identifier: Apache-2.0
"""Weights that are compressed as they are read, by `load` and by `jqx quantize --low-memory`: the
bytes of weights are those of the ordinary way, and the full model is never there.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import exports
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from command import jqx as command
from command import refused
from source import MODEL, untouched

import jqx
import jqx_interop as ji
from jqx import InputError, QTensor
from jqx.tensors.paths import flatten
from jqx_interop import compressing, runner, weights
from jqx_interop.checkpoints import open_checkpoint
from jqx_interop.job import prepare
from jqx_interop.pipeline import Inputs, fingerprint
from jqx_interop.plan import make_plan
from jqx_interop.settings import Settings

DATA_FREE = ("mxfp8", "int4_blockwise_weight_only", "w4a16_nvfp4", "int8_weight_only")
STATIC = ("fp8", "nvfp4", "int8")
"""Recipes whose inputs have a stored scale."""

NEAR = 0.3
"""NVFP4 moves the largest input of one linear in this model of drawn weights by a quarter."""

LAYERS = jqx.Rule(path_glob="model.layers", weight="nf4_double", kind="linear")
NF4 = jqx.QuantConfig(rules=(LAYERS,))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model, its ids, and what becomes of it by every recipe."""
    folder = tmp_path_factory.mktemp("models")
    exports.write_base(folder / MODEL, "llama")
    (folder / f"{MODEL}-ids.npy").rename(folder / "ids.npy")
    for name in (*DATA_FREE, *STATIC):
        ji.ptq(folder / MODEL, folder / name, name, calib=folder / "ids.npy")
    return folder


def leaves(model: ji.Model) -> dict[str, Any]:
    return flatten(model.params)


def stored_bytes(x: Any) -> bytes:
    return np.asarray(x).tobytes()


def same_weights(mine: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal but for the scales of inputs."""
    assert mine.keys() == other.keys()
    for name, want in other.items():
        got = mine[name]
        if isinstance(want, QTensor):
            assert got.input_format == want.input_format
            got, want = got.replace(input_scale=None), want.replace(input_scale=None)
        assert jax.tree.structure(got) == jax.tree.structure(want), name
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        assert all(stored_bytes(a) == stored_bytes(b) for a, b in pairs), name


# --- load(..., quantize=...)


@pytest.mark.parametrize("name", [*DATA_FREE, *STATIC])
def test_weights_are_those_that_are_written(root: Path, name: str):
    """Shared tensor scales, block scales, codes, and everything that is not quantized."""
    got, want = ji.load(root / MODEL, quantize=name), ji.load(root / name)
    same_weights(leaves(got), leaves(want))
    assert all(q.input_scale is None for q in leaves(got).values() if isinstance(q, QTensor))


def test_linears_that_read_one_input_share_a_tensor_scale(root: Path):
    got = leaves(ji.load(root / MODEL, quantize="nvfp4"))
    for group in (("self_attn", "q_proj", "k_proj", "v_proj"), ("mlp", "gate_proj", "up_proj")):
        names = [f"model.layers.0.{group[0]}.{name}.weight" for name in group[1:]]
        assert len({float(got[name].tensor_scale) for name in names}) == 1


@pytest.mark.parametrize("name", DATA_FREE)
def test_without_scales_of_inputs_the_files_are_equal_too(root: Path, tmp_path: Path, name: str):
    ji.save(ji.load(root / MODEL, quantize=name), tmp_path / "out")
    assert exports.digests(tmp_path / "out") == exports.digests(root / name)


def test_a_search_that_needs_no_data(root: Path, tmp_path: Path):
    ji.ptq(root / MODEL, tmp_path / "mse", "int8_weight_only", algorithm="mse")
    config = dataclasses.replace(jqx.RECIPES["int8_weight_only"].config, algorithm="mse")
    got = leaves(ji.load(root / MODEL, quantize=config))
    same_weights(got, leaves(ji.load(tmp_path / "mse")))
    plain = leaves(ji.load(root / "int8_weight_only"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert stored_bytes(got[name].scale) != stored_bytes(plain[name].scale)


def test_a_recipe_file_and_a_configuration(root: Path, tmp_path: Path):
    given = {
        "extends": "int8_weight_only",
        "rules": [{"path_glob": "*.layers.1.*", "weight": None}],
        "kv_cache": "fp8_cast",
    }
    (tmp_path / "some.json").write_text(json.dumps(given))
    model = ji.load(root / MODEL, quantize=str(tmp_path / "some.json"))
    stored = [name for name, x in leaves(model).items() if isinstance(x, QTensor)]
    assert stored == [n for n in stored if n.startswith("model.layers.0.")]
    assert (len(stored), model.spec.kv_cache) == (7, "fp8_cast")
    as_path = ji.load(root / MODEL, quantize=tmp_path / "some.json")
    same_weights(leaves(as_path), leaves(model))
    whole = ji.load(root / MODEL, quantize=jqx.RECIPES["int8_weight_only"].config)
    same_weights(leaves(whole), leaves(ji.load(root / "int8_weight_only")))


def test_formats_without_a_name_in_a_layout(root: Path, monkeypatch):
    """Double quantization has a mean of all scales, so slices of rows would change it."""
    monkeypatch.setattr(weights, "CHUNK", 1 << 10)
    got, plain = leaves(ji.load(root / MODEL, quantize=NF4)), leaves(ji.load(root / MODEL))
    name = "model.layers.1.mlp.gate_proj.weight"
    want = jqx.compress({"w": plain[name]}, config=one("nf4_double"), axes=-1)["w"]
    assert jax.tree.structure(got[name]) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want), strict=True):
        assert stored_bytes(a) == stored_bytes(b)
    assert got["lm_head.weight"].dtype == jnp.bfloat16


def one(weight: str) -> jqx.QuantConfig:
    return jqx.QuantConfig(rules=(jqx.Rule(weight=weight),))


@pytest.mark.parametrize("name", ["nvfp4", "int4_blockwise_weight_only"])
def test_the_full_model_is_never_held(root: Path, monkeypatch, name: str):
    """When a weight is read there are only stored ones, and one more on its way to the device:
    plain tensors are read last.
    """
    held, full = [], sum(info.nbytes for info in _tensors(root / MODEL).values())
    before = {id(x) for x in jax.live_arrays()}
    plain_encode = weights.encode_weight

    def encode(w, fmt, whole):
        assert not w.flags.owndata  # a part of the mapped file
        held.append(sum(x.nbytes for x in jax.live_arrays() if id(x) not in before))
        return plain_encode(w, fmt, whole)

    monkeypatch.setattr(weights, "encode_weight", encode)
    model = ji.load(root / MODEL, quantize=name)
    quantized = sum(x.nbytes for x in leaves(model).values() if isinstance(x, QTensor))
    assert len(held) == 14
    assert max(held) <= 1.05 * quantized
    assert quantized < 0.4 * full


def _tensors(path: Path) -> dict[str, Any]:
    return dict(compressing.decide(open_checkpoint(path), "fp8", Settings()).checkpoint.tensors)


REFUSED = {
    "awq": ("int4_awq", r"^recipe int4_awq: awq_lite needs calibration data, and .*jqx quantize"),
    "gptq": ("int4_gptq", "gptq needs calibration data"),
    "smoothquant": ("int8_smoothquant", "smoothquant needs calibration data"),
    "keys and values": ("kv.json", "^recipe kv: keys and values in fp8 need scales, and none are"),
    "no recipe": ("nvfp5", "^unknown format 'nvfp5'; did you mean"),
    "no file": ("nowhere.yaml", "^nowhere.yaml: no such recipe file"),
    "a number": (4, "^int is no configuration"),
    "selects nothing": (one("fp8_block"), None),
}


@pytest.mark.parametrize(("recipe", "message"), REFUSED.values(), ids=REFUSED)
def test_recipes_that_cannot_be_loaded(root: Path, tmp_path: Path, monkeypatch, recipe, message):
    monkeypatch.chdir(tmp_path)
    Path("kv.json").write_text(json.dumps({"extends": "fp8", "kv_cache": "fp8"}))
    if message is None:  # a rule without kind is about embeddings too
        message = "^model.embed_tokens: embeddings are read as they are"
    with pytest.raises(InputError, match=message) as caught:
        ji.load(root / MODEL, quantize=recipe)
    assert "\n" not in str(caught.value)


# --- calibrated afterwards


@pytest.mark.parametrize("name", [*STATIC, "nf4_double"])
def test_inputs_are_calibrated_after_loading(root: Path, tmp_path: Path, name: str):
    cfg = NF4 if name == "nf4_double" else name
    if name == "nf4_double":
        cfg = jqx.QuantConfig(rules=(dataclasses.replace(LAYERS, input="fp8"),))
    model = ji.load(root / MODEL, quantize=cfg)
    batches = list(np.load(root / "ids.npy"))
    run = lambda params, ids: model.apply({"params": params}, ids)  # noqa: E731
    stats = jqx.calibrate(run, model.params, batches, cfg)
    dense = jqx.calibrate(run, jqx.dequantize(model.params), batches, cfg)
    assert len(stats.entries) == 14
    for path in dense.entries:
        np.testing.assert_array_equal(stats.get(path, "amax"), dense.get(path, "amax"))
    done = jqx.quantize(model.params, cfg, stats)
    same_weights(flatten(done), leaves(model))
    scales = {n: x.input_scale for n, x in flatten(done).items() if isinstance(x, QTensor)}
    assert all(float(scale) > 0 for scale in scales.values())
    if name in STATIC:
        ji.save(dataclasses.replace(model, params=done), tmp_path / "out")
        back = leaves(ji.load(tmp_path / "out"))
        assert {n: x.input_scale for n, x in back.items() if isinstance(x, QTensor)} == scales
        written = leaves(ji.load(root / name))  # calibrated on the plain model
        for path, scale in scales.items():
            np.testing.assert_allclose(scale, written[path].input_scale, rtol=NEAR)


def test_before_it_is_calibrated_it_cannot_be_saved(root: Path, tmp_path: Path):
    with pytest.raises(InputError, match="has no input_scale, which nvfp4 inputs need: calibrate"):
        ji.save(ji.load(root / MODEL, quantize="nvfp4"), tmp_path / "out")


# --- jqx quantize --low-memory


@pytest.mark.parametrize("name", [*DATA_FREE, *STATIC])
def test_files_of_both_ways(root: Path, tmp_path: Path, name: str):
    words = ("--qformat", name, "--calib", root / "ids.npy", "--low-memory")
    code, _, err = command("quantize", root / MODEL, tmp_path / "out", *words)
    assert (code, err) == (0, "")
    got, want = exports.digests(tmp_path / "out"), exports.digests(root / name)
    assert got.keys() == want.keys()
    differ = [tensor for tensor in got if got[tensor] != want[tensor]]
    assert all(tensor.endswith("input_scale") for tensor in differ)
    assert bool(differ) == (name in STATIC)
    for tensor, (scale,) in exports.calibrated(tmp_path / "out").items():
        (other,) = exports.calibrated(root / name)[tensor]
        assert scale == pytest.approx(other, rel=NEAR)


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_inputs_are_those_of_the_compressed_model(tmp_path: Path, name: str):
    """Beside `load` and `calibrate`, on a float32 model, where neither rounds what it meets."""
    exports.write_base(tmp_path / MODEL, "llama_f32")
    ids = np.random.default_rng(0).integers(0, 128, (2, 2, 16))
    np.save(tmp_path / "ids.npy", ids)
    given = {"calib": tmp_path / "ids.npy", "compute": "float32", "low_memory": True}
    ji.ptq(tmp_path / MODEL, tmp_path / "out", name, **given)
    model = ji.load(tmp_path / MODEL, quantize=name)
    run = lambda params, ids: model.apply({"params": params}, ids)  # noqa: E731
    stats = jqx.calibrate(run, model.params, list(ids), name)
    got = leaves(ji.load(tmp_path / "out"))
    for path, want in flatten(jqx.quantize(model.params, name, stats)).items():
        if isinstance(want, QTensor):
            np.testing.assert_allclose(got[path].input_scale, want.input_scale, rtol=1e-5)


@pytest.mark.parametrize("low", [False, True])
def test_a_block_is_held_compressed(root: Path, tmp_path: Path, monkeypatch, low: bool):
    step, sizes = runner.block_step, []

    def counted(params, h, *, program):
        sizes.append(sum(x.nbytes for x in jax.tree.leaves(params) if x.ndim))
        return step(params, h, program=program)

    monkeypatch.setattr(runner, "block_step", counted)
    given = {"calib": root / "ids.npy", "compute": "float32", "low_memory": low}
    ji.ptq(root / MODEL, tmp_path / "out", "nvfp4", **given)
    weights_of_a_block = 128 * (128 + 128 + 64 + 64 + 3 * 256)
    bits = 8 * max(sizes) / weights_of_a_block
    assert (4.5 < bits < 4.6) if low else (bits > 32)


def test_keys_and_values_are_calibrated_too(root: Path, tmp_path: Path):
    given = {"calib": root / "ids.npy", "low_memory": True}
    ji.ptq(root / MODEL, tmp_path / "out", "nvfp4", kv_cache="fp8", **given)
    found = exports.calibrated(tmp_path / "out")
    assert sum(name.endswith(("k_scale", "v_scale")) for name in found) == 4


def test_a_report_beside_it(root: Path, tmp_path: Path):
    given = {"calib": root / "ids.npy", "low_memory": True}
    ji.ptq(root / MODEL, tmp_path / "out", "fp8", report=tmp_path / "report", **given)
    ji.ptq(root / MODEL, tmp_path / "again", "fp8", **given)
    assert exports.digests(tmp_path / "out") == exports.digests(tmp_path / "again")


ALGORITHMS = {"int4_awq": "awq_lite", "int8_smoothquant": "smoothquant", "nvfp4_mse": "mse"}


@pytest.mark.parametrize(("name", "algorithm"), ALGORITHMS.items())
def test_other_algorithms_are_refused(here: Path, name: str, algorithm: str):
    words = ("quantize", MODEL, "out", "--qformat", name, "--calib", "ids.npy", "--low-memory")
    line = untouched(here, *words, saying=("--low-memory", algorithm, "--algorithm max"))
    assert line.count(algorithm) == 1
    refused(*words[:3], "--plan", *words[3:], saying="--low-memory")


def test_an_unfinished_run_of_the_other_way_is_another_run(root: Path):
    ways = [
        fingerprint(prepare(root / MODEL, "fp8", Settings(low_memory=low)), Inputs())
        for low in (False, True)
    ]
    assert ways[0] != ways[1]


def test_the_forecast_is_lower(tmp_path: Path):
    folder = small_model.write(tmp_path) / "model"
    small, large = (
        make_plan(prepare(folder, "nvfp4", Settings(low_memory=low)), 84).peak_memory_bytes
        for low in (True, False)
    )
    assert small < large


def test_help_names_it():
    code, out, _ = command("quantize", "--help")
    assert code == 0
    assert "--low-memory" in out
