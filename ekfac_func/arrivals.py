"""Collects output gradients: a layer is read as soon as those of all its calls have arrived."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from .discovery import Plan
from .layout import Along, Spec, Tapped, Use, Window
from .patches import Patches
from .rules import Call
from .types import Factored, Layer, OneHot, Params, Terms, statistics_dtype

Take = Callable[[Layer, Terms, int], None]


class Arrivals:
    """The tapped calls of some examples: a layer is read as soon as the output gradients of all its calls are there.

    From then on nothing is held here of its inputs and output gradients.
    """

    def __init__(self, found: Plan, params: Params, calls: list[Any], take: Take, n: int) -> None:
        self.layers = {layer.weight: layer for layer in found.layers}
        self.planned, self.params, self.calls, self.take, self.n = found.calls, params, calls, take, n
        self.inputs: list[Any] = []
        self.gradients: dict[int, Tensor] = {}
        self.missing = set(range(len(found.calls)))
        self.uses: dict[str, list[int]] = {}
        for k, planned in enumerate(found.calls):
            self.uses.setdefault(planned.use.weight, []).append(k)
        dense = [layer for layer in found.layers if layer.rule is None]
        self.bytes_each = sum(math.prod(x.sizes) * statistics_dtype(params[x.weight]).itemsize for x in dense)

    def start(self, inputs: list[Any]) -> None:
        """inputs: of the calls; they are taken out of this list."""
        self.inputs = inputs
        for k, planned in enumerate(self.planned):
            if planned.along is not None:
                leaves, tree = pytree.tree_flatten(inputs[k])
                leaves = [_examples_first(x, along, self.n) for x, along in zip(leaves, planned.along[1:], strict=True)]
                inputs[k] = pytree.tree_unflatten(leaves, tree)
            sizes = [math.prod(x.shape[1:]) * x.element_size() for x in pytree.tree_leaves(inputs[k])]
            use, outputs = planned.use, math.prod(output_shape(planned, 1))
            size = sum(sizes) + outputs * use.output.dtype.itemsize
            self.bytes_each += size * (use.windows[0].size if use.by_ids else 1)  # written for every block

    def arrived(self, k: int, g: Tensor) -> None:
        """Take the gradient w.r.t. the output of a call; one before the start is of a pass for what has no rule."""
        if not self.inputs:
            return
        planned = self.planned[k]
        self.gradients[k] = g if planned.along is None else _examples_first(g, planned.along[0], self.n)
        self.missing.remove(k)
        uses = self.uses[planned.use.weight]
        if self.missing.isdisjoint(uses):
            layer = self.layers[planned.use.weight]
            terms = _added([_placed(self._term(j), self.planned[j], layer, self.params) for j in uses])
            self.take(layer, terms, self.bytes_each)

    def _term(self, k: int) -> Factored | OneHot:
        call, x, g, use = self.calls[k], self.inputs[k], self.gradients.pop(k), self.planned[k].use
        self.calls[k] = self.inputs[k] = None
        if use.by_ids:
            return _of_blocks(call, x, g, use.windows[0].size)
        term = call.read(x, g)
        _check_term(term, use)
        return term

    def probes(self) -> list[Tensor]:
        """Zeros in the shapes of the outputs."""
        return [_zeros(planned.use.output, output_shape(planned, self.n)) for planned in self.planned]

    def deliver(self, inputs: list[Any], gradients: list[Any]) -> None:
        """Deliver all gradients at once."""
        self.start(inputs)
        for k in range(len(gradients)):
            g, gradients[k] = gradients[k], None
            self.arrived(k, g)

    def finish(self) -> None:
        """Zeros for what the loss does not depend on; then drop every reference, for a tap can live on in a cycle."""
        for k in sorted(self.missing):
            planned = self.planned[k]
            shape = output_shape(planned, self.n) if planned.along is not None else (self.n, *planned.use.output.shape)
            self.arrived(k, _zeros(planned.use.output, shape))
        del self.take
        self.inputs = []


def _zeros(like: Spec, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def _check_term(term: Any, use: Use) -> None:
    """Refuse what a rule gave that is no term, or not on the axes that the rule named."""
    if isinstance(term, OneHot):
        return
    if not isinstance(term, Factored):
        raise TypeError(
            f"the rule of a call of {use.weight!r} gave a {type(term).__name__}: let its term return Factored(a, g)"
        )
    b, o, i = (window.length for window in use.windows)
    a, g = tuple(term.a.shape), tuple(term.g.shape)
    if len(a) != 5 or len(g) != 4 or a[:3] != g[:3] or (a[1], a[3], g[3]) != (b, i, o):
        raise ValueError(
            f"the rule of a call of {use.weight!r} gave a of shape {a} and g of shape {g}: let its term return "
            f"a [n b s i k] and g [n b s o], of the letters that it gave the weight's axes b = {b}, i = {i}, o = {o}"
        )


def output_shape(call: Tapped, n: int | None) -> tuple[int, ...]:
    """Of the output of a call; n: the examples of a batched loss, None of a loss of one example."""
    shape = call.use.output.shape
    if call.along is None:
        return tuple(shape)
    assert n is not None
    axis, entries = call.along[0].axis, call.along[0].entries  # Dynamo of 2.11 unpacks no constant tuple
    return (*shape[:axis], n * entries, *shape[axis + 1 :])


def _examples_first(t: Tensor, along: Along, n: int) -> Tensor:
    """`[... (n entries) ...]` as `[n ... entries ...]`."""
    axis, entries = along.axis, along.entries
    return t.reshape(*t.shape[:axis], n, entries, *t.shape[axis + 1 :]).movedim(axis, 0)


def _placed(term: Factored | OneHot, planned: Tapped, layer: Layer, params: Params) -> Factored | OneHot:
    """The term of a call on the axes of its whole layer, in the dtype of statistics, the bias as the last input."""
    dtype = statistics_dtype(params[layer.weight])
    b, o, i = planned.use.windows
    one = layer.bias is not None
    if isinstance(term, OneHot):
        g = F.pad(_within(term.g.to(dtype), i, -1), [0, one])
        return OneHot(term.ids + o.start, o.size, g, term.counted)
    a, g, x, counted = term.a.to(dtype), term.g.to(dtype), term.x, term.counted
    last = float(planned.bias is not None)  # 1 where the call added the bias
    if b.length < b.size:
        counted = _within(_counted(term), b, 1)
    g = _within(_within(g, o, 3), b, 1)
    x = None if x is None else _within(_within(x.to(dtype), i, 3), b, 1)
    if isinstance(a, Patches):
        if b.length == b.size and i.length == i.size and not planned.swapped:
            return Factored(replace(a, last=last) if one else a, g, x, counted)
        a = a.write()
    a = _within(_within(a, i, 3), b, 1)
    if planned.swapped:
        a, g = g[..., None], a[..., 0]
    if one:
        a = torch.cat([a, a.new_full((*a.shape[:3], 1, 1), last)], dim=3)
    return Factored(a, g, x, counted)


def _of_blocks(call: Call, inputs: Any, g: Tensor, blocks: int) -> Factored:
    """The term of a call on blocks of a layer that ids picked: each is a position of the block that it is."""
    x, ids = inputs[0], inputs[1].to(g.device)  # [n p]; ids may be on the CPU
    term = call.read(x, g)
    assert isinstance(term, Factored)
    ids = torch.where(ids < 0, ids + blocks, ids)
    counted = torch.arange(blocks, device=ids.device)[None, :, None] == ids[:, None]  # [n b p]
    counted = counted.repeat_interleave(term.g.shape[2], dim=2) & _counted(term).flatten(1)[:, None]
    a, g = (t.flatten(1, 2)[:, None] for t in (term.inputs, term.g))  # [n 1 (p s) ...]
    return Factored(torch.where(counted[..., None, None], a, 0), torch.where(counted[..., None], g, 0), None, counted)


def _counted(term: Factored) -> Tensor:
    """Which positions are samples of the factors, `[n b s]`."""
    return torch.ones_like(term.g[..., 0], dtype=torch.bool) if term.counted is None else term.counted


def _within(t: Tensor, window: Window, axis: int) -> Tensor:
    """A window of an axis as the whole axis, zero outside."""
    if window.length == window.size:
        return t
    after = window.size - window.start - window.length
    return F.pad(t, [0, 0] * ((-1 - axis) % t.dim()) + [window.start, after])


def _added(terms: Sequence[Factored | OneHot]) -> Terms:
    """The terms of all uses of one weight, joined: each use brings more positions."""
    factored = [term for term in terms if isinstance(term, Factored)]
    tables = [term for term in terms if isinstance(term, OneHot)]
    if len(factored) > 1:
        factored = [_of_factored(factored)]
    if len(tables) > 1:
        ids, g, counted = (torch.cat([getattr(t, name) for t in tables], 1) for name in ("ids", "g", "counted"))
        tables = [OneHot(ids, tables[0].size, g, counted)]
    return *factored, *tables


def _of_factored(terms: Sequence[Factored]) -> Factored:
    a, g = torch.cat([t.inputs for t in terms], 2), torch.cat([t.g for t in terms], 2)
    x = counted = None
    if any(t.x is not None for t in terms):
        x = torch.cat([t.inputs[..., 0] if t.x is None else t.x for t in terms], 2)
    if any(t.counted is not None for t in terms):
        counted = torch.cat([_counted(t) for t in terms], 2)
    return Factored(a, g, x, counted)


def uncounted(layer: Layer, n: int, like: Tensor) -> Terms:
    """The terms of a layer that no call uses: one position for each example, which is not counted."""
    b, o, i, k = layer.sizes
    zero = like.new_zeros((), dtype=statistics_dtype(like))
    if layer.table:
        ids, counted = (torch.zeros(n, 1, dtype=dtype, device=like.device) for dtype in (torch.int64, torch.bool))
        return (OneHot(ids, o, zero.new_zeros(n, 1, i), counted),)
    counted = torch.zeros(n, b, 1, dtype=torch.bool, device=like.device)
    return (Factored(zero.new_zeros(n, b, 1, i, k), zero.new_zeros(n, b, 1, o), None, counted),)
