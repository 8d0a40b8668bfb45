"""The records as CSV, and the report as one page that needs no other file."""

import base64
import csv
import html
import io
import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ..records import Record, summarise
from .plots import PICTURES
from .run import Study, middle

COLUMNS = {
    "moment_error": "moment error",
    "fisher_error": "Fisher error",
    "off_diagonal": "off-diagonal share",
    "effective_rank": "effective rank",
    "fisher_rank": "rank of F",
    "signal_to_noise": "signal / noise",
    "signal_share": "share with signal",
    "cosine": "cosine",
    "natural_distance": "step distance",
    "decrease": "decrease",
    "step_size": "step size",
}


def write_records(study: Study, out: Path) -> Path:
    """Every record with its part of the study and its stage."""
    path = out / "records.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "stage", *Record._fields])
        writer.writerows([row.part, row.stage, *row.record] for row in study.rows)
    return path


def write_page(study: Study, figures: dict[str, Figure], line: str, seconds: float, out: Path) -> Path:
    """The report."""
    s = study.settings
    parts = [
        f"<h1>Second moments of {s.model} on {s.data}</h1>",
        f"<p>Seed {s.seed}. This page is repeated by <code id='command'>{html.escape(line)}</code></p>",
        f"<p>torch {torch.__version__}, {seconds:.0f} s. {s.examples} training examples in batches of {s.batch_size}, "
        f"float64, damping {s.damping:g}, against the empirical Fisher F of all {s.examples}; norms are Frobenius "
        "norms over the blocks of the layers. Figures are means over the batches with their standard errors. What "
        "they mean is said at <code>ekfac_func.Record</code>; a click on a column's head sorts.</p>",
        "<h2>George et al. 2018: the exact moment is nearer to F than K-FAC's</h2>",
        *(f"<p>{claim}</p>" for claim in claims(study)),
    ]
    for name, figure in figures.items():
        parts.append(f"<h2>{PICTURES[name][0]}</h2><img alt='{name}' src='data:image/png;base64,{_png(figure)}'>")
    for stage in study.stages:
        rows = study.records("batches", stage.steps)
        parts.append(f"<h2>After {stage.steps} training steps, loss {stage.loss:.4g}</h2>{_table(summarise(rows))}")
        rows = study.records("all data", stage.steps)
        parts.append(f"<h3>All the data in one batch</h3>{_table(summarise(rows), without=('decrease', 'step_size'))}")
    rows = study.records("refresh")
    for since in sorted({record.since_refresh for record in rows}):
        table = summarise([record for record in rows if record.since_refresh == since and record.layer == "all"])
        heading = f"{since * s.stride} steps after a refresh, training from step {middle(s)}"
        parts.append(f"<h3>{heading}</h3>{_table(table, without=('decrease', 'step_size'))}")
    path = out / "report.html"
    path.write_text(PAGE.format(title=f"{s.model} on {s.data}", body="\n".join(parts), style=STYLE, script=SCRIPT))
    return path


def claims(study: Study) -> list[str]:
    """How often the exact moment is nearer to F than the eigenvalue product, on all the data and by batches."""
    found = []
    for part, words in (("all data", "in the basis of all the data"), ("batches", "estimated from a batch")):
        errors: dict[tuple[int, str, str], float] = {}
        for stage in study.stages:
            rows = study.records(part, stage.steps)
            for row in summarise(rows):
                errors[stage.steps, row["layer"], row["estimator"]] = row["fisher_error"]
        pairs = [
            (value, errors[steps, layer, "kfac"])
            for (steps, layer, name), value in errors.items()
            if name == "intra_batch" and layer != "all" and (steps, layer, "kfac") in errors
        ]
        if pairs:
            # two roads to one number of a layer with one element a block differ by rounding
            nearer = sum(exact <= product * (1 + 1e-9) for exact, product in pairs)
            found.append(f"Moments {words}: nearer or equal on {nearer} of {len(pairs)} pairs of layer and stage.")
    return found


def _table(rows: list[dict[str, Any]], without: tuple[str, ...] = ()) -> str:
    columns = {field: title for field, title in COLUMNS.items() if field not in without}
    heads = "".join(f"<th>{title}</th>" for title in ("estimator", "layer", *columns.values()))
    lines = []
    for row in rows:
        cells = "".join(f"<td data-value='{row[f]!r}'>{_figure(row[f], row[f + '_se'])}</td>" for f in columns)
        names = "".join(f"<td>{html.escape(row[key])}</td>" for key in ("estimator", "layer"))
        lines.append(f"<tr>{names}{cells}</tr>")
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _figure(mean: float, error: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.3g}" if math.isnan(error) else f"{mean:.3g} <small>± {error:.1g}</small>"


def _png(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return base64.b64encode(file.getvalue()).decode()


STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em; }
img { max-width: 100%; } code { overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 12px; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ccc; padding: 2px 6px; text-align: right; white-space: nowrap; }
th { cursor: pointer; text-decoration: underline dotted; } small { color: #666; }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left; }
"""

SCRIPT = """
for (const th of document.querySelectorAll("th")) th.onclick = () => {
  const table = th.closest("table"), k = th.cellIndex, body = table.tBodies[0];
  const up = th.dataset.up !== "1";
  for (const other of table.querySelectorAll("th")) delete other.dataset.up;
  th.dataset.up = up ? "1" : "0";
  const value = (row) => {
    const cell = row.cells[k], number = Number(cell.dataset.value);
    return cell.dataset.value === undefined ? cell.textContent : Number.isNaN(number) ? -Infinity : number;
  };
  const order = (x, y) => x < y ? -1 : x > y ? 1 : 0;
  body.append(...[...body.rows].sort((x, y) => (up ? 1 : -1) * order(value(x), value(y))));
};
"""

PAGE = (
    "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title><style>{style}</style></head>\n"
    "<body>{body}<script>{script}</script></body></html>\n"
)
