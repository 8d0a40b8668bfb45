"""One table of small nets, one a feature. A new layer type or a new kind of use adds a row."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from ekfac_func import RULES, SUA
from ekfac_func.types import LossFn, Params

N = 6  # examples of a batch

RULED = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.BatchNorm1d, nn.BatchNorm2d),
    *(nn.RNNBase, nn.RNNCellBase),
)


@dataclass(frozen=True)
class Case:
    """A loss, its parameters, a maker of batches, and the parameters that must be read by a rule."""

    loss_fn: LossFn
    params: Params
    batch: Callable[[int], Any]
    ruled: frozenset[str]


def classifier(net: nn.Module, *shape: int, ruled: set[str] | None = None, classes: int = 3) -> Case:
    """Cross-entropy of a module on examples of a shape; by default those of the modules `RULED` have a rule."""
    net = net.double()
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    if ruled is None:
        ruled = {
            f"{name}.{kind}".lstrip(".")
            for name, module in net.named_modules()
            if isinstance(module, RULED)
            for kind, _ in module.named_parameters(recurse=False)
            if f"{name}.{kind}".lstrip(".") in params  # once, where it has two names
        }

    def loss_fn(params: Params, example: Any) -> Tensor:
        x, y = example
        return F.cross_entropy(functional_call(net, params, (x[None],)), y[None])

    def batch(n: int = N) -> Any:
        return torch.randn(n, *shape), torch.randint(0, classes, (n,))

    return Case(loss_fn, params, batch, frozenset(ruled))


class Cells(nn.Module):
    """Recurrent cells in turn, step by step."""

    def __init__(self, *cells: nn.Module) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.cells[0](x[:, 0])
        for t in range(1, x.shape[1]):
            h, c = self.cells[0](x[:, t], (h, c))
            for cell in self.cells[1:]:
                h = cell(x[:, t], h)
        return h * c


class Here(TorchFunctionMode):
    """What a loss makes of no other tensor is made on the device, as its author would have written it."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func in (torch.tensor, torch.ones, torch.zeros, torch.arange, torch.eye)
        found = func(*args, **(kwargs or {}))
        return found.to(self.device) if made and "device" not in (kwargs or {}) else found


def made_on(device: str, loss_fn: LossFn) -> LossFn:
    """The loss, with what it makes itself on a device."""

    def on_device(params: Params, example: Any) -> Any:
        with Here(device):
            return loss_fn(params, example)

    return on_device


def head(channels: int, pixels: int, *features: nn.Module) -> nn.Module:
    return nn.Sequential(*features, nn.Tanh(), nn.Flatten(), nn.Linear(channels * pixels, 3))


def function(loss_fn: LossFn, params: Params, *shape: int, ruled: set[str]) -> Case:
    """A loss written as a pure function of a dict, on examples of a shape."""
    return Case(loss_fn, params, lambda n: torch.randn(n, *shape), frozenset(ruled))


def _filled(params: Params, x: Tensor) -> Tensor:
    """A recurrence that writes into tensors which it made beforehand."""
    h, outputs, total = torch.ones(4), x.new_zeros(3).repeat(4, 1).T.contiguous(), torch.tensor(0.0)
    for t, row in enumerate(x):
        h += torch.tanh(F.linear(row + h, params["w"], params["b"]))
        outputs[t] = h
    total += F.linear(outputs, params["v"]).sin().sum()
    return total


def _messages(params: Params, x: Tensor) -> Tensor:
    """Of a graph of three nodes, added up where they arrive."""
    sources, targets = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 2, 0, 1])
    degrees = torch.zeros(3).index_add_(0, targets, torch.ones(4))
    arrived = torch.zeros(3, 2).index_add_(0, targets, F.linear(x[sources], params["w"]))
    return (arrived / degrees[:, None]).tanh().sum()


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
    """Fused attention: of x to itself, or to other keys and values, in one of its many forms."""

    def __init__(self, form: str = "self", **options: Any) -> None:
        super().__init__()
        self.attention, self.outer = nn.MultiheadAttention(4, 2, batch_first=True, **options), nn.Linear(4, 3)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        memory, mask = torch.cat([x, x.cos()], 1), torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        padding = torch.zeros(1, x.shape[1]).bool().index_fill(1, torch.tensor([0]), True)
        attend = self.attention
        y = {
            "self": lambda: attend(x, x, x, need_weights=False)[0],
            "weights": lambda: (
                attend(x, x, x)[0] + attend(x, x, x, average_attn_weights=False)[1].sum((1, 3))[..., None]
            ),
            "cross": lambda: attend(x, memory, memory, need_weights=False)[0],
            "all differ": lambda: attend(x, memory, memory.sin())[0],
            "other sizes": lambda: attend(x, memory[..., :3], memory[..., :2])[0],
            "masked": lambda: attend(x, x, x, attn_mask=mask, need_weights=False)[0],
            "causal": lambda: attend(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0],
            "padded": lambda: attend(x, x, x, key_padding_mask=padding, attn_mask=mask.T, need_weights=False)[0],
            "per head": lambda: attend(x, x, x, attn_mask=torch.stack([mask, mask.T]), need_weights=False)[0],
            "unbatched": lambda: attend(x[0], x[0], x[0])[0][None],
        }[self.form]()
        return self.outer(y.mean(1))


