"""One run of a loss whose calls are tapped as a plan says."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from . import expansions, views
from .aliases import LOOKUPS, of_table
from .arrivals import output_shape
from .backward import Copied, Probe, Probed, Run, StalePlan
from .batching import (
    CAST,
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
from .checks import check_loss
from .copies import Copies
from .discovery import Options, Plan, Way
from .graphs import IN_GRAPHS
from .made import own_of_each
from .modes import depth, innermost, share, transformed
from .refusals import refuse, refuse_changed
from .rules import RULES, readings
from .tap import Tap, beneath, output_of, traced, unfused
from .types import LossAuxFn, LossFn, Params
from .watch import REQUIRES_GRAD, without_gradient


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


class Replaced(NamedTuple):
    """What is called in place of torch functions."""

    anywhere: Functions
    tapped: Functions  # in calls that are tapped
    cast: Functions  # in those under autocast


def _replaced(found: Plan, batched: bool) -> Replaced:
    mapped = transformed()
    if torch.compiler.is_compiling():
        if batched:  # `found.way is Way.BATCHED` would be a guard that Dynamo cannot check
            return Replaced(OPEN_BATCHED, OPEN_BATCHED, OPEN_BATCHED)
        if found.way.name == "EACH":  # in which operators without a derivative of their own would be differentiated
            return Replaced(EXACT | MAPPED, {}, CAST)
        return Replaced(EXACT | MAPPED | (OPEN | IN_GRAPHS if found.open else {}), OPEN_LAYERS, OPEN_LAYERS | CAST)
    if batched:
        return Replaced(CAST, {}, CAST) if mapped else Replaced({}, EAGER_LAYERS, {})
    if found.way is Way.LOOPED:
        return Replaced(EXACT, EXACT, EXACT)
    if found.way is Way.EACH or mapped:  # by a `vmap` of the caller's own
        return Replaced(EXACT | MAPPED, {}, CAST)
    if not found.open:
        return Replaced(EXACT | MAPPED, EAGER_LAYERS, CAST)
    # of a convolution with a bias `vmap` makes calls that autocast does not cast, or in part
    return Replaced(EXACT | MAPPED | OPEN, EAGER_LAYERS | OF_CHANNELS, OPEN_LAYERS | CAST)


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
        self.depth = 0 if self.compiling else depth()
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

    def name_of(self, tensor: Any) -> str | None:
        """The parameter that a tensor is, or is a view of; None of any other."""
        for known, name in self.known:
            if tensor is known:
                return name
        return None

    def handle(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of any torch function."""
        if self.by_ids and func in LOOKUPS:
            if of_table(func, args, kwargs, self.free.values())[0] is not func:
                self.counted += 1  # discovery counts it as a call of F.embedding
            func, args, kwargs = of_table(func, args, kwargs, self.fixed.values())
        if not self.compiling:
            self.seen.append((func, torch.is_grad_enabled(), *_params_of((args, kwargs), self.by_id)))
        self.copies.begins(func, args)
        if not self.compiling or not self.found.open:  # in an open graph discovery has seen every call
            refuse(func, args, kwargs, self.params, self.batched)
        if self.mapping and kwargs.get("memory_format") in CHANNELS_LAST:
            kwargs = {**kwargs, "memory_format": torch.contiguous_format}
        if func == REQUIRES_GRAD and self.name_of(args[0]) is not None:  # one of a tapped call is a constant
            return True
        own_view = self.looping and func in expansions.COPIES and self.name_of(args[0]) is None
        return output_of(self, func, args, kwargs, self.as_written or own_view or func in self.replaced.anywhere)

    def _instead_of(self, func: Any) -> Any:
        """What is called in place of a function whose call is not tapped."""
        nested = not self.compiling and depth() > self.depth  # in a `vmap` of the loss's own, which casts as it does
        return func if nested and func in CAST else self.replaced.anywhere.get(func, func)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a function that has no rule and gives no view."""
        output = self._instead_of(func)(*args, **kwargs)
        if func in COPIED and func in self.replaced.anywhere and args:
            self.copies.add(output, args[0])
        return output

    def view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a function of `views.VIEWS`; what it shows of a parameter is known from then on."""
        name = self.name_of(args[0]) if len(args) > 0 else None
        if self.compiling and name is not None:
            views.fix((args[1:], kwargs))
        output = (func if name is not None else self._instead_of(func))(*args, **kwargs)
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
            return self._instead_of(func)(*args, **kwargs)
        planned, use = self.found.calls[k], self.found.calls[k].use
        reads = readings(self.rules, func, args, kwargs)
        read = reads[use.reading] if use.reading < len(reads) else None
        name = None if read is None else self.name_of(read.weight)
        bias = None if read is None or read.bias is None else self.name_of(read.bias)
        if read is not None and not self.compiling:
            args, kwargs = without_gradient((args, kwargs), read.weight, None if bias is None else read.bias)
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
                self.inputs.extend((use.weight, x, x._version) for x in leaves if not x.is_inference())
        self.calls.append(views.with_ids(read, self.gathered, use.weight) if use.by_ids else read)
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


def tapped_loss(
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
