"""Views of a parameter: which of its entries a transposed, reshaped or sliced tensor holds.

The strides and the offset of a view of a contiguous parameter say which of its axes are left, in which order, and from
where on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .expansions import blocks_at
from .indexing import entries_of, is_list
from .rules import Call
from .types import constants


class View(NamedTuple):
    """A tensor that holds entries of a parameter."""

    name: str
    split: tuple[int, ...]  # the shape of the parameter, its axes divided so that each axis of the view is one of them
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in entries of the contiguous parameter
    offset: int
    by_ids: bool = False  # ids chose, and may repeat, the entries along the first axis of the split


class Gathered(NamedTuple):
    """What ids chose of the first axis of a parameter."""

    made: Tensor
    ids: Tensor
    name: str | None  # of the parameter, where it is known


class Axis(NamedTuple):
    """One axis of a parameter's split, and the part of it that a view shows."""

    size: int
    stride: int
    position: int | None  # of the view's axes, None where one index was taken
    start: int
    length: int


def whole(name: str, shape: Sequence[int]) -> View:
    """A parameter as a view of itself."""
    return View(name, tuple(shape), tuple(shape), contiguous(shape), 0)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def axes(view: View) -> tuple[Axis, ...] | None:
    """The axes of its split, and what the view shows of them; None where it skips or repeats entries."""
    strides = contiguous(view.split)
    found: dict[int, int] = {}
    for position, (size, stride) in enumerate(zip(view.shape, view.strides, strict=True)):
        if size == 1:
            continue  # one index, or an axis that the view added
        candidates = [axis for axis, of_axis in enumerate(strides) if of_axis == stride and view.split[axis] != 1]
        if len(candidates) != 1 or candidates[0] in found:
            return None
        found[candidates[0]] = position
    offset = view.offset
    shown: list[Axis] = []
    for axis, (size, stride) in enumerate(zip(view.split, strides, strict=True)):
        start, offset = divmod(offset, stride) if stride > 0 else (0, offset)
        at = found.get(axis)
        shown.append(Axis(size, stride, at, start, min(size, 1) if at is None else view.shape[at]))
    return tuple(shown)


def is_whole(view: View) -> bool:
    """Whether the view shows every entry, each once."""
    shown = axes(view)
    return shown is not None and not view.by_ids and all(axis.length == axis.size for axis in shown)


def reshape(view: View, shape: Sequence[int]) -> View | None:
    """A whole view in another shape; None where its entries then have no order of their own."""
    if not is_whole(view) or math.prod(shape) != math.prod(view.split):
        return None
    try:
        entries = torch.empty_strided(view.shape, view.strides).view(tuple(shape))
    except (RuntimeError, ValueError):
        return None
    strides = entries.stride()
    by_stride = sorted(
        (axis for axis in range(entries.dim()) if entries.shape[axis] != 1), key=lambda axis: -strides[axis]
    )
    split = tuple(entries.shape[axis] for axis in by_stride)
    return View(view.name, split, tuple(entries.shape), strides, 0)


def follow(func: Callable[..., Any], args: Sequence[Any], view: View, made: Any) -> list[View | None]:
    """The views that a function of `VIEWS` made of a view, its first argument; None for one that is not known."""
    source = args[0]
    if func in GATHERS and not _basic(args[1]):
        first = (view.shape[0], view.strides[0]) == (view.split[0], contiguous(view.split)[0])
        if not is_ids(args[1]) or not first or not is_whole(view) or len(view.shape) < 3:
            return [None]
        return [view._replace(shape=tuple(made.shape), by_ids=True)]
    if func in SAME:
        return [view]
    if func in RESHAPES:
        return [reshape(view, made.shape)]
    same = source.stride() == view.strides and source.storage_offset() == view.offset  # false for a copy
    return [_made(view, part) if same else None for part in ([made] if isinstance(made, Tensor) else made)]


def _basic(index: Any) -> bool:
    """Whether an index takes a view: of whole numbers and slices, not of tensors or lists."""
    return all(part is None or part is ... or type(part) in (int, slice) for part in entries_of(index))


def fix(index: Any) -> None:
    """Have Dynamo guard the numbers in an index: which entries they pick is a constant of the plan."""
    for part in pytree.tree_leaves(index):
        ends = (part.start, part.stop, part.step) if isinstance(part, slice) else (part,)
        constants([end for end in ends if isinstance(end, int)])


def is_ids(index: Any) -> bool:
    """Whether an index chooses entries of the first axis one by one."""
    return is_list(index) and index.dim() == 1


def ids_of(func: Callable[..., Any], args: Sequence[Any], gathered: Sequence[Gathered]) -> Tensor | None:
    """The ids that picked the blocks of what a function of `VIEWS` makes; None where none did."""
    if func in GATHERS and is_ids(args[1]):
        return args[1] if args[0].dim() > 2 else None
    for one in gathered:
        if args[0] is one.made:
            return one.ids
    return None


def with_ids(call: Call, gathered: Sequence[Gathered], weight: str) -> Call:
    """A call whose weight is made of blocks that ids picked, with those ids beside its input."""
    for one in gathered:
        if call.weight is one.made:
            return call._replace(input=(call.input, one.ids))
    # Dynamo does not show `w[ids].mT`, nor of what `w.mT[ids]` picks
    size = call.weight.numel()
    chosen = [x.ids for x in gathered if x.name == weight or (x.name is None and x.made.numel() >= size)]
    if chosen and all(ids is chosen[0] for ids in chosen):
        return call._replace(input=(call.input, chosen[0]))
    raise RuntimeError(
        f"ids did not pick the weight of a call of {weight!r}, as they did when the layers of the loss were found: in "
        "a compiled step write w[ids].transpose(-2, -1) for w[ids].mT, which Dynamo does not show"
    )


def _made(view: View, part: Tensor) -> View | None:
    """The view that a part of another one is, in the same memory; None where that is not known."""
    made = view._replace(shape=tuple(part.shape), strides=part.stride(), offset=int(part.storage_offset()))
    shown, before = axes(made), axes(view)
    if shown is None or before is None:
        return None
    cut = view.by_ids and shown[0].length != before[0].length  # ids would have to be cut alike
    return None if cut else made


GATHERS = (Tensor.__getitem__, blocks_at)
SAME = frozenset(
    getattr(Tensor, name) for name in ("contiguous", "to", "float", "double", "half", "bfloat16", "type_as", "clone")
)
RESHAPES = frozenset(
    {
        *(getattr(of, name) for of in (Tensor, torch) for name in ("reshape", "flatten", "ravel")),
        *(Tensor.view, torch.unflatten),
    }
)
MAY_COPY = (SAME | RESHAPES) - {Tensor.clone}
"""Whether these share memory with their argument depends on how it lies there, under `vmap` too."""
VIEWS = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("T", "mT")),
        *(getattr(of, name) for of in (Tensor, torch) for name in ("t", "transpose", "permute", "swapaxes", "movedim")),
        *(getattr(of, name) for of in (Tensor, torch) for name in ("narrow", "select", "chunk", "unbind")),
        *(getattr(of, name) for of in (Tensor, torch) for name in ("unsqueeze", "squeeze")),
        *(torch.split, *GATHERS, *SAME, *RESHAPES),
    }
)
