"""Schedules: functions of the step, a 0-d integer tensor, so that a compiled step needs one graph for all of them."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..checks import check_count
from ..types import Number

Schedule = Callable[[Tensor], Tensor]
"""(step [], from 0) -> value []"""


def constant(value: Number) -> Schedule:
    """The same value at every step."""
    return lambda step: value + 0.0 * _real(step)


def cosine(start: Number, steps: int, end: Number = 0.0) -> Schedule:
    """Half a cosine from start, at step 0, to end, at `steps` and after.

    Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983, without restarts; `CosineAnnealingLR` of torch up to
    its last step.
    """
    check_count("steps", steps)
    return lambda step: end + (start - end) * (1 + torch.cos(math.pi * (_real(step) / steps).clamp(max=1))) / 2


def warm_up(steps: int, schedule: Schedule) -> Schedule:
    """A straight line to the schedule's first value, `1 / steps` of it at step 0, then the schedule from its step 0.

    `LinearLR(start_factor=1 / steps, total_iters=steps - 1)` of torch, in sequence.
    """
    check_count("steps", steps)
    if not callable(schedule):
        raise TypeError(f"schedule={schedule!r} is no function of the step: give constant(value), cosine(start, steps)")

    def warmed(step: Tensor) -> Tensor:
        return ((_real(step) + 1) / steps).clamp(max=1) * schedule((torch.as_tensor(step) - steps).clamp(min=0))

    return warmed


def value_at(value: Number | Schedule, step: Tensor) -> Number:
    """A schedule's value at the step; a number as it is."""
    return value(step) if callable(value) else value


def _real(step: Tensor) -> Tensor:
    """In float32 at least, whatever the default dtype is."""
    if isinstance(step, Mapping):
        raise TypeError(
            "a schedule was called with a dict, as a damping rule is: give damping=schedule(step), its value"
        )
    return torch.as_tensor(step).to(torch.promote_types(torch.get_default_dtype(), torch.float32))
