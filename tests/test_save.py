# SPDX-License-Identifier: Apache-2.0
"""A model in memory becomes the files the reference tool writes, and comes back as it was."""

import json
import re
from dataclasses import replace
from pathlib import Path

import exports
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exports import Export
from stored_trees import ROWS, drawn, model_of

import jqx_interop as ji
from jqx.errors import InputError
from jqx.formats import FORMATS, find_format
from jqx.models.linen import CausalLM
from jqx.tensors import QTensor
from jqx.tensors.layout import Layout
from jqx.tensors.paths import flatten, unflatten
from jqx_interop.checkpoints import ShardWriter

INT8 = Export(model="llama", recipe="int8")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for model in {row.model for row in ROWS}:
        exports.write_base(folder / model, model)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def refused(*saying: str):
    """The one line that says no, with all the phrases."""
    phrases = "".join(f"(?=[^\n]*{re.escape(phrase)})" for phrase in saying)
    return pytest.raises(InputError, match=rf"\A{phrases}[^\n]*\Z")


# --- the same bytes


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_files_are_those_of_the_reference_tool(bases: Path, tmp_path: Path, row: Export):
    out = ji.save(model_of(row, bases / row.model), tmp_path / "out", max_shard_size=row.shard)
    want = exports.answers()["exports"][row.key]
    files = content(out)
    weights = {name: exports.short(raw) for name, raw in files.items() if "safetensors" in name}
    assert {n: d for n, d in weights.items() if not n.endswith(".json")} == want["files"]
    assert {name: files[name].decode() for name in want["texts"]} == want["texts"]
    source = exports.answers()["models"][row.model]["files"]
    config = json.loads(source["config.json"])
    config["quantization_config"] = want["quantization_config"]
    assert files["config.json"].decode() == json.dumps(config, indent=4)
    assert files["generation_config.json"].decode() == source["generation_config.json"]
    assert set(files) == {*want["files"], *want["texts"], *source}
    again = ji.save(ji.load(out), tmp_path / "again", max_shard_size=row.shard)
    assert content(again) == files


def test_what_the_reference_tool_wrote_comes_back(shared: Path, tmp_path: Path):
    """Weights that other algorithms chose, among them those with factors beside them."""
    folders = sorted(f.parent for f in shared.glob("golden/*/hf_quant_config.json"))
    for folder in folders:
        out = ji.save(ji.load(folder), tmp_path / folder.name)
        assert content(out) == content(folder)
    assert len(folders) > 40


@pytest.mark.parametrize("model", ["llama", "qwen2", "llama_f16"])
def test_a_plain_checkpoint_comes_back(bases: Path, tmp_path: Path, model: str):
    if not (bases / model).exists():
        exports.write_base(bases / model, model)
    model_there = ji.load(bases / model)
    assert content(ji.save(model_there, tmp_path / "out")) == content(bases / model)


LOGITS = (Export(model="llama", recipe="mixed"), Export(model="llama", recipe="nvfp4", kv="nvfp4"))


@pytest.mark.parametrize("row", LOGITS, ids=lambda row: row.key)
def test_logits_stay(tmp_path: Path, row: Export):
    model = model_of(row)
    ids = exports.token_ids("llama")[0]
    again = ji.load(ji.save(model, tmp_path / "out"))
    before, after = (np.asarray(m.apply({"params": m.params}, ids)) for m in (model, again))
    assert np.isfinite(before).all()
    np.testing.assert_array_equal(before, after)


# --- trees made by hand


def dense(model: str = "llama") -> ji.Model:
    config = json.loads(exports.answers()["models"][model]["files"]["config.json"])
    named = {name: jnp.asarray(array) for name, array in drawn(model).items()}
    return replace(model_of(INT8), params=unflatten(named), config=config)


def with_leaves(model: ji.Model, changes: dict[str, object]) -> ji.Model:
    """`model` with other leaves; None takes one out."""
    named = flatten(model.params) | changes
    return replace(model, params=unflatten({n: x for n, x in named.items() if x is not None}))


