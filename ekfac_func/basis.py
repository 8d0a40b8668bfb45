"""Eigenbases of Kronecker factors as values, and their refreshes: always finite, and orthonormal where a solver fails.

`torch.linalg.eigh` can return NaN eigenvectors without an error, or raise. So each factor is cleaned, symmetrised,
scaled by its largest entry, solved, and the result tested; a factor that fails keeps its old basis.
"""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_count
from .kronecker import formed
from .types import Basis, Factor, Factors, Gram, Layer, Means, Reflections, Side, outside

eigensolver = torch.linalg.eigh  # replaceable, so that tests can make it fail on any machine

ORTHONORMAL = {torch.float64: 1e-6, torch.float32: 1e-4}  # largest entry of |Q^T Q - I| of a good basis, as solved
MAX_GROUPS = 4  # each is a graph of its own, beside those of the first step and of no refresh; Dynamo's limit is eight
RANK_ITERATIONS = 1  # multiplications by the factor at a refresh of a rank(r) side, one more at the first step


class Blocks(NamedTuple):
    """The largest diagonal blocks in which the factors of a layer are kept: None is the whole side, 1 its diagonal.

    A side of 32,000 in blocks of 1,000 has factors and bases of 32 million entries in place of 1,024 million. The
    second moment is exact whatever the basis.
    """

    inputs: int | None = None
    outputs: int | None = None


FULL = Blocks()
DIAGONAL = Blocks(1, 1)
"""No basis: the parameters' own coordinates."""


def blocks(max_dim: int) -> Blocks:
    """Both sides in blocks of at most max_dim."""
    check_count("max_dim", max_dim)
    return Blocks(max_dim, max_dim)


class Rank(NamedTuple):
    """The leading r eigenvectors of each side; what lies outside of them is isotropic. See `rank`."""

    r: int


def rank(r: int) -> Rank:
    """The leading r eigenvectors of each side, and one second moment for all that lies outside of them.

    For layers so wide that their eigendecomposition costs more than all else. Inside, the moment is that of the full
    basis; outside it is the mean over the complement: a number for both sides outside, a vector along the inside
    coordinates where one side is. A refresh is a subspace iteration from the old eigenvectors, `U <- qr(C U)` once (or
    as often as `qr(iterations)` says; at the first step once more), then the eigenvectors of `U^T C U` (Rayleigh-Ritz):
    Halko, Martinsson & Tropp 2011, https://arxiv.org/abs/0909.4061. The start is a Gaussian matrix of a fixed seed,
    orthonormalised.

    With `factor_decay=0` the factor is never formed, `C U = X^T (X U)` of the samples X, and the state keeps none; an
    average needs it in full, `[i i]`. Of fewer samples than r, the basis holds them all, and the rest of its columns
    is arbitrary, as the null space of a full basis is. The rows of a lookup table stay diagonal. A side of no more
    than r + 1 dimensions is full: a complement of one dimension is a direction like any other.
    """
    check_count("r", r)
    return Rank(r)


class Thin(NamedTuple):
    """The span of the batch's samples. See `thin`."""


thin = Thin()
"""The eigenvectors in the span of the batch's own samples, outside of which its gradients and factors are zero.

The natural gradient is that of the full basis, for the price of a QR of the samples `[n s, i]` and an eigenvalue
problem of n s dimensions in place of i. It is exact for the batch that made the basis, so that it takes
`basis_every=1`, `factor_decay=0` and an estimator that carries nothing from step to step (`intra_batch`, `centred`,
`kfac`). A side with `n s >= i` is full, and so are one whose factor has samples of its own (SUA) and one of gradients
that are taken as they are.

The state carries nothing of such a layer: its factors, basis and moment there have no entries. A compiled step takes
graphs of its own for each batch size.
"""


class Compact(NamedTuple):
    """A full basis of few samples. See `compact`."""

    samples: int


