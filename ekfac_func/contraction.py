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

from .kronecker import gradient, into_basis, out_of_basis, project
from .types import Basis, Dense, Factored, Sums, Term

NOMINAL_N = 256  # a plan that read a traced batch size would cost a graph for each
MAX_BYTES = 64 * 2**20  # of the per-example gradients that exist at a time


def exact_sums(term: Term, basis: Basis) -> Sums:
    """Sums over the examples of G, of G in the basis, and of its square, `[b o i k]` each."""
    if isinstance(term, Factored) and term.g.shape[2] == 1:
        a, g = project(term, basis)[:2]
        projected = torch.einsum("nbso,nbsik->boik", g, a)
        square = torch.einsum("nbso,nbsik->boik", g.square(), a.square())
        return Sums(gradient(term), projected, square)
    projected, square = _sum_blocks(term, basis)
    return Sums(_gradient(term, projected, basis), projected, square)


def gradient_sums(term: Term, basis: Basis) -> Sums:
    """Sums over the examples of G and of G in the basis, `[b o i k]` each; no moment."""
    total = gradient(term)
    return Sums(total, into_basis(total, basis), None)


def _gradient(term: Term, projected: Tensor, basis: Basis) -> Tensor:
    """The gradient from the terms, or out of the basis where the samples outnumber the dimensions."""
    if isinstance(term, Dense):
        return gradient(term)
    o, i, s = *projected.shape[1:3], term.g.shape[2]
    return gradient(term) if NOMINAL_N * s <= o + i else out_of_basis(projected, basis)


def _sum_blocks(term: Term, basis: Basis) -> tuple[Tensor, Tensor]:
    tensors = (term.G,) if isinstance(term, Dense) else (term.g, term.a)
    n = NOMINAL_N if torch.compiler.is_compiling() else tensors[0].shape[0]
    o, i = basis.Q_B.shape[-1], basis.Q_A.shape[-1]
    b, k = tensors[-1].shape[1], tensors[-1].shape[-1]
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
    operands, letters = [g, a], ["nbso", "nbsik"]
    result = "nb{}{}k".format("o" if g.shape[-1] == 1 else "O", "i" if a.shape[-2] == 1 else "I")
    for Q, side in ((basis.Q_B, "boO"), (basis.Q_A, "biI")):
        if Q.shape[-1] > 1:
            operands.append(Q)
            letters.append(side)
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
