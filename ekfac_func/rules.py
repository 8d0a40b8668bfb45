"""Which torch calls are layers: one function and one row each.

A rule reads a call of a torch function and says where its weight's gradient comes from. Whatever no rule
recognises is differentiated as it is: rules are speed and a better basis, never correctness.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .types import Factored


class Call(NamedTuple):
    """One call of a layer, as its rule reads it (letters as in `kronecker.py`).

    `weight.reshape(sizes)` is `[b o i k]`. `read(input, output_gradient)` takes both with a leading axis n and
    returns the terms of the weight's per-example gradients. A bias must add to the output along `(b o)`; a rule that
    leaves it out (None) makes it a block of its own.
    """

    weight: Tensor
    bias: Tensor | None
    input: Tensor
    sizes: tuple[int, int, int, int]
    read: Callable[[Tensor, Tensor], Factored]


Rule = Callable[..., Call | None]
Rules = Mapping[Callable[..., Any], Rule]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
    """`F.linear` with any leading dimensions: each is a position s. A vector weight has no rule."""
    if weight.dim() != 2:
        return None

    def read(x: Tensor, g: Tensor) -> Factored:
        a, g = (t[:, None].flatten(1, -2)[:, None] for t in (x, g))
        return Factored(a[..., None], g)

    return Call(weight, bias, input, (1, *weight.shape, 1), read)


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Call:
    """`F.conv1d`, `F.conv2d`, `F.conv3d`: inputs are patches over `(c/groups kernel)`, an output pixel a position."""
    nd = weight.dim() - 2

    def read(x: Tensor, g: Tensor) -> Factored:
        patches = _patches(_batched(x, nd), weight.shape[2:], stride, padding, dilation)
        a = rearrange(
            patches, f"n m (b c) {_OUT[nd]} {_KERNEL[nd]} -> n b (m {_OUT[nd]}) (c {_KERNEL[nd]}) 1", b=groups
        )
        return Factored(a, _pixels(_batched(g, nd), groups))

    c_out, c = weight.shape[:2]
    return Call(weight, bias, input, (groups, c_out // groups, c * weight[0, 0].numel(), 1), read)


def conv_sua(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Call:
    """Convolutions under the spatially uncorrelated activations assumption: `A` over channels alone.

    Grosse & Martens 2016, https://arxiv.org/abs/1602.01407. `A` is the mean over examples and all pixels of the
    convolution's input, and the kernel offsets stay apart (k). The per-example gradients and their moment stay exact.
    The bias is a block of its own.
    """
    nd = weight.dim() - 2
    dense = conv(input, weight, None, stride, padding, dilation, groups)
    c, offsets = weight.shape[1], weight[0, 0].numel()

    def read(x: Tensor, g: Tensor) -> Factored:
        a, g, _ = dense.read(x, g)
        return Factored(a.unflatten(3, (c, offsets)).squeeze(5), g, _pixels(_batched(x, nd), groups))

    return Call(weight, None, input, (*dense.sizes[:2], c, offsets), read)


_OUT = ("", "x", "x y", "x y z")
_KERNEL = ("", "u", "u v", "u v w")


def _pixels(x: Tensor, groups: int) -> Tensor:
    """`[n m (b c) ...]` to `[n b p c]`."""
    return rearrange(x, "n m (b c) ... -> n b (m ...) c", b=groups)


def _batched(x: Tensor, nd: int) -> Tensor:
    """`[n (m) c ...]` with the convolution's own batch axis m written out."""
    return x.unsqueeze(1) if x.dim() == nd + 2 else x


def _patches(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: int | tuple[int, ...],
    padding: str | int | tuple[int, ...],
    dilation: int | tuple[int, ...],
) -> Tensor:
    """`[n m c ...]` to a view `[n m c *output *kernel]` of what each output pixel sees."""
    x = padded(x, kernel, padding, dilation)
    for axis, (k, s, d) in enumerate(zip(kernel, each(stride, kernel), each(dilation, kernel), strict=True)):
        x = x.unfold(3 + axis, d * (k - 1) + 1, s)[..., ::d]
    return x


def padded(
    x: Tensor, kernel: tuple[int, ...], padding: str | int | tuple[int, ...], dilation: int | tuple[int, ...]
) -> Tensor:
    """The input of a convolution with its zero padding written out."""
    if padding == "same":  # an odd reach pads the end once more
        reach = [d * (k - 1) for k, d in zip(kernel, each(dilation, kernel), strict=True)]
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        sides = [(p, p) for p in each(0 if padding == "valid" else padding, kernel)]
    return F.pad(x, [p for side in reversed(sides) for p in side]) if any(map(any, sides)) else x


def each(value: Any, kernel: tuple[int, ...]) -> list[int]:
    """A setting of a convolution, one number a spatial axis."""
    values = [value] if isinstance(value, int) else list(value)
    return values * len(kernel) if len(values) == 1 else values


RULES: Rules = {F.linear: linear, F.conv1d: conv, F.conv2d: conv, F.conv3d: conv}
SUA: Rules = {F.conv1d: conv_sua, F.conv2d: conv_sua, F.conv3d: conv_sua}
