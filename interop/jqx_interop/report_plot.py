# SPDX-License-Identifier: Apache-2.0
"""Pictures: the error of every linear by layer, one line a kind of linear, and the tokens of every
expert, a row a block.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from .mixtures import LEAST_TOKENS
from .report_rows import Row, measure_of

WIDTH, HEIGHT, DPI = 9.0, 4.8, 150
MARKERS = "osD^vPX*"
FEW = 10  # kinds that one palette tells apart
IN_COLUMN = 22  # names that fit beside the picture
LABELS = {
    "output_error": "relative error of outputs",
    "weight_error": "relative error of weights",
    "saturated": "share of saturated codes",
}
NOTHING = 1e-12  # errors below this are none: the axis would be stretched by them
DECADE = 10.0  # the least that the axis spans, so that small differences look small
FEW_TOKENS, NO_TOKENS = "#f0a000", "#c00000"
ROW_HEIGHT, MOST_HEIGHT = 0.16, 14.0  # inches: of the row of a block, and of a picture


def plot_errors(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the picture of `rows` to `path`, a PNG. Errors are on a logarithmic axis; linears of
    one kind and layer, such as experts, are one point, their mean.
    """
    # the object-oriented interface: no window system, and nothing global is changed
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    measure = measure_of(rows)
    found = lines(rows, measure)
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = colormaps["tab10" if len(found) <= FEW else "tab20"].colors  # type: ignore[attr-defined]
    drawn = [
        _draw(axes, line, color=color, marker=marker)
        for line, color, marker in zip(found.values(), cycle(colors), cycle(MARKERS), strict=False)
    ]
    if drawn:
        axes.set_yscale("log")
        axes.set_ylim(*spanning(found.values()))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("layer")
    axes.set_ylabel(LABELS[measure])
    axes.set_title(plain(title), fontsize=10, parse_math=False)
    axes.grid(alpha=0.3, which="both")
    if drawn:
        columns = -(-len(found) // IN_COLUMN)
        beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
        legend = axes.legend(drawn, list(found), fontsize=8, ncols=columns, **beside)
        for text, kind in zip(legend.get_texts(), found, strict=True):
            text.set_parse_math(False)
            text.set_text(plain(kind))
    figure.savefig(path)


def plot_tokens(blocks: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Write the picture of the tokens that experts were sent to `path`, a PNG: blocks are rows,
    experts columns. `blocks` have a `layer` and the `tokens` of its experts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, to_rgba
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    counts = token_counts(blocks)
    most = max(float(np.nanmax(counts)), DECADE * LEAST_TOKENS)
    shades = ScalarMappable(LogNorm(LEAST_TOKENS, most), "YlGnBu")
    height = min(max(HEIGHT, 2 + ROW_HEIGHT * len(blocks)), MOST_HEIGHT)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = shades.to_rgba(np.maximum(np.nan_to_num(counts), LEAST_TOKENS))
    for color, where in token_marks(counts).items():
        colors[where] = to_rgba(color)
    axes.imshow(colors, aspect="auto", interpolation="nearest")
    layers = [block["layer"] for block in blocks]
    named = FuncFormatter(lambda y, _: str(layers[int(y)]) if 0 <= y < len(layers) else "")
    axes.yaxis.set_major_formatter(named)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(plain(title), fontsize=10, parse_math=False)
    figure.colorbar(shades, ax=axes, label="tokens", format="%d")
    keys = [Patch(color=FEW_TOKENS, label=f"fewer than {LEAST_TOKENS} tokens")]
    keys.append(Patch(color=NO_TOKENS, label="none"))
    figure.legend(handles=keys, loc="outside lower right", ncols=2, fontsize=8)
    figure.savefig(path)


def token_counts(blocks: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "blocks experts"]:
    """The tokens of every expert; NaN where a block has fewer experts than another."""
    wide = max(len(block["tokens"]) for block in blocks)
    rows = [[*block["tokens"], *[np.nan] * (wide - len(block["tokens"]))] for block in blocks]
    return np.array(rows, float)


def token_marks(
    counts: Float[np.ndarray, "blocks experts"],
) -> dict[str, Bool[np.ndarray, "blocks experts"]]:
    """Colour -> the experts that have it instead of a shade."""
    marks = {FEW_TOKENS: counts < LEAST_TOKENS, NO_TOKENS: counts == 0}
    return {**marks, "white": np.isnan(counts)}


def lines(rows: Sequence[Row], measure: str) -> dict[str, list[tuple[int | None, float]]]:
    """Kind of linear -> (layer, mean of `measure`), by layer; None: in no layer. What has no error
    is left out.
    """
    found: dict[str, dict[int | None, list[float]]] = {}
    for row in rows:
        if row.get(measure, 0.0) > NOTHING:
            found.setdefault(row["kind"], {}).setdefault(row["layer"], []).append(row[measure])
    return {
        kind: [(n, sum(values) / len(values)) for n, values in sorted(layers.items(), key=_first)]
        for kind, layers in found.items()
    }


def spanning(found: Iterable[list[tuple[int | None, float]]]) -> tuple[float, float]:
    """Ends of an axis that holds all these lines, and a decade at least."""
    errors = [error for line in found for _, error in line]
    low, high = min(errors), max(errors)
    room = max(math.sqrt(DECADE * low / high), (high / low) ** 0.05)
    return low / room, high * room


def _first(item: tuple[int | None, object]) -> int:
    return -1 if item[0] is None else item[0]


def _draw(axes: Any, line: list[tuple[int | None, float]], **style: Any) -> Any:
    """A line through the layers; one right across for what is in none."""
    if line[0][0] is None:
        return axes.axhline(line[0][1], linestyle="--", color=style["color"])
    layers, errors = zip(*line, strict=True)
    return axes.plot(layers, errors, markersize=4.5, linewidth=1.4, **style)[0]


def plain(text: str) -> str:
    """`text` in characters that every font has."""
    return text.encode("ascii", "backslashreplace").decode()
