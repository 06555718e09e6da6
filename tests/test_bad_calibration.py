# SPDX-License-Identifier: Apache-2.0
"""What is wrong with recorded inputs or calibration data is said in one line with exit code 2, and
nothing is left at the destination.
"""

import json
from collections.abc import Callable
from pathlib import Path

import exports
import numpy as np
import pytest
from command import refused
from source import DOWN, MODEL, untouched

# --- recorded inputs


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_recorded_inputs(here: Path, value: float):
    recorded = exports.load_file(here / "acts.safetensors")
    recorded[f"{DOWN}|1"][0, 3, 7] = value
    exports.save_file(recorded, here / "acts.safetensors")
    saying = ("acts.safetensors", DOWN, "not finite")
    refused("quantize", MODEL, "out", "--activations", "acts.safetensors", saying=saying)
    assert not (here / "out").exists()


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


def test_statistics_that_are_not_there_or_not_alone(here: Path):
    words = ("quantize", MODEL, "out", "--qformat", "int8_weight_only")
    untouched(here, *words, "--stats", "nowhere", saying=("nowhere", "holds no statistics"))
    Path("stats").mkdir()
    both = ("--stats", "stats", "--activations", "acts.safetensors")
    untouched(here, *words, *both, saying="take one of them")
    saying = "name those that it is for (--qformat, --recipe)"
    untouched(here, "calibrate", MODEL, "new", "--set", "block=32", saying=saying)
