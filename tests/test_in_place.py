"""Tensors and modules that a loss changes in place; of the tensors some are views, which `vmap` copies."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ekfac_func import RULES, Call, Factored, per_example_gradients
from ekfac_func.types import Params

from .cases import N
from .oracles import close, loop
from .test_labels import _with


def test_an_input_changed_in_place_after_the_call_is_refused() -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        h = x.cos()
        y = F.linear(h, params["w"])
        h += 1
        return (y * h).sum()

    with pytest.raises(RuntimeError, match=r"'w'.*\(4,\).*in place"):
        per_example_gradients(loss_fn, {"w": torch.randn(4, 4)}, torch.randn(N, 4))


def test_an_example_changed_in_place_past_a_branch_on_values_is_a_copy() -> None:
    """Discovery ends at the branch and cannot refuse it: the batch stays as it is all the same."""

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        sign = 1 if x.sum() > 0 else -1
        return sign * F.linear(x.mul_(2), params["w"]).cos().sum()

    params, batch = {"w": torch.randn(3, 4)}, torch.randn(N, 4)
    before = batch.clone()
    expected = loop(loss_fn, params, batch.clone())[1]
    found = per_example_gradients(loss_fn, params, batch)
    assert torch.equal(batch, before)
    close(found.dense("w"), expected["w"])


@torch.overrides.wrap_torch_function(lambda x, weight: (x, weight))
def squashed(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight.T).sigmoid()


def read_squashed(x: Tensor, weight: Tensor) -> Call:
    def term(x: Tensor, g: Tensor) -> Factored:
        y = (x @ weight.T).sigmoid()
        return Factored(x[:, None, None, :, None], (g * y * (1 - y))[:, None, None])

    return Call(weight, "oi", x, term)


def test_the_output_of_an_own_rule_may_be_changed_in_place() -> None:
    """Its function needs the output for its own backward pass: plain autograd refuses the change, here it is a copy."""
    params, batch = {"v": torch.randn(4, 3), "w": torch.randn(2, 4)}, torch.randn(5, 3)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return squashed(F.linear(x, params["v"]), params["w"]).mul_(2).cos().sum()

    def plain(params: Params, x: Tensor) -> Tensor:
        return (squashed(F.linear(x, params["v"]), params["w"]) * 2).cos().sum()

    found = per_example_gradients(loss_fn, params, batch, rules={**RULES, squashed: read_squashed})
    assert found.captured.layers["w"].rule is not None
    for name, expected in loop(plain, params, batch)[1].items():
        close(found.dense(name), expected)


class Switching(nn.Module):
    """A buffer that is one or another of its own."""

    one: Tensor
    other: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("one", "other", "current"):
            self.register_buffer(name, torch.full((4,), float(len(name))))

    def forward(self, x: Tensor) -> Tensor:
        self.current = self.other if len(x) == 4 else self.one
        return x * self.current


def _written(like: Tensor) -> Tensor:
    return torch.exp(torch.ones_like(like), out=torch.empty_like(like))


SWITCHING = Switching()
OWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "module of a loss": lambda x, w: nn.BCEWithLogitsLoss(weight=w.detach().square())(w * x, x.sigmoid().expand(3, 4)),
    "norm with statistics": lambda x, w: nn.BatchNorm1d(3).eval()(F.linear(x, w)[None]).sin().sum(),
    "buffer of two": lambda x, w: F.linear(SWITCHING(x), w).sin().sum(),
    "out": lambda x, w: (F.linear(x, w) * _written(w[:, 0].detach())).sin().sum(),
    "out in forward mode": lambda x, w: torch.func.jvp(lambda t: F.linear(t * _written(x), w).tanh(), (x,), (x,))[
        1
    ].sum(),
    "out in vmap": lambda x, w: torch.vmap(lambda row: (row * _written(x) * x).sum().sin())(w).sum(),
}


@pytest.mark.parametrize("kind", OWN)
def test_what_a_loss_makes_it_may_change(kind: str) -> None:
    params, batch = {"w": torch.randn(3, 4)}, torch.randn(N, 4)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return OWN[kind](x, params["w"])

    for name, expected in loop(loss_fn, params, batch)[1].items():
        close(per_example_gradients(loss_fn, params, batch).dense(name), expected)


def test_a_constant_of_inference_mode() -> None:
    with torch.inference_mode():
        frozen = torch.randn(4)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        total = torch.zeros(4)
        total += frozen
        total += F.linear(x, params["w"])
        return total.square().sum()

    params, batch = {"w": torch.randn(4, 4)}, torch.randn(N, 4)
    close(per_example_gradients(loss_fn, params, batch).dense("w"), loop(loss_fn, params, batch)[1]["w"])


@pytest.mark.parametrize(
    "view", [lambda v: v[1:].as_strided((3,), (4,), 1), lambda v: torch.as_strided(v[:, 1:], (3,), (5,))]
)
def test_memory_that_a_view_does_not_have_is_refused(view: Any) -> None:
    params = {"v": torch.randn(4, 4)}
    with pytest.raises(ValueError, match=r"as_strided of a view of shape .*take it of the tensor"):
        per_example_gradients(lambda p, x: (x * view(p["v"])).sin().sum(), params, torch.randn(N, 3))


def _scaled_view(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"])
    for at in torch.arange(len(h)):
        h[at].mul_(1.0 + at)
    return h.square().sum()


def _copied_into_a_view(params: Params, x: Tensor) -> Tensor:
    h = torch.zeros(3, 5)
    h[torch.tensor(1)].copy_(F.linear(x[0], params["w"]))
    return h.cos().sum()


def _changed_entries(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"])
    at = torch.tensor(2)
    h[at] *= 2.0
    h[at] = h[at] + h[0]
    return h.square().sum()


def _changed_afterwards(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"])
    row = h[torch.tensor(1)]
    h.mul_(3.0)
    return row.square().sum()


def _strided_view(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"])
    h.as_strided((2,), (1,)).mul_(2.0)
    return h.square().sum()


def _returned_late(params: Params, x: Tensor) -> Tensor:
    h, at = F.linear(x[0], params["w"]), x[1].argmax()
    entry = h[at]
    entry.mul_(2.0)
    between = h.sum()
    h[at] = entry
    return h.square().sum() + between.sin()


def _returned_and_kept(params: Params, x: Tensor) -> Tensor:
    h, at = F.linear(x[0], params["w"]), x[1].argmax()
    before = entry = h[at]
    entry += 1.0
    h[at] = entry
    h.mul_(2.0)
    return before.cos()


def _returned_to_another_place(params: Params, x: Tensor) -> Tensor:
    h, at, other = F.linear(x[0], params["w"]).clone(), x[1].argmax(), x[1].argmin()
    entry = h[at]
    entry += 1.0
    h[other] = entry
    return h.square().sum()


def _returned_to_another_tensor(params: Params, x: Tensor) -> Tensor:
    h, at = F.linear(x[0], params["w"]).clone(), x[1].argmax()
    other = 2 * h
    entry = h[at]
    entry += 1.0
    other[at] = entry
    return h.square().sum() + other.sin().sum()


def _viewed_and_gone(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"])
    some, other = h[torch.tensor(1)][1:], torch.zeros(2)
    other[0] = 1.0
    h[:] = 3.0 * h.detach()
    return some.square().sum() + (h * other[0]).cos().sum()


def _read_before_it_returned(params: Params, x: Tensor) -> Tensor:
    h, at = F.linear(x, params["w"]).clone(), x[0].argmax() % 3
    row = h[at]
    row.add_(x[0, :1])
    early, late = h.sum(), row.sum()
    h[at] = row
    return h.square().sum() + early * late


def _part_returned(params: Params, x: Tensor) -> Tensor:
    h, at = F.linear(x, params["w"]).clone(), x[0].argmax() % 3
    row = h[at]
    row.add_(1.0)
    h[at] = row[:1]
    return h.square().sum() + row.cos().sum()


def _unfolded(params: Params, x: Tensor) -> Tensor:
    h = torch.zeros(5) + F.linear(x[0], params["w"]).sum()
    parts = h.unfold(0, 3, 1)
    parts[x[0].argmax() % 3] = F.linear(x[0], params["w"])[:3]
    return h.square().sum() + parts.cos().sum()


def _label_in_a_transform(params: Params, x: Tensor) -> Tensor:
    at = x[0].argmax()

    def marked(row: Tensor) -> Tensor:
        return _with(row * row, at, row.sum())

    return torch.func.vmap(marked)(F.linear(x, params["w"])).cos().sum()


def _written_through_data(params: Params, x: Tensor) -> Tensor:
    mask = torch.ones(5)
    mask.data[0] = 0.5
    x.data.add_(1.0)
    return (mask * F.linear(x, params["w"])).cos().sum()


def _by_keywords(params: Params, x: Tensor) -> Tensor:
    h = torch.reshape(input=F.linear(x, params["w"]), shape=(-1,))
    return torch.flatten(input=h).dot(torch.arange(15.0)) + torch.mv(input=params["w"], vec=x[0]).cos().sum()


def _made_turned(params: Params, x: Tensor) -> Tensor:
    h = TURNED.T.clone()
    h.reshape(-1)[:5] = F.linear(x[0], params["w"])  # of a copy
    return h.square().sum() * F.linear(x[1], params["w"]).sum()


TURNED = torch.arange(15.0).view(3, 5).double()


def _reshaped(params: Params, x: Tensor) -> Tensor:
    """A view in the loop alone."""
    h = F.linear(x, params["w"])[:, x[0].argsort()]
    h.reshape(-1)[:4] = 3.0
    return (h * x).square().sum()


def _two_dots(params: Params, x: Tensor) -> Tensor:
    h = torch.outer(F.linear(x[0], params["w"]), x[1])
    return (h * torch.arange(4.0))[..., x[2].argmax(), ...].square().sum()


def _strided_before(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"])
    some = torch.as_strided(h, (2,), (1,))
    h += 1.0
    return some.square().sum()


VIEWED = [_scaled_view, _copied_into_a_view, _changed_entries, _changed_afterwards, _strided_view, _strided_before]
VIEWED += [_returned_late, _returned_and_kept, _made_turned, _reshaped, _two_dots, _viewed_and_gone, _part_returned]
VIEWED += [_returned_to_another_place, _returned_to_another_tensor]
VIEWED += [_read_before_it_returned, _unfolded, _label_in_a_transform, _written_through_data, _by_keywords]


@pytest.mark.parametrize("loss_fn", VIEWED)
def test_a_view_that_vmap_copies_and_that_is_changed_in_place(loss_fn: Any) -> None:
    params, batch = {"w": torch.randn(5, 4)}, torch.randn(N, 3, 4)
    given = batch.clone()
    found = per_example_gradients(loss_fn, params, batch)
    assert torch.equal(batch, given)
    losses, expected = loop(loss_fn, params, batch)
    close(found.losses, losses)
    close(found.dense("w"), expected["w"])


def _sliced_copy(params: Params, x: Tensor) -> Tensor:
    """Whose entries lie elsewhere than those of the slice that it is of."""
    rows = params["w"].flatten(0, 1)
    return F.linear(x, rows[8:].clone()[4:8]).sin().sum()


def _ids_of_ids(params: Params, x: Tensor) -> Tensor:
    return torch.bmm(x[:, None], params["w"][TURNS][torch.tensor([1, 0, 3, 3])]).sin().sum()


def _picked_side_by_side(params: Params, x: Tensor) -> Tensor:
    return F.linear(x, params["w"][TURNS].flatten(0, 1)).sin().sum()


TURNS = torch.tensor([2, 0, 2, 1])  # as many as there are matrices


@pytest.mark.parametrize("loss_fn", [_sliced_copy, _ids_of_ids, _picked_side_by_side])
def test_entries_that_are_not_those_of_a_view(loss_fn: Any) -> None:
    params, batch = {"w": torch.randn(4, 4, 4)}, torch.randn(N, 4, 4)
    close(per_example_gradients(loss_fn, params, batch).dense("w"), loop(loss_fn, params, batch)[1]["w"])


def test_a_view_by_an_id_that_is_changed_in_place_of_a_batch() -> None:
    def losses_fn(params: Params, x: Tensor) -> Tensor:
        h = F.linear(x, params["w"])
        for at in torch.arange(3):
            h[:, at].mul_(1.0 + at)
        return h.square().sum((1, 2))

    params, batch = {"w": torch.randn(5, 4)}, torch.randn(N, 3, 4)
    found = per_example_gradients(losses_fn, params, batch, batched=True)
    losses, expected = loop(_scaled_view, params, batch)
    close(found.losses, losses)
    close(found.dense("w"), expected["w"])


def test_a_module_that_is_moved_within_the_loss() -> None:
    net = nn.Linear(4, 3)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return functional_call(Moved(net), {f"net.{name}": p for name, p in params.items()}, (x,)).cos().sum()

    params, batch = {name: p.detach().clone() for name, p in net.named_parameters()}, torch.randn(N, 4)
    found = per_example_gradients(loss_fn, params, batch)
    for name, expected in loop(loss_fn, params, batch)[1].items():
        close(found.dense(name), expected)


def test_a_module_of_the_callers_that_is_moved_within_the_loss() -> None:
    """Which would be left with tensors without values."""
    net = nn.Linear(4, 4).double()

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(net.to(torch.float64)(x), params["w"]).cos().sum(-1)

    params, batch = {"w": torch.randn(3, 4)}, torch.randn(N, 4)
    close(per_example_gradients(loss_fn, params, batch).dense("w"), loop(loss_fn, params, batch)[1]["w"])
    with pytest.raises(ValueError, match="moves or casts a module"):
        per_example_gradients(loss_fn, params, batch, batched=True)


class Moved(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.to(torch.float64)(x)


class _Added(nn.Module):
    def __init__(self, by: Tensor) -> None:
        super().__init__()
        self.by = by

    def forward(self, w: Tensor) -> Tensor:
        return w + self.by


def test_a_parametrization_that_the_loss_registers() -> None:
    """As adapters of experts do."""
    layer = nn.Linear(4, 3)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        nn.utils.parametrize.register_parametrization(layer, "weight", _Added(params["b"] @ params["a"]))
        try:
            return layer(x).sin().sum()
        finally:
            nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)

    params, batch = {"a": torch.randn(2, 4), "b": torch.randn(3, 2)}, torch.randn(N, 4)
    found = per_example_gradients(loss_fn, params, batch)
    for name, G in loop(loss_fn, params, batch)[1].items():
        close(found.dense(name), G)
