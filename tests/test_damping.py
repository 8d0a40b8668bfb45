"""Damping rules, exponents and the predicted decrease, against dense matrices, and how often a moment is made."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from ekfac_func import averaged_intra_batch, ekfac, intra_batch, kfac, rank, running_average
from ekfac_func.optim import (
    apply_updates,
    each,
    fisher_quadratic,
    levenberg_marquardt,
    preconditioned_quadratic,
    predicted_decrease,
    relative,
    together,
)
from ekfac_func.types import Layer, Params

from .cases import N, make
from .oracles import blocks, close, close_trees, loop, same_bits
from .test_optim import TIGHT, functional, net_and_loss, scaled


def test_a_scaled_loss() -> None:
    """The natural gradient of S times the loss, with S^2 times the damping, is 1 / S of the loss's."""
    net, _, batches = net_and_loss()
    loss_fn, params = functional(net), dict(net.named_parameters())
    step = ekfac(loss_fn, damping=1e-2)
    loud = ekfac(lambda p, e: 65536 * loss_fn(p, e), damping=65536**2 * 1e-2)
    expected, _, _ = step.precondition(params, batches[0], step.init(params, batches[0]))
    found, _, _ = loud.precondition(params, batches[0], loud.init(params, batches[0]))
    close_trees(scaled(found, 65536), expected, 1e-8)


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


def test_a_damping_that_rounds_to_zero_is_refused() -> None:
    params, batch = {"w": torch.randn(3, 4).float()}, torch.randn(N, 4).float()
    step = ekfac(lambda p, x: F.linear(x, p["w"]).cos().sum(), damping=1e-46)
    with pytest.raises(ValueError, match=r"damping=1e-46 is zero in the dtype of the moments"):
        step.precondition(params, batch, step.init(params, batch))
