"""Small networks and their losses, for square images of one channel, and one for text."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..types import LossFn, Params
from .data import ALPHABET, LENGTH


class Task(NamedTuple):
    """A network and what it is to learn."""

    net: nn.Module
    losses: Callable[[Tensor, Tensor, Tensor], Tensor]  # (outputs, images, labels) -> losses [n]
    classifies: bool


def make(model: str, images: Tensor, seed: int) -> Task:
    """A new network for images like these [n 1 h h], or ids [n t], initialised from the seed.

    An autoencoder starts from the mean image as well.
    """
    side = images.shape[-1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        match model:
            case "mlp":
                task = Task(mlp(side), classification_losses, True)
            case "cnn":
                task = Task(cnn(side), classification_losses, True)
            case "unbiased-cnn":
                task = Task(cnn(side, bias=False), classification_losses, True)
            case "transformer":
                task = Task(Transformer(), next_character_losses, True)
            case "autoencoder":
                task = Task(autoencoder(side, images.mean(0).flatten()), reconstruction_losses, False)
            case _:
                raise ValueError(f"model {model!r}: give mlp, cnn, unbiased-cnn, transformer or autoencoder")
    task.net.to(images.device)
    return task


def mlp(side: int) -> nn.Module:
    """Two hidden layers of 128 rectified units."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(side**2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def cnn(side: int, bias: bool = True) -> nn.Module:
    """Three 3 x 3 convolutions and a linear layer; images larger than 8 x 8 are halved once more.

    bias: of the convolutions. Without, the blocks of SUA are those of the other estimators.
    """
    first = 1 if side <= 8 else 2
    left = -(-side // (4 * first))
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=first, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=bias),
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


class Transformer(nn.Module):
    """Characters in, logits of the next ones out: two blocks of attention and of two layers."""

    def __init__(
        self, characters: int = len(ALPHABET), length: int = LENGTH, width: int = 32, heads: int = 2, hidden: int = 64
    ) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.characters(ids) + self.places(torch.arange(ids.shape[-1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Attention to what came before, then two layers, each added to its input and after a norm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in self.qkv(self.before(x)).chunk(3, -1))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        attended = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        x = x + self.out(attended.transpose(-3, -2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.between(x))))


def next_character_losses(outputs: Tensor, ids: Tensor, following: Tensor) -> Tensor:
    """Cross-entropy of each example, summed over its characters."""
    return F.cross_entropy(outputs.flatten(0, 1), following.flatten(), reduction="none").unflatten(0, ids.shape).sum(1)


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
