"""Independent and slow: loops over examples, dense blocks, explicit formulas."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ekfac_func.types import Layer, LossFn, Params

TOLERANCE = 1e-10  # relative, in float64


def close(x: Tensor, y: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal shapes and a relative distance within the tolerance."""
    assert x.shape == y.shape, (x.shape, y.shape)
    distance, size = (x - y).norm().item(), y.norm().item()
    assert distance <= tolerance * max(size, 1e-6), f"relative distance {distance / max(size, 1e-6):.2e}"


def close_trees(x: Any, y: Any, tolerance: float = TOLERANCE) -> None:
    """The same structure, and every tensor close."""
    xs, ys = pytree.tree_leaves(x), pytree.tree_leaves(y)
    assert len(xs) == len(ys)
    for a, b in zip(xs, ys, strict=True):
        if isinstance(a, Tensor):
            close(a.double(), b.double(), tolerance)
        else:
            assert a == b


def same_bits(x: Any, y: Any) -> None:
    xs, ys = pytree.tree_leaves(x), pytree.tree_leaves(y)
    assert len(xs) == len(ys)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(xs, ys, strict=True))


def stack(*trees: Any) -> Any:
    """Trees of one structure as a tree of stacked tensors."""
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def examples(batch: Any) -> Iterable[Any]:
    n = pytree.tree_leaves(batch)[0].shape[0]
    return (pytree.tree_map(lambda leaf, k=k: leaf[k], batch) for k in range(n))


def loop(loss_fn: LossFn, params: Params, batch: Any) -> tuple[Tensor, Params]:
    """Losses `[n]` and per-example gradients `[n, *param.shape]`, one `torch.autograd.grad` an example."""
    losses, gradients = [], []
    for example in examples(batch):
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        loss = loss_fn(leaves, example)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        losses.append(loss.detach())
        gradients.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves.values(), strict=True)])
    stacked = [torch.stack(column) for column in zip(*gradients, strict=True)]
    return torch.stack(losses), dict(zip(params, stacked, strict=True))


def blocks(gradients: Params, layer: Layer) -> Tensor:
    """Loop gradients of a layer as `[n b o i k]`."""
    b, o, i, k = layer.sizes
    G = gradients[layer.weight]
    n = len(G)
    G = G.reshape(n, *layer.split).permute(0, *(1 + axis for axis in layer.order))
    if layer.bias is None:
        return G.reshape(n, b, o, i, k)
    return torch.cat([G.reshape(n, b, o, i - 1, k), gradients[layer.bias].reshape(n, b, o, 1, k)], dim=3)


def side(Q: Tensor, size: int) -> Tensor:
    """A side of a basis in full, `[b size I]`, whether it is kept in blocks or not."""
    if Q.dim() == 3:
        return Q
    return torch.stack([torch.block_diag(*blocks) for blocks in Q])[:, :size]
