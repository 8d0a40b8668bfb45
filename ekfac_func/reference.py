"""The curvature without an approximation within its blocks, for small models: what an estimator is measured against.

A block is the curvature of one layer of one `b`, over its `d = o i k` coordinates in that order, row by row. Blocks are
formed from the same per-example gradients as the step's statistics, in float64; give float64 parameters and data for
gradients of that precision.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .blocking import MAX_BYTES, fitting
from .capture import capture
from .checks import check_batch, check_loss, check_params, check_positive, check_tree
from .discovery import checked_options
from .fisher import Fisher, Model, check_fisher, empirical
from .kronecker import count, dense, pack, unpack_all
from .rules import RULES, Rules
from .types import Batch, Factored, Layer, LossFn, Params, Terms

MAX_BLOCK_BYTES = 2 * 2**30  # of one layer's blocks


@dataclass(frozen=True)
class DenseBlocks:
    """A block-diagonal matrix over a tree like params."""

    layers: Mapping[str, Layer]
    matrices: dict[str, Tensor]  # [b d d] float64, by the name of the layer's weight

    def damped_inverse(self, damping: float) -> DenseBlocks:
        """`(F + damping I)^-1` block by block. damping: positive, in loss^2 / parameter^2."""
        check_positive("damping", damping)
        inverses = {name: torch.linalg.inv(F + damping * _eye(F)) for name, F in self.matrices.items()}
        return DenseBlocks(self.layers, inverses)

    def multiply(self, tree: Mapping[str, Tensor]) -> Params:
        """The matrix times a tree like params, or many, in the dtypes of the tree.

        KeyError, ValueError or TypeError for a tree that has not the names and shapes of params, or is not real.
        """
        check_tree(self.layers.values(), tree)
        products: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            v = pack(layer, tree)
            Fv = torch.einsum("bde,...be->...bd", self.matrices[name], v.flatten(-3).to(torch.float64))
            products[name] = Fv.reshape(v.shape)
        return unpack_all(self.layers.values(), products, tree)


@torch.no_grad()
def fisher_blocks(
    loss_fn: LossFn,
    params: Mapping[str, Tensor],
    batch: Batch,
    *,
    fisher: Fisher = empirical,
    rules: Rules = RULES,
    randomness: str = "different",
    chunk_size: int | None = None,
) -> DenseBlocks:
    """`F = mean_n vec(G[n]) vec(G[n])^T` of each layer, `[b d d]`.

    All arguments as in `ekfac`; the generalised Gauss-Newton matrix of a likelihood is its `exact` Fisher. Raises
    ValueError for a layer whose blocks need more than 2 GiB.
    """
    check_params(params)
    check_batch(batch)
    check_fisher(fisher)
    options = checked_options(rules, randomness, chunk_size, has_aux=False, batched=False)
    loss = loss_fn if fisher.loss is None else fisher.loss
    captured = capture(loss, params, fisher.examples(params, batch), options)
    matrices = {name: second_moment_block([captured.terms[name]], layer) for name, layer in captured.layers.items()}
    return DenseBlocks(captured.layers, matrices)


@torch.no_grad()
def ggn_blocks(
    model: Model,
    loss: Callable[[Tensor, Any], Tensor],
    params: Mapping[str, Tensor],
    batch: Batch,
    *,
    rules: Rules = RULES,
) -> DenseBlocks:
    """The generalised Gauss-Newton matrix `mean_n J[n]^T H[n] J[n]` of each layer, `[b d d]`, by the explicit product.

    model: `(params, example) -> output`, one tensor; J is its Jacobian.
    loss: `(output, example) -> scalar`; H is its Hessian w.r.t. the output.

    TypeError or ValueError where these return anything else.
    """
    check_params(params)
    n = check_batch(batch)
    options = checked_options(rules, "different", None, has_aux=False, batched=False)

    def element(params: Params, example: Any) -> Tensor:
        part, index = example
        return model(params, part).flatten().gather(0, index[None])[0]

    def hessian(example: Any) -> Tensor:
        output = model(dict(params), example)
        if not isinstance(output, Tensor):
            raise TypeError(f"model returned a {type(output).__name__}: return one tensor")

        def scalar(z: Tensor) -> Tensor:
            return check_loss(loss(z.reshape(output.shape), example), False, None)[0]

        return torch.func.hessian(scalar)(output.flatten())

    H = torch.func.vmap(hessian)(batch).to(torch.float64)  # [n e f]
    outputs = H.shape[1]
    index = torch.arange(outputs, device=H.device).repeat(n)
    each = pytree.tree_map(lambda leaf: leaf.repeat_interleave(outputs, 0), batch), index
    captured = capture(element, params, each, options)
    matrices = {}
    for name, layer in captured.layers.items():
        refuse_large(layer)
        J = dense(captured.terms[name]).to(torch.float64).flatten(2).unflatten(0, (n, outputs))  # [n e b d]
        matrices[name] = torch.einsum("nebp,nef,nfbq->bpq", J, H, J) / n
    return DenseBlocks(captured.layers, matrices)


class Exact(NamedTuple):
    """What is known of one layer's true blocks."""

    square_norm: Tensor  # [] squared Frobenius norm, summed over the blocks
    natural: Tensor | None  # [b o i k] of the damped inverse times a gradient, where it fits


