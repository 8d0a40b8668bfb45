"""Captured per-example gradients equal a loop over the examples."""

import functools
import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import _SingleLevelFunction
from torch.func import functional_call

from ekfac_func import RULES, SUA, Call, Factored, PerExampleGradients, describe, ekfac, kfac, per_example_gradients
from ekfac_func.capture import capture
from ekfac_func.discovery import Options, plan
from ekfac_func.modes import innermost
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


def test_a_changed_path_is_seen_although_the_shapes_are_not_new() -> None:
    penalty = [False]

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        loss = F.linear(x, params["w"]).cos().sum()
        return loss + params["w"].square().sum() if penalty[0] else loss

    params, batch = {"w": torch.randn(3, 4)}, torch.randn(N, 4)
    for penalty[0] in (False, True, True, False):
        close(per_example_gradients(loss_fn, params, batch).dense("w"), loop(loss_fn, params, batch)[1]["w"])


def test_an_output_that_is_left_out_from_now_on() -> None:
    used = [True]

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        y, z = F.linear(x, params["w"]), F.linear(x, params["v"])
        return y.cos().sum() + z.sin().sum() if used[0] else y.cos().sum()

    params, batch = {"w": torch.randn(3, 4), "v": torch.randn(2, 4)}, torch.randn(N, 4)
    for used[0] in (True, False):
        found = per_example_gradients(loss_fn, params, batch)
        close_trees({name: found.dense(name) for name in params}, loop(loss_fn, params, batch)[1])


def test_a_changed_number_of_layers_is_seen() -> None:
    depth = [1]

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        for _ in range(depth[0]):
            x = F.linear(x, params["w"]).cos()
        return x.sum()

    params, batch = {"w": torch.randn(4, 4)}, torch.randn(N, 4)
    for depth[0] in (2, 1, 3):
        close(per_example_gradients(loss_fn, params, batch).dense("w"), loop(loss_fn, params, batch)[1]["w"])


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


def test_a_derivative_inside_the_loss_is_one_more_path() -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        h = F.linear(x, params["v"]).tanh()
        y = F.linear(h, params["w"]).square().sum()
        (slope,) = torch.autograd.grad(y, h, create_graph=True)
        return y + slope.square().sum()

    params, batch = {"v": torch.randn(3, 4), "w": torch.randn(2, 3)}, torch.randn(N, 4)
    expected = loop(loss_fn, params, batch)[1]
    found = per_example_gradients(loss_fn, params, batch)
    for name in params:
        close(found.dense(name), expected[name])


def test_autocast_inside_the_loss() -> None:
    params, batch = {"w": torch.randn(3, 4).float(), "b": torch.randn(3).float()}, torch.randn(N, 4).float()

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, params["w"], params["b"]).float().cos().sum()

    expected = loop(loss_fn, params, batch)[1]
    found = per_example_gradients(loss_fn, params, batch)
    for name in params:
        assert found.dense(name).dtype == torch.float32
        close(found.dense(name), expected[name], 2e-2)


def test_chunks_change_nothing() -> None:
    case = make("conv groups")
    batch = case.batch(7)
    whole = per_example_gradients(case.loss_fn, case.params, batch)
    for size in (1, 3, 7, 20):
        parts = per_example_gradients(case.loss_fn, case.params, batch, chunk_size=size)
        for name in case.params:
            close(parts.dense(name), whole.dense(name))
        close(parts.losses, whole.losses)


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


def test_a_mask_in_float32_over_queries_in_half_precision() -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        q = F.linear(x, params["w"])[None]
        mask = torch.ones(len(x), len(x), dtype=torch.float32).tril() / 2
        return F.scaled_dot_product_attention(q, q, q, mask).float().square().sum()

    params, batch = {"w": torch.randn(4, 4).bfloat16()}, torch.randn(5, 3, 4).bfloat16()
    losses, expected = loop(loss_fn, params, batch)
    found = per_example_gradients(loss_fn, params, batch)
    close(found.losses, losses, 2e-2)
    close(found.dense("w").float(), expected["w"].float(), 5e-2)


def _attending(params: Params, x: Tensor) -> Tensor:
    """Autocast casts all three to its own dtype, whatever theirs."""
    y = F.linear(x, params["w"])  # [t 4], bfloat16
    mask = torch.zeros(len(x), len(x), dtype=x.dtype)
    return F.scaled_dot_product_attention(x[None], y[None], y.float()[None], mask).float().square().sum()


def _classifying(params: Params, x: Tensor) -> Tensor:
    return F.cross_entropy(40 * F.linear(x, params["w"]), torch.arange(len(x)) % 4)


def _of_logs(params: Params, x: Tensor) -> Tensor:
    return F.nll_loss(F.linear(x, params["w"]).log_softmax(-1), torch.arange(len(x)) % 4)


def _normalising(params: Params, x: Tensor) -> Tensor:
    """The scale is float32."""
    y = F.group_norm(F.layer_norm(F.linear(x, params["w"]), (4,), params["w"].detach()[0])[None], 1)
    return y.float().square().cos().sum()


@pytest.mark.parametrize("inner", [_attending, _classifying, _of_logs, _normalising])
def test_functions_replaced_for_vmap_follow_autocast(inner: Any) -> None:
    params, batch = {"w": torch.randn(4, 4, dtype=torch.float32)}, torch.randn(5, 3, 4, dtype=torch.float32)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inner(params, x)

    losses, expected = loop(loss_fn, params, batch)
    found = per_example_gradients(loss_fn, params, batch)
    assert losses.dtype == torch.float32
    # what is in bfloat16 rounds as a kernel takes it
    tolerance = {_attending: 1e-3, _normalising: 1e-2}.get(inner, 1e-6)
    close(found.losses, losses, tolerance)
    close(found.dense("w"), expected["w"], 3e-2 if inner is _normalising else 1e-2)
    whole = functools.partial(found_losses, loss_fn)
    fast = torch.compile(whole, fullgraph=True, backend="aot_eager")
    close(fast(params, batch), losses, tolerance)


