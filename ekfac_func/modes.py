"""What depends on how a line runs: in eager mode, under a transform of `torch.func`, or in a graph."""

from collections.abc import Callable
from typing import Any

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
    """Whether autograd records what is computed from these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def innermost(t: Tensor) -> Tensor:
    """A tensor without the wrappers of transforms: the one that has memory and a version."""
    while functorch.is_functorch_wrapped_tensor(t):
        t = functorch.get_unwrapped(t)
    return t


def past_vmap(f: Callable[[Tensor], Tensor], x: Tensor, n: int = 1) -> Tensor:
    """`f(x)` for all examples at once, unseen by `torch.func`: what the one `vmap` under way maps over, examples first.

    n: the number of examples, for an x that does not depend on them.
    """
    level = functorch.current_level()
    whole, axis = functorch._unwrap_batched(x, level)
    with temporarily_pop_interpreter_stack():
        y = f(whole.expand(n, *whole.shape).contiguous() if axis is None else whole.movedim(axis, 0))
    return functorch._add_batch_dim(y, 0, level)


def storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors of a tree, by their addresses."""
    parts = [part for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) for part in _strided(innermost(t))]
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in parts}


def _strided(t: Tensor) -> tuple[Tensor, ...]:
    """The strided tensors that a tensor is made of: itself, or the indices and values of a sparse one."""
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
    """Whether two tensors share memory."""
    first, second = innermost(one), innermost(other)
    strided = first.layout is second.layout is torch.strided
    return strided and first.untyped_storage()._cdata == second.untyped_storage()._cdata


def opaque(*tensors: Tensor) -> bool:
    """Whether work in blocks goes into a graph as one opaque operator, which runs as in eager mode.

    It does on CPUs: inductor would compile every block by itself and write to memory what could stay in cache. Such an
    operator has no derivative, so nothing may be differentiated.
    """
    on_cpu = all(t.device.type == "cpu" for t in tensors)
    return torch.compiler.is_compiling() and on_cpu and not differentiated(*tensors)


def one_by_one(operator: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A `vmap` rule for an operator: it is called once for each entry of the mapped axis."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        def at(k: int) -> Any:
            return pytree.tree_map(lambda t, dim: t if dim is None else t.select(dim, k), args, tuple(in_dims))

        found = pytree.tree_map(lambda *t: torch.stack(t), *(operator(*at(k)) for k in range(info.batch_size)))
        return found, pytree.tree_map(lambda _: 0, found)

    return rule


def where(good: Tensor, new: Tensor, old: Tensor | float) -> Tensor:
    """`torch.where` for a condition that nearly always holds: `new` itself where to read the condition is cheap."""
    if transformed() or good.device.type != "cpu" or _get_current_dispatch_mode() is not None:
        return torch.where(good, new, old)
    return new if bool(good if good.dim() == 0 else good.all()) else torch.where(good, new, old)


def squared(own: Tensor) -> Tensor:
    """The square of a tensor that nobody else reads: in place, unless `vmap` or autograd forbids that."""
    return own.square() if transformed() or differentiated(own) else own.square_()


def no_autocast(device: torch.device) -> torch.autocast:
    """Autocast off: statistics keep their own dtype where the caller has it on for the loss."""
    return torch.autocast(device.type, enabled=False)
