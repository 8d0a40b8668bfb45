"""Per-example gradients of any function of a dict of tensors, without hooks.

A layer's weight is not differentiated: its calls are tapped, a zero probe is added to each output, and the gradient
w.r.t. the probes is the per-example output gradient. Parameters that no rule explains on every path to the loss are
differentiated as they are, one copy an example, in the same pass. Since no example's loss sees another's probes or
copies, this is `vmap(grad)`, written as the gradient of `vmap(loss)`'s sum: the backward pass then runs on whole
batches, outside `vmap`.
"""

import functools
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .batching import OPEN, OPEN_LAYERS
from .rules import Call, Rules
from .types import Batch, Dense, Factored, Layer, LossFn, Params, Term


class Captured(NamedTuple):
    """One batch as every later stage sees it."""

    losses: Tensor  # [n]
    layers: dict[str, Layer]  # by the name of the weight, in the order of params
    terms: dict[str, Term]


class Spec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Plan(NamedTuple):
    """Which parameters are layers, and the calls to tap in the order of the loss. Constants only."""

    layers: tuple[Layer, ...]
    calls: tuple[tuple[str, Spec], ...]  # weight, output of one example
    second_order: bool  # the loss calls torch.autograd.grad, which vmap would hide from the gradient around it
    open: bool  # no loss of `batching.OPEN` stands inside a transform of the user's own
    looped: bool = False  # vmap has no rule for a function of the loss, such as a recurrent net


def capture(
    loss_fn: LossFn,
    params: Mapping[str, Tensor],
    batch: Batch,
    rules: Rules,
    randomness: str = "different",
    chunk_size: int | None = None,
) -> Captured:
    """Per-example losses and gradient terms of `loss_fn(params, example)` over the leading axis of `batch`."""
    params = {name: p.detach() for name, p in params.items()}  # one object a name, even where tensors are shared
    if torch.compiler.is_compiling():
        found = _plan(loss_fn, params, batch, rules)
        return _tapped(found, loss_fn, params, batch, rules, randomness, chunk_size)[0]
    plans, key = _memo(loss_fn), _key(loss_fn, params, batch, rules)
    if key in plans:
        found, expected = plans[key]
        try:
            captured, seen = _tapped(found, loss_fn, params, batch, rules, randomness, chunk_size)
        except RuntimeError:  # a stale plan, or what discovery says better
            seen = None
        if seen == expected:
            return captured
    # the first call with these shapes, or the loss took another way through the program than last time
    found = _plan(loss_fn, params, batch, rules)
    try:
        captured, seen = _tapped(found, loss_fn, params, batch, rules, randomness, chunk_size)
    except RuntimeError as error:
        if "Batching rule not implemented" not in str(error):
            raise
        found = found._replace(looped=True)
        captured, seen = _tapped(found, loss_fn, params, batch, rules, randomness, chunk_size)
    plans[key] = found, seen
    return captured


def plan(loss_fn: LossFn, params: Mapping[str, Tensor], batch: Batch, rules: Rules) -> Plan:
    """What `capture` will tap, from shapes alone."""
    return _plan(loss_fn, {name: p.detach() for name, p in params.items()}, batch, rules)


class _SecondOrder(Exception):
    """The loss calls `torch.autograd.grad`."""


class StalePlan(RuntimeError):
    """The loss called other layers than discovery saw."""


