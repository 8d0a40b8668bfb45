"""Layers from the calls that a run of the loss saw: where their axes lie in the parameter, and on which they agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import views
from .rules import Call
from .types import NO_CALL, Batch, Layer, constants
from .views import Axis, View


class Spec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def spec(tensor: Tensor, shape: Sequence[int]) -> Spec:
    return Spec(constants(shape), tensor.dtype, tensor.device)


Flat = tuple[list[Spec], pytree.TreeSpec]
"""The leaves of a tree, and its structure: Dynamo makes no constant of a user's nodes."""


def specs(params: Mapping[str, Tensor], batch: Batch) -> tuple[dict[str, Spec], Flat]:
    """Of the parameters, and of one example."""
    leaves, tree = pytree.tree_flatten(batch)
    return {name: spec(p, p.shape) for name, p in params.items()}, ([spec(x, x.shape[1:]) for x in leaves], tree)


def filled(specs: Any, lead: tuple[int, ...] = ()) -> Any:
    """A tree of tensors of these specs, with axes in front; without values in a `FakeTensorMode`."""
    return pytree.tree_map(
        lambda s: torch.empty((*lead, *s.shape), dtype=s.dtype, device=s.device),
        specs,
        is_leaf=lambda leaf: isinstance(leaf, Spec),
    )


class Along(NamedTuple):
    """Where a tensor of a batched loss has its examples: `axis` has `entries` of each, one after another."""

    axis: int
    entries: int


class Window(NamedTuple):
    """Which entries along an axis of a layer a call uses: from `start` on, of `size` in all."""

    start: int
    length: int
    size: int


class Groups(NamedTuple):
    """The axes of a parameter that a call has on b, o, i and k: size and stride of each, in their order."""

    b: tuple[tuple[int, int], ...]
    o: tuple[tuple[int, int], ...]
    i: tuple[tuple[int, int], ...]
    k: tuple[tuple[int, int], ...]

    def swapped(self) -> Groups:
        return Groups(self.b, self.i, self.o, self.k)


class Use(NamedTuple):
    """A call of a layer, as one run of discovery sees it. Constants only."""

    at: int  # how many calls of functions that have a rule came before
    reading: int  # which of its rule's readings
    weight: str
    bias: str | None
    func: str
    table: bool
    groups: Groups
    windows: tuple[Window, Window, Window]  # of b, o, i
    by_ids: bool  # ids, beside its input, say which block of the layer each block of the call is
    mixes: tuple[int, ...]
    output: Spec  # of one example; in a batched loss of a batch, whose axis of examples is open
    inputs: tuple[Spec, ...]


class Tapped(NamedTuple):
    """A use that is tapped, and what its layer and the other runs of discovery say of it. Constants only."""

    use: Use
    along: tuple[Along, ...] | None  # in a batched loss: of the output, and of each tensor of the input
    swapped: bool  # o and i are the layer's i and o
    bias: str | None  # of the layer, if the call adds it


@dataclass
class Observed:
    """What one run of the loss saw."""

    uses: list[Use] = field(default_factory=list)
    reached: set[str] = field(default_factory=set)  # parameters with a path to the loss beside their uses
    hidden_by: dict[str, dict[str, None]] = field(default_factory=dict)  # by parameter, the functions without a rule
    nested: bool = False  # a function of `OPEN` or `IN_GRAPHS` stood inside a transform of the loss's own
    asked_of: set[str] = field(default_factory=set)  # parameters asked whether differentiated; "" of any other tensor
    functions: set[str] = field(default_factory=set)  # `autograd.Function`s of the loss's own
    picked: set[int] = field(default_factory=set)  # calls on rows that values picked
    asked: dict[int, int] = field(default_factory=dict)  # by call, how many truths the loss read before
    lookups: list[int] = field(default_factory=list)  # by ids that come from the batch: along how many entries
    filled: bool = False  # a tensor that was one for all examples, by what depends on them
    drawn: bool = False  # likewise, by random numbers
    shared: list[bool] = field(default_factory=list)  # whether each call of `views.MAY_COPY` was a view
    cuts: str = ""  # what the loss called that changes the graph of its derivative, if anything


