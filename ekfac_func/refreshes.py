"""How eigenbases are refreshed, as values: finite and orthonormal even where a solver fails.

Each factor is cleaned, symmetrised, scaled by its largest entry and solved; one that fails keeps its old basis.
"""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

import functools
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from .basis import noise
from .checks import check_count
from .factors import formed
from .modes import where
from .products import outer
from .solvers import eigenvectors, eigenvectors_where_due, householder
from .types import Basis, Factor, Factors, Gram, Layer, Means, Reflections, Side, outside

MAX_GROUPS = 4  # each is a graph of its own, beside those of the first step and of no refresh
RANK_ITERATIONS = 1  # multiplications by the factor at a refresh of a rank(r) side, one more at the first step
LEAST_FRESH = 8  # columns beside those of a rank(r) side that an iteration starts from; r / 8 where that is more


class Refresh(NamedTuple):
    """How eigenbases are refreshed.

    solve: `(factors, old bases, first) -> eigenvectors` of symmetric matrices `[... d d]`, a list of all that are
        refreshed at a step, the largest entry of each 1; first is whether this is the first step, whose old bases say
        nothing. It returns orthonormal matrices, and NaN for what it could not solve.
    dtype: in which the factors are given to it; None is that of the state.
    groups: of layers, refreshed at steps of their own.
    iterations: of the subspace iteration of `rank(r)` sides.
    from_samples: whether a factor of fewer samples than dimensions is left to an eigenvalue problem in their span.
    """

    name: str
    solve: Callable[[list[Tensor], list[Tensor], bool], list[Tensor]]
    dtype: torch.dtype | None = None
    groups: int = 1
    iterations: int = RANK_ITERATIONS
    from_samples: bool = False


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype!r}: give torch.float64, torch.float32 or None")


def eigh(dtype: torch.dtype | None = None) -> Refresh:
    """The eigenvectors by `torch.linalg.eigh`, on a CPU of as many factors at a time as torch has threads.

    Of a side with `factor_decay=0` and fewer samples, examples times positions, than 0.7 of its dimensions (in a
    compiled step those of a batch of 256) they come from a QR of the samples and an eigenvalue problem in their span:
    the same eigenvectors, and any of the null space, for a small part of the time.

    dtype: torch.float64 or torch.float32; None is that of the state, and float64 for what float32 leaves not
        orthonormal. On a device without float64 it is float32.
    """
    _check_dtype(dtype)
    return Refresh("eigh", _anew, dtype, from_samples=True)


def _anew(factors: list[Tensor], old: list[Tensor], first: bool) -> list[Tensor]:
    return eigenvectors(factors)


EIGH = eigh()
"""The default of `refresh`."""


def qr(iterations: int = 1) -> Refresh:
    """Orthogonal iteration from the old basis, `Q <- qr(C Q)`, as in SOAP: https://arxiv.org/abs/2409.11321.

    In the dtype of the state. The columns are taken in descending order of `diag(Q^T C Q)`, in which the iteration
    converges, and put back: a coordinate goes on where it was. The first step is an `eigh`, since an iteration from
    the identity says little; where that step was skipped the iteration starts from the identity all the same.
    """
    check_count("iterations", iterations)
    return Refresh("qr", functools.partial(_iterated_from_old, iterations), None, iterations=iterations)


def _iterated_from_old(iterations: int, factors: list[Tensor], old: list[Tensor], first: bool) -> list[Tensor]:
    if first:
        return _anew(factors, old, first)
    found = []
    for C, old_Q in zip(factors, old, strict=True):
        order = torch.einsum("...de,...dD,...eD->...D", C, old_Q, old_Q).argsort(-1, descending=True)
        Q = old_Q.gather(-1, order[..., None, :].expand_as(old_Q))
        for _ in range(iterations):
            Q = torch.linalg.qr(C @ Q).Q
        found.append(Q.gather(-1, order.argsort(-1)[..., None, :].expand_as(Q)))
    return found


