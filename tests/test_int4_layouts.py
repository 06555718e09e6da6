# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the layouts of AutoAWQ and GPTQ, and those of others."""

import json
import shutil
from pathlib import Path

import exports
import jax
import numpy as np
import pytest
from checkpoints import write
from command import refused, snapshot
from damage import arrays
from test_int4_arrays import NAMES, ORDER

import jqx_interop as ji
from jqx.errors import InputError
from jqx_interop.checkpoints import open_checkpoint
from jqx_interop.recipe_files import read_recipe
from jqx_interop.sources import as_floats
from jqx_interop.stored import open_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name of a layout -> an export of the same model, quantized to it."""
    root = tmp_path_factory.mktemp("int4")
    base = exports.write_base(root / "llama", "llama")
    found = {"base": base}
    for name in (*NAMES, "modelopt"):
        found[name] = root / name
        ji.ptq(base, root / name, "int4_blockwise_weight_only", target=name)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_with_the_same_bytes(made, tmp_path, name):
    for i, other in enumerate(("modelopt", "compressed-tensors", *NAMES)):
        ji.export(made[name], tmp_path / f"there{i}", other)
        ji.export(tmp_path / f"there{i}", tmp_path / f"back{i}", name)
        assert snapshot(tmp_path / f"back{i}") == snapshot(made[name])
    model = ji.load(made[name])
    saved = ji.save(model, tmp_path / "saved", target=name)
    assert exports.read_tensors(saved) == exports.read_tensors(made[name])


def test_layouts_hold_the_same_model(made):
    trees = [jax.tree.leaves(ji.load(made[name]).params) for name in NAMES]
    for leaves in zip(*trees, strict=True):
        assert len({np.asarray(leaf).tobytes() for leaf in leaves}) == 1


@pytest.mark.parametrize("recipe", ["int4_gptq", "int4_wmse"])
def test_searched_scales_fit_too(made, tmp_path, recipe):
    calib = {"calib_size": 4, "calib_seq": 32, "calib": tmp_path / "ids.npy"}
    np.save(calib["calib"], np.random.default_rng(0).integers(0, 128, (4, 32)).astype(np.int32))
    ji.ptq(made["base"], tmp_path / "awq", recipe, target="awq", **calib)
    ji.ptq(made["base"], tmp_path / "mo", recipe, **calib)
    ji.export(tmp_path / "awq", tmp_path / "back", "modelopt")
    found, wanted = (arrays(tmp_path / f) for f in ("back", "mo"))
    for name in (n for n in wanted if n.endswith("_scale")):
        np.testing.assert_allclose(found[name], wanted[name], rtol=2.0**-11)
    codes = [n for n in wanted if wanted[n].dtype == np.uint8]
    same = [np.mean(found[n] == wanted[n]) for n in codes]
    assert min(same) > 0.97, dict(zip(codes, same, strict=True))


def with_config(folder, **changes):
    path = folder / "config.json"
    said = json.loads(path.read_text())
    said["quantization_config"] |= changes
    path.write_text(json.dumps(said))


def copied(source, folder):
    ji.export(source, folder, source.name)
    return folder


def test_as_others_write_it(made, tmp_path):
    """bfloat16 or float32 scales, no g_idx, a file beside config.json, names of other versions."""
    source = arrays(made["gptq"])
    folder = copied(made["gptq"], tmp_path / "one")
    plain = {k: v for k, v in source.items() if not k.endswith("g_idx")}
    wide = {k: v.astype(np.float32) if k.endswith(".scales") else v for k, v in plain.items()}
    write(folder, wide)
    models = [ji.load(made["gptq"]), ji.load(folder)]
    for mine, its in zip(*(jax.tree.leaves(m.params) for m in models), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(its))
    for name, file in (("awq", "quant_config.json"), ("gptq-v1", "quantize_config.json")):
        folder = copied(made[name], tmp_path / name)
        path = folder / "config.json"
        said = json.loads(path.read_text())
        words = said.pop("quantization_config")
        if name == "awq":
            words = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
        else:
            words.pop("checkpoint_format")
        path.write_text(json.dumps(said))
        (folder / file).write_text(json.dumps(words))
        assert open_model(folder).target.name == name
        assert len(open_model(folder).choices) == 14


def test_zero_points_of_others_run(made, tmp_path):
    folder = copied(made["awq"], tmp_path / "awq")
    changed = arrays(folder)
    name = "model.layers.0.mlp.up_proj.qzeros"
    changed[name] = changed[name] ^ np.int32(0x10)  # 9 instead of 8 in one place of eight
    write(folder, changed)
    ids = np.arange(12)[None, :]
    before, after = (ji.load(f) for f in (made["awq"], folder))
    logits = [np.asarray(m.apply({"params": m.params}, ids)) for m in (before, after)]
    assert np.isfinite(logits[1]).all()
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    q = after.params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"]
    scales = changed["model.layers.0.mlp.up_proj.scales"].astype(np.float32)
    shift = np.asarray(q.low_rank[0] @ q.low_rank[1])
    row = ORDER["awq"][1]
    np.testing.assert_array_equal(shift[row], -np.repeat(scales[:, row], 128))
    assert not shift[0].any()
    refused("export", folder, tmp_path / "out", "--target", "modelopt", saying="has zero points")
    with pytest.raises(InputError, match="has a low-rank part, which awq does not store"):
        ji.save(after, tmp_path / "out", target="awq")


WRONG = {
    "bits": ({"bits": 8}, "its codes have 8 bits"),
    "version": ({"version": "gemv"}, "arranged for gemv"),
    "group": ({"group_size": "128"}, "its group_size is '128'"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_descriptions_that_are_not_read(made, tmp_path, changes, message):
    folder = copied(made["awq"], tmp_path / "awq")
    with_config(folder, **changes)
    refused("eval", folder, saying=message)


def test_gptq_that_is_not_read(made, tmp_path):
    folder = copied(made["gptq"], tmp_path / "gptq")
    with_config(folder, dynamic={"+:.*mlp.*": {"bits": 8}})
    refused("eval", folder, saying="a description of their own (dynamic)")
    with_config(folder, dynamic={}, checkpoint_format="marlin")
    refused("eval", folder, saying="checkpoint_format is marlin")
    with_config(folder, checkpoint_format="gptq_v2")
    changed = arrays(folder)
    name = "model.layers.1.mlp.down_proj.g_idx"
    changed[name] = changed[name][::-1].copy()
    write(folder, changed)
    told = r"1\.mlp\.down_proj: its columns are in another order \(desc_act\), which is not read"
    with pytest.raises(InputError, match=told):
        ji.load(folder)


def test_scales_out_of_reach_of_float16(made, tmp_path):
    """Small ones become the smallest there is; those that would be infinite are refused."""
    base = Path(shutil.copytree(made["base"], tmp_path / "base"))
    changed = arrays(base)
    name = "model.layers.0.mlp.up_proj.weight"
    changed[name] = changed[name].copy()
    changed[name][3] = 1e-9
    write(base, changed)
    ji.ptq(base, tmp_path / "small", "int4_blockwise_weight_only")
    ji.export(tmp_path / "small", tmp_path / "awq", "awq", round_scales=True)
    scales = arrays(tmp_path / "awq")["model.layers.0.mlp.up_proj.scales"]
    assert scales.min() == np.float16(2.0**-24)
    ji.load(tmp_path / "awq")
    changed[name][3] = 1e6
    write(base, changed)
    ji.ptq(base, tmp_path / "large", "int4_blockwise_weight_only")
    asked = ("export", tmp_path / "large", tmp_path / "out", "--target", "awq", "--round-scales")
    refused(*asked, saying=("up_proj has the scale 14", "holds none above 65504"))


def test_a_quantized_head_is_said(made, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "extends: int4_blockwise_weight_only\nrules:\n  - {path_glob: '*lm_head*', weight: int4}\n"
    )
    for name in NAMES:
        out = tmp_path / name
        ji.ptq(made["base"], out, read_recipe(recipe), target=name)
        said = json.loads((out / "config.json").read_text())["quantization_config"]
        assert said.pop("lm_head") is True
        assert "lm_head" not in str(said)
        assert "lm_head.qweight" in arrays(out)
        assert len(open_model(out).choices) == 15
        there = json.loads((made[name] / "config.json").read_text())["quantization_config"]
        assert there["lm_head"] is False


def test_biases_of_zeros(made, tmp_path):
    """AutoGPTQ gave them to every linear."""
    folder = copied(made["gptq"], tmp_path / "gptq")
    source = arrays(folder)
    name = "model.layers.0.mlp.up_proj.bias"
    write(folder, source | {name: np.zeros(256, np.float16)})
    leaves = (jax.tree.leaves(ji.load(f).params) for f in (folder, made["gptq"]))
    for mine, its in zip(*leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(its))
    ji.export(folder, tmp_path / "ct", "compressed-tensors")
    assert name not in arrays(tmp_path / "ct")
    write(folder, source | {name: np.ones(256, np.float16)})
    with pytest.raises(InputError, match=f"{name} is not zero, and the model has no such bias"):
        ji.load(folder)


def test_scales_with_signs(made, tmp_path):
    folder = copied(made["awq"], tmp_path / "awq")
    source = arrays(folder)
    name = "model.layers.0.mlp.up_proj.scales"
    scales = source[name].copy()
    scales[0, 5] *= -1
    write(folder, source | {name: scales})

    def weight(f):
        return ji.load(f).params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"].decode()

    np.testing.assert_array_equal(weight(folder)[5, :128], -weight(made["awq"])[5, :128])
    scales[0, 5] = 0
    write(folder, source | {name: scales})
    with pytest.raises(InputError, match="scales are zero or not finite"):
        ji.load(folder)


def test_old_descriptions_count_where_there_are_codes(made, tmp_path):
    folder = copied(made["gptq-v1"], tmp_path / "gptq")
    with_config(folder, desc_act=True)
    source = arrays(folder)
    write(folder, {k: v for k, v in source.items() if not k.endswith("g_idx")})
    with pytest.raises(InputError, match="in another order .* has no g_idx"):
        open_model(folder)
    path = folder / "config.json"
    said = json.loads(path.read_text())
    del said["quantization_config"]
    path.write_text(json.dumps(said))
    assert as_floats(open_checkpoint(folder)).source == "GPTQ INT4"
    base = Path(shutil.copytree(made["base"], tmp_path / "base"))
    (base / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    assert not open_model(base).choices


def test_a_checkpoint_that_is_half_there(made, tmp_path):
    for name in NAMES:
        folder = copied(made[name], tmp_path / name)
        source = arrays(folder)
        for lost in ("qzeros", "scales"):
            path = f"model.layers.0.self_attn.k_proj.{lost}"
            write(folder, {k: v for k, v in source.items() if k != path})
            refused("eval", folder, saying=path)
        path = "model.layers.0.self_attn.k_proj.qweight"
        write(folder, source | {path: source[path][:, :-1]})
        refused("eval", folder, saying=f"tensor {path} has shape")


def test_what_is_refused_for_these_layouts(made, tmp_path):
    out = tmp_path / "out"
    told = "awq stores scales in float16, which does not hold those of model.layers.0.self_attn"
    asked = ("export", made["modelopt"], out, "--target", "awq")
    refused(*asked, saying=(told, "Pass --round-scales to round them."))
    ji.export(made["modelopt"], tmp_path / "rounded", "awq", round_scales=True)
    model = ji.load(made["modelopt"])
    with pytest.raises(InputError, match="pass round_scales=True"):
        ji.save(model, out, target="awq")
    ji.save(model, tmp_path / "saved", target="awq", round_scales=True)
    same = [exports.read_tensors(tmp_path / f) for f in ("rounded", "saved")]
    assert same[0] == same[1]
    asked = ("--qformat", "fp8", "--target", "gptq")
    refused("quantize", made["base"], out, *asked, saying="gptq has no name for fp8")
    asked = ("--qformat", "int4_blockwise_weight_only", "--kv-cache", "fp8", "--target", "gptq")
    refused("quantize", made["base"], out, *asked, saying="gptq holds no keys and values")
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text(
        "extends: int4_blockwise_weight_only\nrules:\n"
        '  - {path_glob: "*down_proj*", weight: int4_b64}\n'
    )
    told = "awq holds one format in a checkpoint, and there are int4"
    refused("quantize", made["base"], out, "--recipe", mixed, "--target", "awq", saying=told)
    assert not out.exists()
