"""What a study is made of, and its defaults."""

from pathlib import Path
from typing import NamedTuple

from ..compare import ESTIMATORS

FISHERS = ("sampled", "exact")  # Fishers of the model's own likelihood, beside the estimators of `compare`
ESTIMATOR_NAMES = (*ESTIMATORS, *FISHERS)


class Settings(NamedTuple):
    """The options that decide a study's numbers."""

    model: str = "cnn"
    data: str = "digits"
    estimators: tuple[str, ...] = (*ESTIMATORS, "sampled")
    stages: tuple[int, ...] = (0, 20, 300)  # training steps
    load: Path | None = None
    examples: int = 320
    batch_size: int = 64
    damping: float = 0.01  # in loss^2 / parameter^2
    lr: float = 0.01
    seed: int = 0
