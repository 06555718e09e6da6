# SPDX-License-Identifier: Apache-2.0
"""`jqx eval`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import (
    COMPUTE,
    MODEL,
    Bars,
    complete_compute,
    duration,
    err,
    out,
    print_json,
    print_table,
    size,
)

if TYPE_CHECKING:
    from jqx_interop.evaluation import Evaluation, Task

DATA, HOW = "Text", "How it runs"


def evaluate(  # noqa: PLR0913  a command's options are its parameters
    model: Annotated[str, typer.Argument(help=MODEL)],
    reference: Annotated[
        str | None,
        typer.Option(help="A checkpoint to compare with, such as what MODEL was made from."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A .txt, .md, .jsonl, .parquet or .npy file (default: a bundled text).",
            rich_help_panel=DATA,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens the model sees together (default: 512, or what it can).",
            rich_help_panel=DATA,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens from one window to the next (default: half a window).",
            rich_help_panel=DATA,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Read no more of the text (default: all).", rich_help_panel=DATA),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Windows at a time; 0 chooses.", rich_help_panel=HOW)
    ] = 0,
    max_memory: Annotated[
        str, typer.Option(help="Hidden states larger than this go to disk.", rich_help_panel=HOW)
    ] = "4GiB",
    compute: Annotated[
        str,
        typer.Option(help=COMPUTE, rich_help_panel=HOW, autocompletion=complete_compute),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure how well MODEL predicts a text, and how far it is from a reference.

    perplexity: how many equally likely tokens the model hesitates between, on average; lower is
    better.

    KL divergence: how far its probabilities are from the reference's, in nats a token; 0 is equal.

    top-1: how often the reference's most likely token is the model's too.

    top-5: how often it is among the model's five most likely.

    Each comes with its standard error, for which windows are independent.
    """
    from jqx_interop.evaluation import EvalSettings, forecast, prepare, run

    settings = EvalSettings(
        text=text,
        window=window,
        stride=stride,
        batch_size=batch_size,
        max_tokens=max_tokens,
        max_memory=max_memory,
        compute=compute,
    )
    task = prepare(model, reference, settings)
    with Bars() as bars:
        bars.note(_announcement(task))
        if err.is_terminal:
            cost = forecast(task)
            spilled = f", {size(cost.spilled_bytes)} on disk" if cost.spilled_bytes else ""
            memory = size(cost.peak_memory_bytes)
            bars.note(f"about {duration(cost.seconds)}, {memory} of memory{spilled}")
        found = run(task, bars)
    _show(found, as_json)


def _announcement(task: "Task") -> str:
    windows = task.windows
    return (
        f"{' against '.join(task.named)} on {task.tokens.source}: {windows.tokens:,} tokens in "
        f"{len(windows.ids):,} windows of {task.window}, every {task.stride}"
    )


def _show(found: "Evaluation", as_json: bool) -> None:
    if as_json:
        print_json(found.to_json())
        return
    rows = [("perplexity", _plus_minus(found.perplexity, found.perplexity_se))]
    if found.reference is not None:
        rows += [
            (
                "reference's perplexity",
                _plus_minus(found.reference_perplexity, found.reference_perplexity_se),
            ),
            ("ratio of the two", _plus_minus(found.perplexity_ratio, found.perplexity_ratio_se)),
            ("KL divergence", _plus_minus(found.kl, found.kl_se)),
            ("top-1 agreement", _plus_minus(found.top1, found.top1_se, "%")),
            ("top-5 agreement", _plus_minus(found.top5, found.top5_se, "%")),
        ]
    if found.bits_per_weight is not None:
        rows.append(("bits a quantized weight", f"{found.bits_per_weight:.2f}"))
    title = found.model if found.reference is None else f"{found.model} against {found.reference}"
    print_table(title, ("measure", "value"), rows)
    out.print(
        f"{found.tokens:,} tokens of {found.text} in {found.windows:,} windows of {found.window}, "
        f"{duration(found.seconds)}",
        markup=False,
    )


def _plus_minus(value: float | None, se: float | None, unit: str = "") -> str:
    """A mean and its standard error, to two digits of that and two places; shares in percent."""
    if value is None:
        return "none"
    value, se = (100 * value, 100 * (se or 0)) if unit else (value, se or 0.0)
    if not se or not math.isfinite(se):
        return f"{value:.6g}{unit}"
    digits = max(2, 1 - math.floor(math.log10(se)))
    return f"{value:.{digits}f} ± {se:.{digits}f}{unit}"
