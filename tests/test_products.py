"""Products by oneDNN equal PyTorch's own."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ekfac_func import compact, curvature, ekfac, per_example_gradients
from ekfac_func.capture import WAYS
from ekfac_func.factors import symmetric
from ekfac_func.products import ONEDNN, linear, outer, product, rotate
from ekfac_func.types import Params

from .cases import N, make
from .oracles import close, close_trees, loop, same_bits

pytestmark = pytest.mark.skipif(not ONEDNN, reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def _wherever_and_small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ekfac_func.products.FASTER", True)
    monkeypatch.setattr("ekfac_func.products.ENTRIES", 1)


SHAPES = [(1, 1, 1), (3, 5, 7), (64, 33, 129), (0, 4, 5), (4, 0, 5), (200, 300, 257)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (3,), (0,), (2, 3)], ids=str)
def test_products(shape: tuple[int, int, int], lead: tuple[int, ...]) -> None:
    """Of matrices as they are, turned, and with gaps between their rows."""
    m, d, e = shape
    x, y, Q = (torch.randn(*lead, m, d), torch.randn(*lead, m, e), torch.randn(d, e))
    for gaps_x, gaps_y, turned in itertools.product((False, True), repeat=3):
        f, h, R = x.float(), y.float(), Q.float()
        f = torch.cat([f, f], -1)[..., :d] if gaps_x else f
        h = torch.cat([h, h], -1)[..., :e] if gaps_y else h
        R = torch.cat([R, R], -1)[:, :e] if gaps_y else R
        R = R.mT.contiguous().mT if turned else R
        close(outer(f, h).double(), f.double().mT @ h.double(), 1e-5)
        close(rotate(f, R).double(), f.double() @ R.double(), 1e-5)
        close(outer(f, h[None]).double(), f.double().mT @ h[None].double(), 1e-5)


@pytest.mark.parametrize("lead", [(), (1,), (3,), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(lead: tuple[int, ...], bias: bool) -> None:
    """And its derivative; under autocast, a dispatch mode and for other dtypes PyTorch's own."""
    x, weight, b = torch.randn(*lead, 5).float(), torch.randn(7, 5).float(), torch.randn(7).float() if bias else None
    x.requires_grad_()
    found, expected = linear(x, weight, b), F.linear(x, weight, b)
    close(found, expected, 1e-5)
    g = torch.randn_like(found)
    for slope, wanted in zip(*(torch.autograd.grad(y, x, g) for y in (found, expected)), strict=True):
        close(slope, wanted, 1e-5)
    assert not linear(x.detach(), weight, b).requires_grad
    same_bits(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    close(linear(x, weight.mT.contiguous().mT, b), found, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        same_bits(linear(x, weight, b), F.linear(x, weight, b))
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, b)
    assert counter.get_total_flops() == 2 * 5 * found.numel()


def test_the_operator() -> None:
    """Under vmap of either operand, compiled for any number of rows, counted; what needs a gradient is torch's."""
    x, y, many = torch.randn(6, 4).float(), torch.randn(4, 5).float(), torch.randn(3, 6, 4).float()
    close(torch.vmap(product, (0, None))(many, y), many @ y, 1e-5)
    close(torch.vmap(product, (None, 2))(x, torch.stack([y, 2 * y], 2)), torch.stack([x @ y, 2 * x @ y]), 1e-5)
    with FlopCounterMode(display=False) as counter:
        rotate(x, y)
        outer(many, many)
    assert counter.get_total_flops() == 2 * 6 * 4 * 5 + 2 * 3 * 6 * 4 * 4
    compiled = torch.compile(lambda x: rotate(x, y), fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (6, 9, 2):
        rows = torch.randn(m, 4).float()
        close(compiled(rows), rows @ y, 1e-5)
    (slope,) = torch.autograd.grad(rotate(x.requires_grad_(), y).sum(), x)
    close(slope, y.sum(1).expand(6, 4), 1e-5)
    close(torch.func.grad(lambda x: rotate(x, y).sum())(x.detach()), slope, 1e-5)


def test_forward_mode_is_differentiated() -> None:
    x, y, t = torch.randn(6, 4).float(), torch.randn(4, 5).float(), torch.randn(6, 4).float()
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(rotate(forward_ad.make_dual(x, t), y)).tangent
    assert slope is not None
    close(slope, t @ y, 1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_compact_curvature_on_many_trees(compiled: bool) -> None:
    """On an axis in front as one by one."""
    params, batch = {"w": torch.randn(30, 40).float()}, torch.randn(5, 40).float()
    step = ekfac(lambda p, x: F.linear(x, p["w"]).cos().sum(), damping=1e-2, bases={"*": compact(5)})
    operator = curvature(step.precondition(params, batch, step.init(params, batch))[1])
    many = torch.randn(3, 30, 40).float()
    times = torch.compile(operator.__matmul__, backend="aot_eager") if compiled else operator.__matmul__
    found = times({"w": many})["w"]
    for one, expected in zip(found, many, strict=True):
        close(one, (operator @ {"w": expected})["w"], 1e-5)


def of_columns(p: Params, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["v"], p["c"]).square().sum()


def of_broadcast(p: Params, x: Tensor) -> Tensor:
    y = F.linear(x, p["w"], p["b"][None])
    return (F.linear(y.cos(), p["v"], x[:1, :1]) + F.linear(y.sin(), p["v"], x[:, :1])).square().sum()


def of_biases(p: Params, x: Tensor) -> Tensor:
    """A bias that is made of a parameter, of all examples and of one."""
    return F.linear(F.linear(x, p["w"], p["b"].sin()), p["v"], F.linear(x, p["v"]).mean(0)).square().sum()


@pytest.mark.parametrize("loss_fn", [of_columns, of_broadcast, of_biases])
def test_whatever_the_bias(loss_fn: Any) -> None:
    """With gaps between its entries, of other shapes, or differentiated."""
    columns = torch.randn(4, 2).float()
    params = {"w": torch.randn(4, 4).float(), "v": torch.randn(4, 4).float(), "b": columns[:, 1], "c": columns[:, 0]}
    batch = torch.randn(3, 5, 4).float()
    losses, expected = loop(loss_fn, params, batch)
    found = per_example_gradients(loss_fn, params, batch)
    close(found.losses, losses, 1e-4)
    for name in params:
        close(found.dense(name), expected[name], 1e-4)


def test_a_bias_made_of_the_batch() -> None:
    """Whose gradient goes on to what it was made of."""
    params, x = {"w": torch.randn(4, 4).float(), "v": torch.randn(4, 4).float()}, torch.randn(3, 4).float()

    def losses(p: Params, x: Tensor) -> Tensor:
        return F.linear(x, p["w"], F.linear(x, p["v"]).mean(0)).square().sum(1)

    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    expected = torch.autograd.grad(losses(leaves, x).mean(), list(leaves.values()))
    found = per_example_gradients(losses, params, x, batched=True).mean()
    for name, gradient in zip(params, expected, strict=True):
        close(found[name], gradient, 1e-4)


@pytest.mark.parametrize("name", ["recurrent", "constant input"])
def test_a_layer_of_a_constant_goes_by_vmap(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As the first state of a recurrent net, which no example has for itself."""
    monkeypatch.delitem(WAYS, "LOOPED")
    case = make(name)
    params, low = pytree.tree_map(lambda t: t.float() if t.is_floating_point() else t, (case.params, case.batch(N)))
    losses, expected = loop(case.loss_fn, params, low)
    found = per_example_gradients(case.loss_fn, params, low)
    close(found.losses, losses, 1e-5)
    for key in params:
        close(found.dense(key), expected[key], 1e-4)


FLOAT32 = ["mlp", "addmm", "conv", "conv groups", "positions", "tied", "attention causal", "ids"]


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        *((name, False) for name in FLOAT32),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in FLOAT32),
    ],
)
def test_a_step_in_float32(name: str, compiled: bool) -> None:
    """Near the one in float64, which multiplies by PyTorch."""
    case = make(name)
    loss_fn = case.loss_fn
    double = ekfac(loss_fn, damping=1.0)
    single = ekfac(loss_fn, damping=1.0)
    step = torch.compile(single.precondition, fullgraph=True, backend="aot_eager") if compiled else single.precondition
    params, batches = case.params, [case.batch(N), case.batch(N)]
    few, small = (
        pytree.tree_map(lambda t: t.float() if t.is_floating_point() else t, tree) for tree in (params, batches)
    )
    of_double, of_single = double.init(params, batches[0]), single.init(few, small[0])
    for batch, low in zip(batches, small, strict=True):
        wanted, of_double, _ = double.precondition(params, batch, of_double)
        found, of_single, _ = step(few, low, of_single)
        assert all(found[key].dtype is torch.float32 for key in found)
        close_trees(found, wanted, 1e-3)


@pytest.mark.parametrize("d", [2, 9, 16])
def test_many_rows_of_a_narrow_matrix(d: int) -> None:
    """Which a CPU adds up one after another: 1e-3 off in float32."""
    x = torch.randn(2, 300_000, d).float()
    exact = x.double().mT @ x.double()
    assert (symmetric(x) - exact).abs().max() <= 1e-6 * exact.max()
    y = torch.rand(2, 300_000, 17).float()  # of any width beside it
    exact = x.abs().double().mT @ y.double()
    assert (outer(x.abs(), y) - exact).abs().max() <= 2e-6 * exact.max()


def test_a_matrix_with_an_odd_number_of_columns_and_many_rows() -> None:
    """By rows, by columns and with gaps."""
    x, y = torch.randn(1024, 512).float(), torch.randn(512, 515).float()
    for Q in (y[:, :513], y[:, :513].contiguous(), y[:, :513].mT.contiguous().mT):
        close(rotate(x, Q).double(), x.double() @ Q.double(), 1e-4)
        close(outer(x.mT, Q).double(), x.double() @ Q.double(), 1e-4)
