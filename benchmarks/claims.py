"""The claims of George et al. 2018, read from the records of studies: `python benchmarks/claims.py runs/*/records.csv`.

Errors are `||F - estimate||_F / ||F||_F`; an uncertainty is the standard error over the batches.
"""

import csv
import math
import statistics
import sys
from collections import defaultdict

Rows = list[dict[str, str]]


def mean(values: list[float]) -> str:
    """With its standard error, where there are several."""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{statistics.fmean(values):.3g} ± {statistics.stdev(values) / math.sqrt(len(values)):.1g}"


def errors(rows: Rows, *keys: str) -> dict[tuple[str, ...], list[float]]:
    """By these columns."""
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys)].append(float(row["fisher_error"]))
    return found


def basis_alone(rows: Rows) -> None:
    """The error that the stale basis leaves to a moment of all the data: the root of the share off its diagonal."""
    found = defaultdict(list)
    for row in rows:
        if (row["part"], row["layer"], row["estimator"]) == ("refresh", "all", "stale basis, fresh moment"):
            found[int(row["since_refresh"])].append(math.sqrt(float(row["off_diagonal"])))
    print(
        f"    {'stale basis, moment of all data':32} " + " | ".join(mean(values) for _, values in sorted(found.items()))
    )


def nearer(rows: Rows) -> None:
    """On how many layers at how many stages the exact moment is nearer to F than the eigenvalues' product."""
    for part in ("all data", "batches"):
        found = errors([row for row in rows if row["part"] == part], "stage", "layer", "estimator")
        pairs = [
            [exact - product for exact, product in zip(values, found[stage, layer, "kfac"], strict=True)]
            for (stage, layer, name), values in found.items()
            if name == "intra_batch" and layer != "all"
        ]
        # a batch for each value: sign of the mean difference, and whether it is beyond two standard errors
        better = sum(statistics.fmean(d) <= 1e-9 for d in pairs)
        clear = [d for d in pairs if len(d) > 1 and abs(statistics.fmean(d)) > 2 * statistics.stdev(d) / len(d) ** 0.5]
        worse = sum(statistics.fmean(d) > 0 for d in clear)
        print(f"  {part}: nearer or equal on {better} of {len(pairs)}; of {len(clear)} clear ones {worse} against")


def table(rows: Rows, part: str, along: str) -> None:
    """The whole model's errors, a line an estimator."""
    chosen = [row for row in rows if row["part"] == part and row["layer"] == "all"]
    columns = list(dict.fromkeys(row[along] for row in chosen))
    columns.sort(key=int)
    found = errors(chosen, "estimator", along)
    print(f"  {part}, by {along}: {', '.join(columns)}")
    for name in dict.fromkeys(row["estimator"] for row in chosen):
        figures = [mean(found[name, x]) if (name, x) in found else "-" for x in columns]
        print(f"    {name:32} " + " | ".join(figures))


for path in sys.argv[1:]:
    with open(path, newline="") as file:
        records = list(csv.DictReader(file))
    print(path)
    nearer(records)
    table(records, "all data", "stage")
    table(records, "batches", "stage")
    table(records, "refresh", "since_refresh")
    basis_alone(records)
