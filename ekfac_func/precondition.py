"""The step: from a batch to a natural gradient, one line a stage."""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import basis as eigenbasis
from .capture import Captured, capture, plan
from .checks import (
    check_batch,
    check_count,
    check_decay,
    check_params,
    check_positive,
    check_randomness,
    check_state,
)
from .fisher import Fisher, empirical
from .kronecker import (
    average_factors,
    eigenvalue_product,
    factor_sums,
    gradient,
    into_basis,
    out_of_basis,
    positions,
    unpack,
)
from .rules import RULES, Rules
from .second_moment import AtRefresh, SecondMoment, intra_batch, refresh
from .types import Basis, Batch, Factors, Info, Layer, LossFn, Moment, Number, Params, State, Sums, Term


class EKFAC(NamedTuple):
    """A pair of pure functions.

    `init(params, batch) -> state` reads the batch for its shapes alone and computes nothing.
    `precondition(params, batch, state) -> (natural, state, info)` changes nothing of its arguments.
    """

    init: Callable[[Mapping[str, Tensor], Batch], State]
    precondition: Callable[[Mapping[str, Tensor], Batch, State], tuple[Params, State, Info]]


def ekfac(
    loss_fn: LossFn,
    *,
    damping: Number,
    second_moment: SecondMoment = intra_batch,
    fisher: Fisher = empirical,
    basis_every: int = 1,
    at_refresh: AtRefresh | None = None,
    factor_decay: Number = 0.0,
    rules: Rules = RULES,
    randomness: str = "different",
    chunk_size: int | None = None,
) -> EKFAC:
    """Natural gradients in the Kronecker-factored eigenbasis, from exact per-example gradients.

    George et al. 2018, https://arxiv.org/abs/1806.03884: for each layer
    `natural = Q_B [ (Q_B^T mean(G) Q_A) / (m2 + damping) ] Q_A^T`.

    loss_fn: pure function `(params, example) -> loss` of a dict of tensors and one example, any tree of tensors; the
        loss is a scalar.
    damping: added to the second moment, in loss^2 / parameter^2; positive. A Python number or a 0-d tensor.
    second_moment: the estimator of `m2`: `intra_batch`, `averaged_intra_batch(decay)`, `running_average(decay)`,
        `kfac`, or a `SecondMoment` of your own.
    fisher: which gradients make the factors and the moment: `empirical`, `sampled(model, likelihood, samples)`,
        `exact(model, likelihood)`, `gradient(loss)`, or a `Fisher` of your own. The gradient that is rescaled is
        always that of `loss_fn`. Under `torch.compile`, make it outside the compiled function.
    basis_every: steps from one refresh of factors and eigenbases to the next; the first step is one.
    at_refresh: what becomes of the moment when the basis changes: `reset`, `keep` or `transport`; by default the
        estimator's own.
    factor_decay: weight of the past in a bias-corrected moving average of the factors over the refreshes; 0 takes
        them from the batch of the refresh alone.
    rules: which torch calls are layers, e.g. `{**RULES, **SUA}`.
    randomness: of dropout and the like inside `loss_fn`, as in `torch.func.vmap`.
    chunk_size: examples differentiated at a time, against the memory of activations; None takes the batch at once.
        Under `torch.compile` every batch size then costs graphs of its own.

    A batch whose loss, gradient or statistic is not finite is skipped: every tensor of the state stays as it was,
    the step number advances, `natural` is zero and `info.skipped` is true.

    Arguments that cannot be right raise ValueError or TypeError before anything is computed.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is a {type(loss_fn).__name__}: pass a function (params, example) -> scalar loss")
    if not isinstance(second_moment, SecondMoment):
        raise TypeError(
            f"second_moment={second_moment!r} is not an estimator: pass intra_batch, averaged_intra_batch(decay), "
            "running_average(decay), kfac or a SecondMoment"
        )
    if not isinstance(fisher, Fisher):
        raise TypeError(
            f"fisher={fisher!r} is not a Fisher: pass empirical, sampled(model, likelihood), exact(model, likelihood), "
            "gradient(loss) or a Fisher"
        )
    if second_moment.reads_mean and not fisher.draws:
        raise ValueError(
            f"second_moment={second_moment.name} reads the mean of gradients that are draws, which the {fisher.name} "
            "Fisher does not have: use sampled(model, likelihood) with it, or another estimator"
        )
    if at_refresh is not None and not callable(at_refresh):
        raise TypeError(f"at_refresh={at_refresh!r} is not a function: pass reset, keep or transport")
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules is a {type(rules).__name__}: pass a dict from torch functions to rules, as RULES")
    check_positive("damping", damping)
    check_count("basis_every", basis_every)
    check_decay("factor_decay", factor_decay)
    check_randomness(randomness)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    curvature_loss = loss_fn if fisher.loss is None else fisher.loss
    carry = second_moment.at_refresh if at_refresh is None else at_refresh

    def init(params: Mapping[str, Tensor], batch: Batch) -> State:
        check_params(params)
        check_batch(batch)
        return _initial(plan(curvature_loss, params, fisher.examples(params, batch), rules).layers, params)

    @torch.no_grad()
    def precondition(params: Mapping[str, Tensor], batch: Batch, state: State) -> tuple[Params, State, Info]:
        check_params(params)
        check_batch(batch)
        examples = fisher.examples(params, batch)
        losses, layers, terms = capture(curvature_loss, params, examples, rules, randomness, chunk_size)
        check_state(state, layers.values())

        carried, kept = state, torch.zeros((), dtype=torch.int64, device=losses.device)
        if state.step % basis_every == 0:
            carried, kept = _refresh(state, terms, factor_decay, second_moment, carry)
        bases = carried.bases
        n, loss = len(losses), losses.mean()
        means = {name: _mean(second_moment.sums(term, bases[name]), n) for name, term in terms.items()}
        updated = {name: second_moment.update(carried.second_moments[name], means[name], n) for name in layers}
        slopes = {name: (mean.gradient, mean.projected) for name, mean in means.items()}
        if fisher.loss is not None:
            data = capture(loss_fn, params, batch, rules, randomness, chunk_size)
            loss, slopes = _of_data(data, layers, bases, params)
        rescaled = {name: _rescale(slopes[name][1], updated[name], bases[name], damping) for name in layers}

        new = State(state.step + 1, carried.factors, bases, updated)
        finite = _all_finite([loss, losses, *rescaled.values(), *_learned(new, state)])
        natural = {name: torch.where(finite, M, 0) for name, M in rescaled.items()}
        mean_gradient = _unpack(layers, {name: slope for name, (slope, _) in slopes.items()}, params)
        info = Info(loss, mean_gradient, ~finite, torch.where(finite, kept, 0), damping + loss.new_zeros(()))
        return _unpack(layers, natural, params), _choose(finite, new, state), info

    return EKFAC(init, precondition)


def _initial(layers: tuple[Layer, ...], params: Mapping[str, Tensor]) -> State:
    """Identity bases and zero statistics."""
    factors, bases, second_moments = {}, {}, {}
    for layer in layers:
        b, o, i, k = layer.sizes
        p = params[layer.weight]
        zero = torch.zeros((), dtype=p.dtype, device=p.device)
        bases[layer.weight] = eigenbasis.identity(b, o, i, p)
        factors[layer.weight] = Factors(zero.repeat(b, i, i), zero.repeat(b, o, o), zero)
        second_moments[layer.weight] = Moment(zero.repeat(b, o, i, k), zero.clone())
    return State(0, factors, bases, second_moments)


def _refresh(
    state: State, terms: Mapping[str, Term], factor_decay: Number, estimator: SecondMoment, carry: AtRefresh
) -> tuple[State, Tensor]:
    """The state with factors of this batch, their bases and the moments in them; how many bases could not be had."""
    factors, bases, second_moments, kept = {}, {}, {}, []
    for name, term in terms.items():
        old, moment = state.bases[name], state.second_moments[name]
        factors[name] = average_factors(state.factors[name], factor_sums(term), factor_decay)
        bases[name], failed = eigenbasis.refresh(factors[name], old)
        product = functools.partial(eigenvalue_product, factors[name], bases[name], positions(term), moment.value)
        second_moments[name] = refresh(estimator, carry, moment, old, bases[name], product)
        kept.append(failed)
    return State(state.step, factors, bases, second_moments), torch.stack(kept).sum()


def _mean(sums: Sums, n: int) -> Sums:
    """The one division of the sums over examples."""
    return Sums(sums.gradient / n, sums.projected / n, None if sums.square is None else sums.square / n)


def _of_data(
    captured: Captured, layers: Mapping[str, Layer], bases: Mapping[str, Basis], params: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The loss of the data, and its gradient in the layers of the curvature loss, as it is and in the basis."""
    n = len(captured.losses)
    tree = _unpack(captured.layers, {name: gradient(term) / n for name, term in captured.terms.items()}, params)
    packed = {name: pack(layer, tree) for name, layer in layers.items()}
    return captured.losses.mean(), {name: (M, into_basis(M, bases[name])) for name, M in packed.items()}


