"""`EKFACOptimizer` and `set_grads`, against `torch.optim` on the same gradients."""

import copy
import io
import math
import pickle
from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ekfac_func import (
    EKFACOptimizer,
    adaptive,
    averaged_intra_batch,
    ekfac,
    optim,
    qr,
    rank,
    running_average,
    set_grads,
)
from ekfac_func.optim import relative
from ekfac_func.types import Params

from .oracles import close, close_trees, same_bits
from .test_optim import TIGHT, cross_entropy, functional, net_and_loss, run_torch
from .watching import NoHostRead


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


def test_options_that_are_set_afterwards_hold() -> None:
    net, _, batches = net_and_loss()
    twin = copy.deepcopy(net)
    later = EKFACOptimizer(net, cross_entropy, damping=0.1)
    at_once = EKFACOptimizer(twin, cross_entropy, damping=0.1, exponent=-0.5)
    later.options["exponent"] = -0.5
    for batch in batches[:2]:
        later.step(batch)
        at_once.step(batch)
    same_bits(net.state_dict(), twin.state_dict())


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
