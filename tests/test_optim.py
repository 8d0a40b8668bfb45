"""Blocks, damping rules, bridges and metrics, each against a formula of its own or `torch.optim`."""

import copy
import dataclasses
import functools
import io
import math
import pickle
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ekfac_func import (
    Blocks,
    EKFACOptimizer,
    adaptive,
    averaged_intra_batch,
    curvature,
    ekfac,
    intra_batch,
    kfac,
    optim,
    qr,
    rank,
    running_average,
    set_grads,
    staggered,
)
from ekfac_func.optim import (
    Transform,
    apply_updates,
    chain,
    clip_kl,
    clip_norm,
    constant,
    cosine,
    each,
    exponential_average,
    fisher_quadratic,
    graft,
    identity,
    learning_rate,
    levenberg_marquardt,
    metrics,
    momentum,
    nesterov,
    preconditioned_quadratic,
    predicted_decrease,
    relative,
    together,
    warm_up,
    weight_decay,
)
from ekfac_func.types import Info, Layer, Params

from .cases import N, make
from .oracles import blocks, close, close_trees, loop, same_bits
from .watching import NoHostRead

TIGHT = 1e-12
STEPS = 7


def params_and_gradients() -> tuple[Params, list[Params]]:
    shapes = {"w": (3, 4), "b": (3,), "s": ()}
    trees = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(STEPS + 1)]
    return trees[0], trees[1:]


def report(gradient: Params, skipped: bool = False) -> Info:
    return Info(torch.ones(()), gradient, torch.tensor(skipped), torch.tensor(0), torch.tensor(1.0))


def run(optimizer: Transform, params: Params, gradients: list[Params]) -> Params:
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params, report(gradient))
        params = apply_updates(params, updates)
    return params


def run_torch(make: Callable[[list[Tensor]], torch.optim.Optimizer], params: Params, gradients: list[Params]) -> Params:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = make(list(leaves.values()))
    for gradient in gradients:
        for name, p in leaves.items():
            p.grad = gradient[name].clone()
        optimizer.step()
    return {name: p.detach() for name, p in leaves.items()}


def dot(x: Params, y: Params) -> float:
    return sum(float((x[name] * y[name]).sum()) for name in x)


def scaled(tree: Params, factor: Any) -> Params:
    return {name: factor * t for name, t in tree.items()}


@pytest.mark.parametrize("decay", [0.0, 0.02])
@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_momentum_and_decay_are_those_of_sgd(mu: float, decay: float) -> None:
    params, gradients = params_and_gradients()
    first = [weight_decay(decay)] if decay else []
    expected = run_torch(lambda p: torch.optim.SGD(p, lr=0.1, momentum=mu, weight_decay=decay), params, gradients)
    close_trees(run(chain(*first, momentum(mu), learning_rate(0.1)), params, gradients), expected, TIGHT)
    if mu:
        expected = run_torch(
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=mu, weight_decay=decay, nesterov=True), params, gradients
        )
        close_trees(run(chain(*first, nesterov(mu), learning_rate(0.1)), params, gradients), expected, TIGHT)


def test_decoupled_decay() -> None:
    """Loshchilov & Hutter, algorithm 1, on the matrix alone."""
    params, gradients = params_and_gradients()
    rule = chain(momentum(0.9), weight_decay(0.02, on=lambda name, p: p.dim() > 1), learning_rate(0.1))
    found = run(rule, params, gradients)
    for name, p in params.items():
        velocity = torch.zeros_like(p)
        for gradient in gradients:
            velocity = 0.9 * velocity + gradient[name]
            p = p - 0.1 * velocity - (0.1 * 0.02 * p if name == "w" else 0)
        close(found[name], p, TIGHT)


@pytest.mark.parametrize("limit", [1e-6, 1e-3, 1e3])
def test_kl_clipping(limit: float) -> None:
    params, (gradient, natural, *_) = params_and_gradients()
    if dot(natural, gradient) < 0:
        natural = scaled(natural, -1)
    clip = clip_kl(limit, cosine(0.5, 4))
    state = clip.init(params)
    for t in range(6):
        clipped, state = clip.update(natural, state, params, report(gradient))
        lr = 0.5 * (1 + math.cos(math.pi * min(t / 4, 1))) / 2
        kl = lr**2 * dot(natural, gradient)
        close_trees(clipped, scaled(natural, 1.0 if kl <= limit else math.sqrt(limit / kl)), TIGHT)


def test_a_learning_rate_of_zero_is_not_clipped() -> None:
    params, (gradient, *_) = params_and_gradients()
    clip = clip_kl(1e-3, constant(0.0))
    same_bits(clip.update(gradient, clip.init(params), params, report(gradient))[0], gradient)


def test_norm_constraint() -> None:
    params, (direction, *_) = params_and_gradients()
    norms = {name: math.sqrt(float(d.square().sum())) for name, d in direction.items()}
    whole = math.sqrt(sum(norm**2 for norm in norms.values()))
    for limit in (0.1, 1.0, 100.0):
        found = clip_norm(limit).update(direction, (), params, report(direction))[0]
        close_trees(found, scaled(direction, min(1, limit / whole)), TIGHT)
        found = clip_norm(limit, each).update(direction, (), params, report(direction))[0]
        close_trees(found, {name: min(1, limit / norms[name]) * d for name, d in direction.items()}, TIGHT)
    zero = scaled(direction, 0.0)
    same_bits(clip_norm(1.0, each).update(zero, (), params, report(zero))[0], zero)


def test_factors_beyond_half_precision() -> None:
    large = {"w": torch.full((100,), 1e4, dtype=torch.float16)}  # of norm 1e5, clipped by 1e-8
    close(clip_norm(1e-3).update(large, (), large, report(large))[0]["w"].double().norm(), torch.tensor(1e-3), 1e-2)
    small = {"w": torch.full((100,), 1e-6, dtype=torch.float16)}
    ones = {"w": torch.ones(100, dtype=torch.float16)}
    close(graft(identity()).update(small, (), small, report(ones))[0]["w"].double(), ones["w"].double(), 1e-2)


def test_grafting() -> None:
    params, gradients = params_and_gradients()
    onto = momentum(0.9)
    for scope in (each, together):
        rule = graft(onto, scope)
        state, velocity = rule.init(params), {name: torch.zeros_like(p) for name, p in params.items()}
        for gradient in gradients:
            direction = {name: g.sin() + 1 for name, g in gradient.items()}
            velocity = {name: 0.9 * v + gradient[name] for name, v in velocity.items()}
            found, state = rule.update(direction, state, params, report(gradient))
            for name, d in direction.items():
                names = [name] if scope is each else list(params)
                wanted = math.sqrt(sum(float(velocity[k].square().sum()) for k in names))
                own = math.sqrt(sum(float(direction[k].square().sum()) for k in names))
                close(found[name], d * wanted / own, TIGHT)
    rule = graft(identity())
    zero = scaled(params, 0.0)
    same_bits(rule.update(zero, rule.init(params), params, report(gradient))[0], zero)


def torch_rates(make: Callable[[Any], Any], steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=0.3)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedules_are_those_of_torch() -> None:
    lr_scheduler = torch.optim.lr_scheduler
    steps = torch.arange(13)
    falling = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=12, eta_min=0.01), 13)
    for schedule in (cosine(0.3, 12, end=0.01), cosine(torch.tensor(0.3), 12, end=torch.tensor(0.01))):
        close(torch.stack([schedule(t) for t in steps]), torch.tensor(falling), TIGHT)
    close(cosine(0.3, 12, end=0.01)(torch.tensor(50)), torch.tensor(0.01), TIGHT)
    rising = torch_rates(lambda o: lr_scheduler.LinearLR(o, start_factor=1 / 5, total_iters=4), 5)
    warmed = warm_up(5, cosine(0.3, 12, end=0.01))
    close(torch.stack([warmed(t) for t in torch.arange(18)]), torch.tensor([*rising, *falling]), TIGHT)
    close(constant(0.3)(steps[7]), torch.tensor(0.3), TIGHT)


def test_schedules_do_not_depend_on_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [warm_up(10, cosine(0.1, 1000))(torch.tensor(step)) for step in (3, 500, 1000)]
    finally:
        torch.set_default_dtype(torch.float64)
    for value, step in zip(found, (3, 500, 1000), strict=True):
        assert value.item() == pytest.approx(warm_up(10, cosine(0.1, 1000))(torch.tensor(step)).item(), rel=1e-3)


