"""Per-example gradients of any function of a dict of tensors, without hooks.

A layer's weight is not differentiated: its calls are tapped, a zero probe is added to each output, and the gradient
w.r.t. the probes is the per-example output gradient. Parameters that no rule explains on every path to the loss are
differentiated as they are, one copy an example, in the same pass. Since no example's loss sees another's probes or
copies, this is `vmap(grad)`, written as the gradient of `vmap(loss)`'s sum: the backward pass then runs on whole
batches, outside `vmap`. A batched loss is run as it is, with probes that have its examples as an axis.
"""

from __future__ import annotations

import contextlib
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


def capture(loss_fn: LossFn, params: Mapping[str, Tensor], batch: Batch, options: Options) -> Captured:
    """Losses and gradient terms of the examples of a batch."""
    params = own(params)
    if torch.compiler.is_compiling():
        return _tapped(plan(loss_fn, params, batch, options), loss_fn, params, batch, options)[0]
    check_inference_mode()
    plans, key = _memo(loss_fn), _key(loss_fn, params, batch, options)
    if key in plans:
        found, expected = plans[key]
        try:
            captured, seen = _tapped(found, loss_fn, params, batch, options)
        except RuntimeError:  # a stale plan, or what discovery says better
            seen = None
        if seen == expected:
            return captured
    # the first call with these shapes, or the loss took another way through the program than last time
    found = plan(loss_fn, params, batch, options)
    captured, seen, found = _retried(found, loss_fn, params, batch, options)
    plans[key] = found, seen
    return captured


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
        return Captured(torch.empty(n, device="meta"), {layer.weight: layer for layer in found.layers}, none, ())
    with FakeTensorMode(allow_non_fake_inputs=True):
        owned, batch = pytree.tree_map(torch.empty_like, (owned, batch))
        return _retried(found, loss_fn, owned, batch, options)[0]


def _retried(found: Plan, loss_fn: LossFn, params: Params, batch: Batch, options: Options) -> tuple[Any, Any, Plan]:
    """A tapped run, in another way where `vmap` cannot run a function of the loss; and how it was run."""
    try:
        return *_tapped(found, loss_fn, params, batch, options), found
    except RuntimeError as error:
        if options.batched or found.looped:
            raise
        if "Batching rule not implemented" in str(error):
            found = found._replace(looped=True)
        elif str(error).startswith("vmap: ") and not found.nested:
            found = found._replace(nested=True)
        else:
            raise
    return _retried(found, loss_fn, params, batch, options)


class StalePlan(RuntimeError):
    """The loss called other layers than discovery saw."""


class _Run(NamedTuple):
    """What a run of the loss under the tap gave, beside its gradient."""

    losses: Tensor
    aux: Any
    inputs: list[Any]  # of the tapped calls


