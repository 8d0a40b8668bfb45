"""One table of small nets, one a feature. A new layer type or a new kind of use adds a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from ekfac_func.types import LossFn, Params

N = 6  # examples of a batch


@dataclass(frozen=True)
class Case:
    """A loss, its parameters, a maker of batches, and the parameters that must be read by a rule."""

    loss_fn: LossFn
    params: Params
    batch: Callable[[int], Any]
    ruled: frozenset[str]


def classifier(net: nn.Module, *shape: int, ruled: set[str] | None = None, classes: int = 3) -> Case:
    """Cross-entropy of a module on examples of a shape; by default every weight of a Linear or Conv has a rule."""
    net = net.double()
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    if ruled is None:
        ruled = {
            f"{name}.{kind}".lstrip(".")
            for name, module in net.named_modules()
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
            for kind in ("weight", "bias")
            if getattr(module, kind) is not None
        }

    def loss_fn(params: Params, example: Any) -> Tensor:
        x, y = example
        return F.cross_entropy(functional_call(net, params, (x[None],)), y[None])

    def batch(n: int = N) -> Any:
        return torch.randn(n, *shape), torch.randint(0, classes, (n,))

    return Case(loss_fn, params, batch, frozenset(ruled))


def head(channels: int, pixels: int, *features: nn.Module) -> nn.Module:
    return nn.Sequential(*features, nn.Tanh(), nn.Flatten(), nn.Linear(channels * pixels, 3))


def function(loss_fn: LossFn, params: Params, *shape: int, ruled: set[str]) -> Case:
    """A loss written as a pure function of a dict, on examples of a shape."""
    return Case(loss_fn, params, lambda n: torch.randn(n, *shape), frozenset(ruled))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


class Reused(nn.Module):
    """One layer called three times, once with its bias left out, beside one called once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(torch.tanh(self.inner(x))))
        return self.outer(F.linear(x, self.inner.weight))


class ReusedConv(nn.Module):
    """One kernel at two dilations and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.outer = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x))
        return self.outer(F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, dilation=2, padding=1).flatten(1))


class Attention(nn.Module):
    """Fused attention hides its projections from the rules."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.outer = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.attention(x, x, x, need_weights=False)[0].mean(1))


class ChannelsLast(nn.Conv2d):
    """A convolution whose weight is channels_last."""

    def __init__(self) -> None:
        super().__init__(4, 3, 3)
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)


def scripted_square(w: Tensor) -> Tensor:
    return (w * w).sum()


def _penalised(params: Params, x: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, params["w"], params["b"])).sum() + (params["w"] ** 4).sum()


def _two_forms(params: Params, x: Tensor) -> Tensor:
    return (torch.tanh(F.linear(x, params["w"])) * torch.sin(x @ params["w"].T)).sum() + F.linear(
        x, params["v"]
    ).cos().sum()


def _transposed(params: Params, x: Tensor) -> Tensor:
    return torch.tanh(x @ params["w"] + params["b"] * params["scale"]).square().sum()


def _shared_bias(params: Params, x: Tensor) -> Tensor:
    return (F.linear(torch.tanh(F.linear(x, params["v"], params["b"])), params["w"], params["b"])).cos().sum()


def _bias_elsewhere(params: Params, x: Tensor) -> Tensor:
    return F.linear(x, params["w"], params["b"]).cos().sum() * params["b"].exp().sum()


def _two_biases(params: Params, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, params["w"], params["b"])), params["w"], params["c"]).cos().sum()


def _inner_vmap(params: Params, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: F.linear(row, params["w"], params["b"]))(x).cos().sum()


def _inner_grad(params: Params, x: Tensor) -> Tensor:
    def potential(x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, params["w"])), params["v"]).sum()

    return torch.func.grad(potential)(x).square().sum() + F.linear(x, params["u"]).cos().sum()


def _metadata(params: Params, x: Tensor) -> Tensor:
    scale = params["w"].shape[0] * params["w"].detach().abs().mean()
    return F.linear(x, params["w"]).cos().sum() * scale


def _unused(params: Params, x: Tensor) -> Tensor:
    return F.linear(x, params["w"]).cos().sum()


def _several_groups(params: Params, x: Tensor) -> Tensor:
    halves = F.conv1d(x, params["w"], groups=2)
    return F.conv1d(torch.tanh(halves)[:2], params["w"], groups=1).cos().sum() + F.conv1d(x, params["v"]).sin().sum()


def _names(params: Params, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, params["a"]).cos(), params["b"]).sum()


def _in_turn(params: Params, x: Tensor) -> Tensor:
    """The parameters in their own order, of which the second has no rule."""
    for name, w in params.items():
        x = torch.tanh(x @ w) if name == "second" else F.linear(x, w)
    return x.sum()


