"""Natural gradients from exact per-example gradients, as pure functions on `torch.func`."""

from . import optim
from .basis import DIAGONAL, FULL, Blocks, Choices, blocks
from .compare import (
    ESTIMATORS,
    Estimator,
    Record,
    Seen,
    compare,
    own_coordinates,
    split_batch,
    summarise,
    whole_batch,
)
from .contraction import exact_sums, gradient_sums
from .curvature import Curvature, curvature
from .describe import Description, Row, describe
from .fisher import Fisher, empirical, exact, gradient, sampled
from .kronecker import WeightSharing, expand, reduce
from .optim import EKFACOptimizer, set_grads
from .per_example import PerExampleGradients, per_example_gradients
from .precondition import EKFAC, Damping, ekfac
from .reference import DenseBlocks, fisher_blocks, ggn_blocks
from .rules import RULES, SUA, Call, Rule, Rules
from .second_moment import (
    SecondMoment,
    averaged_intra_batch,
    centred,
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
    "ESTIMATORS",
    "FULL",
    "RULES",
    "SUA",
    "Basis",
    "Blocks",
    "Call",
    "Choices",
    "Curvature",
    "Damping",
    "Dense",
    "DenseBlocks",
    "Description",
    "EKFACOptimizer",
    "Estimator",
    "Factored",
    "Factors",
    "Fisher",
    "Info",
    "Layer",
    "Moment",
    "OneHot",
    "PerExampleGradients",
    "Record",
    "Row",
    "Rule",
    "Rules",
    "SecondMoment",
    "Seen",
    "State",
    "Sums",
    "Terms",
    "WeightSharing",
    "averaged_intra_batch",
    "blocks",
    "centred",
    "compare",
    "curvature",
    "describe",
    "ekfac",
    "empirical",
    "exact",
    "exact_sums",
    "expand",
    "fisher_blocks",
    "ggn_blocks",
    "gradient",
    "gradient_sums",
    "intra_batch",
    "keep",
    "kfac",
    "moving_average",
    "optim",
    "own_coordinates",
    "per_example_gradients",
    "reduce",
    "reset",
    "running_average",
    "sampled",
    "set_grads",
    "split_batch",
    "summarise",
    "transport",
    "whole_batch",
]
