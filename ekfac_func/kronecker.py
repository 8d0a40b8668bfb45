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
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocking import in_blocks
from .memory import Rooms
from .modes import where
from .patches import Patches
from .products import outer, rotate
from .types import (
    Basis,
    Dense,
    Factored,
    Layer,
    OneHot,
    Params,
    Reflections,
    Side,
    Term,
    Terms,
    is_matrix,
    statistics_dtype,
)


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
    if isinstance(term, Dense):
        return term.G.square().sum((1, 2, 3, 4))
    n, b, s, i, k = term.a.shape
    o = term.g.shape[3]
    if s * (i * k + o) <= o * i * k:
        g, a = common_first(term.g, term.inputs)
        pairs_a = torch.einsum("nbsik,nbtik->nbst", a, a)
        pairs_g = torch.einsum("nbso,nbto->nbst", g, g)
        return torch.einsum("nbst,nbst->n", pairs_a, pairs_g)
    blocks = zip(in_blocks(term.g, b * o * i * k), in_blocks(term.a, b * o * i * k), strict=True)
    return torch.cat([_dense(Factored(a, g)).square().sum((1, 2, 3, 4)) for g, a in blocks])[:n]


def as_blocks(x: Tensor, Q: Side, axis: int) -> Tensor:
    """An axis, counted from the right, as `m d` for the blocks of a side of the basis, filled up with zeros."""
    axis += x.dim()
    if Q.dim() == 3:
        return x.unsqueeze(axis)
    m, d = Q.shape[1:3]
    missing = m * d - x.shape[axis]
    if missing:
        x = F.pad(x, [0, 0] * (x.dim() - 1 - axis) + [0, missing])
    return x.reshape(*x.shape[:axis], m, d, *x.shape[axis + 1 :])


def _turn(x: Tensor, Q: Tensor, equation: str, axis: int) -> Tensor:
    """An axis, counted from the right, times a side of the basis. Blocks of one dimension have nothing to rotate."""
    if Q.shape[-1] == 1:
        return x
    y = torch.einsum(equation, as_blocks(x, Q, axis), Q.unsqueeze(1) if Q.dim() == 3 else Q)
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