@pytest.mark.parametrize("norm", [functools.partial(F.group_norm, num_groups=2), F.instance_norm])
def test_norms_of_images_that_lie_with_channels_last(norm: Any) -> None:
    """As torch's rules under `vmap` cannot."""
    params = {"w": torch.randn(4, 4), "scale": torch.randn(4), "shift": torch.randn(4)}

    def loss_fn(params: Params, x: Tensor) -> Tensor:  # [1 3 3 4]
        h = F.linear(x, params["w"]).permute(0, 3, 1, 2)
        return norm(h, weight=params["scale"], bias=params["shift"]).cos().sum()

    batch = torch.randn(N, 1, 3, 3, 4)
    expected = loop(loss_fn, params, batch)[1]
    every: tuple[dict[str, Any], ...] = ({}, {"rules": {}}, {"chunk_size": 2})
    for settings in every:
        found = per_example_gradients(loss_fn, params, batch, **settings)
        for name, G in expected.items():
            close(found.dense(name), G)

    def scaled(scale: Tensor) -> Params:
        return per_example_gradients(lambda p, x: scale * loss_fn(p, x), params, batch).mean()

    for name, mean in torch.func.vmap(scaled)(torch.tensor([1.0, 2.0])).items():  # where norms ask how images lie
        close(mean, torch.stack([expected[name].mean(0), 2 * expected[name].mean(0)]))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_that_lays_images_with_channels_last(compiled: bool) -> None:
    """Which `vmap` does for no example, and no value depends on."""
    params = {"w": torch.randn(2, 3, 2, 2)}

    def loss_fn(params: Params, x: Tensor) -> Tensor:  # [3 4 4]
        h = x[None].to(memory_format=torch.channels_last)
        if not h.is_contiguous(memory_format=torch.channels_last):
            h = h.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(h, params["w"]).clone(memory_format=torch.channels_last)
        return (y.cos() * torch.ones_like(y, memory_format=torch.channels_last)).sum()

    batch = torch.randn(N, 3, 4, 4)

    def mean(params: Params, batch: Tensor) -> Params:
        return per_example_gradients(loss_fn, params, batch).mean()

    found = torch.compile(mean, fullgraph=True, backend="aot_eager") if compiled else mean
    close(found(params, batch)["w"], loop(loss_fn, params, batch)[1]["w"].mean(0))


@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_follow_autocast(bias: bool) -> None:
    """Of which `vmap` leaves some in float32, and on CUDA devices casts half of the arguments."""
    params = {name: torch.randn(size, 2, 3, 3, dtype=torch.float32) for name, size in (("v", 2), ("w", 3))}
    params |= {"b": torch.randn(2, dtype=torch.float32)} if bias else {}
    batch = torch.randn(5, 2, 6, 6, dtype=torch.float32)
    seen: set[torch.dtype] = set()

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        y = F.conv2d(x, params["v"], params.get("b"))
        z = F.conv2d(y.tanh()[None], params["w"])
        seen.update((y.dtype, z.dtype))
        return z.float().square().sum() / 100

    exact = loop(loss_fn, params, batch)[1]
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = loop(loss_fn, params, batch)
        found = per_example_gradients(loss_fn, params, batch)
    assert seen == {torch.bfloat16}
    close(found.losses, expected[0], 1e-3)
    for name in params:
        close(found.dense(name), expected[1][name], 2e-2)
        close(found.dense(name), exact[name], 5e-2)


def found_losses(loss_fn: Any, params: Params, batch: Tensor) -> Tensor:
    return per_example_gradients(loss_fn, params, batch).losses


def test_attention_under_a_vmap_of_the_callers_own() -> None:
    """Where the fused kernels would run one member of an ensemble at a time, and warn of it."""
    case = make("dot products causal")
    batch = case.batch(N)
    members = {name: torch.stack([p, p + 1]) for name, p in case.params.items()}
    mean = lambda params: per_example_gradients(case.loss_fn, params, batch).mean()  # noqa: E731
    found = torch.func.vmap(mean)(members)
    for k in (0, 1):
        one = mean({name: p[k] for name, p in members.items()})
        for name in one:
            close(found[name][k], one[name])


