# SPDX-License-Identifier: Apache-2.0
"""`jqx tune`: the fastest tiles of kernels on the device that is here."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jqx.errors import InputError

from .console import Bars, err, out, print_json, print_table

if TYPE_CHECKING:
    from jqx_kernels.tuning import Tuning

UNIT = 128
"""Rows and columns of the matrix that is measured are a multiple of it: whole blocks."""


def tune(
    shape: Annotated[
        str, typer.Option(metavar="NxK", help="Of the matrix that is multiplied with.")
    ] = "8192x8192",
    only: Annotated[
        str | None, typer.Option(help="Elements, with commas: int4,e2m1,e4m3... All if not given.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Where the file of the device goes. Not given, it goes where jqx looks for it.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the file as well.")] = False,
) -> None:
    """Measure which tiles make the kernels of this GPU or TPU fastest, and keep them for it.

    Nothing needs this: without it tiles are those of the platform. It takes minutes, most of them
    to compile.
    """
    from jqx_kernels.dispatch import current_device
    from jqx_kernels.matmul.tuned import file_of
    from jqx_kernels.tuning import TRIALS, not_tunable
    from jqx_kernels.tuning import tune as measure

    device, size = current_device(), _shape(shape)
    if (reason := not_tunable(device)) is not None:
        raise InputError(reason)
    elements = None if only is None else _elements(only, sorted({t.element for t in TRIALS}))
    trials = [t for t in TRIALS if elements is None or t.element in elements]
    target = file_of(device.kind, folder)
    _check_writable(target)
    with Bars() as bars:
        bars.phase(f"tiles for {device.kind}", len(trials) + 1)

        def told(text: str) -> None:
            bars.note(text)
            bars.advance(1)

        found = measure(device, size, trials, told)
    _write(target, found)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found, target)


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) == 2 and all(p.isdecimal() and int(p) and not int(p) % UNIT for p in parts):
        return int(parts[0]), int(parts[1])
    raise InputError(f"--shape {text}: give rows and columns, multiples of {UNIT}, as 8192x8192")


def _elements(text: str, known: list[str]) -> set[str]:
    names = {name.strip() for name in text.split(",")}
    if unknown := sorted(names - set(known)):
        raise InputError(f"--only {text}: there is no '{unknown[0]}' among {', '.join(known)}")
    return names


def _check_writable(target: Path) -> None:
    """Before minutes are spent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a"):
        pass
    if not target.stat().st_size:
        target.unlink()


def _write(target: Path, found: "Tuning") -> None:
    """What was measured before for other trials stays; the file is there whole or not at all."""
    data = found.to_json()
    if target.is_file():
        mine = {_key(row) for row in data["tiles"]}
        before = json.loads(target.read_text())["tiles"]
        data["tiles"] = [row for row in before if _key(row) not in mine] + data["tiles"]
    part = target.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(target)


def _key(row: dict[str, object]) -> tuple[object, ...]:
    return row["op"], row["element"], row["size"]


def _show(found: "Tuning", target: Path) -> None:
    lines = []
    for row in found.rows:
        if row["seconds"] is None:
            lines.append((*_key(dict(row)), "does not run", "", "", ""))
            continue
        gain = row["default_seconds"] and row["default_seconds"] / row["seconds"]
        beside = found.bfloat16[row["size"]] / row["seconds"]
        lines.append(
            (
                *_key(dict(row)),
                f"{row['seconds'] * 1e6:.1f}",
                f"{gain:.2f}" if gain else "",
                f"{beside:.2f}",
                f"{row['bytes_per_second'] / found.copied:.0%}",
            )
        )
    n, k = found.shape
    title = f"{found.device.kind}, {n} x {k}, copy {found.copied / 1e9:.0f} GB/s"
    columns = ("operation", "element", "size", "µs", "x default", "x bfloat16", "of copy")
    print_table(title, columns, lines)
    for trial, reason in found.left_out.items():
        err.print(f"left out: {trial}: {reason}", markup=False)
    out.print(f"{target}", markup=False)
