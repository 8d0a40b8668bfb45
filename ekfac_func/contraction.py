"""How the second moment is summed at the least cost.

Orders of `sum_n (Q_B^T G[n] Q_A)^2` for one layer, all exact:

| order | operations | extra memory |
|---|---|---|
| one position, so that the square factors | 2n(o^2 + i^2) + 4noi | none |
| project, then form G[n] | 2ns(o^2 + i^2) + 2nsoi | n o i |
| form G[n], then project | 2nsoi + 2n(o i^2 + o^2 i) | n o i |
| pairs of positions | 2ns(o^2 + i^2) + ns(s+1)oi | ns(s+1)(o + i)/2 |

`opt_einsum` finds the second and third, and those between, from the sizes; memory traffic decides the fourth; blocks of
examples bound the extra memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import opt_einsum
import torch
from torch import Tensor

from . import kernels
from .kronecker import (
    CACHE_BYTES,
    NOMINAL_N,
    add_rows,
    block_count,
    coalesce,
    form,
    gradient,
    in_blocks,
    into_basis,
    look_up,
    out_of_basis,
    project_inputs,
    project_outputs,
    turn_inputs,
    turn_outputs,
)
from .patches import Patches
from .subspace import incomplete, outside_squares, single_sums
from .types import Basis, Dense, Factored, OneHot, Sums, Terms

MAX_PAIRED = 12  # positions; more pairs are more arithmetic than the memory traffic that they save


def exact_sums(terms: Terms, basis: Basis) -> Sums:
    """Sums over the examples of G, of G in the basis, and of its square, `[b o i k]` each."""
    if not incomplete(basis):
        return _inside_sums(terms, basis)
    match terms:
        case (Factored() as term,) if term.g.shape[2] == 1:
            return Sums(gradient(terms), *single_sums(term.g, term.inputs, basis))
    total, projected, square = _inside_sums(terms, basis)
    assert square is not None
    return Sums(total, projected, square + outside_squares(terms, basis))


def _inside_sums(terms: Terms, basis: Basis) -> Sums:
    match terms:
        case (OneHot() as table,):
            return Sums(gradient(terms), *_table_sums(table, basis))
        case (Factored() as factored, OneHot() as table):
            return Sums(gradient(terms), *_tied_sums(factored, table, basis))
        case (Factored() as term,) if term.g.shape[2] == 1:
            a, g = project_inputs(term.inputs, basis), project_outputs(term.g, basis)
            projected = torch.einsum("nbso,nbsik->boik", g, a)
            return Sums(gradient(terms), projected, _single_squares(g, a))
        case (Factored(Tensor() as a, g) as term,) if kernels.takes(g, a, basis):
            projected, square = kernels.projected_sums(project_outputs(g, basis), project_inputs(a, basis))
            return Sums(_turned_back(projected, term, basis), projected, square)
        case (Factored() as term,) if not _by_pairs(term):
            in_basis, square = _formed_sums(term, basis)
            assert in_basis is not None
            return Sums(_turned_back(in_basis, term, basis), in_basis, square)
    total = gradient(terms)
    return Sums(total, into_basis(total, basis), _inside_squares(terms, basis))


def exact_squares(terms: Terms, basis: Basis) -> Tensor:
    """The sum over the examples of the square of G in the basis, `[b O I k]`: that of `exact_sums`, by itself."""
    if not incomplete(basis):
        return _inside_squares(terms, basis)
    match terms:
        case (Factored() as term,) if term.g.shape[2] == 1:
            return single_sums(term.g, term.inputs, basis)[1]
    return _inside_squares(terms, basis) + outside_squares(terms, basis)


def _inside_squares(terms: Terms, basis: Basis) -> Tensor:
    match terms:
        case (OneHot() as table,):
            return _table_sums(table, basis)[1]
        case (Factored() as factored, OneHot() as table):
            return _tied_sums(factored, table, basis)[1]
        case (Factored() as term,) if term.g.shape[2] == 1:
            return _single_squares(project_outputs(term.g, basis), project_inputs(term.inputs, basis))
        case (Factored(Tensor() as a, g),) if kernels.takes(g, a, basis):
            return kernels.projected_sums(project_outputs(g, basis), project_inputs(a, basis))[1]
        case (Factored() as term,):
            return _pair_squares(term, basis) if _by_pairs(term) else _formed_sums(term, basis, total=False)[1]
        case (Dense(G),):
            return _dense_squares(G, basis)
    raise AssertionError(f"no contraction for {[type(term).__name__ for term in terms]}")


def _single_squares(g: Tensor, a: Tensor) -> Tensor:
    """Of one position the square factors."""
    return torch.einsum("nbso,nbsik->boik", g.square(), a.square())


def mean_sums(sums: Sums, n: int) -> Sums:
    """The one division of the sums over examples."""
    return Sums(sums.gradient / n, sums.projected / n, None if sums.square is None else sums.square / n)


class Contraction(NamedTuple):
    """How `exact_sums` sums the second moment of one layer."""

    order: str
    operations: int  # floating-point, leading terms, of the whole batch
    blocks: int  # parts in which the examples are taken, so that no more than MAX_BYTES of gradients exist at a time


def contraction(terms: Terms, basis: Basis) -> Contraction:
    """What `exact_sums` will do with terms, from their shapes."""
    turned_A, turned_B = (Q.shape[-1] if Q.shape[-1] > 1 else 0 for Q in basis)
    match terms:
        case (OneHot(ids, _, g),):
            return Contraction("add up ids, project, add rows", 2 * ids.numel() * g.shape[2] * (turned_A + 2), 1)
        case (Factored(a, g) as factored, OneHot(ids, _, h)):
            order, operations, blocks = contraction((factored,), basis)
            cross = 2 * ids.numel() * h.shape[2] * (a.shape[2] + turned_A + 3)
            return Contraction(f"{order}; ids and their product with it", operations + cross, blocks)
        case (Factored(a, g),) if g.shape[2] == 1:
            n, b, _, i, k = a.shape
            o = g.shape[3]
            operations = 2 * n * b * (i * k * turned_A + o * turned_B) + 4 * n * b * o * i * k
            return Contraction("project a and g, multiply the squares", operations, 1)
        case (Factored(Tensor() as a, g),) if kernels.takes(g, a, basis):
            n, b, s, i, k = a.shape
            o = g.shape[3]
            operations = 2 * n * b * s * (i * k * turned_A + o * turned_B + o * i * k)
            return Contraction("project a and g, sum G[n] and its square in the GPU kernel", operations, 1)
        case (Factored(a, g) as factored,):
            n, b, s, i, k = a.shape
            o = g.shape[3]
            if _by_pairs(factored):
                operations = n * b * s * (2 * i * k * turned_A + 2 * o * turned_B + (s + 1) * o * i * k)
                return Contraction("project a and g, multiply pairs of positions", operations, 1)
            steps = _steps(g.shape, a.shape, basis)
            operations = sum(step.operations for step in steps) * n // NOMINAL_N
            entries, cached = _entries(factored, any(step.name == "project a" for step in steps))
            return Contraction(", ".join(step.name for step in steps), operations, block_count(g, entries, cached))
        case (Dense(G),):
            return Contraction(
                "project G[n]", 2 * G.numel() * (turned_A + turned_B + 1), block_count(G, G.shape[1:].numel())
            )
    raise AssertionError(f"no contraction for {[type(term).__name__ for term in terms]}")


def gradient_sums(terms: Terms, basis: Basis) -> Sums:
    """Sums over the examples of G and of G in the basis, `[b o i k]` each; no moment."""
    total = gradient(terms)
    return Sums(total, into_basis(total, basis), None)


def _table_sums(table: OneHot, basis: Basis) -> tuple[Tensor, Tensor]:
    ids, h = _once(table, basis)
    return add_rows(ids, h, table.size), add_rows(ids, h.square(), table.size)


def _tied_sums(factored: Factored, table: OneHot, basis: Basis) -> tuple[Tensor, Tensor]:
    """A table that is a linear layer too: `sum (F + T)^2`, of which T and the product have a row an id."""
    projected, square = _inside_sums((factored,), basis)[1:]
    assert square is not None
    ids, h = _once(table, basis)
    turned = Factored(project_inputs(factored.inputs, basis), factored.g)
    cross = 2 * look_up(turned, ids) * h
    return projected + add_rows(ids, h, table.size), square + add_rows(ids, h.square() + cross, table.size)


def _once(table: OneHot, basis: Basis) -> tuple[Tensor, Tensor]:
    """Ids `[n s]`, each once an example, and their gradients `[n s I]` in the basis."""
    single = coalesce(table)
    return single.ids, project_inputs(single.g[:, None, :, :, None], basis)[:, 0, :, :, 0]


def _by_pairs(term: Factored) -> bool:
    """Whether pairs of positions are summed faster than gradients are written to memory and read again."""
    s, i, k = term.a.shape[2:]
    o = term.g.shape[3]
    return s <= MAX_PAIRED and s * (s + 1) // 2 * (o + i * k) <= o * i * k


def _pair_squares(term: Factored, basis: Basis) -> Tensor:
    """`sum_n (sum_s g_s a_s)^2 = sum_n sum_st (g_s g_t) (a_s a_t)`, of a pair and its mirror one."""
    g, a = term.g, term.inputs
    s = g.shape[2]
    one, other = torch.triu_indices(s, s, device=g.device)
    twice = torch.where(one == other, 1, 2).to(g)[:, None]
    entries = max(1, s * (s + 1) // 2 * (g.shape[3] + a.shape[3] * a.shape[4]) * g.shape[1])
    square = None
    for of_g, of_a in zip(in_blocks(g, entries), in_blocks(a, entries), strict=True):
        h, x = project_outputs(of_g, basis), project_inputs(of_a, basis)
        pairs_h, pairs_x = h[:, :, one] * h[:, :, other] * twice, x[:, :, one] * x[:, :, other]
        of_block = torch.einsum("nbso,nbsik->boik", pairs_h, pairs_x)
        square = of_block if square is None else square + of_block
    assert square is not None
    return square


def _formed_sums(term: Factored, basis: Basis, total: bool = True) -> tuple[Tensor | None, Tensor]:
    """The sums of G in the basis, if wanted, and of its square.

    What comes before G[n] is one product for as many examples as memory allows, for each reads the basis; gradients are
    formed of so few that they stay in cache.
    """
    g, a = term.g, term.a
    early, late = _halves(_steps(g.shape, a.shape, basis))
    basis, write = _patches_in(a, basis, "project a" in early)
    of_G = math.prod(g.shape[1:2] + g.shape[3:] + a.shape[3:])
    apart = not late and of_G * g.element_size() > CACHE_BYTES  # then G is not read again for its sum
    entries, cached = _entries(term, "project a" in early)
    in_basis, square = None, None
    for of_g, of_a in zip(in_blocks(g, entries, cached), in_blocks(a, entries, cached), strict=True):
        h = project_outputs(of_g, basis) if "project g" in early else of_g
        x = write(of_a) if isinstance(of_a, Patches) else of_a
        x = project_inputs(x, basis) if "project a" in early else x
        if total and apart:
            of_block = torch.einsum("nbso,nbsik->boik", h, x)
            in_basis = of_block if in_basis is None else in_basis + of_block
        whole = torch.compiler.is_compiling()  # its blocks are those of memory already
        for few_h, few_x in [(h, x)] if whole else zip(in_blocks(h, of_G), in_blocks(x, of_G), strict=True):
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
    at = names.index("form G[n]")
    return names[:at], names[at + 1 :]


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


def _dense_squares(G: Tensor, basis: Basis) -> Tensor:
    """The sum of the squares of G in the basis, some examples at a time."""
    square = None
    for block in in_blocks(G, G.shape[1:].numel()):
        square = _add(square, into_basis(block, basis), squared=True)
    assert square is not None
    return square


def _entries(term: Factored, projected: bool) -> tuple[int, bool]:
    """Entries of what is written of one example before its square is summed, and whether it is to stay in cache.

    Where inputs are projected first it is not, and gradients come later, of fewer examples.
    """
    _, b, s, i, k = term.a.shape
    o, written = term.g.shape[3], isinstance(term.a, Patches)
    if projected and not torch.compiler.is_compiling():
        return b * s * (i * k * (1 + written) + o), False
    return b * i * k * (o + s * written), not projected


class Step(NamedTuple):
    """One product."""

    name: str
    operations: int


def _steps(g: Sequence[int], a: Sequence[int], basis: Basis) -> tuple[Step, ...]:
    """The products that make `Q_B^T G[n] Q_A` of output gradients and inputs of these shapes."""
    full_A, full_B = (Q.dim() == 3 and Q.shape[-1] == Q.shape[-2] > 1 for Q in basis)
    early = [Step("project a", 0)] * (not full_A) + [Step("project g", 0)] * (not full_B)  # as they cost little
    return (*early, *_path((NOMINAL_N, *a[1:3], g[3], *a[3:]), full_A, full_B))


@torch.compiler.assume_constant_result
def _path(sizes: tuple[int, ...], full_A: bool, full_B: bool) -> tuple[Step, ...]:
    return _cheapest(sizes, full_A, full_B)


@functools.lru_cache
def _cheapest(sizes: tuple[int, ...], full_A: bool, full_B: bool) -> tuple[Step, ...]:
    """The order that `opt_einsum` finds for the product of g and a with the full sides of the basis."""
    size = dict(zip("nbsoik", sizes, strict=True))
    size |= {"O": size["o"], "I": size["i"]}
    parts = ["nbso", "nbsik", *["boO"] * full_B, *["biI"] * full_A]
    equation = f"{','.join(parts)}->nb{'O' if full_B else 'o'}{'I' if full_A else 'i'}k"
    shapes = [tuple(size[letter] for letter in part) for part in parts]
    _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    names = ["g", "a", *["Q_B"] * full_B, *["Q_A"] * full_A]
    steps = []
    for contracted in info.contraction_list:
        pair = {names.pop(at) for at in sorted(contracted[0], reverse=True)}
        letters = set(contracted[2]) & size.keys()
        operations = 2 * math.prod(size[letter] for letter in letters)
        made = next((x for x in ("g", "a") if x in pair and pair & {"Q_A", "Q_B"}), "G[n]")
        names.append(made)
        if pair == {"g", "a"}:
            steps.append(Step("form G[n]", operations))
        else:
            (side,) = pair & {"Q_A", "Q_B"}
            steps.append(Step(f"project {made}" + f" {side}" * (made == "G[n]"), operations))
    return tuple(steps)