def lay_out(call: Call, view: View) -> tuple[Groups, tuple[Window, Window, Window]] | None:
    """The parameter's axes behind each letter of a call, and the part that it uses; None if no layer has these."""
    shape = view.shape if call.split is None else call.split
    named = isinstance(call.letters, str) and len(call.letters) == len(shape)
    if not named or not set(call.letters) <= set("boik"):
        raise ValueError(
            f"the rule of a call of {view.name!r} names its axes {call.letters!r} where its shape is {tuple(shape)}: "
            "give each axis one of the letters b, o, i, k"
        )
    split = view if call.split is None else views.reshape(view, call.split)
    shown = None if split is None else views.axes(split)
    if shown is None:
        return None
    by_letter: dict[str, list[Axis]] = {letter: [] for letter in "boik"}
    for axis in sorted(shown, key=lambda axis: -1 if axis.position is None else axis.position):
        if axis.size != 1:
            by_letter["b" if axis.position is None else call.letters[axis.position]].append(axis)
    groups: dict[str, tuple[tuple[int, int], ...]] = {}
    windows: dict[str, Window] = {}
    for letter, axes in by_letter.items():
        partial = any(axis.length < axis.size for axis in axes)
        if view.by_ids and shown[0] in axes:
            if len(axes) > 1 or letter != "b":
                return None
            partial = False
        if partial and (len(axes) > 1 or letter == "k"):
            return None
        size = math.prod(axis.size for axis in axes)
        windows[letter] = Window(axes[0].start, axes[0].length, size) if partial else Window(0, size, size)
        groups[letter] = _merged(axes)
    if call.table and (groups["b"] or groups["k"] or len(groups["o"]) > 1):
        return None
    return Groups(**groups), (windows["b"], windows["o"], windows["i"])


def _merged(axes: Sequence[Axis]) -> tuple[tuple[int, int], ...]:
    """The size and stride of each axis, of those that lie one after another together."""
    merged: list[tuple[int, int]] = []
    for axis in axes:
        if merged and merged[-1][1] == axis.size * axis.stride:
            merged[-1] = (merged[-1][0] * axis.size, axis.stride)
        else:
            merged.append((axis.size, axis.stride))
    return tuple(merged)


def fits(bias: View, windows: tuple[Window, Window, Window]) -> bool:
    """Whether a bias has one entry for each of `(b o)`, and the call uses the same of them as of the weight."""
    shown = views.axes(bias)
    in_a_row = math.prod(bias.shape[:-1]) == 1 or windows[1].length == 1  # or it may be added along positions
    if shown is None or bias.by_ids or not in_a_row:
        return False
    positions = [axis.position for axis in shown if axis.position is not None]
    if positions != sorted(positions):  # a transposed one
        return False
    of_bias = [(axis.start, axis.length, axis.size) for axis in shown if axis.size != 1]
    of_weight = [(w.start, w.length, w.size) for w in windows[:2] if w.size != 1]
    if all(start == 0 and length == size for start, length, size in of_bias + of_weight):
        return math.prod(bias.split) == windows[0].size * windows[1].size
    return of_bias == of_weight


def arrange(
    param_specs: Mapping[str, Spec], found: Observed, places: Sequence[tuple[Along, ...] | None]
) -> tuple[tuple[Layer, ...], tuple[Tapped, ...]]:
    """A weight is a layer if its calls are its only paths and agree on its axes; a bias belongs to one weight."""
    uses: dict[str, list[Use]] = {}
    users: dict[str, list[Use]] = {}  # of a bias
    for use in found.uses:
        uses.setdefault(use.weight, []).append(use)
        if use.bias is not None:
            users.setdefault(use.bias, []).append(use)
    groups = {weight: _agreed(of_it) for weight, of_it in uses.items() if weight not in found.reached | users.keys()}
    tapped = {weight: layout for weight, layout in groups.items() if layout is not None}
    alone = {bias for bias, by in users.items() if len({use.weight for use in by}) == 1} - found.reached - uses.keys()
    biases = {weight: _bias(uses[weight], layout, alone) for weight, layout in tapped.items()}
    layers = []
    for name, param in param_specs.items():
        if name in tapped:
            layers.append(_layer(uses[name], tapped[name], biases[name], param_specs))
        elif name not in biases.values():
            unseen = "a use that no call shows" if name in found.reached else NO_CALL
            adders = (use.func for use in users.get(name, []))
            hidden = list(dict.fromkeys([*found.hidden_by.get(name, {}), *adders]))
            hidden = hidden or ["calls that differ in axes" if name in uses else unseen]
            layers.append(dense_layer(name, param.shape, " + ".join(hidden)))
    calls = [
        Tapped(use, place, use.groups != tapped[use.weight], None if use.bias is None else biases[use.weight])
        for use, place in zip(found.uses, places, strict=True)
        if use.weight in tapped
    ]
    return tuple(layers), tuple(calls)


