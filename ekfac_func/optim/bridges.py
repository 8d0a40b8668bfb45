"""From natural gradients to `torch.optim`."""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..checks import check_positive
from ..precondition import Damping, ekfac
from ..types import Batch, Info, Number, Params, State
from .transforms import Velocity, check_like, momentum, nesterov


def set_grads(params: nn.Module | Mapping[str, Tensor], natural: Mapping[str, Tensor]) -> None:
    """Write the natural gradient where any optimizer of `torch.optim` reads its gradient, `p.grad`.

    params: a module, or a dict of the leaf tensors that the optimizer holds. Parameters that natural lacks (frozen
        ones) get None, for an optimizer to pass over.
    natural: of `precondition`, a tree like params. After a skipped step it is zero, on which momentum still moves: test
        `info.skipped` to leave such a step out, which reads one boolean back to the host.

    ValueError where natural has a name or a shape that params has not.
    """
    named = dict(params.named_parameters()) if isinstance(params, nn.Module) else params
    check_like({name: named[name] for name in natural if name in named}, natural, "natural")
    for name, p in named.items():
        p.grad = natural[name].to(p.dtype) if name in natural else None


class EKFACOptimizer(torch.optim.Optimizer):
    """EKFAC for loops that are not functional: a `torch.optim.Optimizer` whose `step` takes the batch.

    A gradient per example cannot be had from `loss.backward()`, so that the optimizer computes the loss itself:

        def loss(model, batch):  # the mean over the batch, as before `loss.backward()`
            x, y = batch
            return F.cross_entropy(model(x), y)

        optimizer = EKFACOptimizer(model, loss, lr=0.1, damping=1e-2, basis_every=10)
        for batch in batches:
            optimizer.step(batch)

    The update is `velocity <- momentum velocity + natural + weight_decay p`, `p <- p - lr velocity`, as that of
    `torch.optim.SGD` on the natural gradient. A step whose loss or gradient is not finite changes neither parameters
    nor velocity. `p.grad` is neither read nor written; nothing is read back to the host.

    model: the module; its parameters that require gradients, in place, are those of `params`.
    loss: `(model, batch) -> scalar`, called on batches of one example, each tensor with a leading axis of 1.
    params: parameters or groups of them with lr, momentum, weight_decay and nesterov of their own, as in
        `torch.optim`; by default those of the model. What the groups leave out is frozen.
    lr, momentum, weight_decay, nesterov: the groups' defaults; lr a number or a 0-d tensor.
    damping: as in `ekfac`; the attribute may be changed from step to step.
    options: the others of `ekfac`.

    `state_dict` has the state of `ekfac`, and damping where it is a number or a tensor. After a step `info` is that of
    `precondition` and `natural` its natural gradient. `optimizer.precondition = torch.compile(optimizer.precondition)`
    compiles the expensive part.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        params: Iterable[Any] | None = None,
        *,
        lr: Number,
        damping: Number | Damping,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Any,
    ) -> None:
        check_positive("lr", lr)
        for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name}={value!r}: give a number, at least 0")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__([p for p in model.parameters() if p.requires_grad] if params is None else params, defaults)
        names = {p: name for name, p in model.named_parameters()}
        for group in self.param_groups:
            for p in group["params"]:
                if p not in names:
                    raise ValueError(
                        f"params has a tensor of shape {tuple(p.shape)} that is no parameter of model: pass "
                        "model.parameters() or some of them"
                    )
        self.names = names
        self.damping = damping
        self.ekfac_state: State | None = None
        self.natural: Params | None = None
        self.info: Info | None = None
        bound = _Bound(model, loss)

        def loss_fn(params: Params, example: Any) -> Tensor:
            given = {f"model.{name}": p for name, p in params.items()}
            return functional_call(bound, given, (pytree.tree_map(lambda leaf: leaf[None], example),))

        def precondition(
            params: Params, batch: Batch, state: State, damping: Number | Damping
        ) -> tuple[Params, State, Info]:
            return ekfac(loss_fn, damping=damping, **options).precondition(params, batch, state)

        self._init = ekfac(loss_fn, damping=damping, **options).init
        self.precondition = precondition

    @torch.no_grad()
    def step(self, batch: Batch, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on the batch, a tree of tensors with a leading axis of examples. Returns its mean loss, `[]`.

        closure: called before the step, with gradients enabled, for loops that insist on one; its result is then
            returned, and the gradients that it leaves are not used.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        params = {self.names[p]: p for group in self.param_groups for p in group["params"]}
        if self.ekfac_state is None:
            self.ekfac_state = self._init(params, batch)
        self.natural, self.ekfac_state, self.info = self.precondition(params, batch, self.ekfac_state, self.damping)
        for group in self.param_groups:
            self._update(group, self.natural, self.info)
        return self.info.loss if closure is None else result

    def _update(self, group: dict[str, Any], natural: Params, info: Info) -> None:
        params: Params = {self.names[p]: p for p in group["params"]}
        rule = (nesterov if group["nesterov"] else momentum)(group["momentum"])
        zero = rule.init(params).velocity
        old = Velocity({name: self.state[p].get("velocity", zero[name]) for name, p in params.items()})
        decayed = {name: natural[name] + group["weight_decay"] * p for name, p in params.items()}
        direction, new = rule.update(decayed, old, params, info)
        for name, p in params.items():
            self.state[p]["velocity"] = torch.where(info.skipped, old.velocity[name], new.velocity[name])
            p.copy_(torch.where(info.skipped, p, p - group["lr"] * direction[name]))

    def state_dict(self) -> dict[str, Any]:
        """That of `torch.optim.Optimizer`, with `"ekfac"` and `"damping"`; `weights_only` loads it."""
        damping = None if callable(self.damping) else self.damping
        return {**super().state_dict(), "ekfac": self.ekfac_state, "damping": damping}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, on the devices of the parameters. ValueError if it is another's."""
        for key in ("ekfac", "damping"):
            if key not in state_dict:
                raise ValueError(f"state_dict has no {key!r}: pass what EKFACOptimizer.state_dict() returned")
        rest = {key: value for key, value in state_dict.items() if key not in ("ekfac", "damping")}
        super().load_state_dict(rest)
        device = self.param_groups[0]["params"][0].device
        self.ekfac_state = pytree.tree_map(lambda t: t.to(device, copy=True), state_dict["ekfac"])
        if not callable(self.damping):
            self.damping = state_dict["damping"]


class _Bound(nn.Module):
    """A loss of a module, as a module of its own, for `functional_call`."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)
