"""The step: from a batch and a state to a natural gradient and the next state."""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .basis import Choice, Choices, Compact, Rank, Thin, choose
from .capture import Captured, Reading, fold, joined
from .checks import check_moment
from .contraction import exact_sums, gradient_sums, mean_sums
from .discovery import Options
from .distributed import Ranks, of_first, total, total_factors
from .draws import Draws, draws
from .factors import WeightSharing, average_factors, eigenvalue_product, factor_sums, mean_factors
from .fisher import Fisher, blaming
from .kronecker import into_basis, pack, unpack_all, unpack_exactly
from .modes import no_autocast, where
from .orders import Contractions, budget, contraction_of
from .passes import LayerSums, add_gradients, add_if_any, add_layer_sums, read_gradient
from .refreshes import Refresh, check_samples, due, refresh_bases
from .rescaling import dampings_of, rescaled
from .second_moment import AtRefresh, SecondMoment, carry_over, keep
from .spans import Span, expand_span, in_span, into_span, into_spans, out_of_spans
from .states import check_state, marked, refuse_changed_use, unused, with_first_uses
from .subspace import Mean, incomplete, mean_outside, rescales_samples
from .types import (
    Basis,
    Batch,
    Damping,
    Info,
    Layer,
    LossAuxFn,
    LossFn,
    Moment,
    Number,
    Params,
    State,
    Sums,
    Terms,
)


class Method(NamedTuple):
    """The arguments of `ekfac`, checked."""

    loss_fn: LossFn | LossAuxFn
    options: Options  # of its capture
    curvature_loss: LossFn | LossAuxFn  # whose gradients make the factors and the moment: the Fisher's, or loss_fn
    of_curvature: Options  # of its capture
    fisher: Fisher
    damping: Number | Damping
    exponent: Number
    second_moment: SecondMoment
    at_refresh: AtRefresh
    moment_every: int
    basis_every: int
    refresh: Refresh
    bases: Choices
    factor_decay: Number
    averaged: bool  # whether the state carries an average of the factors
    weight_sharing: WeightSharing
    contractions: Contractions
    ranks: Ranks | None


class _Turn(NamedTuple):
    """What a step does to each layer."""

    how: Method
    params: Mapping[str, Tensor]
    examples: int  # of the batch
    n: int  # of what the curvature loss is differentiated on: these, or pseudo-examples of a Fisher
    layers: Mapping[str, Layer]
    chosen: dict[str, Choice]
    refreshing: list[str]
    estimators: dict[str, SecondMoment]
    state: State  # before the step, of these layers
    known: tuple[Layer, ...]  # what the state after it says of them
    anew: list[str]  # of those that are refreshed, which have no basis to go on from


class _Carried(NamedTuple):
    """What a step goes on from once its bases are there."""

    state: State  # thin layers in their spans
    spans: Mapping[str, Span]
    totals: Mapping[str, Tensor]  # [b o i k] of thin layers, the sums of their gradients
    kept: Tensor | None = None  # how many bases could not be refreshed; None without a refresh
    samples: Sequence[Tensor] = ()  # that bases were made of and the state does not carry


class _BatchMeans(NamedTuple):
    """What the whole batch said, of all processes."""

    loss: Tensor  # [] mean of loss_fn
    curvature: Tensor  # [] sum of the curvature loss, of which only is asked whether it is finite
    n: Number  # examples, or pseudo-examples of a Fisher
    means: Mapping[str, Sums]  # of the gradients of the curvature loss
    slopes: Mapping[str, Mean]  # the mean gradient of loss_fn
    aux: Any


def step(
    how: Method, params: Mapping[str, Tensor], batch: Batch, state: State, count: int
) -> tuple[Params, State, Info]:
    """`EKFAC.precondition`. count: examples of the batch."""
    examples = how.fisher.examples(params, batch)
    leaf = pytree.tree_leaves(examples)[0]
    n = leaf.shape[0]
    in_one = how.options.chunk_size is None or torch.compiler.is_compiling()
    before = None if in_one else draws([leaf, *params.values()])
    known = state.layers if how.ranks is None else ()
    read = functools.partial(fold, how.curvature_loss, params, examples, how.of_curvature, known=known)
    turns: list[_Turn] = []  # of each attempt, the last one counts

    def begin(layers: dict[str, Layer]) -> Reading:
        turns.append(_turn_of(how, params, state, layers, count, n))
        return functools.partial(_observe, turns[-1])

    def add(layer: Layer, some: LayerSums, others: LayerSums) -> LayerSums:
        return add_layer_sums(turns[-1].state, layer, some, others)

    folded = blaming(how.fisher, read, begin, add)
    turn = turns[-1]
    with no_autocast(leaf.device):
        carried = _refreshed(turn, folded.kept)
    if before is not None:
        _second_pass(turn, carried.state.bases, folded.kept, read, before)
    data = None
    if how.fisher.loss is not None:
        data = fold(how.loss_fn, params, batch, how.options, lambda layers: read_gradient, add_gradients)
    with no_autocast(leaf.device):
        return _finish(turn, carried, _means_of(turn, carried, folded, data))