def _agreed(uses: Sequence[Use]) -> Groups | None:
    """The axes on which all calls of a weight agree, in the orientation of a lookup, else of the first call."""
    first = next((use for use in uses if use.table), uses[0])
    for use in uses:
        same = use.groups == first.groups
        if not same and (use.groups.swapped() != first.groups or use.table or use.groups.k):
            return None
    return first.groups


def _bias(uses: Sequence[Use], groups: Groups, alone: set[str]) -> str | None:
    """The one bias of a weight's calls, if each call that adds it has the layer's orientation.

    alone: the biases that have one weight and no path to the loss but as its bias.
    """
    biased = [use for use in uses if use.bias is not None]
    biases = {use.bias for use in biased}
    if len(biases) != 1 or any(use.groups != groups for use in biased):
        return None
    (bias,) = biases
    return bias if bias in alone else None


def _layer(uses: Sequence[Use], groups: Groups, bias: str | None, param_specs: Mapping[str, Spec]) -> Layer:
    name, (b, o, i, k) = uses[0].weight, (math.prod(size for size, _ in group) for group in groups)
    axes = [axis for group in groups for axis in group]
    by_stride = sorted(range(len(axes)), key=lambda axis: -axes[axis][1])
    split = tuple(axes[axis][0] for axis in by_stride)
    order = tuple(by_stride.index(axis) for axis in range(len(axes)))
    sizes = b, o, i + (bias is not None), k
    shape, bias_shape = param_specs[name].shape, () if bias is None else param_specs[bias].shape
    table, rule = any(use.table for use in uses), " + ".join(dict.fromkeys(use.func for use in uses))
    return Layer(name, bias, sizes, split, order, shape, bias_shape, table, rule)


def dense_layer(name: str, shape: tuple[int, ...], hidden_by: str) -> Layer:
    """A vector or scalar is one block an element; of a matrix or more, o is the first axis and i the rest.

    Axes of one entry in front of a matrix do not count: `[1, t, d]` is one.
    """
    elements, axes = math.prod(shape), list(shape)
    while len(axes) > 2 and axes[0] == 1:
        axes.pop(0)
    sizes = (elements, 1, 1, 1) if len(axes) < 2 else (1, axes[0], elements // max(axes[0], 1), 1)
    return Layer(name, None, sizes, sizes, (0, 1, 2, 3), shape, (), hidden_by=hidden_by)


def places_of(use: Use, other: Use, few: int, more: int) -> tuple[Along, ...] | None:
    """Where the tensors of a call have their examples, from runs of few and more; None if one has no axis of them."""
    places: list[Along] = []
    if use.windows != other.windows:
        return None
    for one, two in zip((use.output, *use.inputs), (other.output, *other.inputs), strict=True):
        if len(one.shape) != len(two.shape):
            return None
        axes = [axis for axis, (x, y) in enumerate(zip(one.shape, two.shape, strict=True)) if x != y]
        if len(axes) != 1 or one.shape[axes[0]] * more != two.shape[axes[0]] * few or one.shape[axes[0]] % few:
            return None
        if one is not use.output and axes[0] - len(one.shape) in use.mixes:
            return None
        places.append(Along(axes[0], one.shape[axes[0]] // few))
    return tuple(places)
