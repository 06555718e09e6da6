# SPDX-License-Identifier: Apache-2.0
"""The demonstration: one small model through the headline recipes, each measured against the
unquantized model on text it has not seen.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from jqx.errors import InputError
from jqx_interop.checkpoints import BUNDLED, open_checkpoint
from jqx_interop.evaluation import EvalSettings, evaluate
from jqx_interop.generation import Sampling, generate
from jqx_interop.pipeline import ptq
from jqx_interop.progress import Progress, Silent

from .plot import Point, plot

HEADLINE = ("fp8", "int8", "mxfp8", "nvfp4", "w4a16_nvfp4", "mxfp4", "int4_blockwise_weight_only")
"""The recipes that are shown, by weight format."""

KEPT = "nvfp4"
PROMPT = "The results show that"
SPEECH = Sampling(max_new_tokens=32, temperature=0.7, top_p=0.9, seed=1)
PICTURE, RESULTS = "bits_against_kl.png", "results.json"
CALIBRATION: dict[str, Any] = {"calib_size": 32, "calib_seq": 256}
EVALUATION = EvalSettings(max_tokens=12_288)  # enough for two digits of every figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One recipe. `bits`: stored bits per quantized weight; `size`: bytes of the checkpoint's
    tensors; `seconds`: to quantize; the rest as in `Evaluation`.
    """

    recipe: str
    bits: float
    size: int
    perplexity: float
    kl: float
    kl_se: float
    top1: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """What the demonstration left in `out`: a checkpoint, a picture, and its figures.

    `size` and `perplexity` are those of the unquantized model; `tokens` were scored. `texts`: how
    PROMPT goes on, in the unquantized model ("none") and in that of the checkpoint.
    """

    out: str
    checkpoint: str
    picture: str
    size: int
    perplexity: float
    tokens: int
    rows: tuple[Row, ...]
    prompt: str
    texts: dict[str, str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def run_demo(out: str | Path, progress: Progress | None = None) -> Demo:
    """Quantize the bundled model by every recipe in HEADLINE, measure it, and write `out`: the
    checkpoint of KEPT, a picture and a JSON file.

    Raises InputError if `out` exists and is not empty.
    """
    progress, out, began = progress or Silent(), Path(out), time.monotonic()
    if out.exists() and (not out.is_dir() or any(out.iterdir()) or out.samefile(".")):
        raise InputError(f"{out} exists; name a new directory, or remove it")
    progress.phase("quantizing and measuring", 2 + len(HEADLINE))
    with _apart(out) as place:
        rows, source = [], evaluate(BUNDLED, settings=EVALUATION)
        progress.advance(1)
        for recipe in HEADLINE:
            rows.append(_measure(recipe, place / recipe))
            if recipe != KEPT:
                shutil.rmtree(place / recipe)
            progress.advance(1)
        texts = {name: _speech(model) for name, model in (("none", BUNDLED), (KEPT, place / KEPT))}
        progress.advance(1)
        points = [Point(row.recipe, row.bits, row.kl, row.kl_se) for row in rows]
        plot(points, "What quantization costs the bundled model", place / PICTURE)
        demo = Demo(
            out=str(out),
            checkpoint=str(out / KEPT),
            picture=str(out / PICTURE),
            size=_tensor_bytes(BUNDLED),
            perplexity=source.perplexity,
            tokens=source.tokens,
            rows=tuple(rows),
            prompt=PROMPT,
            texts=texts,
            seconds=round(time.monotonic() - began, 3),
        )
        (place / RESULTS).write_text(json.dumps(demo.to_json(), indent=2) + "\n", "utf-8")
        if out.exists():
            out.rmdir()
        place.rename(out)
    return demo


def _measure(recipe: str, place: Path) -> Row:
    report = ptq(BUNDLED, place, recipe, **CALIBRATION)
    found = evaluate(place, reference=BUNDLED, settings=EVALUATION)
    return Row(
        recipe=recipe,
        bits=found.bits_per_weight or 0.0,
        size=_tensor_bytes(place),
        perplexity=found.perplexity,
        kl=found.kl or 0.0,
        kl_se=found.kl_se or 0.0,
        top1=found.top1 or 0.0,
        seconds=report.seconds,
    )


def _speech(model: str | Path) -> str:
    (completion,) = generate(model, PROMPT, SPEECH)
    return completion.text


def _tensor_bytes(model: str | Path) -> int:
    return sum(info.nbytes for info in open_checkpoint(model).tensors.values())


@contextmanager
def _apart(out: Path) -> Iterator[Path]:
    """A new directory beside `out`, gone afterwards unless it was renamed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    place = out.parent / f".{out.name}.{uuid4().hex[:8]}"
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
