# SPDX-License-Identifier: Apache-2.0
"""What cannot be evaluated is said in one line with exit code 2, and nothing is left behind."""

import json
from collections.abc import Callable
from pathlib import Path

import exports
import numpy as np
import pytest
import tokenizers
from source import DOWN, MODEL, WEIGHTS, edit, save, untouched

import jqx_interop as ji
from jqx.errors import InputError


@pytest.fixture(autouse=True)
def stream(here: Path) -> None:
    """Ids of a text beside the model, and a tokenizer in another folder."""
    np.save("stream.npy", np.arange(100) % 128)
    Path("t.txt").write_text("a b c " * 40)


def tokenizer(folder: Path | str, **words: int) -> None:
    """A tokenizer that knows these words and `?`, which is 0."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, **words}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # pyright: ignore
    made.save(str(Path(folder) / "tokenizer.json"))


def refused(*words: object, saying: tuple[str, ...] | str) -> None:
    untouched(Path(), "eval", MODEL, *words, saying=saying)


IDS = ("--text", "stream.npy")
OPTIONS: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "text shorter than a window": (
        (*IDS, "--max-tokens", 50),
        ("stream.npy", "50 tokens", "one window of 64", "--window 50"),
    ),
    "no text at all": ((*IDS, "--max-tokens", 1), ("max_tokens is 1", "at least 2")),
    "no stride": ((*IDS, "--stride", 0), ("stride is 0", "at least 1")),
    "stride beyond a window": (
        (*IDS, "--window", 32, "--stride", 33),
        ("stride of 33", "windows of 32", "32 or less"),
    ),
    "window of one": ((*IDS, "--window", 1), ("window is 1", "at least 2")),
    "batch size": ((*IDS, "--batch-size", -1), ("batch_size is -1", "at least 0")),
    "memory": ((*IDS, "--max-memory", "lots"), ("max_memory", "'lots'", "4GiB")),
    "compute": ((*IDS, "--compute", "bf17"), ("'bf17'", "bf16")),
    "text that is not there": (("--text", "none.txt"), ("none.txt", "no such file")),
    "text of no known kind": (("--text", WEIGHTS), (WEIGHTS, "no such file")),
    "tokenizer that is not there": (("--text", "t.txt"), (MODEL, "no tokenizer.json", ".npy")),
    "bundled text without tokenizer": ((), (MODEL, "no tokenizer.json", ".npy")),
    "reference that is not there": ((*IDS, "--reference", "none"), ("none", "no such directory")),
    "no number": ((*IDS, "--window", "wide"), ("--window", "jqx eval --help")),
    "option": ((*IDS, "--refrence", "x"), ("--refrence", "--reference")),
}


@pytest.mark.parametrize(("words", "saying"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options(here: Path, words: tuple[object, ...], saying: tuple[str, ...]):
    refused(*words, saying=saying)


@pytest.mark.parametrize(
    ("array", "saying"),
    [
        (np.zeros(70), ("holds float64", "[tokens]")),
        (np.zeros((1, 1, 1, 70), int), ("shape (1, 1, 1, 70)", "[batches, batch, length]")),
        (np.zeros((4, 1), int), ("rows of 1 tokens", "at least 2")),
        (np.full(70, 128), ("token id 128 at position 0", "vocabulary of 128", MODEL)),
        (np.full((2, 3), -1), ("token id -1 at position 0, 0", "vocabulary of 128")),
    ],
    ids=["floats", "axes", "rows of one", "beyond", "negative"],
)
def test_ids(here: Path, array: np.ndarray, saying: tuple[str, ...]):
    np.save("bad.npy", array)
    refused("--text", "bad.npy", saying=("bad.npy", *saying))


def test_rows_with_a_window(here: Path):
    np.save("rows.npy", np.zeros((3, 8), int))
    for words in (("--window", 4), ("--stride", 2)):
        refused("--text", "rows.npy", *words, saying=("rows of 8 tokens", "one axis"))


def test_a_tokenizer_that_does_not_fit_the_vocabulary(here: Path):
    tokenizer(MODEL, a=5, b=300, c=7)
    saying = ("t.txt", "token id 300", "vocabulary of 128", "another model than", MODEL)
    refused("--text", "t.txt", saying=saying)


def test_text_of_spaces(here: Path):
    tokenizer(MODEL)
    Path("t.txt").write_text("  \n ")
    refused("--text", "t.txt", saying=("t.txt", "is empty"))


# --- references


def test_a_reference_with_another_vocabulary(here: Path):
    exports.write_base(here / "other", "qwen2")
    refused(*IDS, "--reference", "other", saying=("of 128 tokens", "other one of 72"))


def test_a_reference_with_another_tokenizer(here: Path):
    exports.write_base(here / "other", "llama")
    tokenizer(MODEL, a=1, b=2, c=3)
    tokenizer("other", a=1, b=3, c=2)
    saying = ("other: its tokenizer", "120 tokens", "(120)", "same tokens", ".npy")
    refused("--text", "t.txt", "--reference", "other", saying=saying)
    tokenizer("other", a=1, b=2, c=3, d=9)  # another file, the same ids of this text
    ji.evaluate(MODEL, "other", "t.txt")
    Path("other", "tokenizer.json").unlink()
    ji.evaluate(MODEL, "other", "t.txt")


# --- checkpoints


def algorithm(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = "FP7"
    edit(folder, quantization_config=config["quantization_config"])
    described = json.loads((folder / "hf_quant_config.json").read_text())
    described["quantization"]["quant_algo"] = "FP7"
    (folder / "hf_quant_config.json").write_text(json.dumps(described))


def without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = exports.load_file(folder / WEIGHTS)
        save(folder, {key: value for key, value in tensors.items() if key != name})

    return damage


@pytest.mark.parametrize(
    ("damage", "saying"),
    [
        (algorithm, ("quantized", "FP7")),
        (without(f"{DOWN}.weight_scale"), ("quantized", DOWN)),
        (without(f"{DOWN}.input_scale"), ("quantized", f"{DOWN}.input_scale")),
    ],
    ids=["unknown algorithm", "missing scale", "missing input scale"],
)
def test_damaged_checkpoints(here: Path, damage: Callable[[Path], None], saying: tuple[str, ...]):
    ji.ptq(MODEL, "quantized", "int8", calib="ids.npy")
    damage(Path("quantized"))
    untouched(here, "eval", "quantized", *IDS, saying=saying)


def test_numbers_that_are_not_finite(here: Path):
    tensors = exports.load_file(Path(MODEL, WEIGHTS))
    spoilt = np.array(tensors["model.norm.weight"])
    spoilt[3] = np.nan
    save(Path(MODEL), tensors | {"model.norm.weight": spoilt})
    refused(*IDS, saying=(MODEL, "not finite", "3 of 3 windows", "--compute"))


def test_the_same_in_python(here: Path):
    with pytest.raises(InputError, match="no such file"):
        ji.evaluate(MODEL, text="none.npy")
    with pytest.raises(InputError, match="stride is 0"):
        ji.evaluate(MODEL, text="stream.npy", settings=ji.EvalSettings(stride=0))
