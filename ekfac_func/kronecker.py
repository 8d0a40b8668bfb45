"""The algebra of one layer: what each kind of term answers, one letter per axis, the same letter everywhere.

| letter | meaning | linear | conv nd | conv nd, SUA | norm | embedding | vector without rule | matrix |
|---|---|---|---|---|---|---|---|---|
| n | example | . | . | . | . | . | . | . |
| b | independent block | 1, or the matrices of a stack | groups | groups | features | 1 | elements | 1 |
| s, t | position that shares the weight | leading dims | output pixels | output pixels | positions | ids | 1 | 1 |
| i | input, + 1 for a bias | in | c/groups * kernel | c/groups | 1 | features | 1 | all axes but the first |
| o | output | out | c_out/groups | c_out/groups | 1 | vocabulary | 1 | the first axis |
| k | kernel offset left unrotated | 1 | 1 | kernel | 1 | 1 | 1 | 1 |
| p | pixel that the factor A is averaged over | - | - | input pixels | - | - | - | - |
| m, d | diagonal block of a side and its entries | | | | | | | |

Capitals I, O, D are coordinates in the eigenbasis. An embedding has its gradients on i and its ids on o: the letters
follow the weight's axes.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocking import in_blocks, nominal
from .memory import Rooms
from .modes import where
from .patch_gram import patch_gram
from .patches import Patches
from .products import outer, rotate
from .types import (
    Basis,
    Dense,
    Factor,
    Factored,
    Factors,
    Gram,
    Layer,
    Means,
    Number,
    OneHot,
    Params,
    Reflections,
    Side,
    Term,
    Terms,
    is_matrix,
    outside,
    statistics_dtype,
)

FEW = 0.7  # samples for each dimension, below which an eigenvalue problem in their span takes less time
THIN = 2  # columns up to which a sum of products entry by entry takes less time than a batch of small matrices
STRIPS = 4  # of a symmetric product, of 5/8 of the operations
STRIPS_FROM = 256  # dimensions


def left_as_samples(Q: Side, samples: int, single: bool, unwritten: bool = False) -> bool:
    """Whether a factor is kept as its samples, not multiplied out: of a compact side, of `rank(r)`, or of few samples.

    samples: their number in a batch, in a graph in a nominal one. Few are less than `FEW` for each dimension.
    single: whether the layer has one term; the samples of several terms have no common unit.
    unwritten: whether the samples are patches. To write them costs more than the factor of a single term.
    """
    if isinstance(Q, Reflections):
        return True
    few = single and Q.dim() == 3 and 0 < samples < FEW * Q.shape[-2]
    return few or (outside(Q) > 0 and not (unwritten and single))


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
    terms: Terms, basis: Basis, sharing: WeightSharing = expand, formed: bool = True
) -> tuple[FactorSums, ...]:
    """`A = sum a a^T` and `B = sum g g^T` of each term; of dense gradients `sum G^T G` and `sum G G^T`.

    Martens & Grosse 2015, https://arxiv.org/abs/1503.05671. For dense gradients (as Shampoo, Gupta et al. 2018,
    https://arxiv.org/abs/1802.09568, but per example) B has unit trace, so that the product of eigenvalues has the
    scale of `E[G^2]`, which the product of both factors has squared. The basis says which blocks of a side are kept.

    formed: whether all factors are wanted as matrices. Else `left_as_samples` says which are left as their samples.
    """
    return tuple(_factor_sums(term, basis, sharing, formed, len(terms) == 1) for term in terms)


def _factor_sums(term: Term, basis: Basis, sharing: WeightSharing, formed: bool, single: bool) -> FactorSums:
    match term:
        case Factored():
            a, g, x, counted = sharing(term)
            samples = a if x is None else x[..., None]
            count = nominal(samples.shape[0]) * samples.shape[2] * samples.shape[4]
            left_A = not formed and left_as_samples(basis.Q_A, count, single, isinstance(samples, Patches))
            left_B = not formed and left_as_samples(basis.Q_B, nominal(g.shape[0]) * g.shape[2], single)
            A = _gram_of_inputs(samples, basis.Q_A, left_A)
            B = _gram(g, "nbsmd,nbsme->bmde", basis.Q_B, -1, left_B)
            n, _, s, _ = g.shape
            used = n * s if counted is None else counted.sum((0, 2)).to(g)
            inputs = used * a.shape[4] if x is None else n * x.shape[2]
            return FactorSums(A, B, inputs, used, s if counted is None else used / n, n)
        case OneHot(ids=ids, size=size, g=g, counted=counted):
            seen = counted.sum().to(g)
            counts = g.new_zeros(size).index_add(0, ids.flatten(), counted.flatten().to(g))
            A = _gram(g[:, None], "nbsmd,nbsme->bmde", basis.Q_A, -1, not formed and outside(basis.Q_A) > 0)
            return FactorSums(A, counts.reshape(basis.Q_B.shape), seen, seen, seen / g.shape[0], g.shape[0])
        case Dense(G=G):
            A = _gram(G, "nbomdk,nbomek->bmde", basis.Q_A, -2)
            B = _gram(G, "nbmdik,nbmeik->bmde", basis.Q_B, -3)
            return FactorSums(A, B, G.shape[0], _trace(B), 1, G.shape[0])


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
    x = _blocks(x, Q, axis)
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


def _blocks(x: Tensor, Q: Side, axis: int) -> Tensor:
    """An axis, counted from the right, as `m d` for the blocks of a side of the basis, filled up with zeros."""
    axis += x.dim()
    if Q.dim() == 3:
        return x.unsqueeze(axis)
    m, d = Q.shape[1:3]
    missing = m * d - x.shape[axis]
    if missing:
        x = F.pad(x, [0, 0] * (x.dim() - 1 - axis) + [0, missing])
    return x.reshape(*x.shape[:axis], m, d, *x.shape[axis + 1 :])


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


def count(terms: Terms) -> int:
    """How many examples, or pseudo-examples of a Fisher."""
    return next(leaf for leaf in terms[0] if isinstance(leaf, Tensor)).shape[0]


def positions(term: Term) -> int:
    """How often an example uses the weight."""
    match term:
        case Factored(g=g) | OneHot(g=g):
            return g.shape[-2]
    return 1


def dense(terms: Terms) -> Tensor:
    """Per-example gradients `[n b o i k]`."""
    return functools.reduce(torch.add, map(_dense, terms))


def _dense(term: Term) -> Tensor:
    match term:
        case Factored(a=Patches() as a, g=g) if not torch.compiler.is_compiling() and a.convolves(g):
            return a.gradients(g)
        case Factored(g=g):
            return form(g, term.inputs)
        case OneHot(ids=ids, size=size, g=g):
            table = g.new_zeros(g.shape[0], size, g.shape[2])
            return table.scatter_add(1, ids[..., None].expand(g.shape), g)[:, None, :, :, None]
        case Dense(G=G):
            return G


def form(g: Tensor, a: Tensor, rooms: Rooms | None = None) -> Tensor:
    """Per-example gradients `[n b o i k]` of output gradients `[n b s o]` and inputs `[n b s i k]`."""
    return outer(g, a.flatten(3), rooms).unflatten(3, a.shape[3:])


def add_up(g: Tensor, a: Tensor) -> Tensor:
    """The sum over examples and positions of `g a^T`, `[b o i k]`."""
    g, a = as_samples(g), as_samples(a)
    return outer(g, a.flatten(2)).unflatten(2, a.shape[2:])


def as_samples(x: Tensor) -> Tensor:
    """`[n b s ...]` to `[b samples ...]`: positions of all examples, one after another."""
    return x.transpose(0, 1).flatten(1, 2)


def gradient(terms: Terms) -> Tensor:
    """Sum over the examples of the gradients, `[b o i k]`."""
    return functools.reduce(torch.add, map(_gradient, terms))


def _gradient(term: Term) -> Tensor:
    match term:
        case Factored(a=Patches() as a, g=g):
            return a.gradient(g)
        case Factored(g=g):
            return add_up(g, term.inputs)
        case OneHot(ids=ids, size=size, g=g):
            return add_rows(ids, g, size)
        case Dense(G=G):
            return G.sum(0)


def add_rows(ids: Tensor, values: Tensor, size: int) -> Tensor:
    """Values `[n s i]` added up into the rows `[n s]` of a table, `[1 o i 1]`."""
    table = values.new_zeros(size, values.shape[2]).index_add(0, ids.flatten(), values.flatten(0, 1))
    return table[None, :, :, None]


def coalesce(term: OneHot) -> OneHot:
    """Each id once an example, with the sum of its gradients, as must be before anything is squared."""
    n, s, i = term.g.shape
    if term.size <= s:  # then every id has a row
        g = term.g.new_zeros(n, term.size, i).scatter_add(1, term.ids[..., None].expand(term.g.shape), term.g)
        ids = torch.arange(term.size, device=g.device).expand(n, -1)
        return term._replace(ids=ids, g=g, counted=torch.ones_like(ids, dtype=term.counted.dtype))
    ids, order = term.ids.sort(dim=1)
    g = term.g.gather(1, order[..., None].expand(term.g.shape))
    first = torch.zeros_like(ids[:, :1])
    segment = torch.cat([first, (ids[:, 1:] != ids[:, :-1]).long().cumsum(1)], dim=1)
    sums = torch.zeros_like(g).scatter_add(1, segment[..., None].expand(g.shape), g)
    return term._replace(ids=torch.zeros_like(ids).scatter(1, segment, ids), g=sums)


def look_up(term: Factored, ids: Tensor) -> Tensor:
    """The rows `[n s i]` at ids `[n s]` of the gradients `[n o i]` of a layer with b = k = 1."""
    g = term.g[:, 0].gather(2, ids[:, None].expand(-1, term.g.shape[2], -1))  # [n t s]
    return torch.einsum("nts,nti->nsi", g, term.inputs[:, 0, :, :, 0])


def common_first(g: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Output gradients `[n b s o]` and inputs `[n b s i k]`, reflected so that the first position has what is common.

    It leaves `sum_s g[n, s] a[n, s]^T` as it is, but less of the sum cancels: of two inputs that are nearly alike, with
    output gradients of opposite sign, all digits would. Not of an example of which more would cancel then: of a large
    input with a small gradient, as of a position that the loss masks.
    """
    if g.shape[2] < 2:
        return g, a
    h, x = _common_first(g), _common_first(a)
    better = (_lengths(h, x) <= 2 * _lengths(g, a))[:, :, None, None]  # or nearly as good, which saves a pass
    return where(better, h, g), where(better[..., None], x, a)


