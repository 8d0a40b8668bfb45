"""How the second moment is summed at the least cost.

Orders of `sum_n (Q_B^T G[n] Q_A)^2` for one layer, all exact:

| order | operations | extra memory |
|---|---|---|
| one position, so that the square factors | 2n(o^2 + i^2) + 4noi | none |
| project, then form G[n] | 2ns(o^2 + i^2) + 2nsoi | n o i |
| form G[n], then project | 2nsoi + 2n(o i^2 + o^2 i) | n o i |

`opt_einsum` finds the last two, and those between, from the sizes; blocks of examples bound the n o i.
"""

import functools

import opt_einsum
import torch
from torch import Tensor

from .kronecker import (
    add_rows,
    coalesce,
    gradient,
    into_basis,
    look_up,
    out_of_basis,
    project,
    project_inputs,
    project_outputs,
)
from .types import Basis, Dense, Factored, OneHot, Sums, Terms

NOMINAL_N = 256  # a plan that read a traced batch size would cost a graph for each
MAX_BYTES = 64 * 2**20  # of the per-example gradients that exist at a time


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
        case (Factored(a, g),):
            projected, square = _sum_blocks((g, a), basis)
            o, s, i = g.shape[3], g.shape[2], a.shape[3]
            if NOMINAL_N * s <= o + i:  # fewer samples than dimensions
                return Sums(gradient(terms), projected, square)
            return Sums(out_of_basis(projected, basis, (a.shape[1], o, i, a.shape[4])), projected, square)
        case (Dense(G),):
            return Sums(gradient(terms), *_sum_blocks((G,), basis))
    raise AssertionError(f"no contraction for {[type(term).__name__ for term in terms]}")


def gradient_sums(terms: Terms, basis: Basis) -> Sums:
    """Sums over the examples of G and of G in the basis, `[b o i k]` each; no moment."""
    total = gradient(terms)
    return Sums(total, into_basis(total, basis), None)


def _table_sums(table: OneHot, basis: Basis) -> tuple[Tensor, Tensor]:
    index, size, g, _ = project(coalesce(table), basis)
    return add_rows(index, g, size), add_rows(index, g.square(), size)


def _tied_sums(factored: Factored, table: OneHot, basis: Basis) -> tuple[Tensor, Tensor]:
    """A table that is a linear layer too: `sum (F + T)^2`, of which T and the product have a row an id."""
    a, g = project_inputs(factored.a, basis), factored.g
    index, size, h, _ = project(coalesce(table), basis)
    projected, square = _sum_blocks((factored.g, factored.a), basis)
    cross = 2 * look_up(Factored(a, g), index) * h
    return projected + add_rows(index, h, size), square + add_rows(index, h.square() + cross, size)


def _sum_blocks(tensors: tuple[Tensor, ...], basis: Basis) -> tuple[Tensor, Tensor]:
    """Sums of G in the basis and of its square, of (g, a) or of (G,), some examples at a time."""
    n = NOMINAL_N if torch.compiler.is_compiling() else tensors[0].shape[0]
    b, k = tensors[-1].shape[1], tensors[-1].shape[-1]
    o, i = (tensors[0].shape[3], tensors[1].shape[3]) if len(tensors) == 2 else tensors[0].shape[2:4]
    count = max(1, -(-n * b * o * i * k * tensors[0].element_size() // MAX_BYTES))
    projected = square = None
    for block in zip(*(_split(t, count) for t in tensors), strict=True):
        G = into_basis(block[0], basis) if len(block) == 1 else _contract(block[0], block[1], basis)
        block_projected, block_square = G.sum(0), G.square().sum(0)
        projected = block_projected if projected is None else projected + block_projected
        square = block_square if square is None else square + block_square
    assert projected is not None
    assert square is not None
    return projected, square


def _split(t: Tensor, count: int) -> tuple[Tensor, ...]:
    """Blocks of examples; in a graph filled up with zero ones, since blocks of the traced batch's size would fix it."""
    if count == 1 or not torch.compiler.is_compiling():
        return t.tensor_split(count)
    n = t.shape[0]
    size = n // count + 2  # two more than needed, for a size of 0 or 1 would be a graph of its own
    return torch.cat([t, t.new_zeros(count * size - n, *t.shape[1:])]).reshape(count, size, *t.shape[1:]).unbind()


def _contract(g: Tensor, a: Tensor, basis: Basis) -> Tensor:
    """`Q_B^T G[n] Q_A`, `[n b O I k]`, pair by pair in the cheapest order."""
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
    sizes = (NOMINAL_N, b, s, g.shape[-1], i, k)
    for pair, equation in _path(",".join(letters) + "->" + result, sizes):
        operands.append(torch.einsum(equation, *(operands.pop(index) for index in pair)))
    return operands[0]


Path = tuple[tuple[tuple[int, ...], str], ...]  # of each step the operands, in the order to take them, and its equation


@torch.compiler.assume_constant_result
def _path(equation: str, sizes: tuple[int, ...]) -> Path:
    return _cheapest(equation, sizes)


@functools.lru_cache
def _cheapest(equation: str, sizes: tuple[int, ...]) -> Path:
    size = dict(zip("nbsoik", sizes, strict=True))
    size |= {"O": size["o"], "I": size["i"]}
    shapes = [tuple(size[letter] for letter in part) for part in equation.split("->")[0].split(",")]
    _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    return tuple((tuple(sorted(step[0], reverse=True)), step[2]) for step in info.contraction_list)
