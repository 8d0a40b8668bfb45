"""Training loops: each is an iterator of (loss of the batch, parameters after the step)."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from ..precondition import ekfac
from ..second_moment import SecondMoment
from ..types import Params
from .data import Data, Examples
from .models import Task, loss_of

Steps = Iterator[tuple[Tensor, Params]]


class Point(NamedTuple):
    """What is known after a number of steps; the seconds are those of the steps alone."""

    step: int
    seconds: float
    train_loss: float
    test_loss: float
    test_accuracy: float | None


class Curve(NamedTuple):
    """One optimizer's points, the first before any step."""

    name: str
    points: list[Point]


def batches(examples: Examples, batch_size: int, steps: int, seed: int) -> Iterator[Examples]:
    """Batches of one size, every epoch in a new order of the seed; what does not fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = examples
    given = 0
    while True:
        for index in torch.randperm(len(images), generator=generator).split(batch_size):
            if given == steps:
                return
            if len(index) == batch_size:
                given += 1
                yield images[index], labels[index]


def heavy_ball(velocity: Params, direction: Params, momentum: float) -> Params:
    """`velocity <- momentum velocity + direction`."""
    return {name: momentum * v + direction[name] for name, v in velocity.items()}


def natural_gradient_steps(
    task: Task,
    given: Iterable[Examples],
    *,
    lr: float,
    momentum: float,
    damping: float,
    basis_every: int,
    second_moment: SecondMoment,
    compiled: bool = False,
) -> Steps:
    """Heavy-ball momentum on the natural gradient of `ekfac`. The task's own network stays as it is."""
    optimizer = ekfac(loss_of(task), damping=damping, basis_every=basis_every, second_moment=second_moment)
    precondition = torch.compile(optimizer.precondition, fullgraph=True) if compiled else optimizer.precondition
    params = {name: p.detach() for name, p in task.net.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in params.items()}
    state = None
    for batch in given:
        state = optimizer.init(params, batch) if state is None else state
        natural, state, info = precondition(params, batch, state)
        velocity = heavy_ball(velocity, natural, momentum)
        params = {name: p - lr * velocity[name] for name, p in params.items()}
        yield info.loss, params


def torch_steps(
    task: Task, given: Iterable[Examples], make: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
) -> Steps:
    """An optimizer of `torch.optim` on a copy of the task's network."""
    net = copy.deepcopy(task.net)
    optimizer = make(net.parameters())
    for images, labels in given:
        optimizer.zero_grad()
        loss = task.losses(net(images), images, labels).mean()
        loss.backward()
        optimizer.step()
        yield loss.detach(), dict(net.named_parameters())


def record(name: str, steps: Steps, total: int, task: Task, data: Data, points: int = 20) -> Curve:
    """Take the steps behind a progress bar and evaluate at evenly spaced ones; stops at a loss that is not finite."""
    marks = {math.ceil(total * k / points) for k in range(1, points + 1)}
    curve = Curve(name, [evaluate(task, dict(task.net.named_parameters()), data, 0, 0.0)])
    seconds, started = 0.0, time.perf_counter()
    with tqdm(total=total, desc=f"{name:>8}", unit="step", dynamic_ncols=True) as bar:
        for step, (loss, params) in enumerate(steps, 1):
            value = loss.item()  # waits for the device
            seconds += time.perf_counter() - started
            bar.set_postfix(loss=f"{value:.4g}", refresh=False)
            bar.update()
            if step in marks or not math.isfinite(value):
                curve.points.append(evaluate(task, params, data, step, seconds))
            if not math.isfinite(value):
                break
            started = time.perf_counter()
    return curve


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
