# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose linears have factors beside their codes: to disk and back, what is wrong with
them, and what they compute.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import exports
import jax.numpy as jnp
import numpy as np
import pytest
from command import jqx
from damage import DOWN, add, change, described, number, refused
from factored import KINDS, RANK, factored
from functions import draw
from generating import followers, write_model
from test_load_quantized import edit, same
from test_save import content
from test_save import refused as unsaved

import jqx_interop as ji
from jqx.models import FLOAT32, forward, linear_shapes
from jqx.models.generate import Session
from jqx.tensors import QTensor
from jqx.tensors.paths import flatten, unflatten
from jqx_interop.stored import open_model

INNER, OUTER = (f"{DOWN}.weight_quantizer._svdquant_lora_{letter}" for letter in "ab")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("factored")
    return {name: ji.save(factored(name), root / name) for name in KINDS}


@pytest.fixture
def svd(written, tmp_path: Path) -> Path:
    return shutil.copytree(written["NVFP4_SVD"], tmp_path / "model")


# --- to disk and back


@pytest.mark.parametrize("name", KINDS)
def test_it_comes_back_with_its_name(written, tmp_path: Path, name: str):
    folder = written[name]
    said = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert (said["quant_algo"], said["pre_quant_scale"]) == (name, True)
    source, model = open_model(folder), ji.load(folder)
    assert set(source.choices.values()) == {KINDS[name][1]}
    same(model.params, factored(name).params)
    assert content(ji.save(model, tmp_path / "again")) == content(folder)


@pytest.mark.parametrize("name", KINDS)
def test_one_description_is_enough(written, tmp_path: Path, name: str):
    whole = open_model(written[name])
    inline, file = (shutil.copytree(written[name], tmp_path / n) for n in ("inline", "file"))
    (inline / "hf_quant_config.json").unlink()
    config = json.loads((file / "config.json").read_text())
    del config["quantization_config"]
    (file / "config.json").write_text(json.dumps(config))
    edit(file, "hf_quant_config.json", group_size=None, quant_algo=name.lower())
    for folder in (inline, file):
        assert open_model(folder).choices == whole.choices


def test_the_names_of_the_arrays(written):
    found = exports.read_tensors(written["NVFP4_SVD"])
    assert found[INNER][:2] == ("BF16", [RANK, 256])
    assert found[OUTER][:2] == ("BF16", [128, RANK])
    assert sum("_svdquant" in name for name in found) == 28


def test_a_linear_may_have_none(svd: Path):
    """It was left out of the search: its codes are those of the whole weight."""
    for name in (INNER, OUTER, f"{DOWN}.pre_quant_scale"):
        change(name, None)(svd)
    leaves = flatten(ji.load(svd).params)
    assert leaves[f"{DOWN}.weight"].low_rank is None
    assert leaves[f"{Q}.weight"].low_rank is not None
    again = ji.save(ji.load(svd), svd.with_name("again"))
    assert (again / "config.json").read_bytes() == (svd / "config.json").read_bytes()


def test_the_golden_ones_are_read_as_they_are_called(shared: Path):
    called = {
        **{"w4a8_awq": "W4A8_AWQ", "nvfp4_svdquant": "NVFP4_SVD"},
        **{"nvfp4_awq": "NVFP4_AWQ", "nvfp4_awq_full": "NVFP4_AWQ"},
    }
    for folder, name in called.items():
        source = open_model(shared / "golden" / folder)
        assert set(source.choices.values()) == {KINDS[name][1]}
    q = flatten(ji.load(shared / "golden" / "nvfp4_svdquant").params)[f"{Q}.weight"]
    assert [part.shape for part in q.low_rank] == [(256, 32), (32, 256)]


# --- trees and files that are none

