# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of mixtures of experts: read into stacks, written as they were, quantized without
data, and what is refused.
"""

import json
from pathlib import Path

import exports
import family_checkpoints
import jax
import ml_dtypes
import numpy as np
import pytest
from command import jqx, refused
from damage import arrays
from safetensors.numpy import save_file
from tiny_families import IDS, MIXTURES, ONE_EACH, spec_of

import jqx_interop as ji
from jqx.models import Experts
from jqx.tensors import QTensor, stacks
from jqx.tensors.paths import flatten
from jqx.tensors.stacks import EACH

BF16 = ml_dtypes.bfloat16
DATA_FREE = "fp8_per_channel_per_token"
FUSED = ("granitemoe", "llama4_text", "llama4", "gpt_oss", "dbrx")
"""Families whose experts lie in one tensor."""

APART = [kind for kind in MIXTURES if kind not in FUSED]


def written(folder: Path, kind: str) -> Path:
    return family_checkpoints.write(folder, ONE_EACH[kind])


def logits(model: ji.Model) -> np.ndarray:
    return np.asarray(model.apply({"params": model.params}, IDS))


def test_every_mixture_is_among_these():
    mixed = {
        kind
        for kind, case in ONE_EACH.items()
        if any(isinstance(block.mlp, Experts) for block in spec_of(case).blocks)
    }
    assert set(MIXTURES) == mixed
    apart = {kind for kind in MIXTURES if any(EACH in name for name in _stacks(kind))}
    assert set(APART) == apart


def _stacks(kind: str) -> list[str]:
    from jqx.models import leaf_shapes

    return list(leaf_shapes(spec_of(ONE_EACH[kind])))


@pytest.mark.parametrize("kind", MIXTURES)
def test_what_is_read_is_written_as_it_was(kind: str, tmp_path: Path):
    folder = written(tmp_path / "model", kind)
    model = ji.load(folder)
    assert np.isfinite(logits(model)).all()
    ji.save(model, tmp_path / "again")
    before, after = arrays(folder), arrays(tmp_path / "again")
    assert set(before) == set(after)
    for name, array in before.items():
        assert array.dtype == after[name].dtype
        np.testing.assert_array_equal(array, after[name])


@pytest.mark.parametrize("kind", APART)
def test_without_data_every_expert_is_quantized(kind: str, tmp_path: Path):
    folder = written(tmp_path / "model", kind)
    ji.ptq(folder, tmp_path / "out", DATA_FREE)
    model, plain = ji.load(tmp_path / "out"), ji.load(folder)
    found = flatten(model.params)
    stacks = {name: leaf for name, leaf in found.items() if EACH in name}
    assert stacks
    assert all(isinstance(leaf, QTensor) and leaf.stack == (0,) for leaf in stacks.values())
    # as what they stand for; which experts are chosen is decided by small differences
    decoded = {n: q.decode() if isinstance(q, QTensor) else q for n, q in found.items()}
    for name, leaf in stacks.items():
        given = np.asarray(flatten(plain.params)[name], np.float32)
        np.testing.assert_allclose(
            np.asarray(decoded[name], np.float32), given, rtol=0.07, atol=1e-3
        )
        assert leaf.shape == given.shape
    assert np.isfinite(logits(model)).all()
    names = arrays(tmp_path / "out")
    assert not any(name.endswith("gate.weight_scale") for name in names)
    again = tmp_path / "saved"
    ji.save(model, again)
    assert set(arrays(again)) == set(names)
    for name, array in names.items():
        np.testing.assert_array_equal(array.view(np.uint8), arrays(again)[name].view(np.uint8))


RECIPES = {
    "": {"extends": DATA_FREE},
    "in one tensor": {"extends": "w4a16_nvfp4"},
    "some linears": {"rules": [{"path_glob": "*down_proj", "weight": "nvfp4", "kind": "linear"}]},
    "some blocks": {"rules": [{"path_glob": "*.1.*.experts.*", "weight": "int8"}]},
    "no experts": {"rules": [{"path_glob": "*attn*", "weight": "int8", "kind": "linear"}]},
    "searched": {"extends": "int8_weight_only", "algorithm": "mse"},
}
FEW = [("granitemoe", "some blocks"), ("llama4_text", "in one tensor")]
FEW += [("gpt_oss", "no experts"), ("dbrx", "")]
PAIRS = [(kind, name) for kind in FUSED for name in RECIPES]


def same_in_memory(folder: Path, recipe: Path, *, bytes_too: bool) -> None:
    """What is quantized while it is read is what is written and read again."""
    words = ("quantize", folder, folder.with_name("out"), "--recipe", recipe)
    done = jqx(*words, "--calib", folder.with_name("ids.npy"))
    assert done.code == 0, done.err
    want, got = ji.load(folder.with_name("out")), ji.load(folder, quantize=recipe)
    mine, other = flatten(got.params), flatten(want.params)
    assert mine.keys() == other.keys()
    assert jax.tree.structure(mine) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
        assert (a.dtype, np.asarray(a).tobytes()) == (b.dtype, np.asarray(b).tobytes())
    np.testing.assert_array_equal(logits(got), logits(want))
    ji.save(got, folder.with_name("again"))
    again = ji.load(folder.with_name("again"))
    np.testing.assert_array_equal(logits(again), logits(want))
    if bytes_too:
        assert exports.digests(folder.with_name("again")) == exports.digests(want.path)


def check_in_memory(folder: Path, kind: str, name: str) -> None:
    (folder / "recipe.json").write_text(json.dumps(RECIPES[name]))
    made = written(folder / "model", kind)
    same_in_memory(made, folder / "recipe.json", bytes_too=name != "some blocks")


@pytest.mark.parametrize(("kind", "name"), FEW)
def test_experts_in_one_tensor_are_quantized_in_memory(kind: str, name: str, tmp_path: Path):
    check_in_memory(tmp_path, kind, name)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [pair for pair in PAIRS if pair not in FEW])
def test_all_experts_in_one_tensor_are_quantized_in_memory(kind: str, name: str, tmp_path: Path):
    check_in_memory(tmp_path, kind, name)


@pytest.mark.parametrize("quantized", [False, True], ids=["", "while it is read"])
def test_experts_are_not_there_twice(quantized: bool, tmp_path: Path, monkeypatch):
    """When all are stacked but the last ones, little more is there than what is there at last."""
    folder, held = written(tmp_path / "model", "llama4_text"), []
    before, plain = {id(x) for x in jax.live_arrays()}, stacks.stack_of

    def stack_of(members, names):
        held.append(sum(x.nbytes for x in jax.live_arrays() if id(x) not in before))
        return plain(members, names)

    monkeypatch.setattr(stacks, "stack_of", stack_of)
    if not quantized:
        ji.ptq(folder, tmp_path / "out", DATA_FREE)
    model = ji.load(folder, quantize=DATA_FREE) if quantized else ji.load(tmp_path / "out")
    whole = sum(x.nbytes for x in jax.tree.leaves(model.params))
    assert len(held) == 9
    assert held[-1] < 1.2 * whole


def test_layers_that_predict_further_tokens_stay_as_they_are(tmp_path: Path):
    folder = written(tmp_path / "model", "deepseek_v3")
    draw = np.random.default_rng(0)
    more = {
        "model.layers.3.eh_proj.weight": draw.standard_normal((64, 128)).astype(BF16),
        "model.layers.3.enorm.weight": np.ones(64, np.float32),
        "model.layers.3.mlp.experts.0.up_proj.weight": draw.standard_normal((8, 64)).astype(BF16),
    }
    broken(folder, **more)
    ji.ptq(folder, tmp_path / "out", DATA_FREE)
    found = arrays(tmp_path / "out")
    for name, array in more.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    said = (tmp_path / "out" / "hf_quant_config.json").read_text()
    assert '"model.layers.3*"' in said
    model = ji.load(tmp_path / "out")
    assert np.isfinite(logits(model)).all()
    ji.save(model, tmp_path / "again")
    for name, array in arrays(tmp_path / "again").items():
        np.testing.assert_array_equal(array.view(np.uint8), found[name].view(np.uint8))
    assert set(arrays(tmp_path / "again")) == set(found)
    assert (tmp_path / "again" / "hf_quant_config.json").read_text() == said
    stray = {"model.layers.9.eh_proj.weight": np.ones((2, 2), BF16)}
    broken(folder, **stray)
    saying = "tensor model.layers.9.eh_proj.weight is not part of the model"
    refused("quantize", folder, tmp_path / "other", "--qformat", DATA_FREE, saying=saying)


def test_what_sees_stays_beside_what_reads(tmp_path: Path):
    folder = written(tmp_path / "model", "llama4")
    sight = {"vision_model.layers.0.mlp.fc1.weight": np.ones((4, 4), BF16)}
    broken(folder, **sight)
    model = ji.load(folder)
    assert np.isfinite(logits(model)).all()
    assert not any("vision" in name for name in flatten(model.params))


def broken(folder: Path, drop: str = "", **more: np.ndarray) -> Path:
    tensors = {name: a for name, a in arrays(folder).items() if name != drop}
    save_file(tensors | more, folder / "model.safetensors", {"format": "pt"})
    return folder


OWN = "model.layers.0.block_sparse_moe"
LAST = f"{OWN}.experts.3.w2.weight"
BROKEN = {
    "an expert's tensor is missing": ({"drop": LAST}, f"tensor {LAST} is missing"),
    "an expert of another size": (
        {LAST: np.ones((64, 32), BF16)},
        f"tensor {LAST} has shape (64, 32), the configuration asks for (64, 96)",
    ),
    "an expert too many": (
        {f"{OWN}.experts.4.w2.weight": np.ones((64, 96), BF16)},
        f"tensor {OWN}.experts.4.w2.weight is not part of the model",
    ),
    "a router of other experts": (
        {f"{OWN}.gate.weight": np.ones((5, 64), BF16)},
        f"tensor {OWN}.gate.weight has shape (5, 64), the configuration asks for (4, 64)",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_experts_that_do_not_fit_are_told(what: str, tmp_path: Path):
    changes, message = BROKEN[what]
    folder = broken(written(tmp_path / "model", "mixtral"), **changes)
    refused("quantize", folder, tmp_path / "out", "--qformat", DATA_FREE, saying=message)
    refused("generate", folder, "--prompt", "a", saying=message)
