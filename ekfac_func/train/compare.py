"""EKFAC, SGD with momentum and AdamW on the same task: same steps, same batches, same start."""

import csv
import math
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from ..optim import momentum
from ..second_moment import SecondMoment
from . import checkpoint
from .data import Data
from .models import Task
from .run import NaturalGradient, Point, Progress, TorchOptimizer, Trainer, batches, record
from .settings import Settings


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
    second_moment: SecondMoment,
    seed: int,
    compiled: bool,
    files: Files,
) -> dict[str, list[Point]]:
    """The points of each optimizer. Goes on from a checkpoint that is there, which stays for the caller to delete.

    `checkpoint.Unusable` where the checkpoint is of other options; `checkpoint.Interrupted` after Ctrl-C.
    """
    s = settings
    trainers: dict[str, Callable[[], Trainer]] = {
        "EKFAC": lambda: NaturalGradient(
            task,
            momentum(s.momentum),
            s.lr,
            compiled=compiled,
            damping=s.damping,
            exponent=s.exponent,
            basis_every=s.basis_every,
            second_moment=second_moment,
        ),
        "SGD": lambda: TorchOptimizer(task, lambda p: torch.optim.SGD(p, lr=s.sgd_lr, momentum=s.sgd_momentum)),
        "AdamW": lambda: TorchOptimizer(task, lambda p: torch.optim.AdamW(p, lr=s.adamw_lr)),
    }
    saved = _saved(files)
    reached = {
        name: Progress(step, seconds, [Point(*p) for p in points])
        for name, (step, seconds, points) in saved["reached"].items()
    }
    if not reached:
        files.checkpoint.unlink(missing_ok=True)  # before its metrics are written over
    with files.metrics.open("r+" if reached else "w", newline="") as table, checkpoint.interruptible() as stop:
        table.seek(saved["metrics_bytes"])
        table.truncate()
        if not reached:
            csv.writer(table).writerow(["optimizer", "step", "metric", "value"])
        for name, make in trainers.items():
            before = reached.get(name)
            if before is not None and name != saved["training"]:
                continue
            trainer = make()
            if before is not None:
                trainer.load_state_dict(saved["trainer"])
            given = batches(data.train, s.batch_size, s.steps, seed, start=0 if before is None else before.step)
            after_step = _Written(name, trainer, reached, files, table, stop).after_step
            reached[name] = record(name, trainer, given, s.steps, task, data, before, after_step)
    return {name: reached[name].points for name in trainers}


class _Written(NamedTuple):
    """What a training leaves in the files while it runs."""

    name: str
    trainer: Trainer
    reached: dict[str, Progress]  # of all trainings
    files: Files
    table: TextIO  # of metrics
    stop: Event

    def after_step(self, now: Progress, loss: Tensor) -> None:
        """Metrics and a checkpoint where they are due. `checkpoint.Interrupted` after Ctrl-C."""
        if self.files.metrics_every and now.step % self.files.metrics_every == 0:
            plotted = {"loss": loss, **self.trainer.metrics()}
            rows = ([self.name, now.step, metric, value.item()] for metric, value in plotted.items())
            csv.writer(self.table).writerows(rows)
            self.table.flush()
        if not math.isfinite(loss.item()):  # the end of this training, from which nothing goes on
            return
        if self.stop.is_set() or now.step % self.files.checkpoint_every == 0:
            self._save(now)
        if self.stop.is_set():
            raise checkpoint.Interrupted(
                f"stopped after {now.step} steps of {self.name}: {self.files.checkpoint} is there to go on from, by "
                "the same command"
            )

    def _save(self, now: Progress) -> None:
        self.reached[self.name] = now
        self.table.flush()
        os.fsync(self.table.fileno())
        tree = {
            "about": self.files.about,
            "reached": {
                name: [at.step, at.seconds, [list(point) for point in at.points]] for name, at in self.reached.items()
            },
            "training": self.name,
            "trainer": self.trainer.state_dict(),
            "metrics_bytes": self.table.tell(),
        }
        checkpoint.write(self.files.checkpoint, tree)


START: dict[str, Any] = {"reached": {}, "training": None, "trainer": None, "metrics_bytes": 0}


def _saved(files: Files) -> dict[str, Any]:
    """The checkpoint, or the start."""
    saved = None if files.restart else checkpoint.read(files.checkpoint)
    if saved is None:
        return START
    if not isinstance(saved, dict) or not {"about", *START} <= saved.keys():
        raise checkpoint.Unusable(
            f"{files.checkpoint} is no checkpoint of this command: give --restart, or another directory"
        )
    for key, value in files.about.items():
        if saved["about"].get(key) != value:
            raise checkpoint.Unusable(
                f"{files.checkpoint} is of a run with {key} {saved['about'].get(key)}, here it is {value}: give that, "
                "--restart, or another directory"
            )
    if not files.metrics.exists() or files.metrics.stat().st_size < saved["metrics_bytes"]:
        raise checkpoint.Unusable(f"{files.metrics} is not what {files.checkpoint} goes on from: give --restart")
    return dict(saved)
