"""Estimators of the second moment side by side, from one capture a batch, against the moment of all the data."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .basis import choose
from .capture import UNMAPPED, Captured, capture
from .checks import check_batch, check_count, check_decay, check_params, check_positive
from .contraction import add_sums, exact_sums, mean_sums
from .discovery import Options, checked_options
from .fisher import Fisher, check_estimator, check_fisher, empirical
from .kronecker import (
    add_factor_sums,
    average_factors,
    count,
    eigenvalue_product,
    factor_sums,
    gradient,
    into_basis,
    mean_factors,
    pack,
    times,
    unpack,
    unpack_all,
)
from .orders import contraction_of
from .precondition import initial_state, rescaled
from .reference import exact_block, part
from .refreshes import refresh_bases
from .rules import RULES, SUA, Rules
from .second_moment import (
    AtRefresh,
    SecondMoment,
    averaged_intra_batch,
    carry_over,
    centred,
    intra_batch,
    kfac,
    running_average,
)
from .subspace import Mean
from .types import Basis, Batch, Factors, Layer, LossFn, Means, Moment, Params, State, Sums, Terms, batch_size

try:
    from tqdm import tqdm
except ModuleNotFoundError:  # it is optional
    tqdm = None

OfLayers = Mapping[str, Terms]
Halves = Callable[[OfLayers, int], tuple[OfLayers | None, OfLayers]]
"""(terms, examples) -> terms that make the basis, or None for the parameters' own coordinates; terms of the moment"""


def whole_batch(terms: OfLayers, n: int) -> tuple[OfLayers, OfLayers]:
    """Basis and moment from the same examples, as `ekfac` does."""
    return terms, terms


def split_batch(terms: OfLayers, n: int) -> tuple[OfLayers, OfLayers]:
    """The basis from the first half of the batch, the moment from the second: the moment does not see its own basis."""

    def halved(term: Terms, first: bool) -> Terms:
        total = count(term)
        middle = n // 2 * (total // n)  # an example's draws stay together
        return part(term, 0, middle) if first else part(term, middle, total)

    first, second = ({name: halved(term, side) for name, term in terms.items()} for side in (True, False))
    return first, second


def own_coordinates(terms: OfLayers, n: int) -> tuple[None, OfLayers]:
    """No rotation: the moment of each parameter, a diagonal Fisher."""
    return None, terms


class Estimator(NamedTuple):
    """One way to a second moment: an estimator, the gradients and the basis that it works in, and its schedule.

    second_moment, fisher, basis_every, at_refresh, factor_decay, rules: as in `ekfac`.
    basis: which examples of a batch make the basis and which the moment: `whole_batch`, `split_batch` or
        `own_coordinates`, without a basis.
    """

    second_moment: SecondMoment = intra_batch
    fisher: Fisher = empirical
    basis: Halves = whole_batch
    basis_every: int = 1
    at_refresh: AtRefresh | None = None
    factor_decay: float = 0.0
    rules: Rules = RULES


ONCE = 10**9  # basis_every of a basis that is never refreshed

ESTIMATORS: Mapping[str, Estimator] = {
    "intra_batch": Estimator(),
    "averaged 0.9": Estimator(averaged_intra_batch(0.9), basis_every=5),
    "running 0.9": Estimator(running_average(0.9), basis_every=5),
    "running 0.99": Estimator(running_average(0.99), basis_every=5),
    "kfac": Estimator(kfac),
    "sua": Estimator(rules={**RULES, **SUA}),
    "sua kfac": Estimator(kfac, rules={**RULES, **SUA}),
    "diagonal": Estimator(basis=own_coordinates),
    "split": Estimator(basis=split_batch),
    "centred": Estimator(centred),
    "first basis": Estimator(basis_every=ONCE),
    "first basis kfac": Estimator(kfac, basis_every=ONCE),
}
"""What `compare` compares by default, by name."""


