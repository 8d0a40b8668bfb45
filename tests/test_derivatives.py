"""Losses that differentiate, that ask what is differentiated, or that change how."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from ekfac_func import describe, ekfac, kfac, per_example_gradients
from ekfac_func.types import Params

from .cases import N
from .oracles import close, close_trees, loop


def test_a_derivative_inside_the_loss_is_one_more_path() -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        h = F.linear(x, params["v"]).tanh()
        y = F.linear(h, params["w"]).square().sum()
        (slope,) = torch.autograd.grad(y, h, create_graph=True)
        return y + slope.square().sum()

    params, batch = {"v": torch.randn(3, 4), "w": torch.randn(2, 3)}, torch.randn(N, 4)
    expected = loop(loss_fn, params, batch)[1]
    found = per_example_gradients(loss_fn, params, batch)
    for name in params:
        close(found.dense(name), expected[name])


NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "layer": lambda x, w: F.layer_norm(x, (4,), w),
    "group": lambda x, w: F.group_norm(x[None, :, None], 2, w),
    "instance": lambda x, w: F.instance_norm(x[None, None], weight=w[:1]),
    "batch": lambda x, w: F.batch_norm(x[None], torch.zeros(4), torch.ones(4), w),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("derivative", [torch.func.jacfwd, torch.func.hessian], ids=["jacfwd", "hessian"])
def test_forward_mode_of_norms(norm: str, derivative: Any) -> None:
    """Which torch computes as if tensors without values were on their device, so that discovery has none of it."""
    params, batch = {"v": torch.randn(4, 4), "scale": torch.randn(4)}, torch.randn(N, 4)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        of_x = derivative(lambda x: NORMS[norm](F.linear(x, params["v"]), params["scale"]).sin().sum())
        return of_x(x).square().sum()

    found = per_example_gradients(loss_fn, params, batch)
    for name, expected in loop(loss_fn, params, batch)[1].items():
        close(found.dense(name), expected)


def _clamped(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"]).tanh()
    if h.requires_grad:
        h.register_hook(lambda g: g.clamp(-0.1, 0.1))
    return F.linear(h, params["v"]).square().sum()


def _hooked(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"]).tanh()
    h.register_hook(lambda g: g * 0.5)
    return F.linear(h, params["v"]).square().sum()


def _branching(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"])
    return F.linear(h if h.grad_fn is None else 2 * h, params["v"]).square().sum()


def _asking_a_parameter(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"])
    return F.linear(2 * h if params["v"].requires_grad else h, params["v"]).square().sum()


def _penalised(params: Params, x: Tensor) -> Tensor:
    trained = [p for p in params.values() if p.requires_grad]
    return F.linear(F.linear(x, params["w"]), params["v"]).cos().sum() + sum(p.square().sum() for p in trained)


@pytest.mark.parametrize("loss_fn", [_clamped, _hooked, _branching, _asking_a_parameter, _penalised])
def test_a_loss_that_asks_what_is_differentiated(loss_fn: Any) -> None:
    params, batch = {"w": torch.randn(6, 4), "v": torch.randn(3, 6)}, torch.randn(N, 4)
    expected = loop(loss_fn, params, batch)[1]
    for _ in range(2):  # and by the plan that is known
        found = per_example_gradients(loss_fn, params, batch)
        for name in params:
            close(found.dense(name), expected[name])
    assert (found.captured.layers["w"].rule is None) == (loss_fn is _penalised)


@pytest.mark.parametrize("loss_fn", [_asking_a_parameter, _penalised])
def test_a_compiled_loss_that_asks_a_parameter_is_refused(loss_fn: Any) -> None:
    params, batch = {"w": torch.randn(6, 4), "v": torch.randn(3, 6)}, torch.randn(N, 4)
    step = ekfac(loss_fn, damping=1.0)
    with pytest.raises(Exception, match=r"asks whether params\['[vw]'\] requires a gradient"):
        torch.compile(step.precondition, fullgraph=True, backend="eager")(params, batch, step.init(params, batch))


def _target(way: str) -> Any:
    def q(params: Params, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, params["w"], params["b"]).tanh(), params["v"]).max()

    def loss_fn(params: Params, example: Any) -> Tensor:
        x, after = example
        if way == "detached parameters":
            return (q(params, x) - q({name: p.detach() for name, p in params.items()}, after)).square()
        if way == "detached output":
            return (q(params, x) - q(params, after).detach()).square()
        with torch.no_grad():
            target = q(params, after)
        return (q(params, x) - target).square()

    return loss_fn


@pytest.mark.parametrize("way", ["no_grad", "detached output"])
def test_calls_that_no_gradient_reaches_are_no_samples(way: str) -> None:
    params = {"w": torch.randn(3, 4), "b": torch.randn(3), "v": torch.randn(2, 3)}
    batch = torch.randn(N, 4), 3 * torch.randn(N, 4)
    expected, found = (
        ekfac(loss_fn, damping=0.1, second_moment=kfac).precondition(
            params, batch, ekfac(loss_fn, damping=0.1).init(params, batch)
        )
        for loss_fn in (_target("detached parameters"), _target(way))
    )
    close_trees(found[0], expected[0], 1e-8)
    close_trees(
        [moment.value for moment in found[1].second_moments.values()],
        [moment.value for moment in expected[1].second_moments.values()],
        1e-8,
    )


def _drawn(params: Params, x: Tensor) -> Tensor:
    noise = torch.empty(4).normal_() + torch.distributions.Normal(0.0, 1.0).rsample((4,))
    return F.linear(x, params["w"] * torch.where(noise < torch.inf, 1.0, noise)).cos().sum()


def _by_requires_grad(params: Params, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.linear(x, params["w"]).tanh().sum(), x, create_graph=True)
    return slope.square().sum()


def _that_has_a_gradient(params: Params, x: Tensor) -> Tensor:
    """As a hook does that `transformers` puts on the embedding of a model."""
    h = F.linear(x, params["w"]).requires_grad_()
    return F.linear(h.sin().requires_grad_(True), params["w"].exp().requires_grad_(True)).cos().sum()


def _by_data(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"])
    return (h + (h.round() - h).data).square().sum()


def _by_data_within_a_derivative(params: Params, x: Tensor) -> Tensor:
    """Cut off for the inner derivative, not for that of the loss."""

    def of(z: Tensor) -> Tensor:
        h = F.linear(z, params["w"])
        return (h.data.sigmoid() * h).sum()

    return torch.func.grad(of)(x).square().sum()


@pytest.mark.parametrize("loss_fn", [_drawn, _by_requires_grad, _that_has_a_gradient, _by_data])
def test_what_torch_func_does_not_let_a_loss_do(loss_fn: Any) -> None:
    """At once for all examples."""
    params, batch, calls = {"w": torch.randn(4, 4)}, torch.randn(N, 4), itertools.count()

    def counted(params: Params, x: Tensor) -> Tensor:
        next(calls)
        return loss_fn(params, x)

    found = per_example_gradients(counted, params, batch)
    assert next(calls) == 2
    close(found.dense("w"), loop(loss_fn, params, batch)[1]["w"])
    describe(loss_fn, params, batch)


class Product(torch.autograd.Function):
    """A linear function of one's own, which no `vmap` takes; what its forward calls is no layer of the loss."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.T

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g[0] @ w, torch.einsum("...o,...i->oi", g[0], x)