LOSSES: dict[str, Any] = {
    "sum, in the old way": lambda y, t: F.cross_entropy(y, t, size_average=False),
    "none, in the old way": lambda y, t: F.cross_entropy(y, t, reduce=False).square().sum(),
    "nll": lambda y, t: F.nll_loss(y.log_softmax(-1), t, size_average=False),
    "weights": lambda y, t: F.cross_entropy(y, t, torch.tensor([1.0, 2.0, 3.0])),
    "smoothed": lambda y, t: F.cross_entropy(y, t, label_smoothing=0.2),
    "ignored": lambda y, t: F.cross_entropy(y, t, ignore_index=0, reduction="sum"),
    "soft": lambda y, t: F.cross_entropy(y, F.one_hot(t, 3).to(y)),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_classification_losses_in_each_of_their_ways(kind: str) -> None:
    params, batch = {"w": torch.randn(3, 4)}, (torch.randn(5, 6, 4), torch.randint(0, 3, (5, 6)))

    def loss_fn(params: Params, example: Any) -> Tensor:
        return LOSSES[kind](F.linear(example[0], params["w"]), example[1])

    losses, expected = loop(loss_fn, params, batch)
    found = per_example_gradients(loss_fn, params, batch)
    close(found.losses, losses)
    close(found.dense("w"), expected["w"])


def test_a_loop_over_the_examples_with_class_labels() -> None:
    """Where `vmap` does not run the loss, its own versions of torch's losses, without a derivative, have no place."""
    params = {"w": torch.randn(3, 4)}

    def loss_fn(params: Params, example: Any) -> Tensor:
        h = F.linear(example[0], params["w"])
        return F.cross_entropy(torch.as_strided_scatter(h, h[:1].sin(), (1,), (1,), 1)[None], example[1][None])

    batch = torch.randn(5, 4), torch.randint(0, 3, (5,))
    found = per_example_gradients(loss_fn, params, batch)
    for name, expected in loop(loss_fn, params, batch)[1].items():
        close(found.dense(name), expected)


def _squares(w: Tensor, differentiated: bool) -> Tensor:
    with torch.set_grad_enabled(differentiated):
        return w.square().sum()


WAYS: dict[str, Any] = {
    "index": lambda p, h, at: F.linear(h, p["heads"][at]),
    "index from the end": lambda p, h, at: F.linear(h, p["heads"][at - 3]),
    "slice": lambda p, h, at: F.linear(h, p["v"][at : at + 2]),
    "narrow": lambda p, h, at: F.linear(h, p["v"].narrow(0, at, 2)),
    "transposed": lambda p, h, at: F.linear(h, (p["v"], p["v"].T, -p["v"])[at]),
    "experts": lambda p, h, at: (
        h @ (p["heads"][torch.tensor([0, 2])], p["heads"][:2], p["heads"][1:])[at].transpose(1, 2)
    ),
    "copies": lambda p, h, at: F.linear(h, [p["heads"][k].clone() for k in range(3)][at]),
    "casts": lambda p, h, at: F.linear(h, [p["heads"][k].float() for k in range(3)][at].double()),
    "equation": lambda p, h, at: torch.einsum(("i,oi->o", "i,io->o", "i,oi->o")[at], h, p["v"]),
    "factor": lambda p, h, at: torch.addmm(p["b"], h[None], p["v"], beta=(1, 2, 0.5)[at]),
    "grad mode": lambda p, h, at: F.linear(h, p["v"]) + _squares(p["v"], at == 1),
    "penalty": lambda p, h, at: F.linear(h, p["v"]) + (p["w"], p["v"], p["heads"])[at].square().sum(),
}


def taking(way: str) -> tuple[SimpleNamespace, Any, Params, Tensor]:
    """The number that a loss closes over, the loss, its parameters and a batch."""
    params = {"w": torch.randn(4, 3), "heads": torch.randn(3, 2, 4), "v": torch.randn(4, 4), "b": torch.randn(4)}
    chosen = SimpleNamespace(at=0)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return WAYS[way](params, F.linear(x, params["w"]).tanh(), chosen.at).square().sum()

    return chosen, loss_fn, params, torch.randn(N, 3)


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_takes_its_parameters_another_way(way: str) -> None:
    """By a number that it closes over, with the same functions on the same shapes."""
    chosen, loss_fn, params, batch = taking(way)
    for chosen.at in (0, 1, 2, 0, 2, 1):
        found = per_example_gradients(loss_fn, params, batch)
        for name, expected in loop(loss_fn, params, batch)[1].items():
            close(found.dense(name), expected, 1e-6 if way == "casts" else 1e-9)


@pytest.mark.parametrize(
    "way", ["slice", *(pytest.param(way, marks=pytest.mark.slow) for way in ("index from the end", "penalty"))]
)
def test_a_compiled_loss_that_takes_its_parameters_another_way(way: str) -> None:
    chosen, loss_fn, params, batch = taking(way)

    def mean(params: Params, batch: Tensor) -> Params:
        return per_example_gradients(loss_fn, params, batch).mean()

    call = torch.compile(mean, fullgraph=True, backend="eager")
    for chosen.at in (0, 1, 0):
        found = call(params, batch)
        for name, expected in loop(loss_fn, params, batch)[1].items():
            close(found[name], expected.mean(0))


def drawing(draw: Callable[[], int], reads_values: bool = False) -> Any:
    """A loss that draws which head, and whether a square layer in between, an example or batch takes."""

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        h = F.linear(x, params["w"]).tanh()
        if reads_values and h.sum() > 1e6:
            h = 2 * h
        at = draw()
        h = F.linear(h, params["v"]) if at == 2 else h
        losses = F.linear(h, params["heads"][at]).square()
        return losses.sum(-1) if x.dim() == 2 else losses.sum()

    return loss_fn


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("draw", "seed"),
    [(lambda: random.randrange(3), random.seed), (lambda: int(np.random.randint(3)), np.random.seed)],
    ids=["python", "numpy"],
)
def test_a_path_that_is_drawn(draw: Callable[[], int], seed: Callable[[int], None], batched: bool) -> None:
    """Discovery takes back its draws, and runs take the path that it saw."""
    params = {"w": torch.randn(4, 3), "heads": torch.randn(3, 2, 4), "v": torch.randn(4, 4)}
    batch = torch.randn(N, 3)
    loss_fn = drawing(draw)
    for k in range(8):
        seed(k)
        ekfac(loss_fn, damping=1.0, batched=batched).init(params, batch)
        found = per_example_gradients(loss_fn, params, batch, batched=batched)
        after = draw()
        seed(k)
        at = draw()
        assert after == draw()
        for name, expected in loop(drawing(functools.partial(int, at)), params, batch)[1].items():
            close(found.dense(name), expected)


def test_a_path_that_each_example_draws() -> None:
    params = {"w": torch.randn(4, 3), "heads": torch.randn(3, 2, 4), "v": torch.randn(4, 4)}
    batch, loss_fn = torch.randn(N, 3), drawing(lambda: random.randrange(3), reads_values=True)
    random.seed(0)
    found = per_example_gradients(loss_fn, params, batch)
    random.seed(0)
    for name, expected in loop(loss_fn, params, batch)[1].items():
        close(found.dense(name), expected)
    runs = []
    for chunk_size in (None, 2):
        random.seed(1)  # 0, then 2
        run = per_example_gradients(drawing(lambda: random.randrange(3)), params, batch, chunk_size=chunk_size)
        runs.append((run, random.random()))
    (whole, after), (chunks, after_chunks) = runs
    assert after_chunks == after
    for name in params:
        close(chunks.dense(name), whole.dense(name))
    path = iter([0, 1, 1, 2] * 9)  # discovery, and chunks of the same calls
    with pytest.raises(RuntimeError, match=r"another path for some of the examples.*before the call"):
        per_example_gradients(drawing(lambda: next(path) % 2), params, batch, chunk_size=2)


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


NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "layer": lambda x, w: F.layer_norm(x, (4,), w),
    "group": lambda x, w: F.group_norm(x[None, :, None], 2, w),
    "instance": lambda x, w: F.instance_norm(x[None, None], weight=w[:1]),
    "batch": lambda x, w: F.batch_norm(x[None], torch.zeros(4), torch.ones(4), w),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("derivative", [torch.func.jacfwd, torch.func.hessian], ids=["jacfwd", "hessian"])
def test_forward_mode_of_norms(norm: str, derivative: Any) -> None:
    """Which torch computes as if tensors without values were on their device, so that discovery has none of it."""
    params, batch = {"v": torch.randn(4, 4), "scale": torch.randn(4)}, torch.randn(N, 4)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        of_x = derivative(lambda x: NORMS[norm](F.linear(x, params["v"]), params["scale"]).sin().sum())
        return of_x(x).square().sum()

    found = per_example_gradients(loss_fn, params, batch)
    for name, expected in loop(loss_fn, params, batch)[1].items():
        close(found.dense(name), expected)


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


def test_chunks_that_differ_in_no_layer() -> None:
    params, batch, calls = {"w": torch.randn(3, 4)}, torch.randn(N, 4), itertools.count()

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x.clone() if next(calls) % 2 else x, params["w"]).sin().sum()

    close(per_example_gradients(loss_fn, params, batch, chunk_size=2).dense("w"), loop(loss_fn, params, batch)[1]["w"])


def test_a_tensor_kept_from_discovery_is_refused() -> None:
    """As a module keeps a mask that it makes in its first call."""
    net, kept = nn.Linear(4, 4).double(), {}
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        if "mask" not in kept:
            kept["mask"] = torch.ones(4).cumsum(0)
        return (kept["mask"] * functional_call(net, params, (x,))).square().sum()

    batch, step = torch.randn(N, 4), ekfac(loss_fn, damping=1.0)
    with pytest.raises(RuntimeError, match=r"kept since its layers were found.*empty the cache"):
        step.precondition(params, batch, step.init(params, batch))
    kept["mask"] = torch.ones(4).cumsum(0)
    _, _, info = step.precondition(params, batch, step.init(params, batch))
    close(info.gradient["weight"], loop(loss_fn, params, batch)[1]["weight"].mean(0))


def test_a_state_of_turned_axes_is_refused() -> None:
    """A square weight that the loss uses turned first, once it calls its layers in another order."""
    order, params, batch = SimpleNamespace(turned=False), {"w": torch.randn(4, 4)}, torch.randn(N, 4)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"].T if order.turned else params["w"]).sin().sum()

    step = ekfac(loss_fn, damping=1.0)
    state = step.init(params, batch)
    order.turned = True
    with pytest.raises(ValueError, match=r"'w' with its axes in the order \(0, 1\).*\(1, 0\)"):
        step.precondition(params, batch, state)


@pytest.mark.parametrize(
    "view", [lambda v: v[1:].as_strided((3,), (4,), 1), lambda v: torch.as_strided(v[:, 1:], (3,), (5,))]
)
def test_memory_that_a_view_does_not_have_is_refused(view: Any) -> None:
    params = {"v": torch.randn(4, 4)}
    with pytest.raises(ValueError, match=r"as_strided of a view of shape .*take it of the tensor"):
        per_example_gradients(lambda p, x: (x * view(p["v"])).sin().sum(), params, torch.randn(N, 3))


def in_no_grad(f: Callable[..., Tensor], *args: Any) -> Tensor:
    with torch.no_grad():
        return f(*args)