def test_a_schedule_in_a_chain() -> None:
    params, gradients = params_and_gradients()
    expected = dict(params)
    for t, gradient in enumerate(gradients):
        lr = 0.2 * (t + 1) / 3 if t < 3 else 0.1 * (1 + math.cos(math.pi * (t - 3) / 5))
        expected = {name: p - lr * gradient[name] for name, p in expected.items()}
    close_trees(run(chain(learning_rate(warm_up(3, cosine(0.2, 5)))), params, gradients), expected, TIGHT)


def test_average_of_parameters() -> None:
    start, trees = params_and_gradients()
    average = exponential_average(0.8)
    state = average.init(start)
    for t, params in enumerate(trees, 1):
        found, state = average.update(params, state)
        weights = [0.2 * 0.8 ** (t - 1 - k) / (1 - 0.8**t) for k in range(t)]
        expected = {
            name: sum((w * tree[name] for w, tree in zip(weights, trees[:t], strict=True)), torch.zeros(()))
            for name in params
        }
        close_trees(found, expected, TIGHT)
        assert math.isclose(sum(weights), 1)
    torch.set_default_dtype(torch.float32)
    state = average.init(start)
    for params in trees:
        found, state = average.update(params, state)
    close_trees(found, expected, TIGHT)  # of float64 all the same
    half = {name: p.bfloat16() for name, p in start.items()}
    found, state = average.update(half, average.init(half))
    assert {p.dtype for p in found.values()} == {torch.bfloat16}
    assert {v.dtype for v in state.value.values()} == {torch.float32}
    for init in (average.init, learning_rate(0.1).init):
        with pytest.raises(ValueError, match="params is empty"):
            init({})


def full_chain(lr: Any = 0.1) -> Transform:
    schedule = warm_up(2, cosine(lr, 6))
    return chain(
        clip_kl(1e-2, schedule),
        clip_norm(1.5),
        graft(momentum(0.5)),
        nesterov(0.9),
        weight_decay(0.01),
        learning_rate(schedule),
    )


def test_a_skipped_step_changes_nothing() -> None:
    params, (first, *_) = params_and_gradients()
    optimizer = full_chain()
    _, state = optimizer.update(first, optimizer.init(params), params, report(first))
    zero, bad = scaled(params, 0.0), scaled(params, math.nan)
    updates, new = optimizer.update(zero, state, params, report(bad, skipped=True))
    same_bits(new, state)
    same_bits(apply_updates(params, updates), params)


def test_blocks_are_pure_compiled_and_mapped() -> None:
    params, gradients = params_and_gradients()
    optimizer, average = full_chain(), exponential_average(0.9)

    def step(params: Params, state: Any, mean: Any, gradient: Params) -> Any:
        updates, state = optimizer.update(gradient, state, params, report(gradient))
        params = apply_updates(params, updates)
        return params, state, average.update(params, mean)

    counters.clear()
    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    carried = (params, optimizer.init(params), average.init(params))
    for gradient in gradients:
        before = pytree.tree_map(torch.clone, carried)
        expected, found = step(*carried, gradient), fast(*carried, gradient)
        close_trees(found, expected, TIGHT)
        same_bits(carried, before)
        carried = (found[0], found[1], found[2][1])
    assert counters["stats"]["unique_graphs"] == 1

    def after(lr: Tensor) -> Params:
        return run(full_chain(lr), params, gradients)

    rates = torch.tensor([0.1, 0.01])
    many = torch.vmap(after)(rates)
    for k, lr in enumerate(rates):
        close_trees({name: p[k] for name, p in many.items()}, after(lr), TIGHT)


