"""Inner products and norms of trees, of each tensor by itself or of all together."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Scope = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""(a number of each tensor, `[]`) -> the number that a rule uses for each: its own, or that of all tensors together."""


def each(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor by itself."""
    return numbers


def together(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors as one: the sum for each."""
    return dict.fromkeys(numbers, total(numbers))


def total(numbers: Mapping[str, Tensor]) -> Tensor:
    """The sum of a number of each tensor, `[]`."""
    return torch.stack(list(numbers.values())).sum()


def dots(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inner product of each tensor with its counterpart, `[]`; in float32 at least."""
    return {name: (_wide(x[name]) * _wide(y[name])).sum() for name in x}


def squares(x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squared Euclidean norm of each tensor, `[]`; in float32 at least."""
    return dots(x, x)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