class ChannelsLast(nn.Conv2d):
    """A convolution whose weight is channels_last."""

    def __init__(self) -> None:
        super().__init__(4, 3, 3)
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)


class Tied(nn.Module):
    """An embedding that is the head as well, with a bias of its own, and in between a layer."""

    def __init__(self, bias: bool = False, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(7, 4, padding_idx), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embedding(ids)))).mean(1)


class Bag(nn.Module):
    """A bag of ids, with weights or in bags of several sizes."""

    def __init__(self, form: str, **options: Any) -> None:
        super().__init__()
        self.bag, self.outer, self.form = nn.EmbeddingBag(7, 4, **options), nn.Linear(4, 7), form

    def forward(self, ids: Tensor) -> Tensor:
        if self.form == "weights":
            return self.outer(self.bag(ids, per_sample_weights=(ids.double() + 1).sqrt()).tanh())
        if self.form == "offsets":
            return self.outer(self.bag(ids[0], torch.tensor([0, 1, 1, 3]))[None].tanh().mean(1))
        return self.outer(self.bag(ids).tanh())


class Ids(nn.Module):
    """Ids and, at each position, the id of the position."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words, self.places, self.outer = nn.Embedding(7, 4, **options), nn.Embedding(5, 4), nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.outer((self.words(ids) * self.places(torch.arange(ids.shape[1]))).tanh().sum(1))


def of_ids(net: nn.Module, ruled: set[str] | None = None) -> Case:
    """A classifier of five ids out of seven."""
    case = classifier(net, 5, ruled=ruled)

    def batch(n: int = N) -> Any:
        return torch.randint(0, 7, (n, 5)), torch.randint(0, 7, (n,))

    return Case(case.loss_fn, case.params, batch, case.ruled)


def scripted_square(w: Tensor) -> Tensor:
    return (w * w).sum()


def _penalised(params: Params, x: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, params["w"], params["b"])).sum() + (params["w"] ** 4).sum()


def _two_forms(params: Params, x: Tensor) -> Tensor:
    return (torch.tanh(F.linear(x, params["w"])) * torch.sin(x @ (params["w"] + 1).T)).sum() + F.linear(
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


def _inner_grad_of_layers(params: Params, x: Tensor) -> Tensor:
    h = torch.func.grad(lambda z: torch.tanh(z @ params["w"].T).sum())(x)
    y = F.layer_norm(h, (4,), params["g"]) + F.conv1d(h[None], params["c"], padding=1)
    return y.sin().square().sum()


def _products(params: Params, x: Tensor) -> Tensor:
    """A product with a matrix by each of its names, in either order."""
    a, b, c, d, e, f, g, h = params.values()
    x = torch.tanh(torch.matmul(x, a) @ b).mm(c)
    x = torch.bmm(torch.mm(x, d)[None], e[None])[0].matmul(f)
    y = torch.matmul(g, x.T.cos()) + h @ x[0].sin()[:, None]
    return (y.tanh() @ torch.ones(3)).cos().sum() + (h @ x[1]).sin().sum()


def _views(params: Params, x: Tensor) -> Tensor:
    """Matrices turned, reshaped, and copied."""
    a, b, c, d, e, f, g, h, j = params.values()
    y = F.linear(x, a.T) + F.linear(x, b.t()) + F.linear(x, c.mT) + F.linear(x, d.transpose(0, 1))
    y = y + x @ e.permute(1, 0).transpose(1, 0) + x @ f.unsqueeze(0)[0].contiguous() + F.linear(x, g.T.contiguous())
    heads = torch.einsum("sd,dhk->hsk", x, h.view(4, 2, 3)).transpose(0, 1).reshape(3, 6)
    return (y + heads).cos().sum() + F.linear(x[:, :3], j.reshape(8, 3)).sin().sum()


def _slices(params: Params, x: Tensor) -> Tensor:
    """Pieces of a packed matrix with pieces of its bias, experts one by one, a table in two."""
    q, _, v = params["packed"].chunk(3)
    p, r = params["bias"][:4], params["bias"].narrow(0, 4, 8)
    y = F.linear(x, q, p).tanh() @ F.linear(x, params["packed"][4:], r).cos().view(3, 2, 4).sum(1).T
    y = y.sum() + F.linear(x.sin(), v).sin().sum()
    for expert, row in zip((0, 2, 1, 2), (0, 1, 2, 2), strict=True):
        y = y + F.linear(x[row], params["experts"][expert]).cos().sum() + (x @ params["experts"][expert].T).sin().sum()
    ids = x[0, :3].detach().sign().long() + 1
    return y + (F.embedding(ids, params["rows"][1:4]) * F.embedding(ids, params["rows"][:3])).cos().sum()


def _not_views(params: Params, x: Tensor) -> Tensor:
    """What looks like a view of a matrix and has other entries, or in no order."""
    a, b, c, d, e, f = params.values()
    y = x @ a[:, ::2].repeat(1, 2) + x @ b[torch.tensor([1, 0, 3, 2])] + x @ c.T.reshape(4, 6) + x @ d.clone().mul(2)
    return (y + x @ e[:1].expand(4, 6)).cos().sum() + F.linear(x, f.T).detach().sum() + (x @ f).relu().sum() * f.sum()


def _changed_copies(params: Params, x: Tensor) -> Tensor:
    """Copies that were changed in place before they are multiplied with, and a matrix times itself."""
    a, b, c, d = params.values()
    masked = a.clone()
    masked[0] = 0
    turned = b.clone().T.mul_(x[0])
    return (
        F.linear(x, masked).cos().sum()
        + F.linear(x, turned.T).sin().sum()
        + F.linear(c, c).cos().sum() * x.sum()
        + torch.addmm(d[0], d, d).sin().sum() * x.sum()
    )


def _experts(params: Params, x: Tensor) -> Tensor:
    """Stacked matrices: each with rows of its own, or all with the same."""
    a, b, c, d = params.values()
    y = torch.bmm(x[:, None].expand(3, 2, 4).cos(), a).sum() + torch.einsum("si,eoi->eso", x, b).tanh().square().sum()
    return y + torch.baddbmm(d, x[None].expand(3, 3, 4), c).sin().square().sum()


def _by_ids(params: Params, x: Tensor) -> Tensor:
    """Some counted from the end."""
    ids = torch.tensor([2, -1, 0, -3])
    y = torch.bmm(x[:, None].cos(), params["w"][ids]).sin().sum() + (x[:, None] @ params["v"].mT[ids]).cos().sum()
    return y + torch.bmm(torch.stack([x, x.sin(), x.cos(), -x]), params["w"][ids]).cos().sum()  # several rows of each


def _lookups(params: Params, example: Any) -> Tensor:
    """Rows of matrices by ids, of which some count from the end, and matrices of a stack by a label."""
    ids, y = example
    h = params["words"][ids] + params["places"].index_select(0, torch.arange(5)) + params["kinds"][y]
    h = h * torch.index_select(params["tied"], dim=-2, index=ids) + params["columns"].index_select(1, ids[:4])
    h = torch.tanh(h) @ params["experts"][y] + h[:1] @ params["one"][y * 0]
    z = F.linear(h.mean(0), params["tied"])
    rest = (params["tied"][ids - 7, :] * params["words"][(ids + 1) % 7, ...]).sum() + params["experts"][y, 0].sum()
    return F.cross_entropy(z[None], y[None]) + (rest + params["turned"][y].T @ h[0]).sin().sum()


def lookups() -> Case:
    shapes: dict[str, tuple[int, ...]] = {
        "words": (7, 4),
        "places": (5, 4),
        "kinds": (3, 4),
        "tied": (7, 4),
        "columns": (1, 9),
    }
    shapes |= {"experts": (3, 4, 4), "one": (1, 4, 4), "turned": (3, 4, 4)}
    params = {name: randn(*shape) for name, shape in shapes.items()}

    def batch(n: int = N) -> Any:
        return torch.randint(0, 7, (n, 5)), torch.randint(0, 3, (n,))

    return Case(_lookups, params, batch, frozenset({"words", "places", "kinds", "tied", "one", "turned"}))


def few_ids() -> Case:
    """A table of fewer rows than an example has ids, which is a linear head too."""

    def loss_fn(params: Params, ids: Tensor) -> Tensor:
        h = F.embedding(ids, params["table"], padding_idx=1).cumsum(0).tanh()
        return F.linear(h, params["table"]).logsumexp(-1).sum()

    def batch(n: int = N) -> Any:
        return torch.randint(0, 4, (n, 6))

    return Case(loss_fn, {"table": randn(5, 3)}, batch, frozenset({"table"}))


def _dot(params: Params, x: Tensor) -> Tensor:
    """Products by `tensordot` and `inner`, with the matrix on either side."""
    a, b, c, d, e, f, g = params.values()
    y = torch.inner(torch.tensordot(x, a, 1).cos(), b).sin()
    z = torch.tensordot(y, c, dims=([1], [0])).sin().sum() + torch.tensordot(d, y, dims=([1], [-1])).cos().sum()
    z = z + torch.tensordot(x, e).sin() + x.inner(f).cos().sum() + torch.inner(x[0], g[0])
    return z + torch.tensordot(x, g, dims=torch.tensor(2)).sin() + torch.tensordot(x[0, 0], g[0], 0).sin().sum()


def _both_ways(params: Params, x: Tensor) -> Tensor:
    """A tied autoencoder: one matrix there and back."""
    return ((torch.tanh(F.linear(x, params["w"], params["b"])) @ params["w"]) - x).square().sum()


def _einsum(params: Params, x: Tensor) -> Tensor:
    a, b, c, d, e, f = params.values()
    heads = torch.einsum("...d,dhk->...hk", x, a)
    y = torch.einsum("hkz,shk->sz", b, heads.tanh()).sum() + torch.einsum("sd, dk -> ks", [x, c]).cos().sum()
    y = y + torch.einsum("sd,sd->s", x.sin(), d).cos().sum() + torch.einsum("sd,td", x, e).sin().sum()
    return y + torch.einsum("sd,sd,sd", x, x, f).sum()


def _bilinear(params: Params, x: Tensor) -> Tensor:
    return F.bilinear(x.sin(), x[:, :2], params["w"], params["b"]).tanh().square().sum()


def _positions(params: Params, x: Tensor) -> Tensor:
    x = torch.cat([params["first"], (x * params["place"].exp()).tanh() + params["place"]], 1)
    return F.linear(x, params["w"]).cos().sum()


def _addmm(params: Params, x: Tensor) -> Tensor:
    w, b, c = params.values()
    y = torch.addmm(b, x, w).tanh() + torch.addmm(c, x, w, beta=0.5)
    y = y + b.addmm(x.cos(), w) + torch.addmm(input=b, mat1=x.sin(), mat2=w) + torch.mm(x, mat2=w)
    square = x.T @ x
    y = torch.cat([y, torch.matmul(other=w, input=square), torch.addmm(b, mat2=w, mat1=square.cos())])
    return y.cos().sum()


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
        x = torch.tanh(x @ w.exp()) if name == "second" else F.linear(x, w)
    return x.sum()


def _forward_mode(params: Params, x: Tensor) -> Tensor:
    """Forward-mode differentiation, for which vmap has no rule, through a layer."""
    with forward_ad.dual_level():
        y = F.linear(forward_ad.make_dual(x, torch.ones_like(x)), params["w"]).tanh()
        slope = forward_ad.unpack_dual(y).tangent.square().sum()
    return slope + F.linear(x, params["v"]).cos().sum()


class Sine(torch.autograd.Function):
    """As most are written: forward has ctx, of which functorch knows nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


