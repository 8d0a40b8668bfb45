"""Per-example gradients of any function of a dict of tensors, without hooks.

A layer's weight is not differentiated: its calls are tapped, and the gradient w.r.t. each output is the per-example
output gradient. Parameters that no rule explains on every path to the loss are differentiated as they are, one copy an
example, in the same pass. Since no example's loss sees another's outputs or copies, this is `vmap(grad)`, written as
the gradient of `vmap(loss)`'s sum: the backward pass then runs on whole batches, outside `vmap`. A batched loss is run
as it is, its examples an axis of the outputs.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from . import expansions, views
from .arrivals import Arrivals, output_shape, uncounted
from .backward import Copied, Probe, Probed, Run, StalePlan, batched, each, looped, summed
from .batching import (
    COPIED,
    EAGER_LAYERS,
    EXACT,
    MAPPED,
    OF_CHANNELS,
    OPEN,
    OPEN_BATCHED,
    OPEN_LAYERS,
    Functions,
)
from .checks import check_inference_mode, check_loss
from .copies import Copies
from .discovery import Options, Plan, Way, as_known, plan
from .draws import Draws, draws, host_draws, undrawn
from .graphs import IN_GRAPHS
from .layout import spec
from .made import own_of_each
from .modes import innermost, no_autocast, share, transformed
from .refusals import refuse, refuse_changed
from .rules import RULES
from .tap import LOOKUPS, Tap, beneath, name_of, of_table, output_of, readings, traced, unfused, with_ids
from .types import Batch, Dense, Layer, LossAuxFn, LossFn, Params, Terms, batch_size, statistics_dtype
from .watch import DATA_DEPENDENT, REQUIRES_GRAD, without_gradient


class Captured(NamedTuple):
    """One batch as every later stage sees it."""

    losses: Tensor  # [n]
    layers: dict[str, Layer]  # by the name of the weight, in the order of params
    terms: dict[str, Terms]
    aux: Any  # what the loss returned beside, each tensor with an axis n in front unless batched; () if nothing
    bytes_each: int  # of the inputs and output gradients of all layers, for one example


class Folded(NamedTuple):
    """As `Captured`, with what was made of the terms in place of them."""

    losses: Tensor
    layers: dict[str, Layer]
    kept: dict[str, Any]
    aux: Any
    bytes_each: int


Reading = Callable[[Layer, Terms, int], Any]
"""(a layer, its terms of some examples, `bytes_each`) -> what is to be kept of them"""

Begin = Callable[[dict[str, Layer]], Reading]
"""layers -> how to read them; called before anything is computed"""

Add = Callable[[Layer, Any, Any], Any]
"""(a layer, what was read of some examples, what was read of others) -> what is kept of both"""


def capture(loss_fn: LossFn | LossAuxFn, params: Mapping[str, Tensor], batch: Batch, options: Options) -> Captured:
    """Losses and gradient terms of the examples of a batch."""
    return _captured(fold(loss_fn, params, batch, options, _as_they_are, _together))


def _as_they_are(layers: dict[str, Layer]) -> Reading:
    return lambda layer, terms, bytes_each: (terms,)


def _together(layer: Layer, some: tuple[Terms, ...], others: tuple[Terms, ...]) -> tuple[Terms, ...]:
    return some + others


def _captured(folded: Folded) -> Captured:
    losses, layers, kept, aux, bytes_each = folded
    return Captured(losses, layers, {name: joined(kept.pop(name)) for name in layers}, aux, bytes_each)


def joined(parts: Sequence[Terms]) -> Terms:
    """The terms of all examples."""
    if len(parts) == 1:
        return parts[0]
    return pytree.tree_map(lambda one, *more: torch.cat([one, *more]) if isinstance(one, Tensor) else one, *parts)


def fold(
    loss_fn: LossFn | LossAuxFn,
    params: Mapping[str, Tensor],
    batch: Batch,
    options: Options,
    begin: Begin,
    add: Add,
    known: tuple[Layer, ...] = (),
) -> Folded:
    """Losses of a batch, and what is read of its gradient terms: layer by layer, some examples at a time.

    In eager mode a layer is read within the backward pass, and its inputs and output gradients are then freed.

    known: layers that parameters were in earlier batches, for those that this batch does not use; in eager mode alone.
    """
    params = separate(params)
    if torch.compiler.is_compiling():
        found = plan(loss_fn, params, batch, options)
        if found.way is Way.LOOPED:
            raise RuntimeError(LOOPS)
        return _tapped(found, loss_fn, params, batch, options, begin, add)[0]

    def tapped(found: Plan) -> tuple[Folded, list[Any]]:
        return _tapped(as_known(found, known), loss_fn, params, batch, options, begin, add)

    check_inference_mode()
    plans, key = _memo(loss_fn), _key(loss_fn, params, batch, options)
    leaves = pytree.tree_leaves((params, batch))
    before = draws(leaves)  # every attempt starts from them
    if key in plans:
        found, expected = plans[key]
        try:
            folded, seen = tapped(found)
        except Exception:  # the plan is stale, or discovery has a clearer error
            seen = None
        if seen == expected:
            return folded
        before.repeat()
    # the first call with these shapes, or the loss took another way through the program than last time
    found = plan(loss_fn, params, batch, options)
    without_values = any(isinstance(leaf, FakeTensor) for leaf in leaves)
    try:
        folded, seen, found = _retried(found, before, tapped)
    except DATA_DEPENDENT as error:
        if without_values:
            raise
        raise RuntimeError(KEPT) from error
    if isinstance(folded.losses, FakeTensor) and not without_values:
        raise RuntimeError(KEPT)
    if key not in plans and len(plans) == REMEMBERED:
        del plans[next(iter(plans))]
    plans[key] = found, seen
    return folded


LOOPS = (
    "loss_fn is run for one example after another, which a graph cannot: describe says beside its parameters why; "
    "replace that, or call the step in eager mode"
)
KEPT = (
    "loss_fn used a tensor that it had kept since its layers were found, on tensors without values, as a module does "
    "that fills a cache in its first call: empty the cache, or make the model anew, and call the model once as it is "
    "before its loss comes here"
)


def separate(params: Mapping[str, Tensor]) -> Params:
    """One object a name, even where tensors are shared."""
    return {name: p.detach() for name, p in params.items()}


def shapes(loss_fn: LossFn | LossAuxFn, params: Mapping[str, Tensor], batch: Batch, options: Options) -> Captured:
    """What `capture` would return, of tensors without values where the loss looks at none."""
    owned = separate(params)
    found = plan(loss_fn, owned, batch, options)
    if found.way is Way.LOOPED:
        n = batch_size(batch)
        none: dict[str, Terms] = {}
        for layer in found.layers:
            dtype = statistics_dtype(params[layer.weight])
            none[layer.weight] = (Dense(torch.empty(n, *layer.sizes, dtype=dtype, device="meta")),)
        return Captured(torch.empty(n, device="meta"), {layer.weight: layer for layer in found.layers}, none, (), 0)

    def tapped(found: Plan, params: Params, batch: Batch) -> tuple[Folded, list[Any]]:
        return _tapped(found, loss_fn, params, batch, options, _as_they_are, _together)

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            like, examples = pytree.tree_map(torch.empty_like, (owned, batch))
            folded = _retried(found, draws([]), lambda found: tapped(found, like, examples))[0]
    except RuntimeError:  # values are looked at, which torch says in several ways
        leaves = pytree.tree_leaves((owned, batch))
        with undrawn(leaves):
            folded = _retried(found, draws(leaves), lambda found: tapped(found, owned, batch))[0]
    return _captured(folded)


UNMAPPED = (
    "Batching rule not implemented",
    "does not have vmap support",
    "does not yet have a batching rule",
    "setup_context",
    "doesn't match the broadcast shape",
    "under vmap transform is not allowed",
    "Can't detach views in-place",
    "from the 'Sparse",  # ...CPU' backend, or that of another device
    "inside of vmap for memory_format",
)
"""Parts of torch's errors for what `vmap` cannot run: an operator, an `autograd.Function`, a write in place."""