def _common_first(x: Tensor) -> Tensor:
    s = x.shape[2]
    first = x[:, :, :1]
    rest = x - first  # before anything is summed, for it may be small
    mean = rest.mean(2, keepdim=True)
    return torch.cat([(first + mean) * s**0.5, rest[:, :, 1:] - mean / (1 - s**-0.5)], 2)


def _lengths(g: Tensor, a: Tensor) -> Tensor:
    """`sum_s ||g[n, s]|| ||a[n, s]||`, `[n b]`: what the rounding of a sum over pairs of positions grows with."""
    return (torch.linalg.vector_norm(g, dim=3) * torch.linalg.vector_norm(a, dim=(3, 4))).sum(2)


def times(term: Term, number: float) -> Term:
    """The gradients times a number."""
    match term:
        case Dense(G=G):
            return Dense(G * number)
        case Factored(g=g) | OneHot(g=g):
            return term._replace(g=g * number)


def square_norms(terms: Terms) -> Tensor:
    """`||G[n]||^2`, `[n]`, from pairs of positions where that is less work than forming `G[n]`."""
    total = functools.reduce(torch.add, map(_square_norms, terms))
    match terms:
        case (Factored() as factored, OneHot(ids=ids, g=g)):
            total = total + 2 * (look_up(factored, ids) * g).sum((1, 2))
    return total.clamp(min=0)


