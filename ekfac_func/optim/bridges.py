"""From natural gradients to `torch.optim`."""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

import functools
import inspect
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from ..checks import check_decay, check_not_negative
from ..describe import Description, describe
from ..distributed import of_first
from ..precondition import EKFAC, ekfac
from ..types import Batch, Damping, Info, Number, Params, State, shapes_of
from .bound import Bound, bind
from .damping import DEFAULTS
from .transforms import Velocity, check_like, momentum, nesterov

T = TypeVar("T")


@torch.no_grad()
def set_grads(params: nn.Module | Mapping[str, Tensor], natural: Mapping[str, Tensor]) -> None:
    """Write the natural gradient where any optimizer of `torch.optim` reads its gradient, `p.grad`.

    params: a module, or a dict of the leaf tensors that the optimizer holds. Parameters that natural lacks (frozen
        ones) get None, for an optimizer to pass over.
    natural: of `precondition`, a tree like params. After a skipped step it is zero, on which momentum still moves: test
        `info.skipped` to leave such a step out, which reads one boolean back to the host.

    TypeError where params is neither or natural no dict, ValueError where natural has a name or a shape that params has
    not.
    """
    if not isinstance(params, nn.Module | Mapping):
        raise TypeError(f"params is a {type(params).__name__}: pass the module, or a dict from names to parameters")
    if not isinstance(natural, Mapping):
        raise TypeError(f"natural is a {type(natural).__name__}: pass the first of what precondition returned")
    named = dict(params.named_parameters()) if isinstance(params, nn.Module) else params
    check_like({name: named[name] for name in natural if name in named}, natural, "natural")
    for name, p in named.items():
        # a copy in the layout of p: clipping changes it in place, LBFGS views it as a vector
        p.grad = torch.empty_like(p).copy_(natural[name]) if name in natural else None


