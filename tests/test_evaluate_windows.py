# SPDX-License-Identifier: Apache-2.0
"""Windows over a stream of tokens, and the text they are cut from."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jqx.errors import InputError
from jqx_interop.data.documents import Document
from jqx_interop.data.tokens import stream
from jqx_interop.evaluation import EvalSettings
from jqx_interop.evaluation.text import read_tokens, windows_of
from jqx_interop.evaluation.windows import Windows, slide

cuts = st.integers(2, 40).flatmap(
    lambda window: st.tuples(
        st.just(window), st.integers(1, window), st.integers(window, window + 150)
    )
)


def guide(length: int, window: int, stride: int) -> list[tuple[int, int, range]]:
    """Begin, end and scored positions of every window, as Hugging Face's guide loops over them."""
    found, before = [], 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        targets = range(max(before, begin + 1), end)  # the labels are shifted: the first has none
        found.append((begin, end, targets))
        before = end
        if end == length:
            break
    return found


def places(windows: Windows) -> list[tuple[int, int, range]]:
    """The same of windows over the ids 0, 1, 2...; an id is its place."""
    return [
        (int(row[0]), int(row[-1]) + 1, range(int(row[first]), int(row[-1]) + 1))
        for row, first in zip(windows.ids, windows.first, strict=True)
    ]


@given(cuts)
def test_windows_are_those_of_the_guide_but_for_the_last(cut: tuple[int, int, int]):
    window, stride, length = cut
    found = places(slide(np.arange(length, dtype=np.int32), window, stride))
    expected = guide(length, window, stride)
    assert found[:-1] == expected[:-1]
    begin, end, targets = found[-1]
    assert (begin, end) == (length - window, length)
    # more context than there, and a token more where the guide has nothing before it
    assert set(expected[-1][2]) <= set(targets)


@given(cuts)
def test_every_token_is_scored_once_with_context(cut: tuple[int, int, int]):
    window, stride, length = cut
    windows = slide(np.arange(length, dtype=np.int32), window, stride)
    found = places(windows)
    scored = [place for _, _, targets in found for place in targets]
    assert len(scored) == len(set(scored)) == windows.tokens
    missing = set(range(length)) - set(scored)
    assert missing == {0} if stride < window else missing <= {i * stride for i in range(length)}
    for i, (begin, end, targets) in enumerate(found):
        assert end - begin == window
        assert targets[0] - begin >= (max(window - stride, 1) if i else 1)


def test_strides_and_lengths_that_do_not_fit():
    ids = np.zeros(9, np.int32)
    assert len(slide(ids, 9, 9).ids) == 1
    with pytest.raises(InputError, match="a stride of 5 .* windows of 4; give a stride of 4"):
        slide(ids, 4, 5)
    with pytest.raises(InputError, match="9 tokens .* window of 10; .*--window 9"):
        slide(ids, 10, 5)


# --- the stream

WORDS = {word: i for i, word in enumerate(["<s>", "</s>", "?", "\n\n", *"abcdefgh"])}


def letters() -> tokenizers.Tokenizer:
    """A tokenizer of letters and empty lines that puts <s> before a text and </s> after it."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(  # pyright: ignore
        tokenizers.Regex(r"\n\n|[a-z]"), "removed", invert=True
    )
    made.post_processor = tokenizers.processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return made


def spelled(ids: np.ndarray) -> str:
    return "".join(list(WORDS)[i] for i in ids)


@pytest.mark.parametrize(
    ("documents", "between", "size", "text"),
    [
        ([Document("a b"), Document("c")], "", None, "<s>abc"),
        ([Document("a b"), Document("c")], "\n\n", None, "<s>ab\n\nc"),
        ([Document(" "), Document("a"), Document("\n"), Document("b")], "\n\n", None, "<s>a\n\nb"),
        ([Document("a", special=False), Document("b", special=False)], "\n\n", None, "ab"),
        ([Document("a b"), Document("c d")], "", 4, "<s>abc"),
        ([Document(" ")], "", None, ""),
        ([], "", 3, ""),
    ],
)
def test_documents_are_one_stream(documents, between: str, size: int | None, text: str):
    assert spelled(stream(documents, letters(), between, size)) == text


def test_no_special_tokens_without_a_template():
    plain = letters()
    plain.post_processor = tokenizers.processors.ByteLevel()  # pyright: ignore
    assert spelled(stream([Document("a b")], plain, "")) == "ab"


def test_a_stream_is_read_no_further_than_needed():
    def documents():
        yield Document("a b c")
        raise AssertionError("read too far")

    assert spelled(stream(documents(), letters(), "", 4)) == "<s>abc"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    letters().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_texts_become_streams(folder: Path):
    (folder / "t.txt").write_text("a b\n\nc d e")
    rows = [{"text": "a b"}, {"text": "c d e"}]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("t.txt", "t.jsonl"):
        found = read_tokens(EvalSettings(text=folder / name), folder, 12)
        assert spelled(found.ids) == "<s>ab\n\ncde"
        assert (found.ids.dtype, found.cut) == (np.int32, False)
        for most, cut in ((4, True), (6, True), (7, False), (8, False)):
            part = read_tokens(EvalSettings(text=folder / name, max_tokens=most), folder, 12)
            assert part.ids.tolist() == found.ids[:most].tolist()
            assert part.cut == cut


def test_the_bundled_text(folder: Path):
    found = read_tokens(EvalSettings(max_tokens=50), folder, 12)
    assert (found.source, len(found.ids), found.cut) == ("bundled text", 50, True)
    assert len(read_tokens(EvalSettings(), folder, 12).ids) > 50_000


def test_token_ids_are_taken_as_they_are(folder: Path):
    ids = np.arange(24)
    for shape in ((24,), (4, 6), (2, 2, 6)):
        np.save(folder / "ids.npy", ids.reshape(shape))
        settings = EvalSettings(text=folder / "ids.npy", max_tokens=13)
        found = read_tokens(settings, folder, 24)
        windows, window, stride = windows_of(found, settings, 4)
        assert found.cut
        if len(shape) == 1:
            assert found.ids.tolist() == list(range(13))
            assert (windows.tokens, window, stride) == (12, 4, 2)
        else:
            assert windows.ids.tolist() == ids[:12].reshape(2, 6).tolist()
            assert (windows.first.tolist(), window, stride) == ([1, 1], 6, 6)
