"""The function mode that every run of a loss is under, and what all runs share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _len_torch_function_stack
from torch._ops import OpOverload
from torch.autograd.function import Function, _SingleLevelFunction
from torch.backends import mha
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode, resolve_name

from . import expansions
from .copies import Copies
from .indexing import entries_of, is_list
from .rules import Call, Rules
from .views import VIEWS, Gathered

PYTHON_APPLY = isinstance(vars(Function)["apply"], classmethod)  # up to PyTorch 2.13


class Tap(TorchFunctionMode):
    """Hands every call of a torch function to a handler, inside which the tap is off.

    On CUDA devices nn.RNN asks for the addresses of its weights, to lay them out one after another. Fake and batched
    tensors have the address 0: all alike, as if the weights were shared, and shared weights it leaves where they are.
    """

    off = False

    def __init__(self, handle: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self.handle = handle

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.off:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.data_ptr:
            return _address(args[0])
        return self.handle(*as_function(func, args, kwargs or {}))


@contextlib.contextmanager
def beneath(tap: Tap) -> Iterator[None]:
    """Enter a tap below the caller's function modes, so that it sees the calls that these make; in eager mode alone."""
    modes = []
    if not torch.compiler.is_dynamo_compiling():
        modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    try:
        with tap, _functions_whole(tap):
            for mode in reversed(modes):
                _push_mode(mode)
            try:
                yield
            finally:
                for _ in modes:
                    _pop_mode()
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


@contextlib.contextmanager
def _functions_whole(tap: Tap) -> Iterator[None]:
    """Hide what the forward of an `autograd.Function` calls, as `torch.func` does; plain autograd shows it."""
    if torch.compiler.is_dynamo_compiling():
        yield
        return
    # below `Function.apply` itself, which a loss may have bound before
    owner: Any = _SingleLevelFunction if PYTHON_APPLY else Function
    before = vars(owner).get("apply")  # within another tap that of its loss

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        bound = super(owner, cls).apply if before is None else before.__get__(None, cls)
        with assigned(tap, "off", True):
            return bound(*args, **kwargs)

    owner.apply = classmethod(apply)
    try:
        yield
    finally:
        if before is None:
            del owner.apply
        else:
            owner.apply = before


class Watcher(Protocol):
    """What discovery and capture each do with the calls of a loss."""

    rules: Rules
    counted: int  # calls of functions that have a rule
    copies: Copies

    def handle(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of any torch function."""

    def view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a function of `VIEWS`."""

    def layer(self, at: int, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a function that has a rule; at: how many calls of such came before."""

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of any other function."""


def output_of(watcher: Watcher, func: Any, args: Any, kwargs: Any, batched: bool) -> Any:
    """The output of a call, in one way for both: a plan names calls by their number, as discovery counted them.

    batched: without the expansions that `vmap` needs.
    """
    output = expansions.expanded(func, args, kwargs, watcher.handle, batched)
    if output is not NotImplemented:
        if func in expansions.COPIES:
            watcher.copies.add(output, *args)
        watcher.copies.ends(func)
        return output
    if func in VIEWS:
        return watcher.view(func, args, kwargs)
    if func not in watcher.rules:
        return watcher.other(func, args, kwargs)
    at, watcher.counted = watcher.counted, watcher.counted + 1
    return watcher.layer(at, func, args, kwargs)


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


def _address(t: Tensor) -> int:
    try:
        return t.data_ptr()
    except RuntimeError:  # it has no storage
        return 0


@contextlib.contextmanager
def assigned(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute has another value inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def traced(told: bool) -> Iterator[None]:
    """Run a model as it is written, and tell it whether it is traced, as `torch.compile` does.

    Under `vmap` it cannot branch on values either.
    """
    with assigned(torch.compiler, "_is_compiling_flag", told), _as_written():
        yield


def _as_written() -> contextlib.AbstractContextManager[Any]:
    """Have functions that are compiled by themselves run as they are written; within `torch.compile` Dynamo decides."""
    if torch.compiler.is_dynamo_compiling():
        return contextlib.nullcontext()
    try:
        return torch.compiler.set_stance("force_eager")
    except RuntimeError:  # between two graphs of a step that is compiled in parts
        return contextlib.nullcontext()


def unfused() -> contextlib.AbstractContextManager[None]:
    """Without the kernels of `nn.TransformerEncoder` in eval mode, which neither a rule nor `vmap` knows."""
    return assigned(mha, "_is_fastpath_enabled", False)  # its setter is not traced


def unchecked() -> contextlib.AbstractContextManager[None]:
    """Distributions without the checks of their arguments, which read values that discovery does not have."""
    if torch.compiler.is_dynamo_compiling():
        return contextlib.nullcontext()
    return assigned(Distribution, "_validate_args", False)


def as_function(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """A call as one of a function that rules know: of operators, as `torch.export` has them, and of some methods."""
    if func is Tensor.unflatten:  # which Dynamo does not find in a dict, nor can trace under a function mode
        return torch.unflatten, args, kwargs
    if func in ALIASES:
        return ALIASES[func], args, kwargs
    return REORDERED[func](*args, **kwargs) if func in REORDERED else (func, args, kwargs)


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
    named = ("none", "mean", "sum")[reduction]
    rest = {"ignore_index": ignore_index, "reduction": named, "label_smoothing": label_smoothing}
    return F.cross_entropy, (input, target, weight) if weight is not None else (input, target), rest


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


def readings(rules: Rules, func: Any, args: Any, kwargs: Any) -> Sequence[Call]:
    """The readings of a call by the rule of its function: none, one, or one for each operand that may be the weight."""
    found = rules[func](*args, **kwargs)
    if found is None:
        return []
    return [found] if isinstance(found, Call) else found


def with_ids(call: Call, gathered: Sequence[Gathered], weight: str) -> Call:
    """A call whose weight is made of blocks that ids picked, with those ids beside its input."""
    for one in gathered:
        if call.weight is one.made:
            return call._replace(input=(call.input, one.ids))
    # Dynamo does not show `w[ids].mT`, nor of what `w.mT[ids]` picks
    size = call.weight.numel()
    chosen = [x.ids for x in gathered if x.name == weight or (x.name is None and x.made.numel() >= size)]
    if chosen and all(ids is chosen[0] for ids in chosen):
        return call._replace(input=(call.input, chosen[0]))
    raise RuntimeError(
        f"ids did not pick the weight of a call of {weight!r}, as they did when the layers of the loss were found: in "
        "a compiled step write w[ids].transpose(-2, -1) for w[ids].mT, which Dynamo does not show"
    )


def name_of(tensor: Any, known: Sequence[tuple[Tensor, str]]) -> str | None:
    for other, name in known:
        if tensor is other:
            return name
    return None


def called(func: Any) -> str:
    """The name of a torch function as a person writes it."""
    name = getattr(func, "__name__", "")
    if getattr(torch, name, None) is func:  # `resolve_name` takes torch.mm for an alias of it
        return f"torch.{name}"
    return str(resolve_name(func) or getattr(func, "__name__", func)).removeprefix("torch.nn.functional.")