def _retried(
    found: Plan, before: Draws, tapped: Callable[[Plan], tuple[Folded, list[Any]]]
) -> tuple[Folded, list[Any], Plan]:
    """A tapped run, tried in another way where `vmap` cannot run a function of the loss; and the plan that was run."""
    try:
        return *tapped(found), found
    except RuntimeError as error:
        if found.way in (Way.BATCHED, Way.LOOPED):
            raise
        of_vmap = str(error).lower().startswith("vmap")
        if of_vmap and found.way is Way.SUMMED:
            found = found._replace(way=Way.EACH, open=False)
        elif of_vmap or isinstance(error, Copied) or any(said in str(error) for said in UNMAPPED):
            found = found._replace(way=Way.LOOPED, open=False, fills=False, draws=False)
        else:
            raise
    before.repeat()
    return _retried(found, before, tapped)


def _params_of(tree: Any, by_id: Mapping[int, tuple[str, int, bool]]) -> Iterator[Any]:
    """Which parameters, and which of their entries, a call is given: where that changes a plan is stale."""
    for leaf in pytree.tree_leaves(tree):
        of_param = by_id.get(id(leaf))
        if of_param is not None:  # the strides of a copy are those that `vmap` gives it
            yield of_param, leaf.shape, (leaf.stride(), leaf.storage_offset()) if of_param[2] else ()