def _tapped(
    found: Plan,
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    rules: Rules,
    randomness: str,
    chunk_size: int | None,
) -> tuple[Captured, list[Any]]:
    layers = {layer.weight: layer for layer in found.layers}
    tapped = {weight for weight, _ in found.calls}
    held = tapped | {layers[weight].bias for weight in tapped}
    fixed = {name: p for name, p in params.items() if name in held}
    free = {name: p for name, p in params.items() if name not in held}
    probes = [torch.zeros(s.shape, dtype=s.dtype, device=s.device) for _, s in found.calls]
    compiling = torch.compiler.is_compiling()
    losses_of = OPEN if compiling and found.open else {}
    layers_of = OPEN_LAYERS if compiling else {}
    calls: list[Call] = []
    seen: list[Any] = []

    def probed(probes: list[Tensor], free: Params, example: Any) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        calls.clear()
        seen.clear()

        def handle(func: Any, args: Any, kwargs: Any) -> Any:
            seen.append(func)
            _refuse_batch_statistics(func, args, kwargs, params)
            call = _read(rules, func, args, kwargs)
            name = None if call is None else _name(call.weight, fixed)
            if call is None or name is None:
                return losses_of.get(func, func)(*args, **kwargs)
            k, output = len(calls), layers_of.get(func, func)(*args, **kwargs)
            if k == len(probes) or (name, tuple(output.shape)) != (found.calls[k][0], found.calls[k][1].shape):
                raise StalePlan(
                    f"call {k} of a layer, of {name!r} with an output of shape {tuple(output.shape)}, is not the one "
                    "that discovery saw: let the loss call the same layers whatever device, mode or values it meets"
                )
            calls.append(call)
            return output + probes[k]

        with _Tap(handle):
            loss = loss_fn({name: fixed[name] if name in fixed else free[name] for name in params}, example)
        if len(calls) != len(probes):
            raise StalePlan(
                f"the loss called {len(calls)} layers where discovery saw {len(probes)}: let the loss call the same "
                "layers whatever device, mode or values it meets"
            )
        return loss, (loss, [call.input for call in calls])

    def total(probes: list[Tensor], free: Params, examples: Batch) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        losses, aux = torch.func.vmap(probed, randomness=randomness)(probes, free, examples)
        return losses.sum(), aux

    of_total: Callable[..., Any] = torch.func.grad(total, argnums=(0, 1), has_aux=True)
    of_one: Callable[..., Any] = torch.func.grad(probed, argnums=(0, 1), has_aux=True)
    of_each: Callable[..., Any] = torch.func.vmap(of_one, randomness=randomness)
    parts = []
    for examples in _chunks(batch, 1 if found.looped else chunk_size):
        n = pytree.tree_leaves(examples)[0].shape[0]
        if found.looped:
            part = of_one(probes, free, pytree.tree_map(lambda leaf: leaf[0], examples))
            parts.append(pytree.tree_map(lambda t: t[None], part))
        else:
            parts.append((of_each if found.second_order else of_total)(*_copies((probes, free), n), examples))
    (outputs, dense), (losses, inputs) = pytree.tree_map(lambda *t: torch.cat(t) if len(t) > 1 else t[0], *parts)

    terms: dict[str, Term] = {}
    for layer in found.layers:
        reads = [
            _with_bias(call, layer, call.read(x, g), params)
            for call, x, g, (weight, _) in zip(calls, inputs, outputs, found.calls, strict=True)
            if weight == layer.weight
        ]
        if reads:
            terms[layer.weight] = _concatenate(reads)
        else:
            G = dense[layer.weight]
            terms[layer.weight] = Dense(G.reshape(G.shape[0], *layer.sizes))
    return Captured(losses, layers, terms), seen


def _copies(tree: Any, n: int) -> Any:
    """Every tensor once an example, `[n, ...]`, in the memory of one."""
    return pytree.tree_map(lambda t: t.expand(n, *t.shape), tree)


def _chunks(batch: Batch, size: int | None) -> list[Batch]:
    if size is None:
        return [batch]
    leaves, tree = pytree.tree_flatten(batch)
    return [pytree.tree_unflatten(part, tree) for part in zip(*(leaf.split(size) for leaf in leaves), strict=True)]


def _with_bias(call: Call, layer: Layer, term: Factored, params: Params) -> Factored:
    """The term in the parameter's dtype (autocast), with the bias as the last input: 1 where the call added it."""
    dtype = params[layer.weight].dtype
    a, g, x = term.a.to(dtype), term.g.to(dtype), term.x
    if layer.bias is not None:
        one = a.new_full((*a.shape[:3], 1, 1), 0.0 if call.bias is None else 1.0)
        a = torch.cat([a, one], dim=3)
    return Factored(a, g, None if x is None else x.to(dtype))


def _concatenate(terms: Sequence[Factored]) -> Factored:
    """Several uses of one weight are more positions of it."""
    if len(terms) == 1:
        return terms[0]
    samples = [term.x for term in terms if term.x is not None]
    return Factored(
        torch.cat([term.a for term in terms], dim=2),
        torch.cat([term.g for term in terms], dim=2),
        torch.cat(samples, dim=2) if samples else None,
    )


def _plan(loss_fn: LossFn, params: Params, batch: Batch, rules: Rules) -> Plan:
    param_specs = {name: _spec(p, p.shape) for name, p in params.items()}
    example = (pytree.tree_map(lambda leaf: _spec(leaf, leaf.shape[1:]), batch),)  # Dynamo's constants are containers
    if isinstance(loss_fn, MethodType):  # Dynamo hands over a function and its object, not the two bound together
        return _discover(param_specs, example, rules, loss_fn.__func__, loss_fn.__self__)
    if isinstance(loss_fn, functools.partial):
        return _discover(param_specs, example, rules, loss_fn.func, *loss_fn.args, **loss_fn.keywords)
    return _discover(param_specs, example, rules, loss_fn)


