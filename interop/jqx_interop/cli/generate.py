# SPDX-License-Identifier: Apache-2.0
"""`jqx generate`."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jqx.errors import InputError

from .console import COMPUTE, MODEL, Bars, complete_compute, err, print_json, size

if TYPE_CHECKING:
    from jqx_interop.generation import Generation
    from jqx_interop.stored import Source

HOW, LIMIT = "How tokens are chosen", 128
WIDTH = 60
"""Characters of a prompt in the line above its text."""


def complete_cache(incomplete: str) -> list[str]:
    """Formats that begin so."""
    from jqx.models.cache import CACHE_FORMATS

    return [name for name in CACHE_FORMATS if name.startswith(incomplete)]


def generate(  # noqa: PLR0913  a command's options are its parameters
    model: Annotated[str, typer.Argument(help=MODEL)],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A text to go on with; again for several in one batch; - reads stdin."),
    ] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option(help="A text file that is a prompt.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Prompts are messages to the model, or texts. Default: messages if it has a chat "
            "template.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before each message.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Stop after so many tokens.")
    ] = LIMIT,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 takes the likeliest token. Default: 0, or as generation_config.json says.",
            rich_help_panel=HOW,
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="From so many likeliest tokens.", rich_help_panel=HOW)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="From the fewest tokens that are so likely.", rich_help_panel=HOW),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random numbers.", rich_help_panel=HOW)] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given again.")
    ] = None,
    compute: Annotated[str, typer.Option(help=COMPUTE, autocompletion=complete_compute)] = "auto",
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="Keep keys and values in eight bits, fp8 or int8, or in four, nvfp4. Default: as "
            "they are, or as the checkpoint says.",
            autocompletion=complete_cache,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Let the model go on with a text, or answer a message.

    One prompt is printed while it grows; several run as one batch and are printed one after
    another.
    """
    from jqx_interop.generation import Arithmetic, Sampling, run
    from jqx_interop.stored import open_model

    texts = _texts(prompt or [], prompt_file or [])
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    sampling.check()
    source = open_model(model)
    asked = _asked(texts, chat, system, source)
    alone = len(texts) == 1 and not as_json
    with contextlib.ExitStack() as stack:
        progress = _Notes() if alone else stack.enter_context(Bars())
        try:
            told, how = _print_piece if alone else None, Arithmetic(compute, kv_cache)
            found = run(source, asked, sampling, told, how, progress)
        except KeyboardInterrupt:
            print(flush=True)
            raise
    if as_json:
        print_json(found.to_json())
        return
    if alone:
        print(flush=True)
    else:
        _print_all(texts, found)
    if err.is_terminal:
        err.print(_summary(found), style="dim", markup=False)


class _Notes:
    """A `Progress` that prints its notes alone: bars would run into the text."""

    def phase(self, title: str, total: float | int) -> None:
        """Ignore it."""

    def advance(self, amount: float | int) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Print one line on standard error."""
        err.print(text, markup=False)


def _texts(prompts: list[str], files: list[Path]) -> list[str]:
    """The prompts of the command line, those in files last."""
    texts = [_standard_input() if text == "-" else text for text in prompts]
    for number, text in enumerate(texts, 1):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError(f"prompt {number} is not UTF-8 text")
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: is not UTF-8 text ({error.reason})") from error
    if not texts:
        raise InputError("no prompt is given: --prompt TEXT, --prompt - or --prompt-file FILE")
    return texts


def _standard_input() -> str:
    if sys.stdin is None:
        raise InputError("--prompt - reads standard input, and that is closed")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text ({error.reason})") from error


def _asked(texts: list[str], chat: bool | None, system: str | None, source: "Source") -> list[Any]:
    """The texts, or conversations that begin with them."""
    from jqx_interop.data.chat import Chat

    path = source.checkpoint.path
    known = Chat(path).known
    if chat and not known:
        raise InputError(f"{path} has no chat template: --no-chat goes on with the text itself")
    if not (known if chat is None else chat):
        if system is not None:
            raise InputError("--system belongs to a chat, and the prompt is a text here: --chat")
        return list(texts)
    if empty := [number for number, text in enumerate(texts, 1) if not text]:
        raise InputError(f"prompt {empty[0]} is empty: give at least one token")
    before = [] if system is None else [{"role": "system", "content": system}]
    return [[*before, {"role": "user", "content": text}] for text in texts]


def _print_piece(_: int, text: str) -> None:
    print(text, end="", flush=True)


def _print_all(texts: list[str], found: "Generation") -> None:
    for number, (text, completion) in enumerate(zip(texts, found.completions, strict=True), 1):
        line = " ".join(text.split())
        short = line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."
        print(f"== {number} of {len(texts)}: {short}\n{completion.text}\n")


def _summary(found: "Generation") -> str:
    tokens = sum(len(completion.ids) for completion in found.completions)
    rate = found.tokens_per_second
    speed = "" if rate is None else f", {rate * len(found.completions):.1f} tokens a second"
    prompts = sum(completion.prompt_tokens for completion in found.completions)
    return (
        f"{tokens} tokens{speed}; {prompts} of the prompt in {found.prefill_seconds:.1f} s; "
        f"weights take {size(found.weight_bytes)}"
    )
