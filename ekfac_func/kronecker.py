"""The algebra of one layer: what each kind of term answers, one letter per axis, the same letter everywhere.

| letter | meaning | linear | conv nd | conv nd, SUA | no rule: vector | no rule: matrix |
|---|---|---|---|---|---|---|
| n | example | . | . | . | . | . |
| b | independent block | 1 | groups | groups | elements | 1 |
| s, t | position that the weight is shared over | leading dims | output pixels | output pixels | 1 | 1 |
| i | input, + 1 for a bias | in | c/groups * kernel | c/groups | 1 | all axes but the first |
| o | output | out | c_out/groups | c_out/groups | 1 | the first axis |
| k | kernel offset left unrotated | 1 | 1 | kernel | 1 | 1 |
| p | pixel that the factor A is averaged over | - | - | input pixels | - | - |

Capitals I, O are coordinates in the eigenbasis.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .types import Basis, Dense, Factored, Factors, Layer, Number, Params, Term


class FactorSums(NamedTuple):
    """Kronecker factors as sums over examples and positions, with what each is divided by."""

    A: Tensor  # [b i i]
    B: Tensor  # [b o o]
    count_A: int | Tensor  # inputs summed in A
    count_B: int | Tensor  # output gradients summed in B, or the trace of B [b 1 1] of dense gradients


def factor_sums(term: Term) -> FactorSums:
    """`A = sum a a^T` and `B = sum g g^T`; of dense gradients `sum G^T G` and `sum G G^T`.

    Martens & Grosse 2015, https://arxiv.org/abs/1503.05671. For dense gradients (as Shampoo, Gupta et al. 2018,
    https://arxiv.org/abs/1802.09568, but per example) B has unit trace, so that the product of eigenvalues has the
    scale of `E[G^2]`, which the product of both factors has squared.
    """
    match term:
        case Factored(a, g, x):
            if x is None:
                A, count = torch.einsum("nbsik,nbsjk->bij", a, a), a.shape[0] * a.shape[2]
            else:
                A, count = torch.einsum("nbpi,nbpj->bij", x, x), x.shape[0] * x.shape[2]
            return FactorSums(A, torch.einsum("nbso,nbsq->boq", g, g), count, g.shape[0] * g.shape[2])
        case Dense(G):
            B = torch.einsum("nboik,nbqik->boq", G, G)
            trace = B.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
            return FactorSums(torch.einsum("nboik,nbojk->bij", G, G), B, G.shape[0], trace)


def average_factors(factors: Factors, sums: FactorSums, decay: Number) -> Factors:
    """One step of the bias-corrected moving average of the factors; factors of nothing (zero gradients) are zero."""
    past = decay * factors.weight
    total = past + (1 - decay)
    share = past / torch.where(total > 0, total, 1)
    trace = sums.count_B
    B = sums.B / (torch.where(trace > 0, trace, 1) if isinstance(trace, Tensor) else trace)
    return Factors(
        share * factors.A + (1 - share) * (sums.A / sums.count_A), share * factors.B + (1 - share) * B, total
    )


def positions(term: Term) -> int:
    """How often one example uses the weight: what the product of the factors lacks to be `E[G^2]`."""
    return term.g.shape[2] if isinstance(term, Factored) else 1


def dense(term: Term) -> Tensor:
    """Per-example gradients `[n b o i k]`."""
    return torch.einsum("nbso,nbsik->nboik", term.g, term.a) if isinstance(term, Factored) else term.G


def gradient(term: Term) -> Tensor:
    """Sum over the examples of the gradients, `[b o i k]`."""
    return torch.einsum("nbso,nbsik->boik", term.g, term.a) if isinstance(term, Factored) else term.G.sum(0)


def square_norms(term: Term) -> Tensor:
    """`||G[n]||^2`, `[n]`, from pairs of positions where that is less work than forming `G[n]`."""
    if isinstance(term, Factored):
        s, i, k = term.a.shape[2:]
        o = term.g.shape[3]
        if s * (i * k + o) <= o * i * k:
            pairs_a = torch.einsum("nbsik,nbtik->nbst", term.a, term.a)
            pairs_g = torch.einsum("nbso,nbto->nbst", term.g, term.g)
            return torch.einsum("nbst,nbst->n", pairs_a, pairs_g)
    return dense(term).square().sum((1, 2, 3, 4))


def into_basis(M: Tensor, basis: Basis) -> Tensor:
    """`Q_B^T M Q_A`: `[... b o i k]` to `[... b O I k]`. A side of one dimension has nothing to rotate."""
    M = M if basis.Q_A.shape[1] == 1 else torch.einsum("...boik,biI->...boIk", M, basis.Q_A)
    return M if basis.Q_B.shape[1] == 1 else torch.einsum("...boIk,boO->...bOIk", M, basis.Q_B)


def out_of_basis(M: Tensor, basis: Basis) -> Tensor:
    """`Q_B M Q_A^T`: `[b O I k]` to `[b o i k]`."""
    return into_basis(M, Basis(basis.Q_A.mT, basis.Q_B.mT))


def project(term: Factored, basis: Basis) -> Factored:
    """Inputs and output gradients in the basis: `a [n b s I k]`, `g [n b s O]`."""
    a, g = term.a, term.g
    a = a if basis.Q_A.shape[1] == 1 else torch.einsum("nbsik,biI->nbsIk", a, basis.Q_A)
    g = g if basis.Q_B.shape[1] == 1 else torch.einsum("nbso,boO->nbsO", g, basis.Q_B)
    return Factored(a, g)


def eigenvalue_product(factors: Factors, basis: Basis, positions: int, like: Tensor) -> Tensor:
    """`lambda_B x lambda_A x positions`, the K-FAC estimate of `E[G^2]`, at each offset: shaped as like, `[b O I k]`.

    The eigenvalues are read as `diag(Q^T A Q)`: of a basis that could not be refreshed, its own best ones.
    """
    lambda_A = torch.einsum("bij,biI,bjI->bI", factors.A, basis.Q_A, basis.Q_A).clamp(min=0)
    lambda_B = torch.einsum("boq,boO,bqO->bO", factors.B, basis.Q_B, basis.Q_B).clamp(min=0)
    product = torch.einsum("bO,bI->bOI", positions * lambda_B, lambda_A)
    return product.clamp(max=torch.finfo(product.dtype).max)[..., None].expand_as(like)


def unpack(layer: Layer, M: Tensor, like: Mapping[str, Tensor]) -> Params:
    """`[... b o i k]` back to the layer's entries of a tree like params, leading axes kept."""
    if layer.bias is None:
        return {layer.weight: _as(M, like[layer.weight])}
    return {layer.weight: _as(M[..., :-1, :], like[layer.weight]), layer.bias: _as(M[..., -1:, :], like[layer.bias])}


def _as(M: Tensor, p: Tensor) -> Tensor:
    return M.reshape((*M.shape[:-4], *p.shape)).to(p.dtype)