_unchanged = SecondMoment("unchanged", gradient_sums, lambda moment, mean, n: moment, keep)
"""The estimator of a step between two updates."""


def _turn_of(
    how: Method, params: Mapping[str, Tensor], state: State, layers: Mapping[str, Layer], count: int, n: int
) -> _Turn:
    """What this step does to each layer, by the clocks and by which layers the batch uses."""
    chosen = choose(layers.values(), how.bases)
    alike = torch.compiler.is_compiling() or how.ranks is not None  # every batch must use the same layers
    if alike:
        refuse_changed_use(state, layers)
    else:
        state = with_first_uses(state, layers, chosen, params, how.averaged)
    check_state(state, layers, chosen, params, how.averaged)
    refreshing = due(layers, how.refresh, state.step, how.basis_every)
    # in one condition, for each is a guard of Dynamo, which may cost a graph
    every = len(refreshing) == len(layers) or state.step % how.moment_every == 0
    known = tuple(layers.values())
    late: set[str] = set()
    idle: set[str] = set()
    if not alike:
        late = unused(state.layers)  # whose last refresh fell on a batch that did not use them
        idle = {name for name in unused(known) if not isinstance(chosen[name], Thin)}  # thin ones carry nothing on
        postponed = {name for name in idle if name in refreshing or name in late}
        known = tuple(marked(layer, layer.weight in postponed) for layer in known)
        refreshing = [name for name in layers if name not in idle and (name in refreshing or name in late)]
    updating = [name for name in layers if name not in idle and (every or name in refreshing)]
    estimators = {name: how.second_moment if name in updating else _unchanged for name in layers}
    anew = [name for name in refreshing if isinstance(chosen[name], Thin) or name in late]
    return _Turn(how, params, count, n, layers, chosen, refreshing, estimators, state, known, anew)


def _observe(turn: _Turn, layer: Layer, terms: Terms, bytes_each: int) -> LayerSums:
    """Sums in a basis that stays; factors for one that is to change, and the terms themselves if there is room."""
    how, name, basis = turn.how, layer.weight, turn.state.bases[layer.weight]
    if isinstance(turn.chosen[name], Thin):
        return LayerSums(terms=(terms,))
    if name in turn.refreshing:
        factors = factor_sums(terms, basis, how.weight_sharing, how.averaged or how.ranks is not None)
        size = how.options.chunk_size
        room = size is None or bytes_each * turn.n <= budget(how.contractions, bytes_each * size)
        return LayerSums(factors=factors, terms=(terms,) if room or torch.compiler.is_compiling() else ())
    samples = (terms,) if _of_samples(turn, terms, basis) else ()
    return LayerSums(_sums_in(turn, basis, layer, terms, bytes_each), terms=samples)


def _sums_in(turn: _Turn, basis: Basis, layer: Layer, terms: Terms, bytes_each: int) -> Sums:
    order = contraction_of(layer, terms, basis, turn.how.contractions, bytes_each)
    return turn.estimators[layer.weight].sums(terms, basis, order)


def _of_samples(turn: _Turn, terms: Terms, basis: Basis) -> bool:
    """Whether the samples of a layer are rescaled, not its gradient."""
    return turn.how.ranks is None and rescales_samples(terms, basis, turn.n)