IDS = torch.tensor([2, 0, 1])
SQUARE, VECTOR = {"w": (3, 3)}, {"w": (3, 3), "b": (3,)}
APART: dict[str, tuple[Any, tuple[int, ...], Callable[[Params, Tensor], Tensor]]] = {
    "frozen view": (VECTOR, (4, 3), lambda p, x: F.linear(x, in_no_grad(Tensor.t, p["w"])) + p["b"]),
    "frozen copy": (SQUARE, (4, 3), lambda p, x: F.linear(x, p["w"]) * F.linear(x, in_no_grad(Tensor.clone, p["w"]))),
    "frozen bias": (VECTOR, (4, 3), lambda p, x: F.linear(x, p["w"], in_no_grad(Tensor.view, p["b"], -1))),
    "whole numbers": (VECTOR, (4, 3), lambda p, x: F.linear(x, p["w"].to(torch.int8).to(x)) + p["b"]),
    "whole numbers as a bias": (VECTOR, (4, 3), lambda p, x: F.linear(x, p["w"], p["b"].to(torch.int32).to(x))),
    "bits": (VECTOR, (4, 3), lambda p, x: F.linear(x, p["w"].view(torch.int64).view(x.dtype)) + p["b"]),
    "complex": (SQUARE, (4, 3), lambda p, x: (torch.exp(1j * x) @ p["w"].to(torch.complex128)).abs()),
    "its own addend": (SQUARE, (3, 3), lambda p, x: torch.addmm(p["w"], x, p["w"])),
    "its own bias": (SQUARE, (3, 3), lambda p, x: F.linear(x, p["w"], p["w"])),
    "its own addend in a stack": ({"w": (1, 3, 3)}, (3, 3), lambda p, x: torch.baddbmm(p["w"], x[None], p["w"])),
    "a norm of its own bias": (
        {"w": (3,), "b": (3,)},
        (3,),
        lambda p, x: F.layer_norm(p["b"], (3,), p["w"], p["b"]) * x,
    ),
    "bias along positions": ({"w": (3, 3), "b": (3, 1)}, (3, 3), lambda p, x: F.linear(x, p["w"], p["b"])),
    "bias of a norm turned": (
        {"w": (2, 3), "b": (3, 2)},
        (4, 2, 3),
        lambda p, x: F.layer_norm(x, (2, 3), p["w"], p["b"].T) * x,
    ),
    "bias of a norm picked": (
        {"w": (3, 2, 2), "b": (3, 2, 2)},
        (4, 3, 2, 2),
        lambda p, x: F.layer_norm(x, (3, 2, 2), p["w"], p["b"][IDS]) * x,
    ),
    "select_scatter": (SQUARE, (4, 3), lambda p, x: torch.select_scatter(y := F.linear(x, p["w"]), 2 * y[0], 0, -2)),
    "times a number": (VECTOR, (4, 3), lambda p, x: torch.addmm(p["b"], x, p["w"], alpha=2.0)),
    "times a number in a stack": (
        {"w": (2, 3, 3)},
        (2, 4, 3),
        lambda p, x: torch.baddbmm(torch.ones(2, 4, 3), x, p["w"], alpha=2.0),
    ),
    "some of the heads": ({"w": (3, 4, 2)}, (4, 3), lambda p, x: torch.einsum("sd,dhk->shk", x, p["w"][:, 1:3])),
    "a mixture of picked ones": (
        {"w": (3, 3, 2)},
        (4, 3),
        lambda p, x: torch.einsum("se,eoi->soi", x, p["w"][IDS[:2].repeat_interleave(2)[:3]]),
    ),
    "a table of a stack": ({"w": (2, 3, 3)}, (4, 3), lambda p, x: F.embedding(IDS, p["w"][1]) * x[:3]),
    "a kernel in part": ({"w": (4, 3, 2)}, (3, 5), lambda p, x: F.conv1d(x[None], p["w"][1:3])),
    "a diagonal": (SQUARE, (4, 3), lambda p, x: torch.einsum("ii,si->si", p["w"], x)),
    "summed beforehand": ({"w": (3, 3, 2)}, (4, 3), lambda p, x: torch.einsum("oik,si->so", p["w"], x)),
    "one column for all": ({"w": (3, 1)}, (4, 3), lambda p, x: torch.einsum("oi,si->so", p["w"], x)),
    "one matrix for a stack": ({"w": (1, 3, 3)}, (2, 4, 3), lambda p, x: x @ p["w"]),
    "columns in turn": ({"w": (3, 6)}, (4, 3), lambda p, x: F.linear(x, p["w"][:, ::2])),
    "a bias of positions and outputs": ({"w": (3, 3), "b": (4, 3)}, (4, 3), lambda p, x: F.linear(x, p["w"], p["b"])),
    "a constant along positions": (SQUARE, (4, 3), lambda p, x: F.linear(x, p["w"], torch.arange(4.0)[:, None])),
    "a bias of one entry": ({"w": (3, 3), "b": (1,)}, (4, 3), lambda p, x: F.linear(x, p["w"], p["b"])),
}


