"""How much of each Kronecker factor's eigenbasis is kept, as values, and the shapes that follow."""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

import fnmatch
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_count
from .types import Basis, Factors, Layer, Moment, Reflections, Side, outside

LARGE = 8192  # dimensions of a basis, above which a warning says what it takes
PRIME, FIRST = 2_097_143, 1_234_567  # the cube of PRIME is an int64; from FIRST on cubes modulo it have no order


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
    Halko, Martinsson & Tropp 2011, https://arxiv.org/abs/0909.4061. It starts from a matrix without order, the same
    every time, orthonormalised; every iteration has `max(8, r / 8)` columns more, orthogonal to the old ones, for what
    these have no part in.

    With `factor_decay=0` the state keeps no factor, and none is formed but that of a convolution's patches: `C U` is
    `X^T (X U)` of the samples X. An average needs it in full, `[i i]`, and so do several processes. No more samples
    than all these columns are not iterated but, outside of graphs, orthonormalised themselves, and their eigenvectors
    exact. Of fewer than r the basis holds them all (in graphs and of formed factors after a few refreshes where they
    are others than before), and the rest of its columns is arbitrary, as the null space of a full basis is. The rows of
    a lookup table stay diagonal. A side of no more than r + 1 dimensions is full: a complement of one dimension is a
    direction like any other.
    """
    check_count("r", r)
    return Rank(r)


class Thin(NamedTuple):
    """The span of the batch's samples, a choice of `bases`; its one value is `thin`."""


thin = Thin()
"""The eigenvectors in the span of the batch's own samples, outside of which its gradients and factors are zero.

The natural gradient is that of the full basis (where eigenvalues are equal, of one of those that are right), for the
price of a QR of the samples `[n s, i]` and an eigenvalue problem of n s dimensions in place of i. It is exact for the
batch that made the basis, so that it takes `basis_every=1`, `factor_decay=0` and an estimator that carries nothing from
step to step (`intra_batch`, `centred`, `kfac`); it is solved as `eigh` does, whatever `refresh` is. A side with
`n s >= i` is full, and so are one whose factor has samples of its own (SUA) and one of gradients that are taken as they
are. With `weight_sharing=reduce`, whose factor has fewer samples than the gradients, a null space stays within the
span, where bases that are all right differ.

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


def choose(layers: Iterable[Layer], choices: Choices) -> dict[str, Choice]:
    """The choice of each layer; `FULL` where that of its pattern leaves nothing out or does not apply."""
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
        chosen[name] = choice._replace()  # a copy: Dynamo cannot guard that a constant is the same object as a global
    return chosen


def check_choices(choices: Choices) -> None:
    """bases: a mapping from patterns to choices of whole numbers."""
    if not isinstance(choices, Mapping):
        raise TypeError(f"bases is {choices!r}: give a dict from patterns of names to choices, as {{'*': rank(8)}}")
    for pattern, value in choices.items():
        if not isinstance(pattern, str):
            raise TypeError(f"bases has the pattern {pattern!r}: give a string, as of a file's name")
        if not isinstance(value, Blocks | Rank | Thin | Compact):
            raise TypeError(
                f"bases[{pattern!r}] is {value!r}: give FULL, DIAGONAL, blocks(max_dim), Blocks(...), rank(r), thin or "
                "compact(samples)"
            )
        for largest in value:
            if largest is not None:
                check_count(f"bases[{pattern!r}]", largest)


def check_patterns(argument: str, layers: Iterable[Layer], patterns: Iterable[str]) -> None:
    """Each pattern fits a layer."""
    names = [layer.weight for layer in layers]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{argument} has a pattern {pattern!r} that fits no layer: they are {', '.join(names)}")


def warn_of_large(layers: Sequence[Layer], chosen: Mapping[str, Choice]) -> None:
    """Name the sides whose eigendecomposition takes minutes."""
    for layer in layers:
        choice = chosen[layer.weight]
        for which, (*_, rows, columns) in zip(("inputs", "outputs"), shapes(layer, choice), strict=True):
            if rows == columns > LARGE and not _reflects((rows, columns), choice):
                warnings.warn(
                    f"{layer.weight!r} has a basis of {rows} dimensions for its {which}: it and its factor take "
                    f"{rows**2 * 4 / 2**30:.1f} GiB each in float32, and a refresh {(rows / 4096) ** 3:.0f} times as "
                    f"long as of 4096. Give bases={{{layer.weight!r}: rank(256)}}, or Blocks({which}=1), which leaves "
                    "that side in its own coordinates",
                    stacklevel=3,
                )


def side(dim: int, largest: int | None) -> tuple[int, ...]:
    """The shape of one side of a factor, of each b: whole `(d, d)` or in blocks `(m, d, d)`."""
    if largest is None or dim <= largest:
        return (dim, dim)
    m = -(-dim // largest)
    d = -(-dim // m)
    return (m, d, d)


def shapes(layer: Layer, choice: Choice) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of Q_A and Q_B as the state has them. The rows of a lookup table are diagonal in any case."""
    b, o, i, _ = layer.sizes
    match choice:
        case Blocks(inputs=inputs, outputs=outputs):
            return (b, *side(i, inputs)), (b, *side(o, 1 if layer.table else outputs))
        case Rank(r=r):
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
    """The basis before the first refresh: the parameters' own coordinates; of a side of some rank any columns."""
    return Basis(*(_identity(shape, like, choice) for shape in shapes(layer, choice)))