class Record(NamedTuple):
    """One estimator on one layer after one batch, against the reference Fisher F over all the data.

    Norms are Frobenius norms over the layer's blocks; `layer` "all" is the whole model as block-diagonal. The exact
    moment is that of all the data in the estimator's own basis. A ratio 0 / 0 is 0.
    """

    estimator: str
    layer: str
    step: int
    since_refresh: int  # steps since the basis was refreshed
    examples: int  # in the batch
    moment_error: float  # ||m2 - exact|| / ||exact||
    fisher_error: float  # ||F - estimate|| / ||F||
    fisher_distance: float  # ||F - estimate||, in loss^2 / parameter^2
    off_diagonal: float  # share of ||F||^2 off the diagonal in the basis
    effective_rank: float  # of the estimate: (sum m2)^2 / sum m2^2
    fisher_rank: float  # of F: trace^2 / ||F||^2
    signal_to_noise: float  # median over eigen-directions of mean^2 / variance of the data's gradient, of one example
    signal_share: float  # of eigen-directions in which the batch's mean exceeds its standard error
    cosine: float  # of the natural gradient (of all the data's gradient) to the target
    natural_distance: float  # ||natural - target|| / ||target||
    target: str  # "dense": of the damped dense F; "ekfac": of the exact moment in the basis of all the data
    decrease: float  # of the loss over all the data, by the best step along this layer's natural gradient
    step_size: float  # the best one; 0 where none decreases the loss


class Seen(NamedTuple):
    """The moments behind a record, for plots."""

    estimator: str
    layer: str
    step: int
    estimate: Tensor  # [b O I k]
    exact: Tensor  # [b O I k] of the reference over all the data, in the same basis


@torch.no_grad()
def compare(
    loss_fn: LossFn,
    params: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    batches: Sequence[Batch],
    *,
    damping: float,
    estimators: Mapping[str, Estimator | SecondMoment] = ESTIMATORS,
    reference: Fisher = empirical,
    step_sizes: Sequence[float] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    dense_limit: int = 2048,
    randomness: str = "different",
    chunk_size: int | None = None,
    progress: bool = True,
    watch: Callable[[Seen], None] | None = None,
) -> list[Record]:
    """How far each estimator is from the exact second moment, and whether it matters for the step.

    Every estimator sees the batches in their order, one a step, and is judged after each against all of them.

    loss_fn: as in `ekfac`.
    params: one tree for all steps, or a sequence with one for each batch, such as a training trajectory; then all data
        are captured anew at every step.
    batches: the data, batch by batch, of any sizes; their captures are held in memory.
    damping: added to every second moment and to the dense Fisher, in loss^2 / parameter^2.
    estimators: by name, `Estimator` or `SecondMoment` values, also your own.
    reference: the Fisher that all are judged against, whichever theirs is.
    step_sizes: tried along each natural gradient, for most of the time that `compare` takes; () leaves that out.
    dense_limit: the natural gradient of the dense damped Fisher is the target where a layer's coordinates or the
        pseudo-examples of all the data are at most so many; elsewhere it is EKFAC's, of basis and moment of all data.
    randomness, chunk_size: as in `ekfac`.
    progress: show a bar, if tqdm is installed.
    watch: called with the moments behind each record of a layer.

    With SUA rules a layer's block is that of its weight alone, its bias a block of its own. Differences of norms are
    taken in float64 from gradients in the dtype of params: errors below 1e-3 need float64 params and data.
    """
    if not isinstance(estimators, Mapping):
        raise TypeError(f"estimators is a {type(estimators).__name__}: pass a dict from names to estimators")
    if not estimators:
        raise ValueError("estimators is empty: pass at least one, by name, or leave it out")
    if not isinstance(batches, Sequence):
        raise TypeError(f"batches is a {type(batches).__name__}: pass a list of batches")
    chosen = {name: _checked(name, estimator) for name, estimator in estimators.items()}
    if not isinstance(params, Iterable):
        raise TypeError(f"params is a {type(params).__name__}: pass a dict of tensors, or one for each batch")
    trajectory = [params] * len(batches) if isinstance(params, Mapping) else list(params)
    check_positive("damping", damping)
    check_fisher(reference, "reference")
    for estimator in chosen.values():
        checked_options(estimator.rules, randomness, chunk_size, has_aux=False, batched=False)
    if not isinstance(step_sizes, Iterable):
        raise TypeError(f"step_sizes is a {type(step_sizes).__name__}: pass a list of numbers, or ()")
    step_sizes = [float(size) for size in step_sizes]
    counts = _checked_counts(trajectory, batches, chosen)

    recipes: dict[Any, dict[str, Estimator]] = {}
    for name, estimator in chosen.items():
        recipes.setdefault(_recipe(estimator), {})[name] = estimator
    frames: dict[Any, _Frame] = {}
    records: list[Record] = []
    moves = sum(trajectory[t] is not trajectory[t - 1] for t in range(1, len(batches)))
    data: _Data | None = None
    with _bar(progress, (1 + moves) * len(batches) + len(batches) * len(chosen)) as advance:
        for t in range(len(batches)):
            if data is None or trajectory[t] is not trajectory[t - 1]:
                data = _Data(loss_fn, trajectory[t], batches, reference, damping, dense_limit, randomness, chunk_size)
                data.load([(e.fisher, e.rules) for e in chosen.values()], advance)
            for recipe, members in recipes.items():
                first = next(iter(members.values()))
                frames[recipe] = frame = _advance(frames.get(recipe), data, first, members, t)
                for name in members:
                    records += _judge(name, frame, data, first, t, counts[t], step_sizes, watch)
                    advance()
    return records