def _deciding(seen: Sequence[Any]) -> list[Any]:
    """The part of what was seen that a plan depends on: calls with parameters, and how layers were read."""
    return [entry for entry in seen if len(entry) > 2]


CHANNELS_LAST = (torch.channels_last, torch.channels_last_3d)  # `vmap` lays no example so; no value depends on it
WAYS = {"SUMMED": summed, "EACH": each, "LOOPED": looped, "BATCHED": batched}  # by name, for Dynamo hashes no enum


class Replaced(NamedTuple):
    """What is called in place of torch functions."""

    anywhere: Functions
    tapped: Functions  # in calls that are tapped
    cast: Functions  # in those under autocast


def _replaced(found: Plan, batched: bool) -> Replaced:
    mapped = transformed()
    if torch.compiler.is_compiling():
        if batched:  # `found.way is Way.BATCHED` would be a guard that Dynamo cannot check
            return Replaced(OPEN_BATCHED, {}, {})
        return Replaced(EXACT | MAPPED | (OPEN | IN_GRAPHS if found.open else {}), OPEN_LAYERS, OPEN_LAYERS)
    if batched:
        return Replaced({}, {} if mapped else EAGER_LAYERS, {})
    if found.way is Way.LOOPED:
        return Replaced(EXACT, EXACT, EXACT)
    if found.way is Way.EACH or mapped:  # by a `vmap` of the caller's own
        return Replaced(EXACT | MAPPED, {}, {})
    if not found.open:
        return Replaced(EXACT | MAPPED, EAGER_LAYERS, {})
    # of a convolution with a bias `vmap` makes calls that autocast does not cast, or in part
    return Replaced(EXACT | MAPPED | OPEN, EAGER_LAYERS | OF_CHANNELS, OPEN_LAYERS)