def test_states_survive_a_checkpoint() -> None:
    params, gradients = params_and_gradients()
    optimizer, average = full_chain(), exponential_average(0.9)
    _, state = optimizer.update(gradients[0], optimizer.init(params), params, report(gradients[0]))
    _, mean = average.update(params, average.init(params))
    file = io.BytesIO()
    torch.save((state, mean), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    same_bits(loaded, (state, mean))
    same_bits(
        optimizer.update(gradients[1], loaded[0], params, report(gradients[1])),
        optimizer.update(gradients[1], state, params, report(gradients[1])),
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: momentum(1.0), ValueError, "decay=1.0.*0 <= decay < 1"),
        (lambda: nesterov(-0.1), ValueError, "decay=-0.1"),
        (lambda: exponential_average(2.0), ValueError, "decay=2.0"),
        (lambda: weight_decay(-1.0), ValueError, "rate=-1.0.*positive"),
        (lambda: clip_kl(0.0, 0.1), ValueError, "limit=0.0.*positive"),
        (lambda: clip_kl(1e-3, 0.0), ValueError, "learning_rate=0.0.*positive"),
        (lambda: clip_norm("1"), TypeError, "limit is a str"),  # type: ignore[arg-type]
        (lambda: learning_rate(-0.1), ValueError, "value=-0.1.*positive"),
        (lambda: cosine(0.1, 0), ValueError, "steps=0.*at least 1"),
        (lambda: warm_up(0, constant(0.1)), ValueError, "steps=0.*at least 1"),
        (lambda: warm_up(3, 0.1), TypeError, r"schedule=0.1 .* constant\(value\)"),  # type: ignore[arg-type]
        (lambda: relative(0.0), ValueError, "fraction=0.0.*positive"),
        (lambda: levenberg_marquardt(*torch.ones(3), factor=1.5), ValueError, "factor=1.5.*0 < factor < 1"),
        (lambda: chain(momentum), TypeError, r"chain was given .*Transform, as momentum\(0.9\)"),  # type: ignore[arg-type]
        (lambda: graft(identity), TypeError, "graft was given"),  # type: ignore[arg-type]
        (lambda: momentum(torch.ones(2)), ValueError, r"decay has shape \(2,\).*0-d"),
        (lambda: cosine(0.1, 10)({}), TypeError, r"as a damping rule is: .*schedule\(step\)"),  # type: ignore[arg-type]
        (lambda: warm_up(2, constant(1))({}), TypeError, r"as a damping rule is"),  # type: ignore[arg-type]
    ],
)
def test_settings_of_blocks(make: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_trees_that_do_not_match() -> None:
    params = {"w": torch.ones(3, 4), "b": torch.ones(3)}
    with pytest.raises(ValueError, match=r"updates has no 'b'.*same names"):
        apply_updates(params, {"w": params["w"]})
    with pytest.raises(ValueError, match=r"updates has 'c'.*same names"):
        apply_updates(params, {**params, "c": torch.ones(())})
    with pytest.raises(ValueError, match=r"updates\['b'\] has shape \(4,\).*\(3,\).*same shape"):
        apply_updates(params, {**params, "b": torch.ones(4)})
    with pytest.raises(ValueError, match=r"direction has no 'b'.*same names"):
        momentum(0.9).update({"w": params["w"]}, momentum(0.9).init(params), params, report(params))
    with pytest.raises(ValueError, match=r"direction has 'b' that the velocity in state has not"):
        momentum(0.9).update(params, momentum(0.9).init({"w": params["w"]}), params, report(params))
    with pytest.raises(ValueError, match=r"natural has no 'b', gradient has.*same names"):
        preconditioned_quadratic({"w": params["w"]}, params, 0.1)
    one = chain(learning_rate(0.1))
    with pytest.raises(ValueError, match=r"2 parts.*1 transforms.*init\(params\)"):
        one.update(params, chain(momentum(0.9), learning_rate(0.1)).init(params), params, report(params))


def cross_entropy(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def net_and_loss() -> tuple[Any, Callable[[Any, Any], Tensor], Any]:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return net, cross_entropy, [(torch.randn(20, 4), torch.randint(0, 3, (20,))) for _ in range(STEPS)]


def functional(net: nn.Module) -> Callable[[Params, Any], Tensor]:
    """`cross_entropy` of one example, as a function of parameters."""
    return lambda p, e: F.cross_entropy(functional_call(net, p, (e[0][None],)), e[1][None])


@pytest.mark.parametrize("make", [lambda p: torch.optim.Adam(p, lr=0.1), lambda p: torch.optim.SGD(p, 0.1, 0.9)])
def test_any_optimizer_steps_on_the_natural_gradient(make: Any) -> None:
    net, _, batches = net_and_loss()
    step = ekfac(functional(net), damping=1e-2)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    state, naturals, optimizer = step.init(start, batches[0]), [], make(list(net.parameters()))
    for batch in batches:
        natural, state, _ = step.precondition(dict(net.named_parameters()), batch, state)
        set_grads(net, natural)
        naturals.append(natural)
        optimizer.step()
    close_trees({name: p.detach() for name, p in net.named_parameters()}, run_torch(make, start, naturals), TIGHT)


def test_set_grads() -> None:
    net, _, _ = net_and_loss()
    natural = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    leaves = dict(net.named_parameters())
    set_grads(leaves, natural)
    same_bits([p.grad for p in leaves.values()], list(natural.values()))
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    assert all((t == 1).all() for t in natural.values())
    flipped = {name: torch.ones(p.shape[::-1]).movedim(0, -1) for name, p in leaves.items()}
    set_grads(net, flipped)
    torch.optim.LBFGS(net.parameters()).step(lambda: torch.ones(()))
    part = {name: t for name, t in natural.items() if name != "0.bias"}
    set_grads(net, part)
    assert leaves["0.bias"].grad is None
    with pytest.raises(TypeError, match="natural is a tuple: pass the first of what precondition returned"):
        set_grads(net, (natural, None, None))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="natural has 'other' that params has not"):
        set_grads(net, {**natural, "other": torch.ones(())})
    with pytest.raises(ValueError, match=r"natural\['0.bias'\] has shape \(2,\).*\(6,\)"):
        set_grads(net, {**natural, "0.bias": torch.ones(2)})


@pytest.mark.parametrize("use_nesterov", [False, True])
def test_the_optimizer_is_sgd_on_the_natural_gradient(use_nesterov: bool) -> None:
    """With a learning-rate scheduler, two groups, a parameter left out, and an estimator with a memory; decay apart."""
    net, loss, batches = net_and_loss()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    options: dict[str, Any] = {"second_moment": averaged_intra_batch(0.9), "basis_every": 3}

    def prepared(params: dict[str, Any]) -> list[Any]:
        return [
            {"params": [params["0.weight"]], "lr": 0.1},
            {"params": [params["0.bias"], params["2.weight"]], "weight_decay": 0.05},
        ]

    twin = {name: p.clone().requires_grad_() for name, p in start.items()}
    groups = [{**group, "weight_decay": 0.0} for group in prepared(twin)]
    reference = torch.optim.SGD(groups, lr=0.2, momentum=0.9, nesterov=use_nesterov)
    rates = torch.optim.lr_scheduler.StepLR(reference, 2, 0.5)
    held = {name: twin[name] for name in ("0.weight", "0.bias", "2.weight")}

    def frozen(params: Params, example: Any) -> Tensor:
        return functional(net)({**params, "2.bias": start["2.bias"]}, example)

    step = ekfac(frozen, damping=1e-2, **options)
    state = step.init(held, batches[0])
    expected = []
    for batch in batches:
        natural, state, info = step.precondition(held, batch, state)
        set_grads(held, natural)
        with torch.no_grad():
            for name in ("0.bias", "2.weight"):  # as AdamW decays
                twin[name] *= 1 - reference.param_groups[1]["lr"] * 0.05
        reference.step()
        rates.step()
        expected.append(info.loss)

    optimizer = EKFACOptimizer(
        net, loss, prepared(dict(net.named_parameters())), lr=0.2, damping=1e-2, nesterov=use_nesterov, **options
    )
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    found = []
    for batch in batches:
        optimizer.zero_grad()
        found.append(optimizer.step(batch))
        scheduler.step()
    close(torch.stack(found), torch.stack(expected))
    close_trees({name: p.detach() for name, p in net.named_parameters()}, {n: p.detach() for n, p in twin.items()})


def test_the_optimizer_resumes_with_the_same_bits() -> None:
    net, loss, batches = net_and_loss()
    start = {name: p.clone() for name, p in net.state_dict().items()}

    def made() -> EKFACOptimizer:
        return EKFACOptimizer(net, loss, lr=0.1, damping=1e-2, weight_decay=1e-3, basis_every=4)

    optimizer = made()
    for batch in batches:
        optimizer.step(batch)
    straight = {name: p.clone() for name, p in net.state_dict().items()}
    net.load_state_dict(start)
    optimizer = made()
    assert optimizer.state_dict()["ekfac"] is None
    for batch in batches[:3]:
        optimizer.step(batch)
    optimizer.damping = torch.tensor(1e-2)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for p in net.parameters():
        p.data.zero_()
    net.load_state_dict(saved["net"])
    again = made()
    again.load_state_dict(saved["optimizer"])
    assert again.damping == 1e-2
    assert again.damping is not saved["optimizer"]["damping"]
    for batch in batches[3:]:
        again.step(batch)
    same_bits(net.state_dict(), straight)
    with pytest.raises(ValueError, match=r"state_dict has no 'ekfac'.*EKFACOptimizer.state_dict"):
        again.load_state_dict(torch.optim.SGD(net.parameters(), 0.1).state_dict())
    with pytest.raises(ValueError, match="state_dict has no 'ekfac'"):
        again.load_state_dict(None)  # type: ignore[arg-type]


def test_the_optimizer_skips_compiles_and_takes_a_closure() -> None:
    net, loss, batches = net_and_loss()
    optimizer = EKFACOptimizer(net, loss, lr=0.1, damping=relative(0.1))
    optimizer.step(batches[0])
    before = [p.detach().clone() for p in net.parameters()]
    state = pytree.tree_map(torch.clone, [optimizer.state[p]["velocity"] for p in net.parameters()])
    x, y = batches[1]
    optimizer.step((x * math.nan, y))
    assert optimizer.info is not None
    assert optimizer.info.skipped
    same_bits([p.detach() for p in net.parameters()], before)
    same_bits([optimizer.state[p]["velocity"] for p in net.parameters()], state)

    def closure() -> Tensor:
        value = loss(net, batches[1])
        value.backward()
        return value.detach()

    close(optimizer.step(batches[1], closure), optimizer.info.loss)
    assert next(net.parameters()).grad is not None
    optimizer.zero_grad()
    assert next(net.parameters()).grad is None
    with NoHostRead():
        stale = EKFACOptimizer(net, loss, lr=0.1, damping=1e-2, basis_every=100)
        stale.ekfac_state = optimizer.ekfac_state
        stale.step(batches[2])
    twin, _, _ = net_and_loss()
    twin.load_state_dict(net.state_dict())
    other = EKFACOptimizer(twin, loss, lr=0.1, damping=relative(0.1))
    other.load_state_dict(optimizer.state_dict())
    other.precondition = torch.compile(other.precondition, fullgraph=True, backend="eager")
    for batch in batches[2:]:
        optimizer.step(batch)
        other.step(batch)
    close_trees(list(twin.parameters()), list(net.parameters()), 1e-8)
    number = EKFACOptimizer(twin, loss, lr=0.1, damping=1e-2)
    with pytest.raises(ValueError, match=r"state_dict has a rule as damping, this optimizer 0.01: set .*damping"):
        number.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"state_dict has damping=0.01, this optimizer a rule"):
        optimizer.load_state_dict(number.state_dict())


def test_copies_of_the_optimizer_go_on_with_the_same_bits() -> None:
    net, _, batches = net_and_loss()
    optimizer = EKFACOptimizer(
        net, cross_entropy, lr=0.1, damping=1e-2, second_moment=averaged_intra_batch(0.9), basis_every=4
    )
    fresh = EKFACOptimizer(net, cross_entropy, lr=0.1, damping=1e-2)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # before the first step
    fresh = copy.deepcopy(fresh)
    assert fresh.step(batches[0]).isfinite()
    for batch in batches[:2]:
        optimizer.step(batch)
    twin, again = copy.deepcopy((net, optimizer))
    same_bits((again.natural, again.info), (optimizer.natural, optimizer.info))
    optimizer.step(batches[2])
    assert not torch.equal(twin[0].weight, net[0].weight)
    again.step(batches[2])
    same_bits(twin.state_dict(), net.state_dict())
    for estimator, refresh in ((averaged_intra_batch(0.9), qr()), (running_average(0.9), adaptive(0.1))):
        plain = EKFACOptimizer(
            net, cross_entropy, lr=0.1, damping=1e-2, second_moment=estimator, refresh=refresh, basis_every=2
        )
        plain.step(batches[3])
        twin, again = pickle.loads(pickle.dumps((net, plain)))
        for batch in batches[4:]:
            plain.step(batch)
            again.step(batch)
        same_bits(twin.state_dict(), net.state_dict())


