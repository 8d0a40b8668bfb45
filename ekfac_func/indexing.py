"""`x[index]` and `x[index] = value` in calls that `vmap` can run, where Python would have to read the index.

The entries of an index are ids (a whole number as a 0-d tensor), lists of ids, masks, and what takes a view (a Python
number, a slice, `...`, None). Both functions are expansions, as described in `expansions.py`.
"""

from collections.abc import Callable, Iterable
from types import EllipsisType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException


def getitem(call: Callable[..., Any], x: Tensor, index: Any) -> Any:
    """`x[id]`, as of a label, whose value Python would read."""
    found = _by_ids(call, x, index) if any(_is_id(entry) for entry in entries_of(index)) else None
    if found is None:
        return NotImplemented
    rows = call(Tensor.__getitem__, found.rows, found.ids)
    if not found.axes:
        return call(torch.select, rows, 0, 0)
    return rows.movedim(tuple(range(found.axes)), tuple(range(found.at, found.at + found.axes)))


def setitem(call: Callable[..., Any], x: Tensor, index: Any, value: Any) -> Any:
    """`x[id] = value` likewise, and `x[mask] = number`, `x[:length] = number`, whose entries Python would count.

    Lists of ids are along the first axes here: `vmap` misplaces values along others.
    """
    entries = entries_of(index)
    if all(is_list(entry) for entry in entries):
        return NotImplemented
    found = None if _overlaps(x) else _by_ids(call, x, index)
    if found is not None:
        if isinstance(value, Tensor):
            value = found.laid_out(value)
        return call(Tensor.__setitem__, found.rows, found.ids, value)
    if any(is_list(entry) for entry in entries):  # beside what `_by_ids` does not know
        raise DataDependentOutputException(torch.ops.aten.index_put.default)
    mask = _mask(x, entries)
    if mask is None or not (isinstance(value, bool | int | float) or (isinstance(value, Tensor) and value.dim() == 0)):
        return NotImplemented
    if isinstance(value, Tensor):
        value = value.to(x.dtype)
    elif x.dtype is torch.bool:
        value = bool(value)
    elif not (x.is_floating_point() or x.is_complex()):
        value = int(value)
    call(Tensor.masked_fill_, x, mask, value)  # of a number `vmap` has a rule
    return None


class _Rows(NamedTuple):
    """A tensor seen with the axes that ids index in front: `x[index]` is `rows[ids]`, but for the order of its axes."""

    rows: Tensor  # a view
    ids: Any  # a list of one in place of each id
    axes: int  # that the lists of ids have in `x[index]`; 0 where there are ids alone
    at: int  # where these axes stand in `x[index]`

    def laid_out(self, value: Tensor) -> Tensor:
        """What is written into `x[index]`, in the order of axes of `rows[ids]`."""
        lists = self.ids if isinstance(self.ids, tuple) else (self.ids,)
        own, rest = torch.broadcast_shapes(*(t.shape for t in lists)), self.rows.shape[len(lists) :]
        shape = (*rest[: self.at], *own, *rest[self.at :]) if self.axes else rest
        if value.dim() == 0:  # which may be on the CPU
            value = value.to(self.rows.device)
        while value.dim() > len(shape) and value.shape[0] == 1:
            value = value[0]
        if not self.axes:  # as `copy_`, which casts, and may read what it writes
            return value.to(self.rows.dtype).expand(shape)[None].clone()
        return value.expand(shape).movedim(tuple(range(self.at, self.at + len(own))), tuple(range(len(own))))


