# SPDX-License-Identifier: Apache-2.0
"""The text the bundled model is trained and judged on, and its tokenizer.

TEXT is a directory with `wiki_train.txt`, `wiki_valid.txt` (passages separated by a blank line) and
`papers.txt` (papers separated by two).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
HELD_OUT = 16  # every so manieth paper is for validation
WIKI_REPEATS = 2  # a training epoch reads every passage so many times and every paper once

MARKERS = (
    (re.compile(r"\s*\(?\b(?:BIBREF|UNKREF)\d+\)?(?:\s*[,;]\s*(?:BIBREF|UNKREF)\d+)*"), ""),
    (re.compile(r"\bFIGREF\d+"), "1"),
    (re.compile(r"\bTABREF\d+"), "2"),
    (re.compile(r"\bSECREF\d+"), "3"),
    (re.compile(r"\b(?:INLINEFORM|DISPLAYFORM)\d+"), "x"),
    (re.compile(r"[ \t]+"), " "),
)
"""What stands in the papers where a reference or a formula was, and what is read instead."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents to learn from, and held-out ones: whole articles and whole papers."""

    train_wiki: list[str]
    train_papers: list[str]
    valid_wiki: list[str]
    valid_papers: list[str]

    def train(self) -> Iterator[str]:
        """The documents of one epoch."""
        for _ in range(WIKI_REPEATS):
            yield from self.train_wiki
        yield from self.train_papers


def read_corpus(directory: Path) -> Corpus:
    """The documents under `directory`."""

    def wiki(name: str) -> list[str]:
        return _documents((directory / name).read_text("utf-8"), "\n\n", least=100)

    papers = _documents((directory / "papers.txt").read_text("utf-8"), "\n\n\n", least=1000)
    papers = [clean(paper) for paper in papers]
    return Corpus(
        train_wiki=wiki("wiki_train.txt"),
        train_papers=[paper for i, paper in enumerate(papers) if i % HELD_OUT],
        valid_wiki=wiki("wiki_valid.txt"),
        valid_papers=papers[::HELD_OUT],
    )


def _documents(text: str, separator: str, least: int) -> list[str]:
    parts = (part.strip() for part in text.split(separator))
    return [part for part in parts if len(part) >= least]


def clean(paper: str) -> str:
    """`paper` without the markers of references and formulas."""
    for pattern, instead in MARKERS:
        paper = pattern.sub(instead, paper)
    return paper


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer: any text is a sequence of its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Iterable[str]) -> np.ndarray:
    """The ids of all documents, the end token after each."""
    end = tokenizer.token_to_id(END)
    parts = tokenizer.encode_batch(list(documents))
    return np.array([i for part in parts for i in (*part.ids, end)], np.int32)


def evaluation_text(corpus: Corpus, characters: int = 104_000) -> str:
    """About so many characters: some held-out passages, the beginning of a held-out paper, and so
    on, half of either.
    """
    papers = corpus.valid_papers
    share = characters // len(papers) // 2
    passages, parts = iter(corpus.valid_wiki), []
    for paper in papers:
        parts += [*_enough(passages, share), *_enough(iter(paper.split("\n\n")), share)]
    return "\n\n".join(parts) + "\n"


def _enough(parts: Iterator[str], characters: int) -> Iterator[str]:
    """Whole parts until there are so many characters."""
    taken = 0
    while taken < characters and (part := next(parts, None)) is not None:
        yield part
        taken += len(part)
