"""Patches of a kernel of 3 x 3 times a matrix, with 16 multiplications where patches have 36.

Four output pixels see a tile of 4 x 4 input pixels, and a column of the matrix is a filter for each channel. Tiles and
filters are turned along both axes and multiplied entry by entry, with the channels as the inner axis: minimal
filtering, Lavin & Gray 2015, https://arxiv.org/abs/1509.09308. What it halves, it halves in the tiles.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import Rooms
from .patches import Patches
from .products import rotate

POSITIONS = 2048  # at a time, for which it pays to turn the filters
ENTRIES = 2**20  # of a product, which then stays in cache until it is added up
COLUMNS = 512  # of the matrix that are turned at a time, at most
SIGNS = (1, 0), (1, 1), (1, -1), (0, -1)  # of the four products along an axis in its two output pixels
OVERHEAD = 1800  # multiplications that take as long as to turn a tile, for each column, or a filter


def filters(a: Patches, n: int) -> bool:
    """Whether it takes less time than a product of the patches of n examples, as measured on a CPU in eager mode."""
    _, m, b, *_, c = a.x.shape
    if a.kernel != (3, 3) or {*a.stride, *a.dilation} != {1} or a.apart or b > 1 or a.x.device.type != "cpu":
        return False
    down, across = a.pixels()
    tiles = n * m * -(-down // 2) * -(-across // 2)
    return (9 * n * m * down * across - 16 * tiles) * c >= OVERHEAD * (tiles + c)


def filtered(a: Patches, Q: Tensor, rooms: Rooms) -> Tensor:
    """`[n 1 s I 1]` of patches `[n 1 s i 1]` and `Q [i I]`. rooms: where it may be written."""
    n, m, *_, c = a.x.shape
    down, across = a.pixels()
    images = F.pad(a.x.flatten(0, 2), (0, 0, 0, across % 2, 0, down % 2))
    tiles = images.unfold(1, 4, 2).unfold(2, 4, 2).permute(4, 5, 0, 1, 2, 3)  # [4 4 images down across c]
    turned = _turned_tiles(_turned_tiles(tiles).transpose(0, 1)).flatten(2, 4).contiguous()  # [across down tiles c]
    width = max(1, min(COLUMNS, ENTRIES // turned.shape[2]))
    y = rooms.take((n * m, down, across, Q.shape[1]), Q)
    y.copy_(y.new_zeros(()) if a.last is None else a.last * Q[-1])
    offsets = Q[: 9 * c].unflatten(0, (c, 3, 3)).permute(1, 2, 0, 3)  # [3 3 c I]
    for columns, some in zip(y.split(width, 3), offsets.split(width, 3), strict=True):
        _add_products(columns, turned, some)
    return y.view(n, 1, -1, Q.shape[1], 1)


def _turned_tiles(x: Tensor) -> Tensor:
    """Along the first axis, `[4 ...]`."""
    return torch.stack([x[0] - x[2], (x[1] + x[2]) / 2, (x[2] - x[1]) / 2, x[1] - x[3]])


def _turned_filters(q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Along the first axis, `[3 ...]` to four."""
    outer = q[0] + q[2]
    return q[0], outer + q[1], outer.sub_(q[1]), q[2]


def _add_products(y: Tensor, tiles: Tensor, offsets: Tensor) -> None:
    """To `[images down across I]`, of turned tiles `[4 4 tiles c]`, across before down, and filters `[3 3 c I]`."""
    shape = y.shape[0], -(-y.shape[1] // 2), -(-y.shape[2] // 2), y.shape[3]
    for of_row, row, signs in zip(tiles.unbind(1), _turned_filters(offsets), SIGNS, strict=True):
        one, two, three, four = (rotate(x, q) for x, q in zip(of_row, _turned_filters(row), strict=True))
        for right, sums in enumerate((one.add_(two).add_(three), two.sub_(three).sub_(four))):
            for below, sign in enumerate(signs):
                if sign:
                    pixels = y[:, below::2, right::2]
                    pixels.add_(sums.view(shape)[:, : pixels.shape[1], : pixels.shape[2]], alpha=sign)
