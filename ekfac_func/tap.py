"""What every run of a loss under the tap does alike: functions replaced, and what is not of one example refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.backends import mha
from torch.overrides import TorchFunctionMode

from .rules import Call, Rules


class Tap(TorchFunctionMode):
    """Hands every call of a torch function to a handler, inside which the tap is off.

    On CUDA devices nn.RNN asks for the addresses of its weights, to lay them out one after another. Those of fake and
    of batched tensors are 0: alike, as of shared weights, which it leaves where they are.
    """

    def __init__(self, handle: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self.handle = handle

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.data_ptr:
            return _address(args[0])
        return self.handle(plain(func), args, kwargs or {})


def _address(t: Tensor) -> int:
    try:
        return t.data_ptr()
    except RuntimeError:  # it has no storage
        return 0


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Tell a model that it is traced, as `torch.compile` does: under `vmap` too it cannot branch on values."""
    flag = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        with _as_written():
            yield
    finally:
        torch.compiler._is_compiling_flag = flag


def _as_written() -> contextlib.AbstractContextManager[Any]:
    """Where a function that is compiled by itself runs as it is written; within `torch.compile` Dynamo decides."""
    if torch.compiler.is_dynamo_compiling():
        return contextlib.nullcontext()
    try:
        return torch.compiler.set_stance("force_eager")
    except RuntimeError:  # between two graphs of a step that is compiled in parts
        return contextlib.nullcontext()


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Without the kernels of `nn.TransformerEncoder` in eval mode, which neither a rule nor `vmap` knows."""
    enabled = mha._is_fastpath_enabled  # its setter is not traced
    mha._is_fastpath_enabled = False
    try:
        yield
    finally:
        mha._is_fastpath_enabled = enabled


def plain(func: Any) -> Any:
    """The function that a Python method of a tensor stands for: Dynamo cannot trace those under a function mode."""
    if func is torch.Tensor.unflatten:
        return torch.unflatten
    return torch.split if func is torch.Tensor.split else func


def readings(rules: Rules, func: Any, args: Any, kwargs: Any) -> Sequence[Call]:
    """How the rule of a function reads a call of it."""
    found = rules[func](*args, **kwargs)
    if found is None:
        return []
    return [found] if isinstance(found, Call) else found


def with_ids(call: Call, picks: Sequence[tuple[Tensor, Tensor]]) -> Call:
    """A call of a weight whose blocks ids chose, with those ids beside its input."""
    for picked, ids in picks:
        if call.weight is picked:
            return call._replace(input=(call.input, ids))
    raise RuntimeError(
        "ids did not pick the weight of a call, as they did when the layers of the loss were found: in a compiled step "
        "write w[ids].transpose(-2, -1) for w[ids].mT, which Dynamo does not show"
    )


def name_of(tensor: Any, known: Sequence[tuple[Tensor, str]]) -> str | None:
    for other, name in known:
        if tensor is other:
            return name
    return None


def depth() -> int:
    """How many transforms are under way: functorch's, and levels of forward-mode differentiation."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return (0 if interpreter is None else interpreter.level()) + forward_ad._current_level + 1  # -1 is no level


def refuse(func: Any, args: Any, kwargs: Any, params: Mapping[str, Tensor], batched: bool) -> None:
    """Refuse calls that mean something else on one example than on a batch, or that change parameters in place."""
    if func not in _REFUSALS:
        return
    operands, check = _REFUSALS[func]
    if not batched or check is _refuse_changed_table:
        check(func, {**dict(zip(operands, args, strict=False)), **kwargs}, params)


def _refuse_batch_statistics(func: Any, given: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
    if given.get("training", False) or given.get("running_mean") is None:
        owned = [_named(given.get(key), params) for key in ("weight", "bias")]
        which = " and ".join(name.strip() for name in owned if name) or "no parameters"
        raise ValueError(
            f"batch_norm (with {which}, on an input of shape {tuple(given['input'].shape)}) uses the statistics of "
            "its batch, which couple the examples: a gradient per example does not exist. Call eval() on a module "
            "that tracks running statistics, use GroupNorm, or take the batch as it is with batched=True"
        )


def _refuse_running_statistics(func: Any, given: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
    if given.get("running_mean") is not None and given.get("use_input_stats", True):
        raise ValueError(
            f"instance_norm (on an input of shape {tuple(given['input'].shape)}) updates running statistics, which "
            "a gradient per example cannot: call eval() on the module, make it with track_running_stats=False, or "
            "take the batch as it is with batched=True"
        )


def _refuse_changed_table(func: Any, given: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
    if given.get("max_norm") is not None:
        table = given["weight"]
        raise ValueError(
            f"{func.__name__} with max_norm={given['max_norm']!r} changes its table{_named(table, params)}, of shape "
            f"{tuple(table.shape)}, in place: leave it out, and renormalise the table between steps"
        )


def _refuse_class_weights(func: Any, given: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
    """The mean over one label divides by the weight that it was multiplied with."""
    weight, target = given.get("weight"), given["target"]
    mean = given.get("reduction", "mean") == "mean" and given.get("size_average") is given.get("reduce") is None
    if weight is not None and mean and target.numel() == 1 and not target.is_floating_point():
        raise ValueError(
            f"{func.__name__} with weight of shape {tuple(weight.shape)} and reduction='mean' divides by the weight of "
            "the labels, which leaves the loss of one example unweighted: use reduction='sum', times n over the sum of "
            "the weights of the batch's labels for the weighted mean of a batch"
        )


_LABELLED = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction")
_REFUSALS: dict[Any, tuple[tuple[str, ...], Callable[[Any, Mapping[str, Any], Mapping[str, Tensor]], None]]] = {
    F.batch_norm: (("input", "running_mean", "running_var", "weight", "bias", "training"), _refuse_batch_statistics),
    **dict.fromkeys(
        (torch.batch_norm, torch.native_batch_norm),
        (("input", "weight", "bias", "running_mean", "running_var", "training"), _refuse_batch_statistics),
    ),
    F.instance_norm: (
        ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats"),
        _refuse_running_statistics,
    ),
    torch.instance_norm: (
        ("input", "weight", "bias", "running_mean", "running_var", "use_input_stats"),
        _refuse_running_statistics,
    ),
    F.embedding: (("input", "weight", "padding_idx", "max_norm"), _refuse_changed_table),
    F.embedding_bag: (("input", "weight", "offsets", "max_norm"), _refuse_changed_table),
    F.cross_entropy: (_LABELLED, _refuse_class_weights),
    F.nll_loss: (_LABELLED, _refuse_class_weights),
}
"""The names of the operands, and what is refused of them; under `batched=True` a changed table alone."""


def _named(tensor: Any, params: Mapping[str, Tensor]) -> str:
    """For a message, with a space before it; nothing of what is no parameter as it is."""
    name = name_of(tensor, [(p, name) for name, p in params.items()])
    return "" if name is None else f" {name!r}"
