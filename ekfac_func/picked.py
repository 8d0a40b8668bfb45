"""Which layers of a batched loss are called on rows that values picked: which example a row is of is then unknown."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .modes import storages

# functions by which Python reads numbers, or makes tensors of numbers that it read, unseen by a dispatch mode
READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)
OF_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
SPLITS = (torch.tensor_split, Tensor.tensor_split)
SIZES = (
    *(Tensor.shape.__get__, Tensor.size, Tensor.numel, Tensor.nelement, torch.numel),  # type: ignore[attr-defined]
    *(Tensor.__len__, Tensor.__iter__, Tensor.unbind, torch.unbind),
)


class Picked(TorchDispatchMode):
    """Notes which layers are called on rows that values may have picked, or on what is computed from such rows.

    Tensors are followed by their memory. A mask, `nonzero` and the like pick rows; ids and orders that come from the
    batch may pick them, and so may a number that Python reads. In doubt a layer is given up: no row may be taken for
    another example's. Truth values that Python reads, as for a branch, do no harm if each batch size reads as many.

    picking: which lookups by ids of the batch, counted in their order, are along the examples.
    """

    def __init__(self, picking: Collection[int] = ()) -> None:
        super().__init__()
        self.picking = picking
        self.lookups: list[int] = []  # by ids that come from the batch: along how many entries each is
        self.of_batch: dict[int, torch.UntypedStorage] = {}  # of what depends on its values; held like `storages`
        self.calls: set[int] = set()  # of layers, on rows that may have been picked
        self.asked: dict[int, int] = {}  # by call, how many truths were read before
        self.truths, self.numbers = 0, False  # read so far
        self.function: Any = None  # of torch, under way
        self.call: int | None = None  # of a layer, under way
        self.storages: dict[int, torch.UntypedStorage] = {}  # of such rows; held, so that no address is used again
        self.sized: dict[int, torch.UntypedStorage] = {}  # of tensors whose size depends on values
        self.over = False  # the loss has run: what follows is its derivative

    def given(self, batch: Any) -> None:
        """The tensors of the batch."""
        self.of_batch |= storages(batch)

    def enter(self, function: Any, args: Any) -> None:
        """A torch function is called."""
        self.function = function
        self.numbers |= function in READS
        if function in OF_NUMBERS:
            self.numbers |= any(isinstance(part, list | tuple) and has_tensors(part) for part in args)
        if function in SPLITS:
            self.numbers |= has_tensors(args[1:])
        if function in SIZES and self.sized:
            self.numbers |= not storages(args).keys().isdisjoint(self.sized)

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
        if self.over:
            return made
        if torch.Tag.data_dependent_output in func.tags:
            self.truths += isinstance(made, bool)
            self.numbers |= not isinstance(made, bool) and self.function is not F.one_hot  # which checks its labels
        addresses = storages((args, kwargs)).keys()
        sizes = _picks(func, args) or not addresses.isdisjoint(self.sized)
        picks = sizes or not addresses.isdisjoint(self.storages)
        depends = not addresses.isdisjoint(self.of_batch) and func not in WITHOUT_VALUES
        for entries in self._looked_up(func, args, kwargs):
            picks |= len(self.lookups) in self.picking
            self.lookups.append(entries)
        if picks and self.call is not None:
            self.calls.add(self.call)
        if picks or depends:
            written = storages((made, args[:1] if func._schema.is_mutable else ()))
            self.storages |= written if picks else {}
            self.sized |= written if sizes else {}
            self.of_batch |= written if depends else {}
        return made

    def _looked_up(self, func: Any, args: Any, kwargs: Any) -> Iterator[int]:
        """For each lookup by ids of the batch, and each sort, the number of entries that it is along."""
        if func.overloadpacket in INDEXED:
            ids = [(args[0].shape[axis], t) for axis, t in enumerate(args[1]) if t is not None]
        elif func.overloadpacket in BY_IDS and args[0].dim():
            ids = [(args[0].shape[args[1]], args[2])]
        elif func.overloadpacket in TABLES:
            ids = [(args[0].shape[0], args[1])]
        elif func.overloadpacket in FLAT:
            ids = [(args[0].numel(), args[1])]
        elif func.overloadpacket in ORDERED and args[0].dim():
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
            ids = [(args[0].shape[given.get("dim", -1)], args[0])]
        else:
            return
        for entries, t in ids:
            if isinstance(t, Tensor) and not storages(t).keys().isdisjoint(self.of_batch):
                yield entries


_aten = torch.ops.aten
INDEXED = (_aten.index, _aten._unsafe_index, _aten.index_put, _aten.index_put_)
BY_IDS = (
    *(_aten.index_select, _aten.gather, _aten.index_add, _aten.index_add_, _aten.index_copy, _aten.index_copy_),
    *(_aten.scatter, _aten.scatter_, _aten.scatter_add, _aten.scatter_add_),
    *(_aten.scatter_reduce, _aten.scatter_reduce_, _aten.index_reduce, _aten.index_reduce_),
)
FLAT = (_aten.take, _aten.put, _aten.put_)
BY_VALUES = (
    *(_aten.masked_scatter, _aten.masked_scatter_, _aten._pack_padded_sequence),
    *(_aten._to_sparse, _aten._to_sparse_csr, _aten._to_sparse_csc, _aten._to_sparse_bsr, _aten._to_sparse_bsc),
)
TABLES = (_aten.embedding, _aten._embedding_bag, _aten._embedding_bag_forward_only)
ORDERED = (_aten.sort, _aten.topk)
WITHOUT_VALUES = tuple(
    getattr(_aten, name).default
    for name in ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full")
)


def has_tensors(tree: Any) -> bool:
    """Whether a leaf of a tree is one."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(tree))


def _picks(func: Any, args: Any) -> bool:
    if func is torch.ops.aten.index.Tensor:
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return func.overloadpacket in BY_VALUES or torch.Tag.dynamic_output_shape in func.tags