def _by_ids(call: Callable[..., Any], x: Tensor, index: Any) -> _Rows | None:
    """None of an index without ids, or with an entry that is neither ids nor takes a view."""
    entries = entries_of(index)
    lists, alone = ([at for at, e in enumerate(entries) if of_kind(e)] for of_kind in (is_list, _is_id))
    ids = sorted(lists + alone)
    if not ids or not _takes_a_view(e for at, e in enumerate(entries) if at not in ids):
        return None
    dotted = x.dim() - sum(e is not None and e is not Ellipsis for e in entries)  # axes that `...` stands for
    axes, places = [], []  # of the ids: their axes in x as the other entries view it; of the lists: in `x[index]`
    axis = place = 0
    for at, entry in enumerate(entries):
        width = dotted if entry is Ellipsis else int(type(entry) is not int)
        if at in ids:
            axes.append(axis)
            places += [place] if at in lists else []
        else:
            place += width
        axis += width
    if len(ids) < len(entries):
        x = call(Tensor.__getitem__, x, tuple(slice(None) if at in ids else e for at, e in enumerate(entries)))
    if axes != list(range(len(axes))):
        x = call(torch.movedim, x, tuple(axes), tuple(range(len(axes))))
    found = [entries[at] if at in lists else entries[at][None].clone() for at in ids]  # which may change afterwards
    own = max([0, *[entries[at].dim() for at in lists]])
    in_a_row = len(set(places)) == 1  # else torch puts their axes first
    return _Rows(x, found[0] if len(found) == 1 else tuple(found), own, places[0] if in_a_row else 0)


def entries_of(index: Any) -> tuple[Any, ...]:
    """The entries of the index of `x[index]`, as a tuple."""
    return index if isinstance(index, tuple) else (index,)


def _is_id(entry: Any) -> bool:
    return _is_whole(entry) and entry.dim() == 0


def is_list(entry: Any) -> bool:
    """Whether an entry of an index is a tensor of ids along an axis."""
    return _is_whole(entry) and entry.dim() > 0


def _is_whole(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.dtype in (torch.int64, torch.int32)


def is_mask(entry: Any) -> bool:
    """Whether an entry of an index is a boolean tensor, which may take several axes."""
    return isinstance(entry, Tensor) and entry.dtype is torch.bool and entry.dim() > 0


def _is_between(entry: Any) -> bool:
    """Whether an entry of an index is a slice from or up to an id."""
    return type(entry) is slice and (_is_id(entry.start) or _is_id(entry.stop))


def _takes_a_view(entries: Iterable[Any]) -> bool:
    """Whether these entries take a view; no more than one of them may be `...`."""
    given = list(entries)
    views = all(type(e) in (int, slice, EllipsisType, NoneType) and not _is_between(e) for e in given)
    return views and sum(e is Ellipsis for e in given) < 2


def _overlaps(x: Tensor) -> bool:
    """Whether entries may share memory, as those of an expanded or unfolded tensor."""
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _mask(x: Tensor, entries: tuple[Any, ...]) -> Tensor | None:
    """Which entries of x are written, in a shape that broadcasts to x's.

    None unless one entry is a mask, or a slice between ids, and the others are whole axes.
    """
    chosen = [at for at, e in enumerate(entries) if is_mask(e) or _is_between(e)]
    rest = [e for at, e in enumerate(entries) if at not in chosen]
    if len(chosen) != 1 or not _takes_a_view(rest) or not all(e is Ellipsis or e == slice(None) for e in rest):
        return None
    (at,), entry = chosen, entries[chosen[0]]
    own = entry.dim() if is_mask(entry) else 1
    after = len(entries) - 1 - at if Ellipsis in rest and Ellipsis in entries[:at] else x.dim() - at - own
    before = x.dim() - after - own
    if min(before, after) < 0 or len(rest) - (Ellipsis in rest) + own > x.dim():
        return None
    mask = entry if is_mask(entry) else _between(entry, x.shape[before], x.device)
    if mask is None or mask.shape != x.shape[before : before + own]:
        return None
    return mask.reshape(*mask.shape, *(1,) * after)


def _between(bounds: slice, size: int, device: torch.device) -> Tensor | None:
    """`[size]`: which positions a slice takes, of whose bounds negative ones count from the end; None with a step."""
    if bounds.step is not None:
        return None
    start, stop = 0 if bounds.start is None else bounds.start, size if bounds.stop is None else bounds.stop
    at = torch.arange(size, device=device)
    return (at >= start + size * (start < 0)) & (at < stop + size * (stop < 0))
