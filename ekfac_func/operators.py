"""Operators that `torch.func.vmap` calls once, on all examples: their number stays a symbol in a traced graph.

They have no derivative of their own: the gradient is taken outside `vmap`, of what its rule calls.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def examples_first(n: int, tensors: Sequence[Tensor], in_dims: Sequence[int | None]) -> list[Tensor]:
    """Arguments of a `vmap` rule with the examples in front; what does not depend on the example is repeated."""
    return [
        t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, in_dims, strict=True)
    ]


def _plain_conv(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: list[int] | None,  # by how much its output is longer
) -> Tensor:
    extra = [0] * len(stride) if transposed is None else transposed
    return torch.convolution(x, weight, None, stride, padding, dilation, transposed is not None, extra, groups)


conv = torch.library.custom_op("ekfac_func::conv", _plain_conv, mutates_args=())
conv.register_fake(_plain_conv)


@conv.register_vmap
def _(info: Any, in_dims: Any, x: Tensor, weight: Tensor, *geometry: Any) -> tuple[Tensor, int]:
    if in_dims[1] is not None:  # of an ensemble: a group for each
        x, weight = examples_first(info.batch_size, (x, weight), in_dims[:2])
        stride, padding, dilation, groups, transposed = geometry
        geometry = stride, padding, dilation, groups * len(weight), transposed
        y = _plain_conv(x.movedim(0, 1).flatten(1, 2), weight.flatten(0, 1), *geometry)
        return y.unflatten(1, (len(weight), -1)), 1
    x = x.movedim(in_dims[0], 0)
    y = _plain_conv(x.flatten(0, 1), weight, *geometry)
    return y.unflatten(0, x.shape[:2]), 0


@torch.library.custom_op("ekfac_func::layer_norm", mutates_args=())
def layer_norm(x: Tensor, shape: list[int], eps: float) -> Tensor:
    return F.layer_norm(x, shape, None, None, eps)


@layer_norm.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@layer_norm.register_vmap
def _(info: Any, in_dims: Any, x: Tensor, shape: list[int], eps: float) -> tuple[Tensor, int]:
    return F.layer_norm(x.movedim(in_dims[0], 0), shape, None, None, eps), 0


def of_images(name: str, function: Callable[..., Tensor], schema: str) -> Callable[..., Tensor]:
    """An operator on images along the first axis; under `vmap` it is called once, on the images of all examples."""

    def of_all(info: Any, in_dims: Any, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        x = x.movedim(in_dims[0], 0)
        return function(x.flatten(0, 1), *rest).unflatten(0, x.shape[:2]), 0

    op = torch.library.custom_op(f"ekfac_func::{name}", function, mutates_args=(), schema=schema)
    op.register_fake(function)
    op.register_vmap(of_all)
    return op


def of_one_or_more(op: Callable[..., Tensor], x: Tensor, nd: int, *args: Any) -> Tensor:
    """Call such an operator on images of nd axes, or on a single one."""
    return op(x, *args) if x.dim() == nd + 2 else op(x[None], *args)[0]


group_norm = of_images(
    "group_norm",
    lambda x, groups, eps: F.group_norm(x, groups, None, None, eps),
    "(Tensor x, SymInt groups, float eps) -> Tensor",
)
avg_pool2d = of_images(
    "avg_pool2d",
    F.avg_pool2d,
    "(Tensor x, SymInt[] kernel, SymInt[] stride, SymInt[] padding, bool ceil, bool all, SymInt? divisor) -> Tensor",
)


@torch.library.custom_op("ekfac_func::nll", mutates_args=())
def nll(logs: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return F.nll_loss(logs, target, ignore_index=ignore_index, reduction="none")


@nll.register_fake
def _(logs: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return logs.new_empty(target.shape)


@nll.register_vmap
def _(info: Any, in_dims: Any, logs: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, int]:
    logs, target = examples_first(info.batch_size, (logs, target), in_dims[:2])
    if logs.dim() == 2:  # one distribution an example
        return F.nll_loss(logs, target, ignore_index=ignore_index, reduction="none"), 0
    losses = F.nll_loss(logs.flatten(0, 1), target.flatten(0, 1), ignore_index=ignore_index, reduction="none")
    return losses.unflatten(0, target.shape[:2]), 0


@torch.library.custom_op("ekfac_func::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, gqa: bool
) -> Tensor:
    y = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa)
    return y.contiguous()  # as its fake is, where the kernels have the heads within the positions


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@attention.register_vmap
def _(
    info: Any, in_dims: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: Any, gqa: bool
) -> tuple[Tensor, int]:
    n = info.batch_size
    q, k, v = examples_first(n, (q, k, v), in_dims[:3])
    lead = q.shape[:-3]
    if mask is not None and (in_dims[3] is not None or mask.dim() > 2):
        mask = mask.expand(n, *mask.shape) if in_dims[3] is None else mask.movedim(in_dims[3], 0)
        mask = mask.reshape(n, *(1,) * (q.dim() - mask.dim()), *mask.shape[1:])
        mask = mask.expand(*lead, *mask.shape[-3:]).flatten(0, -4)
    q, k, v = (t.flatten(0, -4) for t in (q, k, v))  # [(n ...) heads l d], as the kernels want it
    y = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa)
    return y.unflatten(0, lead), 0


interpolate = of_images(
    "interpolate",
    F.interpolate,
    "(Tensor input, SymInt[]? size, float[]? scales, str mode, bool? corners, bool? again, bool antialias) -> Tensor",
)


def _plain_cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(list(tensors), dim)


cat = torch.library.custom_op("ekfac_func::cat", _plain_cat, mutates_args=())
cat.register_fake(_plain_cat)


@cat.register_vmap
def _(info: Any, in_dims: Any, tensors: Sequence[Tensor], dim: int) -> tuple[Tensor, int]:
    return torch.cat(examples_first(info.batch_size, tensors, in_dims[0]), dim + 1), 0


@torch.library.custom_op("ekfac_func::binary_cross_entropy", mutates_args=())
def binary_cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy(input, target, reduction="none")


@binary_cross_entropy.register_fake
def _(input: Tensor, target: Tensor) -> Tensor:
    return torch.empty_like(input)


@binary_cross_entropy.register_vmap
def _(info: Any, in_dims: Any, *both: Tensor) -> tuple[Tensor, int]:
    input, target = examples_first(info.batch_size, both, in_dims)
    return F.binary_cross_entropy(input, target, reduction="none"), 0
