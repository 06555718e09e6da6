# SPDX-License-Identifier: Apache-2.0
"""`jqx quantize`, and its forecast `--plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jqx.errors import InputError

from .console import (
    MODEL,
    Bars,
    duration,
    err,
    out,
    print_json,
    print_table,
    size,
)
from .engines import look_at, tell_engines, verdicts_json
from .export import complete_targets
from .options import (
    DATA,
    HOW,
    AllExperts,
    AsJson,
    BatchSize,
    Calib,
    CalibSeq,
    CalibSize,
    ComputeIn,
    MaxMemory,
    Restart,
    pairs,
)

if TYPE_CHECKING:
    from jqx_interop.engines import Verdict
    from jqx_interop.job import Job
    from jqx_interop.plan import Plan
    from jqx_interop.report import Report


def complete_formats(incomplete: str) -> list[str]:
    """The names `--qformat` takes that begin like `incomplete`."""
    from jqx.recipes import RECIPES

    names = [name for row in RECIPES.values() for name in (row.name, *row.aliases)]
    return [name for name in names if name.startswith(incomplete)]


def complete_kv(incomplete: str) -> list[str]:
    """The names `--kv-cache` takes that begin like `incomplete`."""
    from jqx.config import KV_FORMATS

    return [name for name in ("none", *KV_FORMATS) if name.startswith(incomplete)]


def quantize(  # noqa: PLR0913  a command's options are its parameters
    model: Annotated[str, typer.Argument(help=MODEL)],
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="A new directory. It appears when it is complete."),
    ] = None,
    qformat: Annotated[
        str, typer.Option(help="The recipe: see `jqx recipes`.", autocompletion=complete_formats)
    ] = "fp8",
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="Format of keys and values (default: the recipe's, none for most).",
            autocompletion=complete_kv,
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe file (YAML), instead of --qformat.")
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="Replace the algorithm of the recipe.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change the recipe: block=64, or a parameter of its algorithm.",
        ),
    ] = None,
    calib: Calib = None,
    calib_size: CalibSize = 512,
    calib_seq: CalibSeq = 512,
    activations: Annotated[
        Path | None,
        typer.Option(
            help="Recorded inputs of linears (safetensors): no model is run, but for experts that "
            "were not recorded, on --calib.",
            rich_help_panel=DATA,
        ),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            help="Statistics that `jqx calibrate` wrote: no model is run.", rich_help_panel=DATA
        ),
    ] = None,
    batch_size: BatchSize = 0,
    max_memory: MaxMemory = "4GiB",
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory",
            help="Compress weights before calibration: a smaller peak, for the algorithm max.",
            rich_help_panel=HOW,
        ),
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest file.", rich_help_panel=HOW)
    ] = "10GB",
    compute: ComputeIn = "auto",
    target: Annotated[
        str,
        typer.Option(
            help="The layout: see `jqx targets`.",
            rich_help_panel=HOW,
            autocompletion=complete_targets,
        ),
    ] = "modelopt",
    fold: Annotated[
        bool | None,
        typer.Option(
            "--fold/--no-fold",
            help="Fold factors of inputs into the weights before, as engines without a place for "
            "them need (default: where the layout has none).",
            rich_help_panel=HOW,
        ),
    ] = None,
    unify_fp8: Annotated[
        bool,
        typer.Option(
            "--unify-fp8",
            help="One FP8 scale for linears that read one input: what engines compute with.",
            rich_help_panel=HOW,
        ),
    ] = False,
    keep_source: Annotated[
        bool,
        typer.Option(
            "--keep-source",
            help="Linears that are quantized in MODEL already, and that the recipe leaves alone, "
            "stay as they are (default: decoded).",
            rich_help_panel=HOW,
        ),
    ] = False,
    all_experts: AllExperts = False,
    expert_coverage: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Fail before any work if less than this share of the weights of experts would be "
            "quantized.",
            rich_help_panel=HOW,
        ),
    ] = None,
    fuse_experts: Annotated[
        bool,
        typer.Option(
            "--fuse-experts/--no-fuse-experts",
            help="Experts that lie in one tensor stay in one where the layout has them so, or each "
            "gets tensors of its own.",
            rich_help_panel=HOW,
        ),
    ] = True,
    restart: Restart = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would happen and what it costs; do nothing.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A new directory for a page about what became of every linear.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Quantize the checkpoint MODEL and write it to OUT.

    A run that was interrupted goes on where it was when the same command is given again.
    """
    from jqx_interop.job import prepare
    from jqx_interop.pipeline import Inputs, load_inputs, run
    from jqx_interop.plan import make_plan, tokens_of
    from jqx_interop.recipe_files import read_recipe
    from jqx_interop.settings import Settings

    if destination is None and not plan:
        raise InputError("OUT is missing: name a new directory, or ask for --plan")
    settings = Settings(
        kv_cache=kv_cache,
        calib=calib,
        activations=activations,
        stats=stats,
        calib_size=calib_size,
        calib_seq=calib_seq,
        batch_size=batch_size,
        max_memory=max_memory,
        max_shard_size=max_shard_size,
        compute=compute,
        algorithm=algorithm,
        target=target,
        options=pairs(set_),
        restart=restart,
        report=report,
        low_memory=low_memory,
        fold=fold,
        unify_fp8=unify_fp8,
        keep_source=keep_source,
        all_experts=all_experts,
        expert_coverage=expert_coverage,
        fuse_experts=fuse_experts,
    )
    job = prepare(model, read_recipe(recipe) if recipe else qformat, settings, planned=plan)
    inputs = Inputs() if job.outlined else load_inputs(job)
    if plan:
        tokens = tokens_of(job) if job.outlined else inputs.tokens
        _show_plan(make_plan(job, tokens, destination), as_json)
        return
    assert destination is not None
    with Bars() as bars:
        bars.note(_announcement(job))
        if err.is_terminal:
            bars.note(_forecast(make_plan(job, inputs.tokens, destination)))
        done = run(job, destination, bars, inputs)
        verdicts = look_at(destination, bars)
    _show_report(done, verdicts, as_json)


