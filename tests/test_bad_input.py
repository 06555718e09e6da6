# SPDX-License-Identifier: Apache-2.0
"""What is wrong with an input is said in one line with exit code 2, and nothing is left at the
destination.
"""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import command
import exports
import numpy as np
import pytest
from command import refused, snapshot

from jqx_interop.checkpoints import Workspace

MODEL, WEIGHTS, INDEX = "source", "model.safetensors", "model.safetensors.index.json"
FP8 = ("--qformat", "fp8", "--calib", "ids.npy")
JQX = (sys.executable, "-c", "from jqx_interop.cli import main; main()")
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A model, its calibration ids and its recorded inputs."""
    folder = tmp_path_factory.mktemp("original")
    exports.write_base(folder / MODEL, "llama")
    (folder / f"{MODEL}-ids.npy").rename(folder / "ids.npy")
    exports.write_activations(folder / "acts.safetensors", "llama")
    return folder


@pytest.fixture
def here(original: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of it all, the current directory."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    exports.save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def edit(folder: Path, **changes: object) -> None:
    """Change keys of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def untouched(here: Path, *words: object, saying: tuple[str, ...] | str) -> str:
    """`words` are refused in one line, and no file appears, changes or goes."""
    before = snapshot(here)
    line = refused(*words, saying=saying)
    assert snapshot(here) == before
    return line


# --- what is asked for

OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "format": (("--qformat", "nvfp5"), ("'nvfp5'", "nvfp4")),
    "format like none": (("--qformat", "?"), ("'?'", "known:", "mxfp8")),
    "KV cache": (("--kv-cache", "fp8_afine"), ("'fp8_afine'", "fp8_affine")),
    "target": (("--target", "modelop"), ("'modelop'", "modelopt")),
    "algorithm": (("--algorithm", "maxx"), ("'maxx'", "max")),
    "key of --set": (("--set", "blok=64"), ("'blok'", "block")),
    "--set without a value": (("--set", "block"), ("'block'", "--set block=64")),
    "block of nothing": (("--qformat", "nvfp4", "--set", "block=0"), ("block=0", "positive")),
    "block of a format without": (("--set", "block=64"), ("block=64", "fp8 has no blocks")),
    "compute": (("--compute", "bf17"), ("'bf17'", "bf16")),
    "compute that is not needed": (
        ("--qformat", "mxfp8", "--compute", "int8"),
        ("'int8'", "float32"),
    ),
    "memory": (("--max-memory", "lots"), ("max_memory", "'lots'", "4GiB")),
    "shard size": (("--max-shard-size", "0"), ("max_shard_size", "'0'", "10GB")),
    "batch size": (("--batch-size", "-1"), ("batch_size is -1", "at least 0")),
    "number of sequences": (("--calib-size", "0"), ("calib_size is 0", "at least 1")),
    "length of sequences": (("--calib-seq", "0"), ("calib_seq is 0", "at least 1")),
    "no number": (("--batch-size", "two"), ("--batch-size", "jqx quantize --help")),
    "option": (("--qfromat", "fp8"), ("--qfromat", "--qformat")),
}