def summarise(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Mean and standard error over the batches of every figure, one row for each estimator and layer.

    The standard error is that of independent batches; an average over steps has fewer. Not a number for one batch.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.estimator, record.layer), []).append(record)
    rows = []
    for (estimator, layer), group in groups.items():
        row: dict[str, Any] = {"estimator": estimator, "layer": layer, "batches": len(group)}
        for field in FIGURES:
            values = torch.tensor([getattr(record, field) for record in group], dtype=torch.float64)
            row[field] = values.mean().item()
            row[f"{field}_se"] = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan
        rows.append(row)
    return rows


FIGURES = tuple(
    field
    for field in Record._fields
    if field not in ("estimator", "layer", "step", "since_refresh", "examples", "target")
)


def _checked(name: str, estimator: Estimator | SecondMoment) -> Estimator:
    if isinstance(estimator, SecondMoment):
        estimator = Estimator(estimator)
    if not isinstance(estimator, Estimator):
        raise TypeError(f"estimators[{name!r}] is a {type(estimator).__name__}: pass an Estimator or a SecondMoment")
    check_count("basis_every", estimator.basis_every)
    check_decay("factor_decay", estimator.factor_decay)
    check_estimator(f"estimators[{name!r}]: ", estimator.second_moment, estimator.fisher, estimator.at_refresh)
    if not callable(estimator.basis):
        raise TypeError(
            f"estimators[{name!r}]: basis={estimator.basis!r} is not a function: pass whole_batch, split_batch or "
            "own_coordinates"
        )
    return estimator


def _checked_counts(
    trajectory: Sequence[Mapping[str, Tensor]], batches: Sequence[Batch], estimators: Mapping[str, Estimator]
) -> list[int]:
    """The examples in each batch. ValueError where parameters, batches and estimators do not go together."""
    if not batches:
        raise ValueError("batches is empty: pass the data as at least one batch")
    if len(trajectory) != len(batches):
        raise ValueError(f"params has {len(trajectory)} trees for {len(batches)} batches: give one, or one a batch")
    for params in trajectory:
        check_params(params)
    counts = [check_batch(batch) for batch in batches]
    split = [name for name, estimator in estimators.items() if estimator.basis is split_batch]
    for t, n in enumerate(counts):
        if n < 2 and split:
            raise ValueError(
                f"batches[{t}] has {n} example, which estimators[{split[0]!r}] cannot split: give at least 2 examples "
                "a batch, or leave that estimator out"
            )
    return counts


def _table(rules: Rules) -> Any:
    """Rules as the key of a dict."""
    return tuple(rules.items())


