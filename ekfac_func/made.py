"""Tensors that a loss makes, as by `torch.zeros`, which depend on neither params nor the example until it fills them.

`vmap` lets no function write what differs between the examples into a tensor that they share: where a loss does so,
each example is given one of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .modes import innermost, storages

DRAWN = frozenset(
    getattr(Tensor, name + "_")
    for name in ("bernoulli", "cauchy", "exponential", "geometric", "log_normal", "normal", "random", "uniform")
)
"""Methods that fill a tensor with random numbers."""


class Made:
    """Follows, by their memory, the tensors of a run that are the same for all examples."""

    def __init__(self) -> None:
        self.filled = False  # a constant, by what is not constant
        self.drawn = False  # a constant, by random numbers
        self.storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used again

    def call(self, handle: Callable[[Any, Any, Any], Any], func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a call, which is noted."""
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        constants = [t for t in given if self._constant(t)]
        versions = [(t, t._version) for t in map(innermost, constants) if not t.is_inference()]
        output = handle(func, args, kwargs)
        if len(constants) == len(given):
            self.drawn |= func in DRAWN
            self.storages |= storages(output)
            return output
        for t, version in versions:
            if t._version != version:
                self.filled = True
                self.storages.pop(t.untyped_storage()._cdata, None)
        return output

    def _constant(self, t: Tensor) -> bool:
        """Whether a tensor is closed over, or made of constants alone."""
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(t)
        return not wrapped or not storages(t).keys().isdisjoint(self.storages)


MAKES = (
    *(torch.zeros, torch.ones, torch.empty, torch.full, torch.eye, torch.tensor, torch.scalar_tensor),
    *(torch.arange, torch.linspace, torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor),
    *(torch.clone, Tensor.clone, Tensor.repeat),
)
"""What makes tensors that are one for all examples."""


def own_of_each(of: Any) -> dict[Callable[..., Any], Callable[..., Tensor]]:
    """For each of `MAKES` a function that makes each example its own tensor. of: tensors that `vmap` maps."""
    like = sum(leaf.new_zeros(()) for leaf in pytree.tree_leaves(of))

    def written(make: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        made = make(*args, **kwargs)
        return like.new_empty_strided(made.shape, made.stride(), dtype=made.dtype, device=made.device).copy_(made)

    return {make: functools.partial(written, make) for make in MAKES}
