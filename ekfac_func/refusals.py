"""What a loss may not do: each is refused by an error that names the tensor and the remedy."""

from __future__ import annotations

import contextlib
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_buffer_registration_hook

from .aliases import called
from .modes import innermost, share


def refuse(func: Any, args: Any, kwargs: Any, params: Mapping[str, Tensor], batched: bool) -> None:
    """Refuse calls that mean something else on one example than on a batch, or that change parameters in place."""
    if func not in _REFUSALS:
        return
    operands, check = _REFUSALS[func]
    if not batched or check is _refuse_changed_table:
        check(func, {**dict(zip(operands, args, strict=False)), **kwargs}, params)


def _refuse_batch_statistics(func: Any, given: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
    if not torch.compiler.is_dynamo_compiling() and any(share(given["input"], p) for p in params.values()):
        return  # weight standardisation, which reads no example
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
    """Of one label the weighted mean divides by the weight that it has multiplied with."""
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
        (torch.native_batch_norm, torch.ops.aten.native_batch_norm.default, torch.ops.aten.native_batch_norm),
        (("input", "weight", "bias", "running_mean", "running_var", "training"), _refuse_batch_statistics),
    ),
    F.instance_norm: (
        ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats"),
        _refuse_running_statistics,
    ),
    F.embedding: (("input", "weight", "padding_idx", "max_norm"), _refuse_changed_table),
    F.embedding_bag: (("input", "weight", "offsets", "max_norm"), _refuse_changed_table),
    F.cross_entropy: (_LABELLED, _refuse_class_weights),
    F.nll_loss: (_LABELLED, _refuse_class_weights),
}
"""The names of the operands, and what is refused of them; under `batched=True` a changed table alone."""


def _named(tensor: Any, params: Mapping[str, Tensor]) -> str:
    """The name of a parameter for a message, with a space before it; empty for any other tensor."""
    return next((f" {name!r}" for name, p in params.items() if p is tensor), "")


class Changed(RuntimeError):
    """The loss changes a tensor, or puts another into a buffer, that it did not make."""


def mutation(func: Any, changed: Tensor, batched: bool) -> Changed:
    """The error for a function that changes a tensor from outside of the loss."""
    return Changed(
        f"loss_fn changes a tensor that it did not make in place by {called(func)}, on one of shape "
        f"{tuple(changed.shape)}: change a copy of it, and return that as aux (has_aux=True){_unless(batched)}"
    )


def _unless(batched: bool) -> str:
    if batched:
        return ""
    return ", or if it is a buffer of a model call model.eval(), or take the batch as it is with batched=True"


def refuse_changed(
    params: Sequence[tuple[str, Tensor, int]] = (),
    inputs: Sequence[tuple[str, Tensor, int]] = (),
    examples: Sequence[tuple[Tensor, int]] = (),
) -> None:
    """Refuse what was changed in place after its version was noted: params, inputs of layers, tensors of an example."""
    for name, p, version in params:
        if p._version != version:
            raise RuntimeError(
                f"loss_fn changes the parameter {name!r}, of shape {tuple(p.shape)}, in place: params are not its own "
                "to change, compute another tensor in the loss, or change them between steps"
            )
    for name, x, version in inputs:
        if x._version != version:
            raise RuntimeError(
                f"the input of the layer {name!r}, of shape {tuple(x.shape)}, was changed in place after the "
                "call: its gradient needs the value that it had, write x = x + y in place of x += y"
            )
    for leaf, version in examples:
        if leaf._version != version:
            raise RuntimeError(
                f"loss_fn changes a tensor of its example, of shape {tuple(leaf.shape)}, in place: the batch is "
                "not its own to change, write x = x + y in place of x += y"
            )


@contextlib.contextmanager
def buffers_kept(batched: bool) -> Iterator[None]:
    """Refuse a loss that puts a tensor of its run into a buffer of a module; the module gets its old buffer back."""
    before: dict[tuple[weakref.ref[nn.Module], str], tuple[Tensor | None, ...]] = {}  # of a new one nothing
    thread = threading.get_ident()

    def note(module: nn.Module, name: str, value: Tensor | None) -> None:
        if threading.get_ident() == thread:
            old = (module._buffers[name],) if name in module._buffers else ()
            before.setdefault((weakref.ref(module), name), old)

    hook = register_module_buffer_registration_hook(note)
    try:
        yield
    finally:
        hook.remove()
        left = []
        for (reference, name), old in before.items():
            module = reference()  # nothing is left in one that the loss made for itself
            value = None if module is None else module._buffers.get(name)
            if module is None or value is None or not _of_a_run(value):
                continue
            if not any(innermost(value) is t for t in old):  # after `self.mask = self.mask.to(x.device)` it is
                left.append((module, name))
            if old:
                (module._buffers[name],) = old
            else:
                del module._buffers[name]
        if left:  # whatever else the loss raised
            module, name = left[0]
            raise Changed(
                f"loss_fn puts another tensor into the buffer {name!r} of {type(module).__name__}: if it is a cache "
                "that the first call fills, call the model once before; else keep it apart from the model, and return "
                f"it as aux (has_aux=True){_unless(batched)}"
            )


def _of_a_run(t: Tensor) -> bool:
    """Whether a tensor belongs to a run: it has no values, or is wrapped by a transform."""
    return isinstance(t, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(t)


def refuse_checkpoint(error: RuntimeError) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.filename == torch.utils.checkpoint.__file__ for frame in frames):
        raise ValueError(
            "torch.utils.checkpoint inside loss_fn does not work under torch.func: remove it and bound the memory with "
            "chunk_size"
        ) from error
