"""The functions that stand in for torch's under `vmap`, beside these: values, dtypes and derivatives."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ekfac_func import per_example_gradients
from ekfac_func.batching import EAGER_LAYERS, EXACT, MAPPED, OPEN, OPEN_LAYERS
from ekfac_func.graphs import IN_GRAPHS
from ekfac_func.types import Params

from .cases import N, make
from .oracles import close, close_trees, loop

LABELS, PLACES = torch.tensor([2, 0, 1, 4, 2, 3]), torch.tensor([[3, 0, 2], [1, 1, 4]])
CALLS: dict[Any, list[Callable[[Any, Tensor], Any]]] = {  # of x, [2 4 6 5]
    F.avg_pool2d: [
        lambda f, x: f(x, 2),
        lambda f, x: f(x[0], (3, 2), (1, 2), (1, 0), count_include_pad=False),
        lambda f, x: f(x, 3, 2, ceil_mode=True, divisor_override=5),
    ],
    F.avg_pool1d: [
        lambda f, x: f(x[0], 2),
        lambda f, x: f(x[0, 0], (3,), 2, 1, count_include_pad=False),
        lambda f, x: f(x[0], 3, 2, ceil_mode=True),
    ],
    F.max_pool2d: [
        lambda f, x: f(x, 3, 2, 1, ceil_mode=True),
        lambda f, x: f(x[0], 2, dilation=2, return_indices=True)[0],
    ],
    F.max_pool1d: [
        lambda f, x: f(x[0], 2),
    ],
    F.max_pool3d: [
        lambda f, x: f(x, 2),
    ],
    F.cross_entropy: [
        lambda f, x: f(x[0, 0], LABELS),
        lambda f, x: f(x[0, 0], LABELS, ignore_index=2, label_smoothing=0.2),
        lambda f, x: f(x[0, 0], LABELS, label_smoothing=0.2, reduction="none"),
        lambda f, x: f(x[0, 0, 0], LABELS[0], label_smoothing=0.2),
        lambda f, x: f(x.movedim(3, 1), LABELS[:, None].expand(2, 4, 6, 1)[..., 0] % 5, reduction="sum"),
        lambda f, x: f(x[0, 0], x[0, 1].softmax(-1)),
        lambda f, x: f(x[0, 0], LABELS, torch.arange(1.0, 6.0)),
    ],
    F.nll_loss: [
        lambda f, x: f(x[0, 0], LABELS, ignore_index=2),
        lambda f, x: f(x[0, 0, 0], LABELS[0]),
        lambda f, x: f(x[0, 0], LABELS, torch.arange(1.0, 6.0)),
    ],
    F.scaled_dot_product_attention: [
        lambda f, x: f(x, x.cos(), x.sin(), scale=0.3),
        lambda f, x: f(x, x[:, :2], x[:, 1:3], is_causal=True, enable_gqa=True),
        lambda f, x: f(x, x[:, :1], x[:, 1:2]),
        lambda f, x: f(x, x[:1], x[1:]),
        lambda f, x: f(x[0, 0], x[0, 1], x[0, 2]),
        lambda f, x: f(x, x, x, x[0, 0] @ x[0, 1].T),
        lambda f, x: f(x, x, x, (x @ x.mT)[0]),
        lambda f, x: f(x, x, x, (x @ x.mT)[:, :1]),
        lambda f, x: f(x, x, x, torch.arange(4.0)[:, None, None].expand(4, 1, 6)),
    ],
    F.group_norm: [
        lambda f, x: f(x, 2, x[0, :, 0, 0], x[0, :, 0, 1], 0.1),
    ],
    F.layer_norm: [
        lambda f, x: f(x, (6, 5), x[0, 0], x[0, 1], 0.1),
    ],
    F.instance_norm: [
        lambda f, x: f(x, weight=x[0, :, 0, 0], eps=0.1),
        lambda f, x: f(x, torch.arange(4.0), torch.arange(1.0, 5.0), x[0, :, 0, 0], None, False),
    ],
    F.batch_norm: [
        lambda f, x: f(x, torch.arange(4.0), torch.arange(1.0, 5.0), None, x[0, :, 0, 1], eps=0.1),
    ],
    F.conv2d: [
        lambda f, x: f(x, torch.ones(4, 2, 3, 2).cumsum(0), x[0, :, 0, 0], (2, 1), (1, 0), (1, 2), 2),
        lambda f, x: f(x[0], torch.ones(3, 4, 2, 3).cumsum(1), padding="same"),
        lambda f, x: f(x, torch.ones(3, 4, 2, 3).cumsum(1), padding="valid"),
    ],
    F.conv1d: [lambda f, x: f(x[0], torch.ones(3, 6, 2).cumsum(1), padding=1)],
    F.conv3d: [lambda f, x: f(x[None], torch.ones(3, 2, 2, 3, 1).cumsum(0), stride=(1, 2, 1))],
    F.conv_transpose1d: [lambda f, x: f(x[0], torch.ones(6, 3, 2).cumsum(0), output_padding=1, stride=2)],
    F.conv_transpose3d: [lambda f, x: f(x[None], torch.ones(2, 3, 2, 2, 1).cumsum(1), dilation=2)],
    F.conv_transpose2d: [
        lambda f, x: f(x, torch.ones(4, 3, 3, 2).cumsum(0), None, (2, 3), (1, 0), (1, 2), 2, (1, 2)),
        lambda f, x: f(x[0], torch.ones(4, 3, 3, 2).cumsum(1), x[0, :3, 0, 0]),
    ],
    F.linear: [
        lambda f, x: f(x, torch.ones(3, 5).cumsum(0), torch.ones(3)),
        lambda f, x: f(x[0, 0], torch.ones(3, 5).cumsum(0), torch.arange(6.0)[:, None]),
        lambda f, x: f(x, torch.arange(5.0)),
    ],
    torch.addmm: [
        lambda f, x: f(torch.arange(3.0), x[0, 0], torch.ones(5, 3).cumsum(0)),
        lambda f, x: f(torch.arange(6.0)[:, None], x[0, 0], torch.ones(5, 3).cumsum(0)),
        lambda f, x: f(torch.arange(3.0), x[0, 0], torch.ones(5, 3).cumsum(0), alpha=2),
    ],
    torch.select_scatter: [
        lambda f, x: f(x, x[0], 0, 1),
        lambda f, x: f(x.float(), x[..., 0], -1, -2),
    ],
    F.one_hot: [
        lambda f, x: f(x.argmax(-1), 5),
    ],
    F.embedding: [
        lambda f, x: f(PLACES, x[0, 0], -2),
    ],
    torch.cat: [
        lambda f, x: f([x, torch.ones(2, 4, 6, 1), torch.ones(0)], -1),
    ],
    torch.gather: [
        lambda f, x: f(x[0, 0], 1, PLACES),
        lambda f, x: f(x[0, 0], -2, PLACES),
        lambda f, x: f(x[0, 0, 0], 0, x[1, 1, 1].argmax()),
        lambda f, x: f(x[0, 0, 0, 0], 0, torch.tensor([0])),
    ],
    torch.index_select: [
        lambda f, x: f(x, -1, PLACES[0]),
        lambda f, x: f(x[0, 0, 0, 0], 0, torch.tensor([0])),
    ],
    torch.index_add: [
        lambda f, x: f(x, 2, PLACES[0], x[:, :, :3], alpha=2.5),
        lambda f, x: f(x[0, 0, 0, 0], 0, torch.tensor([0]), x[0, 0, 0, 1], alpha=2.5),
        lambda f, x: f(x[0, 0] > 0, 0, PLACES[0], x[0, 1, :3] > 0),
    ],
    torch.scatter_add: [
        lambda f, x: f(x[0, 0], 1, PLACES, x[0, 1].detach()),
        lambda f, x: f(x[0, 0, 0], 0, PLACES[0, 0], x[0, 0, 0, 1]),
        lambda f, x: f(x[0, 0, 0, 0], 0, torch.tensor(0), x[0, 0, 0, 1]),
    ],
    F.kl_div: [
        lambda f, x: f(x, (x > 0).to(x), reduction="batchmean"),
        lambda f, x: f(x, x.cos(), log_target=True, reduction="sum"),
        lambda f, x: f(x, x.detach().exp(), reduction="none"),
    ],
    F.binary_cross_entropy: [
        lambda f, x: f(x.sigmoid(), x.detach().cos().abs(), torch.arange(5.0), reduction="sum"),
        lambda f, x: f(x.sigmoid(), x.detach().cos().abs(), reduction="none"),
    ],
    F.interpolate: [
        lambda f, x: f(x, scale_factor=(1.5, 0.7)),
        lambda f, x: f(x, (4, 7), mode="bilinear", align_corners=True),
        lambda f, x: f(x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=True),
        lambda f, x: f(x, 3, mode="bicubic", antialias=True),
        lambda f, x: f(x[0], 4, mode="linear"),
    ],
    F.adaptive_avg_pool1d: [lambda f, x: f(x[0], 3)],
    F.adaptive_max_pool1d: [lambda f, x: f(x[0, 0], 2)],
    F.adaptive_avg_pool3d: [lambda f, x: f(x, (2, None, 3))],
    F.adaptive_max_pool3d: [lambda f, x: f(x, 2)],
    torch.as_strided: [lambda f, x: f(x, (3, 2), (5, 2))],
    F.adaptive_avg_pool2d: [
        lambda f, x: f(x, (2, None)),
        lambda f, x: f(x[0], 3),
    ],
    F.adaptive_max_pool2d: [
        lambda f, x: f(x, 2),
        lambda f, x: f(x, (3, 2), True)[0],
    ],
}


@pytest.mark.parametrize(
    ("function", "at"),
    [
        pytest.param(function, at, id=f"{function.__name__} {at}")
        for function, calls in CALLS.items()
        for at in range(len(calls))
    ],
)
def test_functions_are_those_of_torch(function: Any, at: int) -> None:
    call = CALLS[function][at]
    x = torch.randn(3, 2, 4, 6, 5, requires_grad=True)
    expected = torch.stack([call(function, one) for one in x])
    tables: list[Any] = [EXACT, MAPPED, OPEN, OPEN_LAYERS, EAGER_LAYERS, IN_GRAPHS]
    standing_in = [table[function] for table in tables if function in table]
    assert standing_in
    for ours in standing_in:
        found = torch.vmap(functools.partial(call, ours))(x)
        assert found.dtype == expected.dtype
        close(found.double(), expected.double())
        if expected.requires_grad:
            weights = torch.randn_like(expected)
            wanted = torch.autograd.grad(expected, x, weights, retain_graph=True)
            close_trees(torch.autograd.grad(found, x, weights), wanted)


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
