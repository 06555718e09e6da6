# SPDX-License-Identifier: Apache-2.0
"""The page of a report: one HTML file that opens without a network.

Every value is escaped by the template. The page's own policy names its one script by its digest, so
nothing that comes from a checkpoint could run even so.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .report_rows import Row, measure_of

TEMPLATE, SCRIPT = (Path(__file__).with_name(f"report_page.{suffix}") for suffix in ("html", "js"))
WORST = 10
SIZES = ((1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"), (1, "B"))
MISSING = "–"


class Column(NamedTuple):
    """A fact of linears: its heading and what it says."""

    title: str
    about: str = ""


COLUMNS = {
    "path": Column("linear"),
    "shape": Column("shape", "outputs x inputs"),
    "weight": Column("weight", "format of the stored weight"),
    "input": Column("inputs", "format of its inputs when the model runs"),
    "bits": Column("bits", "stored bits a weight, scales and factors counted"),
    "output_error": Column("output error", "|X W'^T - X W^T|^2 / |X W^T|^2"),
    "weight_error": Column("weight error", "|W' - W|^2 / |W|^2"),
    "saturated": Column("saturated", "share of codes at the end of their range"),
    "alpha": Column("alpha", "exponent of the input magnitudes in the factors of channels"),
    "ratio": Column("clip ratio", "mean share of the largest magnitude that scales reach"),
    "damping": Column("damping", "what was added to the second moments, relative to their mean"),
    "loss": Column("loss", "what the search of the algorithm ended at, in its own unit"),
}
"""The columns with words of their own, in their order; other facts come after them."""

TEXTS = ("path", "shape", "weight", "input")
UNSEEN = ("kind", "layer")


class Cell(NamedTuple):
    """What is shown, what rows are sorted by, and the length of a bar in percent."""

    text: str
    key: str
    bar: int | None = None


def page(data: Mapping[str, Any], picture: bytes, experts: bytes | None = None) -> str:
    """The page for the content of report.json; `picture`: the PNG of its errors, `experts`: that of
    the tokens of experts.
    """
    import jinja2
    from markupsafe import Markup

    script = SCRIPT.read_text("utf-8")
    rows = data["linears"]
    measure = measure_of(rows)
    known = [row for row in rows if measure in row]
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    env.filters["figure"] = figure
    return env.from_string(TEMPLATE.read_text("utf-8")).render(
        data=data,
        cards=cards(data, measure),
        measure=COLUMNS[measure],
        name=measure,
        unmeasured=len(rows) - len(known),
        picture=base64.b64encode(picture).decode(),
        experts=None if experts is None else base64.b64encode(experts).decode(),
        columns=columns(rows),
        rows=cells(rows, measure),
        worst=cells(sorted(known, key=lambda row: -row[measure])[:WORST], measure),
        recipe=yaml.safe_dump(data["recipe_rules"], sort_keys=False, width=1000),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def cards(data: Mapping[str, Any], measure: str) -> list[tuple[str, str, str]]:
    """The headline numbers: heading, number, and a line below."""
    total = data["totals"].get(measure)
    coverage, share = data["coverage"], data["output_bytes"] / data["source_bytes"]
    found = [
        ("size", size(data["output_bytes"]), f"{share:.0%} of {size(data['source_bytes'])}"),
        ("bits a parameter", f"{data['bits']:.2f}", "everything that is stored counted"),
        (
            "quantized",
            f"{coverage['share']:.1%}",
            f"of {coverage['parameters']:,} parameters, in {coverage['linears']} linears",
        ),
    ]
    if total is not None:
        title = COLUMNS[measure].title
        found += [
            (f"mean {title}", figure(total["mean"]), decibels(total["mean"])),
            (f"worst {title}", figure(total["worst"]), total["worst_linear"]),
        ]
    return [*found, ("time", f"{data['seconds']:.0f} s", data["device"])]


def columns(rows: Sequence[Row]) -> dict[str, Column]:
    """The columns that some row fills."""
    named = dict.fromkeys(name for row in rows for name in row)
    order = [name for name in COLUMNS if name in named]
    order += [name for name in named if name not in COLUMNS and name not in UNSEEN]
    return {name: COLUMNS.get(name, Column(name)) for name in order}


def cells(rows: Sequence[Row], measure: str) -> list[dict[str, Cell]]:
    """What the table shows; bars for `measure`."""
    names = columns(rows)
    largest = max((row.get(measure, 0.0) for row in rows), default=0.0)
    return [{name: _cell(row, name, measure, largest) for name in names} for row in rows]


def _cell(row: Row, name: str, measure: str, largest: float) -> Cell:
    if name == "shape":
        return Cell(" x ".join(map(str, row[name])), str(math.prod(row[name])))
    if name in TEXTS:
        text = row[name] or "as they are"
        return Cell(text, text)
    if name not in row:
        return Cell(MISSING, "")
    value = row[name]
    bar = round(100 * value / largest) if name == measure and largest else None
    return Cell(figure(value), repr(value), bar)


def figure(value: float | int) -> str:
    """A number for people: three digits."""
    return f"{value:.3g}"


def decibels(error: float) -> str:
    """How far what is right lies above the error."""
    return f"{-10 * math.log10(error):.1f} dB below the signal" if error > 0 else "none"


def size(count: float | int) -> str:
    """Bytes for people: 1.5 GiB."""
    unit, name = next(((u, n) for u, n in SIZES if count >= u), SIZES[-1])
    return f"{count / unit:.3g} {name}"
