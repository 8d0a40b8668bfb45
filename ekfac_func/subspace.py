"""Bases of `rank(r)`: what lies outside of the r columns, in the moment and in the rescaled gradient.

A side of `rank(r)` has a coordinate for all that lies outside of its r columns, the last one, with a zero column in the
basis: projections are zero there, and the moment is the mean over the complement. With `a_p = a - Q_A Q_A^T a` of c
dimensions, and `g_p` alike, the entries that the zero columns leave out are

    outside on i:  mean_n ||sum_s g_O[n, s] a_p[n, s]||^2 / c_i        [b O k]
    outside on o:  mean_n ||sum_s g_p[n, s] a_I[n, s]||^2 / c_o        [b I k]
    on both:       mean_n ||sum_s g_p[n, s] a_p[n, s]^T||^2 / (c_i c_o)    [b k]
"""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocking import MAX_BYTES, fitting, nominal, split
from .kronecker import (
    add_rows,
    as_samples,
    coalesce,
    common_first,
    look_up,
    project_inputs,
    project_outputs,
    turn_inputs,
    turn_outputs,
    written,
)
from .modes import squared
from .products import outer
from .types import Basis, Factored, Number, OneHot, Side, Sums, Terms, outside

Outside = Sequence[Tensor | None]  # squares outside on i `[b O k]`, on o `[b I k]`, on both `[b k]`; None: complete
NOTHING: Outside = (None, None, None)


def incomplete(basis: Basis) -> bool:
    """Whether a side has a complement."""
    return any(outside(Q) for Q in basis)


def sample_squares(g: Tensor, a: Tensor, g_O: Tensor, a_I: Tensor, basis: Basis) -> Outside:
    """The sums of the squares outside, of samples and what they are in the basis."""
    c_i, c_o = map(outside, basis)
    g_p, a_p = _rest_outputs(g, g_O, basis), _rest_inputs(a, a_I, basis)
    on_i = _norms_inputs(g_O, a_p) / c_i if c_i else None
    on_o = _norms_outputs(g_p, a_I) / c_o if c_o else None
    both = _norms(g_p, a_p) / (c_i * c_o) if c_i and c_o else None
    return on_i, on_o, both


