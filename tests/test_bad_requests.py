# SPDX-License-Identifier: Apache-2.0
"""What is wrong with options, arguments and recipe files is said in one line with exit code 2, and
nothing is left at the destination; how other errors are told.
"""

import subprocess
from pathlib import Path

import command
import pytest
from source import FP8, JQX, MODEL, untouched

from jqx_interop.checkpoints import Workspace

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
        ("0.self_attn.q_proj", "modelopt has no name", "int4", "int8"),
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
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr("jqx_interop.job.prepare", broken)
    code, out, err = command.jqx("quantize", MODEL, "out")
    assert (code, out) == (1, "")
    way_out = "(--debug shows the traceback; please report it)"
    assert err == f"internal error: ZeroDivisionError: a b {way_out}\n"


def test_an_interruption_says_how_to_go_on(here: Path, monkeypatch):
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Workspace, "record", stopped)
    code, out, err = command.jqx("quantize", MODEL, "out", "--qformat", "mxfp8")
    assert (code, out) == (130, "")
    assert err == "interrupted; the same command goes on where it was\n"
