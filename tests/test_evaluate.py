# SPDX-License-Identifier: Apache-2.0
"""Evaluations from end to end: against the logits of whole models, and the command."""

import dataclasses
import json
import math
from functools import cache
from pathlib import Path

import exports
import jax
import numpy as np
import pytest
import tokenizers
from command import jqx

import jqx_interop as ji
from jqx.models import block
from jqx_interop.cli.eval import _plus_minus, complete_compute
from jqx_interop.evaluation import forecast, prepare
from jqx_interop.evaluation.result import bits_per_weight
from jqx_interop.hidden import HiddenStates
from jqx_interop.stored import open_model

WINDOW, STRIDE = 24, 10
RECIPES = {"fp8": ("fp8", "fp8"), "nvfp4": ("nvfp4", "nvfp4_affine")}
"""Checkpoint -> recipe and KV cache."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A plain model, a tied one, and the first quantized several ways; a stream of ids."""
    folder = tmp_path_factory.mktemp("models")
    for model in ("llama", "qwen2"):
        exports.write_base(folder / model, model)
    calib = folder / "llama-ids.npy"
    for name, (recipe, kv) in RECIPES.items():
        ji.ptq(folder / "llama", folder / name, recipe, kv_cache=kv, calib=calib)
    ids = np.random.default_rng(0).integers(0, 72, 155).astype(np.int32)
    ids[1::2] = ids[:-1:2]  # something to predict
    np.save(folder / "ids.npy", ids)
    return folder


def settings(root: Path, **other) -> ji.EvalSettings:
    fields = {"text": root / "ids.npy", "window": WINDOW, "stride": STRIDE, "compute": "float32"}
    return ji.EvalSettings(**(fields | other))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(float)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@cache