def _square_norms(term: Term) -> Tensor:
    if isinstance(term, OneHot):
        return coalesce(term).g.square().sum((1, 2))
    if isinstance(term, Factored):
        s, i, k = term.a.shape[2:]
        o = term.g.shape[3]
        if s * (i * k + o) <= o * i * k:
            g, a = common_first(term.g, term.inputs)
            pairs_a = torch.einsum("nbsik,nbtik->nbst", a, a)
            pairs_g = torch.einsum("nbso,nbto->nbst", g, g)
            return torch.einsum("nbst,nbst->n", pairs_a, pairs_g)
        entries = math.prod(term.a.shape[1:2] + term.a.shape[3:]) * o
        blocks = zip(in_blocks(term.g, entries), in_blocks(term.a, entries), strict=True)
        squares = [_dense(Factored(a, g)).square().sum((1, 2, 3, 4)) for g, a in blocks]
        return torch.cat(squares)[: term.g.shape[0]]
    return _dense(term).square().sum((1, 2, 3, 4))


def _turn(x: Tensor, Q: Tensor, equation: str, axis: int) -> Tensor:
    """An axis, counted from the right, times a side of the basis. Blocks of one dimension have nothing to rotate."""
    if Q.shape[-1] == 1:
        return x
    y = torch.einsum(equation, _blocks(x, Q, axis), Q.unsqueeze(1) if Q.dim() == 3 else Q)
    return y.flatten(axis - 1, axis)


