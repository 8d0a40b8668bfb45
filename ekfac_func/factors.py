"""The Kronecker factors of a layer: sums over examples, their means, the average of these, and their eigenvalues."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .blocking import in_blocks, nominal
from .kronecker import as_blocks, turn_inputs
from .patch_gram import patch_gram
from .patches import Patches
from .products import outer
from .types import (
    Basis,
    Dense,
    Factor,
    Factored,
    Factors,
    Gram,
    Means,
    Number,
    OneHot,
    Reflections,
    Side,
    Term,
    Terms,
    outside,
)

FEW = 0.7  # samples for each dimension, below which an eigenvalue problem in their span takes less time
THIN = 2  # columns up to which a sum of products entry by entry takes less time than a batch of small matrices
STRIPS = 4  # of a symmetric product, of 5/8 of the operations
STRIPS_FROM = 256  # dimensions


class FactorSums(NamedTuple):
    """Kronecker factors of one term as sums over examples and positions, with what they are divided by."""

    A: Factor
    B: Factor
    count_A: Number  # inputs summed in A
    count_B: Number  # output gradients summed in B, or of dense gradients the trace of B
    positions: Number  # uses of the weight by an example, [b] where blocks differ; times A x B it estimates E[G^2]
    n: int  # examples


WeightSharing = Callable[[Factored], Factored]
"""A layer's calls by an example -> the samples of its Kronecker factors: `expand` or `reduce`."""


def expand(term: Factored) -> Factored:
    """Samples of the factors: each position of an example is one. K-FAC for convolutions, Grosse & Martens 2016."""
    return term


def reduce(term: Factored) -> Factored:
    """Samples of the factors: an example is one, its inputs averaged over the positions and its gradients summed.

    K-FAC-reduce of Eschenhagen et al. 2023, https://arxiv.org/abs/2311.00636.
    """
    x = None if term.x is None else term.x.mean(2, keepdim=True)
    if term.counted is None:
        a = term.inputs.sum(2, keepdim=True) / max(term.g.shape[2], 1)
        return Factored(a, term.g.sum(2, keepdim=True), x)
    used = term.counted.sum(2, keepdim=True)
    a = term.inputs.sum(2, keepdim=True) / used.clamp(min=1)[..., None, None]
    return Factored(a, term.g.sum(2, keepdim=True), x, used > 0)


def factor_sums(
    terms: Terms, basis: Basis, sharing: WeightSharing = expand, matrices: bool = True
) -> tuple[FactorSums, ...]:
    """`A = sum a a^T` and `B = sum g g^T` of each term; of dense gradients `sum G^T G` and `sum G G^T`.

    Martens & Grosse 2015, https://arxiv.org/abs/1503.05671. For dense gradients (as Shampoo, Gupta et al. 2018,
    https://arxiv.org/abs/1802.09568, but per example) B has unit trace, so that the product of eigenvalues has the
    scale of `E[G^2]`, which the product of both factors has squared. The basis says which blocks of a side are kept.

    matrices: whether all factors are wanted as such. Else `_left_as_samples` says which are left as their samples.
    """
    return tuple(_factor_sums(term, basis, sharing, matrices, len(terms) == 1) for term in terms)


def _factor_sums(term: Term, basis: Basis, sharing: WeightSharing, matrices: bool, single: bool) -> FactorSums:
    match term:
        case Factored():
            a, g, x, counted = sharing(term)
            samples = a if x is None else x[..., None]
            count = nominal(samples.shape[0]) * samples.shape[2] * samples.shape[4]
            left_A = not matrices and _left_as_samples(basis.Q_A, count, single, isinstance(samples, Patches))
            left_B = not matrices and _left_as_samples(basis.Q_B, nominal(g.shape[0]) * g.shape[2], single)
            A = _gram_of_inputs(samples, basis.Q_A, left_A)
            B = _gram(g, "nbsmd,nbsme->bmde", basis.Q_B, -1, left_B)
            n, _, s, _ = g.shape
            used = n * s if counted is None else counted.sum((0, 2)).to(g)
            inputs = used * a.shape[4] if x is None else n * x.shape[2]
            return FactorSums(A, B, inputs, used, s if counted is None else used / n, n)
        case OneHot(ids=ids, size=size, g=g, counted=counted):
            seen = counted.sum().to(g)
            counts = g.new_zeros(size).index_add(0, ids.flatten(), counted.flatten().to(g))
            A = _gram(g[:, None], "nbsmd,nbsme->bmde", basis.Q_A, -1, not matrices and outside(basis.Q_A) > 0)
            return FactorSums(A, counts.reshape(basis.Q_B.shape), seen, seen, seen / g.shape[0], g.shape[0])
        case Dense(G=G):
            A = _gram(G, "nbomdk,nbomek->bmde", basis.Q_A, -2)
            B = _gram(G, "nbmdik,nbmeik->bmde", basis.Q_B, -3)
            return FactorSums(A, B, G.shape[0], _trace(B), 1, G.shape[0])


