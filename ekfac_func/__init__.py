"""Natural gradients from exact per-example gradients, as pure functions on `torch.func`."""

from . import optim
from .basis import DIAGONAL, FULL, Blocks, Choices, blocks
from .contraction import exact_sums, gradient_sums
from .describe import Description, Row, describe
from .kronecker import WeightSharing, expand, reduce
from .optim import EKFACOptimizer, set_grads
from .per_example import PerExampleGradients, per_example_gradients
from .precondition import EKFAC, Damping, ekfac
from .rules import RULES, SUA, Call, Rule, Rules
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
from .types import Basis, Dense, Factored, Factors, Info, Layer, Moment, OneHot, State, Sums, Terms

__all__ = [
    "DIAGONAL",
    "EKFAC",
    "FULL",
    "RULES",
    "SUA",
    "Basis",
    "Blocks",
    "Call",
    "Choices",
    "Damping",
    "Dense",
    "Description",
    "EKFACOptimizer",
    "Factored",
    "Factors",
    "Info",
    "Layer",
    "Moment",
    "OneHot",
    "PerExampleGradients",
    "Row",
    "Rule",
    "Rules",
    "SecondMoment",
    "State",
    "Sums",
    "Terms",
    "WeightSharing",
    "averaged_intra_batch",
    "blocks",
    "describe",
    "ekfac",
    "exact_sums",
    "expand",
    "gradient_sums",
    "intra_batch",
    "keep",
    "kfac",
    "moving_average",
    "optim",
    "per_example_gradients",
    "reduce",
    "reset",
    "running_average",
    "set_grads",
    "transport",
]
