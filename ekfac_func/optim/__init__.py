"""From a natural gradient to a training step: blocks of an optimizer, damping rules, bridges to `torch.optim`."""

from .averages import Average, Averaging, exponential_average
from .bridges import EKFACOptimizer, set_grads
from .damping import (
    DEFAULTS,
    fisher_quadratic,
    levenberg_marquardt,
    preconditioned_quadratic,
    predicted_decrease,
    relative,
)
from .metrics import metrics
from .norms import Scope, each, together
from .schedules import Schedule, constant, cosine, warm_up
from .transforms import (
    Step,
    Transform,
    Velocity,
    apply_updates,
    chain,
    clip_kl,
    clip_norm,
    graft,
    identity,
    learning_rate,
    momentum,
    nesterov,
    weight_decay,
)

__all__ = [
    "DEFAULTS",
    "Average",
    "Averaging",
    "EKFACOptimizer",
    "Schedule",
    "Scope",
    "Step",
    "Transform",
    "Velocity",
    "apply_updates",
    "chain",
    "clip_kl",
    "clip_norm",
    "constant",
    "cosine",
    "each",
    "exponential_average",
    "fisher_quadratic",
    "graft",
    "identity",
    "learning_rate",
    "levenberg_marquardt",
    "metrics",
    "momentum",
    "nesterov",
    "preconditioned_quadratic",
    "predicted_decrease",
    "relative",
    "set_grads",
    "together",
    "warm_up",
    "weight_decay",
]
