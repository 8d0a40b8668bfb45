"""Thin bases, of the samples of one batch alone: a step has such a layer in coordinates of the span of its samples.

There it is a small layer in a full basis, and what it has outside of the span is zero.
"""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .basis import FULL, Choice, Choices, Compact, Thin, start
from .capture import joined
from .factors import WeightSharing, averages, factor_sums
from .kronecker import as_samples, gradient
from .passes import LayerSums
from .refreshes import scaled
from .second_moment import AtRefresh, SecondMoment, reset
from .types import Factored, Layer, Number, OneHot, State, Terms


def check_of_samples(
    choices: Choices,
    several: bool,
    basis_every: int,
    factor_decay: Number,
    estimator: SecondMoment,
    at_refresh: AtRefresh | None,
) -> None:
    """bases: `thin` and `compact`, which are of the samples of one batch, with arguments that keep to these.

    several: whether more than one process has samples.
    """
    kinds = [type(choice) for choice in choices.values()]
    if several and (Thin in kinds or Compact in kinds):
        raise ValueError(
            "ranks with thin or compact bases: these are of the samples of one process, give rank(r) or FULL"
        )
    for kind, name in ((Thin, "thin"), (Compact, "compact")):
        if averages(factor_decay) and kind in kinds:
            raise ValueError(
                f"factor_decay={factor_decay!r} with {name} bases: they are of the samples of one batch alone, give "
                "factor_decay=0, rank(r) or FULL"
            )
    if Thin not in kinds:
        return
    if basis_every != 1:
        raise ValueError(
            f"basis_every={basis_every!r} with thin bases: they span the samples of one batch alone, "
            "give basis_every=1 or use rank(r)"
        )
    if estimator.carries:
        raise ValueError(
            f"second_moment={estimator.name} with thin bases: it carries on what the next basis does not span, use "
            "intra_batch, centred or kfac, or rank(r)"
        )
    if at_refresh is not None and at_refresh is not reset:
        raise ValueError("at_refresh with thin bases: there is no moment to carry on, leave it out")


class Span(NamedTuple):
    """Orthonormal columns that span the samples of each side; None of a side that is taken whole."""

    U_A: Tensor | None  # [b i I]
    U_B: Tensor | None  # [b o O]


def compress(terms: Terms) -> tuple[Terms, Span]:
    """The terms in coordinates of the span of their own samples, where those are fewer than the side has dimensions.

    A QR, `X^T = Q R`, has the coordinates in R and stays orthonormal where samples repeat, as the Gram matrix does not.
    """
    match terms:
        case (Factored() as factored, OneHot() as table):
            h = table.g[:, None, :, :, None]
            a = factored.inputs
            joint, U_A = _compress(torch.cat([a, h.expand(-1, a.shape[1], -1, -1, -1)], 2)[..., 0])
            s = a.shape[2]
            return (factored._replace(a=joint[:, :, :s, :, None]), table._replace(g=joint[:, 0, s:])), Span(U_A, None)
        case (OneHot() as table,):
            g, U_A = _compress(table.g[:, None])
            return (table._replace(g=g[:, 0]),), Span(U_A, None)
        case (Factored(g=g, x=x) as factored,):
            a, U_A, (g, U_B) = factored.inputs, None, _compress(g)
            if x is None and a.shape[4] == 1:
                coordinates, U_A = _compress(a[..., 0])
                a = coordinates[..., None]
            return (factored._replace(a=a, g=g),), Span(U_A, U_B)
    return terms, Span(None, None)


def _compress(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Samples `[n b s d]` as coordinates `[n b s D]`, and the columns `[b d D]` that they are along.

    A sample that is not finite has no finite coordinates, for the step to be skipped, and no part in the columns.
    """
    n, b, s, d = x.shape
    if n * s >= d or n * s == 0:
        return x, None
    X = as_samples(x)
    unit, largest = scaled(X)
    Q, R = torch.linalg.qr(unit.mT)
    coordinates = torch.where(torch.isfinite(X).all(-1, keepdim=True), R.mT * largest, torch.nan)
    return coordinates.reshape(b, n, s, -1).movedim(0, 1), Q


def in_span(layer: Layer, span: Span) -> Layer:
    """The layer of the coordinates in a span, in which its basis is full."""
    b, o, i, k = layer.sizes
    i, o = (dim if U is None else U.shape[-1] for dim, U in zip((i, o), span, strict=True))
    return Layer(layer.weight, layer.bias, (b, o, i, k), *layer[3:])  # Dynamo cannot `_replace` a size by a symbol


def expand_span(M: Tensor, span: Span) -> Tensor:
    """`U_B M U_A^T`: `[b O I k]` of coordinates in the span to `[b o i k]`."""
    M = M if span.U_B is None else torch.einsum("bOIk,boO->boIk", M, span.U_B)
    return M if span.U_A is None else torch.einsum("boIk,biI->boik", M, span.U_A)


def into_span(M: Tensor, span: Span) -> Tensor:
    """`U_B^T M U_A`: `[b o i k]` to coordinates in the span."""
    M = M if span.U_B is None else torch.einsum("boik,boO->bOik", M, span.U_B)
    return M if span.U_A is None else torch.einsum("bOik,biI->bOIk", M, span.U_A)


def into_spans(
    chosen: Mapping[str, Choice],
    state: State,
    layers: Mapping[str, Layer],
    seen: dict[str, LayerSums],
    sharing: WeightSharing,
) -> tuple[State, dict[str, Span], dict[str, Tensor]]:
    """The state with an empty layer of its span's size for each thin one, the spans, and the gradients' sums of these.

    What was seen of a thin layer is from then on seen in its span.
    """
    spans, totals = {name: Span(None, None) for name in layers}, {}
    factors, bases, moments = dict(state.factors), dict(state.bases), dict(state.second_moments)
    for name, layer in layers.items():
        if not isinstance(chosen[name], Thin):
            continue
        whole = joined(seen[name].terms)
        given, spans[name] = compress(whole)
        totals[name] = gradient(whole)
        small, zero = in_span(layer, spans[name]), state.second_moments[name].weight.new_zeros(())
        factors[name], bases[name], moments[name] = start(small, FULL, zero, averaged=True)
        seen[name] = LayerSums(factors=factor_sums(given, bases[name], sharing, False), terms=(given,))
    return replace(state, factors=factors, bases=bases, second_moments=moments), spans, totals


def out_of_spans(new: State, old: State, chosen: Mapping[str, Choice]) -> State:
    """The state without what it does not carry of thin layers."""
    thin = [name for name in old.bases if isinstance(chosen[name], Thin)]
    return replace(
        new,
        factors={**new.factors, **{name: old.factors[name] for name in thin}},
        bases={**new.bases, **{name: old.bases[name] for name in thin}},
        second_moments={**new.second_moments, **{name: old.second_moments[name] for name in thin}},
    )
