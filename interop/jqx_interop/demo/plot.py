# SPDX-License-Identifier: Apache-2.0
"""Bits per weight against the divergence from the unquantized model, as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT, DPI = 7.0, 4.5, 150
SPREAD = 0.14  # of the logarithm of KL: labels nearer than this to one another are moved apart


class Point(NamedTuple):
    """One recipe: stored bits per weight of its linears, and mean KL in nats with its error."""

    name: str
    bits: float
    kl: float
    kl_se: float


def plot(points: Sequence[Point], title: str, path: Path) -> None:
    """Write the picture of `points` to `path`, a PNG. KL is on a logarithmic axis."""
    # the object-oriented interface: no window system, and nothing global is changed
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for point in points:
        axes.errorbar(point.bits, point.kl, yerr=point.kl_se, fmt="o", capsize=3)
    for point, height in zip(points, label_heights(points), strict=True):
        axes.annotate(
            point.name,
            (point.bits, point.kl),
            xytext=(point.bits + 0.12, height),
            textcoords="data",
            va="center",
            fontsize=8,
            bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.7},
        )
    axes.set_yscale("log")
    axes.set_xlim(left=min(p.bits for p in points) - 0.5, right=max(p.bits for p in points) + 2.2)
    axes.set_xlabel("stored bits per quantized weight, scales included")
    axes.set_ylabel("KL from the unquantized model, nats a token")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path)


def label_heights(points: Sequence[Point]) -> list[float]:
    """Where the label of each point goes on the KL axis: beside it, those of neighbours apart."""
    import math

    heights: dict[int, float] = {}
    for i in sorted(range(len(points)), key=lambda i: points[i].kl):
        wanted = math.log(points[i].kl)
        near = [h for j, h in heights.items() if abs(points[j].bits - points[i].bits) < 2]
        heights[i] = max([wanted, *(h + SPREAD for h in near)])
    return [math.exp(heights[i]) for i in range(len(points))]