def single_squares(g: Tensor, a: Tensor, g_O: Tensor, a_I: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """The squares of samples in the basis and, in the coordinate that stands for it, their mean outside.

    Of one position they are the factors of the gradient's squares.
    """
    c_i, c_o = map(outside, basis)
    h, x = g_O.square(), a_I.square()
    if c_o:
        h = _replace_last(h, _rest_outputs(g, g_O, basis).square().sum(-1, keepdim=True) / c_o, -1)
    if c_i:
        x = _replace_last(x, _rest_inputs(a, a_I, basis).square().sum(-2, keepdim=True) / c_i, -2)
    return h, x


def outside_of_table(table: OneHot, basis: Basis, other: Factored | None = None) -> Tensor:
    """The squares outside of a table's basis, `[1 O I 1]`.

    other: a term of the same weight, of which twice the product with the table is added.
    """
    c = outside(basis.Q_A)
    once = coalesce(table)
    h = once.g[:, None, :, :, None]
    h_p = _rest_inputs(h, project_inputs(h, basis), basis)[:, 0, :, :, 0]
    values = h_p.square()
    if other is not None:
        a = other.inputs
        a_p = _rest_inputs(a, project_inputs(a, basis), basis)
        values = values + 2 * look_up(Factored(a_p, other.g), once.ids) * h_p
    on_i = add_rows(once.ids, values.sum(-1, keepdim=True), table.size)[:, :, 0] / c
    return assembled((on_i, None, None), (table.size, basis.Q_A.shape[-1]))


def gradient_squares(G: Tensor, basis: Basis) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients `[n b o i k]` in the basis, and the sums of their squares outside of it."""
    c_i, c_o = map(outside, basis)
    K = turn_outputs(G, basis.Q_B)
    H = turn_inputs(K, basis.Q_A)
    on_i = on_o = both = None
    if c_i:
        on_i = squared(_rest_inputs(K, H, basis)).sum((0, 3)) / c_i
    if c_o:
        L = turn_inputs(G, basis.Q_A)
        on_o = squared(L - turn_outputs(H, basis.Q_B.mT)).sum((0, 2)) / c_o
    if c_i and c_o:
        rest = G - turn_outputs(K, basis.Q_B.mT)
        both = squared(_rest_inputs(rest, turn_inputs(rest, basis.Q_A), basis)).sum((0, 2, 3)) / (c_i * c_o)
    return H, on_i, on_o, both


def mean_outside(mean: Sums, basis: Basis) -> Sums:
    """The means; the coordinates that stand for all outside of the basis hold the gradient's root mean square there."""
    _, *squares = gradient_squares(mean.gradient[None], basis)
    sizes = mean.projected.shape[1], mean.projected.shape[2]
    return mean._replace(projected=mean.projected + assembled(squares, sizes).sqrt())


def added(total: Outside, part: Outside) -> Outside:
    """Sums of squares of more examples."""
    return [x if y is None else plus(x, y) for x, y in zip(total, part, strict=True)]


def plus(total: Tensor | None, part: Tensor) -> Tensor:
    """A sum with one part more; None before the first."""
    return part if total is None else total + part


def with_outside(square: Tensor, left: Outside) -> Tensor:
    """The sum of squares inside of a basis, `[b O I k]`, and what was left outside of it."""
    if all(part is None for part in left):
        return square
    return square + assembled(left, (square.shape[1], square.shape[2]))


def assembled(squares: Outside, sizes: tuple[int, int]) -> Tensor:
    """As the last column, row and corner of `[b O I k]`."""
    (on_i, on_o, both), (O, I) = squares, sizes  # noqa: E741
    parts = []
    if on_i is not None:
        parts.append(F.pad(on_i[:, :, None], [0, 0, I - 1, 0]))
    if on_o is not None:
        parts.append(F.pad(on_o[:, None], [0, 0, 0, 0, O - 1, 0]))
    if both is not None:
        parts.append(F.pad(both[:, None, None], [0, 0, I - 1, 0, O - 1, 0]))
    return torch.stack(parts).sum(0)


def _norms_inputs(g: Tensor, a: Tensor) -> Tensor:
    """`sum_n ||sum_s g[n, s, o] a[n, s]||^2`, `[b o k]`, by pairs of positions or by rows, whichever is less work."""
    s, i, o = a.shape[2], a.shape[3], g.shape[3]
    if s * (i + o) > i * o:
        return _summed(lambda h, x: torch.einsum("nbso,nbsik->nboik", h, x).square().sum((0, 3)), g, a, i * o)

    def by_pairs(h: Tensor, x: Tensor) -> Tensor:
        h, x = common_first(h, x)
        K = torch.einsum("nbsik,nbtik->nbkst", x, x)
        return (torch.einsum("nbkst,nbto->nbkso", K, h) * h[:, :, None]).sum((0, 3)).movedim(1, 2)

    return _summed(by_pairs, g, a, s * s + s * o)


def _norms_outputs(g: Tensor, a: Tensor) -> Tensor:
    """`sum_n ||sum_s g[n, s] a[n, s, i]||^2`, `[b i k]`: the same with the sides exchanged."""
    return _norms_inputs(a.flatten(3), g[..., None])[..., 0].unflatten(1, a.shape[3:])


def _norms(g: Tensor, a: Tensor) -> Tensor:
    """`sum_n ||sum_s g[n, s] a[n, s]^T||^2`, `[b k]`, by pairs of positions: no gradient of an example is formed."""

    def by_pairs(h: Tensor, x: Tensor) -> Tensor:
        h, x = common_first(h, x)
        pairs_h, pairs_x = torch.einsum("nbso,nbto->nbst", h, h), torch.einsum("nbsik,nbtik->nbkst", x, x)
        return torch.einsum("nbst,nbkst->bk", pairs_h, pairs_x)

    return _summed(by_pairs, g, a, 2 * a.shape[2] ** 2)


def _summed(of: Callable[[Tensor, Tensor], Tensor], g: Tensor, a: Tensor, entries: int) -> Tensor:
    """What a function gives of blocks of examples, added up; a graph takes all examples at once.

    entries: that the function writes for each example, b and k.
    """
    bytes_each = entries * g.shape[1] * a.shape[4] * g.element_size()
    most = None if torch.compiler.is_compiling() else fitting(bytes_each, MAX_BYTES)
    return functools.reduce(torch.add, (of(h, x) for h, x in zip(split(g, most), split(a, most), strict=True)))


def _replace_last(x: Tensor, last: Tensor, axis: int) -> Tensor:
    return torch.cat([x.narrow(axis, 0, x.shape[axis] - 1), last], dim=axis)


def _rest_inputs(a: Tensor, a_I: Tensor, basis: Basis) -> Tensor:
    """`a - Q_A Q_A^T a` of samples `[n b s i k]` or gradients `[n b o i k]`; a itself where Q_A has no complement.

    a_I: a in the basis.
    """
    return a - turn_inputs(a_I, basis.Q_A.mT) if outside(basis.Q_A) else a


def _rest_outputs(g: Tensor, g_O: Tensor, basis: Basis) -> Tensor:
    return g - turn_inputs(g_O[..., None], basis.Q_B.mT)[..., 0] if outside(basis.Q_B) else g


class Mean(NamedTuple):
    """A mean gradient; where `rescales_samples` says so, with the samples that it is made of."""

    gradient: Tensor  # [b o i k]
    projected: Tensor  # [b O I k]
    terms: Terms | None
    n: Number


def rescales_samples(terms: Terms, basis: Basis, n: int) -> bool:
    """Whether rescaling the samples of n examples is less work than rescaling their gradient."""
    match terms:
        case (Factored(a=a, g=g),) if a.shape[4] == 1 and incomplete(basis):
            samples = g.shape[2] * nominal(n)
            i, o, r, q = a.shape[3], g.shape[3], basis.Q_A.shape[-1], basis.Q_B.shape[-1]
            c_i, c_o = map(outside, basis)
            of_gradient = 2 * o * i * ((q if c_i else 0) + (r if c_o else 0))
            return o * i * (samples + (r if c_i else q)) + 2 * samples * (o * q + i * r) <= of_gradient
    return False


def rescale(mean: Mean, scale: Tensor, basis: Basis) -> Tensor:
    """The gradient times scale in the basis and outside of it, `[b o i k]`.

    With P = Q_B^T G Q_A, K = Q_B^T G and L = G Q_A, and what scale is outside on i, on o and on both, it is
    `Q_B [ P (scale - on_i) Q_A^T + K (on_i - both) ] + [ (L - Q_B P) (on_o - both) ] Q_A^T + both G`.

    scale: `[b O I k]`.
    """
    c_i, c_o = map(outside, basis)
    G, P, on_i, on_o, both = mean.gradient, mean.projected, scale[:, :, -1:], scale[:, -1:], scale[:, -1:, -1:]
    match mean.terms:
        case (Factored(g=g) as term,):
            return _rescaled_samples(g, term.inputs / mean.n, scale, P * scale, basis)
    if not c_o:
        rows = turn_inputs(P * (scale - on_i), basis.Q_A.mT) + turn_outputs(G, basis.Q_B) * on_i
        return turn_outputs(rows, basis.Q_B.mT)
    if not c_i:
        columns = turn_outputs(P * (scale - on_o), basis.Q_B.mT) + turn_inputs(G, basis.Q_A) * on_o
        return turn_inputs(columns, basis.Q_A.mT)
    rows = turn_inputs(P * (scale - on_i), basis.Q_A.mT) + turn_outputs(G, basis.Q_B) * (on_i - both)
    columns = (turn_inputs(G, basis.Q_A) - turn_outputs(P, basis.Q_B.mT)) * (on_o - both)
    return turn_outputs(rows, basis.Q_B.mT) + turn_inputs(columns, basis.Q_A.mT) + both * G


def _rescaled_samples(g: Tensor, a: Tensor, scale: Tensor, inside: Tensor, basis: Basis) -> Tensor:
    """One product `left^T right`: of the samples, and of what lies inside of a side. k is 1."""
    g_O, a_I = project_outputs(g, basis), project_inputs(a, basis)
    g_p, a_p = _rest_outputs(g, g_O, basis), _rest_inputs(a, a_I, basis)
    on_i, on_o = scale[None, :, None, :, -1, 0], scale[None, :, None, -1, :, 0]
    if not outside(basis.Q_A):
        x = turn_inputs(a_I * on_o[..., None], basis.Q_A.mT)[..., 0]
        left = [as_samples(g_p), basis.Q_B.mT]
        right = [as_samples(x), turn_inputs(inside, basis.Q_A.mT)[..., 0]]
        return outer(torch.cat(left, 1), torch.cat(right, 1))[..., None]
    h = turn_inputs((g_O * on_i)[..., None], basis.Q_B.mT)[..., 0]
    columns = turn_outputs(inside, basis.Q_B.mT)[..., 0]  # of Q_A, `[b o I]`
    if outside(basis.Q_B):
        h = h + scale[None, :, None, -1:, -1, 0] * g_p
        columns = columns + outer(as_samples(g_p), as_samples(a_I[..., 0] * on_o))
    left, right = [as_samples(h), columns.mT], [as_samples(a_p[..., 0]), basis.Q_A.mT]
    return outer(torch.cat(left, 1), torch.cat(right, 1))[..., None]


def squared_rotations(old: Basis, new: Basis) -> Basis:
    """Squared rotations `(Q_old^T Q_new)^2` of both sides, by which a moment is carried from one basis to another.

    Of a side of some rank they carry the means over the complements too: the sum of the moment over all coordinates of
    the layer stays what it was.
    """
    return Basis(*(_squared_rotation(Q_old, Q_new) for Q_old, Q_new in zip(old, new, strict=True)))


def _squared_rotation(old: Side, new: Side) -> Tensor:
    R = (written(old).mT @ written(new)).square()
    c = outside(old)
    if not c:
        return R
    R = R[:, :-1, :-1]
    into, out = (1 - R.sum(1, keepdim=True)).clamp(min=0), (1 - R.sum(2, keepdim=True)).clamp(min=0)
    rest = (1 - into.sum(2, keepdim=True) / c).clamp(min=0)
    return torch.cat([torch.cat([R, out / c], 2), torch.cat([into, rest], 2)], 1)
