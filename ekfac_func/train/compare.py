"""EKFAC, SGD with momentum and AdamW on the same task: same steps, same batches, same start."""

import csv
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checkpoint
from .data import Data
from .models import Task
from .run import Curve, NaturalGradient, Point, Progress, TorchOptimizer, Trainer, batches, record
from .settings import SECOND_MOMENTS, Settings


class OtherRun(Exception):
    """The checkpoint is of other options."""


class Files(NamedTuple):
    """What a comparison writes while it runs."""

    checkpoint: Path
    metrics: Path
    about: dict[str, Any]  # the options that a checkpoint must agree with
    metrics_every: int  # steps; 0 for none
    checkpoint_every: int  # steps
    restart: bool


def compare(
    task: Task,
    data: Data,
    settings: Settings,
    second_moment: str,
    decay: float,
    seed: int,
    compiled: bool,
    files: Files,
) -> list[Curve]:
    """One curve for each optimizer. Goes on from a checkpoint that is there, which stays for the caller to delete.

    OtherRun where the checkpoint is of other options; `checkpoint.Interrupted` after Ctrl-C.
    """
    s = settings
    trainers: dict[str, Callable[[], Trainer]] = {
        "EKFAC": lambda: NaturalGradient(
            task,
            lr=s.lr,
            momentum_decay=s.momentum,
            damping=s.damping,
            exponent=s.exponent,
            basis_every=s.basis_every,
            second_moment=SECOND_MOMENTS[second_moment](decay),
            compiled=compiled,
        ),
        "SGD": lambda: TorchOptimizer(task, lambda p: torch.optim.SGD(p, lr=s.sgd_lr, momentum=s.sgd_momentum)),
        "AdamW": lambda: TorchOptimizer(task, lambda p: torch.optim.AdamW(p, lr=s.adamw_lr)),
    }
    saved = _saved(files)
    if not saved["reached"]:
        files.checkpoint.unlink(missing_ok=True)  # before its metrics are written over
    reached = {
        name: Progress(step, seconds, [Point(*p) for p in points])
        for name, (step, seconds, points) in saved["reached"].items()
    }
    with files.metrics.open("r+" if saved["reached"] else "w", newline="") as table, checkpoint.interruptible() as stop:
        table.seek(saved["metrics_bytes"])
        table.truncate()
        rows = csv.writer(table)
        if not saved["reached"]:
            rows.writerow(["optimizer", "step", "metric", "value"])

        for name, make in trainers.items():
            before = reached.get(name)
            if before is not None and name != saved["training"]:
                continue
            trainer = make()
            if before is not None:
                trainer.load_state_dict(saved["trainer"])

            def save(now: Progress, name: str = name, trainer: Trainer = trainer) -> None:
                reached[name] = now
                table.flush()
                os.fsync(table.fileno())
                tree = {
                    "about": files.about,
                    "reached": {
                        name: [at.step, at.seconds, [list(point) for point in at.points]]
                        for name, at in reached.items()
                    },
                    "training": name,
                    "trainer": trainer.state_dict(),
                    "metrics_bytes": table.tell(),
                }
                checkpoint.write(files.checkpoint, tree)

            def after_step(now: Progress, loss: Tensor, name: str = name, trainer: Trainer = trainer) -> None:
                if files.metrics_every and now.step % files.metrics_every == 0:
                    plotted = {"loss": loss, **trainer.metrics()}
                    rows.writerows([name, now.step, metric, value.item()] for metric, value in plotted.items())
                    table.flush()
                if not math.isfinite(loss.item()):  # the end of this training, from which nothing goes on
                    return
                if stop.up or now.step % files.checkpoint_every == 0:
                    save(now)
                if stop.up:
                    raise checkpoint.Interrupted(
                        f"stopped after {now.step} steps of {name}: {files.checkpoint} is there to go on from, by the "
                        "same command"
                    )

            given = batches(data.train, s.batch_size, s.steps, seed, start=0 if before is None else before.step)
            reached[name] = record(name, trainer, given, s.steps, task, data, before, after_step)
    return [Curve(name, reached[name].points) for name in trainers]


def _saved(files: Files) -> dict[str, Any]:
    """The checkpoint, or the start."""
    saved = None if files.restart else checkpoint.read(files.checkpoint)
    if saved is None:
        return {"reached": {}, "training": None, "trainer": None, "metrics_bytes": 0}
    if not isinstance(saved, dict) or not {"about", "reached", "training", "trainer", "metrics_bytes"} <= saved.keys():
        raise OtherRun(f"{files.checkpoint} is no checkpoint of this command: give --restart, or another directory")
    for key, value in files.about.items():
        if saved["about"].get(key) != value:
            raise OtherRun(
                f"{files.checkpoint} is of a run with {key} {saved['about'].get(key)}, here it is {value}: give that, "
                "--restart, or another directory"
            )
    if not files.metrics.exists() or files.metrics.stat().st_size < saved["metrics_bytes"]:
        raise OtherRun(f"{files.metrics} is not what {files.checkpoint} goes on from: give --restart")
    return dict(saved)