def _forecast(plan: "Plan") -> str:
    return (
        f"about {duration(plan.seconds)}, {size(plan.peak_memory_bytes)} of memory, "
        f"{size(plan.output_bytes + plan.spilled_bytes)} on disk ({size(plan.free_bytes)} free)"
    )


def _announcement(job: "Job") -> str:
    family = (
        job.spec.family
        if job.spec
        else f"{job.checkpoint.config.get('model_type')} (by tensor names)"
    )
    return f"{job.checkpoint.path}: {family}, to {job.recipe.name}, KV cache {job.kv or 'as it is'}"


def _show_plan(plan: "Plan", as_json: bool) -> None:
    if as_json:
        print_json(plan.to_json())
        return
    from jqx_interop.report import summary

    kinds: dict[tuple[str, str | None, tuple[int, ...]], list[str]] = {}
    for linear in plan.linears:
        kinds.setdefault((linear.weight, linear.input, linear.shape), []).append(linear.path)
    rows = [
        (name, " x ".join(map(str, shape)), weight, inputs or "as they are")
        for (weight, inputs, shape), paths in kinds.items()
        for name in summary(paths, most=99)
    ]
    print_table(
        f"{plan.recipe}: what is quantized to what", ("linear", "shape", "weight", "inputs"), rows
    )
    costs = [
        ("source", size(plan.source_bytes)),
        ("output", f"{size(plan.output_bytes)} in {plan.files} file{'s' * (plan.files > 1)}"),
        ("free on that disk", size(plan.free_bytes)),
        ("calibration", f"{plan.tokens:,} tokens" if plan.tokens else "no model is run"),
        ("peak memory", f"about {size(plan.peak_memory_bytes)}"),
        ("hidden states on disk", size(plan.spilled_bytes) if plan.spilled_bytes else "none"),
        ("time", f"about {duration(plan.seconds)}"),
        ("loaded by", ", ".join(v.label for v in plan.engines if v.loads) or "no engine"),
    ]
    print_table("", ("cost", ""), costs)
    out.print(plan.coverage.line, markup=False)
    for note in plan.notes:
        out.print(note, markup=False)


def _show_report(report: "Report", verdicts: "tuple[Verdict, ...]", as_json: bool) -> None:
    if as_json:
        print_json(report.to_json() | {"engines": verdicts_json(verdicts)})
        return
    from jqx_interop.report_files import PAGE

    out.print(report.coverage.line, markup=False)
    ratio = report.output_bytes / report.source_bytes
    out.print(
        f"{report.out}: {size(report.output_bytes)}, {ratio:.0%} of the source, "
        f"{report.bits:.2f} bits a parameter, in {duration(report.seconds)}",
        markup=False,
    )
    for line in (report.carried, report.experts):
        if line is not None:
            out.print(line, markup=False)
    if report.report is not None:
        weights = "; no inputs could be had, so its errors are those of weights alone"
        of = weights if report.errors_of == "weights" else ""
        out.print(f"report: {Path(report.report) / PAGE}{of}", markup=False)
    tell_engines(verdicts)