def start(layer: Layer, choice: Choice, zero: Tensor, averaged: bool) -> tuple[Factors, Basis, Moment]:
    """What the state has of a layer before the first refresh: zero statistics, and `identity`."""
    A, B = factor_shapes(layer, choice, averaged)
    factors = Factors(zero.new_zeros(A), zero.new_zeros(B), zero)
    return factors, identity(layer, choice, zero), Moment(zero.new_zeros(moment_shape(layer, choice)), zero.clone())


def without_values(layer: Layer, choice: Choice) -> Basis:
    """A basis of the right shapes, on the device without memory."""
    return identity(layer, choice, torch.empty(0, dtype=torch.float32, device="meta"))


def _reflects(shape: tuple[int, ...], choice: Choice) -> bool:
    return isinstance(choice, Compact) and 2 * choice.samples <= shape[-1]


def _identity(shape: tuple[int, ...], like: Tensor, choice: Choice) -> Side:
    b, *between, rows, columns = shape
    if isinstance(choice, Compact) and _reflects(shape, choice):
        V, W = (torch.zeros(b, rows, choice.samples, dtype=like.dtype, device=like.device) for _ in range(2))
        return Reflections(V, W, torch.eye(choice.samples, dtype=like.dtype, device=like.device).repeat(b, 1, 1))
    if columns == rows or columns == 0:
        one = torch.eye(rows, columns, dtype=like.dtype, device=like.device)
        return one.repeat(b, *between, 1, 1)
    return F.pad(torch.linalg.qr(noise(rows, columns - 1, like, PRIME // 2)).Q, (0, 1)).repeat(b, 1, 1)


def noise(d: int, columns: int, like: Tensor, skipped: int = 0) -> Tensor:
    """`[d columns]` in [-1, 1], the same every time: cubes modulo a prime, for no graph or `vmap` takes a generator.

    skipped: how many numbers of the sequence to leave out, for a matrix that shares none with another.
    """
    k = (torch.arange(d * columns, device=like.device) + FIRST + skipped) % PRIME
    return (2 * (k**3 % PRIME).to(like.dtype) / PRIME - 1).reshape(d, columns)


def counts(basis: Basis, like: Tensor) -> Tensor:
    """How many coordinates of a layer each entry of its moment stands for, `[O I]`."""
    in_A, in_B = (_counts(Q, like) for Q in basis)
    return in_B[:, None] * in_A


def _counts(Q: Side, like: Tensor) -> Tensor:
    columns = Q.shape[-1] if Q.dim() == 3 else Q.shape[1] * Q.shape[-1]
    one = like.new_ones(columns)
    return torch.cat([one[:-1], one[:1] * outside(Q)]) if outside(Q) else one


def fills_up(basis: Basis, layer: Layer) -> bool:
    """Whether a side is in blocks of which the last is filled up."""
    sides = (basis.Q_A, layer.sizes[2]), (basis.Q_B, layer.sizes[1])
    return any(Q.dim() > 3 and Q.shape[1] * Q.shape[-1] > d for Q, d in sides)


def real(basis: Basis, layer: Layer) -> Tensor:
    """`[b O I 1]` bool: coordinates whose direction lies in the layer, not in what fills up the last block of a side.

    The factors are zero there, so that an eigenvector lies in the one or in the other.
    """
    _, o, i, _ = layer.sizes
    inside = [_length_inside(Q, size) > 0.5 for Q, size in ((basis.Q_B, o), (basis.Q_A, i))]
    return (inside[0][:, :, None] & inside[1][:, None, :])[..., None]


def _length_inside(Q: Side, size: int) -> Tensor:
    """`[b D]`: the squared length of each column of a side within the side's first entries."""
    if isinstance(Q, Reflections) or Q.dim() == 3:
        like = Q.V if isinstance(Q, Reflections) else Q
        return like.new_ones(Q.shape[0], Q.shape[-1])
    b, m, d = Q.shape[:3]
    within = (torch.arange(m * d, device=Q.device) < size).reshape(m, d, 1)
    return (Q.square() * within).sum(-2).reshape(b, -1)
