# SPDX-License-Identifier: Apache-2.0
"""`jqx`: the commands, and how errors are told. Commands import what they need when they run, so
help is quick.
"""

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer

from jqx.errors import InputError

from . import (
    auto,
    calibrate,
    compare,
    demo,
    export,
    generate,
    inspect,
    quantize,
    rotate,
    tables,
    tune,
)
from .console import err
from .eval import evaluate

DEBUG = "--debug"
USAGE_ERROR: Any = (
    typer.BadParameter.__base__
)  # Typer's own or click's: that differs between versions


def told(command: Callable[..., Any], interrupted: str = "interrupted") -> Callable[..., Any]:
    """`command`, with errors told in one line: exit code 2 for wrong input, 130 if interrupted, 1
    for a bug.
    """

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            _tell(interrupted, 130)
        except (InputError, OSError) as error:
            _tell(f"error: {_one_line(error)}", 2)
        except Exception as error:
            text = f"internal error: {type(error).__name__}: {_one_line(error)}"
            _tell(f"{text} ({DEBUG} shows the traceback; please report it)", 1)

    return run


app = typer.Typer(
    name="jqx",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Quantize language models: a Hugging Face checkpoint in, one that vLLM, SGLang and "
    "TensorRT-LLM load out.",
    epilog=f"Every command takes {DEBUG}, which shows the traceback behind an error.",
)
app.command(rich_help_panel="Start")(told(demo.demo))
app.command(rich_help_panel="Quantize")(
    told(quantize.quantize, "interrupted; the same command goes on where it was")
)
app.command(rich_help_panel="Quantize")(
    told(calibrate.calibrate, "interrupted; the same command goes on where it was")
)
app.command(rich_help_panel="Quantize")(
    told(auto.auto, "interrupted; the same command goes on where it was")
)
app.command(rich_help_panel="Quantize")(told(rotate.rotate))
app.command(rich_help_panel="Quantize")(told(export.export))
app.command(rich_help_panel="Look")(told(inspect.inspect))
app.command(rich_help_panel="Look")(told(compare.compare))
app.command("eval", rich_help_panel="Look")(told(evaluate))
app.command(rich_help_panel="Look")(told(generate.generate))
app.command(rich_help_panel="Device")(told(tune.tune))
app.command(rich_help_panel="Tables")(told(tables.formats))
app.command(rich_help_panel="Tables")(told(tables.recipes))
app.command(rich_help_panel="Tables")(told(tables.families))
app.command(rich_help_panel="Tables")(told(tables.targets))
app.command(rich_help_panel="Tables")(told(tables.sources))
app.command(rich_help_panel="Tables")(told(tables.kernels))


def _print_version(value: bool | None) -> None:
    if value:
        print(f"jqx {version('jqx')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool | None,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = None,
) -> None:
    """Quantize language models in JAX."""


def program() -> NoReturn:
    """Run the command line as a process of its own.

    It ends without taking Python and JAX apart: that costs a tenth of a second, and an interrupted
    run may have calls under way in JAX's threads, which would crash. Files are closed by then.
    """
    code: Any = 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may not know every letter
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BrokenPipeError:
        code = 1
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else bool(code))


def main() -> None:
    """Run the command line."""
    words = [word for word in sys.argv[1:] if word != DEBUG]
    try:
        code = app(words or ["--help"], standalone_mode=False)
    except USAGE_ERROR as error:
        path = error.ctx.command_path if error.ctx else "jqx"
        text = " ".join(error.format_message().split()).rstrip(".")
        err.print(f"error: {text}; see {path} --help", markup=False)
        code = error.exit_code
    sys.exit(code)


def _one_line(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    return " ".join("; ".join([str(error), *notes]).split())


def _tell(text: str, code: int) -> None:
    if DEBUG in sys.argv:
        raise  # noqa: PLE0704  the error being told
    err.print(text, markup=False)
    raise typer.Exit(code)