def _recipe(e: Estimator) -> Any:
    """What decides the bases of an estimator: those with the same recipe share them."""
    return e.fisher, e.basis, e.basis_every, e.factor_decay, _table(e.rules)


class _Truth(NamedTuple):
    """What the estimators are judged against on one layer."""

    layer: Layer
    slope: Tensor  # [b o i k] gradient of all the data
    square_norm: float  # of F
    trace: float  # of F
    natural: Tensor  # [b o i k] the target
    target: str


class _Data:
    """All the batches at one point of the parameters: captures by (Fisher, rules), and the truth by rules."""

    def __init__(
        self,
        loss_fn: LossFn,
        params: Mapping[str, Tensor],
        batches: Sequence[Batch],
        reference: Fisher,
        damping: float,
        limit: int,
        randomness: str,
        chunk_size: int | None,
    ) -> None:
        self.loss_fn, self.params, self.batches, self.reference = loss_fn, dict(params), batches, reference
        self.damping, self.limit, self.randomness, self.chunk_size = damping, limit, randomness, chunk_size
        self.captures: dict[Any, list[Captured]] = {}
        self.references: dict[Any, list[Captured]] = {}  # by rules
        self.truths: dict[Any, dict[str, _Truth]] = {}  # by rules and layer

    def load(self, sources: Sequence[tuple[Fisher, Rules]], advance: Callable[[], object]) -> None:
        """Capture every batch once for each kind of gradients and table of rules."""
        tables = {_table(rules): rules for _, rules in sources}
        wanted = [*sources, *((f, rules) for rules in tables.values() for f in (empirical, self.reference))]
        for batch in self.batches:
            done = set()
            for fisher, rules in wanted:
                key = fisher, _table(rules)
                if key in done:
                    continue
                done.add(key)
                loss = self.loss_fn if fisher.loss is None else fisher.loss
                examples = fisher.examples(self.params, batch)
                captured = capture(loss, self.params, examples, Options(rules, self.randomness, self.chunk_size))
                self.captures.setdefault(key, []).append(captured)
            advance()
        own = self.captures[empirical, next(iter(tables))]
        n = sum(len(captured.losses) for captured in own)
        self.loss = sum(captured.losses.double().sum().item() for captured in own) / n
        slopes = {
            name: functools.reduce(torch.add, (gradient(c.terms[name]) for c in own)) / n for name in own[0].layers
        }
        self.slope = unpack_all(own[0].layers.values(), slopes, self.params)
        for table in tables:
            self.references[table] = _weighed(self.captures[self.reference, table], [len(c.losses) for c in own])
            self.truths[table] = self._truth(table)

    def _truth(self, table: Any) -> dict[str, _Truth]:
        captures = self.references[table]
        found = {}
        for name, layer in captures[0].layers.items():
            terms = [captured.terms[name] for captured in captures]
            slope = pack(layer, self.slope)
            exact = exact_block(terms, layer, slope, self.damping, self.limit)
            mean, everywhere = self._everywhere(terms, layer)
            square = _square(mean)
            natural, target = exact.natural, "dense"
            if natural is None:
                moment = Moment(square, torch.ones((), dtype=slope.dtype, device=slope.device))
                natural = _scaled(into_basis(slope, everywhere), moment, everywhere, self.damping, layer)
                target = "ekfac"
            norm, trace = exact.square_norm.item(), square.double().sum().item()
            found[name] = _Truth(layer, slope, norm, trace, natural.to(torch.float64), target)
        return found

    def _everywhere(self, terms: Sequence[Terms], layer: Layer) -> tuple[Sums, Basis]:
        """Exact means over all the data in the eigenbasis of all the data's factors."""
        name, bases = layer.weight, _started((layer,), self.params).bases
        sums = (factor_sums(of_batch, bases[name]) for of_batch in terms)
        total = functools.reduce(lambda some, more: add_factor_sums(some, more, bases[name]), sums)
        basis = refresh_bases({name: mean_factors(total)}, bases)[0][name]
        return exact_means(terms, basis), basis

    def mean_loss(self, params: Params) -> float:
        """Over all the data."""
        total, n = 0.0, 0
        for batch in self.batches:
            losses = _losses(self.loss_fn, params, batch, self.randomness, self.chunk_size)
            total, n = total + losses.double().sum().item(), n + len(losses)
        return total / n


