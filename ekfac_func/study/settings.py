"""What a study is made of, and its defaults."""

from pathlib import Path
from typing import NamedTuple

from ..compare import ESTIMATORS
from ..train.settings import DATA as IMAGES
from ..train.settings import MODELS as OF_IMAGES

FISHERS = ("sampled", "exact")  # Fishers of the model's own likelihood, beside the estimators of `compare`
ESTIMATOR_NAMES = (*ESTIMATORS, *FISHERS)


TEXT, TRANSFORMER = "text", "transformer"  # go together
DATA, MODELS = (*IMAGES, TEXT), (*OF_IMAGES, "unbiased-cnn", TRANSFORMER)


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
    step_sizes: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    stride: int = 1  # training steps between the batches of the look at stale bases
    refresh_batch: int = 16  # examples in each of them
    lr: float = 0.01
    seed: int = 0
