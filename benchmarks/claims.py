"""The claims of George et al. 2018, from a study: `python benchmarks/claims.py runs/cnn-*/records.csv`.

Errors are `||F - estimate||_F / ||F||_F`. Of several seeds a figure is the mean over them of each one's mean over the
batches, its uncertainty the standard error over the seeds; of one seed that over the batches.
"""

import csv
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable

Row = dict[str, str]
Rows = list[Row]
Figure = Callable[[Row], float]


def error(row: Row) -> float:
    return float(row["fisher_error"])


def left_by_the_basis(row: Row) -> float:
    """The error of a moment of all the data in the same basis: the root of the share off its diagonal."""
    return math.sqrt(float(row["off_diagonal"]))


def mean(seeds: list[Rows], figure: Figure, **wanted: str) -> str:
    """Of the rows with the wanted columns, with its standard error where there is one."""
    chosen = [[figure(row) for row in rows if wanted.items() <= row.items()] for rows in seeds]
    values = [statistics.fmean(of_seed) for of_seed in chosen if of_seed] if len(seeds) > 1 else chosen[0]
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{statistics.fmean(values):.3g} ± {statistics.stdev(values) / math.sqrt(len(values)):.1g}"


def column(seeds: list[Rows], name: str, part: str) -> list[str]:
    """The values of a column in a part of the study, numbers in rising order."""
    values = list(dict.fromkeys(row[name] for rows in seeds for row in rows if row["part"] == part))
    return sorted(values, key=int) if all(value.isdigit() for value in values) else values


def nearer(rows: Rows) -> None:
    """On how many layers at how many stages the exact moment is nearer to F than the eigenvalues' product."""
    for part in ("all data", "batches"):
        found = defaultdict(list)
        for row in rows:
            if row["part"] == part and row["layer"] != "all":
                found[row["stage"], row["layer"], row["estimator"]].append(error(row))
        pairs = [
            [exact - product for exact, product in zip(values, found[stage, layer, "kfac"], strict=True)]
            for (stage, layer, name), values in found.items()
            if name == "intra_batch"
        ]
        # a batch for each value: sign of the mean difference, and whether it is beyond two standard errors
        better = sum(statistics.fmean(d) <= 1e-9 for d in pairs)
        clear = [d for d in pairs if len(d) > 1 and abs(statistics.fmean(d)) > 2 * statistics.stdev(d) / len(d) ** 0.5]
        worse = sum(statistics.fmean(d) > 0 for d in clear)
        print(f"  {part}: nearer or equal on {better} of {len(pairs)}; of {len(clear)} clear ones {worse} against")


def table(seeds: list[Rows], part: str, along: str, layer: str = "all") -> None:
    """Errors of one layer, or of the whole model, a line an estimator."""
    columns = column(seeds, along, part)
    print(f"  {part}, {layer}, by {along}: {', '.join(columns)}")
    for name in column(seeds, "estimator", part):
        wanted = {"part": part, "layer": layer, "estimator": name}
        print(f"    {name:32} " + " | ".join(mean(seeds, error, **wanted, **{along: x}) for x in columns))


def differs(seeds: list[Rows], layer: str) -> bool:
    """Whether SUA is another approximation of this layer than the full factors: whether it is a convolution."""
    wanted = {"part": "all data", "layer": layer}
    full, sua = (mean(seeds, error, **wanted, estimator=name) for name in ("intra_batch", "sua"))
    return full not in ("-", sua)


def main(paths: list[str]) -> None:
    seeds = []
    for path in paths:
        with open(path, newline="") as file:
            seeds.append(list(csv.DictReader(file)))
        print(path)
        nearer(seeds[-1])
    table(seeds, "all data", "stage")
    table(seeds, "batches", "stage")
    for layer in column(seeds, "layer", "all data"):
        if layer != "all" and differs(seeds, layer):
            table(seeds, "all data", "stage", layer)
    table(seeds, "refresh", "since_refresh")
    fresh = {"part": "refresh", "layer": "all", "estimator": "stale basis, fresh moment"}
    since = column(seeds, "since_refresh", "refresh")
    figures = (mean(seeds, left_by_the_basis, **fresh, since_refresh=x) for x in since)
    print(f"    {'stale basis, moment of all data':32} " + " | ".join(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
