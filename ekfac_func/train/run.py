"""Training: optimizers with one face, and the loop that steps, evaluates, logs and saves."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from tqdm import tqdm

from ..optim import Transform, apply_updates, chain, learning_rate, metrics
from ..precondition import ekfac
from ..types import Info, Params, State
from .data import Data, Examples
from .models import Task, loss_of


class Point(NamedTuple):
    """What is known after a number of steps; the seconds are those of the steps alone."""

    step: int
    seconds: float
    train_loss: float
    test_loss: float
    test_accuracy: float | None


def batches(examples: Examples, batch_size: int, steps: int, seed: int, start: int = 0) -> Iterator[Examples]:
    """Batches of one size, every epoch in a new order of the seed; what does not fill a batch is left out.

    Those before `start` are passed over.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = examples
    given = 0
    while True:
        for index in torch.randperm(len(images), generator=generator).split(batch_size):
            if given == steps:
                return
            if len(index) == batch_size:
                given += 1
                if given > start:
                    yield images[index], labels[index]


class Trainer(Protocol):
    """An optimizer and the parameters that it trains."""

    @property
    def params(self) -> Params: ...

    def step(self, batch: Examples) -> Tensor:
        """One step; the batch's loss before it."""
        ...

    def metrics(self) -> dict[str, Tensor]:
        """What there is to plot of the last step beside its loss."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, saved: dict[str, Any]) -> None: ...


class NaturalGradient:
    """Steps along the natural gradient of `ekfac`, accumulated by a velocity. The task's own network stays as it is.

    velocity: such as `optim.momentum(0.9)`. options: of `ekfac`, `basis_every` among them.
    """

    def __init__(self, task: Task, velocity: Transform, lr: float, *, compiled: bool = False, **options: Any) -> None:
        self._ekfac = ekfac(loss_of(task), **options)
        self._precondition = (
            torch.compile(self._ekfac.precondition, fullgraph=True) if compiled else self._ekfac.precondition
        )
        self._optimizer = chain(velocity, learning_rate(lr))
        self._lr, self._basis_every = lr, options["basis_every"]
        self.params: Params = {name: p.detach() for name, p in task.net.named_parameters()}
        self._opt_state = self._optimizer.init(self.params)
        self._state: State | None = None
        self._last: tuple[Params, Info] | None = None

    def step(self, batch: Examples) -> Tensor:
        state = self._ekfac.init(self.params, batch) if self._state is None else self._state
        natural, self._state, info = self._precondition(self.params, batch, state)
        updates, self._opt_state = self._optimizer.update(natural, self._opt_state, self.params, info)
        self.params = apply_updates(self.params, updates)
        self._last = natural, info
        return info.loss

    def metrics(self) -> dict[str, Tensor]:
        assert self._last is not None
        assert self._state is not None
        return metrics(*self._last, self._state, learning_rate=self._lr, basis_every=self._basis_every)

    def state_dict(self) -> dict[str, Any]:
        return {"params": self.params, "optimizer": self._opt_state, "ekfac": self._state}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        device = next(iter(self.params.values())).device
        on_device = pytree.tree_map(lambda t: t.to(device), saved)
        self.params, self._opt_state, self._state = (on_device[key] for key in ("params", "optimizer", "ekfac"))


class TorchOptimizer:
    """An optimizer of `torch.optim` on a copy of the task's network."""

    def __init__(self, task: Task, make: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]) -> None:
        self._task, self._net = task, copy.deepcopy(task.net)
        self._optimizer = make(self._net.parameters())

    @property
    def params(self) -> Params:
        return dict(self._net.named_parameters())

    def step(self, batch: Examples) -> Tensor:
        images, labels = batch
        self._optimizer.zero_grad()
        loss = self._task.losses(self._net(images), images, labels).mean()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def metrics(self) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"net": self._net.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._net.load_state_dict(saved["net"])
        self._optimizer.load_state_dict(saved["optimizer"])


class Progress(NamedTuple):
    """How far one optimizer is; the seconds are those of the steps alone."""

    step: int
    seconds: float
    points: list[Point]  # the first before any step


POINTS = 20  # evaluations after the first


def record(
    name: str,
    trainer: Trainer,
    given: Iterator[Examples],
    total: int,
    task: Task,
    data: Data,
    before: Progress | None,
    after_step: Callable[[Progress, Tensor], None],
) -> Progress:
    """Take the steps behind a progress bar and evaluate at evenly spaced ones; stops at a loss that is not finite.

    before: where an interrupted training stood; `given` and `trainer` go on from there.
    after_step: called after each step with the progress and the batch's loss.
    """
    marks = {math.ceil(total * k / POINTS) for k in range(1, POINTS + 1)}
    now = before or Progress(0, 0.0, [evaluate(task, trainer.params, data, 0, 0.0)])
    with tqdm(total=total, initial=now.step, desc=f"{name:>8}", unit="step", dynamic_ncols=True) as bar:
        for batch in given:
            started = time.perf_counter()
            loss = trainer.step(batch)
            value = loss.item()  # waits for the device
            step, seconds, finite = now.step + 1, now.seconds + time.perf_counter() - started, math.isfinite(value)
            bar.set_postfix(loss=f"{value:.4g}", refresh=False)
            bar.update()
            seen = [evaluate(task, trainer.params, data, step, seconds)] if step in marks or not finite else []
            now = Progress(step, seconds, [*now.points, *seen])
            after_step(now, loss)
            if not finite:
                break
    return now


@torch.no_grad()
def evaluate(task: Task, params: Params, data: Data, step: int, seconds: float) -> Point:
    """Mean losses on all training and all test examples, and the share of test labels that are right."""
    train_loss, _ = _mean_loss(task, params, data.train)
    return Point(step, seconds, train_loss, *_mean_loss(task, params, data.test))


def _mean_loss(task: Task, params: Params, examples: Examples) -> tuple[float, float | None]:
    images, labels = examples
    outputs = functional_call(task.net, params, (images,))
    right = (outputs.argmax(1) == labels).double().mean().item() if task.classifies else None
    return task.losses(outputs, images, labels).mean().item(), right
