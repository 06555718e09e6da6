# SPDX-License-Identifier: Apache-2.0
"""Calibration data: what each source gives, and every way it is refused."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jqx.errors import InputError
from jqx_interop.data import Activations, CalibrationSet, load_calibration

WORDS = ["<s>", "?", *"abcdefghij"]
IDS = {word: i for i, word in enumerate(WORDS)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a tokenizer of letters that puts <s> before a text."""
    path = tmp_path / "model"
    path.mkdir()
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(IDS, unk_token="?"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # pyright: ignore
    letters.post_processor = tokenizers.processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    letters.enable_truncation(3)
    letters.enable_padding(length=3, pad_id=1, pad_token="?")
    letters.save(str(path / "tokenizer.json"))
    return path


def load(
    source: object, model: Path | None = None, *, size=4, length=3, vocab=12
) -> CalibrationSet:
    return load_calibration(source, tokenizer_dir=model, vocab_size=vocab, size=size, length=length)


def words(found: CalibrationSet) -> list[str]:
    return ["".join(WORDS[i] for i in row) for batch in found for row in batch]


def refused(source: object, model: Path | None, *phrases: str, vocab: int = 12) -> None:
    with pytest.raises(InputError) as caught:
        load(source, model, vocab=vocab)
    assert "\n" not in str(caught.value)
    for phrase in phrases:
        assert phrase in str(caught.value)


# --- token ids


def test_an_array_of_batches_is_taken_as_given(tmp_path: Path):
    ids = np.arange(24).reshape(2, 3, 4)
    np.save(tmp_path / "ids.npy", ids)
    found = load(tmp_path / "ids.npy", vocab=24)
    assert len(found) == 2
    assert found.tokens == 24
    for batch, expected in zip(found, ids, strict=True):
        assert batch.dtype == np.int32
        np.testing.assert_array_equal(batch, expected)


def test_an_array_of_sequences_is_one_sequence_a_batch(tmp_path: Path):
    np.save(tmp_path / "ids.npy", np.arange(8, dtype=">u2").reshape(2, 4))
    found = load(tmp_path / "ids.npy")
    assert [batch.tolist() for batch in found] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_the_digest_is_that_of_the_ids_and_their_batches(tmp_path: Path):
    ids = np.arange(8).reshape(2, 1, 4)
    np.save(tmp_path / "a.npy", ids)
    np.save(tmp_path / "b.npy", ids[:, 0].astype(np.uint8))
    np.save(tmp_path / "c.npy", ids.reshape(1, 2, 4))
    np.save(tmp_path / "d.npy", ids[::-1])
    digests = [load(tmp_path / f"{name}.npy").digest for name in "abcd"]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("value", "phrases"),
    [
        (12, ["token id 12 at position 3 of sequence 1 in batch 2", "the vocabulary of 12"]),
        (-1, ["token id -1 at position 3 of sequence 1 in batch 2", "the vocabulary of 12"]),
    ],
)
def test_ids_outside_the_vocabulary(tmp_path: Path, value: int, phrases: list[str]):
    ids = np.zeros((3, 2, 4), np.int64)
    ids[2, 1, 3] = value
    np.save(tmp_path / "ids.npy", ids)
    refused(tmp_path / "ids.npy", None, "ids.npy", *phrases)


@pytest.mark.parametrize(
    ("array", "phrase"),
    [
        (np.zeros((2, 3)), "holds float64, not integers"),
        (np.zeros((2, 3), bool), "holds bool, not integers"),
        (np.zeros(3, int), "has the shape (3,)"),
        (np.zeros((1, 1, 1, 3), int), "has the shape (1, 1, 1, 3)"),
    ],
)
def test_arrays_that_are_no_token_ids(tmp_path: Path, array: np.ndarray, phrase: str):
    np.save(tmp_path / "ids.npy", array)
    refused(tmp_path / "ids.npy", None, phrase, "[batches, batch, length]")


