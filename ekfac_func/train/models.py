"""Small networks and their losses, for square images of one channel."""

import itertools
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


def make(model: str, images: Tensor, seed: int) -> Task:
    """A new network for images like these [n 1 h h], initialised from the seed and, of an autoencoder, their mean."""
    side = images.shape[-1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        match model:
            case "mlp":
                task = Task(mlp(side), classification_losses, True)
            case "cnn":
                task = Task(cnn(side), classification_losses, True)
            case _:
                task = Task(autoencoder(side, images.mean(0).flatten()), reconstruction_losses, False)
    task.net.to(images.device)
    return task


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


def autoencoder(side: int, mean: Tensor) -> nn.Module:
    """The deep autoencoder of Hinton & Salakhutdinov 2006, https://doi.org/10.1126/science.1127647.

    For 28 x 28 images 784-1000-500-250-30 and its mirror, for smaller ones an eighth of those widths. It differs from
    theirs where they needed pretraining layer by layer: the hidden units are rectified in place of sigmoids, the
    weights are drawn as He et al. 2015 do (https://arxiv.org/abs/1502.01852), and the output starts at the log-odds of
    the mean image. The code and the output are linear.
    """
    encoder = (side**2, 1000, 500, 250, 30) if side > 8 else (side**2, 125, 63, 31, 10)
    widths = (*encoder, *reversed(encoder[:-1]))
    linears = [nn.Linear(i, o) for i, o in itertools.pairwise(widths)]
    for linear in linears:
        nn.init.kaiming_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
    with torch.no_grad():
        linears[-1].bias.copy_(mean.clamp(1e-3, 1 - 1e-3).logit())
    code = linears[len(encoder) - 2]
    layers: list[nn.Module] = [nn.Flatten()]
    for linear in linears:
        layers += [linear] if linear in (code, linears[-1]) else [linear, nn.ReLU()]
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
