"""Which parameters are layers, and which calls are to be tapped: found by one run on tensors without values.

A pure function of the loss, the parameters and the shapes of an example, and of values where a batched loss looks at
them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.overrides import resolve_name
from torch.utils import _pytree as pytree

from . import expansions, views
from .batching import OPEN
from .checks import check_count, check_loss, check_randomness
from .modes import undrawn
from .picked import READS, Picked
from .rules import Call, Rules
from .tap import Tap, depth, readings, refuse, traced, unfused, with_ids
from .types import Batch, Layer, LossAuxFn, LossFn, Params, constants
from .views import View


class Spec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Options(NamedTuple):
    """How a loss is captured, as documented in `ekfac`."""

    rules: Rules
    randomness: str = "different"
    chunk_size: int | None = None
    has_aux: bool = False
    batched: bool = False


def checked_options(rules: Rules, randomness: str, chunk_size: int | None, has_aux: bool, batched: bool) -> Options:
    """Options that can be right. ValueError or TypeError for others."""
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules is a {type(rules).__name__}: pass a dict from torch functions to rules, as RULES")
    for func, rule in rules.items():
        if not callable(rule):
            raise TypeError(f"rules[{func!r}] is {rule!r}: give a function of the arguments of the call, as RULES has")
    check_randomness(randomness)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
        if batched:
            raise ValueError(
                f"chunk_size={chunk_size!r} with batched=True: the chunks of a coupled batch are other batches"
            )
    return Options(rules, randomness, chunk_size, has_aux, batched)


class Along(NamedTuple):
    """Where a tensor of a batched loss has its examples: `axis` has `entries` of each, one after another."""

    axis: int
    entries: int


class Window(NamedTuple):
    """Which entries along an axis of a layer a call uses: from `start` on, of `size` in all."""

    start: int
    length: int
    size: int


class Tapped(NamedTuple):
    """A call of a layer. Constants only."""

    at: int  # how many calls of functions that have a rule came before
    reading: int  # which of its rule's readings
    weight: str
    output: Spec  # of one example; in a batched loss of a batch, whose axis of examples is open
    along: tuple[Along, ...] | None  # in a batched loss: of the output, and of each tensor of the input
    windows: tuple[Window, Window, Window]  # of b, o, i
    turned: bool  # o and i are the layer's i and o
    biased: bool  # the call adds the layer's bias
    picked: bool  # ids, beside its input, say which block of the layer each block of the call is


class Plan(NamedTuple):
    """What a capture taps. Constants only."""

    layers: tuple[Layer, ...]
    calls: tuple[Tapped, ...]  # in the order of the loss
    nested: bool  # vmap(grad) as it is: the loss calls torch.autograd.grad, or a function that vmap knows only there
    open: bool  # no loss of `batching.OPEN` stands inside a transform of the user's own
    looped: bool = False  # vmap cannot run the loss: a function for which it has no rule, a branch on values


def plan(loss_fn: LossFn | LossAuxFn, params: Params, batch: Batch, options: Options) -> Plan:
    """What `capture` will tap, from shapes alone."""
    param_specs = {name: spec(p, p.shape) for name, p in params.items()}
    example = (pytree.tree_map(lambda leaf: spec(leaf, leaf.shape[1:]), batch),)  # Dynamo's constants are containers
    how = (options.rules, options.has_aux, options.batched)
    values = None if torch.compiler.is_compiling() else (params, batch)
    if isinstance(loss_fn, MethodType):  # Dynamo hands over a function and its object, not the two bound together
        return _discover(param_specs, example, how, values, loss_fn.__func__, loss_fn.__self__)
    if isinstance(loss_fn, functools.partial):
        return _discover(param_specs, example, how, values, loss_fn.func, *loss_fn.args, **loss_fn.keywords)
    return _discover(param_specs, example, how, values, loss_fn)


def spec(tensor: Tensor, shape: Sequence[int]) -> Spec:
    return Spec(constants(shape), tensor.dtype, tensor.device)


def filled(specs: Any, lead: tuple[int, ...] = ()) -> Any:
    """A tree of tensors of these specs, with axes in front; without values in a `FakeTensorMode`."""
    return pytree.tree_map(
        lambda s: torch.empty((*lead, *s.shape), dtype=s.dtype, device=s.device), specs, is_leaf=_is_spec
    )


class _SecondOrder(Exception):
    """The loss calls `torch.autograd.grad`."""


class _WithoutContext(Exception):
    """The loss calls an `autograd.Function` of which `torch.func` knows nothing, for its forward takes ctx."""


class _Groups(NamedTuple):
    """The axes of a parameter that a call has on b, o, i and k: size and stride of each, in their order."""

    b: tuple[tuple[int, int], ...]
    o: tuple[tuple[int, int], ...]
    i: tuple[tuple[int, int], ...]
    k: tuple[tuple[int, int], ...]

    def turned(self) -> _Groups:
        return _Groups(self.b, self.i, self.o, self.k)


class _Use(NamedTuple):
    """A call of a layer, as one run of discovery sees it."""

    at: int
    reading: int
    weight: str
    bias: str | None
    func: str
    table: bool
    groups: _Groups
    windows: tuple[Window, Window, Window]
    picked: bool
    output: Spec
    inputs: tuple[Spec, ...]


class _Run(NamedTuple):
    """What one run of the loss saw."""

    uses: list[_Use]
    reached: set[str]  # parameters with a path to the loss beside their uses
    hidden_by: dict[str, dict[str, None]]  # the functions without a rule that took a parameter
    nested: bool
    picked: set[int]  # calls on rows that values picked
    asked: dict[int, int]  # by call, how many truths the loss read before


@torch.compiler.assume_constant_result
def _discover(
    param_specs: dict[str, Spec],
    example: tuple[Any],
    how: tuple[Rules, bool, bool],
    values: tuple[Params, Batch] | None,
    loss_fn: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Plan:
    rules, has_aux, batched = how

    def run(n: int | None, skip: Mapping[int, str] = {}, of: tuple[Params, Batch] | None = None) -> _Run:
        loss = functools.partial(loss_fn, *args, **kwargs)
        with undrawn(() if of is None else pytree.tree_leaves(of)):  # the next run takes the same path
            return _run(loss, param_specs, example[0], rules, has_aux, n, skip, of)

    try:
        if batched:
            return _of_batches(param_specs, run, 3, 5)
        found = run(None)
        return Plan(*_arrange(param_specs, found, [None] * len(found.uses)), nested=False, open=not found.nested)
    except DATA_DEPENDENT as error:  # the loss looks at values: nothing is known of it before it runs
        if not batched:
            layers = _unread(param_specs, "a branch on the values of tensors")
            return Plan(layers, (), nested=False, open=False, looped=True)
        if values is None:
            raise ValueError(
                "loss_fn with batched=True looks at values, which a compiled step does not have: compute with tensors, "
                "as by torch.where or a product with a mask, or call the step in eager mode"
            ) from error
        n = pytree.tree_leaves(values[1])[0].shape[0]
        return _of_batches(param_specs, functools.partial(run, of=values), n, 2 * n)
    except _SecondOrder:  # a derivative of a call's output w.r.t. its input is one more path to its weight
        if batched:
            raise ValueError(
                "loss_fn calls torch.autograd.grad, which batched=True cannot differentiate: use torch.func.grad in it"
            ) from None
        return Plan(_unread(param_specs, "torch.autograd.grad"), (), nested=True, open=False)
    except _WithoutContext:
        if batched:
            raise ValueError(
                "loss_fn calls an autograd.Function whose forward takes ctx, which torch.func does not differentiate: "
                "give it a setup_context, or leave batched out for a loop over the examples"
            ) from None
        layers = _unread(param_specs, "an autograd.Function without setup_context")
        return Plan(layers, (), nested=False, open=False, looped=True)
    except RuntimeError:
        if not batched or values is None:
            raise
        n = pytree.tree_leaves(values[1])[0].shape[0]  # it may not take every number of examples
        return _of_batches(param_specs, run, n, 2 * n)


def _unread(param_specs: Mapping[str, Spec], why: str) -> tuple[Layer, ...]:
    """All parameters as what no rule reads."""
    return tuple(_dense_layer(name, param.shape, why) for name, param in param_specs.items())


def _of_batches(param_specs: Mapping[str, Spec], run: Callable[..., _Run], few: int, more: int) -> Plan:
    """The plan of a batched loss, by runs on two batch sizes: the axes of the examples grow with their number."""
    one, two = run(few), run(more)
    if [use.at for use in one.uses] != [use.at for use in two.uses]:
        raise ValueError(
            "loss_fn calls other layers for another batch size or other examples: with batched=True it may not"
        )
    skip = {at: "on rows that values picked" for at in one.asked if at in one.picked | two.picked}
    skip |= {at: "after values were read" for at, asked in one.asked.items() if asked != two.asked[at]}
    places = {}
    for use, other in zip(one.uses, two.uses, strict=True):
        place = _places(use, other, few, more)
        if place is None:  # on what all examples share
            skip.setdefault(use.at, "")
        else:
            places[use.at] = place
    if skip:  # those calls are differentiated as they are
        one = run(few, skip)
    return Plan(*_arrange(param_specs, one, [places[use.at] for use in one.uses]), nested=False, open=False)


DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)


def _places(use: _Use, other: _Use, few: int, more: int) -> tuple[Along, ...] | None:
    """Where the tensors of a call have their examples; None where one of them has none."""
    places: list[Along] = []
    for one, two in zip((use.output, *use.inputs), (other.output, *other.inputs), strict=True):
        axes = [axis for axis, (x, y) in enumerate(zip(one.shape, two.shape, strict=True)) if x != y]
        if len(axes) != 1 or one.shape[axes[0]] * more != two.shape[axes[0]] * few or one.shape[axes[0]] % few:
            return None
        places.append(Along(axes[0], one.shape[axes[0]] // few))
    return tuple(places)


def _run(
    loss_fn: Callable[[Params, Any], Any],
    param_specs: Mapping[str, Spec],
    example: Any,
    rules: Rules,
    has_aux: bool,
    n: int | None,
    skip: Mapping[int, str],
    values: tuple[Params, Any] | None,
) -> _Run:
    """Run the loss on tensors without values; autograd decides which weights have a path beside their calls.

    skip: calls that are none of a layer, and why.
    values: parameters and a batch, for a loss that looks at values, of which it gets n examples.
    """
    uses: list[_Use] = []
    inputs: list[tuple[str, Tensor, int]] = []
    mutations: list[RuntimeError] = []
    nested: list[Any] = []
    reached: set[str] = set()
    of_outputs: set[str] = set()  # not empty where the loss depends on a use
    counted: list[Any] = []
    picked = Picked()
    hidden_by: dict[str, dict[str, None]] = {}

    def make_examples() -> Any:
        if values is None:
            return filled(example, () if n is None else (n,))
        return pytree.tree_map(lambda leaf: leaf.repeat(n // leaf.shape[0], *[1] * (leaf.dim() - 1)), values[1])

    def observed(params: Params, zero: Tensor) -> Tensor:
        marked = {name: _Mark.apply(p, name, reached) for name, p in params.items()}
        zero = _Mark.apply(zero, "", of_outputs)
        # by the id of a tensor, which is held so that no id is reused, and its version: a changed copy is no view
        known = {id(p): (p, p._version, views.whole(name, p.shape)) for name, p in marked.items()}
        level = depth()
        picks: list[tuple[Tensor, Tensor]] = []

        def view_of(tensor: Any) -> View | None:
            _, version, view = known.get(id(tensor), (None, 0, None))
            if view is None or tensor._version != version:
                return None
            return view if tensor.requires_grad and tensor.is_floating_point() else None  # not so of a whole number

        def follow(func: Any, args: Any, made: Any) -> bool:
            view = view_of(args[0]) if args else None
            if view is None:
                return True
            if not torch.is_grad_enabled():  # a constant
                return False
            parts = [made] if isinstance(made, Tensor) else list(made)
            followed = views.follow(func, args, view, made)
            for t, part in zip(parts, followed, strict=True):
                if part is not None:
                    known[id(t)] = (t, t._version, part)
            ids = views.ids_of(func, args, picks)
            picks.extend((t, ids) for t in parts if ids is not None)
            return None not in followed

        def handle(func: Any, args: Any, kwargs: Any) -> Any:
            refuse(func, args, kwargs, marked, n is not None)
            if values is None and func in READS:  # where a fake tensor has nothing, and says so in other words
                raise DataDependentOutputException(func)
            picked.enter(func)
            if func is torch.autograd.grad and _differentiates(level, *args, **kwargs):
                raise _SecondOrder
            if func in OPEN and depth() != level:
                nested.append(func)
            output = expansions.expanded(func, args, kwargs, handle, n is not None)
            if output is not NotImplemented:
                if func in expansions.FOR_VMAP:  # its calls are not handed over
                    note(func, (args, kwargs))
                return output
            if func in views.VIEWS:
                output = func(*args, **kwargs)
                if not follow(func, args, output):
                    note(func, args[:1])
                return output
            if func not in rules:
                note(func, (args, kwargs))
                return _unless_mutating(func, args, kwargs, mutations, n, level)
            at = len(counted)
            counted.append(func)
            # inside a transform of the user's own the output of a call is not all that the loss sees of it
            output = NotImplemented if at in skip or depth() != level else use(at, func, args, kwargs)
            if output is not NotImplemented:
                return output
            note(func, (args, kwargs), skip.get(at, ""))
            return _unless_mutating(func, args, kwargs, mutations, n, level)

        def use(at: int, func: Any, args: Any, kwargs: Any) -> Any:
            """The output of a call of a layer, which is noted; NotImplemented of any other."""
            for reading, call in enumerate(readings(rules, func, args, kwargs)):
                view = view_of(call.weight)
                laid = None if view is None else _lay_out(call, view)
                if view is None or laid is None:
                    continue
                if any(_has_twice((args, kwargs), call.input, p) for p in (call.weight, call.bias) if p is not None):
                    continue  # its own input or addend, a path of its own
                bias = None if call.bias is None else view_of(call.bias)
                biased = bias is not None and _fits(bias, laid[1])
                args, kwargs = _without_gradient((args, kwargs), call.weight, call.bias if biased else None)
                note(func, (args, kwargs))
                picked.enter_layer(at)
                output = _unless_mutating(func, args, kwargs, mutations, n, level)
                picked.leave_layer()
                call = with_ids(call, picks) if view.picked else call
                leaves = pytree.tree_leaves(call.input)
                uses.append(
                    _Use(
                        at,
                        reading,
                        view.name,
                        bias.name if biased and bias is not None else None,
                        _called(func),
                        call.table,
                        *laid,
                        view.picked,
                        spec(output, output.shape),
                        tuple(spec(x, x.shape) for x in leaves),
                    )
                )
                inputs.extend((view.name, x, x._version) for x in leaves)
                return output + zero.to(output)
            return NotImplemented

        def note(func: Any, tree: Any, why: str = "") -> None:
            for leaf in pytree.tree_leaves(tree):
                view = view_of(leaf) if isinstance(leaf, Tensor) else None
                if view is not None and not _reads_shape(func):
                    hidden_by.setdefault(view.name, {})[f"{_called(func)} {why}".strip()] = None

        given = make_examples()  # here, or a change in place would be one of a captured tensor
        versions = [(leaf, leaf._version) for leaf in pytree.tree_leaves(given)]
        try:
            with traced(), unfused(), _buffers_kept(n), Tap(handle):
                loss = loss_fn(marked, given)
        except RuntimeError as error:
            _refuse_checkpoint(error)
            if "setup_context" in str(error):
                raise _WithoutContext from error
            raise
        if mutations:
            raise mutations[0]
        loss = check_loss(loss, has_aux, n)[0]
        for name, x, version in inputs:
            if x._version != version:
                raise RuntimeError(
                    f"the input of the layer {name!r}, of shape {tuple(x.shape)}, was changed in place after the "
                    "call: its gradient needs the value that it had, write x = x + y in place of x += y"
                )
        for leaf, version in versions:
            if leaf._version != version:
                raise RuntimeError(
                    f"loss_fn changes a tensor of its example, of shape {tuple(leaf.shape)}, in place: the batch is "
                    "not its own to change, write x = x + y in place of x += y"
                )
        return loss if n is None else loss.sum()

    with FakeTensorMode(allow_non_fake_inputs=True) if values is None else picked:
        params = filled(dict(param_specs)) if values is None else values[0]
        torch.func.grad(observed, argnums=(0, 1))(params, torch.zeros(()))
    if not reached and not of_outputs and values is None:
        raise ValueError(
            "loss_fn returned a loss that does not depend on params, as autograd sees it: its gradient would be zero. "
            "Compute it from the tensors of params, as functional_call(net, params, ...) does, without detach() and "
            "torch.no_grad() in between"
        )
    return _Run(uses, reached, hidden_by, bool(nested), picked.calls, picked.asked)


def _lay_out(call: Call, view: View) -> tuple[_Groups, tuple[Window, Window, Window]] | None:
    """The parameter's axes that a call has on each letter, and what it uses of them; None where that is no layer."""
    shape = view.shape if call.split is None else call.split
    named = isinstance(call.letters, str) and len(call.letters) == len(shape)
    if not named or not set(call.letters) <= set("boik"):
        raise ValueError(
            f"the rule of a call of {view.name!r} names its axes {call.letters!r} where its shape is {tuple(shape)}: "
            "give each axis one of the letters b, o, i, k"
        )
    if call.split is not None:
        reshaped = views.reshape(view, call.split)
        if reshaped is None:
            return None
        view = reshaped
    shown = views.axes(view)
    if shown is None:
        return None
    strides = views.contiguous(view.split)
    groups: dict[str, list[tuple[int, int]]] = {letter: [] for letter in "boik"}
    windows: dict[str, Window] = {}
    for letter in "boik":
        letters = [
            (-1 if seen.position is None else seen.position, axis)
            for axis, seen in enumerate(shown)
            if (call.letters[seen.position] if seen.position is not None else "b") == letter and view.split[axis] != 1
        ]
        axes = [axis for _, axis in sorted(letters)]
        partial = [axis for axis in axes if shown[axis].length < view.split[axis]]
        if view.picked and 0 in axes:
            if axes != [0] or letter != "b":
                return None
            partial = []
        if partial and (len(axes) > 1 or letter == "k"):
            return None
        size = math.prod(view.split[axis] for axis in axes)
        start, length = (shown[axes[0]].start, shown[axes[0]].length) if partial else (0, size)
        windows[letter] = Window(start, length, size)
        groups[letter] = _merged([(view.split[axis], strides[axis]) for axis in axes])
    if call.table and (groups["b"] or groups["k"] or len(groups["o"]) > 1):
        return None
    return _Groups(*(tuple(groups[letter]) for letter in "boik")), (windows["b"], windows["o"], windows["i"])