def test_another_block_size_and_no_directory(tmp_path: Path):
    """A model need not come from a checkpoint, and a format may be varied without a name."""
    fmt = replace(FORMATS["int4"], block=(1, 64))
    model, up = dense(), "model.layers.0.mlp.up_proj.weight"
    changed = with_leaves(
        model, {up: jax.jit(lambda w: QTensor.quantize(w, fmt))(drawn("llama")[up])}
    )
    out = ji.save(changed, tmp_path / "a" / "out")
    said = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert (said["quant_algo"], said["group_size"]) == ("W4A16_AWQ", 64)
    assert said["exclude_modules"][-1] == "model.layers.1*"
    q = flatten(ji.load(out).params)[up]
    assert q.format == find_format("int4_b64")
    np.testing.assert_array_equal(q.codes, flatten(changed.params)[up].codes)
    assert set(content(out)) == {"config.json", "hf_quant_config.json", "model.safetensors"}


def test_four_over_six_is_called_what_engines_read(tmp_path: Path):
    model = model_of(Export(model="llama", recipe="nvfp4"))
    changes = {
        name: q.replace(format=FORMATS["nvfp4_46"])
        for name, q in flatten(model.params).items()
        if isinstance(q, QTensor)
    }
    out = ji.save(with_leaves(model, changes), tmp_path / "out")
    assert content(out) == content(ji.save(model, tmp_path / "plain"))


def test_the_dtype_of_the_parameters_is_the_models(tmp_path: Path):
    model = dense()
    params = jax.tree.map(lambda x: x.astype(jnp.float32), model.params)
    again = ji.load(ji.save(replace(model, params=params), tmp_path / "out"))
    assert again.config["dtype"] == "float32"
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    params["model"]["norm"]["weight"] = params["model"]["norm"]["weight"].astype(jnp.float16)
    with refused("float32 (20), float16 (1)", "one dtype"):
        ji.save(replace(model, params=params), tmp_path / "mixed")
    doubles = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
    with refused("float64 (21)", "bfloat16, float16 or float32"):
        ji.save(replace(model, params=doubles), tmp_path / "doubles")


Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBED = "model.embed_tokens.weight"


def changed(name: str, **fields: object):
    return lambda named: {name: named[name].replace(**fields)}


TREES = {
    "a leaf missing": (lambda _: {"model.norm.weight": None}, ("model.norm.weight is missing",)),
    "a leaf too many": (
        lambda _: {"model.layers.0.k_scale": jnp.float32(1)},
        ("model.layers.0.k_scale is no parameter",),
    ),
    "another shape": (
        lambda named: {"model.norm.weight": named["model.norm.weight"][:64]},
        ("model.norm.weight has the shape (64,)", "(128,)"),
    ),
    "an embedding": (
        lambda named: {EMBED: QTensor.quantize(named[EMBED], "mxfp8")},
        ("model.embed_tokens is quantized and is no linear",),
    ),
    "another axis": (
        lambda named: {Q: replace(named[Q], layout=Layout(columns=(-2,)))},
        ("q_proj is contracted over (0,) of 2 axes", "[out, in]"),
    ),
    "a low-rank part": (
        changed(Q, low_rank=(jnp.zeros((128, 1)), jnp.zeros((1, 128)))),
        ("q_proj has a low-rank part, which W8A8_SQ_PER_CHANNEL does not store",),
    ),
    "a factor": (
        changed(Q, pre_quant_scale=jnp.ones(128), input_format=None, input_scale=None),
        ("q_proj has a pre_quant_scale, which W8A16 does not store",),
    ),
    "no name": (changed(Q, input_format="mxfp8"), ("int8 with mxfp8 inputs, which has no name",)),
    "no such row": (
        lambda named: {Q: named[Q].replace(format=replace(FORMATS["int8"], block=(2, None)))},
        ("q_proj is stored as int8", "no name"),
    ),
    "no input_scale": (
        changed(DOWN, input_scale=None),
        ("down_proj has no input_scale, which int8 inputs need",),
    ),
    "an input_scale for nothing": (
        changed(DOWN, input_format=None),
        ("down_proj has an input_scale, and None inputs have none",),
    ),
    "scales of another shape": (
        changed(DOWN, scale=jnp.ones((128, 2))),
        ("down_proj has scales of shape (128, 2), int8 has (128, 1)",),
    ),
    "scales of another dtype": (
        changed(DOWN, input_scale=jnp.bfloat16(1)),
        ("down_proj has a input_scale that is bfloat16 ()", "stores F32 ()"),
    ),
    "formats of siblings": (
        changed(Q, input_format=None, input_scale=None),
        ("q_proj", "k_proj", "v_proj", "give them one format"),
    ),
    "scales of siblings": (
        changed(Q, input_scale=jnp.float32(0.5)),
        ("q_proj", "v_proj", "its own input_scale", "one amax"),
    ),
}