def _refreshed(turn: _Turn, seen: dict[str, LayerSums]) -> _Carried:
    """What the step goes on from: factors, bases and moments are new where a refresh is due."""
    how = turn.how
    carried = _Carried(*into_spans(turn.chosen, turn.state, turn.layers, seen, how.weight_sharing))
    if not turn.refreshing:
        return carried
    of_layers = {name: seen[name].factors or () for name in turn.refreshing}
    sums = total_factors(of_layers, how.ranks, turn.examples / turn.n)
    means = {name: mean_factors(of_layer) for name, of_layer in sums.items()}
    state = carried.state
    factors, second_moments = dict(state.factors), dict(state.second_moments)
    samples: list[Tensor] = []
    for name, mean in means.items():
        check_samples(name, mean, state.bases[name])
        if not how.averaged and isinstance(turn.chosen[name], Rank | Compact):
            samples += pytree.tree_leaves((mean.A, mean.B))
        else:
            factors[name] = average_factors(state.factors[name], mean, how.factor_decay)
    used = {name: factors[name] if how.averaged else mean for name, mean in means.items()}
    new, kept = of_first(refresh_bases(used, state.bases, how.refresh, state.step == 0, turn.anew), how.ranks)
    for name, basis in new.items():
        moment = state.second_moments[name]
        product = functools.partial(eigenvalue_product, used[name], basis, means[name].positions, moment.value)
        second_moments[name] = carry_over(how.second_moment, how.at_refresh, moment, state.bases[name], basis, product)
    state = replace(state, factors=factors, bases={**state.bases, **new}, second_moments=second_moments)
    return carried._replace(state=state, kept=kept, samples=samples)


def _second_pass(
    turn: _Turn,
    bases: Mapping[str, Basis],
    seen: dict[str, LayerSums],
    read: Callable[..., Captured],
    before: Draws,
) -> None:
    """Sum up the layers whose terms could not stay until their bases were there, with the same random numbers."""
    again = [name for name in turn.layers if seen[name].sums is None and not seen[name].terms]

    def missing(layer: Layer, terms: Terms, bytes_each: int) -> Sums | None:
        basis = bases[layer.weight]
        return _sums_in(turn, basis, layer, terms, bytes_each) if layer.weight in again else None

    if again:
        before.repeat()
        kept = read(lambda layers: missing, add_if_any).kept
        seen |= {name: LayerSums(kept.pop(name)) for name in again}


def _means_of(turn: _Turn, carried: _Carried, folded: Captured, data: Captured | None) -> _BatchMeans:
    """What the batch said, of all processes. data: what was read of loss_fn, where the curvature loss is another."""
    n, count = turn.n, turn.examples
    sums, samples = _in_bases(turn, carried.state.bases, folded)
    curvature = folded.losses.sum()
    of_data: Any = None if data is None else (data.kept, data.losses.sum(), len(data.losses))
    if turn.how.ranks is None:
        count = n
    elif count != n:  # of processes that may have made more pseudo-examples of an example than others
        share = count / n
        sums, curvature = pytree.tree_map_only(Tensor, lambda t: t * share, (sums, curvature))
    sums, curvature, n_all, count_all, of_data = total((sums, curvature, n, count, of_data), turn.how.ranks)
    means, slopes = {}, {}
    for name in turn.layers:
        own = turn.estimators[name].sums in (exact_sums, gradient_sums)  # else a user may hold what was summed
        means[name] = mean_sums(sums.pop(name), count_all, own)
        slope = carried.totals[name] / n_all if name in carried.totals else means[name].gradient
        slopes[name] = Mean(slope, means[name].projected, samples.get(name), n_all)
    if data is None:
        return _BatchMeans(curvature / count_all, curvature, n_all, means, slopes, folded.aux)
    loss, slopes = _of_data(turn, carried, data.layers, of_data)
    return _BatchMeans(loss, curvature, n_all, means, slopes, data.aux)


def _in_bases(turn: _Turn, bases: Mapping[str, Basis], folded: Captured) -> tuple[dict[str, Sums], dict[str, Terms]]:
    """The sums of each layer, and the samples of layers that are rescaled as samples. Empties what was read."""
    sums: dict[str, Sums] = {}
    samples: dict[str, Terms] = {}
    for name, layer in turn.layers.items():
        of_layer, basis = folded.kept.pop(name), bases[name]
        terms: Terms = joined(of_layer.terms) if of_layer.terms else ()
        sums[name] = of_layer.sums or _sums_in(turn, basis, layer, terms, folded.bytes_each)
        if _of_samples(turn, terms, basis):
            samples[name] = terms
    return sums, samples


def _updated(turn: _Turn, state: State, observed: _BatchMeans) -> dict[str, Moment]:
    """The estimators' new moments. state: that has the old ones in the bases of this step."""
    moments = {}
    for name, mean in observed.means.items():
        estimator, basis, old = turn.estimators[name], state.bases[name], state.second_moments[name]
        if estimator.reads_mean and incomplete(basis):
            mean = mean_outside(mean, basis)
        moments[name] = estimator.update(old, mean, observed.n)
        check_moment(name, estimator.name, moments[name], old)
    return moments