class _Tapping:
    """One run of a loss under the tap, call by call."""

    def __init__(
        self,
        found: Plan,
        options: Options,
        replaced: Replaced,
        calls: list[Any],
        probe: Probe,
        fixed: Params,
        free: Params,
        n: int | None,
    ) -> None:
        self.found, self.calls, self.probe, self.n = found, calls, probe, n
        self.rules, self.batched = options.rules, options.batched
        self.replaced = replaced
        self.params = {**fixed, **free}
        self.fixed, self.free = fixed, free
        self.compiling = torch.compiler.is_compiling()
        self.looping = found.way is Way.LOOPED
        self.mapping = not (options.batched or self.looping)
        self.as_written = options.batched or (self.looping and len(found.calls) == 0)
        self.by_ids = not options.batched and F.embedding in options.rules
        self.seen: list[Any] = []  # the way that the loss takes; not told in a graph
        self.known: list[tuple[Tensor, str]] = [(p, name) for name, p in fixed.items()]
        # 0 for the parameter, else which part of it, and whether it is a view: not all that `views.VIEWS` give are
        self.by_id = {} if self.compiling else {id(p): (name, 0, True) for p, name in self.known}
        self.counted = self.reshaped = 0  # calls of functions that have a rule, and of `views.MAY_COPY`
        self.gathered: list[views.Gathered] = []
        self.inputs: list[tuple[str, Tensor, int]] = []  # of the calls, with the versions that they had
        self.copies = Copies()

    def handle(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of any torch function."""
        if self.by_ids and func in LOOKUPS:
            if of_table(func, args, kwargs, self.free.values())[0] is not func:
                self.counted += 1  # as discovery does
            func, args, kwargs = of_table(func, args, kwargs, self.fixed.values())
        if not self.compiling:
            self.seen.append((func, torch.is_grad_enabled(), *_params_of((args, kwargs), self.by_id)))
        self.copies.begins(func, args)
        if not self.compiling or not self.found.open:  # in an open graph discovery has seen every call
            refuse(func, args, kwargs, self.params, self.batched)
        if self.mapping and kwargs.get("memory_format") in CHANNELS_LAST:
            kwargs = {**kwargs, "memory_format": torch.contiguous_format}
        if func == REQUIRES_GRAD and name_of(args[0], self.known) is not None:  # one of a tapped call is a constant
            return True
        own_view = self.looping and func in expansions.COPIES and name_of(args[0], self.known) is None
        return output_of(self, func, args, kwargs, self.as_written or own_view or func in self.replaced.anywhere)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a function that has no rule and gives no view."""
        output = self.replaced.anywhere.get(func, func)(*args, **kwargs)
        if func in COPIED and func in self.replaced.anywhere and args:
            self.copies.add(output, args[0])
        return output

    def view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a function of `views.VIEWS`; what it shows of a parameter is known from then on."""
        name = name_of(args[0], self.known) if len(args) > 0 else None
        if self.compiling and name is not None:
            views.fix((args[1:], kwargs))
        output = (func if name is not None else self.replaced.anywhere.get(func, func))(*args, **kwargs)
        if func in views.MAY_COPY and args and not self.compiling:
            at, self.reshaped = self.reshaped, self.reshaped + 1
            if at < len(self.found.shared) and self.found.shared[at] != share(output, args[0]):
                self.copies.add(output, args[0])
        parts = [output] if isinstance(output, Tensor) else output
        if name is not None:
            if not self.compiling:
                viewed = self.by_id[id(args[0])][2] and share(parts[0], args[0])
                self.by_id.update({id(part): (name, at, viewed) for at, part in enumerate(parts, len(self.known))})
            self.known.extend((part, name) for part in parts)
        # Dynamo does not show `w.T` to the tap, so that a view of a parameter may have no name there
        hidden = self.compiling and name is None and not any(args[0] is p for p in self.free.values())
        ids = views.ids_of(func, args, self.gathered) if args and (name is not None or hidden) else None
        if ids is not None:
            self.gathered.extend(views.Gathered(part, ids, name) for part in parts)
        return output

    def layer(self, at: int, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a function that has a rule, with a probe where the plan has one."""
        k = len(self.calls)
        if k == len(self.found.calls) or self.found.calls[k].use.at != at:
            return self.replaced.anywhere.get(func, func)(*args, **kwargs)
        planned, use = self.found.calls[k], self.found.calls[k].use
        reads = readings(self.rules, func, args, kwargs)
        read = reads[use.reading] if use.reading < len(reads) else None
        name = None if read is None else name_of(read.weight, self.known)
        bias = None if read is None or read.bias is None else name_of(read.bias, self.known)
        if read is not None and not self.compiling:
            held = (read.weight,) if bias is None else (read.weight, read.bias)
            args, kwargs = without_gradient((args, kwargs), *held)
        cast = torch.is_autocast_enabled(self.params[use.weight].device.type)
        output = (self.replaced.cast if cast else self.replaced.tapped).get(func, func)(*args, **kwargs)
        named = name == use.weight or (self.compiling and name is None)  # a view by `w.T`
        # two tuples, for Dynamo
        if read is None or not named or tuple(output.shape) != output_shape(planned, self.n):
            raise StalePlan(
                f"call {k} of a layer, of {name!r} with an output of shape {tuple(output.shape)}, is not the one "
                "that discovery saw: let the loss call the same layers whatever device, mode or values it meets"
            )
        if not self.compiling:
            if bias != planned.bias:
                raise StalePlan(
                    f"call {k} of a layer, of {use.weight!r}, adds the parameter {bias!r} where discovery saw "
                    f"{planned.bias!r}: let the loss call the same layers whatever device, mode or values it meets"
                )
            self.seen.append((read.letters, read.split, bias, read.table, output.dtype))
            if torch.is_grad_enabled():
                leaves = map(innermost, pytree.tree_leaves(read.input))
                self.inputs.extend((use.weight, x, x._version) for x in leaves)
        self.calls.append(with_ids(read, self.gathered, use.weight) if use.by_ids else read)
        # a function of a rule of the user's own may need its output, which a change in place would not let alone
        return self.probe(k, output if func in RULES else output.clone())

    def check(self) -> None:
        """Refuse, once the loss has run, what was not as discovery saw it."""
        if len(self.calls) != len(self.found.calls):
            raise StalePlan(
                f"the loss called {len(self.calls)} layers where discovery saw {len(self.found.calls)}: let the loss "
                "call the same layers whatever device, mode or values it meets"
            )
        refuse_changed(inputs=self.inputs)
        if self.copies.changed():
            raise Copied("the loss changes a view in place, which it did not when its layers were found")


def _watched(
    found: Plan, loss_fn: LossFn | LossAuxFn, names: Collection[str], options: Options
) -> tuple[Probed, list[Any], list[list[Any]]]:
    """The loss under the tap, the list in which a run leaves its calls, and the list of what each run has seen."""
    compiling, mapped = torch.compiler.is_compiling(), transformed()  # the parameters too may be of several
    replaced = _replaced(found, options.batched)
    fills = found.fills or (found.draws and options.randomness == "different")
    calls: list[Any] = []
    ways: list[list[Any]] = []

    def probed(probe: Probe, fixed: Params, free: Params, example: Any, n: int | None = None) -> tuple[Tensor, Run]:
        calls.clear()
        own = own_of_each((example, fixed, free) if mapped else example) if fills else {}
        here = replaced._replace(anywhere={**replaced.anywhere, **own})
        run = _Tapping(found, options, here, calls, probe, fixed, free, n)
        with contextlib.nullcontext() if compiling else traced(found.told), unfused(), beneath(Tap(run.handle)):
            loss = loss_fn({name: run.params[name] for name in names}, example)
        run.check()
        ways.append(run.seen)
        if found.calls and _deciding(run.seen) != _deciding(ways[0]):
            raise StalePlan(
                "the loss took another path for some of the examples than for others: draw what it depends on before "
                "the call, into what the loss closes over"
            )
        loss, aux = check_loss(loss, options.has_aux, n)
        return loss, Run(loss, aux, [call.input for call in calls])

    return probed, calls, ways


def _tapped(
    found: Plan, loss_fn: LossFn | LossAuxFn, params: Params, batch: Batch, options: Options, begin: Begin, add: Add
) -> tuple[Folded, list[Any]]:
    layers = {layer.weight: layer for layer in found.layers}
    tapped = {call.use.weight for call in found.calls}
    free = {name: p for name, p in params.items() if name in layers and layers[name].rule is None}
    fixed = {name: p for name, p in params.items() if name not in free}
    device = pytree.tree_leaves(batch)[0].device
    if found.cuts and free and transformed():  # one transform within another, which it is not of
        raise RuntimeError(
            f"loss_fn calls {found.cuts}, which in a transform or a compiled step does not reach {next(iter(free))!r}, "
            "which has no rule: write detach(), as x + (f(x) - x).detach(), or call the step in eager mode"
        )
    probed, calls, ways = _watched(found, loss_fn, params.keys(), options)
    way = WAYS[found.way.name]
    read = begin(layers)
    kept: dict[str, Any] = {}

    def take(layer: Layer, terms: Terms, bytes_each: int) -> None:
        with no_autocast(device):
            of_terms = read(layer, terms, bytes_each)
            kept[layer.weight] = add(layer, kept[layer.weight], of_terms) if layer.weight in kept else of_terms

    chunks = _chunks(batch, options.chunk_size)
    before = _draws_of_chunks(found, params, batch, options) if len(chunks) > 1 else None
    parts, bytes_each = [], 0
    for examples in chunks:
        if before is not None:
            before.repeat()
        n = batch_size(examples)
        arrivals = Arrivals(found, params, calls, take, n)
        dense, run = way(probed, arrivals, fixed, free, examples, options.randomness)
        arrivals.finish()
        for name, layer in layers.items():
            if name in free:
                G = dense[name].to(statistics_dtype(params[name]))
                take(layer, (Dense(G.reshape(n, *layer.sizes)),), arrivals.bytes_each)
            elif name not in tapped:  # no call of this batch uses it
                take(layer, uncounted(layer, n, params[name]), arrivals.bytes_each)
        parts.append((run.losses, run.aux))
        bytes_each = arrivals.bytes_each
    losses, aux = pytree.tree_map(lambda *t: torch.cat(t) if len(t) > 1 else t[0], *parts)
    kept = {name: kept[name] for name in layers}
    return Folded(losses.to(statistics_dtype(losses)), layers, kept, aux, bytes_each), ways[0]


def _draws_of_chunks(found: Plan, params: Params, batch: Batch, options: Options) -> Draws | None:
    """The random states that every chunk starts from, where all examples are to see the same draws."""
    if options.randomness == "same":
        if torch.compiler.is_compiling():
            raise ValueError(
                f"chunk_size={options.chunk_size!r} with randomness='same' in a compiled step, where its chunks would "
                "draw other numbers: leave one of them out"
            )
        return draws(pytree.tree_leaves((params, batch)))
    return None if found.way is Way.LOOPED or torch.compiler.is_compiling() else host_draws()


def _chunks(batch: Batch, size: int | None) -> list[Batch]:
    if size is None:
        return [batch]
    leaves, tree = pytree.tree_flatten(batch)
    return [pytree.tree_unflatten(part, tree) for part in zip(*(leaf.split(size) for leaf in leaves), strict=True)]


REMEMBERED = 256  # plans of a loss
_memos: weakref.WeakKeyDictionary[Any, dict[Any, tuple[Plan, list[Any]]]] = weakref.WeakKeyDictionary()


def _memo(loss_fn: LossFn | LossAuxFn) -> dict[Any, tuple[Plan, list[Any]]]:
    """Plans of a loss by the shapes that it met, kept as long as the loss lives."""
    try:
        return _memos.setdefault(getattr(loss_fn, "__self__", loss_fn), {})
    except TypeError:  # a callable that cannot be hashed or weakly referenced
        return {}


def _key(loss_fn: LossFn | LossAuxFn, params: Params, batch: Batch, options: Options) -> Any:
    leaves, tree = pytree.tree_flatten(batch)
    devices = {p.device.type for p in params.values()}  # on which autocast decides the dtypes of the outputs
    return (
        getattr(loss_fn, "__func__", None),
        tuple((name, spec(p, p.shape)) for name, p in params.items()),
        tuple(spec(leaf, leaf.shape[1:]) for leaf in leaves),
        repr(tree),
        tuple(options.rules.items()),
        options.has_aux,
        options.batched,
        *(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in sorted(devices)),
    )