def _tapped(found: Plan, loss_fn: LossFn, params: Params, batch: Batch, options: Options) -> tuple[Captured, list[Any]]:
    layers = {layer.weight: layer for layer in found.layers}
    tapped = {call.weight for call in found.calls}
    held = tapped | {layers[weight].bias for weight in tapped}
    fixed = {name: p for name, p in params.items() if name in held}
    free = {name: p for name, p in params.items() if name not in held}
    compiling = torch.compiler.is_compiling()
    instead = {} if options.batched else EXACT | OPEN if compiling and found.open else EXACT
    layers_of = OPEN_LAYERS if compiling and not options.batched else {}
    calls: list[Call] = []
    seen: list[Any] = []

    def probed(probes: list[Tensor], free: Params, example: Any, n: int | None = None) -> tuple[Tensor, _Run]:
        calls.clear()
        seen.clear()
        known: list[tuple[Tensor, str]] = [(p, name) for name, p in fixed.items()]
        counted: list[Any] = []
        picks: list[tuple[Tensor, Tensor]] = []

        def handle(func: Any, args: Any, kwargs: Any) -> Any:
            seen.append(func)
            if not options.batched:
                refuse_batch_statistics(func, args, kwargs, params)
            output = expansions.expanded(func, args, kwargs, handle, options.batched)
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
            if k == len(probes) or found.calls[k].at != at:
                return instead.get(func, func)(*args, **kwargs)
            planned = found.calls[k]
            reads = readings(options.rules, func, args, kwargs)
            name = name_of(reads[planned.reading].weight, known) if planned.reading < len(reads) else None
            output = layers_of.get(func, func)(*args, **kwargs)
            # Dynamo does not show `w.T` to the tap, so that a view of a parameter may have no name there
            named = name == planned.weight or (compiling and name is None)
            if not named or output.shape != probes[k].shape:
                raise StalePlan(
                    f"call {k} of a layer, of {name!r} with an output of shape {tuple(output.shape)}, is not the one "
                    "that discovery saw: let the loss call the same layers whatever device, mode or values it meets"
                )
            read = reads[planned.reading]
            calls.append(with_ids(read, picks) if planned.picked else read)
            return output + probes[k]

        with contextlib.nullcontext() if compiling else traced(), unfused(), Tap(handle):
            loss = loss_fn({name: fixed[name] if name in fixed else free[name] for name in params}, example)
        if len(calls) != len(probes):
            raise StalePlan(
                f"the loss called {len(calls)} layers where discovery saw {len(probes)}: let the loss call the same "
                "layers whatever device, mode or values it meets"
            )
        loss, aux = check_loss(loss, options.has_aux, n)
        return loss, _Run(loss, aux, [call.input for call in calls])

    parts = []
    for examples in _chunks(batch, 1 if found.looped else options.chunk_size):
        n = pytree.tree_leaves(examples)[0].shape[0]
        run = _batched if options.batched else _looped if found.looped else _each if found.nested else _summed
        parts.append(run(probed, found, free, examples, n, options.randomness))
    outputs, dense, losses, aux, inputs = pytree.tree_map(lambda *t: torch.cat(t) if len(t) > 1 else t[0], *parts)

    terms: dict[str, Terms] = {}
    given: list[Any] = list(zip(calls, inputs, outputs, strict=True))
    calls.clear()
    del inputs, outputs
    for layer in found.layers:
        reads = []
        for k, planned in enumerate(found.calls):
            if planned.weight == layer.weight:
                (call, x, g), given[k] = given[k], None  # freed as soon as the layer has its own
                term = _picked(call, x, g, planned) if planned.picked else call.read(x, g)
                reads.append(_placed(term, planned, layer, params))
                del call, x, g, term
        if len(reads) > 0:
            terms[layer.weight] = _added(reads)
        else:
            G = dense[layer.weight].to(statistics_dtype(params[layer.weight]))
            terms[layer.weight] = (Dense(G.reshape(G.shape[0], *layer.sizes)),)
    return Captured(losses.to(statistics_dtype(losses)), layers, terms, aux), seen


Probed = Callable[..., tuple[Tensor, _Run]]
Part = tuple[list[Tensor], Params, Tensor, Any, list[Any]]  # gradients at probes and copies, losses, aux, inputs


def _probes(found: Plan, n: int) -> list[Tensor]:
    """Zeros in the shapes of the tapped outputs."""
    return [torch.zeros(_shape(call, n), dtype=call.output.dtype, device=call.output.device) for call in found.calls]


def _shape(call: Tapped, n: int) -> tuple[int, ...]:
    if call.along is None:
        return call.output.shape
    axis, entries = call.along[0]
    return (*call.output.shape[:axis], n * entries, *call.output.shape[axis + 1 :])


def _copies(tree: Any, n: int) -> Any:
    """Every tensor once an example, `[n, ...]`, in the memory of one."""
    return pytree.tree_map(lambda t: t.expand(n, *t.shape), tree)