class EKFACOptimizer(torch.optim.Optimizer):
    """EKFAC for loops that are not functional: a `torch.optim.Optimizer` whose `step` takes the batch.

    A gradient per example cannot be had from `loss.backward()`, so that the optimizer computes the loss itself:

        def loss(model, batch):  # of a batch of one example
            x, y = batch
            return F.cross_entropy(model(x), y)

        optimizer = EKFACOptimizer(model, loss)
        for batch in batches:
            optimizer.step(batch)

    The update is `velocity <- momentum velocity + natural`, `p <- p - lr (velocity + weight_decay p)`: momentum as that
    of `torch.optim.SGD`, decay as that of AdamW. A step whose loss or gradient is not finite changes neither parameters
    nor velocity. `p.grad` is neither read nor written, so that `clip_grad_norm_` has nothing to clip (a loop of
    `precondition` and `optim.chain` clips, by `clip_norm` or `clip_kl`), and hooks of a parameter are not called;
    nothing is read back to the host.

    The loss meets examples one by one, in batches of one. What is not a mean over examples of something that each has
    by itself is another loss then: the weighted mean of `cross_entropy(weight=)`, that over the labels of a batch with
    `ignore_index`, contrasts between examples, statistics of the batch. README, "A mean over the batch", has what to
    write.

    model: the module, whose parameters are changed in place.
    loss: `(model, batch) -> scalar`, called on batches of one example, each tensor with a leading axis of 1. With the
        option `batched=True` it meets the whole batch and returns the losses `[n]`; the buffers of a step that is not
        skipped, such as the running statistics of BatchNorm, are then the model's. An axis that holds several inputs
        of each example then has those of an example one after another, `(n s)`: `torch.stack([x, y], 1).flatten(0, 1)`,
        not `torch.cat([x, y])`.
    params: parameters or groups of them with lr, momentum, weight_decay and nesterov of their own, as in
        `torch.optim`; by default all of the model. What the groups leave out is frozen, and what does not require
        gradients at a step. Where other parameters are trained than in the step before, the state of `ekfac` starts
        anew; so it does after `optimizer.ekfac_state = None`, which a model moved to another dtype needs.
    lr, momentum, weight_decay, nesterov: the groups' defaults; lr a number or a 0-d tensor. Parameters that the loss
        does not reach decay too: leave them out of params.
    damping: as in `ekfac`; the attribute may be changed from step to step. Without one, `optim.DEFAULTS` are the
        defaults of damping, exponent, second_moment and basis_every, for which the default lr is. `thin` bases ask for
        `second_moment=intra_batch`.
    options: the others of `ekfac`.

    `state_dict` has the state of `ekfac`, and damping where it is a number or a tensor; save it as it is, for
    `torch.distributed.checkpoint.state_dict` drops both. After a step `info` is that of
    `precondition` and `natural` its natural gradient. `optimizer.precondition = torch.compile(optimizer.precondition)`
    compiles the expensive part.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor | tuple[Tensor, Any]],
        params: Iterable[Any] | None = None,
        *,
        lr: Number = 2.5e-3,
        damping: Number | Damping | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}: pass the module, and some of its parameters as params")
        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise TypeError(
                "model is a DistributedDataParallel, which sums what loss.backward() leaves in p.grad, where this "
                "optimizer does not look: pass model.module and ranks=ekfac_func.ranks()"
            )
        if not callable(loss) or getattr(loss, "__module__", "") in ("torch.nn.modules.loss", "torch.nn.functional"):
            named = getattr(loss, "__name__", f"a {type(loss).__name__}")
            raise TypeError(f"loss is {named}: pass a function (model, batch) -> scalar loss")
        if params is not None and not isinstance(params, Iterable):
            raise TypeError(f"params is a {type(params).__name__}: pass parameters or groups of them, and lr by name")
        for option in options:
            if option not in inspect.signature(ekfac).parameters:
                raise TypeError(
                    f"options has {option!r}, which ekfac does not take: give some of its arguments, such as damping, "
                    "basis_every or second_moment"
                )
        if damping is None:
            options = {**DEFAULTS, **options}
            damping = options.pop("damping")
        self.model, self.loss, self.options = model, loss, options
        self.damping: Number | Damping = damping
        self.ekfac_state: State | None = None
        self.natural: Params | None = None
        self.info: Info | None = None
        self._alike = False  # with the other processes
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(model.parameters() if params is None else params, defaults)
        self._ekfac()  # refuses options and damping

    @functools.cached_property
    def _bound(self) -> Bound:
        """Made at the first use, and not copied: a copy of a model that holds its optimizer is whole only then."""
        return bind(self.model, self.loss, self.options)

    def _ekfac(self) -> EKFAC:
        return ekfac(self._bound.loss_fn, damping=self.damping, **self._bound.options)

    @functools.cached_property
    def precondition(self) -> Callable[..., tuple[Params, State, Info]]:
        """That of `ekfac`, with the damping as its last argument."""
        loss_fn, options = self._bound.loss_fn, self._bound.options

        def precondition(params: Params, batch: Batch, state: State, damping: Number | Damping) -> Any:
            return ekfac(loss_fn, damping=damping, **options).precondition(params, batch, state)

        return precondition

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As that of `torch.optim.Optimizer`. ValueError for settings out of range and parameters not of the model."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    def _check(self, group: dict[str, Any]) -> None:
        _check_settings(group)
        for p in group["params"]:
            if p not in self._bound.names:
                raise ValueError(
                    f"params has a tensor of shape {tuple(p.shape)} that is no parameter of model: pass "
                    "model.parameters() or some of them"
                )
        for option in inspect.signature(ekfac).parameters:
            if option in group:
                raise ValueError(f"a group of params has {option!r}, which is one for all: pass it beside params")

    @overload  # type: ignore[override]
    def step(self, batch: Batch, closure: None = None) -> Tensor: ...

    @overload
    def step(self, batch: Batch, closure: Callable[[], T]) -> T: ...

    @torch.no_grad()
    def step(self, batch: Batch, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the batch, a tree of tensors with a leading axis of examples. Returns its mean loss, `[]`.

        closure: called before the step, with gradients enabled, for loops that insist on one; its result is then
            returned, and the gradients that it leaves are not used.
        """
        if callable(batch):
            raise TypeError(f"batch is a {type(batch).__name__}: pass the batch first, step(batch, closure)")
        result = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(f"closure is a {type(closure).__name__}: pass the batch as one tree, step((x, y))")
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            _check_settings(group)  # which a scheduler may have changed
        params, batch = self._trainable(), _plain(batch)
        if not params:
            raise ValueError(
                "no parameter of the groups requires gradients: unfreeze some, or leave the step out while none does"
            )
        if self.ekfac_state is None or shapes_of(self.ekfac_state.layers).keys() != params.keys():
            self._alike = False
            self.ekfac_state = self._ekfac().init(params, batch)
        self._take_of_first()
        try:
            found = self.precondition(params, batch, self.ekfac_state, self.damping)
        except (TypeError, ValueError) as error:
            if str(error).startswith("state has"):
                error.add_note("The state is that of the optimizer: set its ekfac_state to None to start anew.")
            raise
        self.natural, self.ekfac_state, self.info = found
        if self.options.get("batched", False):
            aux, buffers = self.info.aux
            self.info = self.info._replace(aux=aux)
            for name, b in self._bound.module.named_buffers():
                b.copy_(torch.where(self.info.skipped, b, buffers[name]))
        for group in self.param_groups:
            self._update(group, self.natural, self.info)
        return self.info.loss if closure is None else result

    def _take_of_first(self) -> None:
        """Give the model what the first process has, frozen parameters and buffers too."""
        ranks = self.options.get("ranks")
        if ranks is not None and not self._alike:
            held = (*self.model.parameters(), *self.model.buffers())
            dense = (t for t in held if t.layout is torch.strided and not t.is_meta)
            parts = [torch.view_as_real(t) if t.is_complex() else t for t in dense]
            # a group sums bytes, but not numbers of every dtype
            sent = of_first([t.contiguous().reshape(-1).view(torch.uint8) for t in parts], ranks)
            for own, first in zip(parts, sent, strict=True):
                given = first.clone().view(own.dtype).view(own.shape)
                if not torch.equal(own, given):  # an expanded one, as all have it, cannot be written to
                    own.copy_(given)
        self._alike = True

    def _trainable(self) -> Params:
        if set(self.model.named_parameters(remove_duplicate=False)) != self._bound.held:
            raise RuntimeError(
                "model has other parameters, or has them elsewhere, than when the optimizer was made: make it anew "
                "after a change of the modules"
            )
        if self._bound.module.loss is not self.loss:
            raise RuntimeError(
                "loss is another than when the optimizer was made, which computes with that one: make it anew, and "
                "load the state_dict of this one"
            )
        return {self._bound.names[p]: p for group in self.param_groups for p in group["params"] if p.requires_grad}

    def check(self, batch: Batch) -> None:
        """Certify the capture on a batch of a few, at a backward pass an example, as `init(..., check=True)` does.

        ValueError names the first parameter whose gradients are not those of each example alone. The loss may draw no
        random numbers: call `model.eval()` before, where there is dropout.
        """
        self._ekfac().init(self._trainable(), _plain(batch), check=True)

    def describe(self, batch: Batch) -> Description:
        """Print, and return, what a step on the batch does with each parameter, as `ekfac_func.describe`."""
        options = self._bound.options
        wanted = {name: options[name] for name in inspect.signature(describe).parameters if name in options}
        return describe(self._bound.loss_fn, self._trainable(), _plain(batch), **wanted)

    def _update(self, group: dict[str, Any], natural: Params, info: Info) -> None:
        params: Params = {self._bound.names[p]: p for p in group["params"] if p.requires_grad}
        rule = (nesterov if group["nesterov"] else momentum)(group["momentum"])
        for p in params.values():
            if "velocity" not in self.state[p]:
                self.state[p]["velocity"] = torch.zeros_like(p)
        old = Velocity({name: self.state[p]["velocity"] for name, p in params.items()})
        direction, new = rule.update({name: natural[name] for name in params}, old, params, info)
        for name, p in params.items():
            self.state[p]["velocity"] = torch.where(info.skipped, old.velocity[name], new.velocity[name])
            p.copy_(torch.where(info.skipped, p, p - group["lr"] * (direction[name] + group["weight_decay"] * p)))

    def state_dict(self) -> dict[str, Any]:
        """That of `torch.optim.Optimizer`, with `"ekfac"` and `"damping"`; `weights_only` loads it."""
        damping = None if callable(self.damping) else self.damping
        return {**super().state_dict(), "ekfac": self.ekfac_state, "damping": damping}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, on the devices of the parameters. ValueError if it is another's."""
        for key in ("ekfac", "damping"):
            if not isinstance(state_dict, Mapping) or key not in state_dict:
                raise ValueError(f"state_dict has no {key!r}: pass what EKFACOptimizer.state_dict() returned")
        state, damping = state_dict["ekfac"], state_dict["damping"]
        shapes = {name: tuple(p.shape) for p, name in self._bound.names.items()}
        others = {} if state is None else dict(shapes_of(state.layers).items() - shapes.items())
        if others:
            raise ValueError(
                f"state_dict is of a model with {others}, this one {shapes}: load it into an optimizer of a model "
                "with those names and shapes"
            )
        if callable(self.damping) != (damping is None):
            known = "a rule as damping" if damping is None else f"damping={damping!r}"
            own = "a rule" if callable(self.damping) else self.damping
            raise ValueError(
                f"state_dict has {known}, this optimizer {own}: set its damping, as an attribute, to one of that kind "
                "before"
            )
        super().load_state_dict({k: value for k, value in state_dict.items() if k not in ("ekfac", "damping")})
        device = next(iter(self._bound.names)).device
        self._alike = False
        self.ekfac_state, damping = pytree.tree_map_only(Tensor, lambda t: t.to(device, copy=True), (state, damping))
        if damping is not None:  # else a rule, and this optimizer has one
            self.damping = damping

    def __getstate__(self) -> dict[str, Any]:
        own = ("model", "loss", "options", "damping", "ekfac_state", "natural", "info")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, "_alike": False}


def _check_settings(group: Mapping[str, Any]) -> None:
    check_not_negative("lr", group["lr"])
    check_decay("momentum", group["momentum"])
    check_not_negative("weight_decay", group["weight_decay"])


def _plain(batch: Batch) -> Batch:
    return batch.data if isinstance(batch, UserDict) else batch  # of a collator of `transformers`
