"""What every run of a loss is under: the function mode that sees its calls, and settings of PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack
from torch.autograd.function import Function, _SingleLevelFunction
from torch.backends import mha
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from . import expansions
from .aliases import as_function
from .copies import Copies
from .rules import Rules
from .views import VIEWS

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


def _address(t: Tensor) -> int:
    try:
        return t.data_ptr()
    except RuntimeError:  # it has no storage
        return 0


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


def output_of(watcher: Watcher, func: Any, args: Any, kwargs: Any, as_written: bool) -> Any:
    """The output of a call, in one way for both: a plan names calls by their number, as discovery counted them.

    as_written: without the expansions that `vmap` needs.
    """
    output = expansions.expanded(func, args, kwargs, watcher.handle, as_written)
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