@pytest.mark.parametrize(("words", "saying"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options(here: Path, words: tuple[str, ...], saying: tuple[str, ...]):
    untouched(here, "quantize", MODEL, "out", *FP8, *words, saying=saying)


def test_commands_and_arguments(here: Path):
    untouched(here, "quantise", saying=("quantise", "quantize", "--help"))
    untouched(here, "quantize", saying=("Missing argument", "--help"))
    untouched(here, "quantize", MODEL, saying=("OUT", "--plan"))
    untouched(here, "inspect", "nothing", saying=("nothing", "no such directory"))
    untouched(here, "compare", MODEL, "nothing", saying=("nothing", "no such directory"))
    untouched(here, "recipes", "fp9", saying=("'fp9'", "fp8"))


RECIPE_FILES = {
    "wrong key": ("extends: fp8\nrulez: []\n", ("recipe.yaml", "'rulez'", "rules")),
    "wrong key of a rule": ("rules: [{path: '*', weight: fp8}]\n", ("'path'", "path_glob")),
    "unknown format": ("rules: [{weight: fp9}]\n", ("fp9", "fp8")),
    "unknown input format": ("rules: [{weight: fp8, input: fp9}]\n", ("fp9", "fp8")),
    "unknown KV format": ("rules: [{kv: fp9}]\n", ("fp9", "fp8")),
    "KV format": ("extends: fp8\nrules: [{kv: fp8}]\n", ("recipe", "--kv-cache fp8")),
    "output format": (
        "extends: fp8\nrules: [{output: fp8}]\n",
        ("recipe", "outputs are not quantized"),
    ),
    "unknown kind": ("rules: [{weight: fp8, kind: conv}]\n", ("'conv'", "linear")),
    "unknown base": ("extends: fp9\n", ("'fp9'", "fp8")),
    "unknown algorithm": ("extends: fp8\nalgorithm: maxx\n", ("'maxx'", "max")),
    "not YAML": ("rules: [}\n", ("recipe.yaml", "not YAML", "line 1")),
    "no mapping": ("- fp8\n", ("recipe.yaml", "mapping", "extends")),
    "rules that are none": ("rules: {weight: fp8}\n", ("recipe.yaml", "rules", "list")),
    "a number for a format": ("rules: [{weight: 8}]\n", ("recipe.yaml", "weight", "8")),
    "a number for a path": ("rules: [{path_glob: 8}]\n", ("recipe.yaml", "path_glob", "8")),
    "a pair without a layout": (
        "rules: [{weight: int4, input: int8, kind: linear}]\n",
        ("0.self_attn.q_proj", "no layout", "int4", "int8"),
    ),
    "embeddings": ("rules: [{weight: fp8, input: fp8}]\n", ("embed_tokens", "kind: linear")),
    "a head that is not reached": (
        "extends: fp8\nrules: [{path_glob: '*lm_head*', weight: fp8, input: fp8}]\n",
        ("lm_head", "--activations"),
    ),
    "siblings apart": (
        "extends: fp8\nrules: [{path_glob: '*k_proj*', weight: int8, input: int8}]\n",
        ("engines fuse", "q_proj to fp8", "k_proj to int8"),
    ),
    "selects nothing": (
        "rules: [{path_glob: nowhere, weight: fp8}]\n",
        ("recipe", "none", "self_attn.q_proj"),
    ),
}


@pytest.mark.parametrize(("text", "saying"), RECIPE_FILES.values(), ids=RECIPE_FILES.keys())
def test_recipe_files(here: Path, text: str, saying: tuple[str, ...]):
    (here / "recipe.yaml").write_text(text)
    untouched(
        here,
        "quantize",
        MODEL,
        "out",
        "--recipe",
        "recipe.yaml",
        "--calib",
        "ids.npy",
        saying=saying,
    )


def test_a_recipe_file_that_is_not_there(here: Path):
    untouched(here, "quantize", MODEL, "out", "--recipe", "r.yaml", saying=("r.yaml", "no such"))


# --- models


def _truncate(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)


def _corrupt(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:8] + b"}" + raw[9:])


def _missing_shard(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    shards = dict.fromkeys(exports.tensors("llama"), "model-00001-of-00002.safetensors")
    shards["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))


def _tensor_missing(folder: Path) -> None:
    save(folder, {n: a for n, a in exports.tensors("llama").items() if n != f"{DOWN}.weight"})


def _tensor_extra(folder: Path) -> None:
    save(folder, exports.tensors("llama") | {"model.surprise.weight": np.zeros((2, 2), np.float32)})


def _wrong_shape(folder: Path) -> None:
    save(folder, exports.tensors("llama") | {f"{DOWN}.weight": np.zeros((128, 128), np.float32)})


def _quantized(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})


MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config.json": (lambda f: (f / "config.json").unlink(), ("no config.json",)),
    "broken JSON": (
        lambda f: (f / "config.json").write_text('{\n"a": 1,'),
        ("config.json", "line 2"),
    ),
    "another model_type": (lambda f: edit(f, model_type="lama"), ("'lama'", "llama")),
    "no model_type": (lambda f: edit(f, model_type=None), ("model_type", "llama")),
    "no hidden_size": (lambda f: edit(f, hidden_size=None), ("hidden_size",)),
    "sizes that are none": (
        lambda f: edit(f, num_hidden_layers="two"),
        ("num_hidden_layers", "two"),
    ),
    "a layer too many": (lambda f: edit(f, num_hidden_layers=3), ("model.layers.2.", "missing")),
    "a dtype that is none": (lambda f: edit(f, dtype="int8"), ("dtype", "int8", "bfloat16")),
    "float64": (lambda f: edit(f, dtype="float64"), ("F64", "BF16")),
    "truncated": (_truncate, (WEIGHTS, "truncated")),
    "corrupt header": (_corrupt, (WEIGHTS, "corrupt")),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ("no safetensors",)),
    "a missing shard": (_missing_shard, ("model-00002-of-00002.safetensors", "missing")),
    "a missing tensor": (_tensor_missing, (f"{DOWN}.weight", "missing")),
    "another tensor": (_tensor_extra, ("model.surprise.weight", "not part of the model")),
    "a wrong shape": (_wrong_shape, (f"{DOWN}.weight", "(128, 128)", "(128, 256)")),
    "quantized already": (_quantized, ("already quantized", "'gptq'", "original")),
}


