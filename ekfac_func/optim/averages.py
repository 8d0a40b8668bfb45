"""Exponential averages of parameters."""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_decay, check_params
from ..types import Number, Params
from .transforms import check_like


class Average(NamedTuple):
    """The bias-corrected average so far, and the weight of what it has seen: 0 nothing, 1 all."""

    value: Params  # a tree like params, in float32 at least
    weight: Tensor  # []


class Averaging(NamedTuple):
    """A pair of pure functions: `init(params) -> state`, `update(params, state) -> (averaged params, state)`."""

    init: Callable[[Mapping[str, Tensor]], Average]
    update: Callable[[Mapping[str, Tensor], Average], tuple[Params, Average]]


def exponential_average(decay: Number) -> Averaging:
    """Averages of the parameters with weights `decay^age`, which sum to one from the first step on.

    Polyak & Juditsky 1992, https://doi.org/10.1137/0330046; the bias correction is that of Kingma & Ba 2015,
    https://arxiv.org/abs/1412.6980. The start that `init` reads for its shapes has no weight.

    decay: weight of the past in each step, 0 <= decay < 1.
    """
    check_decay("decay", decay)

    def init(params: Mapping[str, Tensor]) -> Average:
        check_params(params)
        value = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in params.items()
        }
        finest = functools.reduce(torch.promote_types, (v.dtype for v in value.values()))
        return Average(value, torch.zeros((), dtype=finest, device=next(iter(params.values())).device))

    def update(params: Mapping[str, Tensor], state: Average) -> tuple[Params, Average]:
        check_like(params, state.value, "state")
        weight = decay * state.weight + (1 - decay)
        share = (1 - decay) / weight
        value = {name: v + share.to(v.dtype) * (params[name].detach() - v) for name, v in state.value.items()}
        return {name: v.to(params[name].dtype) for name, v in value.items()}, Average(value, weight)

    return Averaging(init, update)


torch.serialization.add_safe_globals([Average])
