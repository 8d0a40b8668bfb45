"""Torch functions as `torch.func.vmap` should run them: exact, fused, the batch size of a traced graph left open.

The rules of `torch.func.vmap` for convolutions and class-index losses fix the batch size while `torch.compile` traces,
and every size would cost its own graphs; of attention it runs the fused kernels one example at a time. These are the
same functions by operators of `operators.py`, which have rules of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import FakeTensor

from . import expansions, operators, products
from .modes import innermost, past_vmap
from .rules import margins, per_axis, standardised


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
    nd = weight.dim() - 2
    if padding == "same":
        input, padding = F.pad(input, margins(weight.shape[2:], padding, dilation)), 0
    pads = per_axis(0 if padding == "valid" else padding, nd)
    return _with_bias(input, weight, bias, per_axis(stride, nd), pads, per_axis(dilation, nd), groups, None)


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> Tensor:
    """`F.conv_transpose1d`, `F.conv_transpose2d`, `F.conv_transpose3d`."""
    nd = weight.dim() - 2
    strides, pads, extra, reach = (per_axis(v, nd) for v in (stride, padding, output_padding, dilation))
    return _with_bias(input, weight, bias, strides, pads, reach, groups, extra)


def _with_bias(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    x, weight = _under_autocast([x, weight])
    y = operators.of_one_or_more(operators.conv, x, weight.dim() - 2, weight, *geometry)
    return y if bias is None else y + _under_autocast([bias])[0].reshape(-1, *(1,) * (weight.dim() - 2))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of a weight and a bias that are those of all examples: `vmap` adds the bias in a pass of its own."""
    of_all = not any(t is not None and functorch.is_functorch_wrapped_tensor(t) for t in (weight, bias))
    along = weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1])  # of others some lie along positions
    if not (of_all and along):
        return F.linear(input, weight, bias)
    if functorch.is_batchedtensor(input):
        return past_vmap(lambda x: products.linear(x, weight, bias), input)
    return products.linear(input, weight, bias)