@pytest.mark.parametrize("how", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", APART)
def test_what_looks_like_a_layer(name: str, how: str) -> None:
    """And has another gradient than the layer's."""
    if (name, how) == ("bits", "compiled") and torch.__version__ < "2.13":
        pytest.skip("before torch 2.13 vmap has no rule for a view of another dtype")
    shapes, shape, outputs = APART[name]
    params, batch = {p: 2 * torch.randn(*of) for p, of in shapes.items()}, torch.randn(N, *shape)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return outputs(params, x).square().sum()

    def dense(params: Params, batch: Tensor) -> Params:
        found = per_example_gradients(loss_fn, params, batch)
        return {p: found.dense(p) for p in params}

    found = (torch.compile(dense, fullgraph=True, backend="eager") if how == "compiled" else dense)(params, batch)
    for p, expected in loop(loss_fn, params, batch)[1].items():
        close(found[p], expected)


def test_an_index_that_is_not_there_from_now_on() -> None:
    at = SimpleNamespace(index=1)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        y = F.linear(x, params["w"])
        return torch.select_scatter(y, y[0], 0, at.index).square().sum()

    params, batch = {"w": torch.randn(3, 3)}, torch.randn(N, 4, 3)
    for at.index in (1, -4):
        close(per_example_gradients(loss_fn, params, batch).dense("w"), loop(loss_fn, params, batch)[1]["w"])
    for at.index in (4, -5):
        with pytest.raises((IndexError, RuntimeError)):  # RuntimeError: of torch 2.11
            per_example_gradients(loss_fn, params, batch)


@torch.jit.script
def penalised(loss: Tensor, p: Tensor, on: bool) -> Tensor:
    if on:
        return loss + p.square().sum()
    return loss


@pytest.mark.parametrize("name", ["w", "b"])
@pytest.mark.parametrize("way", ["taps", "loop", "batched", "vmap"])
def test_a_use_that_no_function_mode_sees_from_now_on(way: str, name: str) -> None:
    """Its plan is stale, though the calls that a mode sees are those of the last time."""
    penalty = SimpleNamespace(on=False)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        loss = F.linear(x, params["w"], params["b"]).cos().sum(-1) + (params["free"].exp() * x).sum(-1)
        if way == "loop" and x.sum() > 1e6:
            loss = 2 * loss
        return penalised(loss, params[name], penalty.on)

    def dense(params: Params, batch: Tensor) -> dict[str, Tensor]:
        found = per_example_gradients(loss_fn, params, batch, batched=way == "batched")
        return {p: found.dense(p) for p in params}

    params, batch = {"w": torch.randn(3, 4), "b": torch.randn(3), "free": torch.randn(4)}, torch.randn(N, 4)
    for penalty.on in (False, True, False):
        expected = loop(loss_fn, params, batch)[1]
        found = dense(params, batch)
        if way == "vmap":
            mapped = torch.vmap(dense, in_dims=(None, 0))(params, torch.stack([batch, batch]))
            found = {p: of_both[1] for p, of_both in mapped.items()}
        for p in params:
            close(found[p], expected[p])


@pytest.mark.parametrize("elsewhere", [False, True], ids=["nowhere else", "of another layer"])
def test_a_bias_from_now_on(elsewhere: bool) -> None:
    """The calls are those of the last time but for what they add."""
    added = SimpleNamespace(on=False)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        y = F.linear(x, params["v"], params["b"] if elsewhere or not added.on else None)
        return (F.linear(x, params["w"], params["b"] if added.on else None) * y).cos().sum()

    params, batch = {"w": torch.randn(3, 4), "v": torch.randn(3, 4), "b": torch.randn(3)}, torch.randn(N, 4)
    for added.on in (False, True, False):
        expected = loop(loss_fn, params, batch)[1]
        found = per_example_gradients(loss_fn, params, batch)
        for p in params:
            close(found.dense(p), expected[p])


def test_a_bias_that_discovery_does_not_see() -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        values = not isinstance(innermost(x), FakeTensor)
        y = F.linear(x, params["v"], params["b"])
        return (F.linear(x, params["w"], params["b"] if values else None) * y).cos().sum()

    params, batch = {"w": torch.randn(3, 4), "v": torch.randn(3, 4), "b": torch.randn(3)}, torch.randn(N, 4)
    with pytest.raises(RuntimeError, match="adds the parameter 'b' where discovery saw None"):
        per_example_gradients(loss_fn, params, batch)


def test_a_loss_that_differentiates_its_layers_from_now_on() -> None:
    """Its plan is stale, however the run by it fails."""
    inner = SimpleNamespace(on=False)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        outputs = lambda x: F.linear(x, params["w"]).tanh()  # noqa: E731
        y = torch.func.grad(lambda x: outputs(x).sum())(x) if inner.on else outputs(x)
        return y.square().sum()

    params, batch = {"w": torch.randn(3, 3)}, torch.randn(N, 4, 3)
    for inner.on in (False, True, False):
        close(per_example_gradients(loss_fn, params, batch).dense("w"), loop(loss_fn, params, batch)[1]["w"])


def _clamped(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"]).tanh()
    if h.requires_grad:
        h.register_hook(lambda g: g.clamp(-0.1, 0.1))
    return F.linear(h, params["v"]).square().sum()


def _hooked(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"]).tanh()
    h.register_hook(lambda g: g * 0.5)
    return F.linear(h, params["v"]).square().sum()


def _branching(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"])
    return F.linear(h if h.grad_fn is None else 2 * h, params["v"]).square().sum()


def _asking_a_parameter(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"])
    return F.linear(2 * h if params["v"].requires_grad else h, params["v"]).square().sum()


def _penalised(params: Params, x: Tensor) -> Tensor:
    trained = [p for p in params.values() if p.requires_grad]
    return F.linear(F.linear(x, params["w"]), params["v"]).cos().sum() + sum(p.square().sum() for p in trained)


@pytest.mark.parametrize("loss_fn", [_clamped, _hooked, _branching, _asking_a_parameter, _penalised])
def test_a_loss_that_asks_what_is_differentiated(loss_fn: Any) -> None:
    params, batch = {"w": torch.randn(6, 4), "v": torch.randn(3, 6)}, torch.randn(N, 4)
    expected = loop(loss_fn, params, batch)[1]
    for _ in range(2):  # and by the plan that is known
        found = per_example_gradients(loss_fn, params, batch)
        for name in params:
            close(found.dense(name), expected[name])
    assert (found.captured.layers["w"].rule is None) == (loss_fn is _penalised)


@pytest.mark.parametrize("loss_fn", [_asking_a_parameter, _penalised])
def test_a_compiled_loss_that_asks_a_parameter_is_refused(loss_fn: Any) -> None:
    params, batch = {"w": torch.randn(6, 4), "v": torch.randn(3, 6)}, torch.randn(N, 4)
    step = ekfac(loss_fn, damping=1.0)
    with pytest.raises(Exception, match=r"asks whether params\['[vw]'\] requires a gradient"):
        torch.compile(step.precondition, fullgraph=True, backend="eager")(params, batch, step.init(params, batch))


def _target(way: str) -> Any:
    def q(params: Params, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, params["w"], params["b"]).tanh(), params["v"]).max()

    def loss_fn(params: Params, example: Any) -> Tensor:
        x, after = example
        if way == "detached parameters":
            return (q(params, x) - q({name: p.detach() for name, p in params.items()}, after)).square()
        if way == "detached output":
            return (q(params, x) - q(params, after).detach()).square()
        with torch.no_grad():
            target = q(params, after)
        return (q(params, x) - target).square()

    return loss_fn


@pytest.mark.parametrize("way", ["no_grad", "detached output"])
def test_calls_that_no_gradient_reaches_are_no_samples(way: str) -> None:
    params = {"w": torch.randn(3, 4), "b": torch.randn(3), "v": torch.randn(2, 3)}
    batch = torch.randn(N, 4), 3 * torch.randn(N, 4)
    expected, found = (
        ekfac(loss_fn, damping=0.1, second_moment=kfac).precondition(
            params, batch, ekfac(loss_fn, damping=0.1).init(params, batch)
        )
        for loss_fn in (_target("detached parameters"), _target(way))
    )
    close_trees(found[0], expected[0], 1e-8)
    close_trees(
        [moment.value for moment in found[1].second_moments.values()],
        [moment.value for moment in expected[1].second_moments.values()],
        1e-8,
    )


def test_an_input_that_is_changed_in_place_from_now_on() -> None:
    relu = nn.ReLU()

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        h = F.linear(x, params["w"])
        return F.linear(h, params["v"]).sin().sum() + relu(h).sum()

    params, batch = {"w": torch.randn(6, 4), "v": torch.randn(3, 6)}, torch.randn(N, 4)
    per_example_gradients(loss_fn, params, batch)
    relu.inplace = True
    with pytest.raises(RuntimeError, match=r"input of the layer 'v'.*changed in place"):
        per_example_gradients(loss_fn, params, batch)


class Named(nn.Module):
    """Every layer that an operator of another name stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4, padding_idx=2)
        self.conv, self.turned = nn.Conv1d(4, 6, 2, padding="same"), nn.ConvTranspose1d(6, 6, 2)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 6), nn.InstanceNorm1d(6, affine=True), nn.BatchNorm1d(6).eval()])
        self.linear, self.norm, self.rms = nn.Linear(6, 3), nn.LayerNorm(3), nn.RMSNorm(3)
        self.matrix = nn.Parameter(torch.randn(3, 3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.turned(self.conv(self.table(ids).mT[None]))
        x = self.linear(sum(norm(x) for norm in self.norms).mT)
        return self.rms(self.norm(x) @ self.matrix)


def test_operators_by_their_own_names_are_the_same_layers() -> None:
    """As `torch.export` writes a module."""
    net, ids = Named(), torch.randint(0, 5, (N, 5))
    params = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    exported = torch.export.export(net, (ids[0],)).module()
    losses = [
        lambda params, x, module=module: functional_call(module, params, (x,)).cos().sum() for module in (net, exported)
    ]
    expected = loop(losses[0], params, ids)[1]
    own, found = (per_example_gradients(loss_fn, params, ids) for loss_fn in losses)
    for name in params:
        close(found.dense(name), expected[name])
    rules = [{layer.weight: layer.sizes for layer in g.captured.layers.values() if layer.rule} for g in (own, found)]
    assert rules[0] == rules[1]
    assert rules[0].keys() == {name for name in params if "bias" not in name}


@pytest.mark.parametrize("lookup", [torch.embedding, torch.ops.aten.embedding, torch.ops.aten.embedding.default])
def test_padding_of_a_lookup_by_another_name(lookup: Any) -> None:
    params, ids = {"table": torch.randn(5, 4)}, torch.randint(0, 5, (N, 6))
    ids[:, 0] = 2

    def loss_fn(params: Params, ids: Tensor) -> Tensor:
        return lookup(params["table"], ids, 2).sin().sum()

    found = per_example_gradients(loss_fn, params, ids)
    close(found.dense("table"), loop(loss_fn, params, ids)[1]["table"])
    assert found.captured.layers["table"].rule == "embedding"


def test_rows_by_the_operators() -> None:
    index, select = torch.ops.aten.index.Tensor, torch.ops.aten.index_select

    def loss_fn(params: Params, ids: Tensor) -> Tensor:
        rows = index(params["w"], [ids - 5]) + select(params["v"], 0, ids) + index(params["u"], [None, ids])[:3].T
        return rows.sin().sum()

    params, batch = (
        {"w": torch.randn(5, 3), "v": torch.randn(5, 3), "u": torch.randn(3, 5)},
        torch.randint(0, 5, (N, 4)),
    )
    found = per_example_gradients(loss_fn, params, batch)
    close_trees({name: found.dense(name) for name in params}, loop(loss_fn, params, batch)[1])
    assert [layer.rule for layer in found.captured.layers.values()] == ["embedding", "embedding", None]


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


def test_a_matrix_that_is_summed_in_full_has_two_sides() -> None:
    """Not one of as many dimensions as it has entries."""
    losses: list[Callable[[Params, Tensor], Tensor]] = [
        lambda params, x: torch.tensordot(x, params["w"]).sin(),
        lambda params, x: torch.tensordot(x[0, 0], params["w"], 0).sin().sum(),
        lambda params, x: torch.einsum("ij,ij->", x, params["w"]).sin(),
    ]
    for loss_fn in losses:
        (layer,) = plan(loss_fn, {"w": torch.randn(6, 5)}, torch.randn(N, 6, 5), Options(RULES)).layers
        assert layer.sizes == (1, 6, 5, 1)

    def of_three(params: Params, x: Tensor) -> Tensor:
        return torch.tensordot(x, params["w"], 3).sin()

    (layer,) = plan(of_three, {"w": torch.randn(6, 5, 4)}, torch.randn(N, 6, 5, 4), Options(RULES)).layers
    assert layer.sizes == (1, 6, 20, 1)


@pytest.mark.parametrize("scatter", [torch.ops.aten.select_scatter, torch.ops.aten.select_scatter.default])
def test_select_scatter_by_another_name(scatter: Any) -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        y = F.linear(x, params["w"])
        return scatter(y, 2 * y[0], 0, 1).square().sum()

    params, batch = {"w": torch.randn(3, 4)}, torch.randn(N, 3, 4)
    close(per_example_gradients(loss_fn, params, batch).dense("w"), loop(loss_fn, params, batch)[1]["w"])


@pytest.mark.parametrize("norm", [torch.batch_norm, torch.ops.aten.batch_norm.default])
def test_batch_statistics_by_another_name_are_refused(norm: Any) -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return norm(x, params["w"], None, None, None, True, 0.1, 1e-5, False).cos().sum()

    with pytest.raises(ValueError, match="batch_norm"):
        per_example_gradients(loss_fn, {"w": torch.randn(4)}, torch.randn(N, 3, 4))


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


def _drawn(params: Params, x: Tensor) -> Tensor:
    noise = torch.empty(4).normal_() + torch.distributions.Normal(0.0, 1.0).rsample((4,))
    return F.linear(x, params["w"] * torch.where(noise < torch.inf, 1.0, noise)).cos().sum()


def _by_requires_grad(params: Params, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.linear(x, params["w"]).tanh().sum(), x, create_graph=True)
    return slope.square().sum()


def _that_has_a_gradient(params: Params, x: Tensor) -> Tensor:
    """As a hook does that `transformers` puts on the embedding of a model."""
    h = F.linear(x, params["w"]).requires_grad_()
    return F.linear(h.sin().requires_grad_(True), params["w"].exp().requires_grad_(True)).cos().sum()


def _by_data(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x, params["w"])
    return (h + (h.round() - h).data).square().sum()


def _by_data_within_a_derivative(params: Params, x: Tensor) -> Tensor:
    """Cut off for the inner derivative, not for that of the loss."""

    def of(z: Tensor) -> Tensor:
        h = F.linear(z, params["w"])
        return (h.data.sigmoid() * h).sum()

    return torch.func.grad(of)(x).square().sum()


@pytest.mark.parametrize("loss_fn", [_drawn, _by_requires_grad, _that_has_a_gradient, _by_data])
def test_what_torch_func_does_not_let_a_loss_do(loss_fn: Any) -> None:
    """At once for all examples."""
    params, batch, calls = {"w": torch.randn(4, 4)}, torch.randn(N, 4), itertools.count()

    def counted(params: Params, x: Tensor) -> Tensor:
        next(calls)
        return loss_fn(params, x)

    found = per_example_gradients(counted, params, batch)
    assert next(calls) == 2
    close(found.dense("w"), loop(loss_fn, params, batch)[1]["w"])
    describe(loss_fn, params, batch)


class Product(torch.autograd.Function):
    """A linear function of one's own, which no `vmap` takes; what its forward calls is no layer of the loss."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.T

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g[0] @ w, torch.einsum("...o,...i->oi", g[0], x)


class VmappedProduct(Product):
    generate_vmap_rule = True


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("own", [Product, VmappedProduct])
def test_a_function_whose_forward_calls_what_has_a_rule(own: Any, batched: bool) -> None:
    bound = own.apply  # as most are called: what is bound before the loss runs

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        x = bound(own.apply(x, params["own"]).tanh(), params["own"])
        return F.linear(torch.as_tensor(x), params["w"]).cos().sum(-1)

    params, batch = {"own": torch.randn(3, 3), "w": torch.randn(2, 3)}, torch.randn(N, 3)
    found = per_example_gradients(loss_fn, params, batch, batched=batched)
    close_trees({name: found.dense(name) for name in params}, loop(loss_fn, params, batch)[1])
    assert "apply" not in vars(_SingleLevelFunction)


def test_what_cuts_an_inner_derivative_alone() -> None:
    params, batch = {"w": torch.randn(4, 4)}, torch.randn(N, 4)
    found = per_example_gradients(_by_data_within_a_derivative, params, batch)
    close(found.dense("w"), loop(_by_data_within_a_derivative, params, batch)[1]["w"])


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


def test_draws_that_are_alike() -> None:
    params, batch = {"w": torch.randn(4, 4)}, torch.randn(N, 4)
    found = per_example_gradients(_drawn, params, batch, randomness="same")
    close(found.dense("w"), loop(_drawn, params, batch)[1]["w"])


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


@pytest.mark.parametrize("of", ["parameter", "view"])
def test_a_hook_on_a_parameter(of: str) -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        w = params["w"] if of == "parameter" else params["w"].T
        if w.requires_grad:
            w.register_hook(lambda g: 2 * g)
        return F.linear(F.linear(x, w if of == "parameter" else w.T), params["v"]).cos().sum()

    params, batch = {"w": torch.randn(6, 4), "v": torch.randn(3, 6)}, torch.randn(N, 4)
    found = per_example_gradients(loss_fn, params, batch)
    for name, expected in loop(loss_fn, params, batch)[1].items():
        close(found.dense(name), expected)


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


class Tripled(torch.autograd.Function):
    """Another derivative than that of its forward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return 3 * g[0]


def test_a_function_with_a_backward_of_its_own_is_refused_in_a_graph() -> None:
    """Where Dynamo of torch 2.13 differentiates its forward."""

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return torch.as_tensor(Tripled.apply(F.linear(x, params["w"]))).cos().sum()

    params, batch = {"w": torch.randn(3, 4)}, torch.randn(N, 4)
    close(per_example_gradients(loss_fn, params, batch).dense("w"), loop(loss_fn, params, batch)[1]["w"])
    step = ekfac(loss_fn, damping=0.1)
    with pytest.raises(Exception, match=r"loss_fn calls Tripled, an autograd\.Function"):
        torch.compile(step.precondition, fullgraph=True, backend="eager")(params, batch, step.init(params, batch))


def test_running_statistics_of_one_image_in_a_loop_over_the_examples() -> None:
    """Of gradients in channels-last torch 2.13 has its derivative wrong: compared with differences."""
    net = nn.BatchNorm2d(3).eval()
    net.running_mean, net.running_var = torch.randn(3), torch.rand(3) + 0.5

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        y = F.conv2d(x[None], params["w"])
        if x.sum() > 1e6:
            y = 2 * y
        y = functional_call(net, {name: params[name] for name in ("weight", "bias")}, (y,))
        return (y.flatten(2).transpose(1, 2) @ torch.ones(3, 2)).cos().sum()

    params = {"w": torch.randn(3, 2, 3, 3), "weight": torch.randn(3), "bias": torch.randn(3)}
    batch = torch.randn(2, 2, 6, 6)
    found = per_example_gradients(loss_fn, params, batch)
    for name in params:
        direction = torch.randn_like(params[name])
        ends = [
            torch.stack([loss_fn({**params, name: params[name] + e * direction}, x) for x in batch])
            for e in (1e-5, -1e-5)
        ]
        slopes = (found.dense(name) * direction).flatten(1).sum(1)
        close(slopes, (ends[0] - ends[1]) / 2e-5, 1e-6)


def test_a_loss_that_runs_only_where_it_is_not_traced() -> None:
    """As some models of `transformers` do; an error of either kind of run is that of a traced one."""

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        known: dict[bool, float] = {False: 2.0}
        return known[torch.compiler.is_compiling()] * F.linear(x, params["w"]).sin().sum()

    params, batch = {"w": torch.randn(3, 4)}, torch.randn(N, 4)
    found = per_example_gradients(loss_fn, params, batch)
    assert found.captured.layers["w"].rule == "linear"
    close(found.dense("w"), loop(loss_fn, params, batch)[1]["w"])
    step = ekfac(loss_fn, damping=1e-2)
    assert step.precondition(params, batch, step.init(params, batch))[0]["w"].any()

    def sloped(params: Params, x: Tensor) -> Tensor:
        y = loss_fn(params, x)
        (slope,) = torch.autograd.grad(y, params["w"], create_graph=True)
        return y + slope.square().sum()

    close(per_example_gradients(sloped, params, batch).dense("w"), loop(sloped, params, batch)[1]["w"])

    def failing(params: Params, x: Tensor) -> Tensor:
        raise ValueError("traced" if torch.compiler.is_compiling() else "plain")

    with pytest.raises(ValueError, match="traced"):
        per_example_gradients(failing, params, batch)


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
