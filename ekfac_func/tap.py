"""What every run of a loss under the tap does alike: functions replaced, batch statistics refused."""

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
        yield
    finally:
        torch.compiler._is_compiling_flag = flag


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
    raise AssertionError("the weight of the call was not picked by ids")


def name_of(tensor: Any, known: Sequence[tuple[Tensor, str]]) -> str | None:
    for other, name in known:
        if tensor is other:
            return name
    return None


def depth() -> int:
    """How many transforms are under way: functorch's, and levels of forward-mode differentiation."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return (0 if interpreter is None else interpreter.level()) + forward_ad._current_level + 1  # -1 is no level


_BATCH_NORMS = (F.batch_norm, torch.batch_norm, torch.native_batch_norm)


def refuse_batch_statistics(func: Any, args: Any, kwargs: Any, params: Mapping[str, Tensor]) -> None:
    """Under vmap a batch norm would silently use the statistics of one example."""
    if func not in _BATCH_NORMS:
        return
    if func is F.batch_norm:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    else:
        names = ("input", "weight", "bias", "running_mean", "running_var", "training")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("training", False) or given.get("running_mean") is None:
        known = [(p, name) for name, p in params.items()]
        owned = [name_of(given[key], known) for key in ("weight", "bias") if given.get(key) is not None]
        which = " and ".join(repr(name) for name in owned if name) or "no parameters"
        raise ValueError(
            f"batch_norm (with {which}, on an input of shape {tuple(given['input'].shape)}) uses the statistics of "
            "its batch, which couple the examples: a gradient per example does not exist. Call eval() on a module "
            "that tracks running statistics, use GroupNorm, or take the batch as it is with batched=True"
        )
