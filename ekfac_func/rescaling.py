"""How the second moment divides the mean gradient: the damping of each layer, and the way back."""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .basis import counts, fills_up, real
from .checks import check_dampings
from .kronecker import out_of_basis
from .memory import empty, writable
from .modes import transformed
from .subspace import Mean, incomplete, rescale
from .types import Basis, Damping, Layer, Moment, Number, Spectrum


def dampings_of(
    damping: Number | Damping, moments: Mapping[str, Moment], bases: Mapping[str, Basis], layers: Mapping[str, Layer]
) -> dict[str, Tensor]:
    """The damping of each layer, `[]`."""
    if callable(damping):
        ruled = damping({name: _spectrum(moments[name], bases[name], layer) for name, layer in layers.items()})
        check_dampings(ruled, layers)
    else:
        ruled = dict.fromkeys(layers, damping)
    return {name: _as_scalar(ruled[name], moments[name].weight) for name in layers}


def _spectrum(moment: Moment, basis: Basis, layer: Layer) -> Spectrum:
    value = moment.value
    if fills_up(basis, layer):
        value = torch.where(real(basis, layer), value, 0)
    return Spectrum(value, moment.weight, counts(basis, value), math.prod(layer.sizes))


def _as_scalar(damping: Number, like: Tensor) -> Tensor:
    if isinstance(damping, Tensor):
        return damping.detach() + like.new_zeros(())
    smallest = torch.finfo(like.dtype).tiny
    if damping < smallest:
        given = "damping" if torch.compiler.is_compiling() else f"damping={damping!r}"  # a symbol has no text
        raise ValueError(given + " is zero in the dtype of the moments: give at least torch.finfo(dtype).tiny")
    if torch.compiler.is_compiling():  # where what is filled in would cost a graph
        return damping + like.new_zeros(())
    return like.new_full((), damping)


def rescaled(
    mean: Mean, moment: Moment, basis: Basis, damping: Tensor, exponent: Number, sizes: tuple[int, int, int, int]
) -> Tensor:
    """`Q_B [ projected (m2 + damping)^exponent ] Q_A^T`; zero while there is no estimate of m2."""
    added = torch.where(damping > 0, torch.where(moment.weight > 0, damping, torch.inf), torch.nan)  # which is skipped
    value = moment.value
    damped = torch.add(value, added, out=empty(value.shape, value)) if writable(value, added) else value + added
    if incomplete(basis):
        return rescale(mean, damped**exponent, basis)
    room = None if transformed() else damped  # new memory costs more than the arithmetic
    if not isinstance(exponent, Tensor) and exponent == -1:  # a division is one pass over memory less than a power
        return out_of_basis(torch.div(mean.projected, damped, out=room), basis, sizes)
    return out_of_basis(torch.mul(mean.projected, torch.pow(damped, exponent, out=room), out=room), basis, sizes)
