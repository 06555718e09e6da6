# SPDX-License-Identifier: Apache-2.0
"""Calibration texts and chats: what each source gives, and every way it is refused."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from calibration import IDS, load, refused, words
from hypothesis import given
from hypothesis import strategies as st

from jqx.errors import InputError


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


def test_messages_need_a_template(tmp_path: Path, model: Path):
    (tmp_path / "t.jsonl").write_text(CHAT)
    refused(tmp_path / "t.jsonl", model, "line 1", "need a chat template", "has none")
    (model / "tokenizer_config.json").write_text("{")
    refused(tmp_path / "t.jsonl", model, "tokenizer_config.json: is not JSON")


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