def _left_as_samples(Q: Side, samples: int, single: bool, unwritten: bool = False) -> bool:
    """Whether a factor is kept as its samples, not multiplied out: of a compact side, of `rank(r)`, or of few samples.

    samples: their number in a batch, in a graph in a nominal one. Few are less than `FEW` for each dimension.
    single: whether the layer has one term; the samples of several terms have no common unit.
    unwritten: whether the samples are patches. To write them costs more than the factor of a single term.
    """
    if isinstance(Q, Reflections):
        return True
    few = single and Q.dim() == 3 and 0 < samples < FEW * Q.shape[-2]
    return few or (outside(Q) > 0 and not (unwritten and single))


def add_factor_sums(sums: tuple[FactorSums, ...], more: tuple[FactorSums, ...], basis: Basis) -> tuple[FactorSums, ...]:
    """Those of more examples."""
    return tuple(_add_factor_sums(one, other, basis) for one, other in zip(sums, more, strict=True))


def _add_factor_sums(one: FactorSums, other: FactorSums, basis: Basis) -> FactorSums:
    A, B = _both(one.A, other.A, basis.Q_A), _both(one.B, other.B, basis.Q_B)
    n, positions = one.n + other.n, one.positions
    if isinstance(positions, Tensor) or positions != other.positions:
        positions = (one.n * positions + other.n * other.positions) / n
    return FactorSums(A, B, one.count_A + other.count_A, one.count_B + other.count_B, positions, n)


def _both(C: Factor, D: Factor, Q: Side) -> Factor:
    """A sum of factors, as samples where they are fewer than dimensions, and for a compact side in any case."""
    if isinstance(C, Gram) and isinstance(D, Gram):
        x = torch.cat([C.x, D.x], 1)
        return Gram(x) if isinstance(Q, Reflections) or x.shape[1] < x.shape[2] else symmetric(x)
    return formed(C) + formed(D)


def _gram_of_inputs(a: Tensor | Patches, Q: Side, left: bool) -> Factor:
    """The second moment of inputs `[n b s i k]`. For a side in blocks patches are written some examples at a time."""

    def gram(a: Tensor) -> Factor:
        return _gram(a, "nbsmdk,nbsmek->bmde", Q, -2, left)

    if isinstance(a, Tensor):
        return gram(a)
    if left:
        return gram(a.write())
    if Q.dim() == 3:
        return patch_gram(a)
    some = [a] if torch.compiler.is_compiling() else in_blocks(a, math.prod(a.shape[1:]))
    return functools.reduce(torch.add, (formed(gram(part.write())) for part in some))


def _gram(x: Tensor, equation: str, Q: Side, axis: int, left: bool = False) -> Factor:
    """The second moment of samples along an axis, in the blocks of a side of the basis, or left as the samples."""
    if left or Q.dim() == 3:
        samples = x.movedim((1, axis), (0, -1)).flatten(1, -2)
        return Gram(samples) if left else symmetric(samples)
    x = as_blocks(x, Q, axis)
    return torch.einsum(equation, x, x)


