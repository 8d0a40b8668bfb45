"""Per-example gradients in their own right."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capture import Captured, capture
from .checks import check_batch, check_count, check_params, check_randomness
from .discovery import Options
from .kronecker import dense, gradient, square_norms, unpack, unpack_all
from .rules import RULES, Rules
from .types import Batch, LossFn, Params


@dataclass(frozen=True)
class PerExampleGradients:
    """Gradients of each example's loss, kept as factors where a rule knows them."""

    captured: Captured
    params: Mapping[str, Tensor]

    @property
    def losses(self) -> Tensor:
        """`[n]`."""
        return self.captured.losses

    @property
    def aux(self) -> Any:
        """What the loss returned beside, with `has_aux`."""
        return self.captured.aux

    def dense(self, name: str) -> Tensor:
        """`[n, *param.shape]` of one parameter. KeyError if params has no such name."""
        if name not in self.params:
            raise KeyError(f"{name!r} is not in params: it has {', '.join(map(repr, self.params))}")
        for layer in self.captured.layers.values():
            if name in (layer.weight, layer.bias):
                return unpack(layer, dense(self.captured.terms[layer.weight]), self.params)[name]
        raise AssertionError(f"no layer holds {name!r}")

    def mean(self) -> Params:
        """Mean over the examples, a tree like params."""
        means = {name: gradient(terms) / len(self.losses) for name, terms in self.captured.terms.items()}
        return unpack_all(self.captured.layers.values(), means, self.params)

    def norms(self) -> Tensor:
        """Euclidean norm over all parameters of each example's gradient, `[n]`."""
        squares = [square_norms(term) for term in self.captured.terms.values()]
        return torch.stack([square.to(self.losses.dtype) for square in squares]).sum(0).sqrt()


@torch.no_grad()
def per_example_gradients(
    loss_fn: LossFn,
    params: Mapping[str, Tensor],
    batch: Batch,
    *,
    rules: Rules = RULES,
    has_aux: bool = False,
    batched: bool = False,
    randomness: str = "different",
    chunk_size: int | None = None,
) -> PerExampleGradients:
    """Exact gradients of `loss_fn(params, example)` for every example of the batch.

    loss_fn, params, batch and the options as in `ekfac`. Exact for every parameter that
    `torch.autograd.grad` in a loop over the examples can differentiate.
    """
    check_randomness(randomness)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    check_params(params)
    check_batch(batch)
    options = Options(rules, randomness, chunk_size, has_aux, batched)
    return PerExampleGradients(capture(loss_fn, params, batch, options), params)
