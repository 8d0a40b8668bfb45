"""The step: from a batch and a state to a natural gradient and the next state."""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .basis import (
    Choice,
    Choices,
    Compact,
    Rank,
    Thin,
    check_choices,
    check_patterns,
    choose,
    counts,
    factor_shapes,
    fills_up,
    moment_shape,
    real,
    warn_of_large,
)
from .capture import Folded, Reading, fold, joined, separate
from .certify import certify
from .checks import (
    check_batch,
    check_count,
    check_damping,
    check_dampings,
    check_decay,
    check_exponent,
    check_kind_of_state,
    check_loss_fn,
    check_moment,
    check_params,
    check_state,
)
from .contraction import exact_sums, gradient_sums, mean_sums
from .discovery import Options, checked_options, plan
from .distributed import Ranks, check_ranks, of_first, total, total_factors
from .draws import Draws, draws
from .fisher import Fisher, check_estimator, empirical
from .kronecker import (
    WeightSharing,
    average_factors,
    averages,
    eigenvalue_product,
    expand,
    factor_sums,
    into_basis,
    mean_factors,
    out_of_basis,
    pack,
    unpack_all,
)
from .memory import empty, writable
from .modes import depth, no_autocast, transformed, where
from .orders import DEFAULT_CONTRACTIONS, Contractions, budget, check_contractions, contraction_of
from .passes import LayerSums, add_gradients, add_if_any, add_layer_sums, read_gradient
from .refreshes import EIGH, Refresh, check_refresh, check_samples, due, refresh_bases
from .rules import RULES, Rules
from .second_moment import AtRefresh, SecondMoment, carry_over, intra_batch, keep
from .spans import Span, check_of_samples, expand_span, in_span, into_span, into_spans, out_of_spans
from .states import initial_state, marked, refuse_changed_use, unused, with_first_uses
from .subspace import Mean, incomplete, mean_outside, rescale, rescales_samples
from .types import (
    Basis,
    Batch,
    Info,
    Layer,
    LossAuxFn,
    LossFn,
    Means,
    Moment,
    Number,
    Params,
    Spectrum,
    State,
    Sums,
    Terms,
    statistics_dtype,
)

Damping = Callable[[Mapping[str, Spectrum]], Mapping[str, Number]]
"""second moment of each layer -> damping of each, a number or `[]`"""


class Init(Protocol):
    """`EKFAC.init`."""

    def __call__(self, params: Mapping[str, Tensor], batch: Batch, *, check: bool = False) -> State: ...


class EKFAC(NamedTuple):
    """A pair of pure functions.

    `init(params, batch, check=False) -> state` reads the batch for its shapes alone and computes nothing; of a batched
    loss that looks at values it runs the loss on them. With `check=True` it first certifies the capture on this batch,
    at one backward pass an example: ValueError names the first parameter whose captured gradients differ from those of
    each example alone (a rule that reads its calls wrongly, examples that are coupled). The loss may then draw no
    random numbers.
    `precondition(params, batch, state) -> (natural, state, info)` changes nothing of its arguments. What it returns is
    constant to autograd: no derivative goes through a step, w.r.t. damping or anything else. Neither it nor
    `init` is thread-safe: tracing sets flags of torch that all threads read.
    """

    init: Init
    precondition: Callable[[Mapping[str, Tensor], Batch, State], tuple[Params, State, Info]]