def adaptive(tolerance: float, dtype: torch.dtype | None = None) -> Refresh:
    """`eigh(dtype)` of the factors that the old basis does not diagonalise, `||off-diagonal|| > tolerance ||C||`.

    The criterion of Eschenhagen et al. 2025, https://arxiv.org/abs/2506.03595, for each factor, or block of one, by
    itself; the others are not solved, for the price of one product `C Q`. Below 1e-3 it cannot be told in float32. On
    a GPU each decision is read back to the host. `rank(r)` sides are refreshed in any case.

    tolerance: between 0 and 1, of Frobenius norms.
    dtype: as for `eigh`.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
        raise ValueError(
            f"tolerance={tolerance!r}: a share of the factor's norm, give a Python number, 0 <= tolerance < 1"
        )
    _check_dtype(dtype)
    return Refresh("adaptive", functools.partial(_where_due, float(tolerance)), dtype)


def _where_due(tolerance: float, factors: list[Tensor], old: list[Tensor], first: bool) -> list[Tensor]:
    return eigenvectors_where_due(factors, old, tolerance)


def staggered(groups: int, of: Refresh = EIGH) -> Refresh:
    """Layers in groups of about equal cost that are refreshed one group after another: no step pays for all.

    Each layer is refreshed every `basis_every` steps; the groups `basis_every / groups` steps apart, from the first
    step on, which refreshes all layers. Between, a layer keeps its factors and basis, and its moment goes on.

    groups: from 2 to 4. A compiled step has a graph for the first step, one for each group and one for no refresh,
        with `moment_every` up to twice as many, and as many again for a second batch size: where that is more than
        eight, raise `torch._dynamo.config.recompile_limit`.
    of: how: `eigh()`, the default, `qr(iterations)` or `adaptive(tolerance)`.
    """
    check_count("groups", groups)
    if not 2 <= groups <= MAX_GROUPS:
        raise ValueError(f"groups={groups!r}: give 2 to {MAX_GROUPS}, since each is a graph of a compiled step")
    check_refresh("of", of)
    return of._replace(name=f"staggered {of.name}", groups=groups)


def check_refresh(argument: str, value: object) -> None:
    """Refuse what is no refresh."""
    if not isinstance(value, Refresh):
        raise TypeError(
            f"{argument}={value!r} is not a refresh: give eigh(), qr(iterations), adaptive(tolerance) or "
            "staggered(groups)"
        )


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
    costs = {name: b * (o**3 + i**3) for name, (b, o, i, _) in layers}
    for name in sorted(costs, key=costs.__getitem__, reverse=True):
        least = work.index(min(work))
        work[least] += costs[name]
        names[least].append(name)
    return names


def check_samples(name: str, mean: Means, old: Basis) -> None:
    """Refuse more samples of a layer than its compact basis holds."""
    for C, Q in ((mean.A, old.Q_A), (mean.B, old.Q_B)):
        if isinstance(C, Gram) and isinstance(Q, Reflections) and C.x.shape[1] > Q.E.shape[-1]:
            raise ValueError(
                f"a refresh of {name!r} has {C.x.shape[1]} samples (examples times positions), its basis is "
                f"compact({Q.E.shape[-1]}): make the state by init with compact({C.x.shape[1]}) or FULL, or give fewer "
                "examples"
            )


class Problem(NamedTuple):
    """What a side of a layer asks of an eigensolver."""

    C: Tensor  # [... d d] symmetric, of entries near 1
    old: Tensor | None  # [... d d] its eigenvectors of last time; None of a problem in a span of its own
    side: Callable[[Tensor], Side]  # that its eigenvectors make
    wanted: Tensor | None = None  # [... 1 1] false where the old side will do


def refresh_bases(
    factors: Mapping[str, Factors | Means],
    old: Mapping[str, Basis],
    how: Refresh = EIGH,
    first: bool = True,
    anew: Collection[str] = (),
) -> tuple[dict[str, Basis], Tensor]:
    """Eigenvectors of both factors of each layer, and how many blocks `[]` kept their old ones because a solver failed.

    The problems of all layers are gathered, so that a solver may take several at a time. anew: the layers whose old
    basis says nothing of the new one, at any step.
    """
    sides = {name: list(old[name]) for name in factors}
    whole: list[tuple[str, int, Problem]] = []
    inner: list[tuple[str, int, Problem]] = []
    for name, of_layer in factors.items():
        for k, C in enumerate((of_layer.A, of_layer.B)):
            problem = _problem(C, old[name][k], how, first or name in anew)
            if problem is not None:
                (inner if problem.old is None or name in anew else whole).append((name, k, problem))
    solved: list[Tensor] = []
    if whole:
        solved += how.solve([p.C for *_, p in whole], [p.old for *_, p in whole if p.old is not None], first)
    if inner:
        solved += eigenvectors([p.C for *_, p in inner])
    kept = []
    for (name, k, problem), U in zip([*whole, *inner], solved, strict=True):
        good = torch.isfinite(U.sum((-2, -1), keepdim=True))  # what a solver returns is orthonormal or NaN
        taken, failed = (t if problem.wanted is None else t & problem.wanted for t in (good, ~good))
        sides[name][k] = pytree.tree_map(functools.partial(where, taken), problem.side(U), old[name][k])
        kept.append(failed.sum())
    if not kept:
        Q = next(iter(old.values())).Q_B
        kept.append((Q.V if isinstance(Q, Reflections) else Q).new_zeros((), dtype=torch.int64))
    return {name: Basis(*pair) for name, pair in sides.items()}, torch.stack(kept).sum()


def _problem(C: Factor, old: Side, how: Refresh, first: bool) -> Problem | None:
    """None where there is nothing to rotate."""
    if isinstance(old, Reflections):
        assert isinstance(C, Gram)
        return _reflected(C.x, old, how)
    if outside(old):
        return _iterated(C, old, how.iterations + first)
    if isinstance(C, Gram) and how.from_samples:
        return _spanned(C.x, how)
    C = formed(C)
    if C.shape[-1] <= 1:
        return None
    dtype = _solved_in(how, old)
    C, _ = scaled(C.to(torch.promote_types(C.dtype, dtype)))
    C = C.to(dtype)
    return Problem((C + C.mT) / 2, old, lambda U: U.to(old.dtype))


def _solved_in(how: Refresh, like: Tensor) -> torch.dtype:
    return like.dtype if how.dtype is None or like.device.type == "mps" else how.dtype


def _spanned(x: Tensor, how: Refresh) -> Problem:
    """The eigenvectors of `x^T x` of samples `[b samples d]`, ascending: any of the null space, then the others."""
    V, W, R = householder(scaled(x)[0].mT)
    k = R.shape[1]

    def side(U: Tensor) -> Tensor:
        U = U.to(x.dtype)
        Q = outer(-V.mT, torch.cat([W[:, k:].mT, W[:, :k].mT @ U], -1))  # outside of their span, and inside
        Q.diagonal(-k, -2, -1).add_(1)
        Q[:, :k, Q.shape[-1] - k :] += U
        return Q

    R = R.to(_solved_in(how, x))
    return Problem(R @ R.mT, None, side)


def _reflected(x: Tensor, old: Reflections, how: Refresh) -> Problem:
    """The eigenvectors of `x^T x` of samples `[b samples d]`, as reflections onto their span and a rotation in it."""
    missing = old.E.shape[-1] - x.shape[1]
    V, W, R = householder(F.pad(scaled(x)[0], (0, 0, 0, missing)).mT)
    R = R.to(_solved_in(how, x))
    return Problem(R @ R.mT, None, lambda E: Reflections(V, W, E.to(x.dtype)))


def _iterated(C: Factor, old: Tensor, iterations: int) -> Problem:
    """The leading eigenvectors in descending order, by subspace iteration from the old ones and a few fresh columns.

    The fresh columns find what the old ones have no part in: for other inputs than before all of `C U` may be zero.
    Where there are no more samples than columns the eigenvectors lie in the span of the samples, so that no iteration
    is needed; old columns fill up what room the samples leave.
    """
    x, largest = scaled(C.x if isinstance(C, Gram) else (C + C.mT) / 2)
    U, (d, r) = old[..., :-1], (old.shape[-2], old.shape[-1] - 1)
    beside, samples = min(max(LEAST_FRESH, r // 8), d - r), x.shape[-2]
    if isinstance(C, Gram) and not torch.compiler.is_compiling() and samples <= r + beside:
        U, R = torch.linalg.qr(torch.cat([x.mT, U[..., : max(r - samples, 0)]], -1))
        y = R[..., :samples].mT
    else:
        fresh = noise(d, beside, U)
        U = torch.cat([U, fresh - U @ (U.mT @ fresh)], -1)
        for _ in range(iterations):
            U = torch.linalg.qr(x.mT @ (x @ U) if isinstance(C, Gram) else x @ U).Q
        y = x @ U
    T = (y.mT @ y if isinstance(C, Gram) else U.mT @ y).to(old.dtype if x.device.type == "mps" else torch.float64)

    def side(W: Tensor) -> Tensor:
        return F.pad(U @ W.flip(-1)[..., :r].to(U.dtype), (0, 1))

    return Problem((T + T.mT) / 2, None, side, wanted=largest > 0)  # of zeros the old basis is as good as any


def scaled(C: Tensor) -> tuple[Tensor, Tensor]:
    """Finite, and with a largest entry of 1; and what that was, `[... 1 1]`."""
    C = torch.where(torch.isfinite(C), C, 0)
    largest = C.abs().amax((-2, -1), keepdim=True) if C.numel() else C.new_zeros(*C.shape[:-2], 1, 1)
    return C / torch.where(largest > 0, largest, 1), largest