def compact(samples: int) -> Compact:
    """The full eigenbasis of a layer whose factors come from at most so many samples, examples times positions.

    The eigenvectors of fewer samples than a side has dimensions are r = samples columns, and any orthonormal ones
    beside them: those that r Householder reflections leave. Kept as reflections, a product with the basis takes 4 d r
    operations a row in place of 2 d^2, a refresh a QR of the samples and an eigenvalue problem of r dimensions, and the
    state `2 d r + r^2` numbers in place of d^2. Nothing is left out, so that it may be stale, and the moment averaged.

    It takes `factor_decay=0`, and a refresh of more samples raises ValueError. A side of less than `2 samples`
    dimensions is full as it is, and so are lookup tables, layers with SUA and those whose gradients are taken as they
    are. A refresh solves as `eigh` does, in the dtype of `refresh`.
    """
    check_count("samples", samples)
    return Compact(samples)


Choice = Blocks | Rank | Thin | Compact
Choices = Mapping[str, Choice]  # by a pattern of the weight's name, as of a file's; the first that fits


def choose(layers: Sequence[Layer], choices: Choices) -> dict[str, Choice]:
    """The choice of each layer; the rows of a lookup table are diagonal in any case."""
    known = tuple((layer.weight, layer.sizes, layer.table, layer.rule is None) for layer in layers)
    return _choose(known, (dict(choices),))


@torch.compiler.assume_constant_result
def _choose(
    layers: tuple[tuple[str, tuple[int, int, int, int], bool, bool], ...], choices: tuple[dict[str, Choice]]
) -> dict[str, Choice]:
    chosen = {}
    for name, (_, o, i, k), table, as_it_is in layers:
        fits = (value for pattern, value in choices[0].items() if fnmatch.fnmatchcase(name, pattern))
        choice = next(fits, FULL)
        if isinstance(choice, Rank) and choice.r >= i - 1 and (table or choice.r >= o - 1):
            choice = FULL
        if isinstance(choice, Compact) and (table or as_it_is or k > 1 or 2 * choice.samples > max(o, i)):
            choice = FULL
        chosen[name] = choice._replace(outputs=1) if table and isinstance(choice, Blocks) else choice
    return chosen


def check_choices(choices: Choices) -> None:
    """bases: a mapping from patterns to choices of whole numbers."""
    for pattern, value in choices.items():
        if not isinstance(value, Blocks | Rank | Thin | Compact):
            raise TypeError(
                f"bases[{pattern!r}] is {value!r}: give FULL, DIAGONAL, blocks(max_dim), Blocks(...), rank(r), thin or "
                "compact(samples)"
            )
        for largest in value:
            if largest is not None:
                check_count(f"bases[{pattern!r}]", largest)


def check_patterns(argument: str, layers: Sequence[Layer], patterns: Iterable[str]) -> None:
    """Each pattern fits a layer."""
    names = [layer.weight for layer in layers]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"{argument} has a pattern {pattern!r} that fits no layer: they are {', '.join(names)}")


