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

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import opt_einsum
import torch
from torch import Tensor

from . import kernels
from .kronecker import (
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
            projected, square = _formed_sums(term, basis)
            return Sums(_turned_back(projected, term, basis), projected, square)
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
            return _pair_squares(term, basis) if _by_pairs(term) else _formed_sums(term, basis)[1]
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
            return Contraction(", ".join(step.name for step in steps), operations, block_count(g, _entries(factored)))
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


def _formed_sums(term: Factored, basis: Basis) -> tuple[Tensor, Tensor]:
    """The sums of G in the basis and of its square, some examples at a time."""
    g, a = term.g, term.a
    if isinstance(a, Patches) and not a.apart and basis.Q_A.dim() == 3:
        basis, write = basis._replace(Q_A=basis.Q_A[:, a.inverse()]), Patches.write_fast
    else:
        write = Patches.write
    entries, sums = _entries(term), None
    for of_g, of_a in zip(in_blocks(g, entries), in_blocks(a, entries), strict=True):
        sums = _added(sums, _contract(of_g, write(of_a) if isinstance(of_a, Patches) else of_a, basis))
    assert sums is not None
    return sums


def _added(sums: tuple[Tensor, Tensor] | None, G: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over examples of G and of its square, with those of a block `[n b o i k]`."""
    if torch.compiler.is_compiling() or G.device.type != "cpu":
        total, square = G.sum(0), G.square().sum(0)
        return (total, square) if sums is None else (sums[0] + total, sums[1] + square)
    total, square = (torch.zeros_like(G[0]) for _ in range(2)) if sums is None else sums
    for of_one in G:  # one pass each, where a sum over a short leading axis is slow
        total.add_(of_one)
        square.addcmul_(of_one, of_one)
    return total, square


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
    sums = None
    for block in in_blocks(G, G.shape[1:].numel()):
        sums = _added(sums, into_basis(block, basis))
    assert sums is not None
    return sums[1]


def _entries(term: Factored) -> int:
    """Entries of what is written of one example: its gradient, and its patches where they are unwritten."""
    _, b, s, i, k = term.a.shape
    return b * i * k * (term.g.shape[3] + (s if isinstance(term.a, Patches) else 0))


def _contract(g: Tensor, a: Tensor, basis: Basis) -> Tensor:
    """`Q_B^T G[n] Q_A`, `[n b O I k]`, in the cheapest order."""
    G = g  # overwritten by the step that forms it
    for step in _steps(g.shape, a.shape, basis):
        match step.name:
            case "project g":
                g = project_outputs(g, basis)
            case "project a":
                a = project_inputs(a, basis)
            case "form G[n]":
                G = form(g, a)
            case "project G[n] Q_A":
                G = turn_inputs(G, basis.Q_A)
            case "project G[n] Q_B":
                G = turn_outputs(G, basis.Q_B)
    return G


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
