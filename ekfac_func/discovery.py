"""Which parameters are layers, and which calls are to be tapped: found by runs of the loss without values.

A pure function of the loss, the parameters and the shapes of an example, and of values where a batched loss looks at
them.
"""

from __future__ import annotations

import contextlib
import enum
import functools
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, NamedTuple

import torch

from .checks import check_count, check_loss_fn, check_randomness
from .layout import Flat, Observed, Spec, Tapped, arrange, dense_layer, places_of, specs
from .refusals import Changed
from .rules import Rules
from .types import NO_CALL, Batch, Layer, LossAuxFn, LossFn, Params, batch_size
from .watch import DATA_DEPENDENT, ChangesData, SecondOrder, Trial, WithoutContext, run_of


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
        if isinstance(func, type) or not callable(func):
            raise TypeError(
                f"rules has {func!r}, which no call shows: give a torch function, as F.linear, that it is of"
            )
        if not callable(rule):
            raise TypeError(f"rules[{func!r}] is {rule!r}: give a function of the arguments of the call, as RULES has")
    check_randomness(randomness)
    for name, flag in (("has_aux", has_aux), ("batched", batched)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}={flag!r} is a {type(flag).__name__}: give True or False")
    if batched and randomness != "different":
        raise ValueError(
            f"randomness={randomness!r} with batched=True: the loss draws for the batch as it is written, leave it out"
        )
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
        if batched:
            raise ValueError(
                f"chunk_size={chunk_size!r} with batched=True: the chunks of a coupled batch are other batches"
            )
    return Options(rules, randomness, chunk_size, has_aux, batched)


class Way(enum.Enum):
    """How the loss is differentiated; the names are the functions of `backward.py`."""

    SUMMED = "the gradient of the sum of vmap(loss)"
    EACH = "vmap(grad): the loss calls torch.autograd.grad, asks what is differentiated, or vmap knows it only so"
    LOOPED = "one example after another: vmap cannot run the loss"
    BATCHED = "the batch as it is"


class Plan(NamedTuple):
    """What a capture taps. Constants only."""

    layers: tuple[Layer, ...]
    calls: tuple[Tapped, ...]  # in the order of the loss
    way: Way
    open: bool = False  # no function of `OPEN` or `IN_GRAPHS` is called inside a transform of the loss's own
    fills: bool = False  # the loss writes into tensors that it made: each example then needs its own
    draws: bool = False  # it fills them with random numbers: so too, if these are to differ between the examples
    shared: tuple[bool, ...] = ()  # of each call of `views.MAY_COPY`, whether it gives a view
    cuts: str = ""  # the function, if any, by which the loss changes the graph of its derivative
    told: bool = True  # the loss is told that it is traced


def plan(loss_fn: LossFn | LossAuxFn, params: Params, batch: Batch, options: Options) -> Plan:
    """What `capture` will tap, from shapes alone."""
    check_loss_fn(loss_fn)
    param_specs, example = specs(params, batch)
    how = (options.rules, options.has_aux, options.batched)
    values = None if torch.compiler.is_compiling() else (params, batch)
    if isinstance(loss_fn, MethodType):  # Dynamo hands over a function and its object, not the two bound together
        return _discover(param_specs, example, how, values, loss_fn.__func__, loss_fn.__self__)
    if isinstance(loss_fn, functools.partial):
        return _discover(param_specs, example, how, values, loss_fn.func, *loss_fn.args, **loss_fn.keywords)
    return _discover(param_specs, example, how, values, loss_fn)


def as_known(found: Plan, known: tuple[Layer, ...]) -> Plan:
    """The plan with layers as earlier calls have shown them, where no call of this batch uses them."""
    uncalled = {layer.weight for layer in found.layers if layer.hidden_by == NO_CALL}
    shown = {
        layer.weight: layer._replace(hidden_by=NO_CALL)
        for layer in known
        if layer.rule is not None and {layer.weight, layer.bias} - {None} <= uncalled
    }
    biases = {layer.bias for layer in shown.values()}
    layers = (shown.get(layer.weight, layer) for layer in found.layers if layer.weight not in biases)
    return found._replace(layers=tuple(layers))


