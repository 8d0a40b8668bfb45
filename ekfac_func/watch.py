"""One run of a loss, on tensors without values where it looks at none: what it does with its parameters."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from . import expansions, views
from .aliases import LOOKUPS, called, of_table
from .batching import COPIED, DATA, OPEN
from .checks import check_loss
from .copies import Copies
from .draws import undrawn
from .graphs import IN_GRAPHS
from .indexing import entries_of, is_mask
from .layout import Flat, Observed, Spec, Use, filled, fits, lay_out, spec
from .made import Made
from .modes import depth, innermost, share
from .picked import READS, Picked, has_tensors
from .refusals import Changed, buffers_kept, mutation, refuse, refuse_changed, refuse_checkpoint
from .rules import Rules, readings
from .tap import Tap, assigned, beneath, output_of, traced, unchecked, unfused
from .types import Batch, Params
from .views import View


class SecondOrder(Exception):
    """The loss calls `torch.autograd.grad`."""


class WithoutContext(Exception):
    """The loss calls an `autograd.Function` whose forward takes ctx, which `torch.func` does not take."""


class ChangesData(Exception):
    """The loss moves or casts a module, which sets `.data`, as `torch.func` does not allow."""


REQUIRES_GRAD, GRAD_FN = (getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn"))
ASKS = frozenset({Tensor.register_hook, REQUIRES_GRAD, GRAD_FN})
"""Functions by which a loss asks whether a tensor is differentiated, or reads its gradient."""

SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]

CUTS = frozenset({Tensor.detach_, torch.detach_, Tensor.register_hook})
"""Functions that change the derivative of a tensor in place, as `.data` does; a compiled step has none of them."""

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)


class Trial(NamedTuple):
    """A run of a loss: what is run, and how."""

    loss_fn: Callable[[Params, Any], Any]
    param_specs: Mapping[str, Spec]
    example: Flat
    rules: Rules
    has_aux: bool
    values: tuple[Params, Batch] | None  # parameters and a batch; None of a loss that is for a graph
    told: bool = True  # the loss is told that it is traced
    n: int | None = None  # how many examples a batched loss gets; None of a loss of one example
    skip: Mapping[int, str] = {}  # calls not to treat as a layer's, and why
    picking: Collection[int] = ()  # lookups that are along the examples
    on_values: bool = False  # for a loss that looks at them: it gets n examples of the batch
    plain: bool = False  # by autograd, not by `torch.func`

    @property
    def batched(self) -> bool:
        return self.n is not None


def run_of(trial: Trial) -> Observed:
    """Run the loss, by default on tensors without values; autograd decides which weights have a path beside calls."""
    watch, values = _Watch(trial), trial.values if trial.on_values else None
    without_values = FakeTensorMode(allow_non_fake_inputs=True) if values is None else contextlib.nullcontext()
    # random numbers are drawn again, so that the next run takes the same path
    drawn_again = undrawn(() if values is None else pytree.tree_leaves(values))
    with drawn_again, without_values, watch.picked if trial.batched else contextlib.nullcontext():
        params = filled(dict(trial.param_specs)) if values is None else values[0]
        _differentiate(functools.partial(_watched, trial, watch), params, trial.plain)
    found = watch.found
    if not found.reached and not watch.reached_uses and values is None:
        raise ValueError(
            "loss_fn returned a loss that does not depend on params, as autograd sees it: its gradient would be zero. "
            "Compute it from the tensors of params, as functional_call(net, params, ...) does, without detach() and "
            "torch.no_grad() in between"
        )
    found.uses = _differentiated(found.uses, watch.reached_uses)
    found.picked, found.asked, found.lookups = watch.picked.calls, watch.picked.asked, watch.picked.lookups
    found.filled, found.drawn = watch.made.filled, watch.made.drawn
    if trial.values is None and found.functions:  # whose backward Dynamo leaves out where it meets no tapped output
        found.cuts = min(found.functions)
    return found


def _watched(trial: Trial, watch: _Watch, params: Params, zero: Tensor) -> Tensor:
    """The loss under a watch, which notes what it may not do or raises an error of it."""
    marked = watch.begin(params, zero)
    given = _examples(trial)  # made here, or a change in place would be one of a captured tensor
    watch.picked.given(given)
    versions = [(leaf, leaf._version) for leaf in pytree.tree_leaves(given)]
    try:
        checks = contextlib.nullcontext() if trial.on_values else unchecked()
        kept = buffers_kept(trial.batched)
        with traced(trial.told), unfused(), checks, kept, _unlogged(), beneath(Tap(watch.handle)):
            loss = trial.loss_fn(marked, given)
        watch.picked.over = True
    except Exception as error:
        _raise_if_known(error, trial.plain)
        error.add_note(_called_on(given, trial.n))
        raise
    if watch.mutations:
        raise watch.mutations[0]
    loss = check_loss(loss, trial.has_aux, trial.n)[0]
    refuse_changed(watch.given, watch.inputs, versions)
    if watch.copies.changed():
        raise DataDependentOutputException(torch.ops.aten.select.int)  # a view, which can be changed in place
    watch.found.functions |= _custom_functions(loss)
    return loss.sum() if trial.batched else loss


def _examples(trial: Trial) -> Any:
    """What a run of the loss is given: one example or n of them, on values those of the batch, repeated."""
    n = trial.n
    if not trial.on_values:
        return filled(pytree.tree_unflatten(*trial.example), () if n is None else (n,))
    assert n is not None
    assert trial.values is not None
    batch = trial.values[1]
    return pytree.tree_map(lambda leaf: leaf.repeat(n // leaf.shape[0], *[1] * (leaf.dim() - 1)), batch)


def _differentiate(loss: Callable[[Params, Tensor], Tensor], params: Params, plain: bool) -> None:
    """Differentiate the loss, by autograd if plain, else by `torch.func`: `_Mark` notes what a gradient reaches."""
    with torch.autograd.set_detect_anomaly(False):  # which would look for NaN in tensors without values
        if not plain:
            torch.func.grad(loss, argnums=(0, 1))(params, torch.zeros(()))
            return
        leaves = {name: p.requires_grad_(p.is_floating_point()) for name, p in params.items()}
        zero = torch.zeros((), requires_grad=True)
        with torch.enable_grad():
            value = loss(leaves, zero)
        torch.autograd.grad(value, [p for p in (*leaves.values(), zero) if p.requires_grad], allow_unused=True)


def _raise_if_known(error: Exception, plain: bool) -> None:
    """Where an error of torch's says something known about the loss, raise that in its place."""
    # torch.cond and scan under `grad`, and torch.tensor([x[0], x[1]])
    higher_order = isinstance(error, KeyError) and any(isinstance(key, TransformType) for key in error.args)
    if higher_order or "its data is not allocated yet" in str(error):
        raise DataDependentOutputException(torch.ops.aten._local_scalar_dense.default) from error
    if not isinstance(error, RuntimeError):
        return
    refuse_checkpoint(error)
    if "inference tensor" in str(error):
        raise RuntimeError(
            "loss_fn uses a tensor made in torch.inference_mode, which no transform takes: make it in torch.no_grad"
        ) from error
    if "setup_context" in str(error) and not plain:  # else by a transform of the loss's own
        raise WithoutContext from error
    if "mutating directly with `.data`" in str(error):
        raise ChangesData from error