def ekfac(
    loss_fn: LossFn | LossAuxFn,
    *,
    damping: Number | Damping,
    exponent: Number = -1.0,
    second_moment: SecondMoment = intra_batch,
    fisher: Fisher = empirical,
    basis_every: int = 1,
    refresh: Refresh = EIGH,
    moment_every: int = 1,
    at_refresh: AtRefresh | None = None,
    factor_decay: Number = 0.0,
    weight_sharing: WeightSharing = expand,
    bases: Choices | None = None,
    rules: Rules = RULES,
    has_aux: bool = False,
    batched: bool = False,
    randomness: str = "different",
    chunk_size: int | None = None,
    contractions: Contractions = DEFAULT_CONTRACTIONS,
    ranks: Ranks | None = None,
) -> EKFAC:
    """Natural gradients in the Kronecker-factored eigenbasis, from exact per-example gradients.

    George et al. 2018, https://arxiv.org/abs/1806.03884: for each layer
    `natural = Q_B [ (Q_B^T mean(G) Q_A) / (m2 + damping) ] Q_A^T`.

    loss_fn: pure function `(params, example) -> loss` of a dict of tensors and one example, any tree of tensors; the
        loss is a scalar. Its layers are found when it is first met with tensors of some shapes: make it once, not anew
        for each step in eager mode.
    damping: added to the second moment, in loss^2 / parameter^2; positive. A Python number or a 0-d tensor, or a rule
        from the second moments of all layers to the damping of each, as `optim.relative(fraction)`.
    exponent: of `m2 + damping`, negative: -1 is the natural gradient, -1/2 a step as that of Adam and SOAP
        (https://arxiv.org/abs/2409.11321) in the eigenbasis.
    second_moment: the estimator of `m2`: `intra_batch`, `averaged_intra_batch(decay)`, `running_average(decay)`,
        `kfac`, or a `SecondMoment` of your own.
    fisher: which gradients make the factors and the moment: `empirical`, `sampled(model, likelihood, samples)`,
        `exact(model, likelihood)`, `gradient(loss)`, or a `Fisher` of your own. The gradient that is rescaled is
        always that of `loss_fn`. Under `torch.compile`, make it outside the compiled function.
    basis_every: steps from one refresh of factors and eigenbases to the next; the first step is one.
    refresh: how a basis is refreshed: `eigh(dtype)`, `qr(iterations)` from the old one, `adaptive(tolerance)` where the
        old one does not do, `staggered(groups, of)` some layers at a time.
    moment_every: steps from one update of the second moment to the next, on a clock of its own; a refresh is always
        one too. Steps between need the gradient alone.
    at_refresh: what becomes of the moment when the basis changes: `reset`, `keep` or `transport`; by default the
        estimator's own.
    factor_decay: weight of the past in a bias-corrected moving average of the factors over the refreshes; 0 takes
        them from the batch of the refresh alone.
    weight_sharing: what a sample of the factors is where an example uses a weight at several positions: `expand`, each
        position, or `reduce`, the example. The moment is exact in both.
    bases: by a pattern of the weight's name, as of a file's, how much of each factor is kept: `FULL`, the default,
        `DIAGONAL`, `blocks(max_dim)`, or `Blocks(inputs, outputs)` for each side, `rank(r)`, `thin` or
        `compact(samples)` for wide layers; the first that fits.
    rules: which torch calls are layers, e.g. `{**RULES, **SUA}`.
    has_aux: `loss_fn` returns a pair (loss, aux); the tree of tensors aux, with an axis n in front, is in `info.aux`.
    batched: `loss_fn` takes the batch as it is and returns the losses `[n]`; aux is returned as it is. It is for models
        that couple their examples, BatchNorm in training mode: the gradient of an example is then that of the batch's
        loss through the example's own activations, as in hook-based K-FAC; w.r.t. a parameter without a rule, and of
        layers on rows that values picked, as by a mask, of the example's own loss through all activations. For
        independent examples it is the same as without, and does without `vmap`. An axis of a layer's input that holds
        several positions of each example must have those of an example one after another, `(n s)`.
    randomness: of dropout and the like inside `loss_fn`, as in `torch.func.vmap`.
    chunk_size: examples (of a Fisher of its own pseudo-examples) differentiated at a time, whose sums add; None takes
        the batch at once. A step with a refresh needs the bases before the moment: what a layer is made of stays until
        then where that of all layers fits into `contractions.max_bytes`, else the batch is differentiated twice, with
        the same random numbers. `thin` and `compact` bases keep the samples of the batch in any case, a compiled step
        everything; there every batch size costs graphs of its own.
    contractions: how the moments are summed, `Contractions(max_bytes, orders, costs)`: the memory that it may take, and
        the order of the products, which changes the cost alone.
    ranks: the processes that step together, each on its share of the batch: `ranks()` of a process group. Factors are
        then formed, and `thin` and `compact` bases refused, for both are of the samples of one process.

    Parameters in half precision have their statistics, and so the state, in float32.

    A batch whose loss, gradient or statistic is not finite is skipped: every tensor of the state stays as it was,
    the step number advances, `natural` is zero and `info.skipped` is true. So is every step without a second moment,
    until there is one: those after a skipped first step, to the next update (`moment_every`) or refresh (`kfac`).

    Arguments that cannot be right raise ValueError or TypeError before anything is computed.
    """
    check_loss_fn(loss_fn)
    check_estimator("", second_moment, fisher, at_refresh)
    if not callable(damping):
        check_damping(damping)
    check_exponent("exponent", exponent)
    check_count("basis_every", basis_every)
    check_count("moment_every", moment_every)
    check_decay("factor_decay", factor_decay)
    if not callable(weight_sharing):
        raise TypeError(f"weight_sharing={weight_sharing!r} is not a function: pass expand or reduce")
    options = checked_options(rules, randomness, chunk_size, has_aux, batched)
    if batched and fisher.loss is not None:
        raise ValueError(
            f"the {fisher.name} Fisher with batched=True: its loss is of one example, where the batch is taken as it "
            "is, use empirical"
        )
    check_refresh("refresh", refresh)
    check_contractions(contractions)
    if refresh.groups > basis_every:
        raise ValueError(
            f"refresh={refresh.name} in {refresh.groups} groups with basis_every={basis_every!r}: groups take turns, "
            f"give basis_every >= {refresh.groups}"
        )
    choices = {} if bases is None else bases
    check_choices(choices)
    check_ranks(ranks)
    check_of_samples(choices, ranks is not None, basis_every, factor_decay, second_moment, at_refresh)
    how = _Method(
        loss_fn=loss_fn,
        options=options,
        curvature_loss=loss_fn if fisher.loss is None else fisher.loss,
        of_curvature=options if fisher.loss is None else options._replace(has_aux=False),
        fisher=fisher,
        damping=damping,
        exponent=exponent.detach() if isinstance(exponent, Tensor) else exponent,
        second_moment=second_moment,
        at_refresh=second_moment.at_refresh if at_refresh is None else at_refresh,
        moment_every=moment_every,
        basis_every=basis_every,
        refresh=refresh,
        bases=choices,
        factor_decay=factor_decay,
        averaged=averages(factor_decay),
        weight_sharing=weight_sharing,
        contractions=contractions,
        ranks=ranks,
    )

    def init(params: Mapping[str, Tensor], batch: Batch, *, check: bool = False) -> State:
        check_params(params)
        check_batch(batch)
        if check:
            certify(loss_fn, params, batch, options)
        examples = fisher.examples(params, batch)
        layers = _blaming(fisher, plan, how.curvature_loss, separate(params), examples, how.of_curvature).layers
        check_patterns("bases", layers, choices)
        check_patterns("orders", layers, contractions.orders)
        chosen = choose(layers, choices)
        if not torch.compiler.is_compiling():
            warn_of_large(layers, chosen)
        return initial_state(layers, chosen, params, how.averaged)

    @torch.no_grad()
    def precondition(params: Mapping[str, Tensor], batch: Batch, state: State) -> tuple[Params, State, Info]:
        check_params(params)
        count = check_batch(batch)
        check_kind_of_state(state)
        in_transform = not torch.compiler.is_compiling() and depth() > 0
        if in_transform:  # which may be forward mode
            params, batch, state = _constant((dict(params), batch, state))
        stepped = _step(how, params, batch, state, count)
        return _constant(stepped) if in_transform else stepped

    return EKFAC(init, precondition)


