"""Some examples at a time: as many as memory allows, or a cache."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .patches import Patches

NOMINAL_N = 256  # the batch size that a graph is planned for: a plan that read the traced one would fix it
MAX_BYTES = 64 * 2**20  # of what is written of some examples at a time
CACHE_BYTES = 2 * 2**20  # of it on a CPU, in eager mode: what is not written to memory and read again


def nominal(n: int) -> int:
    """The batch size that a plan is for: n in eager mode, `NOMINAL_N` in a graph."""
    return NOMINAL_N if torch.compiler.is_compiling() else n


def fitting(size: int, most: int) -> int:
    """How many examples of `size` bytes each fit into `most` bytes: at least one, for one is never split."""
    return max(1, most // max(1, size))


def split(t: Any, most: int | None) -> Sequence[Any]:
    """A tensor or patches in blocks of at most so many examples.

    A graph has as many blocks as a nominal batch, filled up with examples of zeros: a number of blocks that depended on
    the traced batch would fix its size.
    """
    if isinstance(t, Patches):
        return [replace(t, x=x) for x in split(t.x, most)]
    count = 1 if most is None else max(1, -(-nominal(t.shape[0]) // most))
    if count == 1 or not torch.compiler.is_compiling():
        return t.tensor_split(count)
    n = t.shape[0]
    size = n // count + 2  # two more than needed, for a size of 0 or 1 would be a graph of its own
    return torch.cat([t, t.new_zeros(count * size - n, *t.shape[1:])]).reshape(count, size, *t.shape[1:]).unbind()


def in_blocks(t: Any, entries: int) -> Sequence[Any]:
    """A tensor or patches in blocks that fit into a CPU's cache in eager mode, else into `MAX_BYTES`.

    entries: how many are written for each example.
    """
    x = t.x if isinstance(t, Patches) else t
    most = CACHE_BYTES if not torch.compiler.is_compiling() and x.device.type == "cpu" else MAX_BYTES
    return split(t, fitting(entries * x.element_size(), most))
