"""EKFAC against SGD with momentum (and AdamW) per step, each tuned by a grid of the same number of short runs.

    python benchmarks/autoencoder.py                               # the deep autoencoder on MNIST
    python benchmarks/autoencoder.py --quick                       # a smoke run
    python benchmarks/autoencoder.py --data digits --model cnn     # where the defaults of `train` come from

The setting with the lowest training loss after the short runs is run longer, from other seeds (start, batches and
split). Writes runs/grid-DATA-MODEL.json.
"""

import argparse
import functools
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ekfac_func import intra_batch
from ekfac_func.train import data as images
from ekfac_func.train import models
from ekfac_func.train.report import table
from ekfac_func.train.run import Curve, Steps, batches, natural_gradient_steps, record, torch_steps
from ekfac_func.train.settings import DATA, DEFAULTS, MODELS

Grid = dict[str, tuple[float, ...]]  # values by the name of the option

GRIDS: dict[tuple[str, str], dict[str, Grid]] = {
    ("mnist", "autoencoder"): {
        "EKFAC": {"lr": (0.03, 0.1, 0.3), "damping": (3.0, 10.0, 30.0, 100.0)},
        "SGD": {"lr": (3e-4, 1e-3, 3e-3, 1e-2), "momentum": (0.8, 0.9, 0.95)},
        "AdamW": {"lr": (3e-4, 1e-3, 3e-3, 1e-2), "weight_decay": (0.0, 0.01, 0.1)},
    },
    ("digits", "autoencoder"): {
        "EKFAC": {"lr": (0.03, 0.1, 0.3), "damping": (1.0, 3.0, 10.0, 30.0)},
        "SGD": {"lr": (1e-3, 3e-3, 1e-2, 3e-2), "momentum": (0.8, 0.9, 0.95)},
        "AdamW": {"lr": (1e-3, 3e-3, 1e-2, 3e-2), "weight_decay": (0.0, 0.01, 0.1)},
    },
}
CLASSIFICATION: dict[str, Grid] = {
    "EKFAC": {"lr": (0.03, 0.1, 0.3), "damping": (0.1, 0.3, 1.0, 3.0)},
    "SGD": {"lr": (0.01, 0.03, 0.1, 0.3), "momentum": (0.8, 0.9, 0.95)},
    "AdamW": {"lr": (1e-3, 3e-3, 1e-2, 3e-2), "weight_decay": (0.0, 0.01, 0.1)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="mnist")
    parser.add_argument("--model", choices=MODELS, default="autoencoder")
    parser.add_argument("--short", type=int, default=100, help="steps of each setting of the grid")
    parser.add_argument("--long", type=int, default=400, help="steps of the chosen settings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the long runs; the grid has seed 0")
    parser.add_argument("--quick", action="store_true", help="two settings each, three steps, one seed")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more are slower on a machine in other use")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    short, long, seeds = (3, 3, [1]) if options.quick else (options.short, options.long, options.seeds)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # products of small gradients and activations; they made a step up to 9 times slower

    started = time.perf_counter()
    grids = GRIDS.get((options.data, options.model), CLASSIFICATION)
    tried = {name: search(options.data, options.model, name, grids[name], short, options.quick) for name in grids}
    chosen = {name: min(rows, key=lambda row: final_loss(row[1]))[0] for name, rows in tried.items()}
    for name, rows in tried.items():
        print_grid(name, rows, chosen[name], grids[name], short)

    longer: dict[int, list[Curve]] = {}
    for seed in seeds:
        longer[seed] = [run(options.data, options.model, name, chosen[name], long, seed) for name in grids]
        print(f"\nseed {seed}, the chosen settings for {long} steps")
        print(table(longer[seed]))
    print(
        f"\n{time.perf_counter() - started:.0f} s in all, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"grid-{options.data}-{options.model}.json"
    report = {
        "grid": {
            name: [{**row[0], "training loss": final_loss(row[1])} for row in rows] for name, rows in tried.items()
        },
        "chosen": chosen,
        "long": {
            seed: {curve.name: [point._asdict() for point in curve.points] for curve in curves}
            for seed, curves in longer.items()
        },
    }
    path.write_text(json.dumps(report, indent=1))
    print(f"wrote {path}")


def search(
    data: str, model: str, name: str, grid: Grid, steps: int, quick: bool
) -> list[tuple[dict[str, float], Curve]]:
    """A short run of every setting of the grid."""
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [(setting, run(data, model, name, setting, steps, seed=0)) for setting in settings[: 2 if quick else None]]


def run(data: str, model: str, name: str, setting: dict[str, float], steps: int, seed: int) -> Curve:
    """One optimizer with one setting."""
    loaded = load(data, seed)
    task = models.make(model, loaded.train[0], seed)
    default = DEFAULTS[data, model]
    given = batches(loaded.train, default.batch_size, steps, seed)
    start: dict[str, Callable[[], Steps]] = {
        "EKFAC": lambda: natural_gradient_steps(
            task,
            given,
            lr=setting["lr"],
            damping=setting["damping"],
            momentum=default.momentum,
            basis_every=default.basis_every,
            second_moment=intra_batch,
        ),
        "SGD": lambda: torch_steps(
            task, given, lambda p: torch.optim.SGD(p, lr=setting["lr"], momentum=setting["momentum"])
        ),
        "AdamW": lambda: torch_steps(
            task, given, lambda p: torch.optim.AdamW(p, lr=setting["lr"], weight_decay=setting["weight_decay"])
        ),
    }
    return record(name, start[name](), steps, task, loaded)


@functools.cache
def load(data: str, seed: int) -> images.Data:
    return images.load(data, seed)


def final_loss(curve: Curve) -> float:
    """The training loss at the end; a run that diverged is never chosen."""
    loss = curve.points[-1].train_loss
    return loss if math.isfinite(loss) else math.inf


def print_grid(
    name: str, rows: list[tuple[dict[str, float], Curve]], chosen: dict[str, float], grid: Grid, steps: int
) -> None:
    """Training loss of each setting, and a word where the best one lies at the edge of the grid."""
    print(f"\n{name}, training loss after {steps} steps")
    for setting, curve in rows:
        values = "  ".join(f"{key} {value:<8g}" for key, value in setting.items())
        print(f"  {values} {final_loss(curve):10.4g}{'  chosen' if setting == chosen else ''}")
    for key, allowed in grid.items():
        if chosen[key] in (allowed[0], allowed[-1]):
            print(f"  the chosen {key} {chosen[key]:g} is at the edge of its grid")


if __name__ == "__main__":
    main()
