"""Curves as a table and as a plot."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .checkpoint import replacing
from .run import Point

Curves = Mapping[str, Sequence[Point]]  # by optimizer

ROWS = 5  # of each optimizer in the table


def table(curves: Curves) -> str:
    """Losses against steps and seconds, about `ROWS` of each optimizer, the last point among them."""
    lines = [
        f"{'optimizer':<10} {'step':>6} {'seconds':>8} {'training loss':>14} {'test loss':>10} {'test accuracy':>14}"
    ]
    for name, points in curves.items():
        every = max(1, math.ceil((len(points) - 1) / ROWS))
        for point in points[::-1][::every][::-1]:
            accuracy = "-" if point.test_accuracy is None else f"{point.test_accuracy:.1%}"
            lines.append(
                f"{name:<10} {point.step:>6} {point.seconds:>8.2f} {point.train_loss:>14.4g} "
                f"{point.test_loss:>10.4g} {accuracy:>14}"
            )
    return "\n".join(lines)


def plot(curves: Curves, title: str, path: Path) -> None:
    """Training loss (solid) and test loss (dashed) against steps and against seconds, written as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, points) in enumerate(curves.items()):
        for axes, x in ((left, [p.step for p in points]), (right, [p.seconds for p in points])):
            axes.plot(x, [p.train_loss for p in points], color=f"C{number}", label=name)
            axes.plot(x, [p.test_loss for p in points], color=f"C{number}", linestyle="--", linewidth=1)
    left.set(xlabel="steps", ylabel="loss", yscale="log")
    right.set(xlabel="seconds")
    left.legend(title="training; dashed: test")
    figure.suptitle(title)
    _save(figure, path, 120)


def plot_metrics(metrics: Path, title: str, path: Path) -> None:
    """The rows of `optimizer, step, metric, value` as curves against steps, written as a PNG.

    A panel for each metric; those of the layers, `metric/LAYER`, share one.
    """
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            panel, _, layer = row["metric"].partition("/")
            curve = f"{row['optimizer']} {layer}".strip()
            panels.setdefault(panel, {}).setdefault(curve, []).append((int(row["step"]), float(row["value"])))
    columns = 3
    rows = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(5 * columns, 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (panel, curves) in zip(grid, panels.items(), strict=False):
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=name)
        positive = all(value > 0 for points in curves.values() for _, value in points)
        axes.set(title=panel, xlabel="steps", yscale="log" if positive else "linear")
        axes.legend(fontsize="x-small")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title)
    _save(figure, path, 100)


def _save(figure: Figure, path: Path, dpi: int) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=dpi)