def linear_of_rows(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, whose own fusion with a bias under `torch.func.grad` reads the sizes of an input of three axes."""
    if input.dim() != 3 or bias is None:
        return F.linear(input, weight, bias)
    return F.linear(input.flatten(0, 1), weight, bias).unflatten(0, input.shape[:2])


def addmm(*operands: Any, **named: Any) -> Tensor:
    """`torch.addmm`; of a vector and two matrices it is a linear layer."""
    if len(operands) == 3 and not named and operands[0].dim() == 1:
        return linear(operands[1], operands[2].mT, operands[0])
    return torch.addmm(*operands, **named)


def cast_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in the dtype that autocast gives it: `vmap` would add the bias in a larger one than the product's."""
    return F.linear(input, weight, None if bias is None else _under_autocast([bias])[0])


def cast_sum(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.addmm` and the like, which add to their first operand, likewise."""

    def cast(input: Tensor, *operands: Any, **named: Any) -> Tensor:
        if not isinstance(input, Tensor):  # its factor, in an order of arguments that is deprecated
            return function(input, *operands, **named)
        return function(_under_autocast([input])[0], *operands, **named)

    return cast


def cross_entropy(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.cross_entropy`; class indices without weights keep the batch size open."""
    known = {"ignore_index", "reduction", "label_smoothing"}
    if len(args) > 0 or not _given(kwargs) <= known or target.is_floating_point():
        return F.cross_entropy(input, target, *args, **kwargs)
    (input,) = _under_autocast([input], torch.float32)
    return _of_labels(F.log_softmax(input, dim=min(input.dim() - 1, 1)), target, **kwargs)


def nll_loss(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.nll_loss`; without weights it keeps the batch size open."""
    if len(args) > 0 or not _given(kwargs) <= {"ignore_index", "reduction"}:
        return F.nll_loss(input, target, *args, **kwargs)
    (input,) = _under_autocast([input], torch.float32)
    return _of_labels(input, target, **kwargs)


def _of_labels(
    logs: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **defaults: None,
) -> Tensor:
    losses = operators.nll(logs, target, ignore_index)
    if label_smoothing:
        of_all = torch.where(target == ignore_index, 0, -logs.mean(min(logs.dim() - 1, 1)))
        losses = (1 - label_smoothing) * losses + label_smoothing * of_all
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (target != ignore_index).sum()


def _under_autocast(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Tensors cast as autocast casts them for torch's own function, by default to its lower precision."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    to = torch.get_autocast_dtype(device) if dtype is None else dtype
    return [t.to(to) if t.is_floating_point() and t.dtype is not torch.float64 else t for t in tensors]


def _given(kwargs: dict[str, Any]) -> set[str]:
    """The names of arguments that differ from their defaults: torch functions hand a tap the defaults as well."""
    defaults = {"weight": None, "size_average": None, "reduce": None, "label_smoothing": 0.0}
    return {name for name, value in kwargs.items() if isinstance(value, Tensor) or value != defaults.get(name)}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`; without dropout and of equal leading axes one fused call for all examples."""
    alike = query.dim() > 2 and query.shape[:-3] == key.shape[:-3] == value.shape[:-3]
    heads = query.shape[-3:-2] == key.shape[-3:-2] == value.shape[-3:-2]
    if dropout_p or not alike or not (heads or enable_gqa):
        given = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        found = expansions.scaled_dot_product_attention(F.scaled_dot_product_attention, *given)
        return F.scaled_dot_product_attention(*given) if found is NotImplemented else found
    query, key, value = _under_autocast([query, key, value])
    if attn_mask is not None:
        (attn_mask,) = _under_autocast([attn_mask])
    return operators.attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)


def max_pool(function: Callable[..., Tensor], nd: int) -> Callable[..., Tensor]:
    """A maximum over windows of the last nd axes; all axes before them are joined, so that `vmap` need not reshape."""

    def pool(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = function(input.flatten(0, -nd - 1), *args, **kwargs)
        lead = input.shape[:-nd]
        return y.unflatten(0, lead) if isinstance(y, Tensor) else tuple(part.unflatten(0, lead) for part in y)

    return pool


def avg_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] | None = None,
    padding: int | tuple[int, ...] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """`F.avg_pool2d`."""
    kernel, pads = per_axis(kernel_size, 2), per_axis(padding, 2)
    strides = kernel if stride is None else per_axis(stride, 2)
    return operators.of_one_or_more(
        operators.avg_pool2d, input, 2, kernel, strides, pads, ceil_mode, count_include_pad, divisor_override
    )


def avg_pool1d(
    input: Tensor,
    kernel_size: int | tuple[int],
    stride: int | tuple[int] | None = None,
    padding: int | tuple[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """`F.avg_pool1d`, of images of one row."""
    kernel, pads = per_axis(kernel_size, 1), per_axis(padding, 1)
    strides = kernel if stride is None else per_axis(stride, 1)
    rows = (1, *kernel), (1, *strides), (0, *pads)
    return avg_pool2d(input.unsqueeze(-2), *rows, ceil_mode, count_include_pad).squeeze(-2)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`F.dropout`, of the same numbers."""
    if not training or not 0 < p < 1:
        return F.dropout(input, p, training, inplace)
    kept = torch.empty_like(input).bernoulli_(1 - p).div_(1 - p)
    return input.mul_(kept) if inplace else input * kept


def embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """`F.embedding`; for a batched weight `vmap` forgets to check the ids, and that padding has no gradient."""
    low, high = _extremes(input)
    if low < 0 or high >= len(weight):
        raise IndexError(f"F.embedding has ids from {low} to {high} for a weight of shape {tuple(weight.shape)}")
    rows = F.embedding(input, weight, None, *args, **kwargs)
    if padding_idx is None:
        return rows
    return torch.where((input == padding_idx % len(weight))[..., None], rows.detach(), rows)


def as_strided(input: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Tensor:
    """`as_strided` of a copy: a tensor that shares memory with those of other examples would share its gradient."""
    if storage_offset is not None and torch.compiler.is_dynamo_compiling():
        raise ValueError(
            f"as_strided with storage_offset={storage_offset} in a compiled step, where a tensor "
            f"of shape {tuple(input.shape)} does not say its own: index it first, x[1:].as_strided(size, stride)"
        )
    copy = input.clone()
    offset = 0 if storage_offset is None else storage_offset - input.storage_offset()
    if offset < 0 or copy.stride() != input.stride():
        raise ValueError(
            f"as_strided of a view of shape {tuple(input.shape)}, which has not all the memory between its entries or "
            f"before them (storage_offset={storage_offset}): take it of the tensor that it is a view of"
        )
    return torch.as_strided(copy, size, stride, offset)


def index_select(input: Tensor, dim: int, index: Tensor, **out: Tensor) -> Tensor:
    """torch 2.13 has the derivative wrong under `vmap` for an index without axes."""
    return torch.index_select(input, dim, index.reshape(1) if index.dim() == 0 else index, **out)


def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """torch 2.13 has the derivative of `select_scatter` wrong on what `vmap` maps."""
    dim, size = range(input.dim())[dim], input.shape[dim]
    at = range(size)[index]  # or an IndexError
    after = input.narrow(dim, at + 1, size - at - 1)
    return torch.cat([input.narrow(dim, 0, at), src.unsqueeze(dim).to(input.dtype), after], dim)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """By its formula in eval mode: for one image torch 2.13 has a wrong derivative w.r.t. channels-last gradients."""
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _affine(standardised(input, running_mean, running_var, eps), weight, bias, input.dim() - 2).to(input.dtype)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm`."""
    return _norm(operators.layer_norm, input, weight, bias, 0, list(normalized_shape), eps)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`F.group_norm`."""
    return _norm(operators.group_norm, input, weight, bias, input.dim() - 2, num_groups, eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.instance_norm`: with running statistics a `batch_norm`, else a `group_norm` of single channels."""
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is None and running_var is None:
        return group_norm(input, input.shape[1], weight, bias, eps)
    return F.instance_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)


def _norm(
    operator: Callable[..., Tensor], input: Tensor, weight: Tensor | None, bias: Tensor | None, pixels: int, *rest: Any
) -> Tensor:
    """A norm, scaled and shifted, in the dtype that autocast has for it; on a CPU autocast leaves norms alone."""
    (x,) = _under_autocast([input], torch.float32) if input.device.type != "cpu" else [input]
    return _affine(operator(x, *rest), weight, bias, pixels).to(x.dtype)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, pixels: int) -> Tensor:
    """Scaled and shifted along the axes before those of pixels."""
    if weight is not None:
        y = y * weight.reshape(*weight.shape, *(1,) * pixels)
    return y if bias is None else y + bias.reshape(*bias.shape, *(1,) * pixels)


def _extremes(ids: Tensor) -> tuple[int, int]:
    """The least and the largest id, where reading them waits for no device; else zeros."""
    if torch.compiler.is_dynamo_compiling():
        return 0, 0
    own = innermost(ids)
    readable = own.device.type == "cpu" and not isinstance(own, FakeTensor) and own.numel() > 0
    low, high = own.aminmax() if readable else (0, 0)
    return int(low), int(high)


def one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """`F.one_hot`, which under `vmap` does not look at its labels; here it does where that waits for no device."""
    if num_classes > 0:
        low, high = _extremes(tensor)
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"F.one_hot has labels from {low} to {high} for num_classes={num_classes}: give labels from 0 to "
                f"{num_classes - 1}"
            )
    return F.one_hot(tensor, num_classes)


Functions = dict[Callable[..., Any], Callable[..., Any]]
"""Torch functions, and what is called in place of each; `tapping.Replaced` says which table holds when."""

DATA = Tensor.data.__get__  # type: ignore[attr-defined]

EXACT: Functions = {F.batch_norm: batch_norm}
"""Torch's own derivative is wrong, with `vmap` and without."""

CAST: Functions = {
    F.linear: cast_linear,
    **{function: cast_sum(function) for of in (torch, Tensor) for function in (of.addmm, of.baddbmm, of.addbmm)},
}
"""Torch's own gives another dtype under `vmap` and autocast."""

MAPPED: Functions = {
    **CAST,
    DATA: Tensor.detach,
    F.embedding: embedding,
    F.one_hot: one_hot,
    **dict.fromkeys((torch.select_scatter, Tensor.select_scatter), select_scatter),
    **dict.fromkeys((torch.index_select, Tensor.index_select), index_select),
    **dict.fromkeys((torch.as_strided, Tensor.as_strided), as_strided),
}
"""Torch's own is wrong under `vmap`."""

COPIED = frozenset({torch.as_strided, Tensor.as_strided})
"""Of `MAPPED`, those that give a copy where torch gives a view."""

OF_CHANNELS: Functions = {F.group_norm: group_norm, F.instance_norm: instance_norm}
"""Torch's own asks how images lie in memory, which `vmap` cannot tell it."""

NORMS: Functions = {**OF_CHANNELS, F.layer_norm: layer_norm, F.batch_norm: batch_norm}

OPEN: Functions = {
    F.cross_entropy: cross_entropy,
    F.nll_loss: nll_loss,
    F.scaled_dot_product_attention: attention,
    F.avg_pool1d: avg_pool1d,
    F.avg_pool2d: avg_pool2d,
    **NORMS,
    **{
        function: max_pool(function, nd)
        for nd in (1, 2, 3)
        for function in (getattr(F, f"max_pool{nd}d"), getattr(torch, f"max_pool{nd}d"))
    },
}
"""Torch's own rule for `vmap` fixes the batch size of a graph, or is slow."""

OPEN_LAYERS: Functions = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), conv),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), conv_transpose),
    **NORMS,
}
"""The same, for calls that are tapped."""

OPEN_BATCHED: Functions = {F.dropout: dropout, F.linear: linear_of_rows}
"""Torch's own fixes the number of examples in the graph of a batched loss."""

EAGER_LAYERS: Functions = {F.linear: linear, **dict.fromkeys((torch.addmm, Tensor.addmm), addmm)}
"""Faster than torch's own, for calls that are tapped, in eager mode and in at most one `vmap`."""
