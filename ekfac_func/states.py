"""The state: before the first step, what a step asks of it, and what it says of layers that only some batches use."""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .basis import Choice, factor_shapes, moment_shape, start
from .types import NO_CALL, Layer, State, statistics_dtype


def initial_state(
    layers: tuple[Layer, ...], chosen: Mapping[str, Choice], params: Mapping[str, Tensor], averaged: bool = True
) -> State:
    """Identity bases and zero statistics."""
    factors, bases, second_moments = {}, {}, {}
    for layer in layers:
        name, p = layer.weight, params[layer.weight]
        zero = torch.zeros((), dtype=statistics_dtype(p), device=p.device)
        factors[name], bases[name], second_moments[name] = start(layer, chosen[name], zero, averaged)
    return State(0, factors, bases, second_moments, layers)


def check_kind_of_state(state: object) -> None:
    """Refuse what is no state, before its layers are read."""
    if not isinstance(state, State):
        raise TypeError(f"state is a {type(state).__name__}: pass what init or the last precondition returned")


def check_state(
    state: State,
    layers: Mapping[str, Layer],
    chosen: Mapping[str, Choice],
    params: Mapping[str, Tensor],
    averaged: bool,
) -> None:
    """Refuse a state that `init` did not make for these params, loss_fn, rules and bases."""
    for name, layer in layers.items():
        if name not in state.second_moments:
            raise ValueError(f"state has no layer {name!r}, params has: make it with init(params, batch)")
        _check_kept_moment(name, state.second_moments[name].value, moment_shape(layer, chosen[name]), params[name])
        A, B, _ = state.factors[name]
        needed = factor_shapes(layer, chosen[name], averaged)
        if (tuple(A.shape), tuple(B.shape)) != needed:
            raise ValueError(
                f"state has factors of shapes {tuple(A.shape)} and {tuple(B.shape)} for the layer {name!r}, bases and "
                f"factor_decay need {needed[0]} and {needed[1]}: make it with init(params, batch)"
            )
    for old in state.layers:
        new = layers.get(old.weight)
        if new is None or old.order == new.order:  # Dynamo of torch 2.11 knows no `!=` of tuples here
            continue
        if old.split == new.split:
            raise ValueError(
                f"state has the layer {old.weight!r} with its axes in the order {old.order}, the loss has them in the "
                f"order {new.order}: let it call its layers in one order, or make the state with init(params, batch)"
            )
    for name in state.second_moments:
        if name not in layers:
            that = "is now the bias of another" if name in params else "params has not"
            raise ValueError(f"state has a layer {name!r} that {that}: make it with init(params, batch)")


def _check_kept_moment(name: str, value: Tensor, shape: tuple[int, ...], p: Tensor) -> None:
    """Refuse a second moment of a layer whose weight is p; shape: that it needs."""
    if tuple(value.shape) != shape:
        raise ValueError(
            f"state has a second moment of shape {tuple(value.shape)} for the layer {name!r}, params, rules and bases "
            f"need {shape} (blocks, outputs, inputs with the bias, offsets): make it with init(params, batch)"
        )
    if value.dtype != statistics_dtype(p):
        raise TypeError(
            f"state has a second moment of dtype {value.dtype} for the layer {name!r}, params of dtype {p.dtype} need "
            f"{statistics_dtype(p)}: make it with init(params, batch)"
        )
    if value.device != p.device:
        raise ValueError(
            f"state has the layer {name!r} on {value.device}, params on {p.device}: move it by "
            "torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), state)"
        )


def refuse_changed_use(state: State, layers: Mapping[str, Layer]) -> None:
    """Refuse a batch that uses other layers than the state has seen.

    Without a call a layer is read as a parameter without a rule, and what the state knows of it is lost.
    """
    for old in state.layers:
        new = layers.get(old.weight)
        if new is None or (old.rule is None) == (new.rule is None):
            continue
        if (old if old.rule is None else new).hidden_by == NO_CALL:
            raise ValueError(
                f"loss_fn {'does not use' if new.rule is None else 'uses'} the layer {old.weight!r}, which it "
                f"{'used' if new.rule is None else 'did not use'} when state was made: in a compiled step, and with "
                "ranks, let it use each layer in every call or in none; one process takes it in eager mode"
            )


def unused(layers: Iterable[Layer]) -> set[str]:
    """The layers that a batch does not use; of a state's, those that its last refresh passed over for that."""
    return {layer.weight for layer in layers if layer.rule is not None and layer.hidden_by == NO_CALL}


def marked(layer: Layer, passed_over: bool) -> Layer:
    """A layer, if it has a rule as one that its last refresh passed over, or as one that it did not."""
    return layer if layer.rule is None else layer._replace(hidden_by=NO_CALL if passed_over else None)


def with_first_uses(
    state: State,
    layers: Mapping[str, Layer],
    chosen: Mapping[str, Choice],
    params: Mapping[str, Tensor],
    averaged: bool,
) -> State:
    """The state, in which a layer starts anew when the first call uses it: nothing is known of it until then."""
    without = {layer.weight for layer in state.layers if layer.rule is None and layer.hidden_by == NO_CALL}
    met = {name: layer for name, layer in layers.items() if layer.rule is not None and name in without}
    if not met:
        return state
    fresh = initial_state(tuple(met.values()), chosen, params, averaged)
    joined_now = {layer.bias for layer in met.values()} & without  # biases that were layers of their own

    def renewed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        return {**{name: of_layer for name, of_layer in old.items() if name not in joined_now}, **new}

    known = {layer.weight: layer for layer in state.layers}
    return State(
        state.step,
        renewed(state.factors, fresh.factors),
        renewed(state.bases, fresh.bases),
        renewed(state.second_moments, fresh.second_moments),
        tuple(renewed(known, {name: marked(layer, True) for name, layer in met.items()}).values()),
    )
