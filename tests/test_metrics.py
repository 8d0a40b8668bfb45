"""What `metrics` says of a step, against formulas of its own."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ekfac_func import Blocks, curvature, ekfac, kfac, staggered
from ekfac_func.optim import cosine, metrics, relative
from ekfac_func.types import Params

from .cases import N, make
from .oracles import close, close_trees, loop
from .watching import NoHostRead


def test_the_cosine_of_small_gradients() -> None:
    small = {"w": torch.full((4,), 1e-12, dtype=torch.float32)}
    step = ekfac(lambda p, x: 1e-12 * (p["w"] * x).sum(), damping=1.0)
    natural, state, info = step.precondition(small, torch.ones(3, 4), step.init(small, torch.ones(3, 4)))
    close(metrics(natural, info, state)["cosine"].double(), torch.ones(()), 1e-5)


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
