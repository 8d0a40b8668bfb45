"""The sums that make the second moment, in the order that `orders.py` finds the cheapest."""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .blocking import CACHE_BYTES, nominal, split
from .kronecker import (
    add_rows,
    add_up,
    coalesce,
    common_first,
    form,
    gradient,
    into_basis,
    look_up,
    out_of_basis,
    project_inputs,
    project_outputs,
    turn_inputs,
    turn_outputs,
)
from .memory import Rooms, scratch, writable
from .modes import one_by_one, squared, transformed
from .orders import Contraction, Order, contraction, convolves, early, filters_inputs
from .patches import Patches, patches_of
from .products import matmul
from .subspace import (
    NOTHING,
    Outside,
    added,
    gradient_squares,
    incomplete,
    outside_of_table,
    plus,
    sample_squares,
    single_squares,
    with_outside,
)
from .types import Basis, Dense, Factored, Number, OneHot, Side, Sums, Terms, is_matrix, turns
from .winograd import filtered

FEW_ENTRIES = 2**15  # of an example, below which a call for each costs more than a sum over a leading axis


def exact_sums(terms: Terms, basis: Basis, how: Contraction | None = None) -> Sums:
    """Sums over the examples of G, `[b o i k]`, and of G in the basis and its square, `[b O I k]`.

    how: by default the cheapest order.
    """
    found = _summed(terms, basis, how, total=True)
    total = gradient(terms) if found.gradient is None else found.gradient
    return Sums(total, into_basis(total, basis) if found.projected is None else found.projected, found.square)


def exact_squares(terms: Terms, basis: Basis, how: Contraction | None = None) -> Tensor:
    """The sum over the examples of the square of G in the basis, `[b O I k]`: that of `exact_sums`, by itself."""
    return _summed(terms, basis, how, total=False).square


def gradient_sums(terms: Terms, basis: Basis, how: Contraction | None = None) -> Sums:
    """Sums over the examples of G, `[b o i k]`, and of G in the basis, `[b O I k]`; no moment."""
    total = gradient(terms)
    return Sums(total, into_basis(total, basis), None)


def add_sums(sums: Sums, more: Sums) -> Sums:
    """Those of more examples."""
    square = None if sums.square is None or more.square is None else sums.square + more.square
    return Sums(sums.gradient + more.gradient, sums.projected + more.projected, square)


def mean_sums(sums: Sums, n: Number, own: bool = False) -> Sums:
    """The one division of the sums over examples. own: they may be overwritten, where no two share memory."""
    tensors = [t for t in sums if t is not None]
    own = own and not transformed() and len({t.untyped_storage()._cdata for t in tensors}) == len(tensors)

    def mean(t: Tensor) -> Tensor:
        return torch.div(t, n, out=t if own else None)

    return Sums(mean(sums.gradient), mean(sums.projected), None if sums.square is None else mean(sums.square))


class _Found(NamedTuple):
    """Sums over the examples: that of the squares, and those that an order has on its way to it."""

    square: Tensor  # [b O I k]
    projected: Tensor | None = None  # [b O I k] of G in the basis
    gradient: Tensor | None = None  # [b o i k] of G


def _summed(terms: Terms, basis: Basis, how: Contraction | None, total: bool) -> _Found:
    """The squares. total: whether the other sums are wanted too, where they cost less than by themselves."""
    how = contraction(terms, basis) if how is None else how
    match terms:
        case (OneHot() as table,):
            return _of_table(table, basis, total)
        case (Factored() as factored, OneHot() as table):
            return _of_tied(factored, table, basis, how, total)
        case (Factored() as term,) if how.order is Order.ONE_POSITION:
            return _of_one_position(term, basis, total)
        case (Factored() as term,) if how.order is Order.KERNEL:
            return _by_kernel(term, basis, total)
        case (Factored() as term,) if how.order is Order.PAIRS:
            return _by_pairs(term, basis, how, total)
        case (Factored() as term,):
            return _by_forming(term, basis, how, total)
        case (Dense(G=G),):
            return _Found(_dense_squares(G, basis, how))
    raise AssertionError(f"no contraction for {[type(term).__name__ for term in terms]}")


def _of_one_position(term: Factored, basis: Basis, total: bool) -> _Found:
    """Of one position: squares factor."""
    g, a = term.g, term.inputs
    h, x = project_outputs(g, basis), project_inputs(a, basis)
    projected = add_up(h, x) if total else None
    if incomplete(basis):
        return _Found(add_up(*single_squares(g, a, h, x, basis)), projected)
    return _Found(add_up(_squared(h, basis.Q_B), _squared(x, basis.Q_A)), projected)


