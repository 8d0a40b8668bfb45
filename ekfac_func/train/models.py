"""Small networks and their losses, for square images of one channel."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..types import LossFn, Params


class Task(NamedTuple):
    """A network and what it is to learn."""

    net: nn.Module
    losses: Callable[[Tensor, Tensor, Tensor], Tensor]  # (outputs, images, labels) -> losses [n]
    classifies: bool


def make(model: str, side: int, seed: int) -> Task:
    """A new network, initialised from the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        match model:
            case "mlp":
                return Task(mlp(side), classification_losses, True)
            case "cnn":
                return Task(cnn(side), classification_losses, True)
            case _:
                return Task(autoencoder(side), reconstruction_losses, False)


def mlp(side: int) -> nn.Module:
    """Two hidden layers of 128 rectified units."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(side**2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def cnn(side: int) -> nn.Module:
    """Three 3 x 3 convolutions and a linear layer; images larger than 8 x 8 are halved once more."""
    first = 1 if side <= 8 else 2
    left = -(-side // (4 * first))
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=first, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * left**2, 10),
    )


def autoencoder(side: int) -> nn.Module:
    """The deep autoencoder of Hinton & Salakhutdinov 2006, https://doi.org/10.1126/science.1127647.

    For 28 x 28 images 784-1000-500-250-30 and its mirror, for smaller ones an eighth of those widths. The hidden
    units are sigmoids, the code and the output are linear. Weights are drawn as Glorot & Bengio 2010 do, biases are
    zero: there is no layer-wise pretraining.
    """
    encoder = (side**2, 1000, 500, 250, 30) if side > 8 else (side**2, 125, 63, 31, 10)
    widths = (*encoder, *reversed(encoder[:-1]))
    code, output = len(encoder) - 2, len(widths) - 2
    layers: list[nn.Module] = [nn.Flatten()]
    for k, (i, o) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        linear = nn.Linear(i, o)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear] if k in (code, output) else [linear, nn.Sigmoid()]
    return nn.Sequential(*layers)


def classification_losses(outputs: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example."""
    return F.cross_entropy(outputs, labels, reduction="none")


def reconstruction_losses(outputs: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each example, summed over its pixels."""
    return F.binary_cross_entropy_with_logits(outputs, images.flatten(1), reduction="none").sum(1)


def loss_of(task: Task) -> LossFn:
    """The task as a pure function of parameters and one example, as `ekfac` takes it."""

    def loss_fn(params: Params, example: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = example[0][None], example[1][None]
        return task.losses(functional_call(task.net, params, (images,)), images, labels)[0]

    return loss_fn
