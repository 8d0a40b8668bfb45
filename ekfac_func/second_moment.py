"""Estimators of `E[G^2]` in the eigenbasis, each a value, and what becomes of them when the basis changes."""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_decay
from .contraction import exact_sums, gradient_sums
from .factors import past_share
from .kronecker import into_basis
from .orders import Contraction
from .subspace import squared_rotations
from .types import Basis, Moment, Number, Sums, Terms

AtRefresh = Callable[[Moment, Basis, Basis, Callable[[], Tensor]], Moment]
"""(moment, old basis, new basis, product of the eigenvalues) -> moment"""


class SecondMoment(NamedTuple):
    """An estimator of the second moment of the gradient's coordinates in the eigenbasis.

    sums: `(terms, basis, how) -> Sums`, what it needs of a batch; how is the order of the products.
    update: `(moment, mean, n) -> moment` of the same shapes, from these as means over the n examples; n is a number,
        or `[]` of several processes.
    at_refresh: what becomes of the moment when the basis changes: `reset`, `keep` or `transport`.
    starts_from_eigenvalues: whether the product of the factors' eigenvalues is the moment before any observation.
    reads_mean: whether update takes `mean.projected` for the mean of independent draws, which is refused where
        `Fisher.draws` is false. Outside of a basis of `rank(r)` it then holds the root mean square, for others zero.
    carries: whether anything of one step is used at the next, which `thin` bases refuse.
    """

    name: str
    sums: Callable[[Terms, Basis, Contraction], Sums]
    update: Callable[[Moment, Sums, Number], Moment]
    at_refresh: AtRefresh
    starts_from_eigenvalues: bool = False
    reads_mean: bool = False
    carries: bool = True


def reset(moment: Moment, old: Basis, new: Basis, product: Callable[[], Tensor]) -> Moment:
    """Start again from the product of the factors' eigenvalues, as EKFAC-pytorch does."""
    return Moment(product(), torch.ones_like(moment.weight))


def keep(moment: Moment, old: Basis, new: Basis, product: Callable[[], Tensor]) -> Moment:
    """Carry the moment on as it is, coordinate by coordinate, whatever the new basis."""
    return moment


def transport(moment: Moment, old: Basis, new: Basis, product: Callable[[], Tensor]) -> Moment:
    """Carry the moment on by the squared rotation `(Q_old^T Q_new)^2` of both sides, which keeps its sum.

    Of a basis of some rank the sum is that over all coordinates of the layer, inside and outside.
    """
    return Moment(into_basis(moment.value, squared_rotations(old, new)), moment.weight)


def carry_over(
    estimator: SecondMoment,
    at_refresh: AtRefresh,
    moment: Moment,
    old: Basis,
    new: Basis,
    product: Callable[[], Tensor],
) -> Moment:
    """The moment in the new basis; from the eigenvalues where nothing was observed and the estimator wants that."""
    moved = at_refresh(moment, old, new, product)
    if at_refresh is reset or not estimator.starts_from_eigenvalues:
        return moved
    unseen = moved.weight == 0
    return Moment(torch.where(unseen, product(), moved.value), torch.where(unseen, 1, moved.weight))


def moving_average(moment: Moment, new: Tensor, decay: Number) -> Moment:
    """One step of a bias-corrected moving average.

    new: `[b O I k]`, as the moment's value. decay: weight of the past, 0 <= decay < 1.
    """
    share, weight = past_share(moment.weight, decay)
    return Moment(share * moment.value + (1 - share) * new, weight)


def _intra_batch(moment: Moment, mean: Sums, n: Number) -> Moment:
    assert mean.square is not None
    return Moment(mean.square, torch.ones_like(moment.weight))


def _as_it_is(moment: Moment, mean: Sums, n: Number) -> Moment:
    return moment


intra_batch = SecondMoment("intra_batch", exact_sums, _intra_batch, keep, carries=False)
"""`mean_n G_kfe[n]^2` of this batch alone: exact. George et al. 2018, https://arxiv.org/abs/1806.03884.

It carries nothing from step to step, so `at_refresh` does not matter to it.
"""

kfac = SecondMoment("kfac", gradient_sums, _as_it_is, reset, starts_from_eigenvalues=True, carries=False)
"""The eigenvalues of the factors, `lambda_B x lambda_A x positions`: K-FAC with the damping on the product.

Martens & Grosse 2015, https://arxiv.org/abs/1503.05671; Grosse & Martens 2016, https://arxiv.org/abs/1602.01407.
Until a first basis exists (its batch was skipped) there is no estimate, and every step is skipped.
"""


def _variance(moment: Moment, mean: Sums, n: Number) -> Moment:
    assert mean.square is not None
    return Moment((mean.square - mean.projected.square()).clamp(min=0), torch.ones_like(moment.weight))


centred = SecondMoment("centred", exact_sums, _variance, keep, reads_mean=True, carries=False)
"""`intra_batch` less the square of the batch's mean gradient: the variance in place of the second moment.

Of a single example, or of equal ones, it is zero: a constant damping then bounds the step, a relative one does not.
"""


def averaged_intra_batch(decay: Number) -> SecondMoment:
    """Bias-corrected moving average of `intra_batch`.

    decay: weight of the past in each step, 0 <= decay < 1; checked where it is a Python number.
    """
    check_decay("decay", decay)
    return SecondMoment("averaged_intra_batch", exact_sums, functools.partial(_averaged, decay), transport)


def _averaged(decay: Number, moment: Moment, mean: Sums, n: Number) -> Moment:
    assert mean.square is not None
    return moving_average(moment, mean.square, decay)


def running_average(decay: Number) -> SecondMoment:
    """`m2 <- decay m2 + (1 - decay) n (mean_n G_kfe)^2`, from the product of the eigenvalues: EKFAC-ra.

    George et al. 2018, https://arxiv.org/abs/1806.03884, section 3.2, with the factor n of EKFAC-pytorch: the
    mean of n gradients has a second moment n times too small.

    decay: weight of the past in each step, 0 <= decay < 1; checked where it is a Python number.
    """
    check_decay("decay", decay)
    update = functools.partial(_running, decay)
    return SecondMoment("running_average", gradient_sums, update, reset, starts_from_eigenvalues=True, reads_mean=True)


def _running(decay: Number, moment: Moment, mean: Sums, n: Number) -> Moment:
    return moving_average(moment, n * mean.projected.square(), decay)
