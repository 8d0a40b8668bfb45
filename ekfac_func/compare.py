"""Estimators of the second moment side by side, from one capture a batch, against the moment of all the data."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .checks import check_batch, check_count, check_decay, check_params, check_positive
from .contraction import mean_sums
from .discovery import checked_options
from .factors import average_factors, eigenvalue_product, factor_sums, mean_factors
from .fisher import Fisher, check_estimator, check_fisher, empirical
from .kronecker import count, unpack
from .orders import contraction
from .records import Record, figures, signal_to_noise, sums_of
from .reference import part
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
from .truth import Data, Truth, exact_means, natural_of, started, table_of
from .types import Basis, Batch, Factors, LossFn, Means, Moment, Params, Sums, Terms, batch_size

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

    first, second = {}, {}
    for name, of_layer in terms.items():
        total = count(of_layer)
        middle = n // 2 * (total // n)  # an example's draws stay together
        first[name], second[name] = part(of_layer, 0, middle), part(of_layer, middle, total)
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

    def __repr__(self) -> str:
        own = {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}
        return f"Estimator({', '.join(f'{name}={value!r}' for name, value in own.items())})"


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
    estimators: by name, `Estimator` or `SecondMoment` values, also your own. `ESTIMATORS`, the default, are
        `intra_batch`, `kfac`, `centred` (less the square of the batch's mean) and, by rules `SUA`, `sua` and `sua
        kfac`, with a new basis for each batch; `averaged 0.9`, `running 0.9` and `running 0.99`, with one every 5
        batches; `diagonal`, in the parameters' own coordinates; `split`, a basis from one half of the batch and the
        moment from the other; `first basis` and `first basis kfac`, in the basis of the first batch.
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
    _check_data(trajectory, batches, chosen)

    recipes: dict[Any, dict[str, Estimator]] = {}
    for name, estimator in chosen.items():
        recipes.setdefault(_recipe(estimator), {})[name] = estimator
    frames: dict[Any, _Frame] = {}
    records: list[Record] = []
    moved = [t == 0 or trajectory[t] is not trajectory[t - 1] for t in range(len(batches))]
    with _bar(progress, (sum(moved) + len(chosen)) * len(batches)) as advance:
        for t, at in enumerate(trajectory):
            if moved[t]:
                data = Data(loss_fn, dict(at), batches, reference, damping, dense_limit, randomness, chunk_size)
                data.load([(e.fisher, e.rules) for e in chosen.values()], advance)
            for recipe, members in recipes.items():
                frames[recipe] = frame = _advance(frames.get(recipe), data, members, t)
                for name in members:
                    records += _judge(name, frame, step_sizes, watch)
                    advance()
    return records


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


def _check_data(
    trajectory: Sequence[Mapping[str, Tensor]], batches: Sequence[Batch], estimators: Mapping[str, Estimator]
) -> None:
    """Refuse parameters, batches and estimators that do not go together."""
    if not batches:
        raise ValueError("batches is empty: pass the data as at least one batch")
    if len(trajectory) != len(batches):
        raise ValueError(f"params has {len(trajectory)} trees for {len(batches)} batches: give one, or one a batch")
    for params in trajectory:
        check_params(params)
    counts = [check_batch(batch) for batch in batches]
    kinds = [_kind(batch) for batch in batches]
    for t, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"batches[{t}] has tensors of another kind than batches[0]: pass a list of batches that are alike, of "
                "one batch [batch]"
            )
    split = [name for name, estimator in estimators.items() if estimator.basis is split_batch]
    for t, n in enumerate(counts):
        if n < 2 and split:
            raise ValueError(
                f"batches[{t}] has {n} example, which estimators[{split[0]!r}] cannot split: give at least 2 examples "
                "a batch, or leave that estimator out"
            )


def _kind(batch: Batch) -> Any:
    """What all batches share, in any order: where each tensor is, its number of axes, whether it is of floats."""
    leaves, _ = pytree.tree_flatten_with_path(batch)
    return {(pytree.keystr(path), t.dim(), t.is_floating_point()) for path, t in leaves}


def _recipe(e: Estimator) -> Any:
    """What decides the bases of an estimator: those with the same recipe share them."""
    return e.fisher, e.basis, e.basis_every, e.factor_decay, table_of(e.rules)


class _Frame(NamedTuple):
    """The bases of a recipe after a step, the moments of its estimators, and the truth in these bases."""

    data: Data
    step: int
    refreshed: int  # step of the last refresh
    factors: dict[str, Factors]
    bases: dict[str, Basis]
    moments: dict[str, dict[str, Moment]]  # by estimator and layer
    truths: Mapping[str, Truth]
    exact: dict[str, Tensor]  # [b O I k] of the reference
    noise: dict[str, tuple[Tensor, Tensor]]  # mean and second moment of the data's gradient, where it has the layer


def _advance(frame: _Frame | None, data: Data, members: Mapping[str, Estimator], t: int) -> _Frame:
    """One step of all estimators of a recipe."""
    recipe = next(iter(members.values()))
    table = table_of(recipe.rules)
    captured, truths = data.captures[recipe.fisher, table][t], data.truths[table]
    layers = {name: truth.layer for name, truth in truths.items()}
    if captured.layers != layers:
        raise ValueError(
            f"the {recipe.fisher.name} Fisher sees the layers {list(captured.layers.values())}, the reference "
            f"{data.reference.name} {list(layers.values())}: give a reference whose loss uses them alike"
        )
    for_basis, for_moment = recipe.basis(captured.terms, batch_size(data.batches[t]))
    if frame is None:
        state = started(tuple(captured.layers.values()), data.params)
        moments = dict.fromkeys(members, state.second_moments)
        frame = _Frame(data, t, t, state.factors, state.bases, moments, truths, {}, {})
    turn = for_basis is not None and t % recipe.basis_every == 0
    own = for_basis is None and t == 0  # K-FAC's eigenvalues in the parameters' own coordinates
    averaged = recipe.factor_decay > 0  # else the bases are those of `ekfac`, of few samples the samples' own
    used, factors, bases = dict[str, Means](), dict(frame.factors), frame.bases
    source = (for_basis or for_moment) if turn or own else {}
    for name, terms in source.items():
        used[name] = mean_factors(factor_sums(terms, bases[name], matrices=averaged or own))
        factors[name] = average_factors(factors[name], used[name], recipe.factor_decay)
    if turn:
        bases = bases | refresh_bases({name: factors[name] for name in used} if averaged else used, bases)[0]

    @functools.cache
    def means(sums: Callable[..., Sums], name: str) -> Sums:
        terms, basis = for_moment[name], bases[name]
        return mean_sums(sums(terms, basis, contraction(terms, basis)), count(terms))

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
    if turn or not exact or frame.data is not data:
        exact, noise = _all_data_in(bases, data, table)
    return _Frame(data, t, t if turn else frame.refreshed, factors, bases, moments, truths, exact, noise)


def _all_data_in(
    bases: Mapping[str, Basis], data: Data, table: Any
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """`exact` and `noise` of a `_Frame` with these bases, from all the data."""
    exact, noise = {}, {}
    own = data.captures[empirical, table]
    for name, truth in data.truths[table].items():
        mean, exact[name] = exact_means([c.terms[name] for c in data.references[table]], bases[name])
        if own[0].layers.get(name) == truth.layer:
            same = data.reference is empirical
            noise[name] = (mean, exact[name]) if same else exact_means([c.terms[name] for c in own], bases[name])
    return exact, noise


def _judge(
    name: str, frame: _Frame, step_sizes: Sequence[float], watch: Callable[[Seen], None] | None
) -> Iterator[Record]:
    """The records of an estimator after a step: of each layer, then of the whole model."""
    data, t = frame.data, frame.step
    examples = batch_size(data.batches[t])
    parts: list[dict[str, float]] = []
    directions: Params = {}
    ratios: list[Tensor] = []

    def record(layer: str, target: str, sums: Sequence[dict[str, float]], ratio: Tensor, along: Params) -> Record:
        found = figures(sums, ratio, examples) | data.best_step(along, step_sizes)
        return Record(name, layer, t, t - frame.refreshed, examples, target=target, **found)

    for layer, truth in frame.truths.items():
        moment, exact, basis = frame.moments[name][layer], frame.exact[layer], frame.bases[layer]
        if watch is not None:
            watch(Seen(name, layer, t, moment.value, exact))
        natural = natural_of(truth.slope, moment, basis, data.damping, truth.layer)
        direction = unpack(truth.layer, natural, data.params)
        directions |= direction
        ratios.append(signal_to_noise(frame.noise.get(layer)))
        parts.append(sums_of(moment.value, exact, truth, natural))
        yield record(layer, truth.target, parts[-1:], ratios[-1], direction)
    target = " and ".join(sorted({truth.target for truth in frame.truths.values()}))
    yield record("all", target, parts, torch.cat(ratios), directions)


@contextlib.contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[], object]]:
    """A function that advances a progress bar by one, if that is wanted and tqdm is installed."""
    if not wanted or tqdm is None:
        yield lambda: None
        return
    with tqdm(total=total, desc="compare", unit="part", dynamic_ncols=True) as bar:
        yield bar.update
