"""Building blocks of an optimizer in the manner of optax: pairs of pure functions on trees like params.

A block takes a direction of ascent, such as the natural gradient, and returns another; `learning_rate` turns it into an
update, which `apply_updates` adds. Hyper-parameters are closed over: Python numbers, or 0-d tensors where they vary
from call to call of a compiled step. State is NamedTuples of tensors.
"""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..checks import check_decay, check_params, check_positive
from ..types import Info, Number, Params
from .norms import Scope, dots, each, squares, together
from .schedules import Schedule, value_at


class Transform(NamedTuple):
    """A pair of pure functions.

    `init(params) -> state`; `update(direction, state, params, info) -> (direction, state)`, where info is what
    `precondition` returned: its gradient and whether its step was skipped.
    """

    init: Callable[[Mapping[str, Tensor]], Any]
    update: Callable[[Params, Any, Mapping[str, Tensor], Info], tuple[Params, Any]]


class Step(NamedTuple):
    """How many updates were made."""

    step: Tensor  # [] int64


class Velocity(NamedTuple):
    """Accumulated directions."""

    velocity: Params  # a tree like params


def identity() -> Transform:
    """Nothing; as `onto` of `graft` the plain gradient."""
    return _stateless(lambda direction, params, info: direction)


def momentum(decay: Number) -> Transform:
    """Heavy ball: `velocity <- decay velocity + direction`, which is the new direction.

    Polyak 1964, https://doi.org/10.1016/0041-5553(64)90137-5; `torch.optim.SGD(momentum=decay)` without dampening.

    decay: weight of the past in each step, 0 <= decay < 1.
    """
    return _accumulate(decay, lambda direction, velocity: velocity)


def nesterov(decay: Number) -> Transform:
    """Nesterov's momentum: `velocity <- decay velocity + direction`, the new direction is `direction + decay velocity`.

    Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html; `torch.optim.SGD(nesterov=True)`.

    decay: weight of the past in each step, 0 <= decay < 1.
    """
    return _accumulate(decay, lambda direction, velocity: direction + decay * velocity)


def weight_decay(rate: Number, on: Callable[[str, Tensor], bool] = lambda name, p: True) -> Transform:
    """`direction + rate params`: decay that no preconditioner scales, per step `learning_rate * rate` of a parameter.

    Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101. After `momentum` in a chain it is theirs; before it, it
    is the weight decay of `torch.optim.SGD`. It stands before `learning_rate`, which turns the sign: after it
    parameters grow.

    rate: positive.
    on: which parameters decay, e.g. `lambda name, p: p.dim() > 1` for no bias.
    """
    check_positive("rate", rate)

    def decayed(direction: Params, params: Mapping[str, Tensor], info: Info) -> Params:
        return {
            name: d + rate * params[name].detach() if on(name, params[name]) else d for name, d in direction.items()
        }

    return _stateless(decayed)


def clip_kl(limit: Number, learning_rate: Number | Schedule) -> Transform:
    """Shrink the natural gradient to a trust region: `learning_rate^2 natural^T F natural <= limit`.

    F is the damped curvature that preconditioned it: before it is shrunk `natural^T F natural = natural . gradient`,
    twice the divergence of the predictions to second order of a step with learning rate 1. Ba, Grosse & Martens 2017,
    section 5, https://openreview.net/forum?id=SkkTMpjex. It needs the natural gradient itself, so it stands first in a
    chain.

    limit: in the unit of the loss (nats, of a log-likelihood); positive, 1e-3 is usual.
    learning_rate: the one of the chain, a number, a 0-d tensor or a schedule.
    """
    check_positive("limit", limit)
    if not callable(learning_rate):
        check_positive("learning_rate", learning_rate)

    def update(natural: Params, state: Step, params: Mapping[str, Tensor], info: Info) -> tuple[Params, Step]:
        lr = value_at(learning_rate, state.step)
        return _scale(natural, together(dots(natural, info.gradient)), limit / lr**2), Step(state.step + 1)

    return Transform(_first_step, update)


def clip_norm(limit: Number, scope: Scope = together) -> Transform:
    """Shrink what has a Euclidean norm above the limit to the limit.

    limit: in the unit of the direction, so of an update where it stands after `learning_rate`; positive.
    scope: `together`, one norm over all parameters, or `each`, one a parameter.
    """
    check_positive("limit", limit)
    return _stateless(lambda direction, params, info: _scale(direction, scope(squares(direction)), limit**2))


def graft(onto: Transform, scope: Scope = each) -> Transform:
    """Keep the direction and take the norm of another one, of `onto` applied to the gradient.

    Agarwal et al. 2020, https://arxiv.org/abs/2002.11803. `graft(identity())` has the norm of the gradient. What is
    zero stays zero.

    onto: any transform, for instance a chain of clipping and momentum.
    scope: `each`, a norm for each parameter as in the paper's layer-wise grafting, or `together`, one over all.
    """
    _check_transform("graft", onto)

    def update(direction: Params, state: Any, params: Mapping[str, Tensor], info: Info) -> tuple[Params, Any]:
        other, state = onto.update(info.gradient, state, params, info)
        wanted, own = scope(squares(other)), scope(squares(direction))
        ratios = {name: wanted[name].sqrt() / torch.where(own[name] > 0, own[name], 1).sqrt() for name in direction}
        return _times(direction, ratios), state

    return Transform(onto.init, update)


