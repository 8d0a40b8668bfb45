"""Which calls of a loss are on rows that values picked out of a batch: they belong to no example in turn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)  # numbers for Python, by ways that are not dispatched


class Picked(TorchDispatchMode):
    """A mask, `nonzero` and the like pick rows, and a number that Python reads may.

    What is made of such rows, or shares memory with what is, counts as such rows: rather a layer too many than a row
    that is taken for another example's. A truth that Python reads is let pass if every batch size asks for as many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[int] = set()  # on such rows
        self.asked: dict[int, int] = {}  # by call, how many truths were read before
        self.truths, self.numbers = 0, False  # read so far
        self.function: Any = None  # of torch, under way
        self.call: int | None = None  # of a layer, under way
        self.storages: dict[int, torch.UntypedStorage] = {}  # of such rows; held, so that no address is used again

    def enter(self, function: Any) -> None:
        """A torch function is called."""
        self.function = function
        self.numbers |= function in READS

    def enter_layer(self, call: int) -> None:
        """The call of a layer begins."""
        self.call, self.asked[call] = call, self.truths
        if self.numbers:
            self.calls.add(call)

    def leave_layer(self) -> None:
        """It ends."""
        self.call = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags:
            self.truths += isinstance(made, bool)
            self.numbers |= not isinstance(made, bool) and self.function is not F.one_hot  # which checks its labels
        if _picks(func, args) or any(address in self.storages for address in _storages((args, kwargs))):
            self.storages |= _storages((made, args[:1] if func._schema.is_mutable else ()))
            if self.call is not None:
                self.calls.add(self.call)
        return made


def _picks(func: Any, args: Any) -> bool:
    if func is torch.ops.aten.index.Tensor:
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return torch.Tag.dynamic_output_shape in func.tags or func is torch.ops.aten._pack_padded_sequence.default


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    tensors = [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.layout is torch.strided]
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
