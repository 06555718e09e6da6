# SPDX-License-Identifier: Apache-2.0
"""The curve of all budgets, as JSON and as a picture: what a model loses against what it costs."""

import json
from pathlib import Path

from .choosing import Chosen

WIDTH, HEIGHT, DPI = 7.0, 4.5, 150
LABELS = {
    "gradient": "sum of (gradient times change)²",
    "fisher": "expected KL from the unquantized model, nats",
    "kl": "sum of KL of single groups, nats",
}
"""Method -> what its scores are."""


def write_curve(chosen: Chosen, method: str, folder: Path) -> list[Path]:
    """Write `chosen` to curve-COUNT.json and its curve to curve-COUNT.png in `folder`; returns
    both.
    """
    paths = [folder / f"curve-{chosen.count}.{kind}" for kind in ("json", "png")]
    paths[0].write_text(json.dumps(chosen.to_json(), indent=1) + "\n", encoding="utf-8")
    plot_curve(chosen, method, paths[1])
    return paths


def plot_curve(chosen: Chosen, method: str, path: Path) -> None:
    """Write the picture to `path`, a PNG, with the choice marked."""
    # the object-oriented interface: no window system, and nothing global is changed
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lossy = [point for point in chosen.curve if point[1] > 0]
    axes.step(*zip(*lossy, strict=True), where="post", marker="o", markersize=3, linewidth=1)
    axes.plot(chosen.costs[chosen.count], max(chosen.score, lossy[-1][1]), "*", markersize=14)
    axes.set_yscale("log")
    axes.set_xlabel(f"{chosen.unit} (counted as {chosen.count} does)")
    axes.set_ylabel(LABELS[method])
    told = ", ".join(f"{n} {name}" for name, n in chosen.counts.items())
    axes.set_title(f"{chosen.costs[chosen.count]:.6g} {chosen.unit}: {told}", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path)
