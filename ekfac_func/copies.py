"""Copies that `vmap` makes where a loop over the examples has views: neither copy nor source may change in place."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .modes import innermost


class _Pair(NamedTuple):
    held: weakref.ref[Tensor]  # the copy, as the loss has it
    copy: Tensor
    base: Tensor
    versions: tuple[int, int]
    index: Any  # the copy is `base[index]`, if it was made by one
    holders: int  # of the copy's memory when it was made

    def changed(self) -> bool:
        return (self.copy._version, self.base._version) != self.versions

    def gone(self) -> bool:
        """Whether nobody can read it any more, by itself or by a view."""
        return self.held() is None and _holders(self.copy) <= self.holders


def _holders(t: Tensor) -> int:
    return torch._C._storage_Use_Count(t.untyped_storage()._cdata)


class Copies:
    """The copies of one run of a loss; in a graph, where nothing can be asked of a tensor's memory, none are noted."""

    def __init__(self) -> None:
        self.pairs: list[_Pair] = []
        self.last: tuple[weakref.ref[Tensor], int] | None = None  # first argument of the last call, its version before
        self.returned: _Pair | None = None  # that is being written back

    def add(self, copy: Tensor, base: Tensor, index: Any = None) -> None:
        """Note that copy was made of base."""
        if torch.compiler.is_dynamo_compiling():
            return
        own, of = innermost(copy), innermost(base)
        if not (own.is_inference() or of.is_inference()):  # which nobody changes
            self.pairs.append(_Pair(weakref.ref(copy), own, of, (own._version, of._version), index, _holders(own)))

    def begins(self, func: Any, args: Any) -> None:
        """Note that a call begins. A copy that is written back at once, as by `x[id] += v`, may change as a view would.

        Python runs `x[id] += v` as three calls in a row: a copy is read, changed in place, and written back.
        """
        if torch.compiler.is_dynamo_compiling():
            return
        last, self.last = self.last, None
        if args and isinstance(args[0], Tensor) and not innermost(args[0]).is_inference():
            self.last = weakref.ref(args[0]), innermost(args[0])._version
        if func is not Tensor.__setitem__:
            return
        self.pairs = [pair for pair in self.pairs if not pair.gone() or pair.changed()]
        before = None if last is None else last[0]()
        if before is None or last is None or not isinstance(args[2], Tensor):
            return
        x, value, changed = innermost(args[0]), innermost(args[2]), innermost(before)
        for at, pair in enumerate(self.pairs):
            own, of = pair.versions
            now = last[1], pair.copy._version, pair.base._version
            if pair.copy is value is changed and pair.base is x and pair.index is args[1] and now == (own, own + 1, of):
                self.returned = self.pairs.pop(at)
                return

    def ends(self, func: Any) -> None:
        """Note that it has ended."""
        if func is Tensor.__setitem__ and self.returned is not None:
            pair, self.returned = self.returned, None
            if not pair.gone():
                self.pairs.append(pair._replace(versions=(pair.copy._version, pair.base._version)))

    def changed(self) -> bool:
        """Whether a copy or its source was changed in place."""
        return any(pair.changed() for pair in self.pairs)
