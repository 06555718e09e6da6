# SPDX-License-Identifier: Apache-2.0
"""The layout of compressed-tensors: written from memory and from ModelOpt's, there and back with
the same bytes, and read from others.
"""

import json
from pathlib import Path

import exports
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import write
from command import jqx, refused, snapshot
from damage import arrays
from exports import Export
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from stored_trees import ROWS, model_of

import jqx_interop as ji
from jqx.config import Choice
from jqx.errors import InputError
from jqx.tensors import QTensor
from jqx_interop.checkpoints import dtype_name
from jqx_interop.evaluation.result import bits_per_weight
from jqx_interop.job import prepare
from jqx_interop.pipeline import _names_in
from jqx_interop.settings import Settings
from jqx_interop.stored import open_model
from jqx_interop.targets import METHOD, TARGETS, ct_config, ct_layout
from jqx_interop.targets.ct_schemes import SCHEMES, find_scheme
from jqx_interop.targets.modelopt import ALGOS

CT = TARGETS[METHOD]
GOLDEN = dict(np.load(Path(__file__).with_name("golden") / "compressed.npz"))
HELD = [row for row in ROWS if row.kv in ("none", "fp8", "fp8_cast")]
HELD = [row for row in HELD if not row.recipe.startswith(("w4a8", "nvfp4_mlp_weight"))]
BF16 = np.dtype(ml_dtypes.bfloat16)


def bits(x):
    return np.asarray(x).tobytes()


def choice_of(weight, given=None):
    return Choice(weight=weight, input=given)


# --- arrays