def _merged(axes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for size, stride in axes:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def _fits(bias: View, windows: tuple[Window, Window, Window]) -> bool:
    """Whether a bias holds an entry for each of `(b o)`, and the call uses those of it that it uses of the weight."""
    shown = views.axes(bias)
    in_a_row = math.prod(bias.shape[:-1]) == 1 or windows[1].length == 1  # or it may be added along positions
    if shown is None or bias.picked or not in_a_row:
        return False
    positions = [axis.position for axis in shown if axis.position is not None]
    if positions != sorted(positions):  # a turned one
        return False
    of_bias = [(axis.start, axis.length, size) for axis, size in zip(shown, bias.split, strict=True) if size != 1]
    of_weight = [(w.start, w.length, w.size) for w in windows[:2] if w.size != 1]
    if all(start == 0 and length == size for start, length, size in of_bias + of_weight):
        return math.prod(bias.split) == windows[0].size * windows[1].size
    return of_bias == of_weight


def _arrange(
    param_specs: Mapping[str, Spec], found: _Run, places: Sequence[tuple[Along, ...] | None]
) -> tuple[tuple[Layer, ...], tuple[Tapped, ...]]:
    """A weight is a layer if its calls are its only paths and agree on its axes; a bias belongs to one weight."""
    uses: dict[str, list[_Use]] = {}
    users: dict[str, set[str]] = {}
    for use in found.uses:
        uses.setdefault(use.weight, []).append(use)
        if use.bias is not None:
            users.setdefault(use.bias, set()).add(use.weight)
    groups = {weight: _agreed(of_it) for weight, of_it in uses.items() if weight not in found.reached | users.keys()}
    tapped = {weight: layout for weight, layout in groups.items() if layout is not None}
    owned = {}
    for weight, layout in tapped.items():
        biases = {use.bias for use in uses[weight]} - {None}
        turned = any(use.groups != layout and use.bias is not None for use in uses[weight])
        bias = next(iter(biases), None)
        if bias is None or len(biases) > 1 or turned or users[bias] != {weight}:
            continue
        if bias not in found.reached | uses.keys():
            owned[weight] = bias
    layers = []
    for name, param in param_specs.items():
        if name in tapped:
            funcs = " + ".join(dict.fromkeys(use.func for use in uses[name]))
            table = any(use.table for use in uses[name])
            bias = owned.get(name)
            bias_shape = () if bias is None else param_specs[bias].shape
            layers.append(_layer(name, param.shape, bias, bias_shape, tapped[name], table, funcs))
        elif name not in owned.values():
            hidden = list(found.hidden_by.get(name, {})) or ["calls that differ in axes" if name in uses else "no call"]
            layers.append(_dense_layer(name, param.shape, " + ".join(hidden)))
    calls = [
        Tapped(
            use.at,
            use.reading,
            use.weight,
            use.output,
            place,
            use.windows,
            use.groups != tapped[use.weight],
            use.bias is not None and use.weight in owned,
            use.picked,
        )
        for use, place in zip(found.uses, places, strict=True)
        if use.weight in tapped
    ]
    return tuple(layers), tuple(calls)


def _agreed(uses: Sequence[_Use]) -> _Groups | None:
    """The axes on which all calls of a weight agree, in the orientation of the first, or of a lookup."""
    first = next((use for use in uses if use.table), uses[0])
    for use in uses:
        same = use.groups == first.groups
        if not same and (use.groups.turned() != first.groups or use.table or use.groups.k):
            return None
    if first.table and (first.groups.b or first.groups.k):
        return None
    return first.groups


def _layer(
    name: str,
    shape: tuple[int, ...],
    bias: str | None,
    bias_shape: tuple[int, ...],
    groups: _Groups,
    table: bool,
    rule: str,
) -> Layer:
    b, o, i, k = (math.prod(size for size, _ in group) for group in groups)
    axes = [axis for group in groups for axis in group]
    by_stride = sorted(range(len(axes)), key=lambda axis: -axes[axis][1])
    split = tuple(axes[axis][0] for axis in by_stride)
    order = tuple(by_stride.index(axis) for axis in range(len(axes)))
    return Layer(name, bias, (b, o, i + (bias is not None), k), split, order, shape, bias_shape, table, rule)


def _dense_layer(name: str, shape: tuple[int, ...], hidden_by: str) -> Layer:
    """A vector or scalar is one block an element; of a matrix or more, o is the first axis and i the rest.

    Axes of one entry in front of a matrix do not count: `[1, t, d]` is one.
    """
    elements, axes = math.prod(shape), list(shape)
    while len(axes) > 2 and axes[0] == 1:
        axes.pop(0)
    sizes = (elements, 1, 1, 1) if len(axes) < 2 else (1, axes[0], elements // max(axes[0], 1), 1)
    return Layer(name, None, sizes, sizes, (0, 1, 2, 3), shape, (), hidden_by=hidden_by)


def _without_gradient(tree: Any, *held: Tensor | None) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach() if any(leaf is p for p in held if p is not None) else leaf, tree)


def _has_twice(given: Any, inputs: Any, p: Tensor) -> bool:
    """Whether a call takes its weight or bias in another role too."""
    return any(x is p for x in pytree.tree_leaves(inputs)) or sum(x is p for x in pytree.tree_leaves(given)) > 1


class _Mark(torch.autograd.Function):
    """The identity, which notes the name of a parameter that a gradient reaches."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, name: str, reached: set[str]) -> Tensor:
        return p.view_as(p)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.name, ctx.reached = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.reached.add(ctx.name)
        return gradients[0], None, None


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, Spec)


def _called(func: Any) -> str:
    """The name of a torch function as a person writes it."""
    name = getattr(func, "__name__", "")
    if getattr(torch, name, None) is func:  # `resolve_name` takes torch.mm for an alias of it
        return f"torch.{name}"
    return str(resolve_name(func) or getattr(func, "__name__", func)).removeprefix("torch.nn.functional.")


def _reads_shape(func: Any) -> bool:
    """Whether a function asks a tensor for its shape and the like, and not for its values."""
    return getattr(func, "__name__", "") == "__get__" or func in (Tensor.size, Tensor.dim, Tensor.detach, Tensor.numel)


def _differentiates(level: int, outputs: Any, *_: Any, **__: Any) -> bool:
    """Whether the outputs of a `torch.autograd.grad` are the loss's own, not of a transform within it."""
    return any(torch._C._functorch.maybe_get_level(leaf) <= level for leaf in pytree.tree_leaves(outputs))


def _unless_mutating(
    func: Any, args: Any, kwargs: Any, mutations: list[RuntimeError], n: int | None, level: int
) -> Any:
    """Call func; note what is to be raised for changing a tensor from outside the loss, and raise it for its `out`.

    A BatchNorm counts its batches so, before it is seen that it uses their statistics.
    """
    for out in pytree.tree_leaves(kwargs.get("out")):
        # torch refuses a captured tensor that is changed in place, but not as an output
        if isinstance(out, Tensor) and torch._C._functorch.maybe_get_level(out) < level:
            raise _mutation(func, out, n)
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        if "mutate a captured Tensor" not in str(error):
            raise
        new = _mutation(func, args[0], n)
        new.__cause__ = error
        mutations.append(new)
        return args[0]


def _mutation(func: Any, changed: Tensor, n: int | None) -> RuntimeError:
    return RuntimeError(
        f"loss_fn changes a tensor that it did not make in place by {_called(func)}, on one of shape "
        f"{tuple(changed.shape)}: change a copy of it, and return that as aux (has_aux=True){_unless_batched(n)}"
    )


def _unless_batched(n: int | None) -> str:
    if n is not None:
        return ""
    return ", or if it is a buffer of a model call model.eval(), or take the batch as it is with batched=True"


@contextlib.contextmanager
def _buffers_kept(n: int | None) -> Iterator[None]:
    """Refuse a loss that leaves a tensor of its run in a buffer of a module, which has its own again."""
    before: dict[tuple[weakref.ref[nn.Module], str], tuple[Tensor | None, ...]] = {}  # of a new one nothing
    thread = threading.get_ident()

    def note(module: nn.Module, name: str, value: Tensor | None) -> None:
        if threading.get_ident() == thread:
            old = (module._buffers[name],) if name in module._buffers else ()
            before.setdefault((weakref.ref(module), name), old)

    hook = register_module_buffer_registration_hook(note)
    try:
        yield
    finally:
        hook.remove()
        left = []
        for (reference, name), old in before.items():
            module = reference()  # nothing is left in one that the loss made for itself
            if module is None or not _of_a_run(module._buffers.get(name)):
                continue
            left.append((module, name))
            if old:
                (module._buffers[name],) = old
            else:
                del module._buffers[name]
    if left:
        module, name = left[0]
        raise RuntimeError(
            f"loss_fn puts another tensor into the buffer {name!r} of {type(module).__name__}: if it is a cache that "
            "the first call fills, call the model once before; else keep it apart from the model, and return it as aux "
            f"(has_aux=True){_unless_batched(n)}"
        )


def _of_a_run(t: Tensor | None) -> bool:
    """Whether a tensor has no values, or is one of a transform."""
    return t is not None and (isinstance(t, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(t))


def _refuse_checkpoint(error: RuntimeError) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.filename == torch.utils.checkpoint.__file__ for frame in frames):
        raise ValueError(
            "torch.utils.checkpoint inside loss_fn does not work under torch.func: remove it and bound the memory with "
            "chunk_size"
        ) from error