@pytest.mark.parametrize(("damage", "saying"), MODELS.values(), ids=MODELS.keys())
def test_models(here: Path, damage: Callable[[Path], object], saying: tuple[str, ...]):
    damage(here / MODEL)
    untouched(here, "quantize", MODEL, "out", *FP8, saying=(MODEL, *saying))


def test_a_model_that_is_not_there(here: Path):
    untouched(
        here, "quantize", "no/such/model", "out", saying=("no/such/model", "no such directory")
    )
    untouched(
        here, "quantize", f"{MODEL}/{WEIGHTS}", "out", saying=(WEIGHTS, "is a file", "directory")
    )


def test_an_export_is_no_source(here: Path):
    assert command.jqx("quantize", MODEL, "first", "--qformat", "mxfp8").code == 0
    untouched(
        here, "quantize", "first", "second", saying=("first", "already quantized", "'modelopt'")
    )


def test_pickled_weights_are_never_opened(here: Path):
    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (here / "sprung",)

    (here / MODEL / WEIGHTS).unlink()
    (here / MODEL / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    untouched(
        here,
        "quantize",
        MODEL,
        "out",
        *FP8,
        saying=("pytorch_model.bin", "never opened", "safetensors"),
    )
    pickle.loads((here / MODEL / "pytorch_model.bin").read_bytes())
    assert (here / "sprung").exists()


def test_a_strange_architecture_has_no_keys_and_values(here: Path):
    edit(here / MODEL, model_type="strange")
    given = ("quantize", MODEL, "out", "--activations", "acts.safetensors", "--kv-cache", "fp8")
    untouched(here, *given, saying=("'strange'", "--kv-cache none", "_cast"))


# --- shapes a format cannot store


def reshaped(folder: Path, **sizes: int) -> None:
    """Give the model other widths."""
    config = exports.MODELS["llama"] | sizes
    dtype = exports.DTYPES[config["dtype"]]
    save(folder, {n: exports.draw(n, s, dtype) for n, s in exports.shapes(config).items()})
    edit(folder, **sizes, head_dim=config["hidden_size"] // config["num_attention_heads"])


SHAPES = {
    "int4_blockwise_weight_only": (
        {"intermediate_size": 192},
        ("mlp.down_proj", "128", "192", "block=64"),
    ),
    "nvfp4": ({"intermediate_size": 200}, ("mlp.down_proj", "16", "200", "Leave")),
    "mxfp8": ({"intermediate_size": 176}, ("mlp.down_proj", "32", "176", "block=16")),
}


@pytest.mark.parametrize(("recipe", "sizes", "saying"), [(r, *row) for r, row in SHAPES.items()])
def test_blocks_that_do_not_divide(
    here: Path, recipe: str, sizes: dict[str, int], saying: tuple[str, ...]
):
    reshaped(here / MODEL, **sizes)
    given = ("--qformat", recipe, "--calib", "ids.npy")
    untouched(here, "quantize", MODEL, "out", *given, saying=("model.layers.0", "1 more", *saying))


def test_another_block_size_is_the_way_out(here: Path):
    reshaped(here / MODEL, intermediate_size=192)
    given = ("--qformat", "int4", "--set", "block=64")
    assert command.jqx("quantize", MODEL, "out", *given).code == 0
    described = json.loads((here / "out" / "hf_quant_config.json").read_text())
    assert described["quantization"]["group_size"] == 64


def test_pairs_of_rows_that_are_odd(here: Path):
    reshaped(here / MODEL, intermediate_size=255)
    save(here / MODEL, {n: a for n, a in _tensors(here / MODEL).items() if ".down_proj" not in n})
    edit(here / MODEL, model_type="strange")
    saying = ("mlp.gate_proj", "pairs of rows", "255")
    untouched(here, "quantize", MODEL, "out", "--qformat", "int4", saying=saying)


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return exports.load_file(folder / WEIGHTS)


# --- numbers that are none


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", f"{DOWN}.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("given", [("--qformat", "mxfp8"), ("--activations", "acts.safetensors")])
def test_weights(here: Path, name: str, value: float, given: tuple[str, ...]):
    tensors = exports.tensors("llama")
    tensors[name].reshape(-1)[17] = value
    save(here / MODEL, tensors)
    refused("quantize", MODEL, "out", *given, saying=(name, "NaN or infinite"))
    assert not (here / "out").exists()
    assert (here / "out.jqx-partial").exists() == (name != "model.embed_tokens.weight")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj"])
def test_weights_that_calibration_meets_first(here: Path, name: str):
    tensors = exports.tensors("llama")
    tensors[f"{name}.weight"][3, 5] = np.nan
    save(here / MODEL, tensors)
    refused("quantize", MODEL, "out", *FP8, saying=("model.layers.", "finite"))
    assert not (here / "out").exists()


def test_inputs_that_overflow(here: Path):
    tensors = exports.tensors("llama")
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] *= exports.DTYPES["bfloat16"].type(1e30)
    save(here / MODEL, tensors)
    refused(
        "quantize",
        MODEL,
        "out",
        *FP8,
        saying=("model.layers.0.mlp.down_proj", "not finite", "--compute"),
    )
    assert not (here / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_recorded_inputs(here: Path, value: float):
    recorded = exports.load_file(here / "acts.safetensors")
    recorded[f"{DOWN}|1"][0, 3, 7] = value
    exports.save_file(recorded, here / "acts.safetensors")
    saying = ("acts.safetensors", DOWN, "not finite")
    refused("quantize", MODEL, "out", "--activations", "acts.safetensors", saying=saying)
    assert not (here / "out").exists()


# --- recorded inputs


def test_recorded_inputs_that_do_not_fit(here: Path):
    given = ("quantize", MODEL, "out", "--activations", "acts.safetensors")
    recorded = exports.load_file(here / "acts.safetensors")
    some = {name: x for name, x in recorded.items() if not name.startswith(DOWN)}
    exports.save_file(some, here / "acts.safetensors")
    untouched(here, *given, saying=("acts.safetensors", DOWN, "<module>|<batch>"))
    narrow = {name: x[..., :64] if name.startswith(DOWN) else x for name, x in recorded.items()}
    exports.save_file(
        {n: np.ascontiguousarray(x) for n, x in narrow.items()}, here / "acts.safetensors"
    )
    untouched(here, *given, saying=("acts.safetensors", DOWN, "64", "256"))
    (here / "acts.safetensors").write_bytes(b"\0" * 40)
    untouched(here, *given, saying="acts.safetensors")
    (here / "acts.safetensors").unlink()
    untouched(here, *given, saying="acts.safetensors")


def test_recorded_keys_are_two_dimensional_too_or_refused(here: Path):
    recorded = exports.load_file(here / "acts.safetensors")
    flat = {name: x.reshape(-1) if ".k_proj|" in name else x for name, x in recorded.items()}
    exports.save_file(flat, here / "acts.safetensors")
    given = ("--activations", "acts.safetensors", "--kv-cache", "fp8")
    untouched(here, "quantize", MODEL, "out", *given, saying=("acts.safetensors", "k_proj"))


# --- calibration data

CALIBRATION: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "missing": ("none.txt", lambda f: None, ("none.txt", "no such file")),
    "empty": ("empty.txt", lambda f: f.touch(), ("empty.txt", "is empty")),
    "only spaces": ("a.txt", lambda f: f.write_text("\n \n"), ("a.txt", "is empty")),
    "not text": ("a.txt", lambda f: f.write_bytes(b"\xff\xfe\x00"), ("a.txt", "line 1")),
    "unknown kind": ("a.csv", lambda f: f.write_text("x"), ("a.csv", ".jsonl", ".npy")),
    "a folder": ("a.txt", lambda f: f.mkdir(), ("a.txt", "not a file")),
    "not JSON": ("a.jsonl", lambda f: f.write_text("{\n"), ("a.jsonl", "line 1")),
    "outside": (
        "a.npy",
        lambda f: np.save(f, np.full((1, 4), 128)),
        ("a.npy", "128", "vocabulary"),
    ),
    "negative": ("a.npy", lambda f: np.save(f, np.full((1, 4), -1)), ("a.npy", "-1", "vocabulary")),
    "floats": ("a.npy", lambda f: np.save(f, np.zeros((1, 4))), ("a.npy", "float64", "integer")),
    "one axis": (
        "a.npy",
        lambda f: np.save(f, np.arange(4)),
        ("a.npy", "(4,)", "[batches, batch, length]"),
    ),
    "no ids": ("a.npy", lambda f: np.save(f, np.zeros((0, 4), int)), ("a.npy", "(0, 4)")),
    "no array": ("a.npy", lambda f: f.write_text("words"), ("a.npy", ".npy")),
    "no tokenizer": ("a.txt", lambda f: f.write_text("Some words."), ("no tokenizer.json", ".npy")),
}


@pytest.mark.parametrize(("name", "make", "saying"), CALIBRATION.values(), ids=CALIBRATION.keys())
def test_calibration_data(
    here: Path, name: str, make: Callable[[Path], object], saying: tuple[str, ...]
):
    if saying[0] != "no tokenizer.json":
        (here / MODEL / "tokenizer.json").write_text(TOKENIZER)
    make(here / name)
    untouched(here, "quantize", MODEL, "out", "--calib", name, saying=saying)


TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"words": 0, "?": 1}, "unk_token": "?"},
    }
)