def _weighed(captures: list[Captured], examples: list[int]) -> list[Captured]:
    """Captures of pseudo-examples, scaled so that each example weighs the same, however many a batch has of it."""
    counts = [len(captured.losses) for captured in captures]
    mean = sum(examples) / sum(counts)
    weighed = []
    for captured, n, m in zip(captures, counts, examples, strict=True):
        if m / n != mean:
            root = math.sqrt(m / n / mean)
            terms = {name: tuple(times(term, root) for term in of_layer) for name, of_layer in captured.terms.items()}
            captured = captured._replace(terms=terms)
        weighed.append(captured)
    return weighed


def exact_means(terms: Sequence[Terms], basis: Basis) -> Sums:
    """Means over the examples of all terms of G, of G in the basis and of its square."""
    total = functools.reduce(add_sums, (exact_sums(term, basis) for term in terms))
    return mean_sums(total, sum(map(count, terms)))


def _started(layers: tuple[Layer, ...], params: Params) -> State:
    """The state before the first step, with whole bases."""
    return initial_state(layers, choose(layers, {}), params)


def _factors(terms: Terms, basis: Basis, formed: bool = True) -> Means:
    return mean_factors(factor_sums(terms, basis, formed=formed))


def _scaled(projected: Tensor, moment: Moment, basis: Basis, damping: float, layer: Layer) -> Tensor:
    """The natural gradient `[b o i k]` of a layer, from its gradient in the basis."""
    mean = Mean(projected, projected, None, 1)  # of a whole basis, for which the gradient itself is not read
    return rescaled(mean, moment, basis, projected.new_tensor(damping), -1.0, layer.sizes)


class _Frame(NamedTuple):
    """The bases of a recipe after a step, the moments of its estimators, and the truth in these bases."""

    refreshed: int  # step of the last refresh
    factors: dict[str, Factors]
    bases: dict[str, Basis]
    moments: dict[str, dict[str, Moment]]  # by estimator and layer
    exact: dict[str, Tensor]  # [b O I k] of the reference
    noise: dict[str, tuple[Tensor, Tensor] | None]  # mean and second moment of the data's gradient
    at: _Data


def _advance(frame: _Frame | None, data: _Data, recipe: Estimator, members: Mapping[str, Estimator], t: int) -> _Frame:
    """One step of all estimators of a recipe."""
    table = _table(recipe.rules)
    captured = data.captures[recipe.fisher, table][t]
    layers = {name: truth.layer for name, truth in data.truths[table].items()}
    if captured.layers != layers:
        raise ValueError(
            f"the {recipe.fisher.name} Fisher sees the layers {list(captured.layers.values())}, the reference "
            f"{data.reference.name} {list(layers.values())}: give a reference whose loss uses them alike"
        )
    for_basis, for_moment = recipe.basis(captured.terms, batch_size(data.batches[t]))
    if frame is None:
        state = _started(tuple(captured.layers.values()), data.params)
        moments = {name: dict(state.second_moments) for name in members}
        frame = _Frame(t, state.factors, state.bases, moments, {}, {}, data)
    turn = for_basis is not None and t % recipe.basis_every == 0
    factors, bases = dict(frame.factors), dict(frame.bases)
    used: dict[str, Means] = {}
    if turn:
        assert for_basis is not None
        averaged = recipe.factor_decay > 0  # else the bases are those of `ekfac`, of few samples the samples' own
        used = {name: _factors(term, bases[name], averaged) for name, term in for_basis.items()}
        for name, mean in used.items():
            factors[name] = average_factors(frame.factors[name], mean, recipe.factor_decay)
        bases |= refresh_bases({name: factors[name] for name in used} if averaged else used, frame.bases)[0]
    elif for_basis is None and t == 0:
        # K-FAC's eigenvalues in the parameters' own coordinates
        used = {name: _factors(term, bases[name]) for name, term in for_moment.items()}
        for name, mean in used.items():
            factors[name] = average_factors(frame.factors[name], mean, 0.0)

    @functools.cache
    def means(sums: Callable[..., Sums], name: str) -> Sums:
        term, basis = for_moment[name], bases[name]
        return mean_sums(sums(term, basis, contraction_of(name, term, basis)), count(term))

    def moment_of(member: str, estimator: Estimator, name: str) -> Moment:
        rule, moment = estimator.second_moment, frame.moments[member][name]
        if name in used:
            carry = rule.at_refresh if estimator.at_refresh is None else estimator.at_refresh
            positions = used[name].positions
            product = functools.partial(eigenvalue_product, factors[name], bases[name], positions, moment.value)
            moment = carry_over(rule, carry, moment, frame.bases[name], bases[name], product)
        return rule.update(moment, means(rule.sums, name), count(for_moment[name]))

    moments = {member: {name: moment_of(member, e, name) for name in for_moment} for member, e in members.items()}
    exact, noise = frame.exact, frame.noise
    if turn or not exact or frame.at is not data:
        exact, noise = _all_data_in(bases, data, table)
    return _Frame(t if turn else frame.refreshed, factors, bases, moments, exact, noise, data)