UNSAVED = {
    "another rank": (
        lambda q: q.replace(low_rank=(q.low_rank[0][:, :2], q.low_rank[1])),
        ("_svdquant_lora_b that is bfloat16 (128, 2)", "NVFP4_SVD stores BF16 (128, 5)"),
    ),
    "another dtype": (
        lambda q: q.replace(low_rank=tuple(part.astype(jnp.float32) for part in q.low_rank)),
        ("_svdquant_lora_a that is float32 (5, 128)", "NVFP4_SVD stores BF16"),
    ),
    "a format without": (
        lambda q: q.replace(input_format=None, input_scale=None),
        ("q_proj has a pre_quant_scale, which W4A16_NVFP4 does not store",),
    ),
    "a format without low rank": (
        lambda q: q.replace(input_format=None, input_scale=None, pre_quant_scale=None),
        ("q_proj has a low-rank part, which W4A16_NVFP4 does not store",),
    ),
}


@pytest.mark.parametrize(("how", "saying"), UNSAVED.values(), ids=UNSAVED)
def test_trees_that_are_no_checkpoint(tmp_path: Path, how, saying):
    model, name = factored("NVFP4_SVD"), f"{Q}.weight"
    leaves = flatten(model.params)
    changed = replace(model, params=unflatten(leaves | {name: how(leaves[name])}))
    with unsaved(*saying):
        ji.save(changed, tmp_path / "out")


BAD = {
    "one factor": (change(OUTER, None), (f"tensor {OUTER} is missing",)),
    "the other": (change(INNER, None), (f"tensor {INNER} is missing",)),
    "two ranks": (
        change(OUTER, lambda a: a[:, :3]),
        (f"{OUTER} has shape (128, 3), it should have (128, 5)",),
    ),
    "of another linear": (
        change(INNER, lambda a: a[:, :128]),
        (f"{INNER} has shape (5, 128), it should have (5, 256)",),
    ),
    "no matrix": (
        change(INNER, lambda a: a.reshape(-1)),
        (f"{INNER} has shape (1280,), it should have (5, 256)",),
    ),
    "another dtype": (
        change(INNER, lambda a: a.astype(np.float32)),
        (f"{INNER} has dtype F32, it should have BF16",),
    ),
    "beside no linear": (
        add("model.norm.weight_quantizer._svdquant_lora_a", np.ones((2, 2), np.float32)),
        ("model.norm.weight_quantizer._svdquant_lora_a belongs to no linear",),
    ),
    "beside a format without": (
        lambda folder: described(folder, quant_algo="NVFP4"),
        ("_svdquant_lora_a is not part of the model", "more"),
    ),
    "a group that is none": (
        lambda folder: described(folder, quant_algo="NVFP4_AWQ", group_size=32),
        ("NVFP4_AWQ with 32 values to a scale", "is not read"),
    ),
    "no tensor scale": (
        change(f"{DOWN}.weight_scale_2", None),
        (f"tensor {DOWN}.weight_scale_2 is missing",),
    ),
}


@pytest.mark.parametrize(("damage", "saying"), BAD.values(), ids=BAD)
def test_files_that_are_none(svd: Path, damage, saying):
    damage(svd)
    refused(svd, saying, opened=True)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("name", [INNER, OUTER])
def test_numbers_that_are_none(svd: Path, name: str, value: float):
    change(name, number(7, value))(svd)
    open_model(svd)
    refused(
        svd, (f"1 of {RANK * (256 if name == INNER else 128)}", name, "NaN or inf"), opened=False
    )


def test_negative_numbers_and_zeros_are_fine(svd: Path):
    change(INNER, number(0, -1.0))(svd)
    change(OUTER, number(0, 0.0))(svd)
    ji.load(svd)


def test_what_is_not_read_is_named(svd: Path):
    described(svd, quant_algo="FP8_PB_REAL")
    refused(svd, ("FP8_PB_REAL", "is known but not read", "NVFP4_SVD", "W4A8_AWQ"), opened=True)


# --- what they compute


