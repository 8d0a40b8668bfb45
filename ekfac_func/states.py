"""The state before the first step, and what it says of layers that only some batches use."""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .basis import Choice, start
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