def symmetric(x: Tensor) -> Tensor:
    """`x^T x` of `[b samples d]`; on a CPU a large one in strips, without what lies below the diagonal."""
    d = x.shape[-1]
    if 0 < d <= THIN:
        columns = x.unbind(-1)
        return torch.stack([torch.stack([(y * z).sum(1) for z in columns], -1) for y in columns], -2)
    if d < STRIPS_FROM or x.device.type != "cpu":
        return outer(x, x)
    C = x.new_empty(*x.shape[:-2], d, d)
    for start, end in itertools.pairwise(d * k // STRIPS for k in range(STRIPS + 1)):
        strip = outer(x[..., start:end], x[..., start:])
        C[..., start:end, start:] = strip
        C[..., end:, start:end] = strip[..., end - start :].mT
    return C


def mean_factors(sums: Sequence[FactorSums]) -> Means:
    """The one division of the sums.

    Of a table that is a linear layer too, one side has inputs and gradients as samples, in units of their own: each
    term's factors then count by its share of `E||G||^2`.
    """
    means = [Means(_ratio(s.A, s.count_A), _ratio(s.B, s.count_B), s.positions) for s in sums]
    if len(means) == 1:
        return means[0]
    shares = [mean.positions * _trace(mean.A) * _trace(mean.B) for mean in means]
    A = _sum_by_shares([mean.A for mean in means], shares)
    B = _sum_by_shares([mean.B for mean in means], shares)
    return Means(_ratio(A, torch.stack(shares).sum(0)), B, 1)


def _sum_by_shares(factors: Sequence[Factor], shares: Sequence[Tensor]) -> Factor:
    """The sum of a layer's factors, each with its share as its trace: as samples where all are."""
    parts = [_times(_ratio(C, _trace(C)), share) for C, share in zip(factors, shares, strict=True)]
    samples = [part.x for part in parts if isinstance(part, Gram)]
    if len(samples) == len(parts):
        return Gram(torch.cat(samples, dim=1))
    return torch.stack([formed(part) for part in parts]).sum(0)


def _ratio(C: Factor, by: Number) -> Factor:
    """A quotient, zero where there was nothing; of each block b where there are several numbers."""
    if not isinstance(by, Tensor):
        by = by or 1
        return Gram(C.x / by**0.5) if isinstance(C, Gram) else C / by
    return _times(C, 1 / torch.where(by > 0, by, 1))


def _times(C: Factor, by: Tensor) -> Factor:
    return Gram(C.x * _along(by.sqrt(), C.x)) if isinstance(C, Gram) else C * _along(by, C)


def _along(numbers: Tensor, C: Tensor) -> Tensor:
    """Numbers `[b]` or `[]` shaped to multiply C."""
    return numbers.reshape(-1, *(1,) * (C.dim() - 1))


def _trace(C: Factor) -> Tensor:
    """Of each block, `[b]`."""
    if isinstance(C, Gram):
        return C.x.square().sum((1, 2))
    return C.diagonal(dim1=-2, dim2=-1).flatten(1).sum(1)


def averages(decay: Number) -> bool:
    """Whether the past may have a share: with any tensor, for its value is not read."""
    return isinstance(decay, Tensor) or decay > 0


def past_share(weight: Tensor, decay: Number) -> tuple[Tensor, Tensor]:
    """The share of the past in one step of a bias-corrected moving average, and the weight of what it has then seen."""
    past = decay * weight
    total = past + (1 - decay)
    return past / torch.where(total > 0, total, 1), total.to(weight.dtype)


def average_factors(factors: Factors, mean: Means, decay: Number) -> Factors:
    """One step of the bias-corrected moving average of the factors."""
    A, B = formed(mean.A), formed(mean.B)
    if not averages(decay):
        return Factors(A, B, torch.ones_like(factors.weight))
    share, weight = past_share(factors.weight, decay)
    return Factors(share * factors.A + (1 - share) * A, share * factors.B + (1 - share) * B, weight)


def formed(C: Factor) -> Tensor:
    """A factor as a matrix: `x^T x` multiplied out."""
    return symmetric(C.x) if isinstance(C, Gram) else C


def eigenvalue_product(factors: Factors | Means, basis: Basis, positions: Number, like: Tensor) -> Tensor:
    """`lambda_B x lambda_A x positions`, the K-FAC estimate of `E[G^2]`, at each offset: shaped as like, `[b O I k]`.

    The eigenvalues are `diag(Q^T A Q)`, the best ones for the basis even where it could not be refreshed.
    """
    lambda_A, lambda_B = _eigenvalues(factors.A, basis.Q_A), _eigenvalues(factors.B, basis.Q_B)
    uses = _along(positions, lambda_B) if isinstance(positions, Tensor) else positions
    product = torch.einsum("bO,bI->bOI", uses * lambda_B, lambda_A)
    return product.clamp(max=torch.finfo(product.dtype).max)[..., None].expand_as(like)


def _eigenvalues(C: Factor, Q: Side) -> Tensor:
    """`[b I]`; of what lies outside of a basis of some rank their mean."""
    if isinstance(C, Gram):
        inside = (turn_inputs(C.x[..., None], Q)[..., 0] if isinstance(Q, Reflections) else C.x @ Q).square().sum(1)
    else:
        inside = torch.einsum("...de,...dD,...eD->...D", C, Q, Q).flatten(1).clamp(min=0)
    left = outside(Q)
    if not left:
        return inside
    rest = (_trace(C) - inside.sum(1)).clamp(min=0) / left
    return torch.cat([inside[:, :-1], rest[:, None]], dim=1)