def _squared(turned: Tensor, Q: Side) -> Tensor:
    """The square, in place unless the side turned nothing and `turned` is its very input."""
    return squared(turned) if Q.shape[-1] > 1 else turned.square()


def _by_kernel(term: Factored, basis: Basis, total: bool) -> _Found:
    g, a = term.g, term.inputs
    of_B, of_A = is_matrix(basis.Q_B) and g.shape[1] == 1, is_matrix(basis.Q_A) and a.shape[1] == a.shape[4] == 1
    h = _in_columns(g, basis.Q_B) if of_B else project_outputs(g, basis)
    x = _in_columns(a[..., 0], basis.Q_A)[..., None] if of_A else project_inputs(a, basis)
    projected, square = kernels.projected_sums(h, x)
    left = sample_squares(g, a, h, x, basis) if incomplete(basis) else NOTHING
    return _Found(with_outside(square, left), projected, _turned_back(projected, term, basis) if total else None)


def _in_columns(t: Tensor, Q: Tensor) -> Tensor:
    """`t Q` of `[n 1 s d]` with positions as the last axis in memory, as the kernel reads them."""
    return matmul(Q.mT.expand(t.shape[0], -1, -1), t[:, 0].mT)[:, None].mT


def _of_table(table: OneHot, basis: Basis, total: bool) -> _Found:
    ids, h = _once(table, basis)
    square = add_rows(ids, h.square(), table.size)
    if incomplete(basis):
        square = square + outside_of_table(table, basis)
    return _Found(square, add_rows(ids, h, table.size) if total else None)


def _of_tied(factored: Factored, table: OneHot, basis: Basis, how: Contraction, total: bool) -> _Found:
    """Of a table T that is a linear layer F too: `sum (F + T)^2`. T and the product F T have one row for each id."""
    square, projected, _ = _summed((factored,), basis, how, total)
    ids, h = _once(table, basis)
    turned = Factored(project_inputs(factored.inputs, basis), factored.g)
    cross = 2 * look_up(turned, ids) * h
    square = square + add_rows(ids, h.square() + cross, table.size)
    if incomplete(basis):
        square = square + outside_of_table(table, basis, factored)
    return _Found(square, None if projected is None else projected + add_rows(ids, h, table.size))


def _once(table: OneHot, basis: Basis) -> tuple[Tensor, Tensor]:
    """The ids `[n s]`, each once in an example, and their gradients `[n s I]` in the basis."""
    single = coalesce(table)
    return single.ids, project_inputs(single.g[:, None, :, :, None], basis)[:, 0, :, :, 0]


def _few_samples(term: Factored, basis: Basis) -> bool:
    """Whether adding up samples is less work than turning the sum of the gradients, into a basis or out of it."""
    return nominal(term.g.shape[0]) * term.g.shape[2] < sum(map(turns, basis))


def _by_pairs(term: Factored, basis: Basis, how: Contraction, total: bool) -> _Found:
    """`sum_n (sum_s g_s a_s)^2 = sum_n sum_st (g_s g_t) (a_s a_t)`, of a pair and its mirror one."""
    g, a = term.g, term.inputs
    s = g.shape[2]
    one, other = torch.triu_indices(s, s, device=g.device)
    twice = torch.where(one == other, 1, 2).to(g)[:, None]
    by_samples = total and _few_samples(term, basis) and not incomplete(basis)
    projected = square = None
    left = NOTHING
    for of_g, of_a in zip(split(g, how.block), split(a, how.block), strict=True):
        reflected_g, reflected_a = common_first(of_g, of_a)
        h, x = project_outputs(reflected_g, basis), project_inputs(reflected_a, basis)
        if incomplete(basis):
            left = added(left, sample_squares(reflected_g, reflected_a, h, x, basis))
        if by_samples:
            projected = plus(projected, add_up(h, x))
        pairs_h, pairs_x = h[:, :, one] * h[:, :, other] * twice, x[:, :, one] * x[:, :, other]
        square = plus(square, add_up(pairs_h, pairs_x))
    assert square is not None
    square = with_outside(square.clamp(min=0), left)  # where positions cancel: a rounding of their size, of either sign
    if by_samples or not total:
        return _Found(square, projected)
    of_G = gradient((term,))
    return _Found(square, into_basis(of_G, basis), of_G)


def _by_forming(term: Factored, basis: Basis, how: Contraction, total: bool) -> _Found:
    """The other sums come from that of G[n] as it is formed."""
    if how.operator:
        return _Found(*_formed_operator(*sums_arguments(term, basis, how), total))
    parts = _split_basis(term, basis, how)
    formed, square = _formed_squares(term, parts, how, total)
    if formed is None:
        return _Found(square)
    reordered = parts.patching is Patching.REORDERED and "a" in parts.late
    return _Found(square, into_basis(formed, parts.then), _turned_back(formed, term, parts.first, reordered))