def test_objects_are_never_unpickled(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    np.save(tmp_path / "ids.npy", np.array([[Bomb()]], object), allow_pickle=True)
    refused(tmp_path / "ids.npy", None, "is not a usable .npy file")
    assert not (tmp_path / "boom").exists()


def test_files_that_only_say_npy(tmp_path: Path):
    file = tmp_path / "ids.npy"
    for raw in (b"no array", b"\x93NUMPY\x01\x00\x04\x00{{{{", b"\x80\x04K\x01."):
        file.write_bytes(raw)
        refused(file, None, "is not a usable .npy file")
    np.save(file, np.zeros((4, 4), int))
    file.write_bytes(file.read_bytes()[:-1])
    refused(file, None, "is not a usable .npy file")
    with open(file, "wb") as archive:
        np.savez(archive, ids=np.zeros((2, 2), int))
    refused(file, None, "is not a usable .npy file")


# --- text


def test_text_is_cut_into_sequences(tmp_path: Path, model: Path):
    (tmp_path / "t.txt").write_text("a b c d\ne f g h i j", encoding="utf-8-sig")
    found = load(tmp_path / "t.txt", model)
    assert words(found) == ["<s>ab", "cde", "fgh"]  # the rest, i j, is dropped
    assert all(batch.shape == (1, 3) for batch in found)
    assert words(load(tmp_path / "t.txt", model, size=2)) == ["<s>ab", "cde"]
    assert words(load(tmp_path / "t.txt", model, length=50)) == ["<s>abcdefghij"]
    assert words(load(tmp_path / "t.txt", model, length=11)) == ["<s>abcdefghij"]


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    size=st.integers(1, 5),
    length=st.integers(1, 7),
)
def test_the_cut_is_that_of_the_joined_stream(tmp_path_factory, lengths, size, length):
    path = tmp_path_factory.mktemp("cut")
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(IDS, unk_token="?"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # pyright: ignore
    letters.save(str(path / "tokenizer.json"))
    texts = [" ".join("abcdefghij"[:n]) for n in lengths]
    (path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    stream = "".join(texts).replace(" ", "")
    if not stream:
        return
    whole = [stream[i : i + length] for i in range(0, len(stream), length)]
    expected = [piece for piece in whole if len(piece) == length][:size] or [stream]
    assert words(load(path / "t.jsonl", path, size=size, length=length)) == expected


def test_a_long_text_is_read_in_pieces_and_no_further(tmp_path: Path, model: Path):
    file = tmp_path / "t.md"
    file.write_bytes(b"a b c d\n" * 70_000 + b"\xff")
    found = load(file, model, size=2)
    assert words(found) == ["<s>ab", "cda"]
    with pytest.raises(InputError, match="line 70001 is not UTF-8 text"):
        load(file, model, size=10**6)


def test_lines_of_json_are_documents(tmp_path: Path, model: Path):
    rows = [{"text": "a b c"}, {"text": "d", "id": 7}, {"text": " "}]
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "t.jsonl").write_text(text + "\n\n")
    assert words(load(tmp_path / "t.jsonl", model)) == ["<s>ab", "c<s>d"]


@pytest.mark.parametrize(
    ("line", "phrases"),
    [
        ('{"text": ', ["line 3 is not JSON"]),
        ("[1]", ["line 3 is not a JSON object"]),
        ('{"content": "a", "id": 1}', ['neither a "text" string', "it has: content, id"]),
        ('{"text": 5}', ['line 3 has neither a "text" string']),
        ('{"messages": []}', ['line 3 has neither a "text" string']),
        ("[" * 100_000, ["line 3 is not JSON"]),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, model: Path, line: str, phrases: list[str]):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n\n' + line + "\n")
    refused(tmp_path / "t.jsonl", model, "t.jsonl", *phrases)


def test_a_table_gives_its_text(tmp_path: Path, model: Path):
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["a b", None, "c"], "other": ["x", "y", "z"]}), file)
    assert words(load(file, model)) == ["<s>ab"]
    pq.write_table(pa.table({"content": ["d e"], "id": [1]}), file)
    assert words(load(file, model)) == ["<s>de"]
    pq.write_table(pa.table({"a": ["d e"], "b": ["f"]}), file)
    refused(file, model, 'no "text" column', "a (string), b (string)")
    pq.write_table(pa.table({"text": [1, 2]}), file)
    refused(file, model, 'no "text" column', "text (int64)")
    file.write_bytes(b"PAR1 but no more")
    refused(file, model, "is not a readable .parquet file")


