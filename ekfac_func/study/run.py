"""The study itself: train to a few stages, compare at each, and two closer looks at the middle one."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical
from torch.func import functional_call

from ..compare import ESTIMATORS, Estimator, Seen, compare
from ..fisher import exact, sampled
from ..records import Record
from ..second_moment import averaged_intra_batch, keep, kfac, reset, transport
from ..train.data import Data, Examples
from ..train.models import Task, loss_of, make
from ..train.run import TorchOptimizer, batches
from ..types import Params
from .settings import Settings

REFRESH_STEPS, REFRESH_EVERY = 12, 4  # of the look at stale bases
TRAINING_BATCH = 64


class Row(NamedTuple):
    """A record and its place: the part of the study, and the training steps before it."""

    part: str  # "batches", "all data", "batch size" or "refresh"
    stage: int
    record: Record


class Stage(NamedTuple):
    """The network at one stage."""

    steps: int
    loss: float  # on the examples that are compared on


class Study(NamedTuple):
    """All that was found."""

    settings: Settings
    stages: list[Stage]
    rows: list[Row]
    seen: list[tuple[int, Seen]]  # moments after the last batch, by the stage's steps

    def records(self, part: str, stage: int | None = None) -> list[Record]:
        """Of a part of the study, after so many training steps or at all stages."""
        return [row.record for row in self.rows if row.part == part and stage in (None, row.stage)]


class Unloadable(Exception):
    """The file to start from does not have the parameters of the model."""


def run(settings: Settings, data: Data) -> Study:
    """Train, compare and look closer. Everything random follows from the seed. Unloadable for a file of others."""
    torch.manual_seed(settings.seed)
    task = make(settings.model, data.train[0], settings.seed)
    if settings.load is not None:
        try:
            task.net.load_state_dict(torch.load(settings.load, weights_only=True), strict=True)
        except Exception as reason:  # of bytes at random the unpickler raises anything
            raise Unloadable(
                f"{settings.load} has no parameters of {settings.model} on {settings.data} ({type(reason).__name__}): "
                "give a dict of its tensors that torch.save wrote"
            ) from reason
    wanted = sorted({*settings.stages, *_trajectory_steps(settings)})
    points = dict(trained(task, data, settings, wanted))
    task.net.double()
    loss_fn, chosen = loss_of(task), estimators(task, settings)
    inputs, labels = (t[: settings.examples] for t in data.train)
    examples = inputs.double() if inputs.is_floating_point() else inputs, labels
    found = Study(settings, [], [], [])
    of_stage = cut(examples, settings.batch_size)

    def add(part: str, stage: int, params: Params | list[Params], of: list[Examples], **options: Any) -> None:
        records = compare(loss_fn, params, of, damping=settings.damping, **options)
        found.rows.extend(Row(part, stage, record) for record in records)

    for stage in settings.stages:

        def watch(seen: Seen, stage: int = stage) -> None:
            if seen.step == len(of_stage) - 1:
                found.seen.append((stage, seen))

        print(f"after {stage} training steps", flush=True)
        at = points[stage]
        add("batches", stage, at, of_stage, estimators=chosen, watch=watch, step_sizes=settings.step_sizes)
        add("all data", stage, at, [examples], estimators=WHOLE, step_sizes=())
        with torch.no_grad():
            outputs = functional_call(task.net, at, (examples[0],))
            loss = task.losses(outputs, *examples).mean().item()
        found.stages.append(Stage(stage, loss))

    stage = middle(settings)
    print(f"batch sizes and refreshes, after {stage} training steps", flush=True)
    for size in batch_sizes(settings):
        add("batch size", stage, points[stage], cut(examples, size), estimators=SIZED, step_sizes=())
    split = cut(examples, settings.refresh_batch)[:REFRESH_STEPS]
    trajectory = [points[step] for step in _trajectory_steps(settings)][: len(split)]
    add("refresh", stage, trajectory, split, estimators=REFRESHES, step_sizes=())
    return found


SIZED = {name: ESTIMATORS[name] for name in ("intra_batch", "kfac", "diagonal")}  # at batches of all sizes
WHOLE = {name: ESTIMATORS[name] for name in ("intra_batch", "kfac", "sua", "sua kfac", "diagonal")}  # of all data

_averaged = averaged_intra_batch(0.9)
REFRESHES = {
    "reset": Estimator(_averaged, basis_every=REFRESH_EVERY, at_refresh=reset),
    "keep": Estimator(_averaged, basis_every=REFRESH_EVERY, at_refresh=keep),
    "transport": Estimator(_averaged, basis_every=REFRESH_EVERY, at_refresh=transport),
    "stale basis, fresh moment": Estimator(basis_every=REFRESH_EVERY),
    "stale basis, stale eigenvalues": Estimator(kfac, basis_every=REFRESH_EVERY),
}
"""Estimators on a training trajectory, of which the basis is refreshed every few steps."""


def middle(settings: Settings) -> int:
    """The stage that is looked at more closely."""
    return settings.stages[len(settings.stages) // 2]


def batch_sizes(settings: Settings) -> list[int]:
    """From 16 to all the examples, about fourfold each time."""
    sizes = itertools.takewhile(lambda size: 2 * size <= settings.examples, (16 * 4**k for k in itertools.count()))
    return [*sizes, settings.examples]


def _trajectory_steps(settings: Settings) -> range:
    return range(middle(settings), middle(settings) + REFRESH_STEPS * settings.stride, settings.stride)


def trained(task: Task, data: Data, settings: Settings, wanted: list[int]) -> Iterator[tuple[int, Params]]:
    """Parameters in float64 after each wanted number of steps of AdamW."""
    given = batches(data.train, min(TRAINING_BATCH, len(data.train[0])), wanted[-1], settings.seed)
    trainer = TorchOptimizer(task, lambda p: torch.optim.AdamW(p, lr=settings.lr))
    if 0 in wanted:
        yield 0, _double(trainer.params)
    for step, batch in enumerate(given, 1):
        trainer.step(batch)
        if step in wanted:
            yield step, _double(trainer.params)


def _double(params: Params) -> Params:
    return {name: p.detach().to(torch.float64, copy=True) for name, p in params.items()}


def cut(examples: Examples, size: int) -> list[Examples]:
    """Batches of one size, the last one with what is left."""
    return list(zip(examples[0].split(size), examples[1].split(size), strict=True))


def estimators(task: Task, settings: Settings) -> dict[str, Estimator]:
    """Those of the settings; the Fishers by the likelihood whose negative logarithm is the task's loss."""

    def model(params: Params, example: Any) -> Tensor:
        return functional_call(task.net, params, (example[0][None],))[0]

    def likelihood(outputs: Tensor) -> Any:
        return Categorical(logits=outputs) if task.classifies else Bernoulli(logits=outputs)

    table = {
        **ESTIMATORS,
        "sampled": Estimator(fisher=sampled(model, likelihood)),
        "exact": Estimator(fisher=exact(model, likelihood)),
    }
    return {name: table[name] for name in settings.estimators}
