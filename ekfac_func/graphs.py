"""More torch functions for traced graphs: the batch size stays open.

The rules of `torch.func.vmap` for these fix the batch size, and every size would cost a graph of its own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operators
from .batching import Functions
from .expansions import reduced
from .rules import per_axis


def cat(tensors: Sequence[Tensor], dim: int = 0, **named: Any) -> Tensor:
    """`torch.cat`."""
    rest = [t for t in tensors if t.shape != (0,)]  # torch leaves such out, whatever the others' shapes
    if named or not rest:
        return torch.cat(list(tensors), dim, **named)
    return operators.cat(rest, range(rest[0].dim())[dim])


def index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    """`torch.index_select`."""
    if input.dim() == 0:
        return input.clone()
    return input.movedim(dim, 0)[_not_negative(index, input.shape[dim]).reshape(-1)].movedim(0, dim)


def gather(input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """`torch.gather`."""
    if input.dim() == 0:
        return input.expand(index.shape).clone()
    return input[_grid(input, dim, index)] if index.dim() else index_select(input, dim, index).reshape(())


def scatter_add(input: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """`torch.scatter_add`."""
    if input.dim() == 0:
        return input + src.reshape(())
    index, src = (t if t.dim() else t[None] for t in (index, src))
    return input.index_put(_grid(input, dim, index), src[tuple(slice(size) for size in index.shape)], accumulate=True)


def index_add(input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    """`torch.index_add`."""
    if input.dim() == 0:
        return input + alpha * source.reshape(())
    rows, source = input.movedim(dim, 0), source.movedim(dim, 0)
    places = _not_negative(index, len(rows)).reshape(-1)
    added = source if isinstance(alpha, int) and alpha == 1 else alpha * source  # the former of bool too
    return rows.index_put((places,), added, accumulate=True).movedim(0, dim)


def _not_negative(index: Tensor, size: int) -> Tensor:
    """An index whose negative entries are out of bounds, as in these functions; plain indexing counts from the end."""
    return torch.where(index < 0, size, index)


def _grid(input: Tensor, dim: int, index: Tensor) -> tuple[Tensor, ...]:
    """For `x[grid]`: the places of the entries that `gather(x, dim, index)` reads."""
    axes = range(index.dim())
    along = [
        torch.arange(size, device=index.device).reshape([-1 if axis == at else 1 for axis in axes])
        for at, size in enumerate(index.shape)
    ]
    along[dim] = _not_negative(index, input.shape[dim])
    return tuple(along)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """`F.kl_div`."""
    if size_average is not None or reduce is not None:
        return F.kl_div(input, target, size_average, reduce, reduction, log_target)
    losses = target.exp() * (target - input) if log_target else torch.xlogy(target, target) - target * input
    if reduction == "batchmean":
        return losses.sum() / (input.shape[0] if input.dim() else 1)
    return reduced(losses, reduction)


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`F.binary_cross_entropy`."""
    if size_average is not None or reduce is not None or target.shape != input.shape:
        return F.binary_cross_entropy(input, target, weight, size_average, reduce, reduction)
    losses = operators.binary_cross_entropy(input, target)
    return reduced(losses if weight is None else losses * weight, reduction)


def interpolate(
    input: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """`F.interpolate`."""
    axes = input.shape[2:]
    sizes = None if size is None else per_axis(size, len(axes))
    scales = [scale_factor] * len(axes) if isinstance(scale_factor, int | float) else scale_factor
    return operators.interpolate(input, sizes, scales, mode, align_corners, recompute_scale_factor, antialias)


def adaptive_pool(function: Callable[..., Tensor], nd: int) -> Callable[..., Tensor]:
    """An average or a maximum over windows of the last nd axes, as many as are asked for."""
    op = operators.of_images(function.__name__, function, "(Tensor input, SymInt[] output_size) -> Tensor")

    def pool(input: Tensor, output_size: int | Sequence[int | None], return_indices: bool = False) -> Any:
        if return_indices:
            return function(input, output_size, True)
        axes = input.shape[-nd:]
        given = [output_size] * nd if isinstance(output_size, int) else output_size
        sizes = [old if new is None else new for old, new in zip(axes, given, strict=True)]
        return operators.of_one_or_more(op, input, nd, sizes)

    return pool


def _named(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, which takes `axis` for `dim` as torch functions do."""

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Tensor:
        return function(*args, **{"dim" if name == "axis" else name: value for name, value in named.items()})

    return call


IN_GRAPHS: Functions = {
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _named(cat)),
    **dict.fromkeys((torch.gather, Tensor.gather), _named(gather)),
    **dict.fromkeys((torch.index_select, Tensor.index_select), _named(index_select)),
    **dict.fromkeys((torch.index_add, Tensor.index_add), _named(index_add)),
    **dict.fromkeys((torch.scatter_add, Tensor.scatter_add), _named(scatter_add)),
    F.kl_div: kl_div,
    F.binary_cross_entropy: binary_cross_entropy,
    F.interpolate: interpolate,
    **{
        function: adaptive_pool(function, nd)
        for nd in (1, 2, 3)
        for function in (getattr(F, f"adaptive_avg_pool{nd}d"), getattr(F, f"adaptive_max_pool{nd}d"))
    },
}
"""For a graph of a loss of one example."""