def pack(layer: Layer, tree: Mapping[str, Tensor]) -> Tensor:
    """A layer's entries of a tree like params as `[b o i k]`: the inverse of `unpack`."""
    b, o, i, k = layer.sizes
    if layer.bias is None:
        return tree[layer.weight].reshape(b, o, i, k)
    return torch.cat([tree[layer.weight].reshape(b, o, i - 1, k), tree[layer.bias].reshape(b, o, 1, k)], dim=2)


def _rescale(projected: Tensor, moment: Moment, basis: Basis, damping: Number) -> Tensor:
    """`Q_B [ projected / (m2 + damping) ] Q_A^T`; zero while there is no estimate of m2."""
    m2 = torch.where(moment.weight > 0, moment.value, torch.inf)
    return out_of_basis(projected / (m2 + damping), basis)


def _learned(new: State, old: State) -> list[Tensor]:
    """The tensors that the step would write into the state; a basis is always finite."""
    written = [new.second_moments[name].value for name in new.second_moments]
    for name, factors in new.factors.items():
        if factors is not old.factors[name]:
            written += [factors.A, factors.B]
    return written


def _all_finite(tensors: list[Tensor]) -> Tensor:
    """`[]` bool. The largest absolute value is NaN or infinite where an entry is, in one pass over each tensor."""
    finite = [torch.isfinite(torch.linalg.vector_norm(t, torch.inf)) for t in tensors if t.numel()]
    return torch.stack(finite).all()


def _choose(finite: Tensor, new: State, old: State) -> State:
    """The new state where the step was finite, else every tensor of the old one; the step number advances."""

    def choose(x: Tensor, y: Tensor) -> Tensor:
        return x if x is y else torch.where(finite, x, y)

    return State(
        new.step,
        {name: Factors(*map(choose, new.factors[name], old.factors[name])) for name in new.factors},
        {name: Basis(*map(choose, new.bases[name], old.bases[name])) for name in new.bases},
        {name: Moment(*map(choose, new.second_moments[name], old.second_moments[name])) for name in new.second_moments},
    )


def _unpack(layers: Mapping[str, Layer], blocks: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> Params:
    """`[b o i k]` of each layer as a tree like params, in its order."""
    tree: Params = {}
    for name, layer in layers.items():
        tree |= unpack(layer, blocks[name], params)
    return {name: tree[name] for name in params}
