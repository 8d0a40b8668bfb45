"""SOAP, a baseline: Adam in the slowly rotating eigenbasis of Shampoo's factors.

Vyas et al. 2024, algorithm 3, https://arxiv.org/abs/2409.11321. Vectors take Adam itself, a higher tensor is a matrix
of its first axis by the rest. It differs from the paper in one thing: the first step, whose factors make the first
basis, is taken with them, not left out.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ekfac_func.types import Params


class Side(NamedTuple):
    """One side of a matrix."""

    factor: Tensor  # [d d] moving average of G G^T
    Q: Tensor  # [d d] orthonormal columns


class Soap(NamedTuple):
    """State; the second moments lie in the eigenbasis."""

    step: int
    first: Params
    second: Params
    sides: dict[str, tuple[Side, Side]]


def init(params: Mapping[str, Tensor]) -> Soap:
    """Nothing seen."""
    zeros = {name: torch.zeros_like(p).reshape(len(p), -1) for name, p in params.items()}
    sides = {}
    for name, p in params.items():
        if p.dim() > 1:
            o, i = zeros[name].shape
            sides[name] = Side(p.new_zeros(o, o), torch.eye(o).to(p)), Side(p.new_zeros(i, i), torch.eye(i).to(p))
    return Soap(0, zeros, dict(zeros), sides)


def update(
    gradient: Mapping[str, Tensor], state: Soap, *, beta: float = 0.95, every: int = 10, eps: float = 1e-8
) -> tuple[Params, Soap]:
    """The direction of descent's negative, and the new state.

    beta: weight of the past in both moments and in the factors.
    every: steps from one basis to the next.
    """
    step, first, second = state.step + 1, dict(state.first), dict(state.second)
    sides, direction = dict(state.sides), {}
    for name, g in gradient.items():
        G, two = g.reshape(len(g), -1), state.sides.get(name)
        first[name] = beta * first[name] + (1 - beta) * G
        if two is not None and state.step == 0:
            two = _first(G @ G.T, beta), _first(G.T @ G, beta)
        rotated, M = (G, first[name]) if two is None else (_rotate(x, two) for x in (G, first[name]))
        second[name] = beta * second[name] + (1 - beta) * rotated.square()
        correction = (1 - beta**step) ** 0.5 / (1 - beta**step)
        D = correction * M / (second[name].sqrt() + eps)
        if two is not None:
            L, R = two
            D = L.Q @ D @ R.Q.T
            if state.step > 0:
                L, R = (_average(side, x, beta) for side, x in ((L, G @ G.T), (R, G.T @ G)))
            if state.step > 0 and state.step % every == 0:
                L, order = _turn(L)
                second[name] = second[name][order]
                R, order = _turn(R)
                second[name] = second[name][:, order]
            sides[name] = L, R
        direction[name] = D.reshape(g.shape)
    return direction, Soap(step, first, second, sides)


class Optimizer(torch.optim.Optimizer):
    """SOAP as one of `torch.optim`, for one group of parameters. beta, every: as of `update`."""

    def __init__(self, params: Iterable[Tensor], lr: float, beta: float, every: int) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "every": every})
        self.params = {str(k): p for k, p in enumerate(self.param_groups[0]["params"])}
        self.soap = init(self.params)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        lr, beta, every = (self.defaults[name] for name in ("lr", "beta", "every"))
        gradient = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        direction, self.soap = update(gradient, self.soap, beta=beta, every=every)
        for name, d in direction.items():
            self.params[name] -= lr * d


def _first(outer: Tensor, beta: float) -> Side:
    return Side((1 - beta) * outer, torch.linalg.eigh(outer)[1].flip(1))


def _rotate(x: Tensor, sides: tuple[Side, Side]) -> Tensor:
    return sides[0].Q.T @ x @ sides[1].Q


def _average(side: Side, outer: Tensor, beta: float) -> Side:
    return Side(beta * side.factor + (1 - beta) * outer, side.Q)


def _turn(side: Side) -> tuple[Side, Tensor]:
    """One step of power iteration from the old basis, its columns in falling order of their eigenvalues."""
    P = side.factor @ side.Q
    order = (side.Q * P).sum(0).argsort(descending=True)
    return Side(side.factor, torch.linalg.qr(P[:, order])[0]), order