def scored(model: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities [r, v] and targets [r] of every window, by the whole model at once."""
    ids = np.load(model.with_name("ids.npy"))
    loaded = ji.load(model)
    apply = jax.jit(lambda params, ids: loaded.apply({"params": params}, ids))
    found, done = [], 1
    for begin in [*range(0, len(ids) - WINDOW, STRIDE), len(ids) - WINDOW]:
        part = ids[begin : begin + WINDOW]
        log_p = log_softmax(np.asarray(apply(loaded.params, part[None])[0]))
        own = range(max(done - begin, 1), WINDOW)
        found.append((log_p[[i - 1 for i in own]], part[list(own)]))
        done = begin + WINDOW
    return found


def clustered(rows: list[np.ndarray]) -> tuple[float, float]:
    """The mean over all tokens, and its standard error, windows being independent."""
    total, count = sum(row.sum() for row in rows), sum(map(len, rows))
    squares = sum((row.sum() - total / count * len(row)) ** 2 for row in rows)
    return total / count, math.sqrt(len(rows) / (len(rows) - 1) * squares) / count


def picked(parts: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    return [-log_p[np.arange(len(t)), t] for log_p, t in parts]


@pytest.mark.parametrize("model", ["llama", "qwen2", *RECIPES])
def test_perplexity_is_that_of_the_whole_model(root: Path, model: str):
    nll = picked(scored(root / model))
    mean, error = clustered(nll)
    found = ji.evaluate(root / model, settings=settings(root))
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.nll == pytest.approx(mean, rel=1e-5)
    assert found.nll_se == pytest.approx(error, rel=1e-3)
    assert found.perplexity_se == pytest.approx(math.exp(mean) * error, rel=1e-3)
    assert (found.tokens, found.windows) == (154, len(nll))
    assert (found.window, found.stride, found.compute) == (WINDOW, STRIDE, "float32")
    assert found.kl is None
    assert (found.bits_per_weight is None) == (model not in RECIPES)


def test_agreement_is_that_of_whole_models(root: Path):
    ours, theirs = scored(root / "nvfp4"), scored(root / "llama")
    pairs = [(p, r) for (p, _), (r, _) in zip(ours, theirs, strict=True)]
    best = [(-p).argsort(-1) for p, _ in pairs]
    favourite = [r.argmax(-1)[:, None] for _, r in pairs]
    expected = {
        "kl": clustered([(np.exp(r) * (r - p)).sum(-1) for p, r in pairs]),
        "top1": clustered([b[:, 0] == f[:, 0] for b, f in zip(best, favourite, strict=True)]),
        "top5": clustered([(b[:, :5] == f).any(-1) for b, f in zip(best, favourite, strict=True)]),
    }
    found = ji.evaluate(root / "nvfp4", root / "llama", settings=settings(root))
    for name, (mean, error) in expected.items():
        assert getattr(found, name) == pytest.approx(mean, rel=1e-4)
        assert getattr(found, f"{name}_se") == pytest.approx(error, rel=1e-3)
    assert 0 < expected["top1"][0] < expected["top5"][0] <= 1
    paired = [a - b for a, b in zip(picked(ours), picked(theirs), strict=True)]
    mean, error = clustered(paired)
    assert found.perplexity_ratio == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.perplexity_ratio_se == pytest.approx(math.exp(mean) * error, rel=1e-3)
    alone = ji.evaluate(root / "llama", settings=settings(root))
    assert found.reference_perplexity == alone.perplexity
    assert found.reference_perplexity_se == alone.perplexity_se


def test_a_model_is_its_own_reference(root: Path):
    found = ji.evaluate(root / "fp8", root / "fp8", settings=settings(root))
    assert (found.kl, found.top1, found.top5, found.perplexity_ratio) == (0, 1, 1, 1)
    assert (found.kl_se, found.top1_se, found.perplexity_ratio_se) == (0, 0, 0)


@pytest.mark.parametrize(
    "other", [{"max_memory": 1}, {"batch_size": 4}, {"batch_size": 50}], ids=str
)
def test_how_it_runs_changes_nothing(root: Path, tmp_path: Path, monkeypatch, other: dict):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spilled = []

    def get(self: HiddenStates, i: int) -> jax.Array:
        spilled.extend(tmp_path.rglob("hidden-?.bin"))
        return original(self, i)

    original = HiddenStates.get
    monkeypatch.setattr(HiddenStates, "get", get)
    first = ji.evaluate(root / "fp8", root / "llama", settings=settings(root))
    assert not spilled
    found = ji.evaluate(root / "fp8", root / "llama", settings=settings(root, **other))
    assert bool(spilled) == ("max_memory" in other)
    assert not list(tmp_path.iterdir())
    for name, value in first.to_json().items():
        if name != "seconds":
            exact = not isinstance(value, float)
            assert getattr(found, name) == (value if exact else pytest.approx(value, rel=1e-5))


def test_what_is_computed_in_bfloat16_is_near(root: Path):
    exact, rough = (
        ji.evaluate(root / "fp8", settings=settings(root, compute=name))
        for name in ("float32", "bf16")
    )
    assert rough.compute == "bfloat16"
    assert rough.perplexity != exact.perplexity
    assert rough.perplexity == pytest.approx(exact.perplexity, rel=0.05)


def test_blocks_of_one_kind_share_one_program(root: Path):
    ji.evaluate(root / "fp8", settings=settings(root))
    before = block._cache_size()
    ji.evaluate(root / "fp8", settings=settings(root))
    assert block._cache_size() == before
    ji.evaluate(root / "fp8", settings=settings(root, window=12))  # another shape, two blocks
    assert block._cache_size() == before + 1


NUMBERS: dict[tuple, str] = {
    (20.3451, 0.8812): "20.35 ± 0.88",
    (0.0681234, 0.00171): "0.0681 ± 0.0017",
    (0.98765, 0.00123, "%"): "98.77 ± 0.12%",
    (1.0, 0.0, "%"): "100%",
    (20.3451, None): "20.3451",
    (math.inf, math.inf): "inf",
    (None, None): "none",
}


class Recorder:
    """A `Progress` that remembers."""

    def __init__(self) -> None:
        self.phases: list[list[float]] = []
        self.titles: list[str] = []
        self.notes: list[str] = []

    def phase(self, title: str, total: float | int) -> None:
        self.titles.append(title)
        self.phases.append([total, 0])

    def advance(self, amount: float | int) -> None:
        self.phases[-1][1] += amount

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_progress_is_told(root: Path):
    told = Recorder()
    long = settings(root, window=70, max_tokens=100, batch_size=1)
    ji.evaluate(root / "fp8", root / "llama", settings=long, progress=told)
    assert told.titles == ["model", "reference", "scoring"]
    assert told.phases == [[8, 8], [8, 8], [4, 4]]  # two blocks and four windows
    assert told.notes == [
        f"{root / 'ids.npy'}: no more than 100 tokens are read",
        "windows of 70 tokens, and the model knows 64 positions",
    ]


def test_rows_of_ids_are_windows(root: Path, tmp_path: Path):
    rows = np.random.default_rng(3).integers(0, 72, (5, 9))
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "one.npy", rows[0])
    plain = ji.EvalSettings(compute="float32")
    found = ji.evaluate(root / "llama", text=tmp_path / "rows.npy", settings=plain)
    assert (found.tokens, found.windows, found.window) == (40, 5, 9)
    one = ji.evaluate(
        root / "llama", text=tmp_path / "one.npy", settings=settings(root, window=9, stride=9)
    )
    assert one.nll_se is None
    assert one.to_json()["perplexity_se"] is None


def test_bits_count_codes_and_scales(root: Path):
    found = {name: bits_per_weight(open_model(root / name)) for name in ("llama", *RECIPES)}
    linears = 2 * (128 * 128 * 2 + 64 * 128 * 2 + 3 * 256 * 128)
    assert found["llama"] is None
    assert found["nvfp4"] == pytest.approx(4.5 + 14 * 32 / linears)  # one float32 a linear
    assert found["fp8"] == pytest.approx(8 + 14 * 32 / linears)


# --- the command


def test_the_command_prints_what_was_found(root: Path):
    words = ("eval", root / "nvfp4", "--text", root / "ids.npy", "--window", WINDOW)
    code, out, err = jqx(*words, "--stride", STRIDE, "--reference", root / "llama")
    assert (code, err) == (0, "")
    for phrase in ("perplexity", "±", "KL divergence", "top-1", "top-5", "154 tokens", "4.50"):
        assert phrase in out
    code, out, err = jqx(*words, "--stride", STRIDE, "--reference", root / "llama", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    expected = ji.evaluate(
        root / "nvfp4", root / "llama", settings=settings(root, compute="auto")
    ).to_json()
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert set(found) == {field.name for field in dataclasses.fields(ji.Evaluation)}


def test_the_command_reads_text(root: Path, tmp_path: Path):
    model = tmp_path / "model"
    exports.write_base(model, "llama")
    words = {chr(i): i for i in range(1, 127)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")  # pyright: ignore
    made.save(str(model / "tokenizer.json"))
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    code, out, err = jqx("eval", model, "--text", tmp_path / "t.txt", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["tokens"], found["window"], found["stride"]) == (179, 64, 32)  # its positions
    assert (found["text"], found["cut"]) == (str(tmp_path / "t.txt"), False)
    code, out, err = jqx("eval", model, "--max-tokens", 100, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) | {"seconds": 0} == json.loads(out) | {
        "seconds": 0,
        "text": "bundled text",
        "cut": True,
        "tokens": 99,
        "windows": 3,
        "reference": None,
        "kl": None,
    }


def test_help_says_what_is_measured():
    code, out, err = jqx("eval", "--help")
    assert (code, err) == (0, "")
    measures = ("perplexity:", "KL divergence:", "top-1:", "top-5:", "standard error")
    options = ("--reference", "--text", "--window", "--stride", "--max-tokens", "--batch-size")
    for phrase in (*measures, *options, "--max-memory", "--compute", "--json"):
        assert phrase in out
    assert complete_compute("f") == ["float32"]
    assert set(complete_compute("")) == {"auto", "float32", "bf16"}


def test_means_for_people():
    assert [_plus_minus(*each) for each in NUMBERS] == list(NUMBERS.values())


def test_more_work_is_forecast_to_take_more(root: Path, monkeypatch):
    monkeypatch.setattr("jqx_interop.evaluation.cost.product_rate", lambda: 1e9)
    small, more, spilled, two = (
        forecast(prepare(root / "fp8", reference, settings(root, **other)))
        for reference, other in (
            (None, {"max_tokens": 30}),
            (None, {}),
            (None, {"max_memory": 1}),
            (root / "llama", {}),
        )
    )
    assert small.seconds <= more.seconds <= two.seconds
    assert small.peak_memory_bytes < more.peak_memory_bytes < two.peak_memory_bytes
    states = more.peak_memory_bytes - spilled.peak_memory_bytes
    assert spilled.spilled_bytes == 2 * states == 2 * 15 * WINDOW * 128 * 4
