"""Captured per-example gradients equal a loop over the examples."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ekfac_func import RULES, SUA, Call, Factored, PerExampleGradients, ekfac, kfac, per_example_gradients
from ekfac_func.capture import capture
from ekfac_func.discovery import Options, plan
from ekfac_func.types import Dense, Params

from .cases import CASES, SPATIAL, Case, N, classifier, every_case, every_case_and_table, make
from .oracles import close, close_trees, loop


@every_case_and_table
def test_equal_to_the_loop(name: str, rules: Any) -> None:
    case = make(name)
    batch = case.batch(N)
    equal_to_the_loop(case, batch, per_example_gradients(case.loss_fn, case.params, batch, rules=rules))


@every_case
def test_without_rules_equal_to_the_loop(name: str) -> None:
    case = make(name)
    batch = case.batch(N)
    equal_to_the_loop(case, batch, per_example_gradients(case.loss_fn, case.params, batch, rules={}))


def equal_to_the_loop(case: Case, batch: Any, found: PerExampleGradients) -> None:
    losses, expected = loop(case.loss_fn, case.params, batch)
    close(found.losses, losses)
    for p in case.params:
        close(found.dense(p), expected[p])
        close(found.mean()[p], expected[p].mean(0))
    squares = [g.reshape(N, -1).square().sum(1) for g in expected.values()]
    close(found.norms(), torch.stack(squares).sum(0).sqrt())
    assert list(found.mean()) == list(case.params)


def test_the_cases_that_another_table_reads_otherwise() -> None:
    for name in CASES:
        case = make(name)
        batch = case.batch(2)
        plain, sua = (plan(case.loss_fn, case.params, batch, Options(rules)) for rules in (RULES, {**RULES, **SUA}))
        assert (plain != sua) == (name in SPATIAL), name


@every_case
def test_rules_read_what_they_should(name: str) -> None:
    case = make(name)
    captured = capture(case.loss_fn, case.params, case.batch(N), Options(RULES))
    read = set()
    for weight, layer in captured.layers.items():
        assert (layer.rule is None) == isinstance(captured.terms[weight][0], Dense)
        assert (layer.rule is None) == (layer.hidden_by is not None)
        if layer.rule is not None:
            read |= {weight} if layer.bias is None else {weight, layer.bias}
    assert read == case.ruled


def test_norms_form_no_dense_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = classifier(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)), 64)
    found = per_example_gradients(case.loss_fn, case.params, case.batch(N))
    monkeypatch.setattr("ekfac_func.kronecker._dense", None)
    assert found.norms().shape == (N,)


def test_every_kind_of_callable() -> None:
    case = make("mlp")
    batch = case.batch(N)
    expected = loop(case.loss_fn, case.params, batch)[1]

    class Loss(nn.Module):
        def forward(self, params: Params, example: Any) -> Tensor:
            return case.loss_fn(params, example)

    def scaled(scale: float, params: Params, example: Any) -> Tensor:
        return scale * case.loss_fn(params, example)

    compiled = torch.compile(case.loss_fn, backend="eager")  # which runs as it is written
    for loss_fn in (Loss(), Loss().forward, functools.partial(scaled, 1.0), case.loss_fn, compiled):
        assert per_example_gradients(loss_fn, case.params, batch).captured.layers["0.weight"].rule == "linear"
        for name, gradient in expected.items():
            close(per_example_gradients(loss_fn, case.params, batch).dense(name), gradient)


def test_no_hook_is_left_and_nothing_is_mutated() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.BatchNorm1d(5).eval(), nn.Linear(5, 3))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    params = dict(net.named_parameters())

    def loss_fn(params: Params, example: Any) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (example[0][None],)), example[1][None])

    found = per_example_gradients(loss_fn, params, (torch.randn(N, 4), torch.randint(0, 3, (N,))))
    assert not found.mean()["0.weight"].requires_grad
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_chunks_change_nothing() -> None:
    case = make("conv groups")
    batch = case.batch(7)
    whole = per_example_gradients(case.loss_fn, case.params, batch)
    for size in (1, 3, 7, 20):
        parts = per_example_gradients(case.loss_fn, case.params, batch, chunk_size=size)
        for name in case.params:
            close(parts.dense(name), whole.dense(name))
        close(parts.losses, whole.losses)


def test_rows_of_no_expert_are_no_samples() -> None:
    """`F.grouped_mm` leaves out what comes after the last offset, as padding does."""
    params, offs = {"w": torch.randn(3, 8, 4).bfloat16()}, torch.tensor([[1, 2, 4]] * 5, dtype=torch.int32)
    x = torch.randn(5, 6, 8).bfloat16()
    x[:, 4:] = 100

    def grouped(params: Params, example: Any) -> Tensor:
        x, offs = example
        return F.grouped_mm(x, params["w"], offs=offs)[:4].float().tanh().sum()

    def picked(params: Params, example: Any) -> Tensor:
        x, _ = example
        rows = torch.bmm(x[:4, None], params["w"][torch.tensor([0, 1, 2, 2])])
        return rows.float().tanh().sum()

    found = []
    for loss_fn in (grouped, picked):
        step = ekfac(loss_fn, damping=0.1, second_moment=kfac, factor_decay=0.5)
        found.append(step.precondition(params, (x, offs), step.init(params, (x, offs)))[1])
    close_trees(found[0].factors, found[1].factors, 1e-4)
    one, other = (state.second_moments["w"].value.sum((1, 2)) for state in found)
    close(one, other, 1e-4)


def test_dense_gradients_are_the_callers_own() -> None:
    params, x = {"w": torch.randn(3, 4)}, torch.randn(N, 4)
    for loss_fn in (lambda p, x: (p["w"].exp() @ x).sin().sum(), lambda p, x: F.linear(x, p["w"]).sin().sum()):
        found = per_example_gradients(loss_fn, params, x)
        before = found.norms()
        found.dense("w").zero_()
        close(found.norms(), before)


@pytest.mark.parametrize("kind", ["whole", "one by one", "by ids"])
def test_positions_that_a_rule_of_ones_own_does_not_count(kind: str) -> None:
    """Are no samples of the factors, of blocks that stand in different calls or are picked by ids either."""

    def read_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
        def term(x: Tensor, g: Tensor) -> Factored:
            return Factored(x[:, None, :, :, None], g[:, None], None, (x != 0).any(-1)[:, None])

        return Call(weight, "oi", input, term)

    def read_bmm(input: Tensor, mat2: Tensor) -> Call:
        def term(x: Tensor, g: Tensor) -> Factored:
            return Factored(x[..., None], g, None, (x != 0).any(-1))

        return Call(mat2, "bio", input, term)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        if kind == "by ids":
            return torch.bmm(x[None].expand(2, -1, -1), params["w"][torch.tensor([1, 0])]).square().sum()
        uses = [params["w"]] if kind == "whole" else params["w"].unbind()
        return torch.stack([F.linear(x, w).square().sum() for w in uses]).sum()

    params = {"w": torch.randn(3, 3) if kind == "whole" else torch.randn(2, 3, 3)}
    x = torch.randn(N, 5, 3)
    x[:, 2:] = 0
    options = Options({**RULES, F.linear: read_linear, torch.bmm: read_bmm})
    (term,) = capture(loss_fn, params, x, options).terms["w"]
    assert isinstance(term, Factored)
    assert term.counted is not None
    assert term.counted.sum((0, 2)).tolist() == [2 * N] * (1 if kind == "whole" else 2)
