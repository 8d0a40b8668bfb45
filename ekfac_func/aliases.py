"""Which torch function a call is of: operators, methods and lookups in a table as the functions that rules know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import resolve_name

from .indexing import entries_of, is_list


def as_function(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """A call as one of a function that rules know: of operators, as `torch.export` has them, and of some methods."""
    if func is Tensor.unflatten:  # which Dynamo does not find in a dict, nor can trace under a function mode
        return torch.unflatten, args, kwargs
    if func in ALIASES:
        return ALIASES[func], args, kwargs
    return REORDERED[func](*args, **kwargs) if func in REORDERED else (func, args, kwargs)


LOOKUPS = (Tensor.__getitem__, torch.index_select, Tensor.index_select)


def of_table(func: Any, args: Any, kwargs: Any, params: Iterable[Tensor]) -> tuple[Any, Any, Any]:
    """`w[ids]` and `index_select(w, 0, ids)` of a matrix in params as calls of `F.embedding`; others as they are."""
    if not args or not any(args[0] is p for p in params) or args[0].dim() != 2:
        return func, args, kwargs
    ids: Any
    if func is Tensor.__getitem__:
        ids, *rest = entries_of(args[1])
        whole = all(e is Ellipsis or (type(e) is slice and e == slice(None)) for e in rest)
        if not is_list(ids) or not whole or len(rest) > 1:
            return func, args, kwargs
        ids = ids.to(args[0].device)  # which may be on the CPU, where `F.embedding` takes none
        ids = torch.where(ids < 0, ids + len(args[0]), ids)
    else:
        given = {**dict(zip(("input", "dim", "index"), args, strict=False)), **kwargs}
        ids = given.get("index")
        if given.get("dim") not in (0, -2) or not is_list(ids) or ids.dim() > 1 or "out" in given:
            return func, args, kwargs
    return F.embedding, (ids, args[0]), {}


def called(func: Any) -> str:
    """The name of a torch function as a person writes it."""
    name = getattr(func, "__name__", "")
    if getattr(torch, name, None) is func:  # `resolve_name` takes torch.mm for an alias of it
        return f"torch.{name}"
    return str(resolve_name(func) or getattr(func, "__name__", func)).removeprefix("torch.nn.functional.")


def _reordered(name: str) -> Any:
    """From a norm to the one of `torch.nn.functional`: arguments in another order, without the choice of cuDNN."""
    names = [argument.name for argument in getattr(_aten, name).default._schema.arguments]

    def call(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        named = {k: v for k, v in given.items() if not k.startswith("cudnn_enable")}
        return getattr(F, name), (named.pop("input"),), named

    return call


def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> tuple[Any, Any, Any]:
    padding = None if padding_idx < 0 else padding_idx
    return F.embedding, (indices, weight, padding), {"scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Any, Any, Any]:
    named = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    return F.cross_entropy, (input, target), named | {"reduction": ("none", "mean", "sum")[reduction]}


def _mv(input: Tensor, vec: Tensor, **kwargs: Any) -> tuple[Any, Any, Any]:
    product = (input.dim(), vec.dim()) == (2, 1) and not kwargs
    return torch.matmul if product else torch.mv, (input, vec), kwargs


def _index(input: Tensor, indices: Sequence[Tensor | None]) -> tuple[Any, Any, Any]:
    return Tensor.__getitem__, (input, tuple(slice(None) if at is None else at for at in indices)), {}


def _split(input: Tensor, split_size: Any, dim: int = 0) -> tuple[Any, Any, Any]:
    """`x.split(2)`: Dynamo cannot trace Python methods of a tensor under a function mode."""
    return torch.split, (input, split_size, dim), {}


def _to(input: Tensor, dtype: Any = None, **kwargs: Any) -> tuple[Any, Any, Any]:
    """`x.type(dtype)`."""
    if isinstance(dtype, torch.dtype) and not kwargs:
        return Tensor.to, (input, dtype), {}
    return Tensor.type, (input,) if dtype is None else (input, dtype), kwargs


def _with_packets(table: dict[Any, Any]) -> dict[Any, Any]:
    """The table with the packets of its operators as well: a call of a packet picks the overload."""
    return table | {op.overloadpacket: of_it for op, of_it in table.items() if isinstance(op, OpOverload)}


_aten = torch.ops.aten
ALIASES = _with_packets(
    {
        **{getattr(_aten, f"conv{d}d").default: getattr(F, f"conv{d}d") for d in (1, 2, 3)},
        **{getattr(_aten, f"conv{d}d").padding: getattr(F, f"conv{d}d") for d in (1, 2, 3)},
        _aten.conv_transpose1d.default: F.conv_transpose1d,
        _aten.conv_transpose2d.input: F.conv_transpose2d,
        _aten.conv_transpose3d.input: F.conv_transpose3d,
        **{getattr(_aten, name).default: getattr(F, name) for name in ("linear", "scaled_dot_product_attention")},
        **{getattr(_aten, name).default: getattr(torch, name) for name in ("matmul", "mm", "bmm", "addmm", "baddbmm")},
        **{getattr(_aten, name).default: getattr(torch, name) for name in ("rms_norm", "select_scatter")},
        **{getattr(_aten, name).default: getattr(torch, name) for name in ("as_strided", "index_select")},
    }
)
REORDERED = _with_packets(
    {
        **dict.fromkeys((torch.embedding, _aten.embedding.default), _embedding),
        _aten.cross_entropy_loss.default: _cross_entropy,
        Tensor.type: _to,
        Tensor.split: _split,
        _aten.index.Tensor: _index,
        **dict.fromkeys((torch.mv, Tensor.mv, _aten.mv.default), _mv),
        **{
            norm: _reordered(name)
            for name in ("batch_norm", "instance_norm", "layer_norm", "group_norm")
            for norm in (getattr(torch, name), getattr(_aten, name).default)
        },
    }
)
"""From the arguments of an operator to a function, its arguments and keywords."""