@pytest.mark.parametrize(("change", "saying"), TREES.values(), ids=TREES.keys())
def test_trees_that_are_no_checkpoint(tmp_path: Path, change, saying: tuple[str, ...]):
    model = model_of(INT8)
    with refused(*saying):
        ji.save(with_leaves(model, change(flatten(model.params))), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path):
    model = model_of(INT8)
    paths = [n for n, q in flatten(model.params).items() if isinstance(q, QTensor)]
    named = {name: flatten(model.params)[name].replace(input_scale=None) for name in paths}
    with refused("q_proj has no input_scale", "o_proj has no input_scale", "and 10 more"):
        ji.save(with_leaves(model, named), tmp_path / "out")


def test_keys_and_values_alone_have_no_name(tmp_path: Path):
    model = dense()
    spec = replace(model.spec, kv_cache="fp8_cast")
    with refused("keys and values are quantized and no linear is"):
        ji.save(replace(model, module=CausalLM(spec)), tmp_path / "out")


def test_factors_on_inputs_come_back(tmp_path: Path):
    factor = jnp.linspace(0.5, 2, 128).astype(jnp.bfloat16)
    model = model_of(INT8)
    changes = {
        name: q.replace(pre_quant_scale=factor)
        for name, q in flatten(model.params).items()
        if "o_proj" in name
    }
    again = flatten(ji.load(ji.save(with_leaves(model, changes), tmp_path / "out")).params)
    for name in changes:
        np.testing.assert_array_equal(again[name].pre_quant_scale, factor)
    wrong = {name: q.replace(pre_quant_scale=factor[:64]) for name, q in changes.items()}
    with refused("o_proj has a pre_quant_scale that is bfloat16 (64,)", "BF16 (128,)"):
        ji.save(with_leaves(model, wrong), tmp_path / "wrong")


# --- destinations


def test_destinations(bases: Path, tmp_path: Path):
    model = replace(dense(), path=bases / "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("kept")
    with refused(str(tmp_path / "full"), "not empty"):
        ji.save(model, tmp_path / "full")
    with refused("is the model itself"):
        ji.save(model, bases / "llama")
    with refused("inside the model directory"):
        ji.save(model, bases / "llama" / "out")
    with refused("unknown target 'modelop'", "modelopt"):
        ji.save(model, tmp_path / "out", "modelop")
    with refused("'1XB' is not a size"):
        ji.save(model, tmp_path / "out", max_shard_size="1XB")
    assert content(tmp_path / "full") == {"a": b"kept"}
    assert [f.name for f in tmp_path.iterdir()] == ["full"]


def test_what_stops_half_way_leaves_nothing(tmp_path: Path, monkeypatch):
    written = []

    def write(self: ShardWriter, name: str, array: object) -> None:
        written.append(name)
        if len(written) == 5:
            raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(ShardWriter, "write", write)
    with refused("somewhere: No space left on device", "Nothing was written"):
        ji.save(dense(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