def _all_data_in(
    bases: Mapping[str, Basis], data: _Data, table: Any
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor] | None]]:
    """`exact` and `noise` of a `_Frame` with these bases, from all the data."""
    exact: dict[str, Tensor] = {}
    noise: dict[str, tuple[Tensor, Tensor] | None] = {}
    own = data.captures[empirical, table]
    for name, truth in data.truths[table].items():
        means = exact_means([c.terms[name] for c in data.references[table]], bases[name])
        exact[name] = _square(means)
        if own[0].layers.get(name) != truth.layer:
            noise[name] = None
            continue
        if data.reference is not empirical:
            means = exact_means([c.terms[name] for c in own], bases[name])
        noise[name] = means.projected, _square(means)
    return exact, noise


def _judge(
    name: str,
    frame: _Frame,
    data: _Data,
    recipe: Estimator,
    t: int,
    examples: int,
    step_sizes: Sequence[float],
    watch: Callable[[Seen], None] | None,
) -> Iterator[Record]:
    """The records of an estimator after a step: of each layer, then of the whole model."""
    truths = data.truths[_table(recipe.rules)]
    parts: list[dict[str, float]] = []
    directions: Params = {}
    ratios: list[Tensor] = []
    for layer, truth in truths.items():
        moment, exact, basis = frame.moments[name][layer], frame.exact[layer], frame.bases[layer]
        if watch is not None:
            watch(Seen(name, layer, t, moment.value, exact))
        natural = _scaled(into_basis(truth.slope, basis), moment, basis, data.damping, truth.layer)
        direction = unpack(truth.layer, natural, data.params)
        directions |= direction
        ratio = _signal_to_noise(frame.noise[layer])
        ratios.append(ratio)
        parts.append(_sums_of(moment.value, exact, truth, natural))
        decrease, size = _best_step(data, direction, step_sizes)
        yield _record(name, layer, t, frame, examples, parts[-1:], ratio, truth.target, decrease, size)
    decrease, size = _best_step(data, directions, step_sizes)
    target = " and ".join(sorted({truth.target for truth in truths.values()}))
    yield _record(name, "all", t, frame, examples, parts, torch.cat(ratios), target, decrease, size)


def _sums_of(estimate: Tensor, exact: Tensor, truth: _Truth, natural: Tensor) -> dict[str, float]:
    """The sums of one layer whose ratios are its figures; added up over the layers, those of the whole model."""
    m, e, v, target = (x.to(torch.float64) for x in (estimate, exact, natural, truth.natural))
    return {
        "error": (m - e).square().sum().item(),
        "exact": e.square().sum().item(),
        "norm": truth.square_norm,
        # ||F - Q diag(m) Q^T||^2 = ||F||^2 - ||e||^2 + ||m - e||^2, e the diagonal of Q^T F Q
        "off": max(truth.square_norm - e.square().sum().item(), 0.0),
        "sum": m.sum().item(),
        "square": m.square().sum().item(),
        "trace": truth.trace,
        "dot": (v * target).sum().item(),
        "natural": v.square().sum().item(),
        "target": target.square().sum().item(),
        "apart": (v - target).square().sum().item(),
    }