class VmappedProduct(Product):
    generate_vmap_rule = True


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("own", [Product, VmappedProduct])
def test_a_function_whose_forward_calls_what_has_a_rule(own: Any, batched: bool) -> None:
    bound = own.apply  # as most are called: what is bound before the loss runs

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        x = bound(own.apply(x, params["own"]).tanh(), params["own"])
        return F.linear(torch.as_tensor(x), params["w"]).cos().sum(-1)

    params, batch = {"own": torch.randn(3, 3), "w": torch.randn(2, 3)}, torch.randn(N, 3)
    found = per_example_gradients(loss_fn, params, batch, batched=batched)
    close_trees({name: found.dense(name) for name in params}, loop(loss_fn, params, batch)[1])
    assert "apply" not in vars(_SingleLevelFunction)


def test_what_cuts_an_inner_derivative_alone() -> None:
    params, batch = {"w": torch.randn(4, 4)}, torch.randn(N, 4)
    found = per_example_gradients(_by_data_within_a_derivative, params, batch)
    close(found.dense("w"), loop(_by_data_within_a_derivative, params, batch)[1]["w"])


def test_draws_that_are_alike() -> None:
    params, batch = {"w": torch.randn(4, 4)}, torch.randn(N, 4)
    found = per_example_gradients(_drawn, params, batch, randomness="same")
    close(found.dense("w"), loop(_drawn, params, batch)[1]["w"])


@pytest.mark.parametrize("of", ["parameter", "view"])
def test_a_hook_on_a_parameter(of: str) -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        w = params["w"] if of == "parameter" else params["w"].T
        if w.requires_grad:
            w.register_hook(lambda g: 2 * g)
        return F.linear(F.linear(x, w if of == "parameter" else w.T), params["v"]).cos().sum()

    params, batch = {"w": torch.randn(6, 4), "v": torch.randn(3, 6)}, torch.randn(N, 4)
    found = per_example_gradients(loss_fn, params, batch)
    for name, expected in loop(loss_fn, params, batch)[1].items():
        close(found.dense(name), expected)


class Tripled(torch.autograd.Function):
    """Another derivative than that of its forward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return 3 * g[0]


def test_a_function_with_a_backward_of_its_own_is_refused_in_a_graph() -> None:
    """Where Dynamo of torch 2.13 differentiates its forward."""

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return torch.as_tensor(Tripled.apply(F.linear(x, params["w"]))).cos().sum()

    params, batch = {"w": torch.randn(3, 4)}, torch.randn(N, 4)
    close(per_example_gradients(loss_fn, params, batch).dense("w"), loop(loss_fn, params, batch)[1]["w"])
    step = ekfac(loss_fn, damping=0.1)
    with pytest.raises(Exception, match=r"loss_fn calls Tripled, an autograd\.Function"):
        torch.compile(step.precondition, fullgraph=True, backend="eager")(params, batch, step.init(params, batch))