def _of_data(
    turn: _Turn, carried: _Carried, own: Mapping[str, Layer], sums: tuple[Mapping[str, Tensor], Tensor, Number]
) -> tuple[Tensor, dict[str, Mean]]:
    """The mean of loss_fn, and its gradient in the layers of the curvature loss.

    own: the layers of loss_fn. sums: of their gradients and of the loss, and the number of examples.
    """
    gradients, loss, n = sums
    means = {name: gradient / n for name, gradient in gradients.items()}
    tree = unpack_exactly(own.values(), means, turn.params)
    slopes = {}
    for name, layer in turn.layers.items():
        M = pack(layer, tree)
        projected = into_basis(into_span(M, carried.spans[name]), carried.state.bases[name])
        slopes[name] = Mean(M, projected, None, n)
    return loss / n, slopes


def _finish(turn: _Turn, carried: _Carried, observed: _BatchMeans) -> tuple[Params, State, Info]:
    """The new moments, the natural gradient, and the old state in place of the new one where it is not finite."""
    layers, bases, slopes, params = turn.layers, carried.state.bases, observed.slopes, turn.params
    moments = _updated(turn, carried.state, observed)
    dampings = dampings_of(turn.how.damping, moments, bases, layers)
    natural_in = {
        name: _natural_of(turn, layer, slopes[name], moments[name], dampings[name], carried)
        for name, layer in layers.items()
    }
    natural = unpack_all(layers.values(), natural_in, params)  # where the cast to half precision can overflow
    new = State(turn.state.step + 1, carried.state.factors, bases, moments, turn.known)
    new = out_of_spans(new, turn.state, turn.chosen)
    of_thin = [moments[name].value for name in layers if isinstance(turn.chosen[name], Thin)]
    unseen = [*of_thin, *carried.samples, *_learned(new, turn.state)]
    good = _all_finite([observed.loss, observed.curvature, *natural.values(), *unseen])
    # without a moment in any layer, after a first step that was skipped, there is no natural gradient
    good = good & torch.stack([moment.weight for moment in moments.values()]).any()
    natural = {name: where(good, p, 0.0) for name, p in natural.items()}
    used = torch.stack([dampings[name] for name in layers])
    info = Info(
        observed.loss,
        unpack_all(layers.values(), {name: slope.gradient for name, slope in slopes.items()}, params),
        ~good,
        good.new_zeros((), dtype=torch.int64) if carried.kept is None else torch.where(good, carried.kept, 0),
        used if callable(turn.how.damping) else used[0],
        observed.aux,
    )
    return natural, _unless_bad(good, new, turn.state), info


def _natural_of(turn: _Turn, layer: Layer, slope: Mean, moment: Moment, added: Tensor, carried: _Carried) -> Tensor:
    """The rescaled gradient of a layer, `[b o i k]`. added: its damping."""
    basis, span = carried.state.bases[layer.weight], carried.spans[layer.weight]
    sizes = in_span(layer, span).sizes
    natural = expand_span(rescaled(slope, moment, basis, added, turn.how.exponent, sizes), span)
    if turn.how.fisher.loss is None or span == (None, None):
        return natural
    outside = slope.gradient - expand_span(into_span(slope.gradient, span), span)  # of the data's loss
    return natural + outside * added**turn.how.exponent


def _learned(new: State, old: State) -> list[Tensor]:
    """The tensors that a step changes in the state, but for the bases: these are finite in any case."""
    written = [moment.value for moment in new.second_moments.values()]
    for name, factors in new.factors.items():
        if factors is not old.factors[name]:
            written += [factors.A, factors.B]
    return written


def _all_finite(tensors: list[Tensor]) -> Tensor:
    """`[]` bool. `aminmax` is one fast pass, and NaN or infinite where an entry is."""
    extremes = [extreme for t in tensors if t.numel() for extreme in torch.aminmax(t)]
    return torch.isfinite(torch.stack(extremes)).all()


def _unless_bad(good: Tensor, new: State, old: State) -> State:
    """The new state where the step was good, else every tensor of the old one; the step number advances."""
    old = replace(old, step=new.step, layers=new.layers)
    return pytree.tree_map(lambda x, y: x if x is y else where(good, x, y), new, old)
