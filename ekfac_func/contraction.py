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
from typing import NamedTuple

import opt_einsum
import torch
from torch import Tensor

from . import kernels
from .kronecker import (
    add_rows,
    coalesce,
    gradient,
    into_basis,
    look_up,
    out_of_basis,
    project_inputs,
    project_outputs,
)
from .types import Basis, Dense, Factored, OneHot, Sums, Terms

NOMINAL_N = 256  # a plan that read a traced batch size would cost a graph for each
MAX_BYTES = 64 * 2**20  # of the per-example gradients that exist at a time
CACHE_BYTES = 2 * 2**20  # of them on a CPU, in eager mode: what is not written to memory and read again
MAX_PAIRED = 12  # positions; more pairs are more arithmetic than the memory traffic that they save


def exact_sums(terms: Terms, basis: Basis) -> Sums:
    """Sums over the examples of G, of G in the basis, and of its square, `[b o i k]` each."""
    match terms:
        case (OneHot() as table,):
            return Sums(gradient(terms), *_table_sums(table, basis))
        case (Factored() as factored, OneHot() as table):
            return Sums(gradient(terms), *_tied_sums(factored, table, basis))
        case (Factored(a, g),) if g.shape[2] == 1:
            a, g = project_inputs(a, basis), project_outputs(g, basis)
            projected = torch.einsum("nbso,nbsik->boik", g, a)
            square = torch.einsum("nbso,nbsik->boik", g.square(), a.square())
            return Sums(gradient(terms), projected, square)
        case (Factored(a, g),) if kernels.takes(g, a, basis):
            projected, square = kernels.projected_sums(project_outputs(g, basis), project_inputs(a, basis))
            sizes = (g.shape[1], g.shape[3], *a.shape[3:])
            return Sums(out_of_basis(projected, basis, sizes), projected, square)
        case (Factored(a, g),):
            total = gradient(terms)
            return Sums(total, into_basis(total, basis), _factored_square(g, a, basis))
        case (Dense(G),):
            total = gradient(terms)
            return Sums(total, into_basis(total, basis), _sum_squares((G,), basis))
    raise AssertionError(f"no contraction for {[type(term).__name__ for term in terms]}")


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
        case (Factored(a, g),) if kernels.takes(g, a, basis):
            n, b, s, i, k = a.shape
            o = g.shape[3]
            operations = 2 * n * b * s * (i * k * turned_A + o * turned_B + o * i * k)
            return Contraction("project a and g, sum G[n] and its square in the GPU kernel", operations, 1)
        case (Factored(a, g),):
            n, b, s, i, k = a.shape
            o = g.shape[3]
            if _by_pairs(g, a):
                operations = n * b * s * (2 * i * k * turned_A + 2 * o * turned_B + (s + 1) * o * i * k)
                return Contraction("project a and g, multiply pairs of positions", operations, 1)
            steps = _path(*_product(g, a, basis)[1:])
            operations = sum(step.operations for step in steps) * n // NOMINAL_N
            return Contraction(", ".join(step.name for step in steps), operations, _block_count(g, _entries((g, a))))
        case (Dense(G),):
            return Contraction(
                "project G[n]", 2 * G.numel() * (turned_A + turned_B + 1), _block_count(G, _entries((G,)))
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
    projected = into_basis(gradient((factored,)), basis)
    square = _factored_square(factored.g, factored.a, basis)
    ids, h = _once(table, basis)
    cross = 2 * look_up(Factored(project_inputs(factored.a, basis), factored.g), ids) * h
    return projected + add_rows(ids, h, table.size), square + add_rows(ids, h.square() + cross, table.size)


def _once(table: OneHot, basis: Basis) -> tuple[Tensor, Tensor]:
    """Ids `[n s]`, each once an example, and their gradients `[n s I]` in the basis."""
    single = coalesce(table)
    return single.ids, project_inputs(single.g[:, None, :, :, None], basis)[:, 0, :, :, 0]


def _factored_square(g: Tensor, a: Tensor, basis: Basis) -> Tensor:
    return _pair_squares(g, a, basis) if _by_pairs(g, a) else _sum_squares((g, a), basis)


def _by_pairs(g: Tensor, a: Tensor) -> bool:
    """Whether pairs of positions are summed faster than gradients are written to memory and read again."""
    s, o, i = g.shape[2], g.shape[3], a.shape[3] * a.shape[4]
    return s <= MAX_PAIRED and s * (s + 1) // 2 * (o + i) <= o * i


def _pair_squares(g: Tensor, a: Tensor, basis: Basis) -> Tensor:
    """`sum_n (sum_s g_s a_s)^2 = sum_n sum_st (g_s g_t) (a_s a_t)`, of a pair and its mirror one."""
    s = g.shape[2]
    one, other = torch.triu_indices(s, s, device=g.device)
    twice = torch.where(one == other, 1, 2).to(g)[:, None]
    size = max(1, s * (s + 1) // 2 * (g.shape[3] + a.shape[3] * a.shape[4]) * g.shape[1])
    square = None
    for of_g, of_a in zip(*(_split(t, _block_count(t, size)) for t in (g, a)), strict=True):
        h, x = project_outputs(of_g, basis), project_inputs(of_a, basis)
        pairs_h, pairs_x = h[:, :, one] * h[:, :, other] * twice, x[:, :, one] * x[:, :, other]
        of_block = torch.einsum("nbso,nbsik->boik", pairs_h, pairs_x)
        square = of_block if square is None else square + of_block
    assert square is not None
    return square


def _sum_squares(tensors: tuple[Tensor, ...], basis: Basis) -> Tensor:
    """The sum of the squares of G in the basis, of (g, a) or of (G,), some examples at a time."""
    square = None
    for block in zip(*(_split(t, _block_count(t, _entries(tensors))) for t in tensors), strict=True):
        G = into_basis(block[0], basis) if len(block) == 1 else _contract(block[0], block[1], basis)
        of_block = G.square().sum(0)
        square = of_block if square is None else square + of_block
    assert square is not None
    return square


def _entries(tensors: tuple[Tensor, ...]) -> int:
    """Entries of the gradient of one example, of (g, a) or of (G,)."""
    if len(tensors) == 1:
        return tensors[0].shape[1:].numel()
    g, a = tensors
    return g.shape[1] * g.shape[3] * a.shape[3] * a.shape[4]


def _block_count(t: Tensor, entries: int) -> int:
    """Into how many blocks examples are split that need so many entries each."""
    if torch.compiler.is_compiling():
        n, most = NOMINAL_N, MAX_BYTES
    else:
        n, most = t.shape[0], min(MAX_BYTES, CACHE_BYTES) if t.device.type == "cpu" else MAX_BYTES
    return min(n, max(1, -(-n * entries * t.element_size() // most)))


def _split(t: Tensor, count: int) -> tuple[Tensor, ...]:
    """Blocks of examples; in a graph filled up with zero ones, since blocks of the traced batch's size would fix it."""
    if count == 1 or not torch.compiler.is_compiling():
        return t.tensor_split(count)
    n = t.shape[0]
    size = n // count + 2  # two more than needed, for a size of 0 or 1 would be a graph of its own
    return torch.cat([t, t.new_zeros(count * size - n, *t.shape[1:])]).reshape(count, size, *t.shape[1:]).unbind()


def _contract(g: Tensor, a: Tensor, basis: Basis) -> Tensor:
    """`Q_B^T G[n] Q_A`, `[n b O I k]`, pair by pair in the cheapest order."""
    operands, equation, sizes = _product(g, a, basis)
    for step in _path(equation, sizes):
        operands.append(torch.einsum(step.equation, *(operands.pop(index) for index in step.pair)))
    return operands[0]


def _product(g: Tensor, a: Tensor, basis: Basis) -> tuple[list[Tensor], str, tuple[int, ...]]:
    """The product of both with the full sides of the basis: operands, equation, and the sizes of n b s o i k."""
    full_A, full_B = (Q.dim() == 3 and Q.shape[-1] > 1 for Q in basis)
    a = a if full_A else project_inputs(a, basis)  # blocks cost little
    g = g if full_B else project_outputs(g, basis)
    operands, letters = [g, a], ["nbso", "nbsik"]
    if full_B:
        operands.append(basis.Q_B)
        letters.append("boO")
    if full_A:
        operands.append(basis.Q_A)
        letters.append("biI")
    result = f"nb{'O' if full_B else 'o'}{'I' if full_A else 'i'}k"
    _, b, s, i, k = a.shape
    return operands, ",".join(letters) + "->" + result, (NOMINAL_N, b, s, g.shape[-1], i, k)


class Step(NamedTuple):
    """One product of a path."""

    name: str
    pair: tuple[int, ...]  # of the operands, in the order to take them
    equation: str
    operations: int


@torch.compiler.assume_constant_result
def _path(equation: str, sizes: tuple[int, ...]) -> tuple[Step, ...]:
    return _cheapest(equation, sizes)


@functools.lru_cache
def _cheapest(equation: str, sizes: tuple[int, ...]) -> tuple[Step, ...]:
    size = dict(zip("nbsoik", sizes, strict=True))
    size |= {"O": size["o"], "I": size["i"]}
    parts = equation.split("->")[0].split(",")
    shapes = [tuple(size[letter] for letter in part) for part in parts]
    _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    names = ["g", "a", *("Q_B" if "O" in part else "Q_A" for part in parts[2:])]
    steps = []
    for contracted in info.contraction_list:
        pair = tuple(sorted(contracted[0], reverse=True))
        left, right = sorted(names.pop(at) for at in pair)
        made = {("Q_B", "g"): "g", ("Q_A", "a"): "a"}.get((left, right), "G[n]")
        names.append(made)
        letters = set(contracted[2]) & size.keys()
        name = "form G[n]" if (left, right) == ("a", "g") else f"project {made}"
        steps.append(Step(name, pair, contracted[2], 2 * math.prod(size[letter] for letter in letters)))
    return tuple(steps)