def _summed(probed: Probed, found: Plan, free: Params, examples: Batch, n: int, randomness: str) -> Part:
    """The gradient of the sum of the losses: of each example w.r.t. its own probes and copies."""

    def total(probes: list[Tensor], free: Params, examples: Batch) -> tuple[Tensor, _Run]:
        losses, run = torch.func.vmap(probed, randomness=randomness)(probes, free, examples)
        return losses.sum(), run

    (outputs, dense), run = _differentiated(total, _copies((_probes(found, n), free), n), examples)
    return outputs, dense, *run


def _differentiated(f: Callable[..., tuple[Tensor, _Run]], at: Any, examples: Batch) -> tuple[Any, _Run]:
    """`torch.func.grad` w.r.t. a tuple of trees; where nothing transforms or traces it, of a graph that is freed.

    A gradient of `torch.func` can be differentiated again: it keeps every activation, and what the backward pass made
    of it, to the end.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        of_f: Callable[..., Any] = torch.func.grad(f, argnums=tuple(range(len(at))), has_aux=True)
        return of_f(*at, examples)
    with torch.enable_grad():
        leaves, tree = pytree.tree_flatten(at)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        value, run = f(*pytree.tree_unflatten(leaves, tree), _detached(examples))
        if value.requires_grad and len(leaves) > 0:
            gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
        else:
            gradients = tuple(map(torch.zeros_like, leaves))
    return pytree.tree_unflatten(gradients, tree), _detached(run)


def _detached(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.detach, tree)


def _each(probed: Probed, found: Plan, free: Params, examples: Batch, n: int, randomness: str) -> Part:
    """`vmap(grad)` as it is."""
    of_one: Callable[..., Any] = torch.func.grad(probed, argnums=(0, 1), has_aux=True)
    copies = _copies((_probes(found, n), free), n)
    (outputs, dense), run = torch.func.vmap(of_one, randomness=randomness)(*copies, examples)
    return outputs, dense, *run


def _looped(probed: Probed, found: Plan, free: Params, examples: Batch, n: int, randomness: str) -> Part:
    """One example, without `vmap`: a copy, for discovery may not have seen whether the loss changes it in place."""
    example = pytree.tree_map(lambda leaf: leaf[0].clone(), examples)
    (outputs, dense), run = _differentiated(probed, (_probes(found, n), free), example)
    return pytree.tree_map(lambda t: t[None], (outputs, dense, *run))


def _batched(probed: Probed, found: Plan, free: Params, batch: Batch, n: int, randomness: str) -> Part:
    """The batch as it is; a parameter without a rule takes a backward pass an example."""

    probes = _probes(found, n)

    def of_outputs(free: Params) -> tuple[Tensor, tuple[list[Tensor], _Run]]:
        def total(probes: list[Tensor], batch: Batch) -> tuple[Tensor, _Run]:
            losses, run = probed(probes, free, batch, n)
            return losses.sum(), run

        (outputs,), run = _differentiated(total, (probes,), batch)
        return run.losses, (outputs, run)

    dense: Params = {}
    if len(free) > 0:  # in one forward pass, for a second one would draw other random numbers
        pulled: Any = torch.func.vjp(of_outputs, free, has_aux=True)
        losses, pull, (outputs, run) = pulled
        (dense,) = torch.func.vmap(pull)(torch.eye(n, dtype=losses.dtype, device=losses.device))
    else:
        outputs, run = of_outputs(free)[1]
    inputs = []
    for k, (call, tree) in enumerate(zip(found.calls, run.inputs, strict=True)):
        assert call.along is not None
        leaves, shape = pytree.tree_flatten(tree)
        outputs[k] = _examples_first(outputs[k], call.along[0], n)
        leaves = [_examples_first(x, along, n) for x, along in zip(leaves, call.along[1:], strict=True)]
        inputs.append(pytree.tree_unflatten(leaves, shape))
    return outputs, dense, run.losses, run.aux, inputs


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