def _called_on(given: Any, n: int | None) -> str:
    """The shapes that the loss was given, as a note to its error."""
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(given)]
    if n is None:
        return f"loss_fn was called on one example, whose tensors have the shapes {shapes}"
    return (
        f"loss_fn was called on a batch of {n}, whose tensors have the shapes {shapes}: with batched=True it is "
        "run on other numbers of examples than the batch has, to see which axes are theirs"
    )


OWN = ("_Mark", "GeneratedBackwardFor_")  # Python's nodes of this module, and of operators


def _custom_functions(loss: Tensor) -> set[str]:
    """The names of the `autograd.Function`s of the loss's own."""
    found, seen, todo = set[str](), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = type(node).__name__
        if isinstance(node, torch.autograd.function.BackwardCFunction) and not name.startswith(OWN):
            found.add(name.removesuffix("GeneratedBackward").removesuffix("Backward"))
        todo += [before for before, _ in node.next_functions]
    return found


def _differentiated(uses: list[Use], reached: set[int]) -> list[Use]:
    """Without the calls that no gradient reaches, as under `torch.no_grad`, of weights that have other calls."""
    weights = {uses[k].weight for k in reached}
    return [use for k, use in enumerate(uses) if k in reached or use.weight not in weights]


def _unlogged() -> contextlib.AbstractContextManager[None]:
    """Without the log of tensors without values: it repeats errors that are raised anyway."""
    return assigned(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True)