@torch.compiler.assume_constant_result
def _discover(
    param_specs: dict[str, Spec],
    example: tuple[Any],
    rules: Rules,
    loss_fn: Callable[..., Tensor],
    *args: Any,
    **kwargs: Any,
) -> Plan:
    """Run the loss once on tensors without values; autograd decides which weights have a path beside their calls."""
    calls: list[tuple[str, str | None, tuple[int, int, int, int], Spec]] = []
    inputs: list[tuple[Tensor, int]] = []
    mutations: list[RuntimeError] = []
    nested: list[Any] = []
    reached: set[str] = set()

    def observed(params: Params) -> Tensor:
        marked = {name: _Mark.apply(p, name, reached) for name, p in params.items()}
        depth = _depth()

        def handle(func: Any, args: Any, kwargs: Any) -> Any:
            _refuse_batch_statistics(func, args, kwargs, marked)
            if func is torch.autograd.grad and _differentiates(depth, *args, **kwargs):
                raise _SecondOrder
            if func in OPEN and _depth() != depth:
                nested.append(func)
            call = _read(rules, func, args, kwargs)
            weight = None if call is None else _name(call.weight, marked)
            # inside a transform of the user's own the output of a call is not all that the loss sees of it
            if call is None or weight is None or _depth() != depth:
                return _unless_mutating(func, args, kwargs, mutations)
            bias = None if call.bias is None else _name(call.bias, marked)
            held = (call.weight, call.bias) if bias is not None else (call.weight,)
            args, kwargs = pytree.tree_map(
                lambda leaf: leaf.detach() if any(leaf is p for p in held) else leaf, (args, kwargs)
            )
            output = func(*args, **kwargs)
            calls.append((weight, bias, call.sizes, _spec(output, output.shape)))
            inputs.append((call.input, call.input._version))
            return output

        try:
            with _Tap(handle):
                loss = loss_fn(*args, marked, *fill(example), **kwargs)
        except RuntimeError as error:
            _refuse_checkpoint(error)
            raise
        if mutations:
            raise mutations[0]
        _check_loss(loss)
        for (weight, *_), (x, version) in zip(calls, inputs, strict=True):
            if x._version != version:
                raise RuntimeError(
                    f"the input of the layer {weight!r}, of shape {tuple(x.shape)}, was changed in place after the "
                    "call: its gradient needs the value that it had, write x = x + y in place of x += y"
                )
        return loss

    def fill(tree: Any) -> Any:
        return pytree.tree_map(
            lambda spec: torch.empty(spec.shape, dtype=spec.dtype, device=spec.device), tree, is_leaf=_is_spec
        )

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            torch.func.grad(observed)(fill(dict(param_specs)))
    except _SecondOrder:  # a derivative of a call's output w.r.t. its input is one more path to its weight
        return Plan(*_arrange(param_specs, [], reached), second_order=True, open=False)
    return Plan(*_arrange(param_specs, calls, reached), second_order=False, open=not nested)


def _arrange(
    param_specs: dict[str, Spec],
    calls: Sequence[tuple[str, str | None, tuple[int, int, int, int], Spec]],
    reached: set[str],
) -> tuple[tuple[Layer, ...], tuple[tuple[str, Spec], ...]]:
    """A weight is a layer if its calls are its only paths and agree on its axes; a bias belongs to one weight."""
    sizes: dict[str, set[tuple[int, int, int, int]]] = {}
    biases: dict[str, set[str]] = {}
    users: dict[str, set[str]] = {}
    for weight, bias, call_sizes, _ in calls:
        sizes.setdefault(weight, set()).add(call_sizes)
        if bias is not None:
            biases.setdefault(weight, set()).add(bias)
            users.setdefault(bias, set()).add(weight)
    tapped = {weight for weight in sizes if len(sizes[weight]) == 1 and weight not in reached | users.keys()}
    owned = {
        weight: bias
        for weight in tapped
        for bias in biases.get(weight, ())
        if biases[weight] == {bias} and users[bias] == {weight} and bias not in reached | sizes.keys()
    }
    layers = []
    for name, spec in param_specs.items():
        if name in tapped:
            b, o, i, k = next(iter(sizes[name]))
            layers.append(Layer(name, owned.get(name), (b, o, i + (name in owned), k)))
        elif name not in owned.values():
            layers.append(Layer(name, None, _dense_sizes(spec.shape)))
    return tuple(layers), tuple((weight, output) for weight, _, _, output in calls if weight in tapped)


