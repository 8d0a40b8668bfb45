"""Natural gradients from exact per-example gradients, as pure functions on `torch.func`."""

from .contraction import exact_sums, gradient_sums
from .fisher import Fisher, empirical, exact, gradient, sampled
from .per_example import PerExampleGradients, per_example_gradients
from .precondition import EKFAC, ekfac
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
    "Dense",
    "Factored",
    "Factors",
    "Fisher",
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
    "empirical",
    "exact",
    "exact_sums",
    "gradient",
    "gradient_sums",
    "intra_batch",
    "keep",
    "kfac",
    "linear",
    "moving_average",
    "per_example_gradients",
    "reset",
    "running_average",
    "sampled",
    "transport",
]
