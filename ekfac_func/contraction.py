"""The sums that make the second moment, in the order that `orders.py` finds the cheapest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import kernels
from .kronecker import (
    CACHE_BYTES,
    NOMINAL_N,
    add_rows,
    add_up,
    coalesce,
    form,
    gradient,
    into_basis,
    look_up,
    out_of_basis,
    project_inputs,
    project_outputs,
    split,
    turn_inputs,
    turn_outputs,
)
from .orders import FORMED, Contraction, Order, Step, contraction
from .patches import Patches
from .subspace import incomplete, outside_squares, single_sums
from .types import Basis, Dense, Factored, OneHot, Sums, Terms


def exact_sums(terms: Terms, basis: Basis, how: Contraction | None = None) -> Sums:
    """Sums over the examples of G, of G in the basis, and of its square, `[b o i k]` each; by default the cheapest."""
    how = contraction(terms, basis) if how is None else how
    if not incomplete(basis):
        return _inside_sums(terms, basis, how)
    match terms:
        case (Factored() as term,) if how.order is Order.ONE_POSITION:
            return Sums(gradient(terms), *single_sums(term.g, term.inputs, basis))
    total, projected, square = _inside_sums(terms, basis, how)
    assert square is not None
    return Sums(total, projected, square + outside_squares(terms, basis))


def _inside_sums(terms: Terms, basis: Basis, how: Contraction) -> Sums:
    match terms:
        case (OneHot() as table,):
            return Sums(gradient(terms), *_table_sums(table, basis))
        case (Factored() as factored, OneHot() as table):
            return Sums(gradient(terms), *_tied_sums(factored, table, basis, how))
        case (Factored() as term,) if how.order is Order.ONE_POSITION:
            a, g = project_inputs(term.inputs, basis), project_outputs(term.g, basis)
            return Sums(gradient(terms), add_up(g, a), _single_squares(g, a))
        case (Factored() as term,) if how.order is Order.KERNEL:
            projected, square = _kernel_sums(term, basis)
            return Sums(_turned_back(projected, term, basis), projected, square)
        case (Factored() as term,) if how.order in FORMED:
            in_basis, square = _formed_sums(term, basis, how)
            assert in_basis is not None
            return Sums(_turned_back(in_basis, term, basis), in_basis, square)
    total = gradient(terms)
    return Sums(total, into_basis(total, basis), _inside_squares(terms, basis, how))


def exact_squares(terms: Terms, basis: Basis, how: Contraction | None = None) -> Tensor:
    """The sum over the examples of the square of G in the basis, `[b O I k]`: that of `exact_sums`, by itself."""
    how = contraction(terms, basis) if how is None else how
    if not incomplete(basis):
        return _inside_squares(terms, basis, how)
    match terms:
        case (Factored() as term,) if how.order is Order.ONE_POSITION:
            return single_sums(term.g, term.inputs, basis)[1]
    return _inside_squares(terms, basis, how) + outside_squares(terms, basis)


def _inside_squares(terms: Terms, basis: Basis, how: Contraction) -> Tensor:
    match terms:
        case (OneHot() as table,):
            return _table_sums(table, basis)[1]
        case (Factored() as factored, OneHot() as table):
            return _tied_sums(factored, table, basis, how)[1]
        case (Factored() as term,):
            match how.order:
                case Order.ONE_POSITION:
                    return _single_squares(project_outputs(term.g, basis), project_inputs(term.inputs, basis))
                case Order.KERNEL:
                    return _kernel_sums(term, basis)[1]
                case Order.PAIRS:
                    return _pair_squares(term, basis, how)
            return _formed_sums(term, basis, how, total=False)[1]
        case (Dense(G),):
            return _dense_squares(G, basis, how)
    raise AssertionError(f"no contraction for {[type(term).__name__ for term in terms]}")


def _kernel_sums(term: Factored, basis: Basis) -> tuple[Tensor, Tensor]:
    return kernels.projected_sums(project_outputs(term.g, basis), project_inputs(term.inputs, basis))


def _single_squares(g: Tensor, a: Tensor) -> Tensor:
    """Of one position the square factors."""
    return add_up(g.square(), a.square())


def mean_sums(sums: Sums, n: int) -> Sums:
    """The one division of the sums over examples."""
    return Sums(sums.gradient / n, sums.projected / n, None if sums.square is None else sums.square / n)


def gradient_sums(terms: Terms, basis: Basis, how: Contraction | None = None) -> Sums:
    """Sums over the examples of G and of G in the basis, `[b o i k]` each; no moment."""
    total = gradient(terms)
    return Sums(total, into_basis(total, basis), None)


def _table_sums(table: OneHot, basis: Basis) -> tuple[Tensor, Tensor]:
    ids, h = _once(table, basis)
    return add_rows(ids, h, table.size), add_rows(ids, h.square(), table.size)


def _tied_sums(factored: Factored, table: OneHot, basis: Basis, how: Contraction) -> tuple[Tensor, Tensor]:
    """A table that is a linear layer too: `sum (F + T)^2`, of which T and the product have a row an id."""
    projected, square = _inside_sums((factored,), basis, how)[1:]
    assert square is not None
    ids, h = _once(table, basis)
    turned = Factored(project_inputs(factored.inputs, basis), factored.g)
    cross = 2 * look_up(turned, ids) * h
    return projected + add_rows(ids, h, table.size), square + add_rows(ids, h.square() + cross, table.size)


def _once(table: OneHot, basis: Basis) -> tuple[Tensor, Tensor]:
    """Ids `[n s]`, each once an example, and their gradients `[n s I]` in the basis."""
    single = coalesce(table)
    return single.ids, project_inputs(single.g[:, None, :, :, None], basis)[:, 0, :, :, 0]


def _pair_squares(term: Factored, basis: Basis, how: Contraction) -> Tensor:
    """`sum_n (sum_s g_s a_s)^2 = sum_n sum_st (g_s g_t) (a_s a_t)`, of a pair and its mirror one."""
    g, a = term.g, term.inputs
    s = g.shape[2]
    one, other = torch.triu_indices(s, s, device=g.device)
    twice = torch.where(one == other, 1, 2).to(g)[:, None]
    square = None
    for of_g, of_a in zip(split(g, how.blocks), split(a, how.blocks), strict=True):
        h, x = project_outputs(of_g, basis), project_inputs(of_a, basis)
        pairs_h, pairs_x = h[:, :, one] * h[:, :, other] * twice, x[:, :, one] * x[:, :, other]
        of_block = add_up(pairs_h, pairs_x)
        square = of_block if square is None else square + of_block
    assert square is not None
    return square


def _formed_sums(term: Factored, basis: Basis, how: Contraction, total: bool = True) -> tuple[Tensor | None, Tensor]:
    """The sums of G in the basis, if wanted, and of its square.

    What comes before G[n] is one product for as many examples as memory allows, for each reads the basis; gradients are
    formed of so few that they stay in cache.
    """
    g, a = term.g, term.a
    early, late = _halves(how.steps)
    basis, write = _patches_in(a, basis, "project a" in early)
    of_G = math.prod(g.shape[1:2] + g.shape[3:] + a.shape[3:])
    apart = not late and of_G * g.element_size() > CACHE_BYTES  # then G is not read again for its sum
    in_basis, square = None, None
    for of_g, of_a in zip(split(g, how.blocks), split(a, how.blocks), strict=True):
        h = project_outputs(of_g, basis) if "project g" in early else of_g
        x = write(of_a) if isinstance(of_a, Patches) else of_a
        x = project_inputs(x, basis) if "project a" in early else x
        if total and apart:
            of_block = add_up(h, x)
            in_basis = of_block if in_basis is None else in_basis + of_block
        for few_h, few_x in zip(split(h, how.parts), split(x, how.parts), strict=True):
            G = form(few_h, few_x)
            for name in late:
                G = turn_inputs(G, basis.Q_A) if name == "project G[n] Q_A" else turn_outputs(G, basis.Q_B)
            if total and not apart:
                in_basis = _add(in_basis, G)
            square = _add(square, G, squared=True)
    assert square is not None
    return in_basis, square


def _halves(steps: Sequence[Step]) -> tuple[list[str], list[str]]:
    """The names of the products before G[n] is formed, and of those after."""
    names = [step.name for step in steps]
    return names[: names.index("form G[n]")], [name for name in names if name.startswith("project G[n]")]


def _patches_in(a: Tensor | Patches, basis: Basis, projected: bool) -> tuple[Basis, Callable[[Patches], Tensor]]:
    """How to write patches, and a basis in their order: the fast one, unless the basis has more entries than they."""
    many = NOMINAL_N * a.shape[2] >= a.shape[3]
    whole = isinstance(basis.Q_A, Tensor) and basis.Q_A.dim() == 3
    if not isinstance(a, Patches) or a.apart or not whole or (projected and not many):
        return basis, Patches.write
    return basis._replace(Q_A=basis.Q_A[:, a.inverse()]), Patches.write_fast


def _add(sum: Tensor | None, G: Tensor, squared: bool = False) -> Tensor:
    """The sum over examples of G or of its square, with that of a block `[n b o i k]`."""
    if torch.compiler.is_compiling() or G.device.type != "cpu":
        of_block = (G.square() if squared else G).sum(0)
        return of_block if sum is None else sum + of_block
    if sum is None:
        sum = torch.zeros_like(G[0])
    for of_one in G:  # one pass each, where a sum over a short leading axis is slow
        sum = sum.addcmul_(of_one, of_one) if squared else sum.add_(of_one)
    return sum


def _turned_back(projected: Tensor, term: Factored, basis: Basis) -> Tensor:
    """The sum of the gradients from what it is in the basis, where that is less work than from the term."""
    s, i = term.a.shape[2:4]
    o = term.g.shape[3]
    whole = all(Q.shape[-1] == Q.shape[-2] for Q in basis)
    if not whole or o + i > NOMINAL_N * s:
        return gradient((term,))
    return out_of_basis(projected, basis, (term.g.shape[1], o, i, term.a.shape[4]))


def _dense_squares(G: Tensor, basis: Basis, how: Contraction) -> Tensor:
    """The sum of the squares of G in the basis, some examples at a time."""
    square = None
    for block in split(G, how.blocks):
        square = _add(square, into_basis(block, basis), squared=True)
    assert square is not None
    return square
