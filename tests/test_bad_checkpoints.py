# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are refused: in one line, whatever is broken, and pickles are never opened."""

import json
import os
import pickle
from pathlib import Path

import pytest
from checkpoints import INDEX, SINGLE, arrays, entry, raw_file, refused, two_shards, write
from hypothesis import given
from hypothesis import strategies as st

from jqx.errors import InputError
from jqx_interop.checkpoints import open_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return two_shards(tmp_path / "model")


# --- directories, configurations and indices


def test_a_directory_that_is_not_there():
    refused("/no/such/place", "no such directory", "not a Hub id")


def test_a_file_instead_of_a_directory(model: Path):
    refused(model / "config.json", "is a file")


def test_no_configuration(model: Path):
    (model / "config.json").unlink()
    refused(model, "no config.json")


def test_a_broken_configuration_names_line_and_column(model: Path):
    (model / "config.json").write_text('{\n "a": 1,\n "b" 2}')
    refused(model, "config.json is not JSON", "line 3 column 6")
    (model / "config.json").write_text("[1]")
    refused(model, "config.json holds a list")
    (model / "config.json").write_bytes(b'{"a": "\xff"}')
    refused(model, "config.json is not JSON")


def test_pickles_are_never_opened(model: Path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(model / "boom"),)

    for file in model.glob("model*"):
        file.unlink()
    refused(model, "no safetensors file")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(model, "pytorch_model.bin", "convert to safetensors")
    assert not (model / "boom").exists()


def test_a_pointer_of_git_lfs(model: Path):
    (model / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(model, SINGLE, "git lfs pull")


def test_every_problem_is_in_the_one_line(model: Path):
    (model / "config.json").write_text("{")
    (model / "model-00001-of-00002.safetensors").unlink()
    (model / "model-00002-of-00002.safetensors").write_bytes(b"short")
    refused(model, "config.json is not JSON", "00001-of-00002.safetensors is missing", "truncated")


def test_many_problems_are_counted(model: Path):
    index = json.loads((model / INDEX).read_text())
    shard = index["weight_map"]["w0"]
    index["weight_map"] |= {f"ghost{i}": shard for i in range(20)}
    (model / INDEX).write_text(json.dumps(index))
    refused(model, f"{INDEX} says {shard} holds 'ghost0', which it does not", "... and 16 more")


def test_an_index_that_does_not_fit(model: Path):
    index = json.loads((model / INDEX).read_text())
    del index["weight_map"]["w1"]
    (model / INDEX).write_text(json.dumps(index))
    refused(model, "model-00001-of-00002.safetensors holds 'w1', not in " + INDEX)
    (model / INDEX).write_text(
        '{"weight_map": {"w0": "../model.safetensors", "w1": "/etc/passwd"}}'
    )
    refused(model, "names '../model.safetensors'", "names '/etc/passwd'")
    (model / INDEX).write_text('{"metadata": {}}')
    refused(model, "has no weight_map")
    (model / INDEX).write_text("nothing")
    refused(model, f"{INDEX} is not JSON")


def test_shards_without_an_index(model: Path):
    (model / INDEX).unlink()
    assert len(open_checkpoint(model).tensors) == 4
    (model / "model-00001-of-00002.safetensors").rename(model / "model-00003-of-00003.safetensors")
    refused(model, "model-00001-of-00002.safetensors is missing", "model-00001-of-00003")


def test_a_tensor_in_two_shards(model: Path):
    (model / INDEX).unlink()
    first = model / "model-00001-of-00002.safetensors"
    (model / "model-00002-of-00002.safetensors").write_bytes(first.read_bytes())
    refused(model, "tensor 'w0' is in model-00001-of-00002.safetensors and in model-00002")


# --- headers

CORRUPT = {
    "unknown dtype": ({"w": entry(dtype="F4")}, "unknown dtype 'F4'"),
    "dtype no string": ({"w": entry(dtype=7)}, "unknown dtype 7"),
    "negative shape": ({"w": entry(shape=(-2,))}, "has the shape [-2]"),
    "fractional shape": ({"w": entry(shape=(2.0,))}, "has the shape [2.0]"),
    "truth in shape": ({"w": entry(shape=(True, 2))}, "has the shape [True, 2]"),
    "huge shape": ({"w": entry(shape=(10**30,))}, "has the shape"),
    "overflowing shape": ({"w": entry(shape=[2**62] * 400)}, "needs far too many bytes"),
    "wrong byte count": ({"w": entry(shape=(3,))}, "needs 12 bytes for F32 [3]"),
    "one offset": ({"w": entry(offsets=(0,))}, "has the offsets [0]"),
    "backward offsets": ({"w": entry(offsets=(8, 0))}, "has the offsets [8, 0]"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [2]}}, "has the offsets None"),
    "no entry": ({"w": 1}, "has no description"),
    "hole": ({"w": entry(offsets=(8, 16))}, "8 bytes before 'w' are a hole"),
    "overlap": ({"v": entry(), "w": entry()}, "'w' overlaps 'v'"),
    "out of range": (
        {"w": entry(), "v": entry(offsets=(8, 16))},
        "is truncated: its header promises",
    ),
    "bytes left over": ({"w": entry(shape=(1,), offsets=(0, 4))}, "4 bytes after the last"),
    "no object": ([], "header is not a JSON object"),
    "a line break": ({"a\nb": 1}, r"tensor 'a\nb'"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_header(model: Path, case: str):
    header, phrase = CORRUPT[case]
    (model / SINGLE).write_bytes(raw_file(json.dumps(header).encode()))
    refused(model, SINGLE, phrase)


@pytest.mark.parametrize(
    ("raw", "phrase"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\x10\0\0\0\0\0\0", "truncated: 7 bytes"),
        (raw_file(b"{}", b"")[:9], "truncated: a header of 2 bytes, a file of 9"),
        (b"\xff" * 20, "header would have 18446744073709551615 bytes"),
        (raw_file(b"\xff\xfe"), "header is not usable JSON"),
        (raw_file(b'{"w": '), "header is not usable JSON"),
        (raw_file(b"[" * 200_000), "nested without end"),
        (raw_file(b'{"w": 1, "w": 2}'), "names 'w' twice"),
        (raw_file(b'{"w": 1' + b"0" * 5000 + b"}"), "is corrupt: its header is not usable JSON"),
        (raw_file(b"{}", b""), "hold no tensors"),
        (raw_file(b"{}"), "8 bytes after the last tensor"),
    ],
)
def test_a_header_that_is_none(model: Path, raw: bytes, phrase: str):
    (model / SINGLE).write_bytes(raw)
    refused(model, phrase)


def test_a_file_cut_anywhere_is_refused(model: Path):
    path = model / "model-00001-of-00002.safetensors"
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for cut in [*range(0, end + 1, 3), end, end + 1, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        refused(model, "model-00001-of-00002.safetensors is truncated")
    path.write_bytes(whole + b"x")
    refused(model, "1 bytes after the last tensor")


@given(position=st.integers(0, 200), value=st.integers(0, 255), seed=st.integers(0, 3))
def test_a_changed_byte_in_a_header_never_gets_past_as_a_crash(
    tmp_path_factory, position: int, value: int, seed: int
):
    path = tmp_path_factory.mktemp("changed")
    write(path, arrays(seed))
    (path / "config.json").write_text("{}")
    raw = bytearray((path / SINGLE).read_bytes())
    raw[position] = value
    (path / SINGLE).write_bytes(raw)
    try:
        found = open_checkpoint(path)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        for name in found.tensors:
            found.read(name)
