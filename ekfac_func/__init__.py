"""Natural gradients from exact per-example gradients, as pure functions on `torch.func`."""

from . import optim
from .contraction import exact_sums, gradient_sums
from .optim import EKFACOptimizer, set_grads
from .per_example import PerExampleGradients, per_example_gradients
from .precondition import EKFAC, Damping, ekfac
from .rules import RULES, SUA, Call, Rule, Rules, conv, conv_sua, linear
from .second_moment import (
    SecondMoment,
    averaged_intra_batch,
    intra_batch,
    keep,
    kfac,
    moving_average,
    reset,
    running_average,
    transport,
)
from .types import Basis, Dense, Factored, Factors, Info, Layer, Moment, State, Sums

__all__ = [
    "EKFAC",
    "RULES",
    "SUA",
    "Basis",
    "Call",
    "Damping",
    "Dense",
    "EKFACOptimizer",
    "Factored",
    "Factors",
    "Info",
    "Layer",
    "Moment",
    "PerExampleGradients",
    "Rule",
    "Rules",
    "SecondMoment",
    "State",
    "Sums",
    "averaged_intra_batch",
    "conv",
    "conv_sua",
    "ekfac",
    "exact_sums",
    "gradient_sums",
    "intra_batch",
    "keep",
    "kfac",
    "linear",
    "moving_average",
    "optim",
    "per_example_gradients",
    "reset",
    "running_average",
    "set_grads",
    "transport",
]
