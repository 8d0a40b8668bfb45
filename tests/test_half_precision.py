"""Steps in half precision: parameters in bfloat16, autocast within the loss or around the step."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ekfac_func import ekfac, intra_batch, per_example_gradients, rank, running_average
from ekfac_func.optim import apply_updates, chain, learning_rate, momentum
from ekfac_func.types import Params

from .oracles import close, close_trees, same_bits


def half_precision() -> tuple[Params, Any, Callable[..., Any], Callable[..., Any]]:
    """Parameters in float32, a batch, a plain loss and one under autocast."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).float()
    params = {name: p.detach() for name, p in net.named_parameters()}
    batch = torch.randn(32, 1, 6, 6, dtype=torch.float32), torch.randint(0, 10, (32,))

    def plain(params: Params, example: Any) -> Tensor:
        x, y = example
        x = x.to(params["0.weight"].dtype)
        return F.cross_entropy(functional_call(net, params, (x[None],)).float(), y[None])

    def autocast(params: Params, example: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(params, example)

    return params, batch, plain, autocast


BF16 = 0.1  # relative error of natural gradients of one batch whose forward pass has 8 bits


@pytest.mark.parametrize("estimator", [intra_batch, running_average(0.9)])
@pytest.mark.parametrize("kind", ["autocast", "bf16 parameters"])
def test_half_precision_has_statistics_in_float32(kind: str, estimator: Any) -> None:
    params, batch, plain, autocast = half_precision()
    loss_fn = autocast if kind == "autocast" else plain
    given = params if kind == "autocast" else {name: p.bfloat16() for name, p in params.items()}
    step = ekfac(loss_fn, damping=0.1, second_moment=estimator)
    exact = ekfac(plain, damping=0.1, second_moment=estimator)
    natural, state, info = step.precondition(given, batch, step.init(given, batch))
    expected, _, _ = exact.precondition(params, batch, exact.init(params, batch))
    assert {leaf.dtype for leaf in pytree.tree_leaves(state)} == {torch.float32}
    assert {name: t.dtype for name, t in natural.items()} == {name: t.dtype for name, t in given.items()}
    assert info.loss.dtype == torch.float32
    for name in params:
        close(natural[name].float(), expected[name], BF16)
    initial = step.init(given, batch)
    assert {leaf.dtype for leaf in pytree.tree_leaves(initial)} == {torch.float32}
    if estimator is intra_batch:
        compiled = torch.compile(step.precondition, fullgraph=True, backend="eager")
        for name, p in compiled(given, batch, initial)[0].items():
            close(p.float(), natural[name].float(), BF16)


@pytest.mark.parametrize("way", ["eager", "compiled", "batched", "mapped", "batched and mapped", "each"])
def test_autocast_casts_as_outside_of_a_step(way: str) -> None:
    """Under `vmap` torch adds a bias in the dtype that it has; the loss mixes no dtypes, which torch would refuse."""
    p = {name: torch.randn(4, 4).float() for name in "uvw"} | {name: torch.randn(4).float() for name in "bcd"}

    def losses(p: Params, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.linear(x, p["u"])
            z = torch.addmm(p["c"], F.linear(x, p["v"], p["b"]), p["w"].mT)
            frozen = F.linear(z, torch.ones(4, 4).float(), p["d"].detach())
        if way == "each":
            assert z.requires_grad in (False, True)
        return torch.lerp(y, z, frozen.sigmoid()).square().mean(1).float()

    batched = way.startswith("batched")
    step = ekfac(losses if batched else lambda p, x: losses(p, x[None])[0], damping=0.1, batched=batched)
    batch = torch.randn(6, 4).float()
    run = step.precondition
    if way == "compiled":
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    elif way.endswith("mapped"):
        few, state = {name: torch.stack([t, -t]) for name, t in p.items()}, step.init(p, batch)
        close(torch.vmap(lambda p: run(p, batch, state)[2].loss)(few)[0], losses(p, batch).mean(), BF16)
        return
    close(run(p, batch, step.init(p, batch))[2].loss, losses(p, batch).mean(), BF16)


def test_autocast_in_a_vmap_of_the_losss_own_casts_as_it_does() -> None:
    """There torch adds a bias in its own dtype outside of a step too; `addmm` is in a deprecated order of arguments."""
    p, batch = {"w": torch.randn(4, 4).float(), "b": torch.randn(4).float()}, torch.randn(6, 3, 4).float()
    zeros, dtypes = torch.zeros(1, 4).bfloat16(), list[torch.dtype]()

    def loss_fn(p: Params, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.vmap(lambda row: F.linear(row, p["w"], p["b"]))(x)
            dtypes.append(y.dtype)
            return (y + torch.addmm(0.5, zeros, 1.0, x, p["w"])).square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the order
        expected = torch.stack([loss_fn(p, x) for x in batch])
        found = per_example_gradients(loss_fn, p, batch)
    assert set(dtypes) == {torch.float32}
    close(found.losses, expected, BF16)


@pytest.mark.parametrize("options", [{}, pytest.param({"bases": {"*": rank(4)}}, marks=pytest.mark.slow)])
def test_autocast_around_the_step_is_autocast_inside_the_loss(options: Any) -> None:
    """As of Lightning's `precision="bf16-mixed"`: the forward pass in bfloat16, the statistics not."""
    params, batch, plain, autocast = half_precision()
    inside, around = (ekfac(loss, damping=0.1, **options) for loss in (autocast, plain))
    state = inside.init(params, batch)
    expected = inside.precondition(params, batch, state)[:2]
    around.precondition(params, batch, state)  # a plan of the same shapes without autocast
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same_bits(around.precondition(params, batch, state)[:2], expected)
        compiled = torch.compile(around.precondition, fullgraph=True, backend="aot_eager")
        found, state, _ = compiled(params, batch, state)
    close_trees(found, expected[0], BF16)
    assert {leaf.dtype for leaf in pytree.tree_leaves(state)} == {torch.float32}


def test_bf16_parameters_with_a_float32_master() -> None:
    """The master takes steps that bfloat16 would round away."""
    master, batch, loss_fn, _ = half_precision()
    step = ekfac(loss_fn, damping=0.1, basis_every=5)
    optimizer = chain(momentum(0.9), learning_rate(1e-3))
    opt_state, state = optimizer.init(master), step.init(master, batch)
    start, losses = master, []
    for _ in range(40):
        natural, state, info = step.precondition({name: p.bfloat16() for name, p in master.items()}, batch, state)
        updates, opt_state = optimizer.update(natural, opt_state, master, info)
        master = apply_updates(master, updates)
        losses.append(float(info.loss))
    assert {p.dtype for p in master.values()} == {u.dtype for u in updates.values()} == {torch.float32}
    assert losses[-1] < losses[0] - 0.05
    assert all((p - start[name]).abs().max() > 0 for name, p in master.items())
