"""A loss of a module as a function of its parameters, for `ekfac`."""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..types import Params


class _Loss(nn.Module):
    """A loss of a module, as a module of its own, for `functional_call`."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Any:
        return self.loss(self.model, batch)


class Bound(NamedTuple):
    """A loss of a module, and where the module had its parameters when the loss was bound to it."""

    loss_fn: Callable[[Params, Any], Any]  # of `ekfac`
    options: Mapping[str, Any]  # of `ekfac`; a batched loss returns (aux, buffers after it) beside the losses
    names: dict[nn.Parameter, str]
    held: set[tuple[str, nn.Parameter]]  # the parameters in each of their places
    module: _Loss


def bind(model: nn.Module, loss: Callable[[Any, Any], Any], options: Mapping[str, Any]) -> Bound:
    """The loss `(model, batch)` of a batch of one example, or with the option `batched` of the batch, of params."""
    module = _Loss(model, loss)
    places = _places(module)
    has_aux = options.get("has_aux", False)

    def placed(params: Params, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = {**{f"model.{name}": p for name, p in params.items()}, **buffers}
        return {place: values[name] for place, name in places.items() if name in values}

    def of_example(params: Params, example: Any) -> Any:
        one = pytree.tree_map(lambda leaf: leaf[None], example)
        return functional_call(module, placed(params, {}), (one,), tie_weights=False)

    def of_batch(params: Params, batch: Any) -> Any:
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        given = placed(params, buffers)
        found = functional_call(module, given, (batch,), tie_weights=False)
        if has_aux and (not isinstance(found, tuple) or len(found) != 2):
            raise TypeError(f"loss returned a {type(found).__name__}: with has_aux=True it returns (losses, aux)")
        losses, aux = found if has_aux else (found, ())
        # a module that assigned a new tensor to a buffer has it in `given` now
        return losses, (aux, {name: given[place] for place, name in places.items() if name in buffers})

    names, held = {p: name for name, p in model.named_parameters()}, set(model.named_parameters(remove_duplicate=False))
    if options.get("batched", False):
        return Bound(of_batch, {**options, "has_aux": True}, names, held, module)
    return Bound(of_example, options, names, held, module)


def _places(module: nn.Module) -> dict[str, str]:
    """For every place of a tensor in the modules, the one name that `named_parameters` or `named_buffers` gives it.

    `functional_call` by itself goes to a module in several places several times, and leaves what it was given there:
    https://github.com/pytorch/pytorch/issues/164759
    """
    names = {t: name for name, t in (*module.named_parameters(), *module.named_buffers())}
    places: dict[str, str] = {}
    for path, part in module.named_modules():
        for tensors in (part.named_parameters, part.named_buffers):
            places |= {place: names[t] for place, t in tensors(path, recurse=False, remove_duplicate=False)}
    return places