def second_moment_block(batches: Sequence[Terms], layer: Layer) -> Tensor:
    """`mean_n vec(G[n]) vec(G[n])^T` over the examples of several batches, `[b d d]` in float64."""
    refuse_large(layer)
    total = functools.reduce(torch.add, (torch.einsum("nbd,nbe->bde", G, G) for G in _dense(batches)))
    return total / sum(map(count, batches))


def exact_block(batches: Sequence[Terms], layer: Layer, slope: Tensor, damping: float, limit: int) -> Exact:
    """The Frobenius norm of a layer's blocks and `(F + damping)^-1 slope`, from the smaller of two matrices.

    With N examples and d coordinates F has the nonzero eigenvalues of the Gram matrix of the per-example gradients
    over N, so `||F||^2 = sum_nm (G[n] . G[m])^2 / N^2`, and by Woodbury's identity
    `(F + damping)^-1 v = (v - G^T (N damping + G G^T)^-1 G v) / damping`.

    limit: the largest matrix that is solved; where both d and N exceed it there is a norm alone.
    """
    n = sum(map(count, batches))
    d = math.prod(layer.sizes[1:])
    v = slope.flatten(1).to(torch.float64)
    if d <= min(n, limit):
        F = second_moment_block(batches, layer)
        return Exact(F.square().sum(), torch.linalg.solve(F + damping * _eye(F), v).reshape(slope.shape))
    if n > limit:
        pairs = itertools.combinations_with_replacement(range(len(batches)), 2)
        squares = [gram(batches[j], batches[k]).square().sum() * (1 if j == k else 2) for j, k in pairs]
        return Exact(torch.stack(squares).sum() / n**2, None)
    K = torch.cat([torch.cat([gram(x, y) for y in batches], dim=2) for x in batches], dim=1)  # [b n n]
    Gv = [torch.einsum("nbd,bd->bn", G, v) for G in _dense(batches)]
    weights = torch.linalg.solve(K + n * damping * _eye(K), torch.cat(Gv, dim=1)).split([x.shape[1] for x in Gv], 1)
    parts = (torch.einsum("nbd,bn->bd", G, w) for G, w in zip(_dense(batches), weights, strict=True))
    back = functools.reduce(torch.add, parts)
    return Exact(K.square().sum() / n**2, ((v - back) / damping).reshape(slope.shape))


def gram(x: Terms, y: Terms) -> Tensor:
    """`G_x[n] . G_y[m]` of each block, `[b n m]` in float64; from pairs of positions where that is less work."""
    match x, y:
        case (Factored() as one,), (Factored() as other,):
            s, i, k = one.a.shape[2:]
            o, t = one.g.shape[3], other.g.shape[2]
            if s * t * (i * k + o) <= o * i * k:
                a = torch.einsum("nbsik,mbtik->bnmst", one.inputs.double(), other.inputs.double())
                g = torch.einsum("nbso,mbto->bnmst", one.g.double(), other.g.double())
                return torch.einsum("bnmst,bnmst->bnm", a, g)
    rows = [torch.cat([torch.einsum("nbd,mbd->bnm", G, H) for H in _dense([y])], dim=2) for G in _dense([x])]
    return torch.cat(rows, dim=1)


def part(terms: Terms, start: int, stop: int) -> Terms:
    """The examples from start up to stop."""
    return pytree.tree_map(lambda leaf: leaf[start:stop] if isinstance(leaf, Tensor) else leaf, terms)


def _dense(batches: Sequence[Terms]) -> Iterator[Tensor]:
    """Per-example gradients `[n b d]` in float64, a few examples at a time."""
    for terms in batches:
        size = fitting(8 * dense(part(terms, 0, 1)).numel(), MAX_BYTES)
        for start in range(0, count(terms), size):
            yield dense(part(terms, start, start + size)).flatten(2).to(torch.float64)


def _eye(F: Tensor) -> Tensor:
    return torch.eye(F.shape[-1], dtype=F.dtype, device=F.device)


def refuse_large(layer: Layer) -> None:
    """Raise ValueError for blocks that need more than MAX_BLOCK_BYTES."""
    b, d = layer.sizes[0], math.prod(layer.sizes[1:])
    if 8 * b * d * d > MAX_BLOCK_BYTES:
        raise ValueError(
            f"the blocks of {layer.weight!r} have shape {(b, d, d)} and need {8 * b * d * d / 2**30:.1f} GiB in "
            "float64: this is for small models, use compare, which does not form them"
        )
