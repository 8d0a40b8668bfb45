"""EKFAC, SGD with momentum and AdamW on the same task: same steps, same batches, same start."""

from collections.abc import Iterator

import torch

from .data import Data, Examples
from .models import Task
from .run import Curve, batches, natural_gradient_steps, record, torch_steps
from .settings import Settings, estimator


def compare(
    task: Task, data: Data, settings: Settings, second_moment: str, decay: float, seed: int, compiled: bool
) -> list[Curve]:
    """One curve for each optimizer."""
    s = settings

    def given() -> Iterator[Examples]:
        return batches(data.train, s.batch_size, s.steps, seed)

    steps = {
        "EKFAC": natural_gradient_steps(
            task,
            given(),
            lr=s.lr,
            momentum=s.momentum,
            damping=s.damping,
            basis_every=s.basis_every,
            second_moment=estimator(second_moment, decay),
            compiled=compiled,
        ),
        "SGD": torch_steps(task, given(), lambda p: torch.optim.SGD(p, lr=s.sgd_lr, momentum=s.sgd_momentum)),
        "AdamW": torch_steps(task, given(), lambda p: torch.optim.AdamW(p, lr=s.adamw_lr)),
    }
    return [record(name, taken, s.steps, task, data) for name, taken in steps.items()]
