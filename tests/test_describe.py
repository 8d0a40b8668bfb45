"""What is said of each parameter, and the certificate that it is true."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ekfac_func import RULES, Blocks, Call, Factored, blocks, describe, ekfac
from ekfac_func.types import Params

from .cases import LOOPED, N, every_case, make


@every_case
def test_every_parameter_has_a_row(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = make(name)
    batch = case.batch(N)
    rows = describe(case.loss_fn, case.params, batch)
    assert sorted(p for row in rows for p in (row.name, row.bias) if p) == sorted(case.params)
    assert {p for row in rows if row.rule for p in (row.name, row.bias) if p} == case.ruled
    printed = capsys.readouterr().out
    assert rows.looped == ("one example after another" in printed) == (name in LOOPED)
    state = ekfac(case.loss_fn, damping=1.0).init(case.params, batch)
    for row in rows:
        assert row.name in printed
        assert (row.rule or row.hidden_by or "?") in printed
        assert row.factor_A == tuple(state.factors[row.name].A.shape)
        assert row.factor_B == tuple(state.factors[row.name].B.shape)
        assert row.factor_bytes == sum(t.nbytes for t in state.factors[row.name][:2])
        assert row.basis_bytes == sum(t.nbytes for t in state.bases[row.name])
        assert row.moment_bytes == state.second_moments[row.name].value.nbytes


def test_the_rows_of_a_small_net(capsys: pytest.CaptureFixture[str]) -> None:
    params = {"w": torch.randn(5, 4), "b": torch.randn(5), "table": torch.randn(9, 4), "hidden": torch.randn(5, 2)}

    def loss_fn(params: Params, ids: Tensor) -> Tensor:
        x = F.linear(F.embedding(ids, params["table"]), params["w"], params["b"])
        return (x @ params["hidden"].exp()).cos().sum()

    w, table, hidden = describe(loss_fn, params, torch.randint(0, 9, (6, 3)), bases={"w": Blocks(inputs=2)})
    assert (w.rule, w.bias, w.b, w.s, w.i, w.o, w.k) == ("linear", "b", 1, 3, 5, 5, 1)
    assert w.factor_A == (1, 3, 2, 2)
    assert (table.rule, table.s, table.i, table.o, table.factor_B) == ("embedding", 3, 4, 9, (1, 9, 1, 1))
    assert (hidden.rule, hidden.hidden_by) == (None, "torch.Tensor.exp")
    assert "no rule: torch.Tensor.exp" in capsys.readouterr().out


def test_how_the_moment_is_summed() -> None:
    orders = set()
    for name in ("mlp", "positions", "ids", "tied", "not views"):
        case = make(name)
        orders |= {str(row.contraction) for row in describe(case.loss_fn, case.params, case.batch(N))}
    wide = describe(lambda p, x: F.linear(x, p["w"]).sum(), {"w": torch.ones(1024, 1024)}, torch.ones(2, 2, 1024))
    orders.add(str(wide[0].contraction))
    for order in ("multiply pairs", "multiply the squares", "form G[n]", "add up ids", "ids and their product"):
        assert any(order in found for found in orders), orders


def test_a_parameter_without_a_use_says_so() -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"]).sum() + torch.vmap(F.linear, (None, 0))(x, params["stack"]).cos().sum()

    params = {"w": torch.randn(3, 4), "v": torch.ones(2), "stack": torch.randn(2, 3, 4)}
    rows = describe(loss_fn, params, torch.ones(2, 4))
    assert [row.hidden_by for row in rows] == [None, "no call", "a use that no call shows"]


def test_a_bias_whose_weight_has_no_rule_says_what_adds_it() -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"], params["b"]).cos().sum() + params["w"].square().sum()

    rows = describe(loss_fn, {"w": torch.randn(3, 4), "b": torch.randn(3)}, torch.ones(2, 4))
    assert [row.hidden_by for row in rows] == ["torch.Tensor.square", "linear"]


class _Square(torch.autograd.Function):
    """Which no `vmap` takes: its forward has the context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0] * ctx.saved_tensors[0]


def test_a_loss_that_runs_example_by_example_is_described_by_its_layers() -> None:
    params = {"w": torch.randn(4, 3), "table": torch.randn(9, 3)}

    def loss_fn(params: Params, ids: Tensor) -> Any:
        return _Square.apply(F.linear(F.embedding(ids, params["table"]), params["w"])).sum()

    rows = describe(loss_fn, params, torch.randint(0, 9, (6, 5)))
    assert [(row.rule, row.s) for row in rows] == [("linear", 5), ("embedding", 5)]


@every_case
def test_the_certificate_holds(name: str) -> None:
    case = make(name)
    ekfac(case.loss_fn, damping=1.0).init(case.params, case.batch(3), check=True)


def test_a_rule_that_reads_wrongly_is_named() -> None:
    def wrong(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
        return Call(weight, "oi", x, lambda x, g: Factored(2 * x[:, None, None, :, None], g[:, None, None]))

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x @ params["v"], params["w"]).cos().sum()

    params, batch = {"v": torch.randn(4, 4), "w": torch.randn(3, 4)}, torch.randn(N, 4)
    step = ekfac(loss_fn, damping=1.0, rules={**RULES, F.linear: wrong})
    step.init(params, batch)
    with pytest.raises(ValueError, match=r"'w', of shape \(6, 3, 4\).*its rule reads"):
        step.init(params, batch, check=True)
    with pytest.raises(ValueError, match="are not finite, so that they cannot be compared"):
        ekfac(loss_fn, damping=1.0).init(params, batch / 0, check=True)


@pytest.mark.parametrize("letters", ["o", "oii", "ox"])
def test_letters_that_do_not_fit_are_refused(letters: str) -> None:
    def wrong(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
        return Call(weight, letters, x, lambda x, g: Factored(x, g))

    with pytest.raises(ValueError, match=rf"'w' names its axes '{letters}' where its shape is \(3, 4\)"):
        describe(
            lambda p, x: F.linear(x, p["w"]).sum(), {"w": torch.randn(3, 4)}, torch.ones(2, 4), rules={F.linear: wrong}
        )


def test_a_head_of_32_000_fits_in_blocks() -> None:
    params = {"head": torch.zeros(32_000, 8)}
    choice: Any = {"head": blocks(1_000)}
    (row,) = describe(lambda p, x: F.linear(x, p["head"]).sum(), params, torch.ones(2, 8), bases=choice)
    assert row.factor_B == (1, 32, 1000, 1000)
    assert row.factor_bytes < 300e6