class Transposed(NamedTuple):
    """`Q^T` of a compact side."""

    Q: Reflections


def transposed(Q: Side) -> Tensor | Transposed:
    """`Q^T` of a side."""
    return Transposed(Q) if isinstance(Q, Reflections) else Q.mT


def _reflected(x: Tensor, Q: Reflections | Transposed) -> Tensor:
    """`x Q` or `x Q^T` of `[... b m d]`, in two thin products."""
    V, W, E = Q if isinstance(Q, Reflections) else Q.Q
    r = E.shape[-1]
    if isinstance(Q, Reflections):
        y = _rows(_rows(x, V), -W.mT)
        y += x
        y[..., :r] = _rows(y[..., :r], E)
        return y
    head = _rows(x[..., :r], E.mT)
    y = _rows(_rows(head, W[:, :r]) + _rows(x[..., r:], W[:, r:]), -V.mT)
    y += x
    y[..., :r] += head - x[..., :r]
    return y


def _rows(x: Tensor, M: Tensor) -> Tensor:
    """`x M` of `[... b m d]`, with all rows of a block in one product."""
    if M.shape[0] == 1:
        return rotate(x, M[0])
    return torch.einsum("...bmd,bde->...bme", x, M)


def _reflected_columns(x: Tensor, Q: Reflections | Transposed) -> Tensor:
    """`Q^T x` or `Q x` of `[... b d m]`; as above, transposed, for the layout in memory."""
    V, W, E = Q if isinstance(Q, Reflections) else Q.Q
    r = E.shape[-1]
    if isinstance(Q, Reflections):
        y = outer(-W.mT, outer(V, x))
        y += x
        y[..., :r, :] = outer(E, y[..., :r, :])
        return y
    head = outer(E.mT, x[..., :r, :])
    y = outer(-V.mT, outer(W[:, :r], head) + outer(W[:, r:], x[..., r:, :]))
    y += x
    y[..., :r, :] += head - x[..., :r, :]
    return y


def written(Q: Side) -> Tensor:
    """A side `[b d d]` as it is."""
    if not isinstance(Q, Reflections):
        return Q
    one = torch.eye(Q.shape[1], dtype=Q.V.dtype, device=Q.V.device)
    return _reflected(one.expand(Q.shape), Q)


def turn_inputs(M: Tensor, Q: Side | Transposed, rooms: Rooms | None = None) -> Tensor:
    """`M Q_A`: `[... b o i k]` to `[... b o I k]`; inputs `[n b s i k]` alike. Of a compact side k is 1."""
    if isinstance(Q, Reflections | Transposed):
        return _reflected(M[..., 0], Q)[..., None]
    if is_matrix(Q) and Q.shape[0] == M.shape[-1] == 1:
        return rotate(M[..., 0], Q[0], rooms)[..., None]
    return _turn(M, Q, "...bomdk,bmdD->...bomDk", -2)


