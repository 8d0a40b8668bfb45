"""Eigenbases of Kronecker factors: always finite and orthonormal, also where the eigensolver fails.

`torch.linalg.eigh` can return NaN eigenvectors without an error, or raise. So each factor is cleaned, symmetrised,
scaled by its largest entry, solved in float64, and the result tested; a factor that fails keeps its old basis.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_count
from .types import Basis, Factors, Layer

eigensolver = torch.linalg.eigh  # replaceable, so that tests can make it fail on any machine

ORTHONORMAL = 1e-6  # largest entry of |Q^T Q - I| of a good basis, in float64


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

Choices = Mapping[str, Blocks]  # by a pattern of the weight's name, as of a file's; the first that fits


def blocks(max_dim: int) -> Blocks:
    """Both sides in blocks of at most max_dim."""
    check_count("max_dim", max_dim)
    return Blocks(max_dim, max_dim)


def choose(layers: Sequence[Layer], choices: Choices) -> dict[str, Blocks]:
    """The blocks of each layer; the rows of a lookup table are diagonal in any case."""
    return _choose(tuple((layer.weight, layer.table) for layer in layers), (dict(choices),))


@torch.compiler.assume_constant_result
def _choose(layers: tuple[tuple[str, bool], ...], choices: tuple[dict[str, Blocks]]) -> dict[str, Blocks]:
    chosen = {}
    for name, table in layers:
        fits = (value for pattern, value in choices[0].items() if fnmatch.fnmatchcase(name, pattern))
        blocks = next(fits, FULL)
        chosen[name] = blocks._replace(outputs=1) if table else blocks
    return chosen


def check_choices(choices: Choices) -> None:
    """bases: a mapping from patterns to `Blocks` of whole numbers."""
    for pattern, value in choices.items():
        if not isinstance(value, Blocks):
            raise TypeError(f"bases[{pattern!r}] is {value!r}: give FULL, DIAGONAL, blocks(max_dim) or Blocks(...)")
        for largest in value:
            if largest is not None:
                check_count(f"bases[{pattern!r}]", largest)


def check_patterns(layers: Sequence[Layer], choices: Choices) -> None:
    """bases: each pattern fits a layer."""
    names = [layer.weight for layer in layers]
    for pattern in choices:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"bases has a pattern {pattern!r} that fits no layer: they are {', '.join(names)}")


def side(dim: int, largest: int | None) -> tuple[int, ...]:
    """The shape of one side of a factor, of each b: whole `(d, d)` or in blocks `(m, d, d)`."""
    if largest is None or dim <= largest:
        return (dim, dim)
    m = -(-dim // largest)
    d = -(-dim // m)
    return (m, d, d)


def identity(sizes: tuple[int, int, int, int], chosen: Blocks, like: Tensor) -> Basis:
    """The basis before the first refresh: the parameters' own coordinates."""
    b, o, i, _ = sizes

    def eye(dim: int, largest: int | None) -> Tensor:
        shape = side(dim, largest)
        one = torch.eye(shape[-1], dtype=like.dtype, device=like.device)
        return one.repeat(b, *shape[:-2], 1, 1)

    return Basis(eye(i, chosen.inputs), eye(o, chosen.outputs))


def moment_shape(layer: Layer, chosen: Blocks) -> tuple[int, int, int, int]:
    """`b O I k`."""
    b, o, i, k = layer.sizes
    return (b, math.prod(side(o, chosen.outputs)[:-1]), math.prod(side(i, chosen.inputs)[:-1]), k)


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