def test_the_defaults_of_the_optimizer() -> None:
    """`optim.DEFAULTS` where no damping is given, and no others; they train, and can be pickled."""
    net, _, batches = net_and_loss()
    params = {name: p.detach().clone() for name, p in net.named_parameters()}

    step = ekfac(functional(net), **optim.DEFAULTS)
    natural = step.precondition(params, batches[0], step.init(params, batches[0]))[0]
    plain = EKFACOptimizer(net, cross_entropy, momentum=0.0)
    twin = pickle.loads(pickle.dumps(plain))
    first = plain.step(batches[0])
    assert twin.step(batches[0]) == first
    expected = {name: p - 0.0025 * natural[name] for name, p in params.items()}
    close_trees({name: p.detach() for name, p in net.named_parameters()}, expected)
    for _ in range(200):
        last = plain.step(batches[0])
    assert last < 0.97 * first
    assert EKFACOptimizer(net, cross_entropy, damping=0.1).options == {}
    rest = {key: value for key, value in optim.DEFAULTS.items() if key != "damping"}
    assert EKFACOptimizer(net, cross_entropy, exponent=-1.0).options == {**rest, "exponent": -1.0}


def test_the_defaults_learn_rare_labels() -> None:
    """Batches without any may not outvote those with some: the loss ends below that of the best constant."""
    torch.manual_seed(0)
    x = torch.randn(6000, 20)
    y = (x[:, :2].sum(1) > 3.2).float()
    net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0))
    optimizer = EKFACOptimizer(net, lambda model, batch: F.binary_cross_entropy_with_logits(model(batch[0]), batch[1]))
    for ids in torch.randint(6000, (120, 64)):
        optimizer.step((x[ids], y[ids]))
    best = F.binary_cross_entropy(y.mean().expand_as(y), y)
    assert F.binary_cross_entropy_with_logits(net(x), y) < 0.9 * best