def sums_arguments(term: Factored, basis: Basis, how: Contraction) -> tuple[Any, ...]:
    """The arguments of the operator but the last. Inputs that are no patches have an empty kernel."""
    parts = term.a.parts() if isinstance(term.a, Patches) else (term.a, [], [], [], None, False)
    return (term.g, *parts, *basis, how.order.name, how.block, how.part)


def _inputs(x: Tensor, kernel: list[int], *geometry: Any) -> Tensor | Patches:
    """The inputs that `sums_arguments` took apart."""
    return patches_of(x, kernel, *geometry) if kernel else x


@torch.library.custom_op("ekfac_func::formed_sums", mutates_args=())
def _formed_operator(
    g: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    last: float | None,
    apart: bool,
    Q_A: Tensor,
    Q_B: Tensor,
    order: str,
    block: int | None,
    part: int | None,
    total: bool,
) -> list[Tensor]:
    """The three of `_by_forming` where total, else the square alone; how an order multiplies depends on no costs."""
    term, basis = Factored(_inputs(x, kernel, stride, dilation, last, apart), g), Basis(Q_A, Q_B)
    how = contraction((term,), basis, Order[order])._replace(block=block, part=part)
    found = [t.contiguous() for t in _by_forming(term, basis, how, total) if t is not None]
    if total and found[1].data_ptr() == found[2].data_ptr():  # no two of an operator's results may share memory
        found[1] = found[1].clone()
    return found