def _dense_sizes(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A vector or scalar is one block an element; of a matrix or more, o is the first axis and i the rest."""
    elements = functools.reduce(lambda x, y: x * y, shape, 1)
    return (elements, 1, 1, 1) if len(shape) < 2 else (1, shape[0], elements // max(shape[0], 1), 1)


class _Tap(TorchFunctionMode):
    def __init__(self, handle: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self.handle = handle

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.handle(func, args, kwargs or {})


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


def _read(rules: Rules, func: Any, args: Any, kwargs: Any) -> Call | None:
    rule = rules.get(func)
    return None if rule is None else rule(*args, **kwargs)


def _name(tensor: Tensor, params: Mapping[str, Tensor]) -> str | None:
    for name, p in params.items():
        if tensor is p:
            return name
    return None


def _spec(tensor: Tensor, shape: Sequence[int]) -> Spec:
    return Spec(tuple(shape), tensor.dtype, tensor.device)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, Spec)


def _differentiates(depth: int, outputs: Any, *_: Any, **__: Any) -> bool:
    """Whether the outputs of a `torch.autograd.grad` are the loss's own, not of a transform within it."""
    return any(torch._C._functorch.maybe_get_level(leaf) <= depth for leaf in pytree.tree_leaves(outputs))


def _depth() -> int:
    """How many transforms are under way: functorch's, and levels of forward-mode differentiation."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return (0 if interpreter is None else interpreter.level()) + forward_ad._current_level + 1  # -1 is no level


_memos: weakref.WeakKeyDictionary[Any, dict[Any, tuple[Plan, list[Any]]]] = weakref.WeakKeyDictionary()


def _memo(loss_fn: LossFn) -> dict[Any, tuple[Plan, list[Any]]]:
    """Plans of a loss by the shapes that it met, kept as long as the loss lives."""
    try:
        return _memos.setdefault(getattr(loss_fn, "__self__", loss_fn), {})
    except TypeError:  # a callable that cannot be hashed or weakly referenced
        return {}


def _key(loss_fn: LossFn, params: Params, batch: Batch, rules: Rules) -> Any:
    leaves, tree = pytree.tree_flatten(batch)
    return (
        getattr(loss_fn, "__func__", None),
        tuple((name, _spec(p, p.shape)) for name, p in params.items()),
        tuple(_spec(leaf, leaf.shape[1:]) for leaf in leaves),
        repr(tree),
        tuple(rules.items()),
    )


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn returned a {type(loss).__name__}: return the example's loss, a 0-d tensor")
    if loss.dim() != 0:
        raise ValueError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}: return the loss of one example as a scalar, "
            "for instance with .sum() or .mean()"
        )
    if not loss.is_floating_point():
        raise TypeError(f"loss_fn returned a loss of dtype {loss.dtype}: return a real floating-point scalar")


_BATCH_NORMS = (F.batch_norm, torch.batch_norm, torch.native_batch_norm)


def _refuse_batch_statistics(func: Any, args: Any, kwargs: Any, params: Params) -> None:
    if func not in _BATCH_NORMS:
        return
    if func is F.batch_norm:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    else:
        names = ("input", "weight", "bias", "running_mean", "running_var", "training")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("training", False) or given.get("running_mean") is None:
        owned = [_name(given[key], params) for key in ("weight", "bias") if given.get(key) is not None]
        which = " and ".join(repr(name) for name in owned if name) or "no parameters"
        raise ValueError(
            f"batch_norm (with {which}, on an input of shape {tuple(given['input'].shape)}) uses the statistics of "
            "its batch, which couple the examples: a gradient per example does not exist. Call eval() on a module "
            "that tracks running statistics, or use GroupNorm"
        )


def _unless_mutating(func: Any, args: Any, kwargs: Any, mutations: list[RuntimeError]) -> Any:
    """Call func; note what it raises for changing a tensor from outside the loss.

    A BatchNorm counts its batches so, before it is seen that it uses their statistics.
    """
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        if "mutate a captured Tensor" not in str(error):
            raise
        mutations.append(error)
        return args[0]


def _refuse_checkpoint(error: RuntimeError) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.filename == torch.utils.checkpoint.__file__ for frame in frames):
        raise ValueError(
            "torch.utils.checkpoint inside loss_fn does not work under torch.func: remove it and bound the memory with "
            "chunk_size"
        ) from error
