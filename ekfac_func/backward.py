"""Ways to the output gradients of the tapped calls: within a pass that frees its graph, or by `torch.func`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .arrivals import Arrivals
from .draws import draws
from .modes import past_vmap, transformed
from .types import Batch, Params


class Run(NamedTuple):
    """What a run of the loss under the tap gives beside gradients."""

    losses: Tensor
    aux: Any
    inputs: list[Any]  # of the tapped calls


Probe = Callable[[int, Tensor], Tensor]
"""(call, its output) -> the output, whose gradient is wanted"""

Probed = Callable[..., tuple[Tensor, Run]]
Part = tuple[Params, Run]  # per-example gradients of the free parameters, [n ...], and the run


def _for_each(tree: Any, n: int) -> Any:
    """Every tensor of a tree repeated for each example, `[n ...]`, without a copy."""
    return pytree.tree_map(lambda t: t.expand(n, *t.shape), tree)


class _Tap(torch.autograd.Function):
    """The identity; its backward hands over the gradient of its output.

    start: a tensor that requires a gradient, so that the output does too.
    """

    @staticmethod
    def forward(ctx: Any, start: Tensor, output: Tensor, k: int, arrived: Callable[[int, Tensor], None]) -> Tensor:
        ctx.k, ctx.arrived = k, arrived
        return output.data  # neither a view, which could not be changed in place, nor a copy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None]:
        ctx.arrived(ctx.k, gradients[0])
        return None, gradients[0], None, None


class StalePlan(RuntimeError):
    """The loss called other layers than discovery saw, or than for other examples."""


class Copied(StalePlan):
    """`vmap` made a copy where the loss has a view, and the copy or its source was changed in place."""


class _Marks(torch.autograd.Function):
    """The identity on the parameters of tapped calls; raises if a gradient reaches one, past those calls.

    start: a tensor that is differentiated, so that backward runs at all.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(start: Tensor, names: tuple[str, ...], *params: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.view_as(p) for p in params)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        ctx.names = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> None:
        name = next(name for name, g in zip(ctx.names, gradients, strict=True) if g is not None)
        raise StalePlan(
            f"params[{name!r}] has a path to the loss beside the calls that discovery saw: let the loss use it alike "
            "whatever device, mode or values it meets"
        )


def _marked(starts: list[Tensor], fixed: Params) -> Params:
    """The parameters of tapped calls for the loss; in a graph without `_Marks`, for there the path is fixed."""
    if torch.compiler.is_compiling() or not (starts and fixed):
        return fixed
    return dict(zip(fixed, _Marks.apply(starts[0], tuple(fixed), *fixed.values()), strict=True))


def _freed(
    f: Callable[[Tensor, Params, Batch], tuple[Tensor, Run]],
    free: Params,
    examples: Batch,
    begin: Callable[[list[Any]], None],
) -> tuple[Params, Run]:
    """The gradient of `f(start, free, examples)` w.r.t. free, of a start for taps, in a pass that frees its graph.

    One of `torch.func` can be differentiated again: it keeps every activation, and what the backward pass made of it,
    to the end.
    """
    with torch.enable_grad():
        leaves, tree = pytree.tree_flatten((torch.zeros(()), free))
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        start, free = pytree.tree_unflatten(leaves, tree)
        value, run = f(start, free, _detached(examples))
        run = _detached(run)
        begin(run.inputs)
        if value.requires_grad:
            gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
        else:
            gradients = tuple(map(torch.zeros_like, leaves))
    return pytree.tree_unflatten(gradients, tree)[1], run


def _taps(arrived: Callable[[int, Tensor], None], start: Tensor) -> Probe:
    """A probe for plain autograd: `arrived(call, gradient)` is called for each output in the backward pass."""

    def tap(k: int, output: Tensor) -> Tensor:
        tapped: Tensor = _Tap.apply(start, output, k, arrived)
        return tapped

    return tap


def _batched_taps(arrived: Callable[[int, Tensor], None], start: Tensor, n: int) -> Probe:
    """The same inside one `vmap`, on the whole batch that it maps over: through `torch.func` it takes far longer."""
    tap = _taps(arrived, start)
    return lambda k, output: past_vmap(functools.partial(tap, k), output, n)


def _adds(probes: list[Tensor]) -> Probe:
    """A probe for `torch.func`: adds zeros to the outputs, to differentiate with respect to."""
    return lambda k, output: output + probes[k]