def dense_of(model: ji.Model) -> dict:
    """The parameters of `model`, every linear one matrix: what it is if inputs are not rounded."""

    def one(leaf):
        if not isinstance(leaf, QTensor):
            return leaf
        w = leaf.decode().astype(jnp.float32)
        if leaf.low_rank is not None:
            w = w + jnp.matmul(*(part.astype(jnp.float32) for part in leaf.low_rank))
        p = leaf.pre_quant_scale
        return w if p is None else w * p.astype(jnp.float32)[None]

    return unflatten({name: one(leaf) for name, leaf in flatten(model.params).items()})


def weights_alone(model: ji.Model) -> dict:
    """The parameters of `model`, inputs as they are."""
    return unflatten(
        {
            name: x.replace(input_format=None, input_scale=None) if isinstance(x, QTensor) else x
            for name, x in flatten(model.params).items()
        }
    )


@pytest.mark.parametrize("name", KINDS)
def test_decoders_compute_what_it_stands_for(name: str):
    """All tokens at once, and the last after the others, where products of a few rows are their
    own.
    """
    model, ids = factored(name), exports.token_ids("llama")[0]
    want = np.asarray(forward(model.spec, dense_of(model), jnp.asarray(ids)))
    stored = weights_alone(model)
    got = forward(model.spec, stored, jnp.asarray(ids))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    session = Session(model.spec, stored, FLOAT32, 16)
    session.read(ids[:, :-1].tolist())
    session.add(ids[:, -1])
    np.testing.assert_allclose(session.logits(), want[:, -1], atol=1e-4 * np.abs(want).max())
    rounded = np.asarray(forward(model.spec, model.params, jnp.asarray(ids)))
    assert np.isfinite(rounded).all()
    assert np.linalg.norm(rounded - want) > 0.01 * np.linalg.norm(want)


def test_the_low_rank_part_is_in_the_logits():
    model, ids = factored("NVFP4_SVD"), jnp.asarray(exports.token_ids("llama")[0])
    without = {
        n: x.replace(low_rank=None) if isinstance(x, QTensor) else x
        for n, x in flatten(model.params).items()
    }
    got, other = (forward(model.spec, p, ids) for p in (model.params, unflatten(without)))
    assert np.linalg.norm(got - other) > 0.3 * np.linalg.norm(got)


# --- commands


@pytest.mark.parametrize("name", KINDS)
def test_commands(written, tmp_path: Path, name: str):
    folder, base = written[name], exports.write_base(tmp_path / "base", "llama")
    code, out, _ = jqx("inspect", folder)
    assert (code, name in out) == (0, True)
    measured = ("eval", folder, "--reference", base, "--text", tmp_path / "base-ids.npy")
    code, out, _ = jqx(*measured, "--window", 16, "--max-tokens", 64, "--json")
    assert code == 0
    assert json.loads(out)["kl"] > 0
    assert jqx("compare", folder, folder).code == 0
    code, out, _ = jqx("compare", folder, base)
    assert (code, "only in A" in out) == (1, True)


def test_generating(tmp_path: Path):
    """A text that is known, by a model whose linears are only right with their low-rank parts."""
    model = ji.load(write_model(tmp_path / "plain", followers([b"uvwxyz"])))
    leaves, without = flatten(model.params), {}
    for path, (n, k) in linear_shapes(model.spec).items():
        if path != "lm_head":
            low = draw(n, 2, seed=1) / 8, draw(2, k, seed=2)
            rest = leaves[f"{path}.weight"] - jnp.matmul(*low)
            q = QTensor.quantize(rest, "nvfp4", jnp.float32(16))
            q = q.replace(input_format="nvfp4", input_scale=jnp.float32(0.01))
            without[f"{path}.weight"] = q
            leaves[f"{path}.weight"] = q.replace(low_rank=low)
    out = ji.save(replace(model, params=unflatten(leaves)), tmp_path / "out")
    assert jqx("generate", out, "--prompt", "abc", "-n", 5).out == "defgh\n"
    assert jqx("generate", out, "--prompt", "tu", "-n", 4).out == "vwxy\n"
    wrong = ji.save(replace(model, params=unflatten(leaves | without)), tmp_path / "wrong")
    assert jqx("generate", wrong, "--prompt", "abc", "-n", 5).out != "defgh\n"