FOREIGN = {
    "int4 group": ("int4_b32", None),
    "int4 channel": ("int4_b256", None),
    "int8 packed": ("int8", None),
    "int8": ("int8", "int8_token"),
    "fp8": ("fp8", "fp8"),
    "fp8 channel": ("fp8_channel", "fp8_token"),
    "fp8 block": ("fp8_block", None),
    "nvfp4": ("nvfp4", None),
    "mxfp4": ("mxfp4", None),
    "mxfp8": ("mxfp8", "mxfp8"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_arrays_of_the_package_mean_what_it_decompresses(case):
    given = {k.split("|")[1]: a for k, a in GOLDEN.items() if k.startswith(case + "|")}
    decoded, choice = given.pop("decoded"), choice_of(*FOREIGN[case])
    for leaf in {"weight", "weight_scale" if case == "nvfp4" else "weight"} & set(given):
        if given[leaf].dtype == np.uint8:
            given[leaf] = given[leaf].view(ml_dtypes.float8_e4m3fn)
    q = CT.gathered(given, choice, decoded.shape, np.dtype("f4"))
    mine = np.asarray(jax.jit(lambda q: q.decode(jnp.float32))(q))
    # the package decodes NVFP4 in bfloat16
    np.testing.assert_allclose(mine, decoded, rtol=2.0**-7 if case == "nvfp4" else 0, atol=0)
    again = {name.removeprefix("a."): array for name, array in CT.named("a", q).items()}
    assert {k: bits(a) for k, a in again.items()} == {k: bits(a) for k, a in given.items()}
    promised = {t.name: (t.dtype, t.shape) for t in CT.outputs("a", choice, q.shape, BF16, False)}
    found = {n: (dtype_name(np.asarray(a).dtype), a.shape) for n, a in CT.named("a", q).items()}
    assert found == promised


def test_every_case_of_the_package_is_looked_at():
    assert {key.split("|")[0] for key in GOLDEN} == set(FOREIGN)


@pytest.mark.parametrize(("name", "given_input"), SCHEMES)
def test_a_matrix_comes_back(name, given_input):
    w = np.random.default_rng(1).standard_normal((256, 384)).astype(np.float32)
    q = jax.device_get(QTensor.quantize(jnp.asarray(w), name))
    static = choice_of(name, given_input).static_input
    scale = np.float32(0.3) if static else None
    q = q.replace(input_format=given_input, input_scale=scale)
    named = CT.named("a.b", q)
    promised = CT.outputs("a.b", choice_of(name, given_input), q.shape, q.dtype, static)
    assert [(t.name, t.shape) for t in promised] == [(n, np.shape(a)) for n, a in named.items()]
    leaves = {n.removeprefix("a.b."): np.asarray(a) for n, a in named.items()}
    assert set(leaves) <= set(CT.leaves)
    again = CT.gathered(leaves, choice_of(name, given_input), q.shape, q.dtype)
    assert jax.tree.structure(again) == jax.tree.structure(q)
    for mine, its in zip(jax.tree.leaves(again), jax.tree.leaves(q), strict=True):
        np.testing.assert_allclose(np.float32(mine), np.float32(its), rtol=2.0**-23, atol=0)
    np.testing.assert_array_equal(again.codes, q.codes)
    np.testing.assert_array_equal(again.scale, q.scale)


@settings(max_examples=300, deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from(["weight_scale_2", "input_scale"]))
@example(float(np.nextafter(np.float32(1.9), np.float32(2))), "weight_scale_2")
def test_scales_come_back_with_what_is_noted_both_ways(value, leaf):
    choice, scale = choice_of("nvfp4", "nvfp4"), np.float32([value])
    for of in (ct_layout.RECIPROCALS, {v: k for k, v in ct_layout.RECIPROCALS.items()}):
        mine = leaf if leaf in of else ct_layout.RECIPROCALS[leaf]
        noted = ct_layout.inexact_scales(choice, {mine: scale}, of)
        there = ct_layout.reciprocal(scale)
        back = noted.get(mine, ct_layout.reciprocal(there))
        assert bits(np.float32(back).reshape(1)) == bits(scale)
        # and from there to here nothing need be noted, once the note is there
        rest = {v: k for k, v in of.items()}
        given_both = {of[mine]: there, mine: scale}
        assert ct_layout.inexact_scales(choice, given_both, rest) == {}


def test_schemes_that_layouts_share():
    assert set(ALGOS) - set(SCHEMES) == {
        ("int4_fp8", "fp8"), ("nvfp4_b32", None), ("nvfp4_b32_fp8", "fp8"), ("mxfp4", "fp8"),
    }  # fmt: skip
    assert set(SCHEMES) - set(ALGOS) == {("int8", "int8_token")}
    assert find_scheme(choice_of("nvfp4_b32")) is None
    assert find_scheme(Choice(weight="int4", variant="awq")) is None


# --- checkpoints


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """row -> its export in ModelOpt's layout, made once."""
    root, made = tmp_path_factory.mktemp("exports"), {}

    def folder(row: Export) -> Path:
        if row.key not in made:
            if not (root / row.model).exists():
                exports.write_base(root / row.model, row.model)
            model = model_of(row, root / row.model)
            made[row.key] = ji.save(model, root / f"out-{row.key}", max_shard_size=row.shard)
        return made[row.key]

    return folder


@pytest.mark.parametrize("row", HELD, ids=lambda row: row.key)
def test_there_and_back_with_the_same_bytes(folders, tmp_path, row):
    source = folders(row)
    done = ji.export(source, tmp_path / "ct", METHOD, max_shard_size=row.shard)
    assert (done.source, done.target) == ("modelopt", METHOD)
    assert not (tmp_path / "ct" / "hf_quant_config.json").exists()
    ji.export(tmp_path / "ct", tmp_path / "back", "modelopt", max_shard_size=row.shard)
    assert snapshot(tmp_path / "back") == snapshot(source)
    ji.export(tmp_path / "back", tmp_path / "again", METHOD, max_shard_size=row.shard)
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "ct")


FEW = [row for row in HELD if row.model == "llama"]
FEW = [r for r in FEW if r.recipe in ("nvfp4", "int8", "int4_blockwise_weight_only", "fp8")]


@pytest.mark.parametrize("row", FEW, ids=lambda row: row.key)
def test_it_is_the_same_model(folders, tmp_path, row):
    source = folders(row)
    ji.export(source, tmp_path / "ct", METHOD)
    models = ji.load(source), ji.load(tmp_path / "ct")
    assert jax.tree.structure(models[0].params) == jax.tree.structure(models[1].params)
    for mine, its in zip(*(jax.tree.leaves(m.params) for m in models), strict=True):
        assert bits(mine) == bits(its)
    assert models[0].spec == models[1].spec
    saved = ji.save(models[1], tmp_path / "saved", target=METHOD)
    assert exports.read_tensors(saved) == exports.read_tensors(tmp_path / "ct")
    assert (saved / "config.json").read_text() == (tmp_path / "ct" / "config.json").read_text()


@pytest.mark.parametrize("recipe", ["nvfp4", "int8_weight_only", "fp8"])
def test_quantizing_to_it_is_exporting_to_it(folders, tmp_path, recipe):
    base = exports.write_base(tmp_path / "llama", "llama")
    acts = exports.write_activations(tmp_path / "acts.safetensors", "llama")
    given_kv = {"kv_cache": "fp8", "activations": acts} if recipe != "int8_weight_only" else {}
    ji.ptq(base, tmp_path / "mo", recipe, **given_kv)
    ji.ptq(base, tmp_path / "ct", recipe, target=METHOD, **given_kv)
    ji.export(tmp_path / "mo", tmp_path / "exported", METHOD)
    assert exports.read_tensors(tmp_path / "ct") == exports.read_tensors(tmp_path / "exported")
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("ct", "exported")]
    assert configs[0] == configs[1]
    found, wanted = (bits_per_weight(open_model(tmp_path / folder)) for folder in ("ct", "mo"))
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_that_goes_on_knows_what_is_there(tmp_path, target):
    base = exports.write_base(tmp_path / "llama", "llama")
    acts = exports.write_activations(tmp_path / "acts.safetensors", "llama")
    job = prepare(base, "fp8", Settings(target=target, kv_cache="fp8", activations=acts))
    every = [_names_in(job, {unit}) for unit in range(len(job.inventory.units))]
    assert set.union(*every) == {tensor.name for tensor in job.outputs}
    assert sum(map(len, every)) == len(job.outputs)


