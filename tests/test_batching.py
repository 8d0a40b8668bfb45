"""The functions that stand in for torch's under `vmap`, beside these: values, dtypes and derivatives."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ekfac_func.batching import EAGER_LAYERS, EXACT, MAPPED, OPEN, OPEN_LAYERS
from ekfac_func.graphs import IN_GRAPHS

from .oracles import close, close_trees

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
