# SPDX-License-Identifier: Apache-2.0
"""Experts of GPT-OSS in MXFP4, which lie in one tensor: written without an error, one by one or
in one tensor.
"""

import json
from pathlib import Path

import exports
import family_checkpoints
import foreign
import jax
import numpy as np
import pytest
from command import jqx
from damage import arrays
from stored_sources import MXFP4, floats
from tiny_families import ONE_EACH

import jqx_interop as ji
from jqx_interop.checkpoints import DTYPES

ROWS = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2), "down_proj": slice(None)}
EXPERTS = ("gate_up_proj", "down_proj")
AT = "model.layers.1.mlp.experts"


def stored(tensors: foreign.Arrays) -> foreign.Arrays:
    """Experts [e, in, out] as blocks of MXFP4 [e, out, in / 32, 16]."""
    found: foreign.Arrays = {}
    for name, w in tensors.items():
        if name.endswith(EXPERTS):
            parts = [foreign.mxfp4_of(np.ascontiguousarray(one.T)) for one in w]
            for leaf, each in zip(("blocks", "scales"), zip(*parts, strict=True), strict=True):
                found[f"{name}_{leaf}"] = np.stack(each)
        else:
            found[name] = w
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """GPT-OSS as it is released in "model", and in "far" with a block far below the others."""
    here = tmp_path_factory.mktemp("gpt-oss")
    plain = family_checkpoints.write(here / "plain", ONE_EACH["gpt_oss"])
    tensors = arrays(plain)
    name = f"{AT}.gate_up_proj"
    tensors[name] = tensors[name].copy()
    tensors[name][:, :, 1::2] *= 8  # gate and up share a scale, and are not alike
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": MXFP4}
    made = stored(tensors)
    foreign.put(here / "model", config, made)
    scales = made[f"{name}_scales"].copy()
    scales[2, 4, 1] = scales[2].max() - 18
    foreign.put(here / "far", config, {**made, f"{name}_scales": scales})
    return here


def apart(fused: foreign.Arrays, name: str) -> np.ndarray:
    """The weight [n, k] of one linear of one expert, of those of all."""
    prefix, _, rest = name.partition(".experts.")
    e, linear, _ = rest.split(".")
    whole = "down_proj" if linear == "down_proj" else "gate_up_proj"
    return fused[f"{prefix}.experts.{whole}"][int(e)].T[ROWS[linear]]


@pytest.mark.parametrize("report", [False, True], ids=["", "report"])
def test_experts_become_nvfp4_exactly(here: Path, tmp_path: Path, report: bool):
    more = ("--report", tmp_path / "page", "--calib", here / "ids.npy") if report else ()
    words = ("--recipe", recipe(tmp_path, "nvfp4"), "--no-fuse-experts", *more)
    done = jqx("quantize", here / "model", tmp_path / "out", *words)
    assert done.code == 0, done.err
    source, out = floats(here / "model"), floats(tmp_path / "out")
    blocks = sum(a.size // 32 for name, a in source.items() if name.endswith(EXPERTS))
    assert f"{blocks:,} blocks of MXFP4 became NVFP4, every one exactly" in done.out
    names = [n for n in out if ".experts." in n and n.endswith("weight")]
    assert len(names) == 3 * sum(len(a) for n, a in source.items() if n.endswith("down_proj"))
    for name in names:
        np.testing.assert_array_equal(out[name], apart(source, name))
    codes, kept = exports.read_tensors(tmp_path / "out"), arrays(here / "model")
    dtype, shape, raw = codes[f"{AT}.3.up_proj.weight"]
    wanted = kept[f"{AT}.gate_up_proj_blocks"][3, 1::2]
    got = np.frombuffer(raw, DTYPES[dtype]).reshape(shape)
    for low in (0, 4):  # a zero has no sign there
        code = wanted.reshape(len(wanted), -1) >> low & 15
        np.testing.assert_array_equal(got >> low & 15, np.where(code == 8, 0, code))
    (shared,) = {codes[f"{AT}.3.{linear}_proj.weight_scale_2"][2] for linear in ("gate", "up")}
    assert np.frexp(np.frombuffer(shared, "f4"))[0] == 0.5  # a power of two


@pytest.mark.parametrize("report", [False, True], ids=["", "report"])
def test_in_one_tensor_they_are_exact_too(here: Path, tmp_path: Path, report: bool):
    more = ("--report", tmp_path / "page", "--calib", here / "ids.npy") if report else ()
    words = ("--recipe", recipe(tmp_path, "nvfp4"), *more)
    done = jqx("quantize", here / "model", tmp_path / "out", *words)
    assert done.code == 0, done.err
    assert "became NVFP4, every one exactly" in done.out
    source, out = floats(here / "model"), floats(tmp_path / "out")
    names = [name for name in source if name.endswith(EXPERTS)]
    assert len(names) == 4
    for name in names:
        np.testing.assert_array_equal(out[name], source[name])
        power = arrays(tmp_path / "out")[f"{name}_weight_scale_2"]
        assert np.frexp(power)[0] == 0.5
        assert power.shape == ()


def recipe(folder: Path, fmt: str) -> Path:
    """A recipe for experts alone."""
    path = folder / "experts.yaml"
    rule = f"{{path_glob: '*.experts.*', weight: {fmt}, kind: linear}}"
    path.write_text(f"rules: [{rule}]\n")
    return path


def test_blocks_far_below_the_others_are_rounded(here: Path, tmp_path: Path):
    words = ("--recipe", recipe(tmp_path, "nvfp4"), "--no-fuse-experts", "--json")
    done = jqx("quantize", here / "far", tmp_path / "out", *words)
    assert json.loads(done.out)["carried"].endswith("became NVFP4, 1 of them rounded")
    source, out = floats(here / "far"), floats(tmp_path / "out")
    names = [n for n in out if ".experts." in n and n.endswith("weight")]
    assert names
    for name in names:
        want = apart(source, name)
        if name == f"{AT}.2.gate_proj.weight":
            assert np.any(out[name][2, 32:64] != want[2, 32:64])
            out[name][2, 32:64] = want[2, 32:64]
        np.testing.assert_array_equal(out[name], want)


def test_experts_stay_as_they_are(here: Path, tmp_path: Path):
    done = jqx("quantize", here / "far", tmp_path / "out", "--recipe", recipe(tmp_path, "mxfp4"))
    assert done.code == 0, done.err
    kept, out = arrays(here / "far"), exports.read_tensors(tmp_path / "out")
    for e, blocks in enumerate(kept[f"{AT}.gate_up_proj_blocks"]):
        for linear in ("gate_proj", "up_proj"):
            name, rows = f"{AT}.{e}.{linear}.weight", ROWS[linear]
            scales = kept[f"{AT}.gate_up_proj_scales"][e, rows]
            assert out[name][2] == np.ascontiguousarray(blocks[rows]).tobytes()
            assert out[f"{name}_scale"][2] == np.ascontiguousarray(scales).tobytes()
    got = ji.load(here / "far", quantize=recipe(tmp_path, "mxfp4"))
    mine, other = jax.tree.leaves(got.params), jax.tree.leaves(ji.load(tmp_path / "out").params)
    for a, b in zip(mine, other, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