def _record(
    name: str,
    layer: str,
    t: int,
    frame: _Frame,
    examples: int,
    parts: Sequence[Mapping[str, float]],
    ratio: Tensor,
    target: str,
    decrease: float,
    step_size: float,
) -> Record:
    """A record from the sums of one layer, or of all of them."""
    s = {key: sum(part[key] for part in parts) for key in parts[0]}
    distance = math.sqrt(s["off"] + s["error"])
    return Record(
        estimator=name,
        layer=layer,
        step=t,
        since_refresh=t - frame.refreshed,
        examples=examples,
        moment_error=_ratio(math.sqrt(s["error"]), math.sqrt(s["exact"])),
        fisher_error=_ratio(distance, math.sqrt(s["norm"])),
        fisher_distance=distance,
        off_diagonal=_ratio(s["off"], s["norm"]),
        effective_rank=_ratio(s["sum"] ** 2, s["square"]),
        fisher_rank=_ratio(s["trace"] ** 2, s["norm"]),
        signal_to_noise=ratio.median().item() if len(ratio) else math.nan,
        signal_share=(examples * ratio > 1).double().mean().item() if len(ratio) else math.nan,
        cosine=_ratio(s["dot"], math.sqrt(s["natural"] * s["target"])),
        natural_distance=_ratio(math.sqrt(s["apart"]), math.sqrt(s["target"])),
        target=target,
        decrease=decrease,
        step_size=step_size,
    )


def _signal_to_noise(noise: tuple[Tensor, Tensor] | None) -> Tensor:
    """`mean^2 / variance` of one example's gradient in each eigen-direction with noise, flat."""
    if noise is None or noise[1].numel() == 0:
        return torch.empty(0, dtype=torch.float64)
    mean, square = (x.to(torch.float64).flatten() for x in noise)
    variance, eps = square - mean.square(), torch.finfo(noise[1].dtype).eps
    live = (variance > eps * square) & (square > (100 * eps) ** 2 * square.max())  # the rest is rounding
    return (mean.square() / variance)[live].cpu()


def _best_step(data: _Data, direction: Params, step_sizes: Sequence[float]) -> tuple[float, float]:
    """The largest decrease of the loss over all the data along a direction, 0 if there is none, and its step size."""
    best = (0.0, 0.0)
    for size in step_sizes:
        moved = {name: p - size * direction[name] if name in direction else p for name, p in data.params.items()}
        decrease = data.loss - data.mean_loss(moved)
        if decrease > best[0]:  # false for NaN
            best = decrease, size
    return best


def _losses(loss_fn: LossFn, params: Params, batch: Batch, randomness: str, chunk_size: int | None) -> Tensor:
    """The losses of a batch, `[n]`: by `vmap`, or by a loop where `vmap` cannot run the loss."""
    try:
        each = torch.func.vmap(loss_fn, (None, 0), randomness=randomness, chunk_size=chunk_size)
        return each(params, batch)
    except RuntimeError as error:
        if not str(error).startswith("vmap: ") and not any(said in str(error) for said in UNMAPPED):
            raise
        examples = (pytree.tree_map(lambda leaf, k=k: leaf[k], batch) for k in range(batch_size(batch)))
        return torch.stack([loss_fn(params, example) for example in examples])


def _square(means: Sums) -> Tensor:
    assert means.square is not None
    return means.square


def _ratio(x: float, y: float) -> float:
    """`x / y`, with `0 / 0 = 0`."""
    return 0.0 if x == 0 else (x / y if y else math.inf)


@contextlib.contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[], object]]:
    """A function that advances a progress bar by one, if that is wanted and tqdm is installed."""
    if not wanted or tqdm is None:
        yield lambda: None
        return
    with tqdm(total=total, desc="compare", unit="part", dynamic_ncols=True) as bar:
        yield bar.update
