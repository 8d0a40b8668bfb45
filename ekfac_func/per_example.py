"""Per-example gradients in their own right, and their second moments."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capture import Captured, Reading, capture, fold
from .checks import check_batch, check_params
from .contraction import exact_squares
from .discovery import checked_options
from .kronecker import dense, gradient, square_norms, unpack, unpack_all
from .modes import transformed
from .orders import DEFAULT_CONTRACTIONS, Contractions, check_contractions, contraction_of
from .rules import RULES, Rules
from .types import Basis, Batch, Dense, Layer, LossAuxFn, LossFn, Params, Terms, outside


@dataclass(frozen=True)
class PerExampleGradients:
    """Gradients of each example's loss, kept as factors where a rule knows them."""

    captured: Captured
    params: Mapping[str, Tensor]

    @property
    def losses(self) -> Tensor:
        """`[n]`."""
        return self.captured.losses

    @property
    def aux(self) -> Any:
        """What the loss returned beside, with `has_aux`."""
        return self.captured.aux

    def dense(self, name: str) -> Tensor:
        """`[n, *param.shape]` of one parameter. KeyError if params has no such name."""
        if name not in self.params:
            raise KeyError(f"{name!r} is not in params: it has {', '.join(map(repr, self.params))}")
        layer = next(layer for layer in self.captured.layers.values() if name in (layer.weight, layer.bias))
        terms = self.captured.terms[layer.weight]
        G = dense(terms)
        own = G.clone() if any(isinstance(term, Dense) for term in terms) else G
        return unpack(layer, own, self.params)[name]

    def mean(self) -> Params:
        """Mean over the examples, a tree like params."""
        means = {name: gradient(terms) / len(self.losses) for name, terms in self.captured.terms.items()}
        return unpack_all(self.captured.layers.values(), means, self.params)

    def norms(self) -> Tensor:
        """Euclidean norm over all parameters of each example's gradient, `[n]`.

        Where it is less work they are summed over pairs of positions. If the positions of an example nearly cancel, in
        more than what they have in common, that is exact to the root of the dtype's precision; `dense` loses nothing.
        """
        squares = [square_norms(term) for term in self.captured.terms.values()]
        return torch.stack([square.to(self.losses.dtype) for square in squares]).sum(0).sqrt()


@torch.no_grad()
def per_example_gradients(
    loss_fn: LossFn | LossAuxFn,
    params: Mapping[str, Tensor],
    batch: Batch,
    *,
    rules: Rules = RULES,
    has_aux: bool = False,
    batched: bool = False,
    randomness: str = "different",
    chunk_size: int | None = None,
) -> PerExampleGradients:
    """Exact gradients of `loss_fn(params, example)` for every example of the batch.

    loss_fn, params, batch and the options as in `ekfac`. Exact for every parameter that
    `torch.autograd.grad` in a loop over the examples can differentiate.
    """
    options = checked_options(rules, randomness, chunk_size, has_aux, batched)
    check_params(params)
    check_batch(batch)
    return PerExampleGradients(capture(loss_fn, params, batch, options), params)


@torch.no_grad()
def second_moments(
    loss_fn: LossFn | LossAuxFn,
    params: Mapping[str, Tensor],
    batch: Batch,
    bases: Mapping[str, Basis],
    *,
    rules: Rules = RULES,
    has_aux: bool = False,
    batched: bool = False,
    randomness: str = "different",
    chunk_size: int | None = None,
    contractions: Contractions = DEFAULT_CONTRACTIONS,
) -> dict[str, Tensor]:
    """The exact second moments of a batch in known bases: `mean_n (Q_B^T G[n] Q_A)^2`, `[b O I k]`, of each layer.

    George et al. 2018, https://arxiv.org/abs/1806.03884. bases: by the name of each layer's weight, as `State.bases`
    has them; ValueError where a layer has none or one of other axes. A side of fewer columns than rows is one of
    `rank`: its last column, of zeros, is for all that the others leave out. The rest as in `ekfac`. In eager mode each
    layer is summed within the backward pass and freed.
    """
    options = checked_options(rules, randomness, chunk_size, has_aux, batched)
    check_contractions(contractions)
    check_params(params)
    check_batch(batch)
    if not isinstance(bases, Mapping):
        raise TypeError(f"bases is a {type(bases).__name__}: pass a dict from names of layers to bases, state.bases")

    def begin(layers: dict[str, Layer]) -> Reading:
        for name, layer in layers.items():
            _check_basis(layer, bases.get(name))
        return squares

    def squares(layer: Layer, terms: Terms, bytes_each: int) -> Tensor:
        basis = bases[layer.weight]
        return exact_squares(terms, basis, contraction_of(layer, terms, basis, contractions, bytes_each))

    found = fold(loss_fn, params, batch, options, begin, lambda layer, some, others: some + others)
    return {name: square.div_(len(found.losses)) for name, square in found.kept.items()}


def _check_basis(layer: Layer, basis: Basis | None) -> None:
    """bases: one for each layer, on its axes."""
    if basis is None:
        raise ValueError(
            f"bases has no layer {layer.weight!r}, params has: take those of a state that init made of them"
        )
    b, o, i, _ = layer.sizes
    for Q, size, of in ((basis.Q_A, i, "inputs"), (basis.Q_B, o, "outputs")):
        blocks, rows = Q.shape[0], Q.shape[1] if Q.dim() == 3 else Q.shape[1] * Q.shape[2]
        if blocks != b or rows < size or (Q.dim() == 3 and rows != size) or (size > 0 and Q.shape[-1] == 0):
            raise ValueError(
                f"the basis of {layer.weight!r} has a side of shape {tuple(Q.shape)} for {b} blocks of {size} {of}: "
                "take that of a state that init made of these params; one of thin bases has none"
            )
        looked_at = isinstance(Q, Tensor) and Q.device.type == "cpu" and not transformed()
        if outside(Q) and (Q.shape[-1] == 1 or (looked_at and Q[..., -1].any())):
            raise ValueError(
                f"the basis of {layer.weight!r} has a side of shape {tuple(Q.shape)} whose last column is not of "
                "zeros: a side of fewer columns than rows ends with one, for all that the others leave out"
            )
