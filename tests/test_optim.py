"""Transforms, schedules and averages of `optim`, each against a formula of its own or `torch.optim`."""

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ekfac_func import averaged_intra_batch, ekfac
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
    relative,
    together,
    warm_up,
    weight_decay,
)
from ekfac_func.types import Info, Params

from .cases import N
from .oracles import close, close_trees, same_bits

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
