"""Per-example gradients of any function of a dict of tensors, without hooks.

A layer's weight is not differentiated: its calls are tapped, a zero probe is added to each output, and the gradient
w.r.t. the probes is the per-example output gradient. Parameters that no rule explains on every path to the loss are
differentiated as they are, one copy an example, in the same pass. Since no example's loss sees another's probes or
copies, this is `vmap(grad)`, written as the gradient of `vmap(loss)`'s sum: the backward pass then runs on whole
batches, outside `vmap`. A batched loss is run as it is, with probes that have its examples as an axis.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from . import expansions, views
from .batching import EXACT, OPEN, OPEN_LAYERS
from .checks import check_inference_mode
from .discovery import Along, Options, Plan, Tapped, check_loss, plan, spec
from .modes import transformed
from .patches import Patches
from .rules import Call
from .tap import Tap, name_of, readings, refuse_batch_statistics, traced, unfused, with_ids
from .types import Batch, Dense, Factored, Layer, LossFn, OneHot, Params, Terms, statistics_dtype


class Captured(NamedTuple):
    """One batch as every later stage sees it."""

    losses: Tensor  # [n]
    layers: dict[str, Layer]  # by the name of the weight, in the order of params
    terms: dict[str, Terms]
    aux: Any  # what the loss returned beside, each tensor with an axis n in front unless batched; () if nothing
    held: int  # bytes of an example of all layers' inputs and output gradients


class Folded(NamedTuple):
    """As `Captured`, with what was made of the terms in place of them."""

    losses: Tensor
    layers: dict[str, Layer]
    kept: dict[str, Any]
    aux: Any
    held: int


Reading = Callable[[Layer, Terms, int], Any]
"""(a layer, its terms of some examples, `held`) -> what is wanted of them"""

Begin = Callable[[dict[str, Layer]], Reading]
"""layers -> how they are read, before anything is computed"""

Add = Callable[[Layer, Any, Any], Any]
"""(a layer, what was read of some examples, and of others) -> of both"""


def capture(loss_fn: LossFn, params: Mapping[str, Tensor], batch: Batch, options: Options) -> Captured:
    """Losses and gradient terms of the examples of a batch."""
    return _captured(fold(loss_fn, params, batch, options, _as_they_are, _together))


def _as_they_are(layers: dict[str, Layer]) -> Reading:
    return lambda layer, terms, held: (terms,)


def _together(layer: Layer, some: tuple[Terms, ...], others: tuple[Terms, ...]) -> tuple[Terms, ...]:
    return some + others


def _captured(folded: Folded) -> Captured:
    losses, layers, kept, aux, held = folded
    return Captured(losses, layers, {name: joined(kept.pop(name)) for name in layers}, aux, held)


def joined(parts: Sequence[Terms]) -> Terms:
    """The terms of all examples."""
    if len(parts) == 1:
        return parts[0]
    return pytree.tree_map(lambda one, *more: torch.cat([one, *more]) if isinstance(one, Tensor) else one, *parts)


def fold(
    loss_fn: LossFn, params: Mapping[str, Tensor], batch: Batch, options: Options, begin: Begin, add: Add
) -> Folded:
    """Losses of a batch, and what is read of its gradient terms: of some examples after others, layer by layer.

    In eager mode a layer is read within the backward pass, which then frees what the layer was made of.
    """
    params = own(params)
    if torch.compiler.is_compiling():
        return _tapped(plan(loss_fn, params, batch, options), loss_fn, params, batch, options, begin, add)[0]
    check_inference_mode()
    plans, key = _memo(loss_fn), _key(loss_fn, params, batch, options)
    if key in plans:
        found, expected = plans[key]
        try:
            folded, seen = _tapped(found, loss_fn, params, batch, options, begin, add)
        except (RuntimeError, ValueError):  # a stale plan, or what discovery says better
            seen = None
        if seen == expected:
            return folded
    # the first call with these shapes, or the loss took another way through the program than last time
    found = plan(loss_fn, params, batch, options)
    folded, seen, found = _retried(found, loss_fn, params, batch, options, begin, add)
    plans[key] = found, seen
    return folded


def own(params: Mapping[str, Tensor]) -> Params:
    """One object a name, even where tensors are shared."""
    return {name: p.detach() for name, p in params.items()}


def shapes(loss_fn: LossFn, params: Mapping[str, Tensor], batch: Batch, options: Options) -> Captured:
    """What `capture` would return, of tensors without values."""
    owned = own(params)
    found = plan(loss_fn, owned, batch, options)
    if found.looped:
        n = pytree.tree_leaves(batch)[0].shape[0]
        none: dict[str, Terms] = {
            layer.weight: (Dense(torch.empty(n, *layer.sizes, device="meta")),) for layer in found.layers
        }
        return Captured(torch.empty(n, device="meta"), {layer.weight: layer for layer in found.layers}, none, (), 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        owned, batch = pytree.tree_map(torch.empty_like, (owned, batch))
        folded = _retried(found, loss_fn, owned, batch, options, _as_they_are, _together)[0]
    return _captured(folded)


def _retried(
    found: Plan, loss_fn: LossFn, params: Params, batch: Batch, options: Options, begin: Begin, add: Add
) -> tuple[Folded, Any, Plan]:
    """A tapped run, in another way where `vmap` cannot run a function of the loss; and how it was run."""
    try:
        return *_tapped(found, loss_fn, params, batch, options, begin, add), found
    except RuntimeError as error:
        if options.batched or found.looped:
            raise
        if "Batching rule not implemented" in str(error):
            found = found._replace(looped=True)
        elif str(error).startswith("vmap: ") and not found.nested:
            found = found._replace(nested=True)
        else:
            raise
    return _retried(found, loss_fn, params, batch, options, begin, add)


def no_autocast(device: torch.device) -> torch.autocast:
    """Statistics are those of their own dtype where autocast is on around the call, for the loss, as well."""
    return torch.autocast(device.type, enabled=False)


class StalePlan(RuntimeError):
    """The loss called other layers than discovery saw."""


class _Run(NamedTuple):
    """What a run of the loss under the tap gave, beside its gradient."""

    losses: Tensor
    aux: Any
    inputs: list[Any]  # of the tapped calls


def _tapped(
    found: Plan, loss_fn: LossFn, params: Params, batch: Batch, options: Options, begin: Begin, add: Add
) -> tuple[Folded, list[Any]]:
    layers = {layer.weight: layer for layer in found.layers}
    tapped = {call.weight for call in found.calls}
    owned = tapped | {layers[weight].bias for weight in tapped}
    fixed = {name: p for name, p in params.items() if name in owned}
    free = {name: p for name, p in params.items() if name not in owned}
    compiling = torch.compiler.is_compiling()
    instead = {} if options.batched else EXACT | OPEN if found.open else EXACT
    layers_of = OPEN_LAYERS if compiling and not options.batched else {}
    calls: list[Any] = []
    seen: list[Any] = []

    def probed(probe: Probe, free: Params, example: Any, n: int | None = None) -> tuple[Tensor, _Run]:
        calls.clear()
        seen.clear()
        known: list[tuple[Tensor, str]] = [(p, name) for name, p in fixed.items()]
        counted: list[Any] = []
        picks: list[tuple[Tensor, Tensor]] = []

        def handle(func: Any, args: Any, kwargs: Any) -> Any:
            seen.append(func)
            if not options.batched:
                refuse_batch_statistics(func, args, kwargs, params)
            output = (
                NotImplemented if func in instead else expansions.expanded(func, args, kwargs, handle, options.batched)
            )
            if output is not NotImplemented:
                return output
            if func in views.VIEWS:
                output = func(*args, **kwargs)
                name = name_of(args[0], known) if len(args) > 0 else None
                if name is not None:
                    parts = [output] if isinstance(output, Tensor) else output
                    known.extend((part, name) for part in parts)
                    ids = views.ids_of(func, args, picks)
                    if ids is not None:
                        picks.extend((part, ids) for part in parts)
                return output
            if func not in options.rules:
                return instead.get(func, func)(*args, **kwargs)
            k, at = len(calls), len(counted)
            counted.append(func)
            if k == len(found.calls) or found.calls[k].at != at:
                return instead.get(func, func)(*args, **kwargs)
            planned = found.calls[k]
            reads = readings(options.rules, func, args, kwargs)
            name = name_of(reads[planned.reading].weight, known) if planned.reading < len(reads) else None
            output = layers_of.get(func, func)(*args, **kwargs)
            # Dynamo does not show `w.T` to the tap, so that a view of a parameter may have no name there
            named = name == planned.weight or (compiling and name is None)
            if not named or output.shape != _shape(planned, n):
                raise StalePlan(
                    f"call {k} of a layer, of {name!r} with an output of shape {tuple(output.shape)}, is not the one "
                    "that discovery saw: let the loss call the same layers whatever device, mode or values it meets"
                )
            read = reads[planned.reading]
            calls.append(with_ids(read, picks) if planned.picked else read)
            return probe(k, output)

        with contextlib.nullcontext() if compiling else traced(), unfused(), Tap(handle):
            loss = loss_fn({name: fixed[name] if name in fixed else free[name] for name in params}, example)
        if len(calls) != len(found.calls):
            raise StalePlan(
                f"the loss called {len(calls)} layers where discovery saw {len(found.calls)}: let the loss call the "
                "same layers whatever device, mode or values it meets"
            )
        loss, aux = check_loss(loss, options.has_aux, n)
        return loss, _Run(loss, aux, [call.input for call in calls])

    run = _batched if options.batched else _looped if found.looped else _each if found.nested else _summed
    read = begin(layers)
    kept: dict[str, Any] = {}

    def take(layer: Layer, terms: Terms, held: int) -> None:
        with no_autocast(pytree.tree_leaves(batch)[0].device):
            of_terms = read(layer, terms, held)
            kept[layer.weight] = add(layer, kept[layer.weight], of_terms) if layer.weight in kept else of_terms

    parts, held = [], 0
    for examples in _chunks(batch, options.chunk_size):
        n = pytree.tree_leaves(examples)[0].shape[0]
        arrivals = _Arrivals(found, params, calls, take, n)
        dense, losses, aux = run(probed, arrivals, free, examples, n, options.randomness)
        arrivals.finish()
        for name in layers:
            if name not in tapped:
                G = dense[name].to(statistics_dtype(params[name]))
                take(layers[name], (Dense(G.reshape(n, *layers[name].sizes)),), arrivals.held)
        parts.append((losses, aux))
        held = arrivals.held
    losses, aux = pytree.tree_map(lambda *t: torch.cat(t) if len(t) > 1 else t[0], *parts)
    kept = {name: kept[name] for name in layers}
    return Folded(losses.to(statistics_dtype(losses)), layers, kept, aux, held), seen


Take = Callable[[Layer, Terms, int], None]


class _Arrivals:
    """The tapped calls of some examples: a layer is read as soon as the output gradients of all its calls are there.

    Then nothing that it was made of is held here.
    """

    def __init__(self, found: Plan, params: Params, calls: list[Any], take: Take, n: int) -> None:
        self.layers = {layer.weight: layer for layer in found.layers}
        self.planned, self.params, self.calls, self.take, self.n = found.calls, params, calls, take, n
        self.inputs: list[Any] = []
        self.gradients: dict[int, Tensor] = {}
        self.missing = list(range(len(found.calls)))
        self.held = 0

    def start(self, inputs: list[Any]) -> None:
        """inputs: of the calls; they are taken out of this list."""
        self.inputs = inputs
        for k, planned in enumerate(self.planned):
            if planned.along is not None:
                leaves, tree = pytree.tree_flatten(inputs[k])
                leaves = [_examples_first(x, along, self.n) for x, along in zip(leaves, planned.along[1:], strict=True)]
                inputs[k] = pytree.tree_unflatten(leaves, tree)
            sizes = [math.prod(x.shape[1:]) * x.element_size() for x in pytree.tree_leaves(inputs[k])]
            self.held += sum(sizes) + math.prod(_shape(planned, 1)) * planned.output.dtype.itemsize

    def arrived(self, k: int, g: Tensor) -> None:
        """The gradient w.r.t. the output of a call."""
        planned = self.planned[k]
        self.gradients[k] = g if planned.along is None else _examples_first(g, planned.along[0], self.n)
        self.missing.remove(k)
        uses = [j for j, other in enumerate(self.planned) if other.weight == planned.weight]
        if not any(j in self.missing for j in uses):
            layer = self.layers[planned.weight]
            terms = _added([_placed(self._term(j), self.planned[j], layer, self.params) for j in uses])
            self.take(layer, terms, self.held)

    def _term(self, k: int) -> Factored | OneHot:
        call, x, g, planned = self.calls[k], self.inputs[k], self.gradients.pop(k), self.planned[k]
        self.calls[k] = self.inputs[k] = None
        return _picked(call, x, g, planned) if planned.picked else call.read(x, g)

    def probes(self) -> list[Tensor]:
        """Zeros in the shapes of the outputs."""
        of = [(planned.output, _shape(planned, self.n)) for planned in self.planned]
        return [torch.zeros(shape, dtype=output.dtype, device=output.device) for output, shape in of]

    def all(self, inputs: list[Any], gradients: list[Any]) -> None:
        """At once what else comes one by one."""
        self.start(inputs)
        for k in range(len(gradients)):
            g, gradients[k] = gradients[k], None
            self.arrived(k, g)

    def finish(self) -> None:
        """Zeros for what the loss does not depend on."""
        for k in list(self.missing):
            planned = self.planned[k]
            shape = _shape(planned, self.n) if planned.along is not None else (self.n, *planned.output.shape)
            self.arrived(k, torch.zeros(shape, dtype=planned.output.dtype, device=planned.output.device))


Probe = Callable[[int, Tensor], Tensor]
"""(call, its output) -> the output, whose gradient is wanted"""

Probed = Callable[..., tuple[Tensor, _Run]]
Part = tuple[Params, Tensor, Any]  # gradients at copies, losses, aux


def _shape(call: Tapped, n: int | None) -> tuple[int, ...]:
    if call.along is None:
        return call.output.shape
    assert n is not None
    axis, entries = call.along[0]
    return (*call.output.shape[:axis], n * entries, *call.output.shape[axis + 1 :])


def _copies(tree: Any, n: int) -> Any:
    """Every tensor once an example, `[n, ...]`, in the memory of one."""
    return pytree.tree_map(lambda t: t.expand(n, *t.shape), tree)


class _Tap(torch.autograd.Function):
    """The identity, which hands on the gradient of its output as soon as it is known.

    start: requires a gradient, so that the output does; under `vmap` it is one an example, so that the output is too.
    """

    @staticmethod
    def forward(start: Tensor, output: Tensor, k: int, arrived: Callable[[int, Tensor], None]) -> Tensor:
        return output.data  # not a view, which could not be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, _, ctx.k, ctx.arrived = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None]:
        ctx.arrived(ctx.k, gradients[0])
        return None, gradients[0], None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, start: Tensor, output: Tensor, k: int, arrived: Any) -> tuple[Tensor, int]:
        if in_dims[1] is None:
            output = output.expand(info.batch_size, *output.shape)
        else:
            output = output.movedim(in_dims[1], 0)
        return _Tap.apply(start, output, k, arrived), 0


def _freed(
    f: Callable[[Tensor, Params, Batch], tuple[Tensor, _Run]],
    start: Tensor,
    free: Params,
    examples: Batch,
    begin: Callable[[list[Any]], None],
) -> tuple[Params, _Run]:
    """The gradient of f w.r.t. free; those w.r.t. tapped outputs are handed on within a pass that frees its graph.

    One of `torch.func` can be differentiated again: it keeps every activation, and what the backward pass made of it,
    to the end.
    """
    with torch.enable_grad():
        leaves, tree = pytree.tree_flatten((start, free))
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        at, copies = pytree.tree_unflatten(leaves, tree)
        value, run = f(at, copies, _detached(examples))
        run = _detached(run)
        begin(run.inputs)
        if value.requires_grad:
            gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
        else:
            gradients = tuple(map(torch.zeros_like, leaves))
    return pytree.tree_unflatten(gradients, tree)[1], run


def _taps(arrived: Callable[[int, Tensor], None], start: Tensor) -> Probe:
    """Outputs whose gradients arrive one by one."""

    def tap(k: int, output: Tensor) -> Tensor:
        tapped: Tensor = _Tap.apply(start, output, k, arrived)
        return tapped

    return tap


def _adds(probes: list[Tensor]) -> Probe:
    """Zeros added to the outputs, w.r.t. which `torch.func` differentiates."""
    return lambda k, output: output + probes[k]


def _summed(probed: Probed, arrivals: _Arrivals, free: Params, examples: Batch, n: int, randomness: str) -> Part:
    """The gradient of the sum of the losses: of each example w.r.t. its own outputs and copies."""

    def total(probe_at: Callable[[Any], Probe], at: Any, free: Params, examples: Batch) -> tuple[Tensor, _Run]:
        def of_one(at: Any, free: Params, example: Any) -> tuple[Tensor, _Run]:
            return probed(probe_at(at), free, example)

        losses, run = torch.func.vmap(of_one, randomness=randomness)(at, free, examples)
        return losses.sum(), run

    copies = _copies(free, n)
    if not transformed():
        of_taps = functools.partial(total, functools.partial(_taps, arrivals.arrived))
        dense, run = _freed(of_taps, torch.zeros(n), copies, examples, arrivals.start)
        return dense, run.losses, run.aux
    of_f: Callable[..., Any] = torch.func.grad(functools.partial(total, _adds), argnums=(0, 1), has_aux=True)
    (outputs, dense), run = of_f(_copies(arrivals.probes(), n), copies, examples)
    arrivals.all(run.inputs, outputs)
    return dense, run.losses, run.aux


def _detached(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.detach, tree)


def _each(probed: Probed, arrivals: _Arrivals, free: Params, examples: Batch, n: int, randomness: str) -> Part:
    """`vmap(grad)` as it is."""

    def at_zeros(probes: list[Tensor], free: Params, example: Any) -> tuple[Tensor, _Run]:
        return probed(_adds(probes), free, example)

    of_one: Callable[..., Any] = torch.func.grad(at_zeros, argnums=(0, 1), has_aux=True)
    copies = _copies((arrivals.probes(), free), n)
    (outputs, dense), run = torch.func.vmap(of_one, randomness=randomness)(*copies, examples)
    arrivals.all(run.inputs, outputs)
    return dense, run.losses, run.aux


def _looped(probed: Probed, arrivals: _Arrivals, free: Params, examples: Batch, n: int, randomness: str) -> Part:
    """One example after another, without `vmap`."""

    def of_one(outputs: list[Tensor], start: Tensor, free: Params, example: Any) -> tuple[Tensor, _Run]:
        return probed(_taps(outputs.__setitem__, start), free, example)

    parts = []
    for k in range(n):
        # a copy, for discovery may not have seen whether the loss changes it in place
        example = pytree.tree_map(lambda leaf, k=k: leaf[k].clone(), examples)
        outputs = arrivals.probes()
        dense, run = _freed(functools.partial(of_one, outputs), torch.zeros(()), free, example, lambda inputs: None)
        parts.append((outputs, dense, run))
    outputs, dense, run = pytree.tree_map(lambda *t: torch.stack(t), *parts)
    arrivals.all(run.inputs, outputs)
    return dense, run.losses, run.aux


def _batched(probed: Probed, arrivals: _Arrivals, free: Params, batch: Batch, n: int, randomness: str) -> Part:
    """The batch as it is; a parameter without a rule takes a backward pass an example."""

    def total(probe: Probe, free: Params, batch: Batch) -> tuple[Tensor, _Run]:
        losses, run = probed(probe, free, batch, n)
        return losses.sum(), run

    def of_taps(start: Tensor, free: Params, batch: Batch) -> tuple[Tensor, _Run]:
        return total(_taps(arrivals.arrived, start), free, batch)

    if len(free) == 0 and not transformed():
        _, run = _freed(of_taps, torch.zeros(()), free, batch, arrivals.start)
        return {}, run.losses, run.aux

    def of_outputs(free: Params) -> tuple[Tensor, tuple[list[Tensor], _Run]]:
        def at_zeros(probes: list[Tensor], batch: Batch) -> tuple[Tensor, _Run]:
            return total(_adds(probes), free, batch)

        of_f: Callable[..., Any] = torch.func.grad(at_zeros, has_aux=True)
        outputs, run = of_f(arrivals.probes(), batch)
        return run.losses, (outputs, run)

    dense: Params = {}
    if len(free) > 0:  # in one forward pass, for a second one would draw other random numbers
        pulled: Any = torch.func.vjp(of_outputs, free, has_aux=True)
        losses, pull, (outputs, run) = pulled
        (dense,) = torch.func.vmap(pull)(torch.eye(n, dtype=losses.dtype, device=losses.device))
    else:
        outputs, run = of_outputs(free)[1]
    arrivals.all(run.inputs, outputs)
    return dense, run.losses, run.aux


def _examples_first(t: Tensor, along: Along, n: int) -> Tensor:
    """`[... (n entries) ...]` as `[n ... entries ...]`."""
    axis, entries = along
    return t.reshape(*t.shape[:axis], n, entries, *t.shape[axis + 1 :]).movedim(axis, 0)


def _chunks(batch: Batch, size: int | None) -> list[Batch]:
    if size is None:
        return [batch]
    leaves, tree = pytree.tree_flatten(batch)
    return [pytree.tree_unflatten(part, tree) for part in zip(*(leaf.split(size) for leaf in leaves), strict=True)]


def _placed(term: Factored | OneHot, planned: Tapped, layer: Layer, params: Params) -> Factored | OneHot:
    """A call's term on the axes of the whole layer, in the dtype of its statistics, with the bias as the last input."""
    dtype = statistics_dtype(params[layer.weight])
    b, o, i = planned.windows
    one = layer.bias is not None
    if isinstance(term, OneHot):
        g = F.pad(_within(term.g.to(dtype), i, -1), [0, one])
        return OneHot(term.ids + o.start, o.size, g, term.counted)
    a, g, x, counted = term.a.to(dtype), term.g.to(dtype), term.x, term.counted
    last = float(planned.biased)  # 1 where the call added the bias
    if b.length < b.size:
        counted = _within(torch.ones_like(g[..., 0], dtype=torch.bool), b, 1)
    g = _within(_within(g, o, 3), b, 1)
    x = None if x is None else _within(x.to(dtype), i, 3)
    if isinstance(a, Patches):
        if b.length == b.size and i.length == i.size and not planned.turned:
            return Factored(replace(a, last=last) if one else a, g, x, counted)
        a = a.write()
    a = _within(_within(a, i, 3), b, 1)
    if planned.turned:
        a, g = g[..., None], a[..., 0]
    if one:
        a = torch.cat([a, a.new_full((*a.shape[:3], 1, 1), last)], dim=3)
    return Factored(a, g, x, counted)