def test_a_table_without_its_reader(tmp_path: Path, model: Path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(tmp_path / "t.parquet", model, 'pip install "jqx[data]"')


def test_without_a_source_there_is_a_bundled_text(model: Path):
    found = load(None, model, size=5, length=64)
    assert [batch.shape for batch in found] == [(1, 64)] * 5
    assert found.source == "bundled text"
    refused(None, model.parent, "no tokenizer.json", ".npy")
    refused(None, None, "no tokenizer.json", ".npy")


def test_text_that_is_none(tmp_path: Path, model: Path):
    file = tmp_path / "t.txt"
    file.write_text("")
    refused(file, model, "t.txt: is empty")
    file.write_text(" \n\n")
    refused(file, model, "t.txt: is empty")
    file.write_bytes(b"a\nb\0c")
    refused(file, model, "line 2 has NUL bytes")
    file.write_bytes(b"a\nb \xff c")
    refused(file, model, "line 2 is not UTF-8 text", "byte 2")


def test_sources_that_are_no_files(tmp_path: Path, model: Path):
    refused(tmp_path / "none.txt", model, "none.txt: no such file")
    refused("cnn_dailymail:train", model, "A Hub dataset", "the extra 'data'", ".jsonl")
    refused(tmp_path, model, "is not a file")
    (tmp_path / "t.csv").write_text("a")
    refused(tmp_path / "t.csv", model, "unknown kind of file", ".txt, .md, .jsonl, .parquet, .npy")


def test_a_tokenizer_that_does_not_fit(tmp_path: Path, model: Path):
    (tmp_path / "t.txt").write_text("a b c j")
    refused(tmp_path / "t.txt", model, "token id 2", "the vocabulary of 2", vocab=2)
    (model / "tokenizer.json").write_text('{"version": 1')
    refused(tmp_path / "t.txt", model, "tokenizer.json: is not a tokenizer")
    (model / "tokenizer.json").unlink()
    refused(tmp_path / "t.txt", model, "no tokenizer.json", ".npy")


@pytest.mark.parametrize(("size", "length"), [(0, 3), (2, 0), (-1, 3)])
def test_no_sequences_are_asked_for(tmp_path: Path, model: Path, size: int, length: int):
    (tmp_path / "t.txt").write_text("a b c j")
    with pytest.raises(InputError, match="Give at least 1"):
        load(tmp_path / "t.txt", model, size=size, length=length)


# --- chats

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
CHAT = '{"messages": [{"role": "user", "content": "a b"}, {"role": "x", "content": "c"}]}\n'
needs_jinja = pytest.mark.skipif(not importlib.util.find_spec("jinja2"), reason="no jinja2")


def test_messages_need_a_template(tmp_path: Path, model: Path):
    (tmp_path / "t.jsonl").write_text(CHAT)
    refused(tmp_path / "t.jsonl", model, "line 1", "need a chat template", "has none")
    (model / "tokenizer_config.json").write_text("{")
    refused(tmp_path / "t.jsonl", model, "tokenizer_config.json: is not JSON")


def test_messages_need_jinja(tmp_path: Path, model: Path, monkeypatch):
    (tmp_path / "t.jsonl").write_text(CHAT)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    refused(tmp_path / "t.jsonl", model, "line 1", "pip install jinja2")


@needs_jinja
@pytest.mark.parametrize("place", ["file", "config", "named", "json"])
def test_messages_go_through_the_template(tmp_path: Path, model: Path, place: str):
    (tmp_path / "t.jsonl").write_text(CHAT)
    config: dict[str, object] = {"bos_token": {"content": "j "}}
    if place == "file":
        (model / "chat_template.jinja").write_text(TEMPLATE)
    elif place == "json":
        (model / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    elif place == "config":
        config["chat_template"] = TEMPLATE
    else:
        config["chat_template"] = [{"name": "default", "template": TEMPLATE}]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert words(load(tmp_path / "t.jsonl", model, length=4)) == ["jabc"]  # no second <s>


@needs_jinja
@pytest.mark.parametrize(
    ("template", "phrase"),
    [
        ("{% for %}", "does not parse"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "the chat template fails (SecurityError",
        ),
        ("{{ messages[0].content.nothing.more }}", "the chat template fails (UndefinedError"),
        ("{{ messages.append(1) }}", "the chat template fails (SecurityError"),
    ],
)
def test_a_template_that_fails_is_one_line(tmp_path: Path, model: Path, template, phrase):
    (tmp_path / "t.jsonl").write_text(CHAT)
    (model / "chat_template.jinja").write_text(template)
    refused(tmp_path / "t.jsonl", model, "line 1", phrase)


# --- recorded activations


def test_recorded_inputs_come_in_the_order_of_batches(tmp_path: Path):
    rng = np.random.default_rng(0)
    recorded = {
        f"layers.{layer}.mlp|{batch}": rng.random((2, 3, 8), np.float32).astype(ml_dtypes.bfloat16)
        for layer in (10, 9, 0)
        for batch in (10, 2, 0, 9, 1)
    }
    safetensors.numpy.save_file(recorded, tmp_path / "acts.safetensors")
    found = Activations(tmp_path / "acts.safetensors")
    assert found.modules() == ("layers.0.mlp", "layers.9.mlp", "layers.10.mlp")
    assert found.width("layers.9.mlp") == 8
    batches = list(found.batches("layers.9.mlp"))
    for array, number in zip(batches, (0, 1, 2, 9, 10), strict=True):
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, recorded[f"layers.9.mlp|{number}"])
    with pytest.raises(KeyError):
        next(found.batches("layers.1.mlp"))
    digest = found.digest
    assert digest == Activations(tmp_path / "acts.safetensors").digest
    os.utime(tmp_path / "acts.safetensors", ns=(0, 0))
    assert digest != found.digest


@pytest.mark.parametrize(
    ("keys", "phrases"),
    [
        ({"a": (2,)}, ["key 'a' is not <module>|<batch>"]),
        (
            {"|0": (2,), "a|x": (2,), "a|-1": (2,), "a|b|0": (2,), "a|": (2,)},
            ["'a|x' is not", "and 1 more"],
        ),
        ({"a|1": (2,), "a|01": (2,)}, ["'a|1' repeats batch 1 of 'a|01'"]),
        ({"a|0": (3, 2), "a|1": (3, 4)}, ["key 'a|1' has 4 channels, 'a|0' has 2"]),
        ({"a|0": ()}, ["key 'a|0' has the shape ()"]),
        ({"a|0": (0, 4)}, ["key 'a|0' has the shape (0, 4)"]),
        ({}, ["holds no tensors"]),
    ],
)
def test_keys_that_are_none(tmp_path: Path, keys: dict, phrases: list[str]):
    file = tmp_path / "acts.safetensors"
    safetensors.numpy.save_file({k: np.zeros(s, np.float16) for k, s in keys.items()}, file)
    with pytest.raises(InputError) as caught:
        Activations(file)
    for phrase in ("acts.safetensors", *phrases):
        assert phrase in str(caught.value)


def test_recorded_files_that_are_none(tmp_path: Path):
    file = tmp_path / "acts.safetensors"
    with pytest.raises(InputError, match="cannot be read: No such file"):
        Activations(file)
    safetensors.numpy.save_file({"a|0": np.zeros(4, np.int32)}, file)
    with pytest.raises(InputError, match="'a|0' holds I32, not floating-point inputs"):
        Activations(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="acts.safetensors is truncated"):
        Activations(file)


def test_the_shared_recordings_are_read(shared: Path):
    found = Activations(shared / "golden" / "acts.safetensors")
    assert len(found.modules()) == 14
    assert all(len(list(found.batches(module))) == 4 for module in found.modules())
    ids = load(shared / "golden" / "calib_ids.npy", vocab=512)
    assert [batch.shape for batch in ids] == [(4, 64)] * 4