@torch.compiler.assume_constant_result
def _discover(
    param_specs: dict[str, Spec],
    example: Flat,
    how: tuple[Rules, bool, bool],
    values: tuple[Params, Batch] | None,
    loss_fn: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Plan:
    rules, has_aux, batched = how
    loss = functools.partial(loss_fn, *args, **kwargs)

    def discovered(told: bool) -> Plan:
        trial = Trial(loss, param_specs, example, rules, has_aux, values, told)
        try:
            found = _of_batched(trial) if batched else _of_examples(trial)
        except SecondOrder:  # a derivative of a call's output w.r.t. its input is one more path to its weight
            if batched and values is None:
                raise ValueError(
                    "loss_fn calls torch.autograd.grad, as torch.func.vjp, jacrev and hessian do, which a compiled "
                    "step with batched=True cannot differentiate: use torch.func.grad or jacfwd in it, or call the "
                    "step in eager mode"
                ) from None
            found = _unread(param_specs, "torch.autograd.grad", Way.BATCHED if batched else Way.EACH)
        return found._replace(told=told)

    try:
        return discovered(told=True)
    except Changed:  # another run could go on from what this one has changed
        raise
    except Exception:
        if values is not None:
            with contextlib.suppress(Exception):  # some models run only where they are not told that they are traced
                return discovered(told=False)
        raise


def _of_examples(trial: Trial) -> Plan:
    """The plan of a loss of one example."""
    param_specs, values = trial.param_specs, trial.values
    try:
        found = run_of(trial)
    except DATA_DEPENDENT:  # the loss looks at values: nothing is known of it before it runs
        return _unread(param_specs, "values that Python reads, or a view that is changed in place", Way.LOOPED)
    except ChangesData:
        return _unread(param_specs, "a module that is moved or cast", Way.LOOPED)
    except WithoutContext:
        if values is None:
            raise ValueError(WITHOUT_CONTEXT.format(" and take the batch as it is with batched=True")) from None
        shown = _of_examples(trial._replace(plain=True))
        return Plan(shown.layers, shown.calls, Way.LOOPED)
    except RuntimeError as error:
        for said, why in UNTRACEABLE.items():
            if values is not None and said in str(error):
                return _unread(param_specs, why, Way.LOOPED)
        if "meta" not in str(error):
            raise
        # forward mode of a norm, which torch computes as if tensors without values were on their device
        return _unread(param_specs, "a derivative that torch cannot take of shapes alone", Way.EACH)
    if values is None:
        _refuse_compiled(found)
    # under `vmap` an activation says that it requires a gradient within `grad` alone
    way, is_open = (Way.EACH, False) if found.asked_of else (Way.SUMMED, not found.nested)
    tapped = arrange(param_specs, found, [None] * len(found.uses))
    return Plan(*tapped, way, is_open, found.filled, found.drawn, tuple(found.shared))


WITHOUT_CONTEXT = (
    "loss_fn calls an autograd.Function whose forward takes ctx, which torch.func does not differentiate: give it a "
    "setup_context{}, or call the step in eager mode"
)
UNTRACEABLE = {
    "SparseCooTensorWithDimsAndTensorsBackward": "a sparse tensor, whose gradient torch has not of shapes",
    "(aten::set_.source_Tensor)": "a parametrization that it registers",
}
"""Parts of torch's errors for a loss of one example that runs in a loop alone, and what is then said of it."""


def _of_batched(trial: Trial, few: int = 3, more: int = 5) -> Plan:
    """The plan of a batched loss: of shapes alone, or where these are not enough by runs on the batch itself."""
    values = trial.values
    try:
        return _of_batches(trial, few, more)
    except DATA_DEPENDENT as error:
        if values is None:
            raise ValueError(
                "loss_fn with batched=True looks at values, which a compiled step does not have: compute with tensors, "
                "as by torch.where or a product with a mask, or call the step in eager mode"
            ) from error
    except ChangesData as error:
        raise ValueError(
            "loss_fn moves or casts a module, which torch.func does not let it: do it before, or leave batched out "
            "for a loop over the examples"
        ) from error
    except WithoutContext:
        if values is None:
            raise ValueError(WITHOUT_CONTEXT.format("")) from None
        return _of_batched(trial._replace(plain=True), few, more)
    except Changed:  # a run on the batch itself would change it too
        raise
    except RuntimeError:
        if values is None:
            raise
        n = batch_size(values[1])
        if (few, more) != (n, 2 * n):  # it may not take every number of examples
            return _of_batched(trial, n, 2 * n)
    # here it looks at values, or takes no tensors without them, or not within `torch.func`
    n = batch_size(values[1])
    return _of_batches(trial._replace(on_values=True, plain=True), n, 2 * n)


def _unread(param_specs: Mapping[str, Spec], why: str, way: Way) -> Plan:
    """The plan that taps nothing: no parameter has a rule."""
    return Plan(tuple(dense_layer(name, param.shape, why) for name, param in param_specs.items()), (), way)


def _of_batches(trial: Trial, few: int, more: int) -> Plan:
    """The plan of a batched loss, by runs on two batch sizes: an axis of examples grows with their number."""
    skip: dict[int, str] = {}  # calls that are differentiated as they are; without them others may be a layer's
    picking: set[int] = set()  # lookups that are along the examples

    def both() -> list[Observed]:
        return [run_of(trial._replace(n=n, skip=skip, picking=picking)) for n in (few, more)]

    one, two = both()
    counts = len(one.lookups), len(two.lookups)
    picking |= {k for k in range(max(counts)) if counts[0] != counts[1] or one.lookups[k] != two.lookups[k]}
    if picking:
        one, two = both()
    while True:
        if [use.at for use in one.uses] != [use.at for use in two.uses]:
            raise ValueError(
                "loss_fn calls other layers for another batch size or other examples: with batched=True it may not"
            )
        places = {x.at: places_of(x, y, few, more) for x, y in zip(one.uses, two.uses, strict=True)}
        given_up = {at: "" for at, place in places.items() if place is None}  # on what all examples share
        given_up |= {at: "on rows that values picked" for at in one.asked if at in one.picked | two.picked}
        given_up |= {at: "after values were read" for at, asked in one.asked.items() if asked != two.asked.get(at)}
        if not given_up:
            tapped = arrange(trial.param_specs, one, [places[use.at] for use in one.uses])
            return Plan(*tapped, Way.BATCHED, cuts=one.cuts)
        skip |= given_up
        one, two = both()


def _refuse_compiled(found: Observed) -> None:
    """Refuse, for a compiled step, what a graph would differentiate in another way than eager mode."""
    for name in sorted(found.asked_of - {""}):
        raise ValueError(
            f"loss_fn asks whether params[{name!r}] requires a gradient, to which a compiled step has another answer: "
            "decide it before the call, by what the loss closes over"
        )
    for name in sorted(found.functions):
        raise ValueError(
            f"loss_fn calls {name}, an autograd.Function, whose backward Dynamo leaves out under vmap: write it with "
            "detach(), as x + (f(x) - x).detach() for a straight-through estimator, take the batch as it is with "
            "batched=True, or call the step in eager mode"
        )
    if found.cuts:
        raise ValueError(
            f"loss_fn calls {found.cuts} on what depends on params, which a compiled step cannot: write detach(), or "
            "call the step in eager mode"
        )