def side(dim: int, largest: int | None) -> tuple[int, ...]:
    """The shape of one side of a factor, of each b: whole `(d, d)` or in blocks `(m, d, d)`."""
    if largest is None or dim <= largest:
        return (dim, dim)
    m = -(-dim // largest)
    d = -(-dim // m)
    return (m, d, d)


def shapes(layer: Layer, choice: Choice) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of Q_A and Q_B as the state has them."""
    b, o, i, _ = layer.sizes
    match choice:
        case Blocks(inputs, outputs):
            return (b, *side(i, inputs)), (b, *side(o, outputs))
        case Rank(r):
            return (b, *_columns(i, r)), (b, *(side(o, 1) if layer.table else _columns(o, r)))
        case Thin():
            return (b, i, 0), (b, o, 0)
        case Compact():
            return (b, i, i), (b, o, o)


def _columns(dim: int, r: int) -> tuple[int, int]:
    return (dim, dim) if r >= dim - 1 else (dim, r + 1)


def factor_shapes(layer: Layer, choice: Choice, averaged: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of A and B as the state has them: none of a thin or compact layer, nor of a `rank(r)` one without an average."""
    if isinstance(choice, Thin | Compact) or (isinstance(choice, Rank) and not averaged):
        return (layer.sizes[0], 0, 0), (layer.sizes[0], 0, 0)
    A, B = shapes(layer, choice)
    return (*A[:-1], A[-2]), (*B[:-1], B[-2])


def moment_shape(layer: Layer, choice: Choice) -> tuple[int, int, int, int]:
    """`b O I k`."""
    b, _, _, k = layer.sizes
    A, B = shapes(layer, choice)
    O, I = (math.prod(Q[1:-2]) * Q[-1] for Q in (B, A))  # noqa: E741
    return (b, O, I, k)


def identity(layer: Layer, choice: Choice, like: Tensor) -> Basis:
    """The basis before the first refresh: the parameters' own coordinates, or where it is to be of some rank any."""
    return Basis(*(_start(shape, like, choice) for shape in shapes(layer, choice)))


def empty(layer: Layer, choice: Choice, like: Tensor) -> Basis:
    """A basis of the right shapes, for what reads no values."""

    def side_of(shape: tuple[int, ...]) -> Side:
        if _reflects(shape, choice):
            return _start(shape, like, choice)
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    return Basis(*map(side_of, shapes(layer, choice)))


def _reflects(shape: tuple[int, ...], choice: Choice) -> bool:
    return isinstance(choice, Compact) and 2 * choice.samples <= shape[-1]


def _start(shape: tuple[int, ...], like: Tensor, choice: Choice) -> Side:
    b, *between, rows, columns = shape
    if isinstance(choice, Compact) and _reflects(shape, choice):
        V, W = (torch.zeros(b, rows, choice.samples, dtype=like.dtype, device=like.device) for _ in range(2))
        return Reflections(V, W, torch.eye(choice.samples, dtype=like.dtype, device=like.device).repeat(b, 1, 1))
    if columns == rows or columns == 0:
        one = torch.eye(rows, columns, dtype=like.dtype, device=like.device)
        return one.repeat(b, *between, 1, 1)
    sketch = torch.randn(rows, columns - 1, dtype=torch.float64, generator=torch.Generator("cpu").manual_seed(0))
    U = torch.linalg.qr(sketch.to(like.dtype)).Q.to(like.device)
    return F.pad(U, (0, 1)).repeat(b, 1, 1)


class Refresh(NamedTuple):
    """How eigenbases are refreshed.

    solve: `(C, old basis, first) -> eigenvectors` of symmetric `[... d d]`, the largest entry of each 1; first is
        whether this is the first step, whose old basis says nothing.
    dtype: in which C is given to it; None is that of the state.
    of_samples: `x -> (eigenvectors, good)` of the factor `x^T x` of samples `[b samples d]` in the dtype of the state,
        the largest entry of each 1; good `[b 1 1]` is whether they are orthonormal. Without it solve has the factor.
    groups: of layers, refreshed at steps of their own.
    iterations: of the subspace iteration of `rank(r)` sides.
    """

    name: str
    solve: Callable[[Tensor, Tensor, bool], Tensor]
    dtype: torch.dtype | None = None
    groups: int = 1
    iterations: int = RANK_ITERATIONS
    of_samples: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None


def eigh(dtype: torch.dtype = torch.float64) -> Refresh:
    """The eigenvectors by `torch.linalg.eigh`, solved in float64 or float32; on a device without float64 in float32.

    Of a layer with `factor_decay=0` and fewer samples than dimensions (of a batch of 256; a linear layer of more inputs
    that is used once an example) they come from a QR of the samples and an eigenvalue problem in their span: the same
    eigenvectors, and any of the null space, for a small part of the time.
    """
    _check_dtype(dtype)
    return Refresh(
        "eigh",
        lambda C, old, first: eigenvectors(C),
        dtype,
        of_samples=lambda x: _of_samples(x, x.dtype if x.device.type == "mps" else dtype),
    )


def _of_samples(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Eigenvectors `[b d d]` of `x^T x`, ascending, and whether the solver found those in the span, `[b 1 1]`."""
    V, W, R = householder(x.mT)
    Q = torch.eye(x.shape[2], dtype=x.dtype, device=x.device) - V @ W.mT
    R = R.to(dtype)
    U = eigenvectors(R @ R.mT)
    k = R.shape[1]
    return torch.cat([Q[..., k:], Q[..., :k] @ U.to(x.dtype)], dim=-1), _orthonormal(U, x.dtype)


def qr(iterations: int = 1) -> Refresh:
    """Orthogonal iteration from the old basis, `Q <- qr(C Q)`, as in SOAP: https://arxiv.org/abs/2409.11321.

    In the dtype of the state. The columns are taken in descending order of `diag(Q^T C Q)`, in which the iteration
    converges, and put back: a coordinate goes on where it was. The first step is an `eigh`, since an iteration from
    the identity says little; where that step was skipped the iteration starts from the identity all the same.
    """
    check_count("iterations", iterations)

    def solve(C: Tensor, old: Tensor, first: bool) -> Tensor:
        if first:
            return eigenvectors(C)
        order = torch.einsum("...de,...dD,...eD->...D", C, old, old).argsort(-1, descending=True)
        Q = old.gather(-1, order[..., None, :].expand_as(old))
        for _ in range(iterations):
            Q = torch.linalg.qr(C @ Q).Q
        return Q.gather(-1, order.argsort(-1)[..., None, :].expand_as(Q))

    return Refresh("qr", solve, None, iterations=iterations)


def adaptive(tolerance: float, dtype: torch.dtype = torch.float64) -> Refresh:
    """`eigh(dtype)` of the factors that the old basis does not diagonalise, `||off-diagonal|| > tolerance ||C||`.

    The criterion of Eschenhagen et al. 2025, https://arxiv.org/abs/2506.03595, for each factor, or block of one, by
    itself; the others are not solved, for the price of one product `C Q`. Below 1e-3 it cannot be told in float32. On
    a GPU each decision is read back to the host. `rank(r)` sides are refreshed in any case.

    tolerance: between 0 and 1, of Frobenius norms.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r}: a share of the factor's norm, give 0 <= tolerance < 1")
    _check_dtype(dtype)
    share = float(tolerance)
    return Refresh("adaptive", lambda C, old, first: eigenvectors_where_due(C, old, share), dtype)


def staggered(groups: int, of: Refresh | None = None) -> Refresh:
    """Layers in groups of about equal cost that are refreshed one group after another: no step pays for all.

    Each layer is refreshed every `basis_every` steps; the groups `basis_every / groups` steps apart, from the first
    step on, which refreshes all layers. Between, a layer keeps its factors and basis, and its moment goes on.

    groups: from 2 to 4; each is a graph of a compiled step.
    of: how: `eigh()`, the default, `qr(iterations)` or `adaptive(tolerance)`.
    """
    check_count("groups", groups)
    if not 2 <= groups <= MAX_GROUPS:
        raise ValueError(f"groups={groups!r}: give 2 to {MAX_GROUPS}, since each is a graph of a compiled step")
    of = eigh() if of is None else of
    check_refresh("of", of)
    return of._replace(name=f"staggered {of.name}", groups=groups)


def check_refresh(argument: str, value: object) -> None:
    """Refuse what is no refresh."""
    if not isinstance(value, Refresh):
        raise TypeError(
            f"{argument}={value!r} is not a refresh: give eigh(), qr(iterations), adaptive(tolerance) or "
            "staggered(groups)"
        )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype!r}: give torch.float64 or torch.float32")


def due(layers: Mapping[str, Layer], how: Refresh, step: int, every: int) -> list[str]:
    """The layers that are refreshed at a step."""
    turn = step % every
    if how.groups == 1 or step == 0:
        return list(layers) if turn == 0 else []
    for group in range(how.groups):
        if turn == group * every // how.groups:
            names = _grouped(tuple((name, layer.sizes) for name, layer in layers.items()), how.groups)
            return names[group]
    return []


@torch.compiler.assume_constant_result
def _grouped(layers: tuple[tuple[str, tuple[int, int, int, int]], ...], groups: int) -> list[list[str]]:
    """The most expensive layer first, always to the group with the least work so far."""
    work, names = [0] * groups, [[] for _ in range(groups)]  # type: tuple[list[int], list[list[str]]]
    for name, (b, o, i, _) in sorted(layers, key=lambda layer: -layer[1][0] * (layer[1][1] ** 3 + layer[1][2] ** 3)):
        least = work.index(min(work))
        work[least] += b * (o**3 + i**3)
        names[least].append(name)
    return names


def check_samples(name: str, mean: Means, old: Basis) -> None:
    """Refuse more samples of a layer than its compact basis holds."""
    for C, Q in ((mean.A, old.Q_A), (mean.B, old.Q_B)):
        if isinstance(C, Gram) and isinstance(Q, Reflections) and C.x.shape[1] > Q.E.shape[-1]:
            raise ValueError(
                f"a refresh of {name!r} has {C.x.shape[1]} samples (examples times positions), its basis is "
                f"compact({Q.E.shape[-1]}): give compact({C.x.shape[1]}), fewer examples, or FULL"
            )


def refresh(
    factors: Factors | Means, old: Basis, how: Refresh | None = None, first: bool = True
) -> tuple[Basis, Tensor]:
    """Eigenvectors of both factors, and how many blocks `[]` kept their old ones because the solver failed."""
    how = eigh() if how is None else how
    Q_A, failed_A = _refresh(factors.A, old.Q_A, how, first)
    Q_B, failed_B = _refresh(factors.B, old.Q_B, how, first)
    return Basis(Q_A, Q_B), failed_A + failed_B


def _refresh(C: Factor, old: Side, how: Refresh, first: bool) -> tuple[Side, Tensor]:
    if isinstance(old, Reflections):
        assert isinstance(C, Gram)
        return _reflect(C.x, old, how)
    if outside(old):
        return _iterate(C, old, how.iterations + first)
    if isinstance(C, Gram) and how.of_samples is not None:
        return _where_good(*how.of_samples(_scaled(C.x)[0]), old)
    C = formed(C)
    dim = C.shape[-1]
    if dim <= 1:  # nothing to rotate
        return old, torch.zeros((), dtype=torch.int64, device=C.device)
    dtype = old.dtype if how.dtype is None or C.device.type == "mps" else how.dtype
    C, _ = _scaled(C.to(torch.promote_types(C.dtype, dtype)))
    C = C.to(dtype)
    Q = how.solve((C + C.mT) / 2, old.to(dtype) if how.dtype is None else old, first)
    return _where_good(Q, _orthonormal(Q, old.dtype), old)


def _where_good(Q: Tensor, good: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """The new eigenvectors, else the old ones; how many those are."""
    return torch.where(good, Q.to(old.dtype), old), (~good).sum()


def _reflect(x: Tensor, old: Reflections, how: Refresh) -> tuple[Reflections, Tensor]:
    """The eigenvectors of `x^T x` by reflections onto the span of the samples `[b samples d]`, and in it."""
    missing = old.E.shape[-1] - x.shape[1]
    V, W, R = householder(F.pad(_scaled(x)[0], (0, 0, 0, missing)).mT)
    R = R.to(x.dtype if how.dtype is None or x.device.type == "mps" else how.dtype)
    E = eigenvectors(R @ R.mT)
    good = _orthonormal(E, x.dtype)
    new = Reflections(V, W, E.to(x.dtype))
    return Reflections(*(torch.where(good, t, kept) for t, kept in zip(new, old, strict=True))), (~good).sum()


def _iterate(C: Factor, old: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors by subspace iteration from the old ones, in descending order."""
    x, largest = _scaled(C.x if isinstance(C, Gram) else (C + C.mT) / 2)
    U = old[..., :-1]
    for _ in range(iterations):
        U = torch.linalg.qr(_times(C, x, U)).Q
    T = (U.mT @ _times(C, x, U)).to(old.dtype if x.device.type == "mps" else torch.float64)
    W = eigenvectors((T + T.mT) / 2).flip(-1)
    U = U @ W.to(U.dtype)
    good = _orthonormal(U, old.dtype)
    nothing = largest == 0  # then the old basis is as good as any, and nothing failed
    return torch.where(good & ~nothing, F.pad(U, (0, 1)), old), (~good & ~nothing).sum()


def _times(C: Factor, x: Tensor, U: Tensor) -> Tensor:
    return x.mT @ (x @ U) if isinstance(C, Gram) else x @ U


def _scaled(C: Tensor) -> tuple[Tensor, Tensor]:
    """Finite, and with a largest entry of 1; and what that was, `[... 1 1]`."""
    C = torch.where(torch.isfinite(C), C, 0)
    largest = C.abs().amax((-2, -1), keepdim=True)
    return C / torch.where(largest > 0, largest, 1), largest


def _orthonormal(Q: Tensor, kept_in: torch.dtype) -> Tensor:
    """Whether `Q^T Q = I`, `[... 1 1]`; false for NaN."""
    error = (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)).abs().amax((-2, -1), keepdim=True)
    return error < max(ORTHONORMAL[Q.dtype], ORTHONORMAL[kept_in])


@torch.library.custom_op("ekfac_func::eigenvectors", mutates_args=())
def eigenvectors(C: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices `[... d d]`; NaN for those where the eigensolver raises.

    A custom operator, for an exception cannot be caught inside a compiled graph.
    """
    return _solved(C)


def _solved(C: Tensor) -> Tensor:
    try:
        return eigensolver(C)[1].contiguous()
    except RuntimeError:  # LinAlgError is one
        if C.dim() == 2:
            return torch.full_like(C, torch.nan)
        return torch.stack([_solved(c) for c in C]) if len(C) else torch.empty_like(C)


@eigenvectors.register_fake
def _(C: Tensor) -> Tensor:
    return torch.empty_like(C, memory_format=torch.contiguous_format)


@eigenvectors.register_vmap
def _(info: object, in_dims: tuple[int | None], C: Tensor) -> tuple[Tensor, int]:
    (dim,) = in_dims
    return eigenvectors(C.movedim(dim or 0, 0)), 0


@torch.library.custom_op("ekfac_func::eigenvectors_where_due", mutates_args=())
def eigenvectors_where_due(C: Tensor, old: Tensor, tolerance: float) -> Tensor:
    """`eigenvectors` of the matrices that the old ones do not diagonalise; the old ones of the others.

    A custom operator, for a decision on values would break a compiled graph, and `torch.where` saves no work.
    """
    return _solved_where_due(C, old, tolerance)


def _solved_where_due(C: Tensor, old: Tensor, tolerance: float) -> Tensor:
    if C.dim() > 2:
        each = [_solved_where_due(c, Q, tolerance) for c, Q in zip(C, old, strict=True)]
        return torch.stack(each) if each else torch.empty_like(C)
    D = C.to(old.dtype)
    on_diagonal, whole = (old * (D @ old)).sum(0).square().sum(), D.square().sum()
    if bool(whole - on_diagonal > tolerance**2 * whole):
        return _solved(C)
    return old.to(C.dtype, copy=True).contiguous()


@eigenvectors_where_due.register_fake
def _(C: Tensor, old: Tensor, tolerance: float) -> Tensor:
    return torch.empty_like(C, memory_format=torch.contiguous_format)


@eigenvectors_where_due.register_vmap
def _(
    info: object, in_dims: tuple[int | None, int | None, None], C: Tensor, old: Tensor, tolerance: float
) -> tuple[Tensor, int]:
    C, old = (t.movedim(dim, 0) if dim is not None else t[None] for t, dim in zip((C, old), in_dims[:2], strict=True))
    size = max(len(C), len(old))
    return eigenvectors_where_due(C.expand(size, *C.shape[1:]), old.expand(size, *old.shape[1:]), tolerance), 0


@torch.library.custom_op("ekfac_func::householder", mutates_args=())
def householder(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`X = (I - V W^T)[..., :k] R` of matrices `[b d m]`: V and W `[b d k]`, triangular R `[b k m]`, k = min(d, m).

    The Householder vectors V of a QR make the orthonormal `I - V T V^T`, and W is `V T^T`: Joffrain et al. 2006,
    https://doi.org/10.1145/1141885.1141886. A custom operator, for `torch.geqrf` has no rule under Dynamo.
    """
    V, tau = torch.geqrf(X)
    k = tau.shape[-1]
    R = V[:, :k].triu()
    one = torch.eye(X.shape[1], k, dtype=X.dtype, device=X.device)
    V = (V[..., :k].tril(-1) + one) * (tau != 0).to(X)[:, None]  # 0 where there was nothing to reflect
    inverse = (V.mT @ V).triu(1) + torch.diag_embed(1 / torch.where(tau == 0, 1, tau))
    return V, torch.linalg.solve_triangular(inverse, V.mT, upper=True).mT.contiguous(), R


@householder.register_fake
def _(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, d, m = X.shape
    k = min(d, m)
    return X.new_empty(b, d, k), X.new_empty(b, d, k), X.new_empty(b, k, m)


@householder.register_vmap
def _(info: object, in_dims: tuple[int | None], X: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    (dim,) = in_dims
    X = X.movedim(dim or 0, 0)
    return tuple(t.unflatten(0, X.shape[:2]) for t in householder(X.flatten(0, 1))), (0, 0, 0)
