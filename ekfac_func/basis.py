"""Eigenbases of Kronecker factors: always finite and orthonormal, also where the eigensolver fails.

`torch.linalg.eigh` can return NaN eigenvectors without an error, or raise. So each factor is cleaned, symmetrised,
scaled by its largest entry, solved in float64, and the result tested; a factor that fails keeps its old basis.
"""

import torch
from torch import Tensor

from .types import Basis, Factors

eigensolver = torch.linalg.eigh  # replaceable, so that tests can make it fail on any machine

ORTHONORMAL = 1e-6  # largest entry of |Q^T Q - I| of a good basis, in float64


def identity(b: int, o: int, i: int, like: Tensor) -> Basis:
    """The basis before the first refresh: the parameters' own coordinates."""

    def eye(dim: int) -> Tensor:
        return torch.eye(dim, dtype=like.dtype, device=like.device).repeat(b, 1, 1)

    return Basis(eye(i), eye(o))


def refresh(factors: Factors, old: Basis) -> tuple[Basis, Tensor]:
    """Eigenvectors of both factors, and how many blocks `[]` kept their old ones because the eigensolver failed."""
    Q_A, failed_A = _refresh(factors.A, old.Q_A)
    Q_B, failed_B = _refresh(factors.B, old.Q_B)
    return Basis(Q_A, Q_B), failed_A + failed_B


def _refresh(C: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    dim = C.shape[-1]
    if dim <= 1:  # nothing to rotate
        return old, torch.zeros((), dtype=torch.int64, device=C.device)
    C = torch.where(torch.isfinite(C), C, 0).to(_solve_dtype(C))
    largest = C.abs().amax((-2, -1), keepdim=True)
    C = C / torch.where(largest > 0, largest, 1)
    Q = eigenvectors((C + C.mT) / 2)
    error = (Q.mT @ Q - torch.eye(dim, dtype=Q.dtype, device=Q.device)).abs().amax((-2, -1), keepdim=True)
    good = error < ORTHONORMAL  # false for NaN
    return torch.where(good, Q.to(old.dtype), old), (~good).sum()


def _solve_dtype(C: Tensor) -> torch.dtype:
    return C.dtype if C.device.type == "mps" else torch.float64


@torch.library.custom_op("ekfac_func::eigenvectors", mutates_args=())
def eigenvectors(C: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices `[... d d]`; NaN for those where the eigensolver raises.

    A custom operator, for an exception cannot be caught inside a compiled graph.
    """
    try:
        return eigensolver(C)[1].contiguous()
    except RuntimeError:  # LinAlgError is one
        if C.dim() == 2:
            return torch.full_like(C, torch.nan)
        return torch.stack([eigenvectors(c) for c in C]) if len(C) else torch.empty_like(C)


@eigenvectors.register_fake
def _(C: Tensor) -> Tensor:
    return torch.empty_like(C, memory_format=torch.contiguous_format)


@eigenvectors.register_vmap
def _(info: object, in_dims: tuple[int | None], C: Tensor) -> tuple[Tensor, int]:
    (dim,) = in_dims
    return eigenvectors(C.movedim(dim or 0, 0)), 0