def test_other_readers_see_the_notes(folders, tmp_path):
    """And nothing else: a note is metadata."""
    row = next(row for row in HELD if row.recipe == "nvfp4" and row.kv == "none")
    done = ji.export(folders(row), tmp_path / "ct", METHOD)
    assert done.notes > 0
    with safe_open(tmp_path / "ct" / "model.safetensors", "numpy") as file:
        notes = file.metadata()
    assert len(notes) == done.notes + 1
    assert notes["format"] == "pt"
    source = arrays(folders(row))
    for name, text in notes.items():
        if name != "format":
            assert np.float32(float.fromhex(text)) == source[name.removeprefix("jqx:")]


# --- descriptions of others


ARGS = {
    "actorder": None, "block_structure": None, "dynamic": False, "group_size": None,
    "num_bits": 4, "observer": "mse", "observer_kwargs": {}, "scale_dtype": None,
    "strategy": "group", "symmetric": True, "type": "int", "zp_dtype": None,
}  # fmt: skip


def described(weights, inputs=None, **more):
    group = {"targets": ["Linear"], "weights": ARGS | weights, "output_activations": None}
    group["input_activations"] = None if inputs is None else ARGS | inputs
    base = {"quant_method": METHOD, "format": "pack-quantized", "ignore": ["lm_head"]}
    return {**base, "config_groups": {"group_0": group}, **more}


INT8, FLOAT8 = {"num_bits": 8}, {"num_bits": 8, "type": "float"}
READ = {
    "W4A16": (described({"group_size": 64}), ("int4_b64", None)),
    "W4A16 ordered": (described({"group_size": 128, "actorder": "weight"}), ("int4", None)),
    "W4A16 rows": (described({"strategy": "channel"}), ("int4_b256", None)),
    "W8A16": (described(INT8 | {"strategy": "channel"}), ("int8", None)),
    "W8A8": (
        described(
            INT8 | {"strategy": "channel"},
            INT8 | {"strategy": "token", "dynamic": True, "observer": None},
        ),
        ("int8", "int8_token"),
    ),
    "FP8": (
        described(FLOAT8 | {"strategy": "tensor"}, FLOAT8 | {"strategy": "tensor"}),
        ("fp8", "fp8"),
    ),
    "FP8 dynamic": (
        described(
            FLOAT8 | {"strategy": "channel"}, FLOAT8 | {"strategy": "token", "dynamic": True}
        ),
        ("fp8_channel", "fp8_token"),
    ),
    "a group of -1": (described(INT8 | {"strategy": "channel", "group_size": -1}), ("int8", None)),
}


@pytest.mark.parametrize(("said", "formats"), READ.values(), ids=READ)
def test_what_others_write_is_understood(said, formats):
    found = ct_config.read_described(said)
    linears = {"model.layers.0.mlp.up_proj": (64, 256), "lm_head": (64, 256)}
    assert ct_config.choices_of(found, linears) == {
        "model.layers.0.mlp.up_proj": choice_of(*formats)
    }


def test_targets_and_what_is_ignored():
    said = described({"group_size": 128}, ignore=["re:.*self_attn.*", "model.layers.1"])
    other = {"targets": ["re:.*down_proj"], "weights": ARGS | INT8 | {"strategy": "channel"}}
    said["config_groups"] = {"group_0": other, "group_1": said["config_groups"]["group_0"]}
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    paths += [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.10.mlp.up_proj",
    ]
    found = ct_config.choices_of(ct_config.read_described(said), dict.fromkeys(paths, (64, 256)))
    assert found == {
        "model.layers.0.mlp.down_proj": choice_of("int8"),
        "model.layers.0.mlp.up_proj": choice_of("int4"),
        "model.layers.10.mlp.up_proj": choice_of("int4"),
    }


