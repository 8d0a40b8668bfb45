"""Per-example gradients of any function of a dict of tensors, without hooks.

A layer's weight is not differentiated: its calls are tapped, and the gradient w.r.t. each output is the per-example
output gradient. Parameters that no rule explains on every path to the loss are differentiated as they are, one copy an
example, in the same pass. Since no example's loss sees another's outputs or copies, this is `vmap(grad)`, written as
the gradient of `vmap(loss)`'s sum: the backward pass then runs on whole batches, outside `vmap`. A batched loss is run
as it is, its examples an axis of the outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from .arrivals import Arrivals, uncounted
from .backward import Copied, batched, each, looped, summed
from .checks import check_inference_mode
from .discovery import Options, Plan, Way, as_known, plan
from .draws import Draws, draws, host_draws, undrawn
from .layout import specs
from .modes import no_autocast, transformed
from .tapping import tapped_loss
from .types import Batch, Dense, Layer, LossAuxFn, LossFn, Params, Terms, batch_size, statistics_dtype
from .watch import DATA_DEPENDENT


class Captured(NamedTuple):
    """One batch as every later stage sees it."""

    losses: Tensor  # [n]
    layers: dict[str, Layer]  # by the name of the weight, in the order of params
    kept: dict[str, Any]  # what was kept of the terms of each
    aux: Any  # what the loss returned beside, each tensor with an axis n in front unless batched; () if nothing
    bytes_each: int  # of the inputs and output gradients of all calls, and of dense gradients, for one example

    @property
    def terms(self) -> dict[str, Terms]:
        """The terms themselves, which are what `capture` and `shapes` keep."""
        return self.kept


Reading = Callable[[Layer, Terms, int], Any]
"""(a layer, its terms of some examples, `bytes_each`) -> what is to be kept of them"""

Begin = Callable[[dict[str, Layer]], Reading]
"""layers -> how to read them; called before anything is computed"""

Add = Callable[[Layer, Any, Any], Any]
"""(a layer, what was read of some examples, what was read of others) -> what is kept of both"""


def capture(loss_fn: LossFn | LossAuxFn, params: Mapping[str, Tensor], batch: Batch, options: Options) -> Captured:
    """Losses and gradient terms of the examples of a batch."""
    return _whole(fold(loss_fn, params, batch, options, _as_they_are, _together))


def _as_they_are(layers: dict[str, Layer]) -> Reading:
    return lambda layer, terms, bytes_each: (terms,)


def _together(layer: Layer, some: tuple[Terms, ...], others: tuple[Terms, ...]) -> tuple[Terms, ...]:
    return some + others


def _whole(folded: Captured) -> Captured:
    return folded._replace(kept={name: joined(folded.kept.pop(name)) for name in folded.layers})


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
) -> Captured:
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

    def tapped(found: Plan) -> tuple[Captured, list[Any]]:
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


def shapes(
    loss_fn: LossFn | LossAuxFn, params: Mapping[str, Tensor], batch: Batch, options: Options
) -> tuple[Captured, Way]:
    """What `capture` would return, of tensors without values where the loss looks at none, and how the loss is run."""
    owned = separate(params)
    found = plan(loss_fn, owned, batch, options)
    if found.way is Way.LOOPED and not found.calls:
        n = batch_size(batch)
        none: dict[str, Terms] = {}
        for layer in found.layers:
            dtype = statistics_dtype(params[layer.weight])
            none[layer.weight] = (Dense(torch.empty(n, *layer.sizes, dtype=dtype, device="meta")),)
        layers = {layer.weight: layer for layer in found.layers}
        return Captured(torch.empty(n, device="meta"), layers, none, (), 0), found.way

    def tapped(found: Plan, params: Params, batch: Batch) -> tuple[Captured, list[Any]]:
        return _tapped(found, loss_fn, params, batch, options, _as_they_are, _together)

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            like, examples = pytree.tree_map(torch.empty_like, (owned, batch))
            folded, _, found = _retried(found, draws([]), lambda found: tapped(found, like, examples))
    except RuntimeError:  # values are looked at, which torch says in several ways
        leaves = pytree.tree_leaves((owned, batch))
        with undrawn(leaves):
            folded, _, found = _retried(found, draws(leaves), lambda found: tapped(found, owned, batch))
    return _whole(folded), found.way


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


def unmapped(error: RuntimeError) -> bool:
    """Whether an error of a loss says that `vmap` cannot run it."""
    return _of_vmap(error) or any(said in str(error) for said in UNMAPPED)


def _of_vmap(error: RuntimeError) -> bool:
    return str(error).lower().startswith("vmap")


def _retried(
    found: Plan, before: Draws, tapped: Callable[[Plan], tuple[Captured, list[Any]]]
) -> tuple[Captured, list[Any], Plan]:
    """A tapped run, tried in another way where `vmap` cannot run a function of the loss; and the plan that was run."""
    try:
        return *tapped(found), found
    except RuntimeError as error:
        if found.way in (Way.BATCHED, Way.LOOPED):
            raise
        if _of_vmap(error) and found.way is Way.SUMMED:
            found = found._replace(way=Way.EACH, open=False)
        elif unmapped(error) or isinstance(error, Copied):
            found = found._replace(way=Way.LOOPED, open=False, fills=False, draws=False)
        else:
            raise
    before.repeat()
    return _retried(found, before, tapped)


WAYS = {"SUMMED": summed, "EACH": each, "LOOPED": looped, "BATCHED": batched}  # by name, for Dynamo hashes no enum


def _tapped(
    found: Plan, loss_fn: LossFn | LossAuxFn, params: Params, batch: Batch, options: Options, begin: Begin, add: Add
) -> tuple[Captured, list[Any]]:
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
    probed, calls, ways = tapped_loss(found, loss_fn, params.keys(), options)
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
    return Captured(losses.to(statistics_dtype(losses)), layers, kept, aux, bytes_each), ways[0]


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
    of_params, (of_example, tree) = specs(params, batch)
    devices = {p.device.type for p in params.values()}  # on which autocast decides the dtypes of the outputs
    return (
        getattr(loss_fn, "__func__", None),
        tuple(of_params.items()),
        tuple(of_example),
        repr(tree),
        tuple(options.rules.items()),
        options.has_aux,
        options.batched,
        *(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in sorted(devices)),
    )