class _Watch:
    """Watches one run of a loss: what it does with its parameters, call by call."""

    def __init__(self, trial: Trial) -> None:
        self.rules, self.batched, self.skip, self.plain = trial.rules, trial.batched, trial.skip, trial.plain
        self.without_values = not trial.on_values
        self.by_masks = not self.batched and trial.values is not None  # a graph cannot hold what a mask picks
        self.found = Observed()
        self.given: list[tuple[str, Tensor, int]] = []  # parameters, with the versions that they had
        self.inputs: list[tuple[str, Tensor, int]] = []  # of the uses, likewise
        self.picked, self.made = Picked(trial.picking), Made()
        self.gathered: list[views.Gathered] = []
        self.reached_uses: set[int] = set()  # by their places in `found.uses`
        self.mutations: list[Changed] = []
        self.copies = Copies()
        self.counted = 0  # calls of functions that have a rule

    def begin(self, params: Params, zero: Tensor) -> Params:
        """Parameters for the loss, marked to notice gradients; called within the transform that differentiates."""
        self.level = depth()
        self.params = {name: _Mark.apply(p, name, self.found.reached) for name, p in params.items()}
        self.zero = zero
        # by the id of a tensor, which is held so that no id is reused, and its version: a changed copy is no view
        self.known = {id(p): (p, p._version, views.whole(name, p.shape)) for name, p in self.params.items()}
        self.given = [(name, p, p._version) for name, p in self.params.items()]
        return self.params

    def handle(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a call of a torch function."""
        return self.noted(func, args, kwargs) if self.batched else self.made.call(self.noted, func, args, kwargs)

    def before_call(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note what a call says about the loss, before it runs."""
        inner = self.inner()
        refuse(func, args, kwargs, self.params, self.batched)
        if self.without_values and func in READS:  # where a fake tensor has nothing, and says so in other words
            raise DataDependentOutputException(func)
        if self.without_values and func == SET_DATA and not isinstance(innermost(args[0]), FakeTensor):
            raise ChangesData  # a module of the caller's would be left without values
        self.picked.enter(func, args)
        self.copies.begins(func, args)
        if args and (func in CUTS or func == DATA) and args[0].requires_grad:
            self.found.cuts = ".data" if func == DATA else called(func)
        if func in ASKS:
            asked = self.view_of(args[0])
            self.found.asked_of.add("" if asked is None else asked.name)
            if asked is not None and func is Tensor.register_hook:  # which a tapped one, a constant, cannot have
                self.found.reached.add(asked.name)
        if func is torch.autograd.grad and _differentiates(self.level, *args, **kwargs):
            raise SecondOrder
        if inner and not self.batched and func is Tensor.__setitem__ and has_tensors(args[1]):
            # a `vmap` within another misplaces what is written
            raise DataDependentOutputException(torch.ops.aten.index_put.default)
        if inner and self.by_masks and func == DATA:
            # of what the transform computed it cuts that transform's derivative alone, as no function under `vmap` does
            raise DataDependentOutputException(torch.ops.aten.detach.default)
        self.found.nested |= (func in OPEN or func in IN_GRAPHS) and inner

    def inner(self) -> bool:
        """Whether a transform of the loss's own is under way."""
        return depth() != self.level

    def noted(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a call, and note which parameters it uses, and how."""
        # in a batch rows in another order would be taken for other examples'
        if func in LOOKUPS and not self.batched and F.embedding in self.rules:
            func, args, kwargs = of_table(func, args, kwargs, self.params.values())
        self.before_call(func, args, kwargs)
        output = output_of(self, func, args, kwargs, self.batched)
        if func in expansions.FOR_VMAP:  # not all the calls of its expansion are handed over
            self.note(func, (args, kwargs))
        return output

    def view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a function of `views.VIEWS`; what it shows of a parameter is known from then on."""
        output = func(*(at_constant_masks(func, args) if self.by_masks else args), **kwargs)
        if func in views.MAY_COPY and args:
            self.found.shared.append(share(output, args[0]))
        if not self.follow(func, args, output):
            self.note(func, args[:1])
        return output

    def layer(self, at: int, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a function that has a rule."""
        # inside a transform of the user's own the output of a call is not all that the loss sees of it
        apart = at in self.skip or self.inner()
        output = NotImplemented if apart else self.use(at, func, args, kwargs)
        return self.other(func, args, kwargs, self.skip.get(at, "")) if output is NotImplemented else output

    def other(self, func: Any, args: Any, kwargs: Any, why: str = "") -> Any:
        """The output of a call that is no layer's, and why, where a rule would have read it."""
        self.note(func, (args, kwargs), why)
        output = self.call(func, args, kwargs)
        if func in COPIED and args and not self.batched:
            self.copies.add(output, args[0])
        if func == DATA:  # the same memory, with a version of its own
            of = [name for name, p in self.params.items() if share(output, p)]
            self.given.extend((name, output, output._version) for name in of)
            if not (of or self.batched):
                self.copies.add(output, output)
        return output

    def use(self, at: int, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a call that a rule reads as a layer, which is noted; NotImplemented of any other."""
        for reading, call in enumerate(readings(self.rules, func, args, kwargs)):
            view = self.view_of(call.weight)
            laid = None if view is None else lay_out(call, view)
            if view is None or laid is None:
                continue
            if any(_has_twice((args, kwargs), call.input, p) for p in (call.weight, call.bias) if p is not None):
                continue  # its own input or addend, a path of its own
            bias = None if call.bias is None else self.view_of(call.bias)
            if bias is not None and not fits(bias, laid[1]):
                bias = None
            args, kwargs = without_gradient((args, kwargs), call.weight, None if bias is None else call.bias)
            self.note(func, (args, kwargs))
            self.picked.enter_layer(at)
            output = self.call(func, args, kwargs)
            self.picked.leave_layer()
            leaves = pytree.tree_leaves((views.with_ids(call, self.gathered, view.name) if view.by_ids else call).input)
            self.found.uses.append(
                Use(
                    at,
                    reading,
                    view.name,
                    None if bias is None else bias.name,
                    called(func),
                    call.table,
                    *laid,
                    view.by_ids,
                    call.mixes,
                    spec(output, output.shape),
                    tuple(spec(x, x.shape) for x in leaves),
                )
            )
            if torch.is_grad_enabled():  # else no gradient needs them
                self.inputs.extend((view.name, x, x._version) for x in leaves)
            return output + _Mark.apply(self.zero, len(self.found.uses) - 1, self.reached_uses).to(output)
        return NotImplemented

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of a function. Where it changes a tensor from outside of the loss, the error is noted for later.

        Later, for a BatchNorm counts its batches in place before it is seen to use their statistics, the clearer error.
        """
        if self.without_values:
            func = CHECKS.get(func, func)
        for out in pytree.tree_leaves(kwargs.get("out")):
            # torch refuses a captured tensor that is changed in place, but not as an output; autograd marks none
            if not self.plain and isinstance(out, Tensor) and torch._C._functorch.maybe_get_level(out) < self.level:
                raise mutation(func, out, self.batched)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "mutate a captured Tensor" not in str(error):
                raise
            new = mutation(func, args[0], self.batched)
            new.__cause__ = error
            self.mutations.append(new)
            return args[0]

    def view_of(self, tensor: Any) -> View | None:
        """The view of a parameter that a tensor is; None if it is none, or a constant."""
        _, version, view = self.known.get(id(tensor), (None, 0, None))
        if view is None or tensor._version != version:
            return None
        return view if tensor.requires_grad and tensor.is_floating_point() else None  # not so of a whole number

    def follow(self, func: Any, args: Any, made: Any) -> bool:
        """Remember the views that a function made of a view; False where one of them cannot be followed."""
        view = self.view_of(args[0]) if args else None
        if view is None:
            return True
        if not torch.is_grad_enabled():  # a constant
            return False
        parts = [made] if isinstance(made, Tensor) else list(made)
        followed = views.follow(func, args, view, made)
        for t, part in zip(parts, followed, strict=True):
            if part is not None:
                self.known[id(t)] = (t, t._version, part)
        ids = views.ids_of(func, args, self.gathered)
        self.gathered.extend(views.Gathered(t, ids, view.name) for t in parts if ids is not None)
        return None not in followed

    def note(self, func: Any, tree: Any, why: str = "") -> None:
        """Note that the parameters in a tree were given to a function that no rule reads."""
        for leaf in pytree.tree_leaves(tree):
            view = self.view_of(leaf) if isinstance(leaf, Tensor) else None
            if view is not None and not _reads_shape(func):
                self.found.hidden_by.setdefault(view.name, {})[f"{called(func)} {why}".strip()] = None


def _shown(tensor: Tensor, spec: str) -> str:
    """What a tensor looks like in a message of an error that is not raised."""
    return "..."


def _true(tensor: Tensor) -> Tensor:
    """An assertion of the loss, which holds."""
    return torch.tensor(True)  # whose value is known on tensors without values too


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """`F.one_hot` without a look at the labels, as torch's own takes within `torch.func.grad`."""
    if num_classes < 0:  # as many as the largest
        raise DataDependentOutputException(torch.ops.aten.one_hot.default)
    return (tensor[..., None] == torch.arange(num_classes, device=tensor.device)).long()


CHECKS: dict[Any, Callable[..., Any]] = {
    F.one_hot: _one_hot,
    Tensor.__format__: _shown,
    **dict.fromkeys((torch._is_all_true, Tensor._is_all_true), _true),
}
"""For functions that look at values to check them, what they are on tensors without values."""


def at_constant_masks(func: Any, args: Sequence[Any]) -> Sequence[Any]:
    """The arguments of `x[mask]`; a mask that the loss closes over is replaced by its ids, whose number is known."""
    if func is not Tensor.__getitem__:
        return args
    index: list[Any] = []
    for entry in entries_of(args[1]):
        if is_mask(entry) and not isinstance(innermost(entry), FakeTensor):
            with unset_fake_temporarily():
                index += entry.nonzero(as_tuple=True)
        else:
            index.append(entry)
    return args[0], tuple(index)


def without_gradient(tree: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """The arguments of a call, with these detached."""
    held = (weight,) if bias is None else (weight, bias)
    return pytree.tree_map(lambda leaf: leaf.detach() if any(leaf is p for p in held) else leaf, tree)


def _has_twice(given: Any, inputs: Any, p: Tensor) -> bool:
    """Whether a call is given its weight or bias a second time, in another role."""
    return any(x is p for x in pytree.tree_leaves(inputs)) or sum(x is p for x in pytree.tree_leaves(given)) > 1


class _Mark(torch.autograd.Function):
    """The identity, which notes the name of a parameter, or the place of a use, that a gradient reaches."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, name: str | int, reached: set[str | int]) -> Tensor:
        return p.view_as(p)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.name, ctx.reached = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.reached.add(ctx.name)
        return gradients[0], None, None


SHAPES = frozenset(
    {
        *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, torch.numel),
        *(Tensor.stride, Tensor.storage_offset, Tensor.is_contiguous, Tensor.is_pinned, Tensor.get_device),
        *(Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed),
        *(torch.is_floating_point, torch.is_complex, torch.is_signed, Tensor.detach),
    }
)
"""Functions that, as reading an attribute does, ask for the shape of a tensor and the like, or detach it."""


def _reads_shape(func: Any) -> bool:
    """Whether a function reads the shape of a tensor or the like, and not its values."""
    return getattr(func, "__name__", "") == "__get__" or func in SHAPES


def _differentiates(level: int, outputs: Any, *_: Any, **__: Any) -> bool:
    """Whether a `torch.autograd.grad` differentiates what the loss computes itself, not in a transform within it."""
    return any(torch._C._functorch.maybe_get_level(leaf) <= level for leaf in pytree.tree_leaves(outputs))