def test_the_optimizer_leaves_frozen_parameters_and_takes_thawed_and_added_ones() -> None:
    net, loss, batches = net_and_loss()
    net[0].weight.requires_grad_(False)
    optimizer = EKFACOptimizer(net, loss, list(net[0].parameters()), lr=0.1, damping=1e-2, weight_decay=0.1)

    def moved(batch: Any) -> set[str]:
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        twin = EKFACOptimizer(copy.deepcopy(net), loss, lr=0.1, damping=1e-2)
        optimizer.step(batch)
        twin.step(batch)
        assert optimizer.natural is not None
        assert optimizer.ekfac_state is not None
        if len(optimizer.param_groups) == 2 and optimizer.ekfac_state.step == 1:  # anew, so a basis of this batch
            close_trees(optimizer.natural, twin.natural)
        return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}

    assert moved(batches[0]) == moved(batches[1]) == {"0.bias"}
    net[0].weight.requires_grad_(True)
    assert moved(batches[2]) == {"0.weight", "0.bias"}
    optimizer.add_param_group({"params": net[2].parameters()})
    assert moved(batches[3]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert optimizer.ekfac_state is not None
    assert optimizer.ekfac_state.step == 1
    resumed = EKFACOptimizer(net, loss, [{"params": group["params"]} for group in optimizer.param_groups], damping=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    net[2].bias.requires_grad_(False)
    assert moved(batches[4]) == {"0.weight", "0.bias", "2.weight"}
    resumed.step(batches[4])  # knows what the saved state is of
    assert resumed.ekfac_state is not None
    assert resumed.ekfac_state.step == 1


def test_a_state_that_does_not_fit_says_how_to_start_anew() -> None:
    net, loss, batches = net_and_loss()
    optimizer = EKFACOptimizer(net, loss, lr=0.1, damping=1e-2)
    optimizer.step(batches[0])
    net.float()
    batch = batches[1][0].float(), batches[1][1]
    message = (
        r"state has a second moment of dtype torch\.float64 for the layer '0\.weight', params of dtype torch\.float32"
    )
    with pytest.raises(TypeError, match=message) as raised:
        optimizer.step(batch)
    assert raised.value.__notes__ == ["The state is that of the optimizer: set its ekfac_state to None to start anew."]
    optimizer.ekfac_state = None
    before = [p.clone() for p in net.parameters()]
    optimizer.step(batch)
    assert all((p != old).any() and p.dtype is torch.float32 for p, old in zip(net.parameters(), before, strict=True))


def test_all_parameters_of_the_model_are_in_the_groups_by_default() -> None:
    net, loss, batches = net_and_loss()
    net[0].requires_grad_(False)
    optimizer = EKFACOptimizer(net, loss, lr=0.1, damping=1e-2)
    optimizer.step(batches[0])
    net[0].requires_grad_(True)
    before = net[0].weight.detach().clone()
    optimizer.step(batches[1])
    assert not torch.equal(net[0].weight, before)


class Shared(nn.Module):
    """Modules that stand in several places, and a buffer that is assigned anew."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList([self.first, self.first])
        self.norm = self.same = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)
        self.tied = nn.Linear(4, 3)
        self.tied.weight = self.head.weight
        self.scale = self.again = nn.Parameter(torch.full((4,), 1.5))
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + x.detach().mean(0)
        for layer in self.layers:
            x = layer(x).tanh()
        x = self.norm(x * self.scale).sin() * self.again
        return self.head(x) + self.tied(x).tanh()


def each_loss(model: Any, batch: Any) -> Tensor:
    """Of a whole batch, `[n]`."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def steps_as_plain_training(optimizer: EKFACOptimizer, batches: Any) -> None:
    """Gradients and buffers of steps, with `batched=True`, against `backward` on a copy."""
    net = optimizer.model
    for batch in batches:
        plain = copy.deepcopy(net)
        each_loss(plain, batch).mean().backward()
        optimizer.step(batch)
        assert optimizer.info is not None
        close_trees(optimizer.info.gradient, {name: p.grad for name, p in plain.named_parameters()})
        close_trees(dict(net.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_modules_in_several_places_and_assigned_buffers(compiled: bool) -> None:
    """`functional_call` by itself leaves a module that it meets twice without its parameters."""
    net = Shared()
    _, _, batches = net_and_loss()
    optimizer = EKFACOptimizer(net, each_loss, lr=0.1, damping=1e-2, batched=True)
    if compiled:
        optimizer.precondition = torch.compile(optimizer.precondition, fullgraph=True, backend="eager")
    parameters = dict(net.named_parameters())
    for batch in batches[:2]:
        steps_as_plain_training(optimizer, [batch])
        assert all(p is parameters[name] for name, p in net.named_parameters())
    assert EKFACOptimizer(net, each_loss).param_groups[0]["params"] == list(parameters.values())


class Weighted(nn.Module):
    """A loss that is a module, with a parameter of its own that nothing trains, and buffers."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.inner = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), reduction=reduction)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, model: Any, batch: Any) -> Tensor:
        found: Tensor = self.inner(model(batch[0]) * self.temperature, batch[1])
        return found


@pytest.mark.parametrize("batched", [False, True])
def test_a_loss_that_is_a_module(batched: bool) -> None:
    net, _, batches = net_and_loss()
    loss = Weighted("none" if batched else "sum")
    plain = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    total = Weighted("sum")(lambda x: functional_call(net, plain, (x,)), batches[0])
    expected = torch.autograd.grad(total / len(batches[0][0]), list(plain.values()))
    optimizer = EKFACOptimizer(net, loss, lr=0.1, damping=1e-2, batched=batched)
    close(optimizer.step(batches[0]), total.detach() / len(batches[0][0]))
    assert optimizer.info is not None
    close_trees(optimizer.info.gradient, dict(zip(plain, expected, strict=True)))
    assert loss.temperature == 2


def test_the_optimizer_takes_the_batch_as_it_is() -> None:
    """BatchNorm in training mode: the functional step, and the running statistics of plain training."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    _, loss, batches = net_and_loss()

    def losses_fn(params: Params, batch: Any) -> Tensor:
        buffers = {name: b.clone() for name, b in net.named_buffers()}
        return F.cross_entropy(functional_call(net, {**params, **buffers}, (batch[0],)), batch[1], reduction="none")

    with pytest.raises(ValueError, match="batched=True"):
        EKFACOptimizer(net, loss, lr=0.1, damping=1e-2).step(batches[0])
    optimizer = EKFACOptimizer(net, each_loss, lr=0.1, damping=1e-2, batched=True)
    step = ekfac(losses_fn, damping=1e-2, batched=True)
    for batch in batches[:2]:
        params = {name: p.detach().clone() for name, p in net.named_parameters()}
        expected, _, info = step.precondition(params, batch, step.init(params, batch))
        plain = copy.deepcopy(net)
        plain(batch[0])
        close(optimizer.step(batch), info.loss)
        assert optimizer.natural is not None
        close_trees(optimizer.natural, expected)
        close_trees(dict(net.named_buffers()), dict(plain.named_buffers()))
    before = {name: b.clone() for name, b in net.named_buffers()}
    optimizer.step((batches[2][0] * math.nan, batches[2][1]))
    same_bits(dict(net.named_buffers()), before)


def test_a_norm_by_power_iterations() -> None:
    """Whose vectors change in place after products with the weight, which no gradient needs."""
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    _, _, batches = net_and_loss()
    steps_as_plain_training(EKFACOptimizer(net, each_loss, damping=0.1, batched=True), batches)


def test_a_step_without_a_parameter_to_train() -> None:
    net, loss, batches = net_and_loss()
    with pytest.raises(ValueError, match="no parameter of the groups requires gradients: unfreeze some"):
        EKFACOptimizer(net.requires_grad_(False), loss).step(batches[0])


def test_the_optimizer_takes_what_a_collator_gives() -> None:
    net, _, batches = net_and_loss()
    optimizer = EKFACOptimizer(net, lambda m, b: F.cross_entropy(m(b["x"]), b["y"]), lr=0.1, damping=1e-2)
    tree = dict(zip("xy", batches[0], strict=True))
    first = optimizer.step(tree)
    assert optimizer.step(UserDict(tree)) < first
    optimizer.check(UserDict(tree))
    assert len(optimizer.describe(UserDict(tree))) == len(optimizer.describe(tree))


def test_a_gradient_scaler_changes_nothing() -> None:
    net, loss, batches = net_and_loss()
    twin = copy.deepcopy(net)
    scaled, plain = (EKFACOptimizer(model, loss, lr=0.1, damping=1e-2) for model in (net, twin))
    scaler = torch.amp.GradScaler("cpu")
    for batch in batches[:3]:
        scaled.zero_grad()
        scaler.scale(loss(net, batch)).backward()
        scaler.step(scaled, batch)
        scaler.update()
        plain.step(batch)
    same_bits(net.state_dict(), twin.state_dict())


def test_a_scaled_loss() -> None:
    """The natural gradient of S times the loss, with S^2 times the damping, is 1 / S of the loss's."""
    net, _, batches = net_and_loss()
    loss_fn, params = functional(net), dict(net.named_parameters())
    step = ekfac(loss_fn, damping=1e-2)
    loud = ekfac(lambda p, e: 65536 * loss_fn(p, e), damping=65536**2 * 1e-2)
    expected, _, _ = step.precondition(params, batches[0], step.init(params, batches[0]))
    found, _, _ = loud.precondition(params, batches[0], loud.init(params, batches[0]))
    close_trees(scaled(found, 65536), expected, 1e-8)


def test_errors_of_the_optimizer() -> None:
    net, loss, batches = net_and_loss()
    with pytest.raises(ValueError, match=r"lr=-0.1.*at least 0"):
        EKFACOptimizer(net, loss, lr=-0.1, damping=1e-2)
    with pytest.raises(TypeError, match=r"model is a generator.*module"):
        EKFACOptimizer(net.parameters(), loss)
    with pytest.raises(TypeError, match=r"params is a float.*lr by name"):
        EKFACOptimizer(net, loss, 0.01)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"loss is a CrossEntropyLoss.*\(model, batch\)"):
        EKFACOptimizer(net, nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"loss is cross_entropy: pass a function \(model, batch\)"):
        EKFACOptimizer(net, F.cross_entropy)
    with pytest.raises(TypeError, match=r"batch is a function.*step\(batch, closure\)"):
        EKFACOptimizer(net, loss).step(lambda: None)
    with pytest.raises(TypeError, match=r"params is a EKFACOptimizer: pass the module"):
        set_grads(EKFACOptimizer(net, loss), {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"closure is a Tensor.*step\(\(x, y\)\)"):
        EKFACOptimizer(net, loss).step(*batches[0])
    with pytest.raises(ValueError, match=r"momentum=-1.*0 <= momentum < 1"):
        EKFACOptimizer(net, loss, lr=0.1, momentum=-1.0, damping=1e-2)
    with pytest.raises(ValueError, match=r"shape \(2,\).*no parameter of model"):
        EKFACOptimizer(net, loss, [torch.ones(2, requires_grad=True)], lr=0.1, damping=1e-2)
    with pytest.raises(ValueError, match=r"damping=-1.*positive"):
        EKFACOptimizer(net, loss, lr=0.1, damping=-1.0)
    with pytest.raises(TypeError, match=r"loss is a NoneType.*\(model, batch\)"):
        EKFACOptimizer(net, None, lr=0.1, damping=1.0)  # type: ignore[arg-type]
    optimizer = EKFACOptimizer(net, loss, net[0].parameters(), lr=0.1, damping=1.0)
    for wrong, message in (
        ({"lr": -1.0}, r"lr=-1.0.*at least 0"),
        ({"momentum": 1.5}, r"momentum=1.5.*0 <= momentum < 1"),
        ({"weight_decay": -1.0}, r"weight_decay=-1.0.*at least 0"),
        ({"damping": 0.1}, r"group of params has 'damping'.*beside params"),
        ({"params": [torch.ones(2, requires_grad=True)]}, r"shape \(2,\).*no parameter of model"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": net[2].parameters(), **wrong})
        assert len(optimizer.param_groups) == 1
    optimizer.step(batches[0])
    before = optimizer.ekfac_state
    wrapped = EKFACOptimizer(nn.Sequential(net), loss, net[0].parameters(), lr=0.1, damping=1.0)
    wrapped.step(batches[0])
    with pytest.raises(ValueError, match=r"a model with \{'0.0.*\(6, 4\).*this one \{'0.w.*names and shapes"):
        optimizer.load_state_dict(wrapped.state_dict())
    assert optimizer.ekfac_state is before
    whole = EKFACOptimizer(net, loss)
    net[0], net[2] = net[2], net[0]
    for call in (whole.step, whole.describe, whole.check):
        with pytest.raises(RuntimeError, match=r"has them elsewhere.*make it anew"):
            call(batches[0])
    net[0], net[2] = net[2], net[0]
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    late = EKFACOptimizer(tied, loss)
    late.step(batches[0])
    tied.append(nn.Linear(4, 4, bias=False))
    tied[2].weight = tied[0].weight  # one more place of a parameter that it has
    with pytest.raises(RuntimeError, match=r"has them elsewhere.*make it anew"):
        late.step(batches[0])
    with pytest.raises(TypeError, match=r"options has 'basis_evry'.*ekfac does not take"):
        EKFACOptimizer(net, loss, lr=0.1, damping=1.0, basis_evry=3)


def test_the_optimizer_describes_and_certifies_itself(capsys: pytest.CaptureFixture[str]) -> None:
    net, loss, batches = net_and_loss()
    optimizer = EKFACOptimizer(net, loss, net[0].parameters(), bases={"*": rank(2)})
    rows = optimizer.describe(batches[0])
    assert [(row.name, row.bias, row.rule) for row in rows] == [("0.weight", "0.bias", "linear")]
    assert str(rows) in capsys.readouterr().out
    with torch.no_grad():
        optimizer.check(batches[0])

    def coupled(model: Any, batch: Any) -> Tensor:
        z = model(batch[0])
        return F.cross_entropy(z - z.mean(0), batch[1], reduction="none")

    with pytest.raises(ValueError, match=r"0\.weight"):
        EKFACOptimizer(net, coupled, batched=True).check(batches[0])
    assert EKFACOptimizer(net, coupled, batched=True).describe(batches[0])[0].rule == "linear"
    assert optimizer.ekfac_state is None


def dense_curvature(state: Any, weight: str, power: Callable[[Tensor], Tensor]) -> Tensor:
    """The layer's `Q f(m2) Q^T` as a matrix on the flattened `[o i]`, with one block and one offset."""
    basis, m2 = state.bases[weight], state.second_moments[weight].value
    Q = torch.kron(basis.Q_B[0].contiguous(), basis.Q_A[0].contiguous())
    return Q @ torch.diag(power(m2[0, :, :, 0].flatten())) @ Q.T


LINEAR = Layer("weight", "bias", (1, 3, 5, 1), (3, 4), (0, 1), (3, 4), (3,))


@pytest.mark.parametrize("exponent", [-1.0, -0.5, -0.75])
def test_exponents(exponent: float) -> None:
    """Against dense matrix powers and a loop over the examples."""
    case = make("linear")
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2, exponent=exponent)
    natural, state, _ = step.precondition(case.params, batch, step.init(case.params, batch))
    gradient = blocks(loop(case.loss_fn, case.params, batch)[1], LINEAR).mean(0).flatten()
    C = dense_curvature(state, "weight", lambda m2: m2 + 1e-2)
    values, vectors = torch.linalg.eigh(C)
    expected = (vectors @ (values**exponent * (vectors.T @ gradient))).reshape(3, 5)
    close(natural["weight"], expected[:, :-1], 1e-8)
    close(natural["bias"], expected[:, -1], 1e-8)


@pytest.mark.parametrize("estimator", [intra_batch, averaged_intra_batch(0.5), running_average(0.9), kfac])
@pytest.mark.parametrize("scope", [each, together])
def test_relative_damping(estimator: Any, scope: Any) -> None:
    case = make("conv groups")
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=relative(0.3, scope), second_moment=estimator)
    initial = step.init(case.params, batch)
    natural, state, info = step.precondition(case.params, batch, initial)
    values = {name: moment.value for name, moment in state.second_moments.items()}
    whole = torch.cat([m2.flatten() for m2 in values.values()]).mean()
    for k, m2 in enumerate(values.values()):
        close(info.damping[k], 0.3 * (m2.mean() if scope is each else whole), TIGHT)
    if scope is together:
        again, _, _ = ekfac(case.loss_fn, damping=info.damping[0], second_moment=estimator).precondition(
            case.params, batch, initial
        )
        close_trees(natural, again)
    louder = ekfac(lambda p, e: 7 * case.loss_fn(p, e), damping=relative(0.3, scope), second_moment=estimator)
    close_trees(scaled(louder.precondition(case.params, batch, initial)[0], 7), natural, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relative_damping_of_a_dead_layer_of_some_rank(dtype: torch.dtype) -> None:
    """Whose samples are times the inverse of the least damping."""
    params = {name: torch.randn(30, 30, dtype=dtype) for name in ("w", "dead", "v")}

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        h = F.linear(x, params["w"]).relu()
        return F.linear(h + (F.linear(h, params["dead"]) - 1e6).relu(), params["v"]).square().mean()

    batch = 10 * torch.randn(6, 30, dtype=dtype)
    step = ekfac(loss_fn, damping=relative(0.1), bases={"*": rank(8)})
    natural, _, info = step.precondition(params, batch, step.init(params, batch))
    assert not info.skipped
    assert natural["w"].any()
    assert not natural["dead"].any()


def test_the_cosine_of_small_gradients() -> None:
    small = {"w": torch.full((4,), 1e-12, dtype=torch.float32)}
    step = ekfac(lambda p, x: 1e-12 * (p["w"] * x).sum(), damping=1.0)
    natural, state, info = step.precondition(small, torch.ones(3, 4), step.init(small, torch.ones(3, 4)))
    close(metrics(natural, info, state)["cosine"].double(), torch.ones(()), 1e-5)


def test_relative_damping_of_a_layer_without_gradients() -> None:
    case = make("unused")
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=relative(0.1))
    natural, _, info = step.precondition(case.params, batch, step.init(case.params, batch))
    assert not info.skipped
    assert natural["v"].abs().max() == 0
    assert natural["w"].abs().max() > 0


@pytest.mark.parametrize("exponent", [-0.5, -1.0, -2.0])
def test_relative_damping_of_a_layer_whose_gradients_come_later(exponent: float) -> None:
    """The first factor of a LoRA, behind one of zeros: the mean of all layers, and 1 where no layer has gradients."""
    shapes = {"w": (4, 3), "a": (2, 4), "b": (3, 2)}
    params = {name: torch.randn(shape, dtype=torch.float32) for name, shape in shapes.items()}
    params["b"] = torch.zeros(3, 2, dtype=torch.float32)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        h = F.linear(x, params["w"])
        return (h[:3] + F.linear(F.linear(h, params["a"]), params["b"])).cos().sum()

    batch = torch.randn(N, 3, dtype=torch.float32)
    step = ekfac(loss_fn, damping=relative(0.1), exponent=exponent, moment_every=10, basis_every=10)
    natural, state, info = step.precondition(params, batch, step.init(params, batch))
    means = {name: moment.value.mean() for name, moment in state.second_moments.items()}
    whole = sum(moment.value.sum() for moment in state.second_moments.values()) / sum(
        p.numel() for p in params.values()
    )
    assert means["a"] == 0
    close(
        info.damping,
        0.1 * torch.stack([torch.as_tensor(whole if name == "a" else means[name]) for name in params]),
        1e-5,
    )
    assert not info.skipped
    assert not natural["a"].any()
    later, _, info = step.precondition(params | {"b": torch.randn(3, 2).float()}, batch, state)
    assert later["a"].abs().max() <= 1.01 * info.gradient["a"].norm() * (0.1 * whole) ** exponent
    silent = ekfac(lambda p, x: 0 * loss_fn(p, x), damping=relative(0.1), exponent=exponent)
    natural, _, info = silent.precondition(params, batch, silent.init(params, batch))
    assert not info.skipped
    assert (info.damping == 0.1).all()
    assert not any(d.any() for d in natural.values())


def test_relative_damping_is_no_less_than_a_dtype_can_be_divided_by() -> None:
    """A layer of float32 beside one of float64."""
    params = {"w": torch.randn(3, 4, dtype=torch.float32), "v": torch.randn(3, 3)}

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        small = 1e-22 * F.linear(x.float(), params["w"]).cos().sum()
        return small.double() + F.linear(x[:3], params["v"]).cos().sum()

    batch = torch.randn(5, 4)
    step = ekfac(loss_fn, damping=relative(0.01), exponent=-0.5)
    natural, _, info = step.precondition(params, batch, step.init(params, batch))
    assert not info.skipped
    assert natural["w"].any()


def test_a_damping_rule_of_ones_own() -> None:
    case = make("mlp")
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=lambda moments: {"0.weight": torch.tensor(0.1)})
    with pytest.raises(ValueError, match=r"no number for the layer '2.weight'.*one for each name"):
        step.precondition(case.params, batch, step.init(case.params, batch))
    wrong: tuple[tuple[Any, Any, str], ...] = (
        ({"0.weight": 0.1, "2.weight": -1.0}, ValueError, r"damping of '2.weight'=-1.0.*positive"),
        ({"0.weight": 0.1, "2.weight": torch.ones(3)}, ValueError, r"damping of '2.weight' has shape \(3,\)"),
        (None, TypeError, "gave a NoneType.*a dict"),
    )
    for given, error, message in wrong:
        step = ekfac(case.loss_fn, damping=functools.partial(lambda given, moments: given, given))
        with pytest.raises(error, match=message):
            step.precondition(case.params, batch, step.init(case.params, batch))
    numbers: dict[str, Any] = {"0.weight": 0.1, "2.weight": 2.0}
    initial = step.init(case.params, batch)
    found, _, info = ekfac(case.loss_fn, damping=lambda moments: numbers).precondition(case.params, batch, initial)
    close(info.damping, torch.tensor([0.1, 2.0]))
    for name, damping in numbers.items():  # each as if it were alone
        alone, _, _ = ekfac(case.loss_fn, damping=damping).precondition(case.params, batch, initial)
        close(found[name], alone[name])
    with pytest.raises(ValueError, match=r"exponent=0.5.*negative"):
        ekfac(case.loss_fn, damping=1.0, exponent=0.5)


def test_levenberg_marquardt() -> None:
    def after(actual: float, predicted: float, damping: float = 2.0, **options: Any) -> float:
        return float(levenberg_marquardt(*map(torch.tensor, (damping, actual, predicted)), **options))

    factor = 0.95**5
    assert after(0.8, 1.0) == 2 * factor
    assert after(0.75, 1.0) == after(0.25, 1.0) == 2
    assert after(0.2, 1.0) == after(-3.0, 1.0) == 2 / factor
    assert after(math.nan, 1.0) == after(-math.inf, 1.0) == after(math.inf, 1.0) == 2 / factor
    assert after(1.0, 0.0) == after(1.0, -1.0) == after(1.0, math.nan) == 2
    assert after(1.0, 1.0, 2.0, factor=0.5) == 1
    assert after(1.0, 1.0, 2.0, factor=0.5, smallest=1.5) == 1.5
    assert after(0.0, 1.0, 2.0, factor=0.5, largest=3.0) == 3


def test_the_predicted_decrease() -> None:
    """Against the dense quadratic model, and with the exact second moment against a loop."""
    case = make("linear")
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2)
    natural, state, info = step.precondition(case.params, batch, step.init(case.params, batch))
    updates = scaled(natural, -0.3)
    _, gradients = loop(case.loss_fn, case.params, batch)
    G = blocks(gradients, LINEAR).flatten(1)
    delta = blocks({name: u[None] for name, u in updates.items()}, LINEAR).flatten()
    C = dense_curvature(state, "weight", lambda m2: m2 + 1e-2)
    quadratic = preconditioned_quadratic(natural, info.gradient, 0.3)
    close(quadratic, delta @ C @ delta, 1e-8)
    found = predicted_decrease(updates, info.gradient, quadratic)
    close(found, -(G.mean(0) @ delta) - delta @ C @ delta / 2, 1e-8)
    assert found > 0
    exact = fisher_quadratic(case.loss_fn, case.params, batch, updates, 1e-2)
    with pytest.raises(ValueError, match=r"updates has no 'weight', gradient has"):
        predicted_decrease({"bias": updates["bias"]}, info.gradient, quadratic)
    with pytest.raises(ValueError, match=r"updates\['bias'\] has shape \(3, 1\)"):
        fisher_quadratic(case.loss_fn, case.params, batch, {**updates, "bias": updates["bias"][:, None]}, 1e-2)
    with pytest.raises(ValueError, match=r"damping has shape \(2,\).*0-d"):
        fisher_quadratic(case.loss_fn, case.params, batch, updates, torch.ones(2))
    with pytest.raises(ValueError, match=r"loss_fn returned a tensor of shape \(1,\)"):
        fisher_quadratic(lambda p, e: case.loss_fn(p, e)[None], case.params, batch, updates, 0.0)
    with pytest.raises(ValueError, match="give every tensor the same leading size"):
        fisher_quadratic(case.loss_fn, case.params, (batch[0], batch[1][:2]), updates, 0.0)
    close(exact, delta @ (G.T @ G / N + 1e-2 * torch.eye(15)) @ delta, 1e-8)


@pytest.mark.slow
def test_adaptive_damping_inside_a_compiled_step() -> None:
    net, _, batches = net_and_loss()
    loss_fn, counted = functional(net), []

    def step(params: Params, state: Any, damping: Tensor, batch: Any) -> Any:
        natural, state, info = ekfac(loss_fn, damping=damping, basis_every=3).precondition(params, batch, state)
        new = apply_updates(params, scaled(natural, -0.5))
        predicted = predicted_decrease(
            scaled(natural, -0.5), info.gradient, preconditioned_quadratic(natural, info.gradient, 0.5)
        )
        after = torch.vmap(loss_fn, in_dims=(None, 0))(new, batch).mean()
        return new, state, levenberg_marquardt(damping, info.loss - after, predicted), info

    params = {name: p.detach() for name, p in net.named_parameters()}
    fast = torch.compile(step, fullgraph=True, backend="eager")
    slow_carried = carried = (params, ekfac(loss_fn, damping=1.0).init(params, batches[0]), torch.tensor(1.0))
    counters.clear()
    for _ in range(2):
        for batch in batches:
            carried, slow_carried = fast(*carried, batch)[:3], step(*slow_carried, batch)[:3]
            counted.append(float(carried[2]))
    close_trees(carried[0], slow_carried[0], 1e-7)
    assert counters["stats"]["unique_graphs"] <= 3
    assert len(set(counted)) > 2


def test_metrics() -> None:
    case = make("conv groups")
    batch = case.batch(N)
    for damping in (0.05, relative(0.1)):
        step = ekfac(case.loss_fn, damping=damping)
        natural, state, info = step.precondition(case.params, batch, step.init(case.params, batch))
        with NoHostRead():
            found = metrics(natural, info, state, learning_rate=0.5)
        assert all(isinstance(value, Tensor) and value.dim() == 0 for value in found.values())
        losses, gradients = loop(case.loss_fn, case.params, batch)
        flat = torch.cat([g.mean(0).flatten() for g in gradients.values()])
        direction = torch.cat([natural[name].flatten() for name in gradients])
        close(found["loss"], losses.mean())
        close(found["gradient_norm"], flat.norm())
        close(found["natural_norm"], direction.norm())
        close(found["cosine"], F.cosine_similarity(flat, direction, dim=0))
        close(found["kl"], 0.125 * flat @ direction)
        assert found["skipped"] == found["kept_bases"] == 0
        assert "refresh" not in found
        for k, (name, moment) in enumerate(state.second_moments.items()):
            used = info.damping if info.damping.dim() == 0 else info.damping[k]
            close(found["damping" if info.damping.dim() == 0 else f"damping/{name}"], used)
            m2 = moment.value.flatten()
            entropy = torch.distributions.Categorical(probs=m2).entropy()
            close(found[f"effective_rank/{name}"], entropy.exp(), 1e-8)
            assert 1 <= found[f"effective_rank/{name}"] <= len(m2)
            close(found[f"condition/{name}"], torch.linalg.cond(torch.diag(m2 + used)), 1e-8)
    fast = torch.compile(metrics, fullgraph=True, backend="aot_eager")
    close_trees(fast(natural, info, state), metrics(natural, info, state))


def test_condition_does_not_count_what_fills_up_a_block() -> None:
    params, batch = {"w": torch.randn(3, 5)}, torch.randn(20, 5)
    step = ekfac(lambda p, x: (p["w"] @ x).sin().square().sum(), damping=1e-3, bases={"*": Blocks(2, 2)})
    natural, state, info = step.precondition(params, batch, step.init(params, batch))
    values = curvature(state).eigenvalues()["w"] + 1e-3
    assert state.second_moments["w"].value.numel() == 24
    assert len(values) == 15
    close(metrics(natural, info, state)["condition/w"], values.max() / values.min())


def test_metrics_of_a_first_step_that_was_skipped() -> None:
    case = make("mlp")
    x, y = case.batch(N)
    step = ekfac(case.loss_fn, damping=relative(0.1), second_moment=kfac)
    natural, state, info = step.precondition(case.params, (x * math.nan, y), step.init(case.params, (x, y)))
    found = metrics(natural, info, state)
    assert found["skipped"] == 1
    assert found["natural_norm"] == found["effective_rank/0.weight"] == 0


def test_metrics_of_what_is_not_of_a_step() -> None:
    case = make("mlp")
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=0.1)
    natural, state, info = step.precondition(case.params, batch, step.init(case.params, batch))
    with pytest.raises(TypeError, match="info is a State: give natural, info and state, in this order"):
        metrics(natural, state, info)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state is a NoneType: give natural, info and state"):
        metrics(natural, info, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="learning_rate is a function"):
        metrics(natural, info, state, learning_rate=cosine(0.1, 10))  # type: ignore[arg-type]


def test_metrics_tell_a_refresh() -> None:
    case = make("mlp")
    x, y = case.batch(N)
    step = ekfac(case.loss_fn, damping=0.1, basis_every=3)
    state, found = step.init(case.params, (x, y)), []
    for t in range(7):
        natural, state, info = step.precondition(case.params, (x * math.nan if t == 3 else x, y), state)
        found.append(float(metrics(natural, info, state, basis_every=3)["refresh"]))
    assert found == [1, 0, 0, 0, 0, 0, 1]  # that of step 3 was skipped
    step = ekfac(case.loss_fn, damping=0.1, basis_every=3, refresh=staggered(2))
    state, found, changed = step.init(case.params, (x, y)), [], []
    for _ in range(6):
        old = state
        natural, state, info = step.precondition(case.params, case.batch(N), state)
        found.append(float(metrics(natural, info, state, basis_every=3, refresh=staggered(2))["refresh"]))
        pairs = zip(pytree.tree_leaves(state.bases), pytree.tree_leaves(old.bases), strict=True)
        changed.append(float(any(not torch.equal(Q, old_Q) for Q, old_Q in pairs)))
    assert found == changed == [1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize("estimator", [intra_batch, averaged_intra_batch(0.9), running_average(0.9), kfac])
def test_the_clocks_of_moment_and_basis(estimator: Any) -> None:
    """Steps 0 to 6: bases at 0, 3, 6, moments also at 2 and 4; in between against the dense inverse."""
    case = make("linear")
    slow = ekfac(case.loss_fn, damping=1e-2, second_moment=estimator, basis_every=3, moment_every=2)
    always = ekfac(case.loss_fn, damping=1e-2, second_moment=estimator, basis_every=3)
    state = slow.init(case.params, case.batch(N))
    for t in range(7):
        batch = case.batch(N)
        natural, new, _ = slow.precondition(case.params, batch, state)
        if t in (1, 5):
            same_bits(pytree.tree_leaves(new), pytree.tree_leaves(state))
            G = blocks(loop(case.loss_fn, case.params, batch)[1], LINEAR)
            C = dense_curvature(state, "weight", lambda m2: m2 + 1e-2)
            expected = torch.linalg.solve(C, G.mean(0).flatten()).reshape(3, 5)
            close(natural["weight"], expected[:, :-1], 1e-8)
        else:
            same_bits((natural, new), always.precondition(case.params, batch, state)[:2])
        assert new.step == t + 1
        state = new
    with pytest.raises(ValueError, match=r"moment_every=0.*at least 1"):
        ekfac(case.loss_fn, damping=1.0, moment_every=0)


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


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_the_compiled_training_step(backend: str) -> None:
    """Schedule, capture, moment, refresh, rescale, clipping, momentum, decay, update, average and metrics at once."""
    net, _, batches = net_and_loss()
    loss_fn, optimizer, average = functional(net), full_chain(), exponential_average(0.9)
    options: dict[str, Any] = {"basis_every": 3, "moment_every": 2, "second_moment": averaged_intra_batch(0.9)}
    method = ekfac(loss_fn, damping=relative(0.3), **options)

    def step(params: Params, opt_state: Any, state: Any, mean: Any, batch: Any) -> Any:
        natural, state, info = method.precondition(params, batch, state)
        updates, opt_state = optimizer.update(natural, opt_state, params, info)
        params = apply_updates(params, updates)
        _, mean = average.update(params, mean)
        return params, opt_state, state, mean, metrics(natural, info, state)

    params = {name: p.detach() for name, p in net.named_parameters()}
    first = (params, optimizer.init(params), method.init(params, batches[0]), average.init(params))
    carried: tuple[Any, Any, Any, Any] = first
    twin = carried
    counters.clear()
    fast = torch.compile(step, fullgraph=True, backend=backend)
    smaller = [] if backend == "eager" else [(x[:13], y[:13]) for x, y in batches]
    for batch in [*batches, *smaller]:
        found, expected = fast(*carried, batch), step(*twin, batch)
        carried, twin = found[:4], expected[:4]
        close_trees(carried[:2], twin[:2], 1e-7)
        close(found[4]["loss"], expected[4]["loss"], 1e-8)
    # the first step; a refresh, a moment alone, neither, for each size
    assert counters["stats"]["unique_graphs"] <= (7 if smaller else 4)
    x, y = batches[0]
    after = fast(*carried, (x * math.nan, y))
    assert after[4]["skipped"] == 1
    same_bits(after[:2], carried[:2])


def test_metrics_and_damping_leave_out_what_fills_up_a_block() -> None:
    params = {"w": torch.randn(6, 5)}
    batch = torch.randn(8, 5)
    dampings: list[Any] = []

    def seen(moments: Any) -> Any:
        dampings.append(relative(1.0)(moments)["w"])
        return {"w": 1.0}

    def loss(p: Params, x: Tensor) -> Tensor:
        return F.linear(x, p["w"]).sin().sum()

    step = ekfac(loss, damping=seen, second_moment=kfac, basis_every=10, bases={"w": Blocks(inputs=3)})
    state = step.precondition(params, batch, step.init(params, batch))[1]
    ones = state.second_moments["w"]._replace(value=torch.ones(1, 6, 6, 1))
    state = dataclasses.replace(state, second_moments={"w": ones})
    natural, state, info = step.precondition(params, batch, state)
    close(dampings[-1], torch.tensor(1.0))
    close(metrics(natural, info, state)["effective_rank/w"], torch.tensor(30.0))


def test_a_model_that_holds_its_optimizer_can_be_copied() -> None:
    net, _, batches = net_and_loss()
    net.optimizer = EKFACOptimizer(net, cross_entropy, lr=0.1, damping=1e-2)
    net.optimizer.step(batches[0])
    copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    net.optimizer.step(batches[1])
    for twin in copies:
        twin.optimizer.step(batches[1])
        same_bits(twin.state_dict(), net.state_dict())


def test_a_first_group_without_parameters() -> None:
    net, _, batches = net_and_loss()
    one, other = (
        EKFACOptimizer(net, cross_entropy, [{"params": []}, {"params": list(net.parameters())}], lr=lr, damping=0.1)
        for lr in (0.1, 0.2)
    )
    one.step(batches[0])
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    same_bits(other.ekfac_state, one.ekfac_state)
    assert other.param_groups[1]["lr"] == 0.1


@pytest.mark.parametrize(("setting", "value"), [("momentum", 1.0), ("lr", -0.1), ("weight_decay", float("nan"))])
def test_a_setting_that_became_bad_is_refused_before_the_step(setting: str, value: float) -> None:
    net, _, batches = net_and_loss()
    optimizer = EKFACOptimizer(net, cross_entropy, [{"params": [p]} for p in net.parameters()], lr=0.1, damping=0.1)
    optimizer.step(batches[0])
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    optimizer.param_groups[1][setting] = value
    with pytest.raises(ValueError, match=f"{setting}="):
        optimizer.step(batches[1])
    optimizer.param_groups[1][setting] = before[1]["param_groups"][1][setting]
    same_bits((net.state_dict(), optimizer.state_dict()), before)


def test_a_scheduler_of_numpy_numbers() -> None:
    net, _, batches = net_and_loss()
    rates = np.linspace(1, 0.5, 3, dtype=np.float32)
    of_numpy: Any = rates.__getitem__
    found = []
    for factor in (of_numpy, lambda t: float(rates[t])):
        model = copy.deepcopy(net)
        optimizer = EKFACOptimizer(model, cross_entropy, lr=0.1, damping=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for batch in batches[:2]:
            optimizer.step(batch)
            scheduler.step()
        found.append(model.state_dict())
    close_trees(found[0], found[1], 1e-6)


def test_a_damping_that_rounds_to_zero_is_refused() -> None:
    params, batch = {"w": torch.randn(3, 4).float()}, torch.randn(N, 4).float()
    step = ekfac(lambda p, x: F.linear(x, p["w"]).cos().sum(), damping=1e-46)
    with pytest.raises(ValueError, match=r"damping=1e-46 is zero in the dtype of the moments"):
        step.precondition(params, batch, step.init(params, batch))


def test_parameters_that_require_gradients() -> None:
    """What is made of them does not, and so keeps no graph from step to step."""
    params = {"w": torch.randn(3, 4, requires_grad=True)}
    direction, batch = {"w": torch.ones(3, 4)}, torch.randn(N, 4)
    average = exponential_average(0.9)
    quadratic = fisher_quadratic(lambda p, x: F.linear(x, p["w"]).cos().sum(), params, batch, direction, 0.1)
    made = (
        quadratic,
        average.update(params, average.init(params)),
        weight_decay(0.1).update(direction, (), params, report(direction)),
    )
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(made))
    with pytest.raises(ValueError, match=r"state has no 'v', params has"):
        average.update({**params, "v": torch.ones(2)}, average.init(params))
