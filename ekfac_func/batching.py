"""Torch functions as `torch.func.vmap` should run them: exact, and with the batch size of a traced graph left open.

The rules of `torch.func.vmap` for convolutions and class-index losses fix the batch size while `torch.compile` traces,
and every size would cost its own graphs. These are the same functions with a rule that leaves it a symbol. They have no
derivative of their own: the gradient is taken outside `vmap`, of what the rule calls.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rules import each, padded


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """`F.conv1d`, `F.conv2d`, `F.conv3d`."""
    kernel = weight.shape[2:]
    nd = len(kernel)
    x = input if input.dim() == nd + 2 else input[None]
    if padding == "same":
        x, padding = padded(x, kernel, padding, dilation), 0
    pads = each(0 if padding == "valid" else padding, kernel)
    y = _conv(x, weight, each(stride, kernel), pads, each(dilation, kernel), groups)
    if bias is not None:
        y = y + bias.reshape(-1, *(1,) * nd)
    return y if input.dim() == nd + 2 else y[0]


def cross_entropy(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.cross_entropy`; class indices without weights or smoothing keep the batch size open."""
    plain = len(args) == 0 and kwargs.keys() <= {"ignore_index", "reduction"} and not target.is_floating_point()
    if not plain:
        return F.cross_entropy(input, target, *args, **kwargs)
    return nll_loss(F.log_softmax(input, dim=min(input.dim() - 1, 1)), target, **kwargs)


def nll_loss(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.nll_loss`; without weights it keeps the batch size open."""
    if len(args) > 0 or not kwargs.keys() <= {"ignore_index", "reduction"}:
        return F.nll_loss(input, target, *args, **kwargs)
    ignore_index, reduction = kwargs.get("ignore_index", -100), kwargs.get("reduction", "mean")
    losses = _nll(input, target, ignore_index)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (target != ignore_index).sum()


def embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """`F.embedding`, of which `vmap` forgets under a batched weight that padding has no gradient."""
    rows = F.embedding(input, weight, None, *args, **kwargs)
    if padding_idx is None:
        return rows
    return torch.where((input == padding_idx % len(weight))[..., None], rows.detach(), rows)


EXACT: dict[Callable[..., Any], Callable[..., Tensor]] = {F.embedding: embedding}
OPEN: dict[Callable[..., Any], Callable[..., Tensor]] = {F.cross_entropy: cross_entropy, F.nll_loss: nll_loss}
OPEN_LAYERS: dict[Callable[..., Any], Callable[..., Tensor]] = {F.conv1d: conv, F.conv2d: conv, F.conv3d: conv}


@torch.library.custom_op("ekfac_func::conv", mutates_args=())
def _conv(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Tensor:
    return _plain_conv(x, weight, stride, padding, dilation, groups)


def _plain_conv(x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)


_conv.register_fake(_plain_conv)


@_conv.register_vmap
def _(info: Any, in_dims: Any, x: Tensor, weight: Tensor, *geometry: Any) -> tuple[Tensor, int]:
    if in_dims[1] is not None:
        return torch.func.vmap(lambda x, w: _plain_conv(x, w, *geometry), in_dims[:2])(x, weight), 0
    x = x.movedim(in_dims[0], 0)
    y = _plain_conv(x.flatten(0, 1), weight, *geometry)
    return y.unflatten(0, x.shape[:2]), 0


@torch.library.custom_op("ekfac_func::nll", mutates_args=())
def _nll(logs: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return F.nll_loss(logs, target, ignore_index=ignore_index, reduction="none")


@_nll.register_fake
def _(logs: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return logs.new_empty(target.shape)


@_nll.register_vmap
def _(info: Any, in_dims: Any, logs: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, int]:
    n = info.batch_size
    logs, target = (
        t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip((logs, target), in_dims, strict=False)
    )
    if logs.dim() == 2:  # one distribution an example
        return F.nll_loss(logs, target, ignore_index=ignore_index, reduction="none"), 0
    losses = F.nll_loss(logs.flatten(0, 1), target.flatten(0, 1), ignore_index=ignore_index, reduction="none")
    return losses.unflatten(0, target.shape[:2]), 0
