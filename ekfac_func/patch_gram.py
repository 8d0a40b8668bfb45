"""The second moment of a convolution's patches, most of which the offsets of the kernel share.

At stride 1 the entry of two offsets is a sum over pixels of `x[p] x[p + apart]^T`, which depends on how far they are
apart alone, but for the borders: each offset sees a window of the image. So an axis is cut where a window begins or
ends, and each piece is summed once for all pairs of offsets that far apart, both of which see it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocking import in_blocks
from .modes import one_by_one, opaque
from .patches import CHANNELS, Patches, patches_of, weight_gradients
from .products import outer


def patch_gram(a: Patches) -> Tensor:
    """`sum patch patch^T` over examples and pixels, `[b i i]`, channels before kernel offsets on i as in the weight."""
    assert not a.apart
    if opaque(a.x):
        return _operator(*a.parts())
    patches = replace(a, last=None)
    n, b, s, i, _ = a.shape
    c, K = a.x.shape[-1], a.kernel[0] if a.stride[0] == 1 else 1
    sums: dict[tuple[int, int], Tensor] = {}
    for some in [patches] if _correlates(patches) else in_blocks(patches, _entries(patches)):
        for at, product in _products(some):
            sums[at] = sums[at] + product if at in sums else product
    gram = a.x.new_empty(b, i, i)
    inputs = patches.shape[3]
    split = c, K, inputs // (c * K)
    grid = gram[:, :inputs, :inputs].unflatten(2, split).unflatten(1, split)
    for (j, k), product in sums.items():
        entries = product.unflatten(2, (-1, c)).unflatten(1, (-1, c))  # [b offsets c offsets c]
        grid[:, :, j, :, :, k] = entries.permute(0, 2, 1, 4, 3)
        if j < k:
            grid[:, :, k, :, :, j] = entries.permute(0, 4, 3, 2, 1)
    if a.last is not None:
        gram[:, :-1, -1] = gram[:, -1, :-1] = a.last * patches.total()
        gram[:, -1, -1] = a.x.new_full((n,), float(s)).sum() * a.last**2
    return gram


@torch.library.custom_op("ekfac_func::patch_gram", mutates_args=())
def _operator(
    x: Tensor, kernel: list[int], stride: list[int], dilation: list[int], last: float | None, apart: bool
) -> Tensor:
    return patch_gram(patches_of(x, kernel, stride, dilation, last, apart))


@_operator.register_fake
def _(x: Tensor, *geometry: Any) -> Tensor:
    _, b, _, i, _ = patches_of(x, *geometry).shape
    return x.new_empty(b, i, i)


_operator.register_vmap(one_by_one(_operator))


def _products(a: Patches) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """What is added up for a pair j <= k of kernel rows, `[b (offsets c) (offsets c)]` of the offsets in them."""
    if a.stride[0] > 1:
        x = a.write_fast()[..., 0].transpose(0, 1).flatten(1, 2)
        yield (0, 0), outer(x, x)
        return
    K = a.kernel[0]
    for piece in _pieces(a.x.shape[3], K, a.dilation[0]):
        sums = _by_correlation if _correlates(a) and len(piece.offsets) == K else _by_rows
        for apart, product in enumerate(sums(a, piece, K - piece.offsets[0])):
            yield from (((k, k + apart), product) for k in piece.offsets if k + apart < K)


class Piece(NamedTuple):
    """Pixels along an axis that the same offsets of a kernel see."""

    start: int
    end: int
    offsets: Sequence[int]


def _pieces(size: int, kernel: int, dilation: int) -> list[Piece]:
    pixels = size - dilation * (kernel - 1)
    windows = [(dilation * k, dilation * k + pixels) for k in range(kernel)]
    cuts = sorted({cut for window in windows for cut in window})
    found = []
    for start, end in itertools.pairwise(cuts):
        offsets = [k for k in range(kernel) if windows[k][0] <= start and end <= windows[k][1]]
        if offsets:
            found.append(Piece(start, end, offsets))
    return found


def _by_rows(a: Patches, piece: Piece, count: int) -> list[Tensor]:
    """Sums of rows of the image and those up to count further, `[b (kernel c) (kernel c)]` of the other axes."""
    start, end, _ = piece
    step, size = a.dilation[0], end - start
    y = _rows(replace(a, x=a.x[:, :, :, start : end + step * (count - 1)]))
    one = y[:, :size].flatten(1, 2)
    return [outer(one, y[:, step * apart : step * apart + size].flatten(1, 2)) for apart in range(count)]


def _rows(a: Patches) -> Tensor:
    """Patches in each row of the input, `[b rows (n m pixels) (kernel c)]`, of the kernel's other axes."""
    x = replace(a, kernel=(1, *a.kernel[1:])).windows()  # [n b m c rows *pixels 1 *offsets]
    nd = len(a.kernel)
    x = x.permute(1, 4, 0, 2, *range(5, 4 + 2 * nd), 3)
    return x.reshape(*x.shape[:2], -1, math.prod(a.kernel[1:]) * a.x.shape[-1])


def _entries(a: Patches) -> int:
    """What is written of an example."""
    return math.prod(a.shape[1:] if a.stride[0] > 1 else (*a.x.shape[1:], *a.kernel[1:]))


def _correlates(a: Patches) -> bool:
    """Whether correlations of the image with itself take less time than products of its rows, as measured on a CPU."""
    return len(a.kernel) == 2 and a.stride == (1, 1) and a.x.device.type == "cpu" and a.x.shape[-1] >= CHANNELS


def _by_correlation(a: Patches, piece: Piece, count: int) -> list[Tensor]:
    """As `_by_rows`, in two dimensions: the columns of the image in pieces as well, each a gradient of a kernel."""
    start, end, _ = piece
    _, _, b, _, columns, c = a.x.shape
    K, (down, across) = a.kernel[1], a.dilation
    x = a.x.flatten(0, 1).permute(0, 1, 4, 2, 3).flatten(1, 2)  # [(n m) (b c) rows columns]
    found = x.new_zeros(count, b, K, c, K, c)
    for left, right, offsets in _pieces(columns, K, across):
        first, last = offsets[0], offsets[-1]
        below = slice(start, end + down * (count - 1))
        beside = slice(left - across * last, right + across * (K - 1 - first))
        kernel = count, K + last - first
        product = weight_gradients(
            x[:, :, below, beside], x[:, :, start:end, left:right], kernel, (1, 1), a.dilation, b
        )
        product = product.unflatten(0, (b, c)).permute(3, 0, 1, 4, 2)  # [count b c columns c]
        for k in offsets:
            found[:, :, k] += product[:, :, :, last - k : last - k + K]
    return list(found.flatten(4, 5).flatten(2, 3).unbind())