WRONG = {
    "zero points": (described({"symmetric": False}), "have zero points"),
    "ordered": (described({"actorder": "group"}), "columns in another order"),
    "three bits": (described({"num_bits": 3}), "num_bits 3.* no pair of formats"),
    "inputs": (
        described({"group_size": 128}, FLOAT8 | {"strategy": "token"}),
        "no pair of formats",
    ),
    "outputs": (described({}), "quantizes outputs"),
    "sparse": (described({}, sparsity_config={"format": "sparse-24-bitmask"}), "are sparse"),
    "status": (described({}, quantization_status="frozen"), "are frozen, not compressed"),
    "groups": (described({}, config_groups={}), "no config_groups"),
    "no object": (
        described({}, config_groups={"group_0": 3}),
        "group_0 of config_groups",
    ),
    "no weights": (
        described({}, config_groups={"g": {"targets": ["Linear"]}}),
        "quantizes no w",
    ),
    "ignore": (described({"group_size": 128}, ignore="lm_head"), "ignore is no list of names"),
    "pattern": (described({"group_size": 128}, ignore=["re:("]), r"which is no pattern"),
    "cache": (
        described({"group_size": 128}, kv_cache_scheme=INT8),
        "kv_cache_scheme is num_b",
    ),
}
WRONG["outputs"][0]["config_groups"]["group_0"]["output_activations"] = ARGS


@pytest.mark.parametrize(("said", "message"), WRONG.values(), ids=WRONG)
def test_what_others_write_and_is_not_read(said, message):
    with pytest.raises(InputError, match=message) as caught:
        ct_config.read_described(said)
    assert "\n" not in str(caught.value)


# --- what is refused, and the command


@pytest.fixture(scope="module")
def nvfp4(folders):
    return folders(next(row for row in HELD if row.recipe == "nvfp4" and row.kv == "none"))


def test_the_command(nvfp4, tmp_path):
    code, out, err = jqx("export", nvfp4, tmp_path / "ct", "--target", METHOD, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert (said["linears"], said["target"]) == (14, METHOD)
    assert said["bytes"] == sum(a.nbytes for a in arrays(tmp_path / "ct").values())
    code, out, err = jqx("export", tmp_path / "ct", tmp_path / "back", "--target", "modelopt")
    assert code == 0
    assert "14 linears from compressed-tensors to modelopt" in out
    assert snapshot(tmp_path / "back") == snapshot(nvfp4)


def test_what_cannot_be_exported(folders, nvfp4, tmp_path):
    out = tmp_path / "out"
    base = exports.write_base(tmp_path / "llama", "llama")
    refused("export", nvfp4, out, "--target", "awq", saying="unknown target 'awq'")
    refused("export", base, out, "--target", METHOD, saying="is not quantized: jqx quantize --tar")
    refused("export", nvfp4, nvfp4, "--target", METHOD, saying="out")
    rows = {row.recipe: row for row in ROWS if row.model == "llama"}
    for recipe in ("w4a8_mxfp4_fp8", "w4a8_nvfp4_fp8"):
        source = folders(rows[recipe])
        refused(
            "export", source, out, "--target", METHOD, saying="which compressed-tensors has no n"
        )
    kv = next(row for row in ROWS if row.kv == "nvfp4")
    refused("export", folders(kv), out, "--target", METHOD, saying="keys and values are in nvfp4")
    asked = ("--qformat", "nvfp4", "--kv-cache", "nvfp4", "--target", METHOD)
    refused("quantize", base, out, *asked, saying="holds keys and values in fp8, fp8_cast, not in")
    asked = ("--qformat", "int4_awq", "--set", "block=64", "--target", METHOD)
    told = "compressed-tensors has no name for int4_b64 with plain inputs and awq factors"
    refused("quantize", base, out, *asked, saying=told)
    assert not out.exists()


def test_a_checkpoint_that_is_half_there(nvfp4, tmp_path):
    broken, out = tmp_path / "broken", tmp_path / "out"
    ji.export(nvfp4, broken, METHOD)
    tensors = arrays(broken)
    lost = "model.layers.0.mlp.up_proj.weight_scale"
    write(broken, {k: v for k, v in tensors.items() if k != lost})
    refused("export", broken, out, "--target", "modelopt", saying=f"{lost} is missing")
    write(broken, tensors | {lost: tensors[lost][:, :-1]})
    refused("export", broken, out, "--target", "modelopt", saying=f"{lost} has shape")
    assert not out.exists()


def test_scales_that_are_none(nvfp4, tmp_path):
    broken = tmp_path / "broken"
    ji.export(nvfp4, broken, METHOD)
    name = "model.layers.1.mlp.up_proj.weight_global_scale"
    write(broken, arrays(broken) | {name: np.float32([np.nan])})
    with pytest.raises(InputError, match="weight_global_scale are not positive and finite"):
        ji.load(broken)


def test_a_note_that_is_none(nvfp4, tmp_path):
    ji.export(nvfp4, tmp_path / "ct", METHOD)
    file = tmp_path / "ct" / "model.safetensors"
    raw = file.read_bytes()
    at = raw.index(b"0x1.")
    file.write_bytes(raw[:at] + b"0y1." + raw[at + 4 :])
    refused("export", tmp_path / "ct", tmp_path / "out", "--target", "modelopt",
            saying=("its note jqx:model.layers", "is '0y1.", "not a number"))  # fmt: skip