def _forward_mode(params: Params, x: Tensor) -> Tensor:
    """Forward-mode differentiation, for which vmap has no rule, through a layer."""
    with forward_ad.dual_level():
        y = F.linear(forward_ad.make_dual(x, torch.ones_like(x)), params["w"]).tanh()
        slope = forward_ad.unpack_dual(y).tangent.square().sum()
    return slope + F.linear(x, params["v"]).cos().sum()


class Recurrent(nn.Module):
    """A recurrent net, for which vmap has no rule, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.outer = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.recurrent(x)[0][:, -1])


def _keywords(params: Params, x: Tensor) -> Tensor:
    return F.linear(weight=params["w"], input=x, bias=params["b"]).cos().sum()


def _vector_weight(params: Params, x: Tensor) -> Tensor:
    return F.linear(x, params["v"]).cos().sum() * params["s"]


def _tokens(params: Params, example: Any) -> Tensor:
    """Class-index losses in each of their forms: a token each, ignored ones, weights, one distribution, a map."""
    x, y = example
    logits = F.linear(x, params["w"], params["b"])
    return (
        F.cross_entropy(logits, y)
        + F.cross_entropy(logits, y, ignore_index=1, reduction="sum")
        + 2 * F.cross_entropy(logits, y, reduction="none").square().sum()
        + F.cross_entropy(logits, y, torch.tensor([0.1, 0.2, 0.7]), label_smoothing=0.1)
        + F.nll_loss(logits[0].tanh(), y[0])
        + F.cross_entropy(logits.T.reshape(1, 3, 2, 2), y.reshape(1, 2, 2))
        + F.cross_entropy(logits, logits.detach().softmax(-1))
        + torch.func.vmap(lambda z, k: F.cross_entropy(z, k))(logits, y).sum()
    )


def _nested_loss(params: Params, example: Any) -> Tensor:
    x, y = example
    logits = F.linear(x, params["w"], params["b"])
    return torch.func.grad(lambda z: F.cross_entropy(z, y))(logits).square().sum() + F.cross_entropy(logits, y)


def tokens(loss_fn: LossFn) -> Case:
    params = {"w": randn(3, 4), "b": randn(3)}
    return Case(loss_fn, params, lambda n: (randn(n, 4, 4), torch.randint(0, 3, (n, 4))), frozenset(params))


def _attended(params: Params, x: Tensor) -> Tensor:
    keys = F.linear(x, params["w"])
    return (F.linear(torch.eye(3, dtype=x.dtype), params["u"]) @ keys.T).logsumexp(-1).sum()


def _scripted_loss() -> LossFn:
    script = torch.jit.script(scripted_square)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"]).cos().sum() + script(params["w"]) * x.sum()

    return loss_fn


def tree_case() -> Case:
    """Examples that are a nested tree."""
    params = {"w": randn(3, 4), "b": randn(3)}

    def loss_fn(params: Params, example: Any) -> Tensor:
        y = F.linear(example["x"], params["w"], params["b"])
        return (y * example["more"][0]).cos().sum() * example["more"][1]["scale"]

    def batch(n: int = N) -> Any:
        return {"x": randn(n, 4), "more": (randn(n, 3), {"scale": torch.rand(n)})}

    return Case(loss_fn, params, batch, frozenset({"w", "b"}))


def same_tensor() -> Case:
    w = randn(4, 4)
    return function(_names, {"a": w, "b": w}, 4, ruled={"a", "b"})


def frozen() -> Case:
    """Half of the net is not in params."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    case = classifier(net, 4)
    params = {name: case.params[name] for name in ("0.bias", "2.weight")}
    return Case(case.loss_fn, params, case.batch, frozenset({"2.weight"}))