# --- the destination


def test_a_destination_that_is_taken(here: Path):
    (here / "out").mkdir()
    (here / "out" / "precious").write_text("data")
    untouched(here, "quantize", MODEL, "out", *FP8, saying=("out", "not empty", "Remove it"))
    (here / "file").write_text("data")
    untouched(here, "quantize", MODEL, "file", *FP8, saying=("file", "not a directory"))


def test_a_destination_in_the_way_of_the_model(here: Path):
    untouched(here, "quantize", MODEL, MODEL, *FP8, saying=(MODEL, "the model itself"))
    untouched(here, "quantize", MODEL, f"{MODEL}/out", *FP8, saying=(MODEL, "inside the model"))
    untouched(here, "quantize", MODEL, ".", *FP8, saying="contains the model")


def test_a_destination_that_cannot_be_made(here: Path):
    (here / "file").write_text("data")
    untouched(here, "quantize", MODEL, "file/out", *FP8, saying=("file/out", "cannot be made"))


def test_a_destination_that_another_process_writes(here: Path):
    hold = "from jqx_interop.checkpoints import Workspace; Workspace('out'); "
    hold += "print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        untouched(
            here, "quantize", MODEL, "out", *FP8, saying=("out", "being written", str(other.pid))
        )
        other.communicate("\n")
    assert command.jqx("quantize", MODEL, "out", *FP8).code == 0