class _Cosine(torch.autograd.Function):
    """With the context apart, and without a rule for vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.cos()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g * ctx.saved_tensors[0].sin()


def _custom(params: Params, x: Tensor) -> Tensor:
    return F.linear(Sine.apply(F.linear(x, params["w"])), params["v"]).square().sum()


def _custom_apart(params: Params, x: Tensor) -> Tensor:
    return F.linear(_Cosine.apply(F.linear(x, params["w"])), params["v"]).square().sum()


def _gru(params: Params, x: Tensor) -> Tensor:
    """Two layers, in both directions, as a pure function of their weights."""
    y, last = torch.gru(x[:, None], torch.ones(4, 1, 3), list(params.values()), True, 2, 0.0, False, True, False)
    return y.sin().sum() + last.square().sum()


class Recurrent(nn.Module):
    """A recurrent net, for whose functions vmap has no rule, and a linear layer."""

    def __init__(self, net: nn.Module | None = None, width: int = 3) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(4, 3, batch_first=True) if net is None else net
        self.outer = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, last = self.recurrent(x)
        return self.outer(y[:, -1]).sin() + (last[1] if isinstance(last, tuple) else last)[-1]


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


def _standardised(params: Params, x: Tensor) -> Tensor:
    """As the convolutions of NFNets."""
    w = params["w"]
    standard = F.batch_norm(w.reshape(1, 3, -1), None, None, params["gain"], training=True).reshape(w.shape)
    return F.linear(F.conv2d(x, standard, params["b"]).sin().flatten(1).sum(1), params["v"]).cos().sum()


def dot_products(how: str) -> Case:
    """`F.scaled_dot_product_attention` of two heads, called in each of its ways."""

    def loss_fn(params: Params, example: Any) -> Tensor:
        x, shown = example  # [t d], [t] bool
        q, k, v = (F.linear(x, w).unflatten(-1, (2, 3)).transpose(0, 1) for w in params["qkv"].chunk(3))  # [2 t 3]
        attend = F.scaled_dot_product_attention
        mask = shown[None, :] | torch.eye(len(x), dtype=torch.bool)
        calls: dict[str, Callable[[], Tensor]] = {
            "plain": lambda: attend(q, k, v, scale=0.3),
            "causal": lambda: attend(q[None], k[None], v[None], is_causal=True),
            "one head": lambda: attend(q[0], k[0], v[0]),
            "own mask": lambda: attend(q[None], k[None], v[None], mask),
            "own mask of heads": lambda: attend(q, k, v, torch.stack([mask, mask.T]) * 0.5),
            "own row": lambda: attend(q[None], k[None], v[None], shown.to(q)[None, None, None]),
            "own row without heads": lambda: attend(q, k, v, shown.to(q)[None]),
            "shared mask": lambda: attend(q, k, v, torch.ones(len(x), len(x), dtype=torch.bool).tril()),
            "shared mask of heads": lambda: attend(q, k, v, torch.arange(2.0).to(q).reshape(2, 1, 1)),
            "blind": lambda: attend(q, k, v, shown[:, None].expand(-1, len(x))),
            "grouped": lambda: attend(torch.cat([q, q.cos()]), k, v, enable_gqa=True),
            "constant query": lambda: attend(torch.ones(2, 4, 3, dtype=q.dtype), k, v),
            "broadcast": lambda: attend(q.expand(3, 2, -1, -1), k[None], v[None]),
            "wider values": lambda: attend(q, k, torch.cat([v, v.sin()], -1)),
        }
        return calls[how]().square().sum() + (params["b"] * x).sum()

    def batch(n: int = N) -> Any:
        return randn(n, 5, 4), torch.rand(n, 5) < 0.5

    return Case(loss_fn, {"qkv": randn(18, 4), "b": randn(4)}, batch, frozenset({"qkv"}))


DOT_PRODUCTS = (
    *("plain", "causal", "one head", "own mask", "own mask of heads", "own row", "own row without heads"),
    *("shared mask", "shared mask of heads", "blind", "grouped", "constant query", "broadcast", "wider values"),
)


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


def wide(n: int = 6, s: int = 1, i: int = 40, o: int = 30) -> tuple[Any, Params, Any]:
    """A layer wider than its batch has samples: its loss, parameters and a batch."""
    params = {"w": torch.randn(o, i) / i**0.5, "b": torch.randn(o)}

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"], params["b"]).cos().square().sum()

    return loss_fn, params, torch.randn(n, s, i)


def image(*features: nn.Module, channels: int, pixels: int) -> Case:
    return classifier(head(channels, pixels, *features), 4, 6, 6)


EXTRA = {f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")} | {
    "outer.weight",
    "outer.bias",
}
SEPARATE = {f"attention.{name}_proj_weight" for name in "qkv"} | EXTRA - {
    "attention.in_proj_weight",
    "attention.in_proj_bias",  # of three weights at once
}
CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: classifier(nn.Linear(4, 3), 4),
    "mlp": lambda: classifier(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), 4),
    "no bias": lambda: classifier(nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)), 4),
    "deep": lambda: classifier(nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)], nn.Linear(4, 3)), 4),
    "positions": lambda: classifier(head(3, 10, nn.Linear(4, 3)), 2, 5, 4),
    "pairs of positions": lambda: classifier(head(8, 2, nn.Linear(7, 8)), 2, 7),
    "pairs of pixels": lambda: image(nn.Conv2d(4, 16, 3, stride=3), channels=16, pixels=4),
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
    "attention self": lambda: classifier(Attention("self"), 3, 4),
    "attention weights": lambda: classifier(Attention("weights"), 3, 4),
    "attention cross": lambda: classifier(Attention("cross"), 3, 4),
    "attention all differ": lambda: classifier(Attention("all differ"), 3, 4),
    "attention other sizes": lambda: classifier(Attention("other sizes", kdim=3, vdim=2), 3, 4, ruled=SEPARATE),
    "attention masked": lambda: classifier(Attention("masked"), 3, 4),
    "attention causal": lambda: classifier(Attention("causal"), 3, 4),
    "attention padded": lambda: classifier(Attention("padded"), 3, 4),
    "attention per head": lambda: classifier(Attention("per head"), 3, 4),
    "attention unbatched": lambda: classifier(Attention("unbatched"), 3, 4),
    "attention no bias": lambda: classifier(Attention("cross", bias=False), 3, 4),
    "attention extra keys": lambda: classifier(
        Attention("masked", add_bias_kv=True, add_zero_attn=True), 3, 4, ruled=EXTRA
    ),
    "layer norm in places": lambda: classifier(head(10, 4, nn.LayerNorm((5, 4))), 2, 5, 4),
    "layer norm no bias": lambda: classifier(head(2, 20, nn.LayerNorm(4, bias=False), nn.Flatten(2)), 2, 5, 4),
    "rms norm": lambda: classifier(head(2, 20, nn.RMSNorm(4), nn.Flatten(2)), 2, 5, 4),
    "instance norm": lambda: image(
        nn.Conv2d(4, 3, 3, bias=False), nn.InstanceNorm2d(3, affine=True), channels=3, pixels=16
    ),
    "instance norm eval": lambda: image(
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(), channels=4, pixels=36
    ),
    "batch norm of features": lambda: classifier(nn.Sequential(nn.BatchNorm1d(4).eval(), nn.Linear(4, 3)), 4),
    "transposed conv": lambda: image(nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1), channels=3, pixels=121),
    "transposed conv groups": lambda: image(
        nn.ConvTranspose2d(4, 6, (2, 3), stride=(3, 2), output_padding=(2, 1), groups=2),
        nn.AvgPool2d(3),
        channels=6,
        pixels=24,
    ),
    "transposed conv dilated": lambda: image(
        nn.ConvTranspose2d(4, 2, 2, dilation=(2, 1), padding=(1, 2), bias=False), channels=2, pixels=18
    ),
    "transposed conv1d": lambda: classifier(head(2, 12, nn.ConvTranspose1d(2, 2, 3, 2, output_padding=1)), 2, 5),
    "transposed conv3d": lambda: classifier(head(2, 60, nn.ConvTranspose3d(2, 2, 2, groups=2)), 2, 2, 3, 4),
    "ids": lambda: of_ids(Ids()),
    "ids padded": lambda: of_ids(Ids(padding_idx=-2)),
    "ids scaled": lambda: of_ids(Ids(scale_grad_by_freq=True), ruled={"places.weight", "outer.weight", "outer.bias"}),
    "tied": lambda: of_ids(Tied()),
    "tied padded": lambda: of_ids(Tied(bias=True, padding_idx=3)),
    "bag": lambda: of_ids(Bag("mean")),
    "bag sum": lambda: of_ids(Bag("sum", mode="sum", padding_idx=2)),
    "bag padded": lambda: of_ids(Bag("mean", padding_idx=-3)),
    "bag weights": lambda: of_ids(Bag("weights", mode="sum")),
    "bag offsets": lambda: of_ids(Bag("offsets")),
    "products": lambda: function(_products, {name: randn(4, 4) for name in "abcdefgh"}, 3, 4, ruled=set("abcdefgh")),
    "views": lambda: function(_views, {name: randn(4, 6) for name in "abcdefghj"}, 3, 4, ruled=set("abcdefghj")),
    "slices": lambda: function(
        _slices,
        {"packed": randn(12, 4), "bias": randn(12), "experts": randn(3, 4, 4), "rows": randn(5, 4)},
        3,
        4,
        ruled={"packed", "bias", "experts", "rows"},
    ),
    "not views": lambda: function(_not_views, {name: randn(4, 6) for name in "abcdef"}, 3, 4, ruled={"b"}),
    "changed copies": lambda: function(_changed_copies, {name: randn(4, 4) for name in "abcd"}, 3, 4, ruled=set()),
    "experts": lambda: function(
        _experts,
        {"a": randn(3, 4, 2), "b": randn(3, 5, 4), "c": randn(3, 4, 2), "d": randn(3, 1, 2)},
        3,
        4,
        ruled={"a", "b", "c"},
    ),
    "experts by ids": lambda: function(_by_ids, {"w": randn(3, 4, 2), "v": randn(3, 2, 4)}, 4, 4, ruled={"w", "v"}),
    "lookups": lookups,
    "few ids": few_ids,
    "dot": lambda: function(
        _dot,
        {
            "a": randn(4, 5),
            "b": randn(4, 5),
            "c": randn(4, 2, 3),
            "d": randn(2, 4, 3),
            "e": randn(3, 4),
            "f": randn(5, 4),
            "g": randn(3, 4),
        },
        3,
        4,
        ruled=set("abcdf"),
    ),
    "one element": lambda: function(
        lambda p, x: F.linear(F.linear(x, p["w"]).sin(), p["v"], p["b"]).cos().sum(),
        {"w": randn(1, 4), "v": randn(1, 1), "b": randn(1)},
        4,
        ruled={"w", "v", "b"},
    ),
    "both ways": lambda: function(_both_ways, {"w": randn(3, 4), "b": randn(3)}, 4, ruled={"w", "b"}),
    "einsum": lambda: function(
        _einsum,
        {
            "a": randn(4, 2, 3),
            "b": randn(2, 3, 5),
            "c": randn(4, 3),
            "d": randn(3, 4),
            "e": randn(3, 4),
            "f": randn(3, 4),
        },
        3,
        4,
        ruled=set("abcde"),
    ),
    "bilinear": lambda: function(_bilinear, {"w": randn(3, 4, 2), "b": randn(3)}, 5, 4, ruled={"w", "b"}),
    "addmm": lambda: function(_addmm, {"w": randn(4, 4), "b": randn(4), "c": randn(3, 4)}, 3, 4, ruled={"w", "b"}),
    "tree": tree_case,
    "frozen": frozen,
    "same tensor twice": same_tensor,
    "in turn": lambda: function(
        _in_turn, {"first": randn(4, 4), "second": randn(4, 4), "third": randn(4, 4)}, 4, ruled={"first", "third"}
    ),
    "recurrent": lambda: classifier(Recurrent(), 3, 4),
    "recurrent projected": lambda: classifier(
        Recurrent(nn.LSTM(4, 3, bias=False, proj_size=2, batch_first=True), 2), 3, 4
    ),
    "recurrent gru": lambda: function(
        _gru,
        {
            f"{kind}{at}": randn(*shape)
            for at in range(4)
            for kind, shape in {"w_ih": (9, 4 if at < 2 else 6), "w_hh": (9, 3), "b_ih": (9,), "b_hh": (9,)}.items()
        },
        3,
        4,
        ruled={f"{kind}{at}" for kind in ("w_ih", "w_hh", "b_ih", "b_hh") for at in range(4)},
    ),
    "cells": lambda: classifier(
        Cells(nn.LSTMCell(4, 3), nn.GRUCell(4, 3, bias=False), nn.RNNCell(4, 3, nonlinearity="relu")), 3, 4
    ),
    "recurrent tanh": lambda: classifier(Recurrent(nn.RNN(4, 3, batch_first=True)), 3, 4),
    "scattered": lambda: function(
        lambda p, x: torch.as_strided_scatter(F.linear(x, p["w"]), x[:1].sin(), (1,), (1,), 1).square().sum(),
        {"w": randn(3, 4)},
        4,
        ruled={"w"},
    ),
    "forward mode": lambda: function(_forward_mode, {"w": randn(3, 4), "v": randn(2, 4)}, 4, ruled={"v"}),
    "custom": lambda: function(_custom, {"w": randn(3, 4), "v": randn(2, 3)}, 4, ruled={"w", "v"}),
    "custom apart": lambda: function(_custom_apart, {"w": randn(3, 4), "v": randn(2, 3)}, 4, ruled={"w", "v"}),
    "strided": lambda: function(
        lambda p, x: (
            (F.linear(x, p["w"]) * (p["v"].as_strided((3,), (4,)) + p["v"][1:].as_strided((3,), (2,)))).sin().sum()
        ),
        {"w": randn(3, 4), "v": randn(3, 3)},
        4,
        ruled={"w"},
    ),
    "no outputs": lambda: function(_in_turn, {"first": randn(3, 4), "last": randn(0, 3)}, 4, ruled={"first", "last"}),
    "keywords": lambda: function(_keywords, {"w": randn(3, 4), "b": randn(3)}, 4, ruled={"w", "b"}),
    "penalty": lambda: function(_penalised, {"w": randn(3, 4), "b": randn(3)}, 4, ruled=set()),
    "two forms": lambda: function(_two_forms, {"w": randn(3, 4), "v": randn(2, 4)}, 4, ruled={"v"}),
    "transposed": lambda: function(_transposed, {"w": randn(4, 3), "b": randn(3), "scale": randn()}, 4, ruled={"w"}),
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
    "axes of one": lambda: function(
        _positions, {"place": randn(1, 3, 4), "first": randn(1, 1, 4), "w": randn(1, 4)}, 3, 4, ruled={"w"}
    ),
    "vector weight": lambda: function(_vector_weight, {"v": randn(4), "s": randn()}, 3, 4, ruled=set()),
    "token losses": lambda: tokens(_tokens),
    "nested loss": lambda: tokens(_nested_loss),
    "inner grad beside conv": lambda: function(
        _inner_grad_of_layers, {"w": randn(4, 4), "g": randn(4), "c": randn(3, 3, 3)}, 3, 4, ruled={"g", "c"}
    ),
    **{f"dot products {how}": lambda how=how: dot_products(how) for how in DOT_PRODUCTS},  # type: ignore[misc]
    "in place": lambda: image(nn.Conv2d(4, 3, 3), nn.ReLU(inplace=True), channels=3, pixels=16),
    "filled": lambda: function(
        _filled, {"w": randn(4, 4), "b": randn(4), "v": randn(2, 4)}, 3, 4, ruled={"w", "b", "v"}
    ),
    "messages": lambda: function(_messages, {"w": randn(2, 4)}, 3, 4, ruled={"w"}),
    "standardised weight": lambda: function(
        _standardised,
        {"w": randn(3, 2, 3, 3), "b": randn(3), "gain": randn(3), "v": randn(2, 3)},
        2,
        4,
        4,
        ruled={"gain", "v"},
    ),
    "constant input": lambda: function(_attended, {"w": randn(2, 4), "u": randn(2, 3)}, 5, 4, ruled={"w", "u"}),
}


def make(name: str) -> Case:
    torch.manual_seed(sum(map(ord, name)))
    return CASES[name]()


# vmap has no rule for them, so neither has a compiled step
LOOPED = {"forward mode", "custom", "custom apart", "scattered"}
every_case = pytest.mark.parametrize("name", CASES)
# whose layers are others by the table SUA
SPATIAL = {"pairs of pixels", "batch norm eval", "group norm", "instance norm", "in place"}
SPATIAL |= {name for name in CASES if "conv" in name and not name.startswith("transposed")}


def and_table(names: Collection[str]) -> Any:
    """Cases by the usual table, and by SUA's where that reads them otherwise."""
    of_names = [pytest.param(name, RULES, id=name) for name in names]
    of_names += [pytest.param(name, {**RULES, **SUA}, id=f"{name}-sua") for name in names if name in SPATIAL]
    return pytest.mark.parametrize(("name", "rules"), of_names)


every_case_and_table = and_table(CASES)
BATCHED = [name for name in CASES if name not in LOOPED]
every_batched_case = pytest.mark.parametrize("name", BATCHED)
