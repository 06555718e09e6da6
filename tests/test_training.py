# SPDX-License-Identifier: Apache-2.0
"""The scripts that made the bundled model: text, tokenizer, bigram baseline, training that resumes,
export.
"""

import collections
import functools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from jqx_interop import load
from jqx_interop.families import spec_from_config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training import export, model, text, train  # noqa: E402
from training.bigram import DISCOUNT, bigram_loss  # noqa: E402

SMALL = model.CONFIG | {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "vocab_size": 300,
}
PASSAGE = (
    "The crank of engine {} turns as the pump of the river does, {} times in a minute of rain."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small TEXT: forty passages, thirty-three papers."""
    folder = tmp_path_factory.mktemp("text")
    passages = [PASSAGE.format(i, 7 * i) + " It is so." * 4 for i in range(48)]
    (folder / "wiki_train.txt").write_text("\n\n".join(passages[:40]) + "\n")
    (folder / "wiki_valid.txt").write_text("\n\n".join(passages[40:]) + "\n")
    papers = [
        "\n\n".join([f"Paper {i}", *(f"As BIBREF{j} shows, see FIGREF2. " * 9 for j in range(5))])
        for i in range(33)
    ]
    (folder / "papers.txt").write_text("\n\n\n".join(papers) + "\n")
    return folder


def test_whole_articles_and_papers_are_held_out(folder):
    corpus = text.read_corpus(folder)
    assert len(corpus.train_wiki) == 40
    assert [paper.split("\n")[0] for paper in corpus.valid_papers] == [
        "Paper 0",
        "Paper 16",
        "Paper 32",
    ]
    assert len(corpus.train_papers) == 30
    assert not {*corpus.train_papers} & {*corpus.valid_papers}
    epoch = list(corpus.train())
    assert len(epoch) == 2 * 40 + 30


@pytest.mark.parametrize(
    ("marked", "clean"),
    [
        ("as shown by BIBREF12 , BIBREF3 and others", "as shown by and others"),
        ("it works (BIBREF1)  well", "it works well"),
        ("FIGREF3 plots INLINEFORM0", "1 plots x"),
    ],
)
def test_markers_are_removed(marked, clean):
    assert text.clean(marked) == clean


def test_the_tokenizer_takes_any_text(folder):
    tokenizer = text.train_tokenizer(text.read_corpus(folder).train(), 300)
    strange = "Žluťoučký 馬 🐎\n\ttabs\x00"
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange
    ids = text.encode(tokenizer, ["one", "two"])
    assert list(ids).count(tokenizer.token_to_id(text.END)) == 2
    assert ids[-1] == tokenizer.token_to_id(text.END)


def slow_bigram(train_ids, valid_ids, vocabulary):
    """Interpolated Kneser-Ney from its definition."""
    pairs = collections.Counter(zip(train_ids[:-1], train_ids[1:], strict=True))
    continuation = np.array([sum(1 for p in pairs if p[1] == b) + 1 for b in range(vocabulary)])
    lower = continuation / continuation.sum()
    total = 0.0
    for a, b in zip(valid_ids[:-1], valid_ids[1:], strict=True):
        n = sum(count for pair, count in pairs.items() if pair[0] == a)
        kinds = sum(1 for pair in pairs if pair[0] == a)
        p = lower[b]
        if n:
            p = max(pairs[a, b] - DISCOUNT, 0) / n + DISCOUNT * kinds / n * lower[b]
        total -= math.log(p)
    return total / (len(valid_ids) - 1)


def test_the_bigram_baseline_follows_its_definition():
    rng = np.random.default_rng(1)
    ids, valid = rng.zipf(1.5, 400) % 13, rng.zipf(1.5, 60) % 17  # some are never seen
    got = bigram_loss(ids.astype(np.int32), valid.astype(np.int32), 17)
    assert got == pytest.approx(slow_bigram([*ids], [*valid], 17), rel=1e-9)


def test_bigram_probabilities_sum_to_one():
    ids = np.random.default_rng(2).integers(0, 9, 300).astype(np.int32)
    for a in (0, 8, 9):  # 9 is never seen
        p = [math.exp(-bigram_loss(ids, np.array([a, b], np.int32), 10)) for b in range(10)]
        assert sum(p) == pytest.approx(1)


def test_the_learning_rate_rises_stays_and_falls():
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies integers with floats
        rate = train.schedule(0.5, 1000)
    assert [float(rate(i)) for i in (0, 100, 200, 699)] == [0.0, 0.25, 0.5, 0.5]
    assert float(rate(850)) == pytest.approx(0.25)
    assert float(rate(1000)) == 0


def test_rows_predict_every_token_once():
    rows = train.windows(np.arange(101), 20)
    assert rows.shape == (5, 21)
    np.testing.assert_array_equal(rows[:, 1:].reshape(-1), np.arange(1, 101))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run of three tiny steps that was interrupted after two."""
    run, straight = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("straight")
    # optax multiplies integers with floats
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(train, "EVERY", 1)
        patch.setattr(train, "EARLY", 2)
        patch.setattr(train, "CONFIG", SMALL)
        patch.setattr(train, "SPEC", spec_from_config(SMALL))
        patch.setattr(train, "LENGTH", 32)
        patch.setattr(train, "mean_loss", lambda *_: 0.0)
        train.train(folder, straight, 3, 2, 1e-2)
        save, saved = train.save, []

        def interrupted(path, data):
            save(path, data)
            saved.append(path)
            if len(saved) == 3:  # two states and the early parameters
                raise KeyboardInterrupt

        patch.setattr(train, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(folder, run, 3, 2, 1e-2)
        train.train(folder, run, 3, 2, 1e-2)
    assert (run / "state").read_bytes() == (straight / "state").read_bytes()
    return run


def test_an_interrupted_run_ends_like_a_straight_one(run):
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    state = serialization.msgpack_restore((run / "state").read_bytes())
    assert int(state["step"]) == 3


def test_export_writes_a_checkpoint_with_its_card(folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "mean_loss", lambda *_: 1.5)
    monkeypatch.setattr(export, "CONFIG", SMALL)
    monkeypatch.setattr(export, "SPEC", spec_from_config(SMALL))
    figures = export.export(folder, run, tmp_path / "model")
    assert figures["steps"] == 3
    assert figures["wiki"] == math.exp(1.5)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| {figures['wiki_bigram']:.1f} |" in card
    assert "{" not in card
    loaded = load(tmp_path / "model")
    last = serialization.msgpack_restore((run / "state").read_bytes())["params"]
    early = serialization.msgpack_restore((run / "early").read_bytes())
    names = ("model", "layers", "0", "mlp", "up_proj", "weight")
    last, early, got = (
        functools.reduce(lambda t, n: t[n], names, t) for t in (last, early, loaded.params)
    )
    assert np.any(last != early)
    blend = jnp.asarray(0.7 * last + 0.3 * early, jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(blend, np.float32), 0.01)