def learning_rate(value: Number | Schedule) -> Transform:
    """`-value direction`: from a direction of ascent to the update that `apply_updates` adds.

    value: positive; a number, a 0-d tensor or a schedule of the number of updates so far.
    """
    if not callable(value):
        check_positive("value", value)

    def update(direction: Params, state: Step, params: Mapping[str, Tensor], info: Info) -> tuple[Params, Step]:
        lr = value_at(value, state.step)
        return {name: -lr * d for name, d in direction.items()}, Step(state.step + 1)

    return Transform(_first_step, update)


def chain(*transforms: Transform) -> Transform:
    """One transform after the other. After a skipped step the result is zero and every state stays as it was.

    Its state is the tuple of theirs.
    """
    for transform in transforms:
        _check_transform("chain", transform)

    def init(params: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return tuple(transform.init(params) for transform in transforms)

    def update(direction: Params, state: Any, params: Mapping[str, Tensor], info: Info) -> tuple[Params, Any]:
        if len(state) != len(transforms):
            raise ValueError(
                f"state has {len(state)} parts, this chain has {len(transforms)} transforms: make it with init(params)"
            )
        new = []
        for transform, part in zip(transforms, state, strict=True):
            direction, part = transform.update(direction, part, params, info)
            new.append(part)
        held = pytree.tree_map(lambda x, y: torch.where(info.skipped, y, x), tuple(new), state)
        return {name: torch.where(info.skipped, 0, d) for name, d in direction.items()}, held

    return Transform(init, update)


def apply_updates(params: Mapping[str, Tensor], updates: Mapping[str, Tensor]) -> Params:
    """`params + updates`, in the dtypes of params. ValueError where the trees or shapes differ."""
    check_like(params, updates, "updates")
    return {name: (p.detach() + updates[name]).to(p.dtype) for name, p in params.items()}


def check_like(like: Mapping[str, Tensor], tree: Mapping[str, Tensor], argument: str, other: str = "params") -> None:
    """Refuse a tree that has not the names and shapes of another, params."""
    _check_names(other, like)
    _check_names(argument, tree)
    for name, p in like.items():
        if name not in tree:
            raise ValueError(f"{argument} has no {name!r}, {other} has: give both trees the same names")
        if tree[name].shape != p.shape:
            raise ValueError(
                f"{argument}[{name!r}] has shape {tuple(tree[name].shape)}, {other}[{name!r}] {tuple(p.shape)}: give "
                "both the same shape"
            )
    for name in tree:
        if name not in like:
            raise ValueError(f"{argument} has {name!r} that {other} has not: give both trees the same names")


def _check_names(argument: str, tree: Any) -> None:
    """Refuse what has no names, as a module."""
    if not hasattr(tree, "items"):
        raise TypeError(f"{argument} is a {type(tree).__name__}: give a dict of tensors by name")


def _check_transform(taker: str, transform: Any) -> None:
    """Refuse the function that makes a transform."""
    if not hasattr(transform, "update"):
        raise TypeError(f"{taker} was given {transform!r}: give a Transform, as momentum(0.9) returns it")


def _stateless(function: Callable[[Params, Mapping[str, Tensor], Info], Params]) -> Transform:
    return Transform(lambda params: (), lambda direction, state, params, info: (function(direction, params, info), ()))


def _accumulate(decay: Number, read: Callable[[Tensor, Tensor], Tensor]) -> Transform:
    check_decay("decay", decay)

    def init(params: Mapping[str, Tensor]) -> Velocity:
        _check_names("params", params)
        return Velocity({name: torch.zeros_like(p) for name, p in params.items()})

    def update(direction: Params, state: Velocity, params: Mapping[str, Tensor], info: Info) -> tuple[Params, Velocity]:
        check_like(state.velocity, direction, "direction", "the velocity in state")
        velocity = {name: (decay * v + direction[name]).to(v.dtype) for name, v in state.velocity.items()}
        return {name: read(d, velocity[name]) for name, d in direction.items()}, Velocity(velocity)

    return Transform(init, update)


def _first_step(params: Mapping[str, Tensor]) -> Step:
    check_params(params)
    return Step(torch.zeros((), dtype=torch.int64, device=next(iter(params.values())).device))


def _scale(direction: Params, squared: Mapping[str, Tensor], limit: Number) -> Params:
    """The direction times the root of `limit / squared` where that is below 1."""
    shares = {name: torch.where(squared[name] > limit, limit / squared[name], 1).sqrt() for name in direction}
    return _times(direction, shares)


def _times(direction: Params, factors: Mapping[str, Tensor]) -> Params:
    """Multiplied in the dtype of the factors, for half precision can overflow; in that of the direction after."""
    return {name: (d.to(factors[name].dtype) * factors[name]).to(d.dtype) for name, d in direction.items()}


torch.serialization.add_safe_globals([Step, Velocity])
