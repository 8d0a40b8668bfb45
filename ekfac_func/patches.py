"""What the output pixels of a convolution see, unwritten: written some examples at a time, where they stay in cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .memory import Rooms, writable

ONEDNN = torch.backends.mkldnn.is_available()
CHANNELS = 16  # of a block of oneDNN's, without which it takes its slow ways
WIDE = 16  # of a kernel, from which on patches of a depthwise convolution take less time
PIXELS = 4  # of the output for each channel, from which on patches take more time than a convolution without them


@dataclass(frozen=True)
class Patches:
    """The inputs `[n b s i k]` of a convolution: an output pixel is a position, a patch its input."""

    x: Tensor  # [n m b *spatial c], padded; m: inputs of an example
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    last: float | None = None  # one more input, the same at every position
    apart: bool = False  # the offsets of the kernel on k, not with the channels on i

    def parts(self) -> tuple[Tensor, list[int], list[int], list[int], float | None, bool]:
        """As an operator takes it, and `patches_of` gives it back."""
        return self.x, list(self.kernel), list(self.stride), list(self.dilation), self.last, self.apart

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """`n b s i k`."""
        n, m, b, *_, c = self.x.shape
        offsets = math.prod(self.kernel)
        i, k = (c, offsets) if self.apart else (c * offsets, 1)
        return n, b, m * math.prod(self.pixels()), i + (self.last is not None), k

    def pixels(self) -> list[int]:
        """Of the output, along each spatial axis."""
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        return [(size - r) // s + 1 for size, r, s in zip(self.x.shape[3:-1], reach, self.stride, strict=True)]

    def to(self, dtype: torch.dtype) -> Patches:
        return replace(self, x=self.x.to(dtype))

    def write(self, rooms: Rooms | None = None) -> Tensor:
        """`[n b s i k]`, channels before kernel offsets on i, as in the weight. rooms: where they may be written."""
        nd = len(self.kernel)
        return self._written(self.windows().movedim(3, 3 + nd), rooms)  # [n b m *output c *kernel]

    def write_fast(self, rooms: Rooms | None = None) -> Tensor:
        """`[n b s i 1]`, kernel offsets before channels on i, as in memory: `order` leads back. Not where apart."""
        return self._written(self.windows().movedim(3, -1), rooms)  # [n b m *output *kernel c]

    def gradients(self, g: Tensor) -> Tensor:
        """Per-example gradients `[n b o i k]` of output gradients `[n b s o]`: of a convolution with a group for each.

        No patch is written.
        """
        n, m, b, *_, c = self.x.shape
        o, nd, pixels = g.shape[3], len(self.kernel), self.pixels()
        spatial = range(3, 3 + nd)
        x = self.x.permute(1, 0, 2, 3 + nd, *spatial).flatten(1, 3)  # [m (n b c) *spatial]
        y = g.reshape(n, b, m, *pixels, o).permute(2, 0, 1, 3 + nd, *spatial).flatten(1, 3)
        G = weight_gradients(x, y, self.kernel, self.stride, self.dilation, n * b)
        G = G.reshape(n, b, o, *((c, -1) if self.apart else (-1, 1)))
        return G if self.last is None else torch.cat([G, self.last * g.sum(2)[..., None, None]], 3)

    def gradient(self, g: Tensor) -> Tensor:
        """The sum of `gradients`, `[b o i k]`."""
        together = replace(self, x=self.x.flatten(0, 1)[None])
        return together.gradients(g.transpose(0, 1).flatten(1, 2)[None])[0]

    def convolves(self, g: Tensor) -> bool:
        """Whether `gradients` takes less time than the product of g and patches, as measured on a CPU."""
        x, channels = self.x, (self.x.shape[-1], g.shape[3])
        if x.device.type != "cpu" or x.dtype != torch.float32 or not ONEDNN:
            return False
        if x.shape[2] > 1 and max(channels) < CHANNELS:  # depthwise, or nearly so: products of patches are thin
            return max(self.kernel) < WIDE
        return min(channels) >= CHANNELS and self.shape[2] >= PIXELS * max(channels)

    def total(self) -> Tensor:
        """The sum over examples and pixels, `[b i]`, of patches without a last input."""
        windows = replace(self, x=self.x.sum((0, 1))[None, None]).windows()
        return windows.sum(tuple(range(4, 4 + len(self.kernel))))[0, :, 0].flatten(1)

    def _written(self, windows: Tensor, rooms: Rooms | None) -> Tensor:
        """Windows `[n b m *output ... ]` in the shape of the inputs, with the last one beside them."""
        shape = self.shape
        if self.last is None and (math.prod(self.kernel) == 1 or rooms is None):
            return windows.reshape(shape)  # of a kernel of one pixel a view
        a = windows.new_empty(shape) if rooms is None or not writable(windows) else rooms.take(shape, windows)
        if self.last is None:
            a.view(windows.shape).copy_(windows)
            return a
        a[..., -1, :].fill_(self.last)  # assigned, a number is a tensor on the CPU to a compiler
        split = windows.shape[2 : 3 + len(self.kernel)], windows.shape[3 + len(self.kernel) :]
        a[..., :-1, 0].unflatten(3, split[1]).unflatten(2, split[0]).copy_(windows)
        return a

    def windows(self) -> Tensor:
        """What the output pixels see, a view `[n b m c *output *kernel]`."""
        x = self.x.movedim(-1, 3).transpose(1, 2)
        for axis, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(4 + axis, d * (k - 1) + 1, s)[..., ::d]
        return x

    def order(self) -> Tensor:
        """Where `write_fast` has each input of `write`."""
        return self._turned(math.prod(self.kernel), self.x.shape[-1])

    def inverse(self) -> Tensor:
        """Where `write` has each input of `write_fast`."""
        return self._turned(self.x.shape[-1], math.prod(self.kernel))

    def _turned(self, outer: int, inner: int) -> Tensor:
        one = torch.arange(outer * inner, device=self.x.device)
        turned = one.reshape(outer, inner).T.flatten()
        return turned if self.last is None else torch.cat([turned, one.new_full((1,), outer * inner)])


def weight_gradients(
    x: Tensor, g: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """`[(groups o) c *kernel]` of a convolution's inputs `[n (groups c) *]` and output gradients `[n (groups o) *]`."""
    weight = x.new_empty(()).expand(g.shape[1], x.shape[1] // groups, *kernel)
    none = [0] * len(kernel)
    geometry = stride, none, dilation, False, none, groups
    gradient: Tensor = torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, [False, True, False])[1]
    return gradient


def patches_of(
    x: Tensor, kernel: list[int], stride: list[int], dilation: list[int], last: float | None, apart: bool
) -> Patches:
    return Patches(x, tuple(kernel), tuple(stride), tuple(dilation), last, apart)


pytree.register_pytree_node(
    Patches,
    lambda patches: ([patches.x], (patches.kernel, patches.stride, patches.dilation, patches.last, patches.apart)),
    lambda children, constants: Patches(*children, *constants),
    serialized_type_name="ekfac_func.Patches",
)
