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
    """As `like.new_empty(shape)`; a large one in pages of 2 MiB, for the first touch of each page takes its time."""
    t = like.new_empty(shape)
    if HUGE_PAGES is not None and t.nbytes >= LARGE_BYTES and writable(t):
        start = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = t.data_ptr() + t.nbytes
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), HUGE_PAGES)
    return t


def scratch(shape: Sequence[int], like: Tensor) -> Tensor:
    """Likewise for what is soon freed, as a mapping of its own, which goes back to the system when it is.

    glibc would cut aligned memory out of a larger piece, keep it when it is freed and seldom find it again: the same
    product in a loop would fill one piece after another.
    """
    size = math.prod(shape) * like.itemsize
    if HUGE_PAGES is None or size < SCRATCH_BYTES or not writable(like):
        return like.new_empty(shape)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(HUGE_PAGES)
    return torch.frombuffer(memory, dtype=like.dtype).view(*shape)


def writable(*operands: Tensor) -> bool:
    """Whether what is made of these can be written into memory of ours: on a CPU, without a derivative or transform."""
    plain = not torch.compiler.is_compiling() and depth() == 0 and _get_current_dispatch_mode() is None
    on_cpu = all(type(t) is Tensor and t.device.type == "cpu" for t in operands)
    return plain and on_cpu and not differentiated(*operands)


class Rooms:
    """Memory for one result after another: each overwrites the last but one, which nobody reads any more."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """For a result of this shape."""
        entries = math.prod(shape)
        room = self.held.pop(0) if len(self.held) == 2 else None
        if room is None or room.numel() < entries or room.dtype != like.dtype:
            room = scratch((entries,), like)
        self.held.append(room)
        return room[:entries].view(*shape)
