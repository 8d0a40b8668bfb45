"""Damping that a person need not tune: relative to the curvature, or adapted to how well a model predicts the loss."""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import check_batch, check_loss, check_not_negative, check_params, check_positive
from ..second_moment import averaged_intra_batch
from ..types import Batch, Damping, LossFn, Number, Params, Spectrum
from .norms import Scope, dots, each, total
from .transforms import check_like


def relative(fraction: Number, scope: Scope = each) -> Damping:
    """Damping as a fraction of the mean eigenvalue of the curvature, the mean of `m2`.

    A value for the `damping` of `ekfac`. Invariant to the scale of the loss, where a constant is not. Meant for the
    exponent -1/2: near a minimum `m2` falls with the gradients, so that with the exponent -1 a step grows as they fall.

    fraction: positive, without unit.
    scope: `each`, the mean eigenvalue of every layer, or `together`, that of all of them. A layer whose second moment
        is zero, as of the first factor of a LoRA at its start, has that of all; where all are zero it counts as 1.
    """
    if isinstance(fraction, Mapping):
        raise TypeError("relative was called with a dict, as a damping rule is: give damping=relative(fraction)")
    check_positive("fraction", fraction)

    return functools.partial(_relative, fraction, scope)


def _relative(fraction: Number, scope: Scope, moments: Mapping[str, Spectrum]) -> dict[str, Number]:
    if isinstance(fraction, Tensor):
        fraction = torch.where(fraction > 0, fraction, torch.nan)  # which no clamp makes positive
    sums = scope({name: (m.value * m.counts[..., None]).sum() for name, m in moments.items()})
    counts = scope({name: m.value.new_full((), m.size) for name, m in moments.items()})
    means = {name: sums[name] / counts[name].clamp(min=1) for name in moments}
    # a layer without gradients when its moment was updated may have some before the next update
    of_all = total(sums) / total(counts).clamp(min=1)
    of_all = torch.where(of_all > 0, of_all, 1)
    shares = {name: fraction * torch.where(mean > 0, mean, of_all) for name, mean in means.items()}
    tiny = {name: 1e6 * torch.finfo(m.value.dtype).tiny for name, m in moments.items()}  # its inverse may be multiplied
    return {name: share.clamp(min=tiny[name]) for name, share in shares.items()}


DEFAULTS: Mapping[str, Any] = {
    "damping": relative(0.01),
    "exponent": -0.5,
    "second_moment": averaged_intra_batch(0.7),
    "basis_every": 10,
}
"""Arguments of `ekfac` for a step as that of Adam and SOAP in the eigenbasis, with a learning rate of about 0.0025.

The moment is averaged: one of each batch alone gives all batches steps of one length, and where labels are rare the
many batches without any outvote the few that have some. They trained every model of `benchmarks/convergence.py`.
"""


def levenberg_marquardt(
    damping: Tensor,
    actual: Tensor,
    predicted: Tensor,
    *,
    factor: float = 0.95**5,
    smallest: float = 1e-8,
    largest: float = 1e8,
) -> Tensor:
    """The next damping, `[]`, from how much of the predicted decrease of the loss came.

    Where `actual / predicted` is above 3/4 the damping is multiplied by factor, below 1/4 divided by it. Martens &
    Grosse 2015, section 6.5, https://arxiv.org/abs/1503.05671, who do so every fifth step, for which the default factor
    is; give `factor=0.95` at every step. A loss that is not finite counts as no decrease; a decrease that was not
    predicted (a skipped step) changes nothing.

    damping: `[]`, in loss^2 / parameter^2.
    actual: `[]`, loss before minus loss after the step, on the same batch.
    predicted: `[]`, of `predicted_decrease`.
    factor: in (0, 1).
    smallest, largest: what the damping is kept between.
    """
    if not 0 < factor < 1:
        raise ValueError(f"factor={factor!r}: it shrinks the damping, give 0 < factor < 1")
    ratio = torch.where(actual.isfinite(), actual / predicted, -1.0)
    change = torch.where(ratio > 0.75, factor, torch.where(ratio >= 0.25, 1.0, 1 / factor))
    return torch.where(predicted > 0, damping * change, damping).clamp(smallest, largest)


def predicted_decrease(updates: Mapping[str, Tensor], gradient: Mapping[str, Tensor], quadratic: Tensor) -> Tensor:
    """`-(gradient . updates + quadratic / 2)`, `[]`: the decrease of the loss that a quadratic model promises.

    Martens & Grosse 2015, section 6.5, https://arxiv.org/abs/1503.05671.

    updates: what is added to params.
    gradient: `info.gradient`.
    quadratic: `[]`, `updates^T C updates` of the damped curvature C: `preconditioned_quadratic` for a plain step along
        the natural gradient, `fisher_quadratic` for any other.
    """
    check_like(gradient, updates, "updates", "gradient")
    return -(total(dots(updates, gradient)) + quadratic / 2)


def preconditioned_quadratic(
    natural: Mapping[str, Tensor], gradient: Mapping[str, Tensor], learning_rate: Number
) -> Tensor:
    """`updates^T (C + damping) updates`, `[]`, of `updates = -learning_rate natural`, with the curvature C of EKFAC.

    `natural = (C + damping)^-1 gradient`, so it is `learning_rate^2 natural . gradient`. True of the exponent -1 alone.
    """
    check_like(gradient, natural, "natural", "gradient")
    return learning_rate**2 * total(dots(natural, gradient))


@torch.no_grad()
def fisher_quadratic(
    loss_fn: LossFn, params: Mapping[str, Tensor], batch: Batch, updates: Mapping[str, Tensor], damping: Number
) -> Tensor:
    """`updates^T (F + damping) updates`, `[]`, with the exact second moment F of the gradients of this batch.

    `mean_n (G[n] . updates)^2 + damping ||updates||^2`, from one forward pass in forward mode; for any updates, with
    momentum and weight decay too. F is what EKFAC approximates. A loss that forward mode cannot differentiate raises.

    loss_fn, params, batch: as in `ekfac`, the loss without aux; one with dropout draws anew.
    damping: one for all parameters, a number or `[]`, in loss^2 / parameter^2.
    """
    check_params(params)
    check_batch(batch)
    check_not_negative("damping", damping)
    check_like(params, updates, "updates")
    tangents: Params = {name: updates[name].to(p.dtype) for name, p in params.items()}

    def losses(params: Params) -> Tensor:
        def of_one(params: Params, example: Any) -> Tensor:
            return check_loss(loss_fn(params, example), False, None)[0]

        return torch.func.vmap(of_one, in_dims=(None, 0), randomness="different")(params, batch)

    slopes = torch.func.jvp(losses, ({name: p.detach() for name, p in params.items()},), (tangents,))[1]
    return slopes.square().mean() + damping * total(dots(updates, updates))
