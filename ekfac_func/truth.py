"""What `compare` measures estimators against: moments, gradient and natural gradient of all the data."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .basis import choose
from .capture import Captured, capture, unmapped
from .contraction import add_sums, exact_sums, mean_sums
from .discovery import Options
from .factors import add_factor_sums, factor_sums, mean_factors
from .fisher import Fisher, empirical
from .kronecker import count, gradient, into_basis, pack, times, unpack_exactly
from .reference import exact_block
from .refreshes import refresh_bases
from .rescaling import rescaled
from .rules import Rules
from .states import initial_state
from .subspace import Mean
from .types import Basis, Batch, Layer, LossFn, Moment, Params, State, Terms, batch_size


def table_of(rules: Rules) -> Any:
    """Rules as the key of a dict."""
    return tuple(rules.items())


class Truth(NamedTuple):
    """What the estimators are judged against on one layer."""

    layer: Layer
    slope: Tensor  # [b o i k] gradient of all the data
    square_norm: float  # of F
    trace: float  # of F
    natural: Tensor  # [b o i k] the target
    target: str


@dataclass
class Data:
    """All the batches at one point of the parameters: captures by (Fisher, rules), and the truth by rules."""

    loss_fn: LossFn
    params: Params
    batches: Sequence[Batch]
    reference: Fisher
    damping: float
    limit: int  # coordinates or examples of a layer, up to which the target is that of the dense Fisher
    randomness: str
    chunk_size: int | None
    captures: dict[Any, list[Captured]] = field(default_factory=dict)
    references: dict[Any, list[Captured]] = field(default_factory=dict)  # by rules
    truths: dict[Any, dict[str, Truth]] = field(default_factory=dict)  # by rules and layer
    loss: float = field(init=False)  # mean over all the data
    slope: Params = field(init=False)  # its gradient

    def load(self, sources: Sequence[tuple[Fisher, Rules]], advance: Callable[[], object]) -> None:
        """Capture every batch once for each kind of gradients and table of rules."""
        tables = {table_of(rules): rules for _, rules in sources}
        wanted = dict.fromkeys((fisher, table_of(rules)) for fisher, rules in sources)
        wanted |= dict.fromkeys((fisher, table) for table in tables for fisher in (empirical, self.reference))
        for batch in self.batches:
            for fisher, table in wanted:
                loss = self.loss_fn if fisher.loss is None else fisher.loss
                examples = fisher.examples(self.params, batch)
                options = Options(tables[table], self.randomness, self.chunk_size)
                captured = capture(loss, self.params, examples, options)
                self.captures.setdefault((fisher, table), []).append(captured)
            advance()
        own = self.captures[empirical, next(iter(tables))]
        n = sum(len(captured.losses) for captured in own)
        self.loss = sum(captured.losses.double().sum().item() for captured in own) / n
        slopes = {
            name: functools.reduce(torch.add, (gradient(c.terms[name]) for c in own)) / n for name in own[0].layers
        }
        self.slope = unpack_exactly(own[0].layers.values(), slopes, self.params)
        for table in tables:
            self.references[table] = _weighed(self.captures[self.reference, table], [len(c.losses) for c in own])
            self.truths[table] = self._truth(table)

    def _truth(self, table: Any) -> dict[str, Truth]:
        captures = self.references[table]
        found = {}
        for name, layer in captures[0].layers.items():
            batches = [captured.terms[name] for captured in captures]
            slope = pack(layer, self.slope)
            exact = exact_block(batches, layer, slope, self.damping, self.limit)
            moment, everywhere = self._everywhere(batches, layer)
            natural, target = exact.natural, "dense"
            if natural is None:
                natural, target = natural_of(slope, moment, everywhere, self.damping, layer), "ekfac"
            norm, trace = exact.square_norm.item(), moment.value.double().sum().item()
            found[name] = Truth(layer, slope, norm, trace, natural.to(torch.float64), target)
        return found

    def _everywhere(self, batches: Sequence[Terms], layer: Layer) -> tuple[Moment, Basis]:
        """The exact moment of all the data in the eigenbasis of all the data's factors, and that basis."""
        name, bases = layer.weight, started((layer,), self.params).bases
        sums = (factor_sums(terms, bases[name]) for terms in batches)
        total = functools.reduce(lambda some, more: add_factor_sums(some, more, bases[name]), sums)
        basis = refresh_bases({name: mean_factors(total)}, bases)[0][name]
        _, square = exact_means(batches, basis)
        return Moment(square, square.new_ones(())), basis

    def mean_loss(self, params: Params) -> float:
        """Over all the data."""
        total, n = 0.0, 0
        for batch in self.batches:
            losses = self._losses(params, batch)
            total, n = total + losses.double().sum().item(), n + len(losses)
        return total / n

    def _losses(self, params: Params, batch: Batch) -> Tensor:
        """The losses of a batch, `[n]`: by `vmap`, or by a loop where `vmap` cannot run the loss."""
        try:
            each = torch.func.vmap(self.loss_fn, (None, 0), randomness=self.randomness, chunk_size=self.chunk_size)
            return each(params, batch)
        except RuntimeError as error:
            if not unmapped(error):
                raise
            examples = (pytree.tree_map(lambda leaf, k=k: leaf[k], batch) for k in range(batch_size(batch)))
            return torch.stack([self.loss_fn(params, example) for example in examples])

    def best_step(self, direction: Params, step_sizes: Sequence[float]) -> dict[str, float]:
        """The largest decrease of the loss over all the data along a direction, 0 without one, and its step size."""
        best = {"decrease": 0.0, "step_size": 0.0}
        for size in step_sizes:
            moved = {name: p - size * direction[name] if name in direction else p for name, p in self.params.items()}
            decrease = self.loss - self.mean_loss(moved)
            if decrease > best["decrease"]:  # false for NaN
                best = {"decrease": decrease, "step_size": size}
        return best


def _weighed(captures: list[Captured], examples: list[int]) -> list[Captured]:
    """Captures of pseudo-examples, scaled so that each example weighs the same, however many a batch has of it."""
    counts = [len(captured.losses) for captured in captures]
    mean = sum(examples) / sum(counts)
    weighed = []
    for captured, n, m in zip(captures, counts, examples, strict=True):
        if m / n != mean:
            root = math.sqrt(m / n / mean)
            terms = {name: tuple(times(term, root) for term in of_layer) for name, of_layer in captured.terms.items()}
            captured = captured._replace(kept=terms)
        weighed.append(captured)
    return weighed


def exact_means(batches: Sequence[Terms], basis: Basis) -> tuple[Tensor, Tensor]:
    """Means over the examples of all batches of G in the basis and of its square."""
    total = functools.reduce(add_sums, (exact_sums(terms, basis) for terms in batches))
    _, mean, square = mean_sums(total, sum(map(count, batches)))
    assert square is not None
    return mean, square


def started(layers: tuple[Layer, ...], params: Params) -> State:
    """The state before the first step, with whole bases."""
    return initial_state(layers, choose(layers, {}), params)


def natural_of(slope: Tensor, moment: Moment, basis: Basis, damping: float, layer: Layer) -> Tensor:
    """The natural gradient `[b o i k]` of a layer whose mean gradient is slope."""
    mean = Mean(slope, into_basis(slope, basis), None, 1)
    added = torch.as_tensor(damping, dtype=slope.dtype, device=slope.device)
    return rescaled(mean, moment, basis, added, -1.0, layer.sizes)