# --- a full disk


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_room_at_all(here: Path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    saying = ("out.jqx-partial", "no room", "bytes", "No space left")
    untouched(here, "quantize", MODEL, "out", *FP8, saying=saying)


def test_no_room_for_hidden_states(here: Path, monkeypatch):
    reserve = os.posix_fallocate

    def small(descriptor: int, start: int, size: int) -> None:
        hidden = os.readlink(f"/proc/self/fd/{descriptor}").endswith(".bin")
        full() if hidden else reserve(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", small)
    saying = ("out.jqx-partial", "No space left", "the same command")
    untouched(here, "quantize", MODEL, "out", *FP8, "--max-memory", "1KiB", saying=saying)


@pytest.mark.parametrize("given", [("--qformat", "mxfp8"), FP8], ids=["data-free", "calibrated"])
def test_a_disk_that_fills_half_way(here: Path, monkeypatch, given: tuple[str, ...]):
    write, left = os.pwrite, [12]

    def fills(descriptor: int, data: bytes, start: int) -> int:
        left[0] -= 1
        return write(descriptor, data, start) if left[0] >= 0 else full() or 0

    monkeypatch.setattr(os, "pwrite", fills)
    saying = ("out.jqx-partial", "No space left", "the same command")
    refused("quantize", MODEL, "out", *given, saying=saying)
    assert not (here / "out").exists()
    assert (here / "out.jqx-partial").exists()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert command.jqx("quantize", MODEL, "out", *given).code == 0
    assert command.jqx("quantize", MODEL, "whole", *given).code == 0
    assert snapshot(here / "out") == snapshot(here / "whole")


def test_a_limit_on_the_size_of_files(here: Path):
    before = snapshot(here)
    done = subprocess.run(
        [
            "bash",
            "-c",
            'ulimit -f 100; "$@"',
            "_",
            *JQX,
            "quantize",
            MODEL,
            "out",
            "--qformat",
            "mxfp8",
        ],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "no room for the checkpoint" in done.stderr
    assert snapshot(here) == before


# --- how errors are told


def test_the_traceback_is_shown_when_asked_for(here: Path):
    done = subprocess.run(
        [*JQX, "quantize", MODEL, "out", "--qformat", "fp9", "--debug"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "InputError: unknown format 'fp9'" in done.stderr


def test_a_bug_is_one_line_too(here: Path, monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr("jqx_interop.job.prepare", broken)
    code, out, err = command.jqx("quantize", MODEL, "out")
    assert (code, out) == (1, "")
    way_out = "(--debug shows the traceback; please report it)"
    assert err == f"internal error: ZeroDivisionError: a b {way_out}\n"


def test_an_interruption_says_how_to_go_on(here: Path, monkeypatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Workspace, "record", stopped)
    code, out, err = command.jqx("quantize", MODEL, "out", "--qformat", "mxfp8")
    assert (code, out) == (130, "")
    assert err == "interrupted; the same command goes on where it was\n"