def turn_outputs(M: Tensor, Q: Side | Transposed, rooms: Rooms | None = None) -> Tensor:
    """`Q_B^T M`: `[... b o i k]` to `[... b O i k]`."""
    if isinstance(Q, Reflections | Transposed):
        return _reflected_columns(M[..., 0], Q)[..., None]
    if is_matrix(Q) and Q.shape[0] == M.shape[-1] == 1:
        return outer(Q, M[..., 0], rooms)[..., None]
    return _turn(M, Q, "...bmdik,bmdD->...bmDik", -3)


def into_basis(M: Tensor, basis: Basis) -> Tensor:
    """`Q_B^T M Q_A`: `[... b o i k]` to `[... b O I k]`."""
    return turn_outputs(turn_inputs(M, basis.Q_A), basis.Q_B)


def out_of_basis(M: Tensor, basis: Basis, sizes: tuple[int, int, int, int]) -> Tensor:
    """`Q_B M Q_A^T`: `[... b O I k]` to `[... b o i k]`."""
    return into_basis(M, Basis(*map(transposed, basis)))[..., : sizes[1], : sizes[2], :]


def project_inputs(a: Tensor, basis: Basis) -> Tensor:
    """Inputs in the basis: `[n b s i k]` to `[n b s I k]`."""
    return turn_inputs(a, basis.Q_A)


def project_outputs(g: Tensor, basis: Basis) -> Tensor:
    """Output gradients in the basis: `[n b s o]` to `[n b s O]`."""
    return turn_inputs(g[..., None], basis.Q_B)[..., 0]


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
        inside = (_reflected(C.x, Q) if isinstance(Q, Reflections) else C.x @ Q).square().sum(1)
    else:
        inside = torch.einsum("...de,...dD,...eD->...D", C, Q, Q).flatten(1).clamp(min=0)
    left = outside(Q)
    if not left:
        return inside
    rest = (_trace(C) - inside.sum(1)).clamp(min=0) / left
    return torch.cat([inside[:, :-1], rest[:, None]], dim=1)


def pack(layer: Layer, tree: Mapping[str, Tensor]) -> Tensor:
    """A layer's entries of a tree like params as `[... b o i k]`, leading axes kept: the inverse of `unpack`."""
    b, o, i, k = layer.sizes
    weight = tree[layer.weight]
    lead = weight.dim() - len(layer.shape)
    ahead = weight.shape[:lead]
    M = weight.reshape((*ahead, *layer.split)).permute((*range(lead), *(lead + axis for axis in layer.order)))
    M = M.reshape(*ahead, b, o, i - (layer.bias is not None), k)
    return M if layer.bias is None else torch.cat([M, tree[layer.bias].reshape(*ahead, b, o, 1, k)], dim=-2)


def unpack(layer: Layer, M: Tensor, like: Mapping[str, Tensor]) -> Params:
    """`[... b o i k]` back to the layer's entries of a tree like params, in its dtypes, leading axes kept."""
    bias = None if layer.bias is None else M[..., -1, 0]
    M = M if bias is None else M[..., :-1, :]
    lead = M.dim() - 4
    M = M.reshape((*M.shape[:lead], *(layer.split[axis] for axis in layer.order)))
    inverse = sorted(range(len(layer.order)), key=layer.order.__getitem__)
    M = M.permute((*range(lead), *(lead + axis for axis in inverse)))
    tree = {layer.weight: M.reshape((*M.shape[:lead], *layer.shape)).to(like[layer.weight].dtype)}
    if layer.bias is not None and bias is not None:
        tree[layer.bias] = bias.reshape((*M.shape[:lead], *layer.bias_shape)).to(like[layer.bias].dtype)
    return tree


def unpack_all(layers: Iterable[Layer], blocks: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Params:
    """`[... b o i k]` of every layer as a tree like params, in its order and dtypes, leading axes kept."""
    tree: Params = {}
    for layer in layers:
        tree |= unpack(layer, blocks[layer.weight], like)
    return {name: tree[name] for name in like}


def unpack_exactly(layers: Iterable[Layer], blocks: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Params:
    """The same in the dtypes of statistics."""
    return unpack_all(layers, blocks, {name: p.new_empty(0, dtype=statistics_dtype(p)) for name, p in like.items()})
