"""Eigensolvers and a QR, as operators that a graph takes as they are.

`torch.linalg.eigh` can return NaN eigenvectors without an error, or raise. So what it finds is tested.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .modes import one_by_one

READS_BACK = (torch.Tag.cudagraph_unsafe,)  # an eigensolver's host looks at what it found

eigensolver = torch.linalg.eigh  # replaceable, so that tests can make it fail on any machine

ORTHONORMAL = {torch.float64: 1e-6, torch.float32: 1e-4}  # largest entry of |Q^T Q - I| of a good basis, as solved
PROBES = 8  # vectors on which orthonormality is tried, in place of a product of a fifth of the solver's time
LARGE = 96  # dimensions from which on a thread of its own pays for a matrix


def _unfilled(factors: Sequence[Tensor], *rest: object) -> list[Tensor]:
    """Room for what an operator finds of each factor."""
    return [torch.empty_like(C, memory_format=torch.contiguous_format) for C in factors]


@torch.library.custom_op("ekfac_func::eigenvectors", mutates_args=(), tags=READS_BACK)
def eigenvectors(factors: Sequence[Tensor]) -> list[Tensor]:
    """Orthonormal eigenvectors of symmetric matrices `[... d d]`; NaN for those where the eigensolver fails.

    On a CPU each large matrix has a thread of its own: one by one they keep only one of them busy all the time. A
    custom operator, for an exception cannot be caught inside a compiled graph.
    """
    found = _unfilled(factors)
    alone, apart = [], []
    for C, U in zip(factors, found, strict=True):
        if C.device.type == "cpu" and C.shape[-1] >= LARGE:
            apart += list(zip(C.reshape(-1, *C.shape[-2:]), U.view(-1, *C.shape[-2:]), strict=True))
        else:
            alone.append((C, U))
    apart.sort(key=_work, reverse=True)
    threads, rest = torch.get_num_threads(), sum(map(_work, apart))
    while apart and (threads == 1 or _work(apart[0]) * threads > rest):  # what outweighs the others takes every thread
        rest -= _work(apart[0])
        alone.append(apart.pop(0))
    for task in alone:
        _solve(task)
    if apart:
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(_solve, apart))
        finally:
            torch.set_num_threads(threads)  # this thread kept its number, but new ones inherit the last that was set
    return found


def _work(task: tuple[Tensor, Tensor]) -> int:
    return task[0].shape[-1] ** 3 * task[0].element_size()


def _solve(task: tuple[Tensor, Tensor]) -> None:
    C, U = task
    U.copy_(_solved(C))


def _solved(C: Tensor) -> Tensor:
    """NaN where the solver raises or gives what is not orthonormal, in float64 too."""
    if C.numel() == 0:
        return C
    try:
        U = eigensolver(C)[1]
    except RuntimeError:  # LinAlgError is one
        U = torch.full_like(C, torch.nan)
    if _orthonormal(U):
        return U
    if C.dim() > 2:
        return torch.stack([_solved(c) for c in C])
    if C.dtype is torch.float32 and C.device.type != "mps":
        return _solved(C.double()).to(C.dtype)
    return torch.full_like(C, torch.nan)


def _orthonormal(Q: Tensor) -> bool:
    """Whether `Q^T Q = I` for every matrix, on a few vectors of equal entries with signs at random; false for NaN."""
    d = Q.shape[-1]
    signs = torch.randint(2, (d, PROBES), generator=torch.Generator().manual_seed(d)).to(Q) * 2 - 1
    error = (Q.mT @ (Q @ signs) - signs).abs().max()
    return bool(error < ORTHONORMAL[Q.dtype] * max(1, d / 64) ** 0.5)


eigenvectors.register_fake(_unfilled)


@eigenvectors.register_vmap
def _(
    info: object, in_dims: tuple[list[int | None]], factors: Sequence[Tensor]
) -> tuple[list[Tensor], list[int | None]]:
    first = [C if dim is None else C.movedim(dim, 0) for C, dim in zip(factors, in_dims[0], strict=True)]
    return eigenvectors(first), [dim and 0 for dim in in_dims[0]]


@torch.library.custom_op("ekfac_func::eigenvectors_where_due", mutates_args=(), tags=READS_BACK)
def eigenvectors_where_due(factors: Sequence[Tensor], old: Sequence[Tensor], tolerance: float) -> list[Tensor]:
    """`eigenvectors` of the matrices that the old ones do not diagonalise; the old ones for the others.

    A custom operator, for a decision on values would break a compiled graph, and `torch.where` saves no work.
    """
    kept = [Q.to(C.dtype, copy=True).contiguous() for C, Q in zip(factors, old, strict=True)]
    due = []
    for C, Q, kept_Q in zip(factors, old, kept, strict=True):
        for c, q, kept_q in zip(*(t.reshape(-1, *t.shape[-2:]) for t in (C, Q, kept_Q)), strict=True):
            D = c.to(q.dtype)
            on_diagonal, whole = (q * (D @ q)).sum(0).square().sum(), D.square().sum()
            if bool(whole - on_diagonal > tolerance**2 * whole):
                due.append((c, kept_q))
    for (_, kept_q), U in zip(due, eigenvectors([c for c, _ in due]), strict=True):
        kept_q.copy_(U)
    return kept


eigenvectors_where_due.register_fake(_unfilled)
eigenvectors_where_due.register_vmap(one_by_one(eigenvectors_where_due))


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
