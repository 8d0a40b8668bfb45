"""The pictures of a study."""

from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..records import Record, summarise
from .run import Study, batch_sizes, middle

SCATTERED = ("intra_batch", "kfac", "running 0.9", "sua kfac", "diagonal")
POINTS = 1500  # of one layer in the scatter
SMALLEST = 1e-9  # of the largest exact moment of a panel; below lies rounding, and the null space of small batches


def draw(study: Study) -> dict[str, Figure]:
    """Every picture by its file name."""
    return {name: make(study) for name, (_, make) in PICTURES.items()}


def write(figures: dict[str, Figure], out: Path) -> list[Path]:
    """The pictures as PNG."""
    paths = []
    for name, figure in figures.items():
        paths.append(out / f"{name}.png")
        figure.savefig(paths[-1], dpi=100)
    return paths


def error_by_layer(study: Study) -> Figure:
    """Bars of `||F - estimate|| / ||F||` with standard errors, a panel a stage."""
    figure = Figure(figsize=(11, 3 * len(study.stages)), layout="constrained")
    axes = figure.subplots(len(study.stages), 1, squeeze=False, sharex=True)[:, 0]
    for ax, stage in zip(axes, study.stages, strict=True):
        table = summarise(study.records("batches", stage.steps))
        layers = list(dict.fromkeys(row["layer"] for row in table))
        names = list(dict.fromkeys(row["estimator"] for row in table))
        for k, name in enumerate(names):
            mine = [row for row in table if row["estimator"] == name]
            x = [layers.index(row["layer"]) + (k + 0.5) / (len(names) + 1) for row in mine]
            errors = [row["fisher_error_se"] for row in mine]
            ax.bar(x, [r["fisher_error"] for r in mine], 1 / (len(names) + 1), yerr=errors, label=name, color=_color(k))
        ax.set(title=f"after {stage.steps} steps, loss {stage.loss:.3g}", ylabel="||F - estimate|| / ||F||")
        ax.set_xticks([k + 0.5 for k in range(len(layers))], layers)
    axes[0].legend(ncols=2, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def eigenvalues(study: Study) -> Figure:
    """The moment of the last batch against that of all the data, a row a stage, a column an estimator."""
    names = [name for name in SCATTERED if name in study.settings.estimators] or list(study.settings.estimators[:4])
    figure = Figure(figsize=(2.6 * len(names) + 1, 2.6 * len(study.stages)), layout="constrained")
    axes = figure.subplots(len(study.stages), len(names), squeeze=False)
    layers = list(dict.fromkeys(seen.layer for _, seen in study.seen))
    for row, stage in zip(axes, study.stages, strict=True):
        for ax, name in zip(row, names, strict=True):
            mine = [seen for steps, seen in study.seen if (steps, seen.estimator) == (stage.steps, name)]
            floor = SMALLEST * max((seen.exact.max().item() for seen in mine if seen.exact.numel()), default=0.0)
            for seen in mine:
                exact, estimate = seen.exact.flatten(), seen.estimate.flatten()
                shown = torch.linspace(0, len(exact) - 1, min(POINTS, len(exact))).long()
                x, y = exact[shown], estimate[shown]
                live = (x > floor) & (y > floor)
                k = layers.index(seen.layer)
                ax.scatter(x[live], y[live], s=2, linewidths=0, color=_color(k), label=seen.layer)
            ax.axline((1, 1), slope=1, color="black", linewidth=0.7)
            ax.set(xscale="log", yscale="log", title=f"{name}, {stage.steps} steps")
    figure.supxlabel("exact moment over all the data")
    figure.supylabel("estimate")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", markerscale=4, fontsize="small")
    return figure


def batch_size(study: Study) -> Figure:
    """Errors of the whole model against the examples in a batch."""
    sizes = batch_sizes(study.settings)
    figure = _errors(study.records("batch size"), "examples", "examples in a batch")
    for ax in figure.axes:
        ax.set(xscale="log", ylim=(0, None))
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
        ax.legend(fontsize="small")
    return figure


def refreshes(study: Study) -> Figure:
    """Errors of the whole model along a training trajectory, by the steps since the last refresh."""
    unit, first = study.settings.stride, middle(study.settings)
    along = f"since the refresh, in units of {unit} steps, from step {first}"
    figure = _errors(study.records("refresh"), "since_refresh", along)
    figure.axes[1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def step_quality(study: Study) -> Figure:
    """Cosine to the dense natural gradient, and the best decrease of the loss, a group a stage."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for ax, field, label in zip(
        figure.subplots(2, 1), ("cosine", "decrease"), ("cosine to the target", "decrease / loss"), strict=True
    ):
        for g, stage in enumerate(study.stages):
            rows = study.records("batches", stage.steps)
            table = [row for row in summarise(rows) if row["layer"] == "all"]
            scale = stage.loss if field == "decrease" else 1.0
            for k, row in enumerate(table):
                ax.bar(
                    g + (k + 0.5) / (len(table) + 1),
                    row[field] / scale,
                    1 / (len(table) + 1),
                    yerr=row[f"{field}_se"] / scale,
                    color=_color(k),
                    label=row["estimator"] if g == 0 else None,
                )
        ax.set(ylabel=label)
        ax.set_xticks([g + 0.5 for g in range(len(study.stages))], [f"{stage.steps} steps" for stage in study.stages])
    figure.axes[0].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


PICTURES = {
    "error_by_layer": ("Distance to the Fisher's block, by layer and stage", error_by_layer),
    "eigenvalues": ("Exact against approximate moment in the basis", eigenvalues),
    "batch_size": ("Error against batch size", batch_size),
    "refresh": ("Error against steps since the basis was refreshed", refreshes),
    "step_quality": ("What the error does to the step", step_quality),
}
"""The title of each, and what draws it."""


def _errors(records: list[Record], along: str, label: str) -> Figure:
    """Both errors of the whole model, a panel each, along a field of the records."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    norms = {"moment_error": "||m2 - exact|| / ||exact||", "fisher_error": "||F - estimate|| / ||F||"}
    for ax, (field, norm) in zip(figure.subplots(1, 2), norms.items(), strict=True):
        _lines(ax, records, along, field)
        ax.set(xlabel=label, ylabel=norm)
    return figure


def _lines(ax: Axes, records: list[Record], along: str, field: str) -> None:
    """Mean and standard error of a figure of the whole model, one line an estimator."""
    records = [record for record in records if record.layer == "all"]
    for k, name in enumerate(dict.fromkeys(record.estimator for record in records)):
        groups: dict[int, list[Record]] = {}
        for record in records:
            if record.estimator == name:
                groups.setdefault(getattr(record, along), []).append(record)
        if along == "examples":  # what was left over made a smaller last batch
            most = max(map(len, groups.values()))
            groups = {x: group for x, group in groups.items() if len(group) > 1 or most == 1 or x == max(groups)}
        table = {x: summarise(group)[0] for x, group in sorted(groups.items())}
        y = [row[field] for row in table.values()]
        error = [row[f"{field}_se"] for row in table.values()]
        ax.errorbar(list(table), y, yerr=error, marker="o", markersize=3, label=name, color=_color(k))


def _color(k: int) -> tuple[float, float, float, float]:
    return colormaps["tab20"](k % 20)
