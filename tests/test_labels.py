"""What a loss does with values without a branch on them: picks and writes by labels, ids and masks, and checks."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from ekfac_func import ekfac, per_example_gradients
from ekfac_func.types import Params

from .cases import N, make
from .oracles import close, close_trees, loop

MASK = torch.ones(4, 4, dtype=torch.bool).tril(-1)
ROW = MASK[2]


def _at_a_mask(params: Params, x: Tensor) -> Tensor:
    """As the products of pairs are read."""
    z = F.linear(x, params["w"])
    return F.linear((z.mT @ z)[MASK].sin(), params["v"]).sum() + z[:, ROW].cos().sum()


def _of_a_parameter_at_a_mask(params: Params, x: Tensor) -> Tensor:
    return (F.linear(x, params["w"]).sum() * params["w"][MASK]).sin().sum() + params["v"].cos().sum()


@pytest.mark.parametrize(
    ("loss_fn", "ruled"),
    [(_at_a_mask, {"w", "v"}), (_of_a_parameter_at_a_mask, set())],
    ids=["activations", "a weight"],
)
def test_a_mask_that_the_loss_closes_over_is_no_reason_for_a_loop(loss_fn: Any, ruled: set[str]) -> None:
    calls = itertools.count()

    def counted(params: Params, x: Tensor) -> Tensor:
        next(calls)
        return loss_fn(params, x)

    params, batch = {"w": torch.randn(4, 4), "v": torch.randn(2, 6)}, torch.randn(N, 3, 4)
    found = per_example_gradients(counted, params, batch)
    assert next(calls) == 2  # discovery, and one of all examples
    assert {name for name, layer in found.captured.layers.items() if layer.rule} == ruled
    for name, expected in loop(loss_fn, params, batch)[1].items():
        close(found.dense(name), expected)


@pytest.mark.parametrize("name", ["filled", "messages"])
def test_a_tensor_that_the_loss_fills_is_no_reason_for_a_loop(name: str) -> None:
    case, calls = make(name), itertools.count()

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        next(calls)
        return case.loss_fn(params, x)

    for _ in range(2):
        per_example_gradients(loss_fn, case.params, case.batch(N))
    assert next(calls) == 1 + 2  # discovery, and each of the two


IDS = torch.tensor([2, 0, 1])


LOOKUPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda w, ids: w[ids],
    "label": lambda w, ids: w[ids[1]],
    "index_select": lambda w, ids: w.index_select(0, ids),
    "embedding": lambda w, ids: F.embedding(ids, w),
}


@pytest.mark.parametrize("bad", [5, 6, 100, -6])
@pytest.mark.parametrize("used_elsewhere", [False, True])
@pytest.mark.parametrize("how", LOOKUPS)
def test_ids_out_of_range(how: str, used_elsewhere: bool, bad: int) -> None:
    """Not even one that would be in the range of the next example's copy of the table."""

    def loss_fn(params: Params, ids: Tensor) -> Tensor:
        loss = LOOKUPS[how](params["w"], ids).sin().sum()
        return loss + params["w"].square().sum() if used_elsewhere else loss

    params, ids = {"w": torch.randn(5, 3)}, torch.randint(0, 5, (N, 4))
    per_example_gradients(loss_fn, params, ids)
    ids[2, 1] = bad
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)|has ids from -?\d+ to \d+"):
        per_example_gradients(loss_fn, params, ids)


def test_index_select_of_a_label() -> None:
    """Of which torch's own derivative is wrong under vmap."""

    def loss_fn(params: Params, example: Any) -> Tensor:
        x, y = example
        h = F.linear(x, params["w"])
        return (h.index_select(0, y) * params["v"].index_select(0, y)).sin().sum()

    params = {"w": torch.randn(3, 4), "v": torch.randn(3, 3)}
    batch = torch.randn(N, 3, 4), torch.randint(0, 3, (N,))
    found = per_example_gradients(loss_fn, params, batch)
    close_trees({name: found.dense(name) for name in params}, loop(loss_fn, params, batch)[1])


def _outputs(params: Params, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, params["w"]).tanh(), params["v"])


def _of_distributions(params: Params, example: Any) -> Tensor:
    x, y, label = example
    z = _outputs(params, x)
    weights = torch.distributions.Categorical(logits=z[:3])
    mixture = torch.distributions.MixtureSameFamily(weights, torch.distributions.Normal(z[:3], F.softplus(z[3:])))
    return -weights.log_prob(label) - mixture.log_prob(y[0])


def _with(x: Tensor, index: Any, value: Any) -> Tensor:
    x[index] = value
    return x


