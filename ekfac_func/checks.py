"""Bad input gets an error that names the argument, its shape and the remedy, before anything is computed."""

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from .types import Batch, Layer, Moment, Number, shapes_of


def check_params(params: Mapping[str, Tensor]) -> None:
    """params: a non-empty dict of real floating-point tensors that have values."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params is a {type(params).__name__}: pass a dict of tensors, dict(net.named_parameters())")
    if not params:
        raise ValueError("params is empty: pass at least one tensor to differentiate")
    eager = not torch.compiler.is_compiling()
    for name, p in params.items():
        if not isinstance(name, str):
            raise TypeError(f"params has the name {name!r}, a {type(name).__name__}: give each tensor a string")
        if not isinstance(p, Tensor):
            raise TypeError(f"params[{name!r}] is a {type(p).__name__}: pass tensors")
        if eager and is_lazy(p):
            raise ValueError(f"params[{name!r}] has no shape yet: call the lazy module that it is of on a batch first")
        if not p.is_floating_point():
            raise TypeError(
                f"params[{name!r}] of shape {tuple(p.shape)} has dtype {p.dtype}: params must be real floating-point; "
                "leave buffers and indices out of params, and view a complex tensor as real"
            )
        if eager and _overrides(type(p)):
            raise _of_subclass(f"params[{name!r}]", p)
        if eager and p.is_inference():
            raise RuntimeError(
                f"params[{name!r}] of shape {tuple(p.shape)} was made in torch.inference_mode, which autograd does not "
                "take: make it in torch.no_grad, or pass clone() of it"
            )
        if eager and hasattr(p, "full_tensor"):
            raise TypeError(
                f"params[{name!r}] of shape {tuple(p.shape)} is a {type(p).__name__}, spread over processes, as "
                "fully_shard makes it: pass a model that is whole in each process, and ranks=ranks()"
            )
        if p.layout is not torch.strided:
            raise TypeError(f"params[{name!r}] of shape {tuple(p.shape)} is sparse: pass p.to_dense()")
        if p.is_meta:
            raise ValueError(
                f"params[{name!r}] of shape {tuple(p.shape)} is on the meta device and has no values: materialise it "
                "with to_empty() and initialise it first"
            )


@functools.cache
def _overrides(kind: type) -> bool:
    """Whether a kind of tensor has a `__torch_function__` of its own."""
    plain = Tensor.__dict__["__torch_function__"], torch._C._disabled_torch_function_impl
    return inspect.getattr_static(kind, "__torch_function__") not in plain


def check_batch(batch: Batch) -> int:
    """batch: a tree of tensors with one leading axis. Returns its size n."""
    leaves = pytree.tree_leaves(batch)
    if not leaves:
        raise ValueError("batch has no tensors: pass the tree of one example, each tensor with a leading axis")
    for leaf in leaves:
        _check_leaf(batch, leaf)
    n = leaves[0].shape[0]
    for leaf in leaves:
        if leaf.shape[0] != n:
            raise ValueError(
                f"{_place(batch, leaf)} has shape {tuple(leaf.shape)}, with {leaf.shape[0]} examples, where "
                f"{_place(batch, leaves[0])} of shape {tuple(leaves[0].shape)} has {n}: give every tensor the "
                "same leading size, pad what an example has any number of"
            )
    if n == 0:
        raise ValueError(
            f"{_place(batch, leaves[0])} has shape {tuple(leaves[0].shape)}: an empty batch has no gradient, "
            "pass at least one example"
        )
    return n


def _check_leaf(batch: Batch, leaf: Any) -> None:
    """Refuse a leaf of a batch that is no plain tensor with values and a leading axis."""
    if not isinstance(leaf, Tensor):
        raise TypeError(
            f"{_place(batch, leaf)} is a {type(leaf).__name__}: a batch is a tree of tensors, "
            + (f"pass dict({_place(batch, leaf)})" if isinstance(leaf, Mapping) else _remedy(leaf))
        )
    if leaf.is_nested:
        raise TypeError(
            f"{_place(batch, leaf)} is a nested tensor: pad it to one length, torch.nested.to_padded_tensor, "
            "and give a mask"
        )
    if leaf.is_meta:
        raise ValueError(
            f"{_place(batch, leaf)} of shape {tuple(leaf.shape)} is on the meta device and has no values: "
            "give examples; for init, which reads their shapes alone, zeros on the device of params will do"
        )
    if not torch.compiler.is_compiling() and _overrides(type(leaf)):
        raise _of_subclass(_place(batch, leaf), leaf)
    if leaf.dim() == 0:
        raise ValueError(
            f"{_place(batch, leaf)} has shape (): every tensor of a batch needs a leading axis of examples, "
            "give what is one for all as .expand(n)"
        )


def _remedy(leaf: object) -> str:
    if dataclasses.is_dataclass(leaf):
        return f"register it, torch.utils._pytree.register_dataclass({type(leaf).__name__})"
    if hasattr(leaf, "__array__"):
        return "pass torch.as_tensor of it"
    if isinstance(leaf, bool | int | float):
        return "give numbers as a tensor with a leading axis of examples, or close over what is one for all"
    if hasattr(leaf, "__iter__") and not isinstance(leaf, str):
        return "pass one batch of it, as torch.utils.data.default_collate makes of a list of examples"
    return "leave out what the loss does not need, close over what stays as it is from batch to batch"


def _place(batch: Batch, leaf: Any) -> str:
    """Where a leaf of the batch is, for a message."""
    if not torch.compiler.is_compiling():
        for path, other in pytree.tree_flatten_with_path(batch)[0]:
            if other is leaf:
                return f"batch{pytree.keystr(path)}"
    return "batch"


def _of_subclass(named: str, t: Tensor) -> TypeError:
    """The error for a subclass of Tensor that has torch functions of its own."""
    return TypeError(
        f"{named} of shape {tuple(t.shape)} is a {type(t).__name__}, which overrides what torch functions do with it, "
        "unseen by the rules: pass as_subclass(torch.Tensor) of it"
    )


def check_tree(layers: Iterable[Layer], tree: Mapping[str, Tensor]) -> None:
    """tree: the names and shapes of params, or the same axes in front of every tensor."""
    shapes = shapes_of(layers)
    if not isinstance(tree, Mapping):
        raise TypeError(f"the tree is a {type(tree).__name__}: give a dict with the names and shapes of params")
    if tree.keys() != shapes.keys():
        raise KeyError(f"the tree has the names {sorted(tree)}, params has {sorted(shapes)}: give one tensor for each")
    for name, leaf in tree.items():
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = f"has dtype {leaf.dtype}" if isinstance(leaf, Tensor) else f"is a {type(leaf).__name__}"
            raise TypeError(
                f"{name!r} of the tree {kind}: give real floating-point tensors, of a complex tree the real and the "
                "imaginary parts by themselves"
            )
    first = next(iter(shapes))
    ahead = tree[first].shape[: max(tree[first].dim() - len(shapes[first]), 0)]
    for name, shape in shapes.items():
        if tree[name].shape != (*ahead, *shape):
            raise ValueError(
                f"{name!r} of the tree has shape {tuple(tree[name].shape)}, of params {tuple(shape)}: give that shape, "
                f"or the same axes in front of every tensor ({first!r} has {tuple(ahead)})"
            )


NUMBER = "a Python number or a 0-d tensor"


def _check_number(name: str, value: Number, holds: Callable[[float], bool], remedy: str, kind: str = NUMBER) -> None:
    """Refuse what is no number, and a Python number of which something does not hold: a tensor's value is not read.

    kind: what an error says to give.
    """
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: give {kind}")
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or isinstance(value, Fraction):
        raise TypeError(f"{name} is a {type(value).__name__}: give {kind}")
    if not holds(value):
        raise ValueError(f"{name}={value!r}: {remedy}")


def check_positive(name: str, value: Number, kind: str = NUMBER) -> None:
    """A positive number; a tensor that is not shows in `info`. kind: what an error says to give."""
    _check_number(name, value, lambda x: 0 < x < math.inf, "give a positive number, not infinity", kind)


def check_damping(damping: Number) -> None:
    """A positive number; rules, which are functions, are not for here."""
    rule = "a rule from second moments to the damping of each layer, such as optim.relative(0.1)"
    check_positive("damping", damping, f"{NUMBER}, or {rule}")


def check_not_negative(name: str, value: Number) -> None:
    """Zero or more."""
    _check_number(name, value, lambda x: x >= 0, "give a number, at least 0")


def check_decay(name: str, decay: Number) -> None:
    """A weight of the past."""
    remedy = f"it is the weight of the past in each step, give 0 <= {name} < 1"
    _check_number(name, decay, lambda x: 0 <= x < 1, remedy)


def check_exponent(name: str, exponent: Number) -> None:
    """An exponent that shrinks what has a large second moment."""
    _check_number(name, exponent, lambda x: -math.inf < x < 0, "give a negative number, -1 for the natural gradient")


def check_number(name: str, value: Number) -> None:
    """A finite number."""
    _check_number(name, value, math.isfinite, "give a finite number")


def check_dampings(dampings: Mapping[str, Number], layers: Iterable[str]) -> None:
    """damping, as a rule: one number for each layer."""
    if not isinstance(dampings, Mapping):
        raise TypeError(
            f"damping, as a rule, gave a {type(dampings).__name__}: let it return a dict with a number for each name "
            "in its argument"
        )
    for name in layers:
        if name not in dampings:
            raise ValueError(
                f"damping, as a rule, gave no number for the layer {name!r}, only for {list(dampings)}: let it "
                "return one for each name in its argument"
            )
        check_positive(f"damping of {name!r}", dampings[name])


def check_moment(name: str, estimator: str, new: object, old: Moment) -> None:
    """second_moment, as an estimator: a moment of the shape that it was given."""
    if not isinstance(new, Moment) or not all(isinstance(t, Tensor) for t in new):
        raise TypeError(
            f"second_moment={estimator}, as an estimator, gave a {type(new).__name__} for the layer {name!r}: let its "
            "update return Moment(value, weight) of two tensors"
        )
    if new.value.shape != old.value.shape or new.weight.shape != old.weight.shape:
        raise ValueError(
            f"second_moment={estimator}, as an estimator, gave a moment of shape {tuple(new.value.shape)} and a weight "
            f"of shape {tuple(new.weight.shape)} for the layer {name!r}: let its update return them as they are given, "
            f"{tuple(old.value.shape)} and {tuple(old.weight.shape)}"
        )


def check_function(name: str, function: object, kind: str) -> None:
    """Refuse what cannot be called."""
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__}: pass a function {kind}")


def check_loss_fn(loss_fn: object) -> None:
    """Refuse what is no function."""
    check_function("loss_fn", loss_fn, "(params, example) -> scalar loss")


def check_loss(loss: Any, has_aux: bool, n: int | None) -> tuple[Tensor, Any]:
    """What loss_fn returned as a loss and what it returned beside; n: the batch size of a batched loss."""
    aux: Any = ()
    if has_aux:
        if not isinstance(loss, tuple) or len(loss) != 2:
            raise TypeError(f"loss_fn returned a {type(loss).__name__}: with has_aux=True it returns (loss, aux)")
        loss, aux = loss
        for leaf in pytree.tree_leaves(aux) if n is None else ():
            if not isinstance(leaf, Tensor):
                raise TypeError(f"loss_fn returned a {type(leaf).__name__} in aux: return a tree of tensors")
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss_fn returned a {type(loss).__name__}: return the example's loss, a 0-d tensor, or with has_aux=True "
            "the pair (loss, aux)"
        )
    if n is None and loss.dim() != 0:
        raise ValueError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}: return the loss of one example as a scalar, "
            "for instance with .sum() or .mean()"
        )
    if n is not None and tuple(loss.shape) != (n,):
        given = "a scalar" if loss.dim() == 0 else f"a tensor of shape {tuple(loss.shape)} for a batch of {n}"
        raise ValueError(
            f"loss_fn returned {given}: with batched=True return one loss an example, for instance with "
            "reduction='none'"
        )
    if not loss.is_floating_point():
        raise TypeError(f"loss_fn returned a loss of dtype {loss.dtype}: return a real floating-point scalar")
    return loss, aux


def check_inference_mode() -> None:
    """Refuse `torch.inference_mode`, in which every gradient would be zero; what is compiled leaves it by itself."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("torch.inference_mode is on, in which no gradient can be taken: use torch.no_grad")


def check_count(name: str, count: int) -> None:
    """Refuse what is not a positive whole number."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}={count!r}: give a whole number, at least 1, as a Python int")


def check_randomness(randomness: str) -> None:
    """Refuse what `torch.func.vmap` does not know."""
    if randomness not in ("different", "same", "error"):
        raise ValueError(f"randomness={randomness!r}: give 'different', 'same' or 'error', as to torch.func.vmap")