@_formed_operator.register_fake
def _(g: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    *geometry, Q_A, Q_B, _, _, _, total = rest
    _, b, _, i, k = _inputs(x, *geometry).shape
    columns = (d if Q.shape[-1] == 1 else Q.shape[1:-2].numel() * Q.shape[-1] for d, Q in ((g.shape[3], Q_B), (i, Q_A)))
    square = g.new_empty(b, *columns, k)
    return [square, torch.empty_like(square), g.new_empty(b, g.shape[3], i, k)] if total else [square]


_formed_operator.register_vmap(one_by_one(_formed_operator))


def _formed_squares(term: Factored, parts: SplitBasis, how: Contraction, total: bool) -> tuple[Tensor | None, Tensor]:
    """The sum of G[n] as it is formed, if wanted, and the sum of its square in the basis and outside of it.

    Each product before G[n] reads the basis, so it takes as many examples at a time as memory allows. G[n] is formed of
    so few at a time that it stays in cache.
    """
    first, then = parts.first, parts.then
    of_G = incomplete(then) and not incomplete(first)  # else what lies outside is read from the samples
    entries = math.prod(term.g.shape[1:2] + term.g.shape[3:] + term.a.shape[3:])  # of G[n]
    convolved = parts.patching is Patching.CONVOLVED
    cached = convolved or entries * term.g.element_size() <= CACHE_BYTES
    formed, square, left = None, None, NOTHING
    of_gradients, of_inputs = Rooms(), Rooms()
    for g, a in zip(split(term.g, how.block), split(term.a, how.block), strict=True):
        h = project_outputs(g, first)
        if convolved:
            gradients: Iterable[Tensor] = [a.gradients(h)]
        else:
            x, of_samples = _turned_early(g, a, h, parts, of_inputs)
            left = added(left, of_samples)
            if total and not cached:  # G[n] is not read a second time
                formed = plus(formed, add_up(h, x))
            gradients = map(form, split(h, how.part), split(x, how.part), itertools.repeat(of_gradients))
            del x  # what is not read again is freed before more is written
        for G in gradients:
            if total and cached:
                formed = _add(formed, G)
            if of_G:
                G, *of_part = gradient_squares(G, then)
                left = added(left, of_part)
            else:
                for side in parts.late:
                    turn, Q = (turn_inputs, then.Q_A) if side == "a" else (turn_outputs, then.Q_B)
                    G = turn(G, Q, of_gradients)
            square = _add(square, G, squared=True)
        del h, gradients, G
    assert square is not None
    return formed, with_outside(square, left)


def _turned_early(g: Tensor, a: Tensor | Patches, h: Tensor, parts: SplitBasis, rooms: Rooms) -> tuple[Tensor, Outside]:
    """The inputs that G[n] is formed of, and the squares outside of the basis where an early side has a complement.

    h: g in the sides that are early.
    """
    if isinstance(a, Patches) and parts.patching is Patching.FILTERED:
        return filtered(a, parts.whole.Q_A[0], rooms), NOTHING
    reordered = parts.patching is Patching.REORDERED
    written = a if isinstance(a, Tensor) else a.write_fast(rooms) if reordered else a.write(rooms)
    x = written if "a" in parts.late else turn_inputs(written, parts.whole.Q_A, rooms)
    if not incomplete(parts.first):
        return x, NOTHING
    return x, sample_squares(g, written, project_outputs(h, parts.then), project_inputs(x, parts.then), parts.whole)


class Patching(enum.Enum):
    """What is done with inputs that are patches; others are `WRITTEN` as they are."""

    WRITTEN = "write them"
    REORDERED = "write them by `write_fast`, in an order of its own"
    FILTERED = "project them by minimal filtering"
    CONVOLVED = "form G[n] by a convolution"


class SplitBasis(NamedTuple):
    """A basis split into the sides that turn a and g before G[n] is formed, and those that turn G[n] itself."""

    first: Basis  # the former, and 1 in place of the others
    then: Basis  # the latter, and 1 in place of the others; its rows in the order of the patches as written
    late: list[str]  # the sides of `then`, "a" and "g", in the order in which they turn G[n]
    whole: Basis  # both sides, its rows in the order of the patches as written
    patching: Patching


def _split_basis(term: Factored, basis: Basis, how: Contraction) -> SplitBasis:
    first, late = early(how.order), [step.side for step in how.steps if step.side]
    patching, (Q_A, Q_B), one = _patching(term, basis, how), basis, term.g.new_ones(1, 1, 1)
    if patching is Patching.REORDERED and isinstance(term.a, Patches):
        order = term.a.inverse()
        Q_A = torch.index_select(Q_A, 1, order, out=scratch(Q_A.shape, Q_A)) if writable(Q_A) else Q_A[:, order]
    before = Basis(basis.Q_A if "a" in first else one, Q_B if "g" in first else one)
    then = Basis(one if "a" in first else Q_A, one if "g" in first else Q_B)
    return SplitBasis(before, then, late, Basis(Q_A, Q_B), patching)


def _patching(term: Factored, basis: Basis, how: Contraction) -> Patching:
    """The least work. The basis is copied for another order, which pays unless it has far more entries than patches."""
    a, projected = term.a, "a" in early(how.order)
    if not isinstance(a, Patches):
        return Patching.WRITTEN
    if not torch.compiler.is_compiling() and convolves(term, basis, how.order):
        return Patching.CONVOLVED
    if projected and writable(term.g, a.x) and filters_inputs(term, basis, split(a, how.block)[0].shape[0]):
        return Patching.FILTERED
    few = 2 * nominal(a.shape[0]) * a.shape[2] < a.shape[3]
    as_it_is = a.apart or not is_matrix(basis.Q_A) or (projected and few)
    return Patching.WRITTEN if as_it_is else Patching.REORDERED


def _add(sum: Tensor | None, G: Tensor, squared: bool = False) -> Tensor:
    """A sum over examples, plus that of a block G `[n b o i k]` or of its square."""
    if transformed() or G.device.type != "cpu":
        return plus(sum, _sum_of_squares(G) if squared else G.sum(0))
    if math.prod(G.shape[1:]) < FEW_ENTRIES:
        return plus(sum, (G.square() if squared else G).sum(0))  # torch adds these up in pairs, which keeps digits
    if sum is None:
        sum = torch.zeros_like(G[0])
    for of_one in G:  # one pass each, where a sum over a short leading axis is slow
        sum = sum.addcmul_(of_one, of_one) if squared else sum.add_(of_one)
    return sum


def _sum_of_squares(G: Tensor) -> Tensor:
    """Over the examples; outside of graphs in one pass that writes no square."""
    return G.square().sum(0) if torch.compiler.is_compiling() else torch.linalg.vector_norm(G, dim=0).square()


def _turned_back(total: Tensor, term: Factored, first: Basis, reordered: bool = False) -> Tensor:
    """The sum of the gradients: from the total in the sides of first, or from the term where that is less work.

    reordered: whether the total's inputs are in the order of `write_fast`.
    """
    if incomplete(first) or _few_samples(term, first):
        return gradient((term,))
    b, _, i, k = term.a.shape[1:]
    total = out_of_basis(total, first, (b, term.g.shape[3], i, k))
    return total[:, :, term.a.order()] if reordered and isinstance(term.a, Patches) else total


def _dense_squares(G: Tensor, basis: Basis, how: Contraction) -> Tensor:
    """The sum of the squares of G in the basis and outside of it, some examples at a time."""
    square, left = None, NOTHING
    for block in split(G, how.block):
        if incomplete(basis):
            inside, *of_block = gradient_squares(block, basis)
            left = added(left, of_block)
        else:
            inside = into_basis(block, basis)
        square = _add(square, inside, squared=True)
    assert square is not None
    return with_outside(square, left)