def _picked(call: Call, inputs: Any, g: Tensor, planned: Tapped) -> Factored:
    """A call whose blocks ids chose among those of the layer: each a position of the one that it is."""
    x, ids = inputs  # [n p]
    term = call.read(x, g)
    assert isinstance(term, Factored)
    blocks = torch.arange(planned.windows[0].size, device=ids.device)
    counted = blocks[None, :, None] == ids[:, None]  # [n b p]
    counted = counted.repeat_interleave(term.g.shape[2], dim=2)
    a, g = (t.flatten(1, 2)[:, None] for t in (term.inputs, term.g))  # [n 1 (p s) ...]
    return Factored(torch.where(counted[..., None, None], a, 0), torch.where(counted[..., None], g, 0), None, counted)


def _within(t: Tensor, window: Any, axis: int) -> Tensor:
    """A window of an axis as the whole axis, zero outside."""
    start, length, size = window
    if length == size:
        return t
    return F.pad(t, [0, 0] * ((-1 - axis) % t.dim()) + [start, size - start - length])


def _added(terms: Sequence[Factored | OneHot]) -> Terms:
    """Several uses of one weight are more positions of it."""
    factored = [term for term in terms if isinstance(term, Factored)]
    tables = [term for term in terms if isinstance(term, OneHot)]
    added: list[Factored | OneHot] = []
    if len(factored) > 0:
        samples = [term.x for term in factored if term.x is not None]
        a, g = factored[0].a, _cat([term.g for term in factored], 2)
        if len(factored) > 1:
            a = torch.cat([term.inputs for term in factored], 2)
        counted = None
        if any(term.counted is not None for term in factored):
            every = [
                torch.ones_like(t.g[..., 0], dtype=torch.bool) if t.counted is None else t.counted for t in factored
            ]
            counted = _cat(every, 2)
        added.append(Factored(a, g, _cat(samples, 2) if len(samples) > 0 else None, counted))
    if len(tables) > 0:
        ids = _cat([term.ids for term in tables], 1)
        g, counted = _cat([term.g for term in tables], 1), _cat([term.counted for term in tables], 1)
        added.append(OneHot(ids, tables[0].size, g, counted))
    return tuple(added)


def _cat(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)


_memos: weakref.WeakKeyDictionary[Any, dict[Any, tuple[Plan, list[Any]]]] = weakref.WeakKeyDictionary()


def _memo(loss_fn: LossFn) -> dict[Any, tuple[Plan, list[Any]]]:
    """Plans of a loss by the shapes that it met, kept as long as the loss lives."""
    try:
        return _memos.setdefault(getattr(loss_fn, "__self__", loss_fn), {})
    except TypeError:  # a callable that cannot be hashed or weakly referenced
        return {}


def _key(loss_fn: LossFn, params: Params, batch: Batch, options: Options) -> Any:
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
