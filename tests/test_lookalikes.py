"""Calls that look like a layer and are none, or another, and layers by other names."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ekfac_func import RULES, per_example_gradients
from ekfac_func.discovery import Options, plan
from ekfac_func.types import Params

from .cases import N
from .oracles import close, close_trees, loop


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
