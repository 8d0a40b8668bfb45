"""What depends on whether a line runs in eager mode, under a transform or in a graph; and random states."""

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode


def transformed() -> bool:
    """Whether a trace or a transform of `torch.func` is under way."""
    return torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is not None


def depth() -> int:
    """How many transforms are under way: functorch's, and levels of forward-mode differentiation. Not in a graph."""
    interpreter = functorch.peek_interpreter_stack()
    return (0 if interpreter is None else interpreter.level()) + forward_ad._current_level + 1  # -1 is no level


def differentiated(*tensors: Tensor) -> bool:
    """Whether autograd records what is made of these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def innermost(t: Tensor) -> Tensor:
    """Without the wrappers of transforms: what has memory, and counts the changes in place."""
    while functorch.is_functorch_wrapped_tensor(t):
        t = functorch.get_unwrapped(t)
    return t


def past_vmap(f: Callable[[Tensor], Tensor], x: Tensor, n: int = 1) -> Tensor:
    """`f` of the examples that the one `vmap` under way maps over, along the first axis: past `torch.func`.

    n: how many, for an x that is the same in all.
    """
    level = functorch.current_level()
    whole, axis = functorch._unwrap_batched(x, level)
    with temporarily_pop_interpreter_stack():
        y = f(whole.expand(n, *whole.shape).contiguous() if axis is None else whole.movedim(axis, 0))
    return functorch._add_batch_dim(y, 0, level)


def storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    """The memory of the tensors of a tree, by its address."""
    parts = [part for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) for part in _strided(t)]
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in parts}


def _strided(t: Tensor) -> tuple[Tensor, ...]:
    """The tensors with memory of their own that a tensor is made of."""
    if t.layout is torch.strided:
        return (t,)
    if t.layout is torch.sparse_coo:
        return innermost(t._indices()), innermost(t._values())
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return t.crow_indices(), t.col_indices(), t.values()
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return t.ccol_indices(), t.row_indices(), t.values()
    return ()


def share(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of the same memory."""
    first, second = innermost(one), innermost(other)
    strided = first.layout is second.layout is torch.strided
    return strided and first.untyped_storage()._cdata == second.untyped_storage()._cdata


def opaque(*tensors: Tensor) -> bool:
    """Whether block-by-block work goes into a graph as one opaque operator, which runs as in eager mode.

    So it is on CPUs, where inductor would compile every block and write to memory what else stays in cache. It has no
    derivative.
    """
    on_cpu = all(t.device.type == "cpu" for t in tensors)
    return torch.compiler.is_compiling() and on_cpu and not differentiated(*tensors)


def one_by_one(operator: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A rule for `vmap` of an operator that is called for each entry of the axis."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        def at(k: int) -> Any:
            return pytree.tree_map(lambda t, dim: t if dim is None else t.select(dim, k), args, tuple(in_dims))

        found = pytree.tree_map(lambda *t: torch.stack(t), *(operator(*at(k)) for k in range(info.batch_size)))
        return found, pytree.tree_map(lambda _: 0, found)

    return rule


def where(good: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`torch.where` for a condition that is nearly always true: no pass over memory where reading it is free."""
    if transformed() or good.device.type != "cpu" or _get_current_dispatch_mode() is not None:
        return torch.where(good, new, old)
    return new if bool(good if good.dim() == 0 else good.all()) else torch.where(good, new, old)


def squared(own: Tensor) -> Tensor:
    """The square of a tensor that nobody else reads: in place, but under `vmap`, which has no rule for that."""
    return own.square() if transformed() else own.square_()


_WITH_STATES = ("cuda", "mps", "xpu")


class Draws(NamedTuple):
    """The states of the random number generators before a pass, from which another one draws the same."""

    states: list[tuple[Callable[[Any], Any], Any]]  # how each is set, and what it was
    recorded: bool = False  # into a CUDA graph, where the states of the devices cannot be had

    def repeat(self) -> None:
        """Go back to them."""
        if self.recorded:
            raise RuntimeError(
                "a step that a CUDA graph records wanted a second pass with the same random numbers: call it once "
                "before, and record steps without chunk_size or a refresh"
            )
        for set_state, state in self.states:
            set_state(state)

    def followed(self, tensors: Iterable[Tensor]) -> bool:
        """Whether a generator of torch has been used since, on the CPU or where these tensors are."""
        now = draws(tensors).states
        pairs = [(old, new) for (_, old), (_, new) in zip(self.states, now, strict=False) if isinstance(old, Tensor)]
        return any(not torch.equal(old, new) for old, new in pairs)


def host_draws() -> Draws:
    """Of Python and numpy alone, of which one draw serves the whole batch."""
    states: list[tuple[Callable[[Any], Any], Any]] = [(random.setstate, random.getstate())]
    if numpy := sys.modules.get("numpy"):
        states.append((numpy.random.set_state, numpy.random.get_state()))
    return Draws(states)


def draws(tensors: Iterable[Tensor]) -> Draws:
    """Of the CPU and the accelerators that these tensors are on; of Python and numpy, by which a loss may branch."""
    states: list[tuple[Callable[[Any], Any], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        *host_draws().states,
    ]
    devices = {t.device for t in tensors if t.device.type in _WITH_STATES}
    recorded = any(d.type == "cuda" for d in devices) and torch.cuda.is_current_stream_capturing()
    for d in () if recorded else devices:
        module = torch.get_device_module(d)
        which = {} if d.type == "mps" else {"device": d}  # of mps there is one
        states.append((functools.partial(module.set_rng_state, **which), module.get_rng_state(**which)))
    return Draws(states, recorded)


@contextlib.contextmanager
def undrawn(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restores the random state on exit."""
    before = draws(tensors)
    try:
        yield
    finally:
        before.repeat()


def no_autocast(device: torch.device) -> torch.autocast:
    """Without autocast: statistics keep their own dtype where the caller has it on for the loss."""
    return torch.autocast(device.type, enabled=False)
