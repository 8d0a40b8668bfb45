"""What is a copy under `vmap` where a loop over the examples has a view: neither it nor what it is of may change."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import Tensor

from .modes import innermost, share


class _Pair(NamedTuple):
    held: weakref.ref[Tensor]  # the copy, as long as somebody may read it
    copy: Tensor
    base: Tensor
    versions: tuple[int, int]
    index: Any  # by which the copy was read, if it was

    def changed(self) -> bool:
        return (self.copy._version, self.base._version) != self.versions


class Copies:
    """Those of one run of a loss."""

    def __init__(self) -> None:
        self.pairs: list[_Pair] = []
        self.last: weakref.ref[Tensor] | None = None  # the first argument of the last call
        self.returned: _Pair | None = None  # that is being written back

    def add(self, copy: Tensor, base: Tensor, index: Any = None) -> None:
        """A copy was made of a tensor."""
        own, of = innermost(copy), innermost(base)
        self.pairs.append(_Pair(weakref.ref(copy), own, of, (own._version, of._version), index))

    def begins(self, func: Any, args: Any) -> None:
        """A call begins. `x[id] += v` reads a copy, changes it and writes it back at once, as a view would be."""
        last, self.last = self.last, weakref.ref(args[0]) if args and isinstance(args[0], Tensor) else None
        if func is not Tensor.__setitem__:
            return
        self.pairs = [pair for pair in self.pairs if pair.held() is not None or pair.changed()]
        x, index, value = args
        before = None if last is None else last()
        for at, pair in enumerate(self.pairs):
            once = pair._replace(versions=(pair.versions[0] + 1, pair.versions[1]))
            back = pair.index is index and pair.base is innermost(x) and isinstance(value, Tensor)
            if back and not once.changed() and share(value, pair.copy) and before is not None and share(before, value):
                self.returned = self.pairs.pop(at)
                return

    def ends(self, func: Any) -> None:
        """It has ended."""
        if func is Tensor.__setitem__ and self.returned is not None:
            pair, self.returned = self.returned, None
            if (copy := pair.held()) is not None:
                self.pairs.append(pair._replace(versions=(innermost(copy)._version, pair.base._version)))

    def changed(self) -> bool:
        """Whether a copy, or what one is of, is not what it was."""
        return any(pair.changed() for pair in self.pairs)
