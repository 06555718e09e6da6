# SPDX-License-Identifier: Apache-2.0
"""`jqx auto`: mixed precision under a budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jqx.errors import InputError

from .console import MODEL, Bars, err, out, print_json, print_table, size
from .engines import look_at, tell_engines, verdicts_json
from .export import complete_targets
from .options import AsJson, BatchSize, Calib, CalibSeq, CalibSize, ComputeIn, Restart, pairs
from .quantize import complete_formats, complete_kv

if TYPE_CHECKING:
    from jqx_interop.auto import Chosen, Limit

CHOICE, BUDGET = "The choice", "The budget"
DEFAULT_BITS = 4.8


def complete_counts(incomplete: str) -> list[str]:
    """The names `--count` takes that begin like `incomplete`."""
    from jqx.auto import BIT_COUNTS

    return [name for name in BIT_COUNTS if name.startswith(incomplete)]


def complete_methods(incomplete: str) -> list[str]:
    """The names `--method` takes that begin like `incomplete`."""
    from jqx_interop.auto import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]


def auto(  # noqa: PLR0913  a command's options are its parameters
    model: Annotated[str, typer.Argument(help=MODEL)],
    destination: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A new directory. It appears when it is complete."),
    ],
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            "--auto-quantize-bits",
            "--auto_quantize_bits",
            help=f"Bits a weight, at most (default: {DEFAULT_BITS}).",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    count: Annotated[
        str,
        typer.Option(
            help="How bits are counted: as ModelOpt does, heads and what is left out at 16; or of "
            "quantizable linears alone, with scales.",
            autocompletion=complete_counts,
            rich_help_panel=BUDGET,
        ),
    ] = "modelopt",
    max_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help='Memory that all weights may take, such as "90MiB", instead of bits.',
            rich_help_panel=BUDGET,
        ),
    ] = None,
    max_latency: Annotated[
        float | None,
        typer.Option(
            metavar="MICROSECONDS",
            help="Time that all linears may take, by --latency-table, instead of bits.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    latency_table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSON, {"rows": [{"format": "fp8", "n": 576, "k": 1536, "microseconds": 9.5}, '
            '...]}; the format "none" is what stays as it is.',
            rich_help_panel=BUDGET,
        ),
    ] = None,
    cost_model: Annotated[
        str,
        typer.Option(
            help="weight: all weights count; active_moe: those of routed experts by the share "
            "that a token meets.",
            rich_help_panel=BUDGET,
        ),
    ] = "weight",
    expert_ratio: Annotated[
        float | None,
        typer.Option(help="That share (default: config.json's).", rich_help_panel=BUDGET),
    ] = None,
    exclude_cost: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Linears whose weights do not count as bits; may be given again.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    formats: Annotated[
        str,
        typer.Option(
            help="Recipes that linears may take, with commas between: see `jqx recipes`; to stay "
            "as it is, every linear may.",
            autocompletion=complete_formats,
            rich_help_panel=CHOICE,
        ),
    ] = "nvfp4,fp8",
    method: Annotated[
        str,
        typer.Option(
            help="What scores: gradient and kl as ModelOpt; fisher, which expects the KL "
            "divergence at the price of gradients.",
            autocompletion=complete_methods,
            rich_help_panel=CHOICE,
        ),
    ] = "gradient",
    rounds: Annotated[
        int,
        typer.Option(
            min=0,
            help="How often the model runs with the choice, and back, to correct it by what errors "
            "of different linears do to each other (fisher and kl).",
            rich_help_panel=CHOICE,
        ),
    ] = 0,
    disable: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Linears that stay as they are; may be given again.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where statistics, scores and the curve are kept, and taken from (default: "
            "OUT-scores).",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change the recipes.", rich_help_panel=CHOICE
        ),
    ] = None,
    kv_cache: Annotated[
        str, typer.Option(help="Format of keys and values.", autocompletion=complete_kv)
    ] = "none",
    target: Annotated[
        str, typer.Option(help="The layout: see `jqx targets`.", autocompletion=complete_targets)
    ] = "modelopt",
    calib: Calib = None,
    calib_size: CalibSize = 128,
    calib_seq: CalibSeq = 512,
    batch_size: BatchSize = 0,
    compute: ComputeIn = "auto",
    restart: Restart = False,
    as_json: AsJson = False,
) -> None:
    """Give every linear of MODEL the format that it loses least with, within a budget.

    Gradients of the loss say what a linear's rounding costs; the best choice of all is found
    exactly. Statistics and scores are kept, so that another budget takes seconds.
    """
    from jqx_interop.auto import AutoSettings, auto_quantize, limit_of
    from jqx_interop.settings import Settings

    names = [name.strip() for name in formats.split(",") if name.strip()]
    if not names:
        raise InputError("--formats names none: give recipes, such as --formats nvfp4,fp8")
    settings = Settings(
        kv_cache=kv_cache,
        calib=calib,
        calib_size=calib_size,
        calib_seq=calib_seq,
        batch_size=batch_size,
        compute=compute,
        target=target,
        restart=restart,
        options=pairs(options),
    )
    limit = limit_of(
        {"bits": bits, "bytes": max_bytes, "latency": max_latency}, count, latency_table
    )
    asked = AutoSettings(
        formats=tuple(names),
        limit=limit,
        method=method,
        rounds=rounds,
        disabled=tuple(disable or ()),
        cost_model=cost_model,
        expert_ratio=expert_ratio,
        excluded=tuple(exclude_cost or ()),
        scores=scores or destination.with_name(destination.name + "-scores"),
    )
    with Bars() as bars:
        chosen, report = auto_quantize(model, destination, asked, settings, progress=bars)
        verdicts = look_at(destination, bars)
    if as_json:
        print_json(
            report.to_json() | {"auto": chosen.to_json(), "engines": verdicts_json(verdicts)}
        )
        return
    _tell(chosen, limit, f"{destination}: {size(report.output_bytes)}")
    err.print(f"statistics, scores and curve: {asked.scores}", markup=False)
    tell_engines(verdicts)


def _tell(chosen: "Chosen", limit: "Limit", written: str) -> None:
    rows = [(name, str(n)) for name, n in chosen.counts.items()]
    print_table(f"{limit.most:,g} {chosen.unit}", ("format", "linears"), rows)
    if chosen.tried:
        told = " -> ".join(f"{row.kl:.4g}" for row in chosen.tried)
        best = min(row.kl for row in chosen.tried)
        out.print(f"KL of a token of the calibration data: {told}; taken: {best:.4g}", markup=False)
    costs: dict[str, Any] = dict(chosen.costs)
    told = [f"weights {size(int(costs.pop('bytes')))}"]
    if "latency" in costs:
        told.append(f"linears {costs.pop('latency'):.6g} microseconds")
    told += [f"{value:.2f} bits as {name} counts" for name, value in costs.items()]
    out.print(f"{written}; {'; '.join(told)}", markup=False)