class _Method(NamedTuple):
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


def _step(
    how: _Method, params: Mapping[str, Tensor], batch: Batch, state: State, count: int
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
        return functools.partial(_observe, how, turns[-1])

    def add(layer: Layer, some: LayerSums, others: LayerSums) -> LayerSums:
        return add_layer_sums(turns[-1].state, layer, some, others)

    folded = _blaming(how.fisher, read, begin, add)
    turn = turns[-1]
    with no_autocast(leaf.device):
        carried = _refreshed(how, turn, folded.kept)
    if before is not None:
        _second_pass(how, turn, carried.state.bases, folded.kept, read, before)
    data = None
    if how.fisher.loss is not None:
        data = fold(how.loss_fn, params, batch, how.options, lambda layers: read_gradient, add_gradients)
    with no_autocast(leaf.device):
        return _finish(how, turn, carried, _means_of(how, turn, carried, folded, data))


def _blaming(fisher: Fisher, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of the curvature loss; a note to its errors, which speak of loss_fn, says whose loss that is."""
    if fisher.loss is None or torch.compiler.is_compiling():
        return function(*args)
    try:
        return function(*args)
    except Exception as error:
        if any("loss_fn" in said for said in (str(error), *getattr(error, "__notes__", ()))):
            error.add_note(
                f"The loss_fn of this error is the curvature loss of the {fisher.name} Fisher, not that of ekfac."
            )
        raise


_unchanged = SecondMoment("unchanged", gradient_sums, lambda moment, mean, n: moment, keep)
"""The estimator of a step between two updates."""


def _turn_of(
    how: _Method, params: Mapping[str, Tensor], state: State, layers: Mapping[str, Layer], count: int, n: int
) -> _Turn:
    """What this step does to each layer, by the clocks and by which layers the batch uses."""
    chosen = choose(list(layers.values()), how.bases)
    alike = torch.compiler.is_compiling() or how.ranks is not None  # every batch must use the same layers
    if alike:
        refuse_changed_use(state, layers)
    else:
        state = with_first_uses(state, layers, chosen, params, how.averaged)
    check_state(
        state,
        {name: moment_shape(layer, chosen[name]) for name, layer in layers.items()},
        {name: factor_shapes(layer, chosen[name], how.averaged) for name, layer in layers.items()},
        params,
        layers,
    )
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
    return _Turn(params, count, n, layers, chosen, refreshing, estimators, state, known, anew)


def _observe(how: _Method, turn: _Turn, layer: Layer, terms: Terms, bytes_each: int) -> LayerSums:
    """Sums in a basis that stays; factors for one that is to change, and the terms themselves if there is room."""
    name, basis = layer.weight, turn.state.bases[layer.weight]
    if isinstance(turn.chosen[name], Thin):
        return LayerSums(terms=(terms,))
    if name in turn.refreshing:
        factors = factor_sums(terms, basis, how.weight_sharing, how.averaged or how.ranks is not None)
        size = how.options.chunk_size
        room = size is None or bytes_each * turn.n <= budget(how.contractions, bytes_each * size)
        return LayerSums(factors=factors, terms=(terms,) if room or torch.compiler.is_compiling() else ())
    samples = (terms,) if _of_samples(how, turn, terms, basis) else ()
    return LayerSums(_sums_in(how, turn, basis, layer, terms, bytes_each), terms=samples)


def _sums_in(how: _Method, turn: _Turn, basis: Basis, layer: Layer, terms: Terms, bytes_each: int) -> Sums:
    order = contraction_of(layer, terms, basis, how.contractions, bytes_each)
    return turn.estimators[layer.weight].sums(terms, basis, order)


def _of_samples(how: _Method, turn: _Turn, terms: Terms, basis: Basis) -> bool:
    """Whether the samples of a layer are rescaled, not its gradient."""
    return how.ranks is None and rescales_samples(terms, basis, turn.n)


def _refreshed(how: _Method, turn: _Turn, seen: dict[str, LayerSums]) -> _Carried:
    """What the step goes on from: bases and moments are new if a refresh is due."""
    started, spans, totals = into_spans(turn.chosen, turn.state, turn.layers, seen, how.weight_sharing)
    if not turn.refreshing:
        return _Carried(started, spans, totals)
    of_layers = {name: seen[name].factors or () for name in turn.refreshing}
    sums = total_factors(of_layers, how.ranks, turn.examples / turn.n)
    means = {name: mean_factors(of_layer) for name, of_layer in sums.items()}
    state, kept, samples = _refresh(how, turn, started, means)
    return _Carried(state, spans, totals, kept, samples)


def _refresh(how: _Method, turn: _Turn, state: State, means: Mapping[str, Means]) -> tuple[State, Tensor, list[Tensor]]:
    """The state with factors of this batch, their bases and the moments in them; `kept` and `samples` of `_Carried`.

    Layers without factors stay as they are.
    """
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
    return state, kept, samples


def _second_pass(
    how: _Method,
    turn: _Turn,
    bases: Mapping[str, Basis],
    seen: dict[str, LayerSums],
    read: Callable[..., Folded],
    before: Draws,
) -> None:
    """Sum up the layers whose terms could not stay until their bases were there, with the same random numbers."""
    again = [name for name in turn.layers if seen[name].sums is None and not seen[name].terms]

    def missing(layer: Layer, terms: Terms, bytes_each: int) -> Sums | None:
        basis = bases[layer.weight]
        return _sums_in(how, turn, basis, layer, terms, bytes_each) if layer.weight in again else None

    if again:
        before.repeat()
        kept = read(lambda layers: missing, add_if_any).kept
        seen |= {name: LayerSums(kept.pop(name)) for name in again}


def _means_of(how: _Method, turn: _Turn, carried: _Carried, folded: Folded, data: Folded | None) -> _BatchMeans:
    """What the batch said, of all processes. data: what was read of loss_fn, where the curvature loss is another."""
    n, count = turn.n, turn.examples
    sums, samples = _in_bases(how, turn, carried.state.bases, folded)
    curvature = folded.losses.sum()
    of_data: Any = None if data is None else (data.kept, data.losses.sum(), len(data.losses))
    if how.ranks is None:
        count = n
    elif count != n:  # of processes that may have made more pseudo-examples of an example than others
        share = count / n
        sums, curvature = pytree.tree_map_only(Tensor, lambda t: t * share, (sums, curvature))
    sums, curvature, n_all, count_all, of_data = total((sums, curvature, n, count, of_data), how.ranks)
    means, slopes = {}, {}
    for name in turn.layers:
        new = turn.estimators[name].sums in (exact_sums, gradient_sums)
        means[name] = mean_sums(sums.pop(name), count_all, own=new)
        slope = carried.totals[name] / n_all if name in carried.totals else means[name].gradient
        slopes[name] = Mean(slope, means[name].projected, samples.get(name), n_all)
    if data is None:
        return _BatchMeans(curvature / count_all, curvature, n_all, means, slopes, folded.aux)
    loss, slopes = _of_data(turn, carried, data.layers, of_data)
    return _BatchMeans(loss, curvature, n_all, means, slopes, data.aux)


def _in_bases(
    how: _Method, turn: _Turn, bases: Mapping[str, Basis], folded: Folded
) -> tuple[dict[str, Sums], dict[str, Terms]]:
    """The sums of each layer, and the samples of layers that are rescaled as samples. Empties what was read."""
    sums: dict[str, Sums] = {}
    samples: dict[str, Terms] = {}
    for name, layer in turn.layers.items():
        of_layer, basis = folded.kept.pop(name), bases[name]
        terms: Terms = joined(of_layer.terms) if of_layer.terms else ()
        sums[name] = of_layer.sums or _sums_in(how, turn, basis, layer, terms, folded.bytes_each)
        if _of_samples(how, turn, terms, basis):
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
    exact = {name: p.new_empty(0, dtype=statistics_dtype(p)) for name, p in turn.params.items()}
    tree = unpack_all(own.values(), means, exact)
    slopes = {}
    for name, layer in turn.layers.items():
        M = pack(layer, tree)
        projected = into_basis(into_span(M, carried.spans[name]), carried.state.bases[name])
        slopes[name] = Mean(M, projected, None, n)
    return loss / n, slopes


def _finish(how: _Method, turn: _Turn, carried: _Carried, observed: _BatchMeans) -> tuple[Params, State, Info]:
    """The new moments, the natural gradient, and the old state in place of the new one where it is not finite."""
    layers, bases, slopes, params = turn.layers, carried.state.bases, observed.slopes, turn.params
    moments = _updated(turn, carried.state, observed)
    dampings = _dampings(how.damping, moments, bases, layers)
    natural_in = {
        name: _natural_of(how, layer, slopes[name], moments[name], dampings[name], carried)
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
    natural = {name: where(good, p, p.new_zeros(())) for name, p in natural.items()}
    used = torch.stack([dampings[name] for name in layers])
    info = Info(
        observed.loss,
        unpack_all(layers.values(), {name: slope.gradient for name, slope in slopes.items()}, params),
        ~good,
        good.new_zeros((), dtype=torch.int64) if carried.kept is None else torch.where(good, carried.kept, 0),
        used if callable(how.damping) else used[0],
        observed.aux,
    )
    return natural, _choose(good, new, turn.state), info


def _natural_of(how: _Method, layer: Layer, slope: Mean, moment: Moment, added: Tensor, carried: _Carried) -> Tensor:
    """The rescaled gradient of a layer, `[b o i k]`. added: its damping."""
    basis, span = carried.state.bases[layer.weight], carried.spans[layer.weight]
    sizes = in_span(layer, span).sizes
    natural = expand_span(rescaled(slope, moment, basis, added, how.exponent, sizes), span)
    if how.fisher.loss is None or span == (None, None):
        return natural
    outside = slope.gradient - expand_span(into_span(slope.gradient, span), span)  # of the data's loss
    return natural + outside * added**how.exponent


def _constant(tree: Any) -> Any:
    """The tensors detached."""
    return pytree.tree_map_only(Tensor, Tensor.detach, tree)


def _dampings(
    damping: Number | Damping, moments: Mapping[str, Moment], bases: Mapping[str, Basis], layers: Mapping[str, Layer]
) -> dict[str, Tensor]:
    """The damping of each layer, `[]`."""
    if callable(damping):
        ruled = damping({name: _spectrum(moments[name], bases[name], layer) for name, layer in layers.items()})
        check_dampings(ruled, layers)
    else:
        ruled = dict.fromkeys(layers, damping)
    return {name: _as_scalar(ruled[name], moments[name].weight) for name in layers}


def _spectrum(moment: Moment, basis: Basis, layer: Layer) -> Spectrum:
    value = moment.value
    if fills_up(basis, layer):
        value = torch.where(real(basis, layer), value, 0)
    return Spectrum(value, moment.weight, counts(basis, value), math.prod(layer.sizes))


def _as_scalar(damping: Number, like: Tensor) -> Tensor:
    if isinstance(damping, Tensor):
        return damping.detach() + like.new_zeros(())
    smallest = torch.finfo(like.dtype).tiny
    if damping < smallest:
        given = "damping" if torch.compiler.is_compiling() else f"damping={damping!r}"  # a symbol has no text
        raise ValueError(given + " is zero in the dtype of the moments: give at least torch.finfo(dtype).tiny")
    if torch.compiler.is_compiling():  # where what is filled in would cost a graph
        return damping + like.new_zeros(())
    return like.new_full((), damping)


def rescaled(
    mean: Mean,
    moment: Moment,
    basis: Basis,
    damping: Tensor,
    exponent: Number,
    sizes: tuple[int, int, int, int],
) -> Tensor:
    """`Q_B [ projected (m2 + damping)^exponent ] Q_A^T`; zero while there is no estimate of m2."""
    value, added = moment.value, torch.where(moment.weight > 0, damping, torch.inf)
    damped = torch.add(value, added, out=empty(value.shape, value)) if writable(value, added) else value + added
    if incomplete(basis):
        return rescale(mean, damped**exponent, basis)
    room = None if transformed() else damped  # new memory costs more than the arithmetic
    if not isinstance(exponent, Tensor) and exponent == -1:  # a division is one pass over memory less than a power
        return out_of_basis(torch.div(mean.projected, damped, out=room), basis, sizes)
    return out_of_basis(torch.mul(mean.projected, torch.pow(damped, exponent, out=room), out=room), basis, sizes)


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


def _choose(good: Tensor, new: State, old: State) -> State:
    """The new state where the step was good, else every tensor of the old one; the step number advances."""
    old = replace(old, step=new.step, layers=new.layers)
    return pytree.tree_map(lambda x, y: x if x is y else where(good, x, y), new, old)
