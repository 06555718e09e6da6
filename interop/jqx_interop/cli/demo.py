# SPDX-License-Identifier: Apache-2.0
"""`jqx demo`: what jqx does, in a minute, without a download."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Bars, duration, out, print_json, print_table, size

if TYPE_CHECKING:
    from jqx_interop.demo import Demo


def demo(
    destination: Annotated[
        Path, typer.Argument(metavar="OUT", help="A new directory for what is written.")
    ] = Path("jqx-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Quantize the bundled model in several ways, and see what it costs.

    The model is a Llama of four million parameters that travels with jqx. OUT gets one of the
    quantized checkpoints, a picture, and the figures as JSON.
    """
    from jqx_interop.demo import run_demo

    with Bars() as bars:
        bars.note("the bundled Llama through the headline recipes; about a minute on two cores")
        done = run_demo(destination, bars)
    if as_json:
        print_json(done.to_json())
        return
    _show(done)


def _show(done: "Demo") -> None:
    rows = [("none (bfloat16)", "16.00", size(done.size), f"{done.perplexity:.2f}", "", "", "")]
    rows += [
        (
            row.recipe,
            f"{row.bits:.2f}",
            size(row.size),
            f"{row.perplexity:.2f}",
            f"{row.kl:.4f} ± {row.kl_se:.4f}",
            f"{row.top1:.1%}",
            f"{row.seconds:.1f}",
        )
        for row in done.rows
    ]
    columns = ("recipe", "bits per weight", "size", "perplexity", "KL", "top-1", "seconds")
    print_table("the bundled model on text it has not seen", columns, rows)
    lines = (
        "bits per weight: of the quantized linears, scales included; size: of the whole model",
        "KL: divergence from the unquantized model, nats a token; top-1: the same likeliest token",
        f"{done.picture}: bits against KL; all in {duration(done.seconds)}",
        "",
        *(f"{name}: {done.prompt}{_one_line(text)} ..." for name, text in done.texts.items()),
        "",
        "Next:",
        f"  jqx generate {done.checkpoint} --prompt 'In this paper we'",
        f"  jqx eval {done.checkpoint} --reference bundled",
        f"  jqx inspect {done.checkpoint}",
        "  jqx quantize Qwen/Qwen3-0.6B qwen3-nvfp4 --qformat nvfp4",
    )
    for line in lines:
        out.print(line, markup=False)


def _one_line(text: str) -> str:
    """`text` with its line ends as blanks, what is before and after the words kept."""
    return text.replace("\n", " ").rstrip()
