"""The work that every benchmark times, and its baselines: one step without a refresh, on the same net and batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ekfac_func import EKFAC, SecondMoment, State, averaged_intra_batch, ekfac, intra_batch, kfac, running_average
from ekfac_func.discovery import Options, plan
from ekfac_func.kronecker import into_basis, out_of_basis, unpack
from ekfac_func.rules import RULES
from ekfac_func.types import LossFn, Params

DAMPING = 1e-2
ESTIMATORS: dict[str, SecondMoment] = {
    "intra_batch": intra_batch,
    "averaged_intra_batch": averaged_intra_batch(0.9),
    "running_average": running_average(0.9),
    "kfac": kfac,
}


class Work(NamedTuple):
    """A net, its loss on one example, and a batch."""

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


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 64, 10)),
    )


SHAPES: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "mlp": (mlp, 256, (784,)),
    "cnn": (cnn, 64, (3, 32, 32)),
    "positions": (Pixels, 64, (16, 64)),
}


def work(name: str, n: int | None = None) -> Work:
    """A workload by name, with its own batch size or n."""
    torch.manual_seed(0)
    make, size, shape = SHAPES[name]
    net = make()
    params = {key: p.detach() for key, p in net.named_parameters()}

    def loss_fn(params: Params, example: Any) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (example[0][None],)), example[1][None])

    n = n or size
    return Work(net, params, loss_fn, (torch.randn(n, *shape), torch.randint(0, 10, (n,))))


def known_basis(w: Work, estimator: SecondMoment) -> tuple[EKFAC, State]:
    """A step whose basis is known: after one refresh, before the next."""
    step = ekfac(w.loss_fn, damping=DAMPING, second_moment=estimator, basis_every=10**6)
    _, state, _ = step.precondition(w.params, w.batch, step.init(w.params, w.batch))
    return step, state


def forward_backward(w: Work) -> None:
    """The plain mean gradient."""
    loss = F.cross_entropy(w.net(w.batch[0]), w.batch[1])
    torch.autograd.grad(loss, list(w.net.parameters()))


def naive(w: Work, state: State) -> Params:
    """The first reading of the idea: every example's gradient in memory, then one einsum into the basis."""
    per_example = vmap(grad(w.loss_fn), (None, 0))(w.params, w.batch)
    natural: Params = {}
    for layer in plan(w.loss_fn, w.params, w.batch, Options(RULES)).layers:
        b, o, i, k = layer.sizes
        G = per_example[layer.weight].reshape(-1, b, o, i - (layer.bias is not None), k)
        if layer.bias is not None:
            G = torch.cat([G, per_example[layer.bias].reshape(-1, b, o, 1, k)], dim=3)
        projected = into_basis(G, state.bases[layer.weight])
        rescaled = projected.mean(0) / (projected.square().mean(0) + DAMPING)
        natural |= unpack(layer, out_of_basis(rescaled, state.bases[layer.weight], layer.sizes), w.params)
    return natural
