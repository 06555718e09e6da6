# SPDX-License-Identifier: Apache-2.0
"""Searches from the command line: what they write, that outputs are nearer for it, and what must
not change a byte.
"""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from command import jqx, snapshot
from outputs import decoded, output_errors, read

import jqx_interop as ji
from jqx_interop import pipeline
from jqx_interop.checkpoints import Workspace
from jqx_interop.job import prepare
from jqx_interop.settings import Settings

INT4, NVFP4 = "int4 --set block=32", "nvfp4"


class Row(NamedTuple):
    """One command: its options, those of the plain recipe whose outputs are further off (None where
    outputs are not what is searched), and a leaf that it alone writes.
    """

    options: str
    plain: str | None = None
    leaf: str = "weight_scale"


ROWS = {
    "int4_awq": Row("int4_awq --set block=32", INT4, "pre_quant_scale"),
    "w4a8_awq": Row("w4a8_awq --set block=32", INT4, "weight_scale_2"),
    "nvfp4_awq": Row("nvfp4_awq", None, "weight_scale_2"),
    "nvfp4_svdquant": Row(
        "nvfp4_svdquant --set lowrank=8", NVFP4, "weight_quantizer._svdquant_lora_a"
    ),
    "int8_sq": Row("int8_sq", None, "pre_quant_scale"),
    "awq_clip": Row("int4_awq --set block=32 --algorithm awq_clip", INT4),
    "awq_full": Row("int4_awq --set block=32 --algorithm awq_full", INT4, "pre_quant_scale"),
    "gptq": Row("int4 --set block=32 --algorithm gptq", INT4),
    "wmse": Row("int4 --set block=32 --algorithm wmse", INT4),
    "mse sweep": Row("nvfp4_mse", None, "weight_scale_2"),
    "four over six": Row("nvfp4_4o6", None, "weight_scale_2"),
    "local hessian": Row("nvfp4_local_hessian", NVFP4),
    "headroom": Row("nvfp4 --algorithm nvfp4_act_headroom", None, "input_scale"),
    "percentile": Row("fp8 --algorithm percentile", None, "input_scale"),
    "entropy": Row("int8 --algorithm entropy", None, "input_scale"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The model, and the plain recipes that searches are compared with."""
    folder = small_model.write(tmp_path_factory.mktemp("small"))
    for name, options in (("int4", INT4), ("nvfp4", NVFP4)):
        quantized(folder, folder / name, options)
    return folder


def quantized(folder: Path, out: Path, options: str, *more: object, ids: bool = False) -> Path:
    data = ("--calib", folder / "ids.npy")
    data = data if ids else (*data, "--activations", folder / "acts.safetensors")
    done = jqx("quantize", folder / "model", out, "--qformat", *options.split(), *data, *more)
    assert done.code == 0, done.err
    return out


def error_of(folder: Path, out: Path) -> float:
    """The mean relative error of outputs."""
    base = read(folder / "model")
    found = output_errors(base, read(out), small_model.activations())
    return float(np.mean(list(found.values())))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_what_is_written(small: Path, tmp_path: Path, row: Row):
    out = quantized(small, tmp_path / "out", row.options)
    assert ji.load(out).params
    found = read(out)
    assert any(name.endswith(row.leaf) for name in found)
    for name, array in found.items():
        assert np.isfinite(array.astype(np.float32)).all(), name
    if row.plain is not None:
        plain = {INT4: "int4", NVFP4: "nvfp4"}[row.plain]
        assert error_of(small, out) < 0.97 * error_of(small, small / plain)


def test_searches_of_input_scales_change_nothing_else(small: Path, tmp_path: Path):
    for options in ("fp8 --algorithm percentile", "int8 --algorithm entropy"):
        name, *_ = options.split()
        mine = read(quantized(small, tmp_path / options, options))
        plain = read(quantized(small, tmp_path / name, name))
        assert mine.keys() == plain.keys()
        for key, array in mine.items():
            same = array.tobytes() == plain[key].tobytes()
            assert same or key.endswith("input_scale"), key
            if key.endswith("input_scale"):
                assert 0 < array <= plain[key] * 1.001  # the end of a bin
        assert any(mine[k] < plain[k] for k in mine if k.endswith("input_scale"))


def test_the_outer_factor_of_a_low_rank_part_makes_up_for_rounding(small: Path, tmp_path: Path):
    """Of linears that share their inner factor too; nothing else changes."""
    options = "nvfp4_svdquant --set lowrank=8"
    mine, plain = tmp_path / "mine", tmp_path / "plain"
    quantized(small, mine, options)
    quantized(small, plain, options + " --set refit=false")
    base, acts = read(small / "model"), small_model.activations()
    found, kept = read(mine), read(plain)
    changed = {name for name in kept if found[name].tobytes() != kept[name].tobytes()}
    assert changed == {name for name in kept if name.endswith("_svdquant_lora_b")}
    errors, before = (output_errors(base, tensors, acts) for tensors in (found, kept))
    assert all(errors[path] < 0.97 * before[path] for path in before)


def test_factors_are_folded_so_that_the_model_computes_the_same(small: Path, tmp_path: Path):
    """Decoded weights of a search are near the original ones, once what moved is moved back."""
    base, acts = read(small / "model"), small_model.activations()
    found = read(quantized(small, tmp_path / "out", "nvfp4_awq"))
    assert not [name for name in found if name.endswith("pre_quant_scale")]
    errors = output_errors(base, found, acts)
    for i in range(2):
        parts = [f"model.layers.{i}.mlp.{name}_proj" for name in ("up", "down")]
        weights = [base[f"{path}.weight"].astype(np.float32) for path in parts]
        assert errors[f"model.layers.{i}.mlp.gate_proj"] < 0.05
        assert errors[f"model.layers.{i}.self_attn.q_proj"] < 0.05
        assert max(errors[path] for path in parts) > 0.05  # each is meant to be off
        r = np.random.RandomState(i)
        h, act = r.standard_normal((20, 64)), r.standard_normal((20, 128))
        gain = f"model.layers.{i}.post_attention_layernorm.weight"
        p = found[gain].astype(np.float32) / base[gain].astype(np.float32)
        near = [decoded(found, path) for path in parts]
        wanted = (act * (h @ weights[0].T)) @ weights[1].T
        got = (act * ((h * p) @ near[0].T)) @ near[1].T
        assert np.square(got - wanted).sum() / np.square(wanted).sum() < 0.05


# --- what must not change a byte

DETERMINED = ("int4_awq --set block=32", "nvfp4_local_hessian", "fp8 --algorithm percentile")


@pytest.mark.parametrize("options", DETERMINED)
def test_batches_and_threads_change_no_byte(small: Path, tmp_path: Path, options, monkeypatch):
    wanted = snapshot(quantized(small, tmp_path / "whole", options, ids=True))
    for rows in (1, 4):  # of 6
        got = quantized(small, tmp_path / f"by {rows}", options, "--batch-size", rows, ids=True)
        assert snapshot(got) == wanted
    spilled = quantized(small, tmp_path / "spilled", options, "--max-memory", "1KiB", ids=True)
    assert snapshot(spilled) == wanted
    for count in (1, 4):
        monkeypatch.setattr(pipeline, "processors", lambda count=count: count)
        assert snapshot(quantized(small, tmp_path / f"{count}", options, ids=True)) == wanted


@pytest.mark.parametrize("options", [DETERMINED[0], "nvfp4_awq"])
@pytest.mark.parametrize("memory", ["4GiB", "1KiB"])
def test_a_run_that_was_stopped_goes_on(small: Path, tmp_path: Path, options, memory, monkeypatch):
    given = (options, "--max-memory", memory)
    wanted = snapshot(quantized(small, tmp_path / "whole", *given, ids=True))
    record = Workspace.record
    for kept in (0, 1, 2, 3):
        out, left = tmp_path / f"out {kept}", [kept]

        def stops(self: Workspace, what: dict, left=left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            record(self, what)

        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "record", stops)
            data = ("--calib", small / "ids.npy", *given[1:])
            done = jqx("quantize", small / "model", out, "--qformat", *options.split(), *data)
            assert done.code == 130, done.err
        assert not out.exists()
        assert snapshot(quantized(small, out, *given, ids=True)) == wanted


def test_from_ids_searches_meet_the_inputs_of_the_model(small: Path, tmp_path: Path):
    """Scales of channels follow the data: other ids give others."""
    one = read(quantized(small, tmp_path / "one", "int8_sq", ids=True))
    ids = np.load(small / "ids.npy")
    np.save(tmp_path / "ids.npy", ids[::-1] // 2)
    (tmp_path / "model").symlink_to(small / "model")
    other = read(quantized(tmp_path, tmp_path / "other", "int8_sq", ids=True))
    name = "model.layers.1.mlp.down_proj.pre_quant_scale"
    assert one[name].dtype == jnp.bfloat16
    assert (one[name] != other[name]).any()


@pytest.mark.parametrize("steps", ["gptq", "[awq_lite, awq_clip]", "[svdquant, awq_clip]"])
def test_linears_that_engines_fuse_have_one_tensor_scale(small: Path, tmp_path: Path, steps: str):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"extends: nvfp4\nalgorithm: {steps}\n")
    data = ("--activations", small / "acts.safetensors")
    done = jqx("quantize", small / "model", tmp_path / "out", "--recipe", recipe, *data)
    assert done.code == 0, done.err
    found, count = read(tmp_path / "out"), 0
    for names in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
        for layer in range(2):
            scales = {
                found[f"model.layers.{layer}.{name}_proj.weight_scale_2"].tobytes()
                for name in names
            }
            count += len(scales)
    assert count == 4


def test_gptq_rounds_below_the_scale_that_is_stored(small: Path, tmp_path: Path):
    """Linears that share a tensor scale round below it from the start."""
    out = quantized(small, tmp_path / "out", "nvfp4_gptq")
    base, acts = read(small / "model"), small_model.activations()
    plain = output_errors(base, read(small / "nvfp4"), acts)
    errors = output_errors(base, read(out), acts)
    gains = {path: errors[path] / plain[path] for path in plain}
    shared = [g for path, g in gains.items() if not path.endswith(("o_proj", "down_proj"))]
    assert max(shared) < 0.9, gains


@pytest.mark.parametrize("recipe", ["nvfp4_svdquant", "nvfp4_awq_full", "fp8"])
def test_every_output_belongs_to_one_unit(small: Path, recipe: str):
    """Or a killed run would not know what it has finished."""
    job = prepare(small / "model", recipe, Settings(kv_cache="fp8_affine"))
    units = [pipeline._names_in(job, {unit}) for unit in range(len(job.inventory.units))]
    assert sorted(name for unit in units for name in unit) == sorted(t.name for t in job.outputs)