def _increased(x: Tensor, *indices: Any) -> Tensor:
    for index in indices:
        x[index] += 1.5
    return x


LABELLED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "one hot": lambda z, y, label: (z.log_softmax(-1) * F.one_hot(label, 6)).sum(),
    "label": lambda z, y, label: -z.log_softmax(-1)[label],
    "label from the end": lambda z, y, label: z[label - 6].square(),
    "row and label": lambda z, y, label: z.view(2, 3)[-1, label].square(),
    "column": lambda z, y, label: z.view(2, 3)[:, label].square().sum(),
    "behind dots": lambda z, y, label: z.view(1, 3, 2)[..., label, :].square().sum(),
    "among slices": lambda z, y, label: z.view(3, 2)[None, label, 1:, None].square().sum(),
    "two labels": lambda z, y, label: z.view(3, 2)[label, label // 2].square(),
    "at a label": lambda z, y, label: (z - _with(torch.zeros(6), label, 1.0)).square().sum(),
    "in a column": lambda z, y, label: (_with(torch.ones(2, 3), (slice(None), label), z[:2]) * z.view(2, 3)).sum(),
    "a row of one": lambda z, y, label: _with(torch.ones(3, 2), label, z[:1]).flatten().dot(z),
    "at a label behind dots": lambda z, y, label: _with(z.view(2, 3).clone(), (..., label), 0.5).square().sum(),
    "at two labels": lambda z, y, label: (_with(torch.zeros(3, 2), (label, label // 2), z[0]) * z[1]).sum(),
    "at a label, of another dtype": lambda z, y, label: z.dot(_with(torch.zeros(6), label, label + 1)),
    "at two labels beside a slice": lambda z, y, label: (
        _with(torch.zeros(2, 3, 3), (slice(None), label, 2 - label), z[:2]).square().sum()
    ),
    "a list and a label": lambda z, y, label: z.view(3, 2)[IDS, label // 2].square().sum(),
    "a list apart from a label": lambda z, y, label: z.view(3, 2, 1)[label, :, IDS - IDS].square().sum(),
    "at a list behind a slice": lambda z, y, label: (
        _with(torch.zeros(3, 3), (slice(None), y.argsort()), torch.outer(z[:3], y)).flatten().dot(torch.arange(9.0))
    ),
    "at a list of a function of the outputs": lambda z, y, label: (
        _with(torch.outer(z, y), (..., y.argsort()), torch.outer(z, z[:3])).flatten().dot(torch.arange(18.0))
    ),
    "counted at labels": lambda z, y, label: z.dot(_increased(torch.zeros(6), label, label + 1, label)),
    "more at labels": lambda z, y, label: _increased(z.view(2, 3).clone(), (..., label), (0, label)).square().sum(),
    "at a mask": lambda z, y, label: _with(z.clone(), z < 0, y[0]).square().sum(),
    "at masked columns": lambda z, y, label: _with(z.view(2, 3).clone(), (slice(None), y > 0), 0).square().sum(),
    "at masked columns behind dots": lambda z, y, label: _with(z.view(2, 3).clone(), (..., y > 0), 1).square().sum(),
    "whole numbers at a mask": lambda z, y, label: z.dot(_with(torch.arange(6), z < 0, 2.7).to(z)),
    "truths at a mask": lambda z, y, label: z.dot(_with(torch.zeros(6, dtype=torch.bool), z < 0, 0.5).to(z)),
    "from a label on": lambda z, y, label: z.dot(_with(torch.ones(6), slice(label + 1, None), 0.0)),
    "up to a label": lambda z, y, label: z.dot(_with(torch.ones(2, 3), (..., slice(label - 3)), 0.0).flatten()),
    "gaussian": lambda z, y, label: F.gaussian_nll_loss(z[:3], y, F.softplus(z[3:])),
    "gaussian, small variances": lambda z, y, label: F.gaussian_nll_loss(z[:3], y, z[3:].relu(), True, 0.1, "sum"),
    "gaussian, one variance": lambda z, y, label: F.gaussian_nll_loss(z.view(2, 3), y, F.softplus(z[:2])),
}


@pytest.mark.parametrize("name", [*LABELLED, "distributions"])
def test_what_looks_at_values_only_to_check_them_has_its_rules(name: str) -> None:
    def loss_fn(params: Params, example: Any) -> Tensor:
        x, y, label = example
        return LABELLED[name](_outputs(params, x), y, label)

    loss_fn = _of_distributions if name == "distributions" else loss_fn
    params = {"w": torch.randn(6, 4), "v": torch.randn(6, 6)}
    batch = torch.randn(N, 4), torch.randn(N, 3), torch.randint(0, 3, (N,))
    found = per_example_gradients(loss_fn, params, batch)
    for p, expected in loop(loss_fn, params, batch)[1].items():
        close(found.dense(p), expected)
    assert all(layer.rule == "linear" for layer in found.captured.layers.values())


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range_are_refused(label: int) -> None:
    """By torch without `vmap` alone."""

    def loss_fn(params: Params, example: Any) -> Tensor:
        x, y = example
        return (F.linear(x, params["w"]) * F.one_hot(y, 3)).sum()

    params, batch = {"w": torch.randn(3, 4)}, (torch.randn(N, 4), torch.arange(N) % 3)
    per_example_gradients(loss_fn, params, batch)
    batch[1][1] = label
    with pytest.raises(ValueError, match=r"F\.one_hot has labels from .* for num_classes=3"):
        per_example_gradients(loss_fn, params, batch)


@pytest.mark.parametrize("mask", [lambda x: (x > 0)[None], lambda x: (x > 0)[:1], lambda x: (x > 0)[:, None]])
def test_a_mask_of_another_shape_is_refused(mask: Any) -> None:
    """As in a loop."""

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return _with(F.linear(x, params["w"]), mask(x), 0.0).square().sum()

    with pytest.raises(IndexError):
        per_example_gradients(loss_fn, {"w": torch.randn(4, 4)}, torch.randn(N, 4))


def _by_a_list_of_tensors(params: Params, x: Tensor) -> Tensor:
    y = F.linear(x, params["w"])
    return y[torch.tensor([(x[0] > 0).long(), 2])].cos().sum() + (x.new_tensor([x[0], x[1]]) * y[:2]).sum()


def _by_a_copied_label(params: Params, x: Tensor) -> Tensor:
    return F.linear(x, params["w"])[torch.tensor((x[0] > 0).long())].cos()


def _sparse(params: Params, x: Tensor) -> Tensor:
    entries, places = F.linear(x, params["w"]).tanh(), torch.tensor([[0, 1, 2, 0], [0, 1, 3, 2]])
    return torch.sparse.mm(torch.sparse_coo_tensor(places, entries, (3, 4)), params["w"]).cos().sum()


def _scanned(params: Params, x: Tensor) -> Tensor:
    return scan(lambda c, h: (torch.tanh(c + h), c.clone()), torch.zeros(()), F.linear(x, params["w"]))[0]


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor", "ignore:Sparse invariant checks")
@pytest.mark.parametrize("loss_fn", [_by_a_list_of_tensors, _by_a_copied_label, _sparse, _scanned])
def test_what_torch_knows_neither_of_shapes_nor_of_several_examples(loss_fn: Any) -> None:
    params, batch = {"w": torch.randn(4, 4)}, torch.randn(N, 4)
    close(per_example_gradients(loss_fn, params, batch).dense("w"), loop(loss_fn, params, batch)[1]["w"])


def test_an_expert_that_a_label_picks() -> None:
    def loss_fn(params: Params, example: Any) -> Tensor:
        x, expert = example
        return F.linear(x, params["experts"][expert]).cos().sum()

    params, batch = {"experts": torch.randn(3, 2, 4)}, (torch.randn(N, 4), torch.randint(0, 3, (N,)))
    close(per_example_gradients(loss_fn, params, batch).dense("experts"), loop(loss_fn, params, batch)[1]["experts"])


def test_a_negative_variance_skips_the_step() -> None:
    def loss_fn(params: Params, example: Any) -> Tensor:
        x, y = example
        return F.gaussian_nll_loss(F.linear(x, params["w"]), y, -torch.ones(3))

    params, batch = {"w": torch.randn(3, 4)}, (torch.randn(N, 4), torch.randn(N, 3))
    step = ekfac(loss_fn, damping=0.1)
    assert step.precondition(params, batch, step.init(params, batch))[2].skipped


def test_messages_and_assertions_are_no_branches_on_values() -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        h = F.linear(x, params["w"])
        torch._check_tensor_all(h < 1e6, lambda: f"too large: {h.sum()}")
        shown = f"{(x > 0).sum()} of {len(x)}"
        return h.type(torch.float64).cos().sum() if shown else h.sum()

    params, batch = {"w": torch.randn(3, 4)}, torch.randn(N, 4)
    found = per_example_gradients(loss_fn, params, batch)
    close(found.dense("w"), loop(loss_fn, params, batch)[1]["w"])
    assert found.captured.layers["w"].rule == "linear"