def summed(probed: Probed, arrivals: Arrivals, fixed: Params, free: Params, examples: Batch, randomness: str) -> Part:
    """The gradient of the sum of the losses: of each example w.r.t. its own outputs and copies."""

    def total(
        probe_at: Callable[[Any], Probe], fixed: Params, at: Any, free: Params, examples: Batch
    ) -> tuple[Tensor, Run]:
        def of_one(at: Any, free: Params, example: Any) -> tuple[Tensor, Run]:
            return probed(probe_at(at), fixed, free, example)

        losses, run = torch.func.vmap(of_one, randomness=randomness)(at, free, examples)
        return losses.sum(), run

    def of_taps(start: Tensor, free: Params, examples: Batch) -> tuple[Tensor, Run]:
        tap = _batched_taps(arrivals.arrived, start, arrivals.n)
        return total(lambda _: tap, _marked([start], fixed), [], free, examples)

    def of_probes(probes: list[Tensor], free: Params, examples: Batch) -> tuple[Tensor, Run]:
        return total(_adds, _marked(probes, fixed), probes, free, examples)

    own = _for_each(free, arrivals.n)
    if not transformed():
        return _freed(of_taps, own, examples, arrivals.start)
    of_f: Callable[..., Any] = torch.func.grad(of_probes, argnums=(0, 1), has_aux=True)
    (outputs, dense), run = of_f(_for_each(arrivals.probes(), arrivals.n), own, examples)
    arrivals.deliver(run.inputs, outputs)
    return dense, run


def _of_each(losses: Tensor, free: Params, n: int) -> Params:
    """The gradients of the losses `[n]`, by a backward pass for each; a `vmap` over them would be no plain autograd."""
    wanted = list(free.values())
    if len(wanted) == 0 or not losses.requires_grad:
        return {name: p.new_zeros(n, *p.shape) for name, p in free.items()}
    rows = [torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True) for loss in losses]
    return {name: torch.stack(each) for name, each in zip(free, zip(*rows, strict=True), strict=True)}


def _detached(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.detach, tree)


def _of_one(probed: Probed, fixed: Params) -> Callable[..., Any]:
    """By `torch.func`: `(probes, free, example) -> (gradients w.r.t. probes and free), run`."""

    def at_zeros(probes: list[Tensor], free: Params, example: Any) -> tuple[Tensor, Run]:
        return probed(_adds(probes), _marked(probes, fixed), free, example)

    differentiated: Callable[..., Any] = torch.func.grad(at_zeros, argnums=(0, 1), has_aux=True)
    return differentiated


def each(probed: Probed, arrivals: Arrivals, fixed: Params, free: Params, examples: Batch, randomness: str) -> Part:
    """`vmap(grad)` as it is."""
    own = _for_each((arrivals.probes(), free), arrivals.n)
    (outputs, dense), run = torch.func.vmap(_of_one(probed, fixed), randomness=randomness)(*own, examples)
    arrivals.deliver(run.inputs, outputs)
    return dense, run


def looped(probed: Probed, arrivals: Arrivals, fixed: Params, free: Params, examples: Batch, randomness: str) -> Part:
    """One example after another, without `vmap`."""

    def of_taps(outputs: list[Tensor], start: Tensor, free: Params, example: Any) -> tuple[Tensor, Run]:
        return probed(_taps(outputs.__setitem__, start), _marked([start], fixed), free, example)

    leaves = pytree.tree_leaves((free, examples))
    before = None if randomness == "different" else draws(leaves)
    parts = []
    for k in range(arrivals.n):
        if before is not None and randomness == "same":
            before.repeat()
        # a copy, for discovery may not have seen whether the loss changes it in place
        example = pytree.tree_map(lambda leaf, k=k: leaf[k].clone(), examples)
        outputs = arrivals.probes()
        if transformed():  # by the caller, as by `vmap` over dampings
            (outputs, dense), run = _of_one(probed, fixed)(outputs, free, example)
        else:
            dense, run = _freed(functools.partial(of_taps, outputs), free, example, lambda inputs: None)
        parts.append((outputs, dense, run))
    if before is not None and randomness == "error" and before.followed(leaves):
        raise RuntimeError(
            "loss_fn draws random numbers, which randomness='error' refuses: give 'same' or 'different', or draw "
            "before the call"
        )
    outputs, dense, run = pytree.tree_map(lambda *t: torch.stack(t), *parts)
    arrivals.deliver(run.inputs, outputs)
    return dense, run


def batched(probed: Probed, arrivals: Arrivals, fixed: Params, free: Params, batch: Batch, randomness: str) -> Part:
    """The batch as it is; a parameter without a rule takes a backward pass an example."""
    n = arrivals.n
    dense: Params = {}

    def of_taps(start: Tensor, free: Params, batch: Batch) -> tuple[Tensor, Run]:
        losses, run = probed(_taps(arrivals.arrived, start), _marked([start], fixed), free, batch, n)
        dense.update(_of_each(losses, free, n))
        return losses.sum(), run

    if not transformed():
        _, run = _freed(of_taps, free, batch, arrivals.start)
        return dense, run

    def of_probes(probes: list[Tensor], free: Params) -> tuple[Tensor, Run]:
        return probed(_adds(probes), _marked(probes, fixed), free, batch, n)

    pulled: Any = torch.func.vjp(of_probes, arrivals.probes(), free, has_aux=True)
    losses, pull, run = pulled
    outputs = pull(torch.ones_like(losses))[0]
    if len(free) > 0:  # of the same forward pass, for a second one would draw other random numbers
        dense = torch.func.vmap(lambda row: pull(row)[1])(torch.eye(n, dtype=losses.dtype, device=losses.device))
    arrivals.deliver(run.inputs, outputs)
    return dense, run
