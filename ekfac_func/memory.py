"""Memory for large results on CPUs, in eager mode: in large pages, and used again once nobody reads it."""

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .modes import depth, differentiated

LARGE_BYTES = 2**25  # from which on glibc asks the system each time
SCRATCH_BYTES = 2**23  # from which on `scratch` does
HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)  # of Linux; a hint, not more


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """`like.new_empty(shape)`; a large one in pages of 2 MiB, for the first touch of each page takes time."""
    t = like.new_empty(shape)
    if HUGE_PAGES is not None and t.nbytes >= LARGE_BYTES and writable(t):
        start = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = t.data_ptr() + t.nbytes
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), HUGE_PAGES)
    return t


def scratch(shape: Sequence[int], like: Tensor) -> Tensor:
    """The same for what is freed soon: a memory mapping of its own, which goes back to the system when it is freed.

    glibc would cut aligned memory out of a larger piece, keep it after it is freed and seldom reuse it: the same
    product in a loop would take one piece after another.
    """
    size = math.prod(shape) * like.itemsize
    if HUGE_PAGES is None or size < SCRATCH_BYTES or not writable(like):
        return like.new_empty(shape)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(HUGE_PAGES)
    return torch.frombuffer(memory, dtype=like.dtype).view(*shape)


def writable(*operands: Tensor) -> bool:
    """Whether results of these may be written to memory of ours: on a CPU, with no derivative and no transform."""
    plain = not torch.compiler.is_compiling() and depth() == 0 and _get_current_dispatch_mode() is None
    on_cpu = all(type(t) is Tensor and t.device.type == "cpu" for t in operands)
    return plain and on_cpu and not differentiated(*operands)


class Rooms:
    """Two pieces of memory that results take in turn: each overwrites the last but one, which is read no more."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory for the next result, of this shape."""
        entries = math.prod(shape)
        room = self.held.pop(0) if len(self.held) == 2 else None
        if room is None or room.numel() < entries or room.dtype != like.dtype:
            room = scratch((entries,), like)
        self.held.append(room)
        return room[:entries].view(*shape)
