"""A loss that takes another path than when its layers were found: seen and followed, or refused."""

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
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call

from ekfac_func import ekfac, per_example_gradients
from ekfac_func.modes import innermost
from ekfac_func.types import Params

from .cases import N
from .oracles import close, close_trees, loop


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
