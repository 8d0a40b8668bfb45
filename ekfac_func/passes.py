"""What a step reads of a batch, layer by layer: in one pass, or in two where a basis changes and terms do not fit."""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

from typing import NamedTuple

from torch import Tensor

from .contraction import add_sums
from .factors import FactorSums, add_factor_sums
from .kronecker import gradient
from .types import Layer, State, Sums, Terms


class LayerSums(NamedTuple):
    """Of one layer and some examples."""

    sums: Sums | None = None  # in a basis that stays, or of a second pass in a new one
    factors: tuple[FactorSums, ...] | None = None  # for one that is to change
    terms: tuple[Terms, ...] = ()  # of some examples after others, where they are wanted again and there is room


def add_layer_sums(state: State, layer: Layer, some: LayerSums, others: LayerSums) -> LayerSums:
    """What is known of the examples of both. state: its bases are those of the factors."""
    factors = None
    if some.factors is not None and others.factors is not None:
        factors = add_factor_sums(some.factors, others.factors, state.bases[layer.weight])
    return LayerSums(add_if_any(layer, some.sums, others.sums), factors, some.terms + others.terms)


def add_if_any(layer: Layer, some: Sums | None, others: Sums | None) -> Sums | None:
    """The sums over the examples of both; None for a layer that the pass does not sum up."""
    return None if some is None or others is None else add_sums(some, others)


def read_gradient(layer: Layer, terms: Terms, bytes_each: int) -> Tensor:
    """The sum of the gradients alone."""
    return gradient(terms)


def add_gradients(layer: Layer, some: Tensor, others: Tensor) -> Tensor:
    return some + others
