"""The work that every benchmark times, and its baselines: nets, batches, one step without a refresh."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ekfac_func import EKFAC, SecondMoment, State, averaged_intra_batch, ekfac, intra_batch, kfac, running_average
from ekfac_func.kronecker import into_basis, out_of_basis, pack, unpack
from ekfac_func.types import LossFn, Params

DAMPING = 1e-2
ESTIMATORS: dict[str, SecondMoment] = {
    "intra_batch": intra_batch,
    "averaged_intra_batch": averaged_intra_batch(0.9),
    "running_average": running_average(0.9),
    "kfac": kfac,
}


class Work(NamedTuple):
    """A net, its loss on one example, and a batch of inputs and labels."""

    net: nn.Module
    params: Params
    loss_fn: LossFn
    batch: tuple[Tensor, Tensor]


class Pixels(nn.Module):
    """A net applied to every row of an image as a position."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(x).mean(1))


def mlp(width: int = 1024, inputs: int = 784) -> nn.Module:
    sizes = (inputs, width, width, 10)
    layers = [part for i, o in itertools.pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 64, 10)),
    )


def deep_cnn(width: int = 32) -> nn.Module:
    """Nine convolutions, in threes, and a linear layer."""
    parts: list[nn.Module] = []
    channels = 3
    for wide in (width, 2 * width, 4 * width):
        for _ in range(3):
            parts += [nn.Conv2d(channels, wide, 3, padding=1), nn.ReLU()]
            channels = wide
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Block(nn.Module):
    """Causal attention and an MLP, each added to what came in."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Ids `[n T]` to logits `[n T vocabulary]`."""

    def __init__(
        self, vocabulary: int = 1000, length: int = 128, d: int = 256, layers: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.blocks = nn.Sequential(*(Block(d, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(at))))


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.conv_2(F.relu(self.conv_1(x))))


def resnet18(width: int = 64) -> nn.Module:
    """For 32 x 32 images, without BatchNorm."""
    parts: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    channels = width
    for stage, wide in enumerate((width, 2 * width, 4 * width, 8 * width)):
        for block in range(2):
            parts.append(Residual(channels, wide, 2 if stage and not block else 1))
            channels = wide
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, inner, 1), nn.ReLU(), nn.Conv2d(inner, inner, 3, stride, padding=1), nn.ReLU()),
            nn.Conv2d(inner, 4 * inner, 1),
        )
        same = inputs == 4 * inner and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, 4 * inner, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.body(x))


def resnet50(width: int = 64, depths: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> nn.Module:
    """For 224 x 224 images, without BatchNorm."""
    parts: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    channels = width
    for stage, depth in enumerate(depths):
        inner = width * 2**stage
        for block in range(depth):
            parts.append(Bottleneck(channels, inner, 2 if stage and not block else 1))
            channels = 4 * inner
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Workload(NamedTuple):
    """A net, its usual batch size, and what an example is: pixels of a shape, or ids below a vocabulary."""

    make: Callable[[], nn.Module]
    n: int
    shape: tuple[int, ...]
    classes: int = 10
    vocabulary: int | None = None


WORKLOADS = {
    "mlp": Workload(mlp, 256, (784,)),
    "cnn": Workload(cnn, 64, (3, 32, 32)),
    "positions": Workload(Pixels, 64, (16, 64)),
    "toy": Workload(lambda: mlp(32, 20), 32, (20,)),
    "W1": Workload(mlp, 256, (784,)),
    "W2": Workload(deep_cnn, 128, (3, 32, 32)),
    "W3": Workload(GPT, 16, (128,), 1000, 1000),
    "W4": Workload(lambda: nn.Sequential(nn.Linear(4096, 4096, bias=False)), 64, (4096,), 4096),
    "W5": Workload(resnet18, 32, (3, 32, 32)),
}
TINY = {
    "W1": Workload(lambda: mlp(12, 20), 6, (20,)),
    "W2": Workload(lambda: deep_cnn(2), 4, (3, 8, 8)),
    "W3": Workload(lambda: GPT(11, 5, 8, 1, 2), 3, (5,), 11, 11),
    "W4": Workload(lambda: nn.Sequential(nn.Linear(16, 16, bias=False)), 4, (16,), 16),
    "W5": Workload(lambda: resnet18(2), 3, (3, 8, 8)),
}
"""The same nets, small enough for a test."""

ON_GPU = {
    "GPT-2 small, T = 1024": Workload(lambda: GPT(50257, 1024, 768, 12, 12), 8, (1024,), 50257, 50257),
    "ResNet-50, 224 x 224": Workload(resnet50, 32, (3, 224, 224), 1000),
    "MLP 4096": Workload(lambda: mlp(4096, 4096), 256, (4096,)),
}
TINY_ON_GPU = {
    "GPT-2 small, T = 1024": Workload(lambda: GPT(11, 8, 8, 2, 2), 3, (8,), 11, 11),
    "ResNet-50, 224 x 224": Workload(lambda: resnet50(2, (1, 2), 10), 3, (3, 16, 16)),
    "MLP 4096": TINY["W1"],
}

SMALL = ("mlp", "cnn", "positions", "toy")


def work(
    name: str, n: int | None = None, table: Mapping[str, Workload] = WORKLOADS, device: torch.device | str = "cpu"
) -> Work:
    """A workload by name, with its own batch size or n; the loss is the mean cross-entropy."""
    torch.manual_seed(0)
    make, size, shape, classes, vocabulary = table[name]
    net = make().to(device)
    params = {key: p.detach() for key, p in net.named_parameters()}
    n = n or size
    if vocabulary is None:
        batch = torch.randn(n, *shape), torch.randint(0, classes, (n,))
    else:
        batch = torch.randint(0, vocabulary, (n, *shape)), torch.randint(0, classes, (n, *shape))

    def loss_fn(params: Params, example: Any) -> Tensor:
        return cross_entropy(functional_call(net, params, (example[0][None],)), example[1][None])

    return Work(net, params, loss_fn, (batch[0].to(device), batch[1].to(device)))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over examples, and positions where there are several."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def known_basis(w: Work, estimator: SecondMoment) -> tuple[EKFAC, State]:
    """A step whose basis is known: after one refresh, before the next."""
    step = ekfac(w.loss_fn, damping=DAMPING, second_moment=estimator, basis_every=10**6)
    _, state, _ = step.precondition(w.params, w.batch, step.init(w.params, w.batch))
    return step, state


def forward_backward(w: Work) -> None:
    """The plain mean gradient."""
    loss = cross_entropy(w.net(w.batch[0]), w.batch[1])
    torch.autograd.grad(loss, list(w.net.parameters()))


def naive(w: Work, state: State) -> Params:
    """The first reading of the idea: every example's gradient in memory, then one einsum into the basis."""
    per_example = vmap(grad(w.loss_fn), (None, 0))(w.params, w.batch)
    natural: Params = {}
    for layer in state.layers:
        projected = into_basis(pack(layer, per_example), state.bases[layer.weight])
        rescaled = projected.mean(0) / (projected.square().mean(0) + DAMPING)
        natural |= unpack(layer, out_of_basis(rescaled, state.bases[layer.weight], layer.sizes), w.params)
    return natural


def precondition_gradient(state: State, gradient: Params, params: Params) -> Params:
    """A gradient rescaled by the moments of a state."""
    natural: Params = {}
    for layer in state.layers:
        basis = state.bases[layer.weight]
        rescaled = into_basis(pack(layer, gradient), basis) / (state.second_moments[layer.weight].value + DAMPING)
        natural |= unpack(layer, out_of_basis(rescaled, basis, layer.sizes), params)
    return natural