def image(*features: nn.Module, channels: int, pixels: int) -> Case:
    return classifier(head(channels, pixels, *features), 4, 6, 6)


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: classifier(nn.Linear(4, 3), 4),
    "mlp": lambda: classifier(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), 4),
    "no bias": lambda: classifier(nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)), 4),
    "deep": lambda: classifier(nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)], nn.Linear(4, 3)), 4),
    "positions": lambda: classifier(head(3, 10, nn.Linear(4, 3)), 2, 5, 4),
    "reused": lambda: classifier(Reused(), 5),
    "reused conv": lambda: classifier(ReusedConv(), 2, 6, 6),
    "conv": lambda: image(nn.Conv2d(4, 3, 3), channels=3, pixels=16),
    "conv stride": lambda: image(nn.Conv2d(4, 3, (3, 2), stride=(2, 3)), channels=3, pixels=4),
    "conv padding": lambda: image(nn.Conv2d(4, 3, 3, padding=(2, 1)), channels=3, pixels=48),
    "conv same": lambda: image(nn.Conv2d(4, 3, (4, 2), padding="same"), channels=3, pixels=36),
    "conv same dilated": lambda: image(nn.Conv2d(4, 3, 2, padding="same", dilation=(3, 1)), channels=3, pixels=36),
    "conv valid": lambda: image(nn.Conv2d(4, 3, 3, padding="valid", bias=False), channels=3, pixels=16),
    "conv dilation": lambda: image(nn.Conv2d(4, 3, 3, dilation=2), channels=3, pixels=4),
    "conv groups": lambda: image(nn.Conv2d(4, 6, 3, groups=2), channels=6, pixels=16),
    "conv depthwise": lambda: image(nn.Conv2d(4, 8, 3, groups=4, padding=1), channels=8, pixels=36),
    "conv reflect": lambda: image(nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), channels=3, pixels=36),
    "conv circular": lambda: image(nn.Conv2d(4, 3, 3, padding=2, padding_mode="circular"), channels=3, pixels=64),
    "conv replicate": lambda: image(nn.Conv2d(4, 3, 3, padding=1, padding_mode="replicate"), channels=3, pixels=36),
    "conv channels last": lambda: image(ChannelsLast(), channels=3, pixels=16),
    "conv1d": lambda: classifier(head(4, 3, nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2)), 2, 5),
    "conv3d": lambda: classifier(head(2, 8, nn.Conv3d(2, 2, 2, dilation=(1, 2, 1), groups=2)), 2, 3, 4, 3),
    "several groups": lambda: function(_several_groups, {"w": randn(4, 2, 2), "v": randn(3, 4, 1)}, 4, 5, ruled={"v"}),
    "batch norm eval": lambda: classifier(head(3, 16, nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3).eval()), 4, 6, 6),
    "group norm": lambda: image(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), channels=4, pixels=16),
    "layer norm": lambda: classifier(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)), 4),
    "attention": lambda: classifier(Attention(), 3, 4, ruled={"outer.weight", "outer.bias"}),
    "tree": tree_case,
    "frozen": frozen,
    "same tensor twice": same_tensor,
    "in turn": lambda: function(
        _in_turn, {"first": randn(4, 4), "second": randn(4, 4), "third": randn(4, 4)}, 4, ruled={"first", "third"}
    ),
    "recurrent": lambda: classifier(Recurrent(), 3, 4),
    "forward mode": lambda: function(_forward_mode, {"w": randn(3, 4), "v": randn(2, 4)}, 4, ruled={"v"}),
    "no outputs": lambda: function(_in_turn, {"first": randn(3, 4), "last": randn(0, 3)}, 4, ruled={"first", "last"}),
    "keywords": lambda: function(_keywords, {"w": randn(3, 4), "b": randn(3)}, 4, ruled={"w", "b"}),
    "penalty": lambda: function(_penalised, {"w": randn(3, 4), "b": randn(3)}, 4, ruled=set()),
    "two forms": lambda: function(_two_forms, {"w": randn(3, 4), "v": randn(2, 4)}, 4, ruled={"v"}),
    "transposed": lambda: function(_transposed, {"w": randn(4, 3), "b": randn(3), "scale": randn()}, 4, ruled=set()),
    "shared bias": lambda: function(
        _shared_bias, {"v": randn(4, 4), "w": randn(4, 4), "b": randn(4)}, 4, ruled={"v", "w"}
    ),
    "bias elsewhere": lambda: function(_bias_elsewhere, {"w": randn(3, 4), "b": randn(3)}, 4, ruled={"w"}),
    "two biases": lambda: function(_two_biases, {"w": randn(4, 4), "b": randn(4), "c": randn(4)}, 4, ruled={"w"}),
    "inner vmap": lambda: function(_inner_vmap, {"w": randn(3, 4), "b": randn(3)}, 5, 4, ruled=set()),
    "inner grad": lambda: function(_inner_grad, {"w": randn(5, 4), "v": randn(2, 5), "u": randn(3, 4)}, 4, ruled={"u"}),
    "metadata": lambda: function(_metadata, {"w": randn(3, 4)}, 4, ruled={"w"}),
    "unused": lambda: function(_unused, {"w": randn(3, 4), "v": randn(2, 2), "c": randn(2)}, 4, ruled={"w"}),
    "script": lambda: function(_scripted_loss(), {"w": randn(3, 4)}, 4, ruled=set()),
    "vector weight": lambda: function(_vector_weight, {"v": randn(4), "s": randn()}, 3, 4, ruled=set()),
    "token losses": lambda: tokens(_tokens),
    "nested loss": lambda: tokens(_nested_loss),
    "constant input": lambda: function(_attended, {"w": randn(2, 4), "u": randn(2, 3)}, 5, 4, ruled={"w", "u"}),
}


def make(name: str) -> Case:
    torch.manual_seed(sum(map(ord, name)))
    return CASES[name]()


LOOPED = {"recurrent", "forward mode"}  # vmap has no rule for them, so neither has a compiled step
every_case = pytest.mark.parametrize("name", CASES)
every_batched_case = pytest.mark.parametrize("name", [name for name in CASES if name not in LOOPED])
