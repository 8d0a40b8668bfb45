"""A loss of the whole batch: the same as of its examples where they are independent, an explicit choice where not."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call

from ekfac_func import describe, ekfac, per_example_gradients
from ekfac_func.types import LossFn, Params

from .cases import Attention, Bag, Case, N, Recurrent, Sine, Tied, classifier, head, of_ids
from .oracles import close, close_trees, loop


def of_batch(net: nn.Module) -> LossFn:
    """Losses `[n]` of a module."""

    def loss_fn(params: Params, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(functional_call(net, params, (x,)), y, reduction="none")

    return loss_fn


class SequenceFirst(nn.Module):
    """Sequences before examples, and positions that all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.inner = nn.Embedding(3, 4), nn.Linear(4, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x.transpose(0, 1)) + self.places(torch.arange(3))[:, None]
        return self.head(self.encoder(x).mean(0))


def independent() -> dict[str, tuple[nn.Module, Case]]:
    nets: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "mlp": (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,)),
        "conv": (head(6, 16, nn.Conv2d(4, 6, 3, groups=2), nn.GroupNorm(2, 6)), (4, 6, 6)),
        "transposed": (head(2, 121, nn.ConvTranspose2d(4, 2, 3, 2, 1)), (4, 6, 6)),
        "attention": (Attention("masked"), (3, 4)),
        "flat positions": (nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3), nn.Unflatten(0, (-1, 5)), Mean()), (5, 4)),
        "sequence first": (SequenceFirst(), (3, 4)),
        "recurrent": (Recurrent(), (3, 4)),
    }
    found = {name: (net, classifier(net, *shape)) for name, (net, shape) in nets.items()}
    ids: dict[str, nn.Module] = {"tied": Tied(bias=True, padding_idx=1), "bag": Bag("mean")}
    return found | {name: (net, of_ids(net)) for name, net in ids.items()}


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


UNREAD = {"sequence first", "recurrent"}  # whose positions, and whose recurrent weights, a rule reads in examples alone


@pytest.mark.parametrize("name", independent())
def test_independent_examples(name: str) -> None:
    net, case = independent()[name]
    batch, loss_fn = case.batch(N), of_batch(net)
    losses, expected = loop(case.loss_fn, case.params, batch)
    found = per_example_gradients(loss_fn, case.params, batch, batched=True)
    close(found.losses, losses)
    for p in case.params:
        close(found.dense(p), expected[p])
    batched, single = ekfac(loss_fn, damping=1e-2, batched=True), ekfac(case.loss_fn, damping=1e-2)
    state = batched.init(case.params, batch, check=True)
    natural, _, _ = batched.precondition(case.params, batch, state)
    initial = single.init(case.params, batch)
    assert ([layer.rule for layer in state.layers] == [layer.rule for layer in initial.layers]) == (name not in UNREAD)
    if name not in UNREAD:
        close_trees(natural, single.precondition(case.params, batch, initial)[0], 1e-7)


def resnet(norm: nn.Module, *features: nn.Module) -> nn.Sequential:
    return nn.Sequential(*features, norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


COUPLED: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "features": (lambda: resnet(nn.BatchNorm1d(5), nn.Linear(4, 5)), (4,)),
    "1d": (lambda: resnet(nn.BatchNorm1d(2), nn.Conv1d(3, 2, 3)), (3, 6)),
    "2d": (lambda: resnet(nn.BatchNorm2d(2), nn.Conv2d(3, 2, 3)), (3, 5, 5)),
    "3d": (lambda: resnet(nn.BatchNorm3d(2), nn.Conv3d(3, 2, 2)), (3, 3, 3, 3)),
    "synchronised": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(resnet(nn.BatchNorm2d(2), nn.Conv2d(3, 2, 3))),
        (3, 5, 5),
    ),
    "untracked in eval": (
        lambda: resnet(nn.BatchNorm2d(2, track_running_stats=False).eval(), nn.Conv2d(3, 2, 3)),
        (3, 5, 5),
    ),
}


def coupled(name: str) -> tuple[nn.Sequential, Params, Any]:
    make, shape = COUPLED[name]
    net, batch = make().double(), (torch.randn(N, *shape), torch.randint(0, 3, (N,)))
    with torch.no_grad():
        net(batch[0].double())
    return net, {p: w.detach().clone() for p, w in net.named_parameters()}, batch


def with_buffers(net: nn.Module) -> LossFn:
    """Losses `[n]`, and the running statistics after the batch."""

    def loss_fn(params: Params, batch: Any) -> Any:
        x, y = batch
        buffers = {name: b.clone() for name, b in net.named_buffers()}
        losses = F.cross_entropy(functional_call(net, {**params, **buffers}, (x,)), y, reduction="none")
        return losses, buffers

    return loss_fn


@pytest.mark.parametrize("name", [name for name in COUPLED if name != "synchronised"])
def test_batch_statistics_by_choice(name: str) -> None:
    """The mean is the gradient of the batch's loss; a layer's own are those of hooks on its output."""
    net, params, batch = coupled(name)
    before = {k: b.clone() for k, b in net.named_buffers()}
    found = per_example_gradients(with_buffers(net), params, batch, batched=True, has_aux=True)
    outputs: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda *args: outputs.append(args[2])) for m in (net[0], net[1], net[4])]
    F.cross_entropy(net(batch[0]), batch[1], reduction="none")
    for hook in hooks:
        hook.remove()
    for k, b in net.named_buffers():
        close(found.aux[k].double(), b.double())
    net.load_state_dict(before, strict=False)

    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    hooks = [m.register_forward_hook(lambda *args: outputs.append(args[2])) for m in (net[0], net[1], net[4])]
    outputs.clear()
    losses = with_buffers(net)(leaves, batch)[0]
    for hook in hooks:
        hook.remove()
    expected = torch.autograd.grad(losses.sum(), [*leaves.values(), *outputs])
    for p, gradient in zip(params, expected, strict=False):
        close(found.mean()[p] * N + 1, gradient + 1)  # a bias before the norm has none
        close(found.dense(p).sum(0) + 1, gradient + 1)
    of_outputs = [g.flatten(2).sum(2) if g.dim() > 2 else g for g in expected[len(params) :]]
    for bias, g in zip(("0.bias", "1.bias", "4.bias"), of_outputs, strict=True):
        close(found.dense(bias), g)
    assert all(layer.rule for layer in found.captured.layers.values())
    assert all(torch.equal(b, before[k]) for k, b in net.named_buffers())


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_equals_eager_and_further_batch_sizes_cost_no_graph(backend: str) -> None:
    """One for the first batch size, one for all others."""
    net, params, batch = coupled("2d")
    step = ekfac(with_buffers(net), damping=1e-2, batched=True, has_aux=True)
    state = step.init(params, batch)
    compiled = torch.compile(step.precondition, fullgraph=True, backend=backend)
    counters.clear()
    for n in (6, 5, 4):
        part = batch[0][:n], batch[1][:n]
        natural, _, info = step.precondition(params, part, state)
        found, _, report = compiled(params, part, state)
        close_trees(found, natural, 1e-8)
        close_trees(report, info, 1e-8)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_examples_are_refused_without_that_choice(name: str) -> None:
    net, params, batch = coupled(name)

    def loss_fn(params: Params, example: Any) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (example[0][None],)), example[1][None])

    with pytest.raises(ValueError, match=r"batch_norm \(with '1.weight' and '1.bias'.*batched=True"):
        per_example_gradients(loss_fn, params, batch)


def test_instance_statistics_couple_nothing() -> None:
    case = classifier(head(2, 9, nn.Conv2d(3, 2, 3, bias=False), nn.InstanceNorm2d(2)), 3, 5, 5)
    ekfac(case.loss_fn, damping=1e-2).init(case.params, case.batch(N), check=True)


def test_the_check_finds_coupled_examples_and_turned_axes() -> None:
    net, params, batch = coupled("features")
    with pytest.raises(ValueError, match=r"'0.weight'.*\(6, 5, 4\).*coupled"):
        ekfac(with_buffers(net), damping=1e-2, batched=True, has_aux=True).init(params, batch, check=True)

    def turned(params: Params, x: Tensor) -> Tensor:  # positions before examples, in one axis
        y = F.linear(x.transpose(0, 1).flatten(0, 1), params["w"]).view(2, -1, 3)
        return y.cos().sum((0, 2))

    with pytest.raises(ValueError, match=r"'w'.*\(n s\)"):
        ekfac(turned, damping=1e-2, batched=True).init({"w": torch.randn(3, 4)}, torch.randn(N, 2, 4), check=True)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda p, x: F.linear(x, p["w"]).cos().sum(), r"returned a scalar.*one loss an example"),
        (lambda p, x: F.linear(x, p["w"]).cos(), r"shape \(3, 3\) for a batch of 3"),
    ],
)
def test_losses_of_another_shape_are_refused(loss_fn: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        per_example_gradients(loss_fn, {"w": torch.randn(3, 4)}, torch.randn(N, 4), batched=True)


def test_chunks_of_a_coupled_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"chunk_size=2.*batched=True"):
        ekfac(lambda p, x: x, damping=1.0, batched=True, chunk_size=2)


def test_bags_of_maxima_over_an_ensemble() -> None:
    """Of which torch has no second derivative, and none is asked for."""
    ids, w = torch.randint(0, 3, (N, 2)), torch.randn(2, 3, 4)

    def norms(w: Tensor) -> Tensor:
        def loss_fn(params: Params, ids: Tensor) -> Tensor:
            return F.embedding_bag(ids, params["w"], mode="max").sin().sum(1)

        return per_example_gradients(loss_fn, {"w": w}, ids, batched=True).norms()

    close(torch.vmap(norms)(w), torch.stack([norms(of_one) for of_one in w]))


def test_parameters_with_and_without_a_rule_see_the_same_dropout() -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return (F.dropout(F.linear(x, params["w"], params["b"]), 0.5) * params["scale"]).sum(1)

    params = {"w": torch.randn(20, 4), "b": torch.randn(20), "scale": torch.randn(20)}
    found = per_example_gradients(loss_fn, params, torch.randn(N, 4), batched=True)
    kept = found.dense("b") != 0
    assert kept.any()
    assert not kept.all()
    assert torch.equal(found.dense("scale") != 0, kept)


def layer_by_layer(net: nn.Module, params: Params) -> tuple[Any, Any]:
    """Its first and its second layer."""
    of_net = [{"weight": params[f"{k}.weight"], "bias": params[f"{k}.bias"]} for k in (0, 3)]
    return tuple(lambda x, p=p: F.linear(x, p["weight"], p["bias"]) for p in of_net)  # type: ignore[return-value]


def by_example(losses: Tensor, known: Tensor) -> Tensor:
    """Their sums, of losses of the known tokens."""
    of = torch.arange(len(known))[:, None].expand_as(known)[known]
    return losses.new_zeros(len(known)).index_add(0, of, losses)


def _masked_outputs(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> Tensor:
    known = y >= 0
    outputs = functional_call(net, params, (x,))
    return by_example(F.cross_entropy(outputs[known], y[known], reduction="none"), known)


def _masked_inputs(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> Tensor:
    known = y >= 0
    outputs = functional_call(net, params, (x[known],))
    return by_example(F.cross_entropy(outputs, y[known], reduction="none"), known)


def _put_back(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> Tensor:
    """As a mixture of experts does: some rows through a layer, and back in their places before the next."""
    (first, second), known = layer_by_layer(net, params), y >= 0
    inner = x.new_zeros(*y.shape, 5)
    inner[known] = first(x[known]).tanh()
    return by_example(F.cross_entropy(second(inner)[known], y[known], reduction="none"), known)


def _packed(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Rows that a mask picked, in a buffer of the batch's own shape."""
    known = y >= 0
    rows = x[known]
    buffer = x.new_zeros(y.numel(), 4)
    buffer[: len(rows)] = rows
    outputs = functional_call(net, params, (buffer,))[: len(rows)]
    return by_example(F.cross_entropy(outputs, y[known], reduction="none"), known)


def _lengths(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Rows by numbers that Python reads."""
    known = y >= 0
    rows = torch.cat([x[k][known[k]] if length < 5 else x[k] for k, length in enumerate(known.sum(1).tolist())])
    return by_example(F.cross_entropy(functional_call(net, params, (rows,)), y[known], reduction="none"), known)


def _truths(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Rows by truths that Python reads, one a token."""
    known = y >= 0
    places = [k for k, wanted in enumerate(known.flatten()) if wanted]
    outputs = functional_call(net, params, (x.flatten(0, 1)[places],))
    return by_example(F.cross_entropy(outputs, y[known], reduction="none"), known)


def _numbers(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> Tensor:
    """As many rows as a 0-d tensor says, sorted so that they come first."""
    known = y >= 0
    order = (~known).flatten().int().argsort(stable=True)
    rows = x.flatten(0, 1)[order][: known.sum()]
    return by_example(F.cross_entropy(functional_call(net, params, (rows,)), y[known], reduction="none"), known)


def _one_hot(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> Tensor:
    chosen = F.one_hot(y.clamp(min=0), 3) * functional_call(net, params, (x,)).log_softmax(-1)
    return -(chosen.sum(-1) * (y >= 0)).sum(1)


def _checked(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Distributions look at what they are made of; then a number is logged."""
    distribution = torch.distributions.Categorical(logits=functional_call(net, params, (x,)), validate_args=True)
    losses = -(distribution.log_prob(y.clamp(min=0)) * (y >= 0)).sum(1)
    assert math.isfinite(losses.mean().item())
    return losses


LOOKING: dict[Any, set[str]] = {  # the weights that no rule reads
    _masked_outputs: set(),
    _masked_inputs: {"0.weight", "3.weight"},
    _put_back: {"0.weight", "3.weight"},
    _packed: {"0.weight", "3.weight"},
    _lengths: {"0.weight", "3.weight"},
    _truths: {"0.weight", "3.weight"},
    _numbers: {"0.weight", "3.weight"},
    _one_hot: set(),
    _checked: set(),
}


def tokens_of(counts: list[int]) -> tuple[Tensor, Tensor]:
    """So many labelled tokens of five in each example."""
    known = torch.arange(5) < torch.tensor(counts)[:, None]
    return torch.randn(len(counts), 5, 4), torch.where(known, torch.randint(0, 3, known.shape), -1)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("loss", LOOKING)
def test_losses_that_look_at_values(loss: Any, noise: bool) -> None:
    """Rows that values picked belong to no example in turn, be there as many as examples or not: no rule reads them."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5 if noise else 0.0), nn.Linear(5, 3))
    params = {name: p.detach() for name, p in net.named_parameters()}

    def losses_fn(params: Params, batch: Any) -> Tensor:
        return loss(net, params, *batch)

    step = ekfac(losses_fn, damping=0.1, batched=True)
    state = None
    for counts in ([2, 2, 2], [1, 3, 2], [5, 1, 0], [0, 0, 0, 0, 0, 5], [2]):
        batch = tokens_of(counts)
        before = torch.get_rng_state()
        g = per_example_gradients(losses_fn, params, batch, batched=True)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        reference = {name: p.clone().requires_grad_() for name, p in params.items()}
        losses = losses_fn(reference, batch)
        assert torch.equal(after, torch.get_rng_state())
        for k, each in enumerate(losses):
            expected = torch.autograd.grad(each, list(reference.values()), retain_graph=True)
            for name, gradient in zip(params, expected, strict=True):
                close(g.dense(name)[k], gradient)
        state = step.init(params, batch) if state is None else state
        _, state, info = step.precondition(params, batch, state)
        assert not info.skipped
        unread = {layer.weight for layer in state.layers if layer.rule is None and "weight" in layer.weight}
        assert unread == LOOKING[loss]


def test_a_batched_loss_that_looks_at_values_is_not_for_graphs() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Identity(), nn.Linear(5, 3))
    params = {name: p.detach() for name, p in net.named_parameters()}
    step = ekfac(lambda p, batch: _masked_inputs(net, p, *batch), damping=0.1, batched=True)
    with pytest.raises(Exception, match=r"looks at values.*torch\.where.*eager"):
        torch.compile(step.init, backend="eager")(params, tokens_of([2, 2, 2]))


def test_describe_of_a_loss_that_looks_at_values() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    params = {name: p.detach() for name, p in net.named_parameters()}
    rows = describe(lambda p, batch: _checked(net, p, *batch), params, tokens_of([2, 1]), batched=True)
    assert [row.rule for row in rows] == ["linear", "linear"]


def _context(params: Params, x: Tensor) -> Tensor:
    h: Tensor = Sine.apply(F.linear(x, params["w"]) * params["scale"])
    return h.sum(1)


def _leaf(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x.clone().requires_grad_(), params["w"]).requires_grad_()
    return h.sin().requires_grad_(True).sum(1) * params["scale"].sum()


def _checked_hook(params: Params, x: Tensor) -> Tensor:
    h = F.linear(x * params["scale"], params["w"])
    if h.requires_grad:
        h.register_hook(lambda g: g * 0 if g.isnan().any() else g * 2)
    return h.square().sum(1)


@pytest.mark.parametrize("loss_fn", [_context, _leaf, _checked_hook])
def test_what_plain_autograd_alone_takes(loss_fn: LossFn) -> None:
    params, x = {"w": torch.randn(4, 4), "scale": torch.randn(4)}, torch.randn(N, 4)
    found = per_example_gradients(loss_fn, params, x, batched=True)
    assert found.captured.layers["w"].rule == "linear"
    close_trees({name: found.dense(name) for name in params}, every_example(loss_fn, params, x))


def _context_and_values(params: Params, x: Tensor) -> Tensor:
    h = _context(params, x)
    return h * 2 if float(params["w"].detach().sum()) > -1e6 else h


@pytest.mark.parametrize("batched", [False, True])
def test_a_function_with_ctx_in_a_loss_that_looks_at_values(batched: bool) -> None:
    params, x = {"w": torch.randn(4, 4), "scale": torch.randn(4)}, torch.randn(N, 4)
    expected = every_example(_context_and_values, params, x)
    loss_fn = _context_and_values if batched else lambda p, row: _context_and_values(p, row[None])[0]
    found = per_example_gradients(loss_fn, params, x, batched=batched)
    close_trees({name: found.dense(name) for name in params}, expected)


def test_a_function_with_ctx_after_what_takes_one_number_of_examples() -> None:
    params, x = {"w": torch.randn(4, 4), "scale": torch.randn(4)}, torch.randn(N, 4)

    def losses_fn(params: Params, x: Tensor) -> Tensor:
        return _context(params, x.view(2, -1, 4).tanh().flatten(0, 1))

    found = per_example_gradients(losses_fn, params, x, batched=True)
    close_trees({name: found.dense(name) for name in params}, every_example(losses_fn, params, x))


def mean_of(loss_fn: LossFn, params: Params, x: Tensor) -> Params:
    return per_example_gradients(loss_fn, params, x, batched=True).mean()


def test_a_graph_takes_activations_that_are_said_to_require_a_gradient() -> None:
    params, x = {"w": torch.randn(4, 4), "scale": torch.randn(4)}, torch.randn(N, 4)
    fast = torch.compile(mean_of, fullgraph=True, backend="aot_eager")
    close_trees(fast(_leaf, params, x), mean_of(_leaf, params, x))


def test_a_function_without_a_context_of_its_own_is_not_for_graphs() -> None:
    step = ekfac(_context, damping=1.0, batched=True)
    with pytest.raises(Exception, match=r"forward takes ctx.*setup_context, or call the step in eager mode"):
        torch.compile(step.init, backend="eager")({"w": torch.randn(4, 4), "scale": torch.randn(4)}, torch.randn(N, 4))


def test_a_function_without_a_context_of_its_own_within_a_vmap_of_the_loss() -> None:
    """Which torch refuses by itself."""

    def losses_fn(params: Params, x: Tensor) -> Tensor:
        return torch.vmap(_context, in_dims=(None, 0))(params, x[:, None])[:, 0]

    params = {"w": torch.randn(4, 4), "scale": torch.randn(4)}
    with pytest.raises(RuntimeError, match="setup_context"):
        per_example_gradients(losses_fn, params, torch.randn(N, 4), batched=True)


def test_a_batched_loss_that_does_not_take_every_number_of_examples() -> None:
    params, batch = {"w": torch.randn(4, 4)}, torch.randn(6, 4)

    def losses_fn(params: Params, x: Tensor) -> Tensor:
        one, other = F.linear(x, params["w"]).tanh().view(2, -1, 4)
        return (one * other).sum(-1).exp().repeat(2)

    found = per_example_gradients(losses_fn, params, batch, batched=True)
    leaf = params["w"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(losses_fn({"w": leaf}, batch).sum(), leaf)
    close(found.dense("w").sum(0), expected)
    assert found.captured.layers["w"].rule == "linear"


def every_example(loss_fn: LossFn, params: Params, batch: Any) -> dict[str, Tensor]:
    """The gradients of each loss of a batch, in a graph of plain autograd."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    wanted = list(leaves.values())
    losses = loss_fn(leaves, batch)
    rows = [torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True) for loss in losses]
    return {name: torch.stack(column) for name, column in zip(leaves, zip(*rows, strict=True), strict=True)}


def _centred(params: Params, z: Tensor) -> Tensor:
    h = F.linear(z, params["w"])
    return (h - h.mean(0)).tanh()


def _slope(params: Params, x: Tensor) -> Tensor:
    z = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(_centred(params, z).sum(), z, create_graph=True)
    return slope.square().sum(1)


def _pulled(params: Params, x: Tensor) -> Tensor:
    pulled: Any = torch.func.vjp(functools.partial(_centred, params), x)
    y, pull = pulled
    return pull(torch.ones_like(y))[0].square().sum(1)


def _curved(params: Params, x: Tensor) -> Tensor:
    of_x = torch.func.hessian(lambda z: _centred(params, z).square().sum())
    return of_x(x).square().sum((1, 2, 3))


@pytest.mark.parametrize("loss_fn", [_slope, _pulled, _curved])
def test_derivatives_with_respect_to_inputs(loss_fn: LossFn) -> None:
    params, x = {"w": torch.randn(3, 4)}, torch.randn(N, 4)
    found = per_example_gradients(loss_fn, params, x, batched=True)
    close_trees({"w": found.dense("w")}, every_example(loss_fn, params, x))
    with pytest.raises(
        Exception, match=r"torch.autograd.grad, as torch.func.vjp.*jacfwd in it, or call the step in eag"
    ):
        torch.compile(mean_of, fullgraph=True, backend="eager")(loss_fn, params, x)


def _sorted(params: Params, batch: Any) -> Tensor:
    """By length, and back, as for packed sequences."""
    x, y, lengths = batch
    order = lengths.argsort(descending=True)
    h = F.linear(x.mean(1)[order], params["w"]).tanh()[order.argsort()]
    return F.cross_entropy(F.linear(h, params["v"]), y, reduction="none")


def _dispatched(params: Params, batch: Any) -> Tensor:
    """Tokens to experts, in the order of these."""
    x, y, _ = batch
    h = F.linear(x, params["w"]).tanh().flatten(0, 1)
    weight, expert = F.linear(h, params["gate"]).softmax(-1).max(-1)
    order = expert.argsort(stable=True)
    z = torch.bmm(h[order][:, None], params["experts"][expert[order]])[:, 0]
    z = z.index_select(0, order.argsort()) * weight[:, None]
    logits = F.linear(z.view(*x.shape[:2], -1).mean(1), params["v"])
    return F.cross_entropy(logits, y, reduction="none")


def _chosen(params: Params, batch: Any) -> Tensor:
    """The largest tokens of the batch."""
    x, y, _ = batch
    tokens = x.flatten(0, 1)
    ids = tokens.norm(dim=1).topk(2 * len(x)).indices
    h = torch.zeros(len(tokens), 6).index_copy(0, ids, F.linear(tokens[ids], params["w"]).tanh())
    return F.cross_entropy(F.linear(h.view(*x.shape[:2], -1).sum(1), params["v"]), y, reduction="none")


def _ordered(params: Params, batch: Any) -> Tensor:
    """Losses of the rows in their own order."""
    x, y, _ = batch
    order = x[:, 0].sort(dim=0)
    h = F.linear(order.values, params["w"]).tanh().scatter(0, order.indices[:, :1].expand(-1, 6), 0.5)
    return F.cross_entropy(F.linear(h, params["v"]), y, reduction="none")


def _by_lookup(rows: Tensor, order: Tensor) -> Tensor:
    return F.embedding(order, rows)


def _by_flat_ids(rows: Tensor, order: Tensor) -> Tensor:
    return rows.take(order[:, None] * rows.shape[1] + torch.arange(rows.shape[1]))


def _permuted(by: Any) -> Any:
    def loss_fn(params: Params, batch: Any) -> Tensor:
        x, y, _ = batch
        order = x[:, 0, 0].argsort()
        h = F.linear(by(x.mean(1), order), params["w"]).tanh()[order.argsort()]
        return F.cross_entropy(F.linear(h, params["v"]), y, reduction="none")

    return loss_fn


def _stably(params: Params, batch: Any) -> Tensor:
    x, y, _ = batch
    h = F.linear(x[:, 0].sort(dim=0, stable=True).values, params["w"]).tanh()
    return F.cross_entropy(F.linear(h.flip(1), params["v"]), y, reduction="none")


PERMUTED = [_permuted(by) for by in (_by_lookup, _by_flat_ids)]


@pytest.mark.parametrize("loss_fn", [_sorted, _dispatched, _chosen, _ordered, _stably, *PERMUTED])
def test_rows_in_an_order_that_comes_from_the_batch(loss_fn: Any) -> None:
    sizes = {"w": (6, 4), "v": (3, 6)} | ({"gate": (4, 6), "experts": (4, 6, 6)} if loss_fn is _dispatched else {})
    params = {name: torch.randn(size) for name, size in sizes.items()}
    batch = torch.randn(N, 3, 4), torch.randint(0, 3, (N,)), torch.randint(1, 4, (N,))
    found = per_example_gradients(loss_fn, params, batch, batched=True)
    close(found.losses, loss_fn(params, batch))
    close_trees({name: found.dense(name) for name in params}, every_example(loss_fn, params, batch))


def test_places_within_the_examples_pick_no_rows() -> None:
    """The last token of each sequence, a label's logit, a table: their layers keep their rules."""

    def loss_fn(params: Params, batch: Any) -> Tensor:
        ids, y, lengths = batch
        h = F.linear(F.embedding(ids, params["table"]), params["w"]).tanh()
        h = h[torch.arange(len(h)), lengths] + h.gather(1, lengths[:, None, None].expand(-1, 1, 6))[:, 0]
        return -F.linear(h, params["v"]).log_softmax(-1).gather(1, y[:, None])[:, 0]

    params = {"table": torch.randn(7, 4), "w": torch.randn(6, 4), "v": torch.randn(5, 6)}
    batch = torch.randint(0, 7, (N, 3)), torch.randint(0, 5, (N,)), torch.randint(0, 3, (N,))
    found = per_example_gradients(loss_fn, params, batch, batched=True)
    assert all(layer.rule for layer in found.captured.layers.values())
    close_trees({name: found.dense(name) for name in params}, every_example(loss_fn, params, batch))


def test_rows_by_ids_in_another_order() -> None:
    """They are differentiated as they are: by their places a rule would take them for other examples'."""

    def losses_fn(params: Params, ids: Tensor) -> Tensor:
        rows = params["w"][ids.flip(0)].flip(0) + params["v"].index_select(0, torch.cat([ids, ids + 1]))[: len(ids)]
        return (rows * params["u"][ids]).sin().sum(1)

    params, batch = {name: torch.randn(5, 3) for name in "wvu"}, torch.randint(0, 4, (N,))
    found = per_example_gradients(losses_fn, params, batch, batched=True)
    expected = loop(lambda params, y: losses_fn(params, y[None])[0], params, batch)[1]
    close_trees({name: found.dense(name) for name in params}, expected)


def _normalised(params: Params, x: Tensor) -> Tensor:
    with torch.no_grad():
        params["w"].mv(torch.ones(4))
    w = params["w"] / params["w"].mv(torch.ones(4)).sum()
    return (F.linear(x, w).tanh() * F.linear(x, params["u"])).sum(-1)


def _shared_and_detached(params: Params, x: Tensor) -> Tensor:
    target = F.linear(x, params["w"]).detach()
    place = F.linear(torch.eye(1, 4), params["w"])
    return (F.linear(x + place, params["u"]) - target).square().sum(-1)


@pytest.mark.parametrize("loss_fn", [_normalised, _shared_and_detached])
def test_calls_that_show_when_others_are_no_layers(loss_fn: LossFn) -> None:
    """A weight whose one differentiated call is on what all examples share: its other calls count then."""
    params, x = {"w": torch.randn(4, 4), "u": torch.randn(4, 4)}, torch.randn(5, 4)
    found = per_example_gradients(loss_fn, params, x, batched=True)
    close_trees({name: found.dense(name) for name in params}, every_example(loss_fn, params, x))


def _scaled(change: Callable[[Tensor], Tensor]) -> LossFn:
    """Whose scale has no rule."""

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        h = F.linear(x, params["w"]) * params["scale"]
        return (change(h) * h.log_softmax(-1)).sum(-1)

    return loss_fn


def _reversed(h: Tensor) -> Tensor:
    h.register_hook(torch.neg)
    return h


class Rounded(torch.autograd.Function):
    """A straight-through estimator, of whose forward Dynamo knows the derivative: zero."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def test_a_function_on_parameters_without_a_rule() -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, Rounded.apply(params["w"] * 4)).square().sum(1)

    params, x = {"w": torch.randn(3, 4)}, torch.randn(N, 4)
    found = per_example_gradients(loss_fn, params, x, batched=True)
    close_trees({"w": found.dense("w")}, every_example(loss_fn, params, x))
    step = torch.compile(ekfac(loss_fn, damping=1.0, batched=True).precondition, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"calls Rounded.*does not reach 'w', which has no rule.*eager mode"):
        step(params, x, ekfac(loss_fn, damping=1.0, batched=True).init(params, x))


def test_dropout_of_batched_losses_in_one_graph() -> None:
    params, graphs = {"w": torch.randn(3, 4)}, list[Any]()

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.dropout(F.linear(x, params["w"]), 0.5).sin().sum(1)

    def dense(params: Params, x: Tensor) -> Tensor:
        return per_example_gradients(loss_fn, params, x, batched=True).dense("w")

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(dense, backend=backend, fullgraph=True)
    for n in (4, 6, 5, 7):
        x = torch.randn(n, 4)
        seed = torch.get_rng_state()
        expected = dense(params, x)
        torch.set_rng_state(seed)
        close(compiled(params, x), expected)
    assert len(graphs) == 2


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    ".data": lambda h: h.data,
    "detach_": lambda h: (h * 1).detach_(),
    "register_hook": _reversed,
}


@pytest.mark.parametrize("change", CUTS)
def test_what_changes_the_graph_reaches_parameters_without_a_rule(change: str) -> None:
    loss_fn = _scaled(CUTS[change])
    params, x = {"w": torch.randn(4, 4), "scale": torch.randn(4)}, torch.randn(5, 4)
    found = per_example_gradients(loss_fn, params, x, batched=True)
    close_trees({name: found.dense(name) for name in params}, every_example(loss_fn, params, x))

    def dense(scale: Tensor) -> Tensor:
        return per_example_gradients(loss_fn, {**params, "scale": scale}, x, batched=True).dense("scale")

    message = rf"{change}.*compiled step does not reach 'scale'.*detach\(\)"
    with pytest.raises(RuntimeError, match=message):
        torch.vmap(dense)(torch.randn(2, 4))
    with pytest.raises(Exception, match=message):
        torch.compile(dense, backend="eager", fullgraph=True)(params["scale"])
    alone = ekfac(lambda p, x: loss_fn(p, x[None]).sum(), damping=1.0)
    with pytest.raises(Exception, match=rf"{change} on what depends on params.*compiled step.*detach\(\)"):
        torch.compile(alone.init, backend="eager", fullgraph=True)(params, x)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("function", [F.conv1d, F.conv_transpose1d])
def test_a_convolution_along_the_examples(function: Any, kernel: int) -> None:
    """The batch as a sequence: a kernel wider than one sees the neighbours of an example."""
    params, x = {"w": torch.randn(4, 4, kernel)}, torch.randn(N, 4)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        z: Tensor = function(x.T[None], params["w"], padding=kernel // 2)
        return z[0].T.tanh().square().sum(1)

    found = per_example_gradients(loss_fn, params, x, batched=True)
    assert (found.captured.layers["w"].rule is None) == (kernel > 1)
    close_trees({"w": found.dense("w")}, every_example(loss_fn, params, x))


def _rows_by_rank(x: Tensor) -> tuple[Tensor, Tensor]:
    rank = (x[:, None, 0] > x[None, :, 0]).sum(1)
    return rank, F.one_hot(rank, len(x)).T.bool()


def _reduced(x: Tensor) -> Tensor:
    rank, _ = _rows_by_rank(x)
    return torch.zeros_like(x).scatter_reduce_(0, rank[:, None].expand_as(x), x, "sum")


def _put_in_order(x: Tensor) -> Tensor:
    rank, _ = _rows_by_rank(x)
    places = rank[:, None] * x.shape[1] + torch.arange(x.shape[1])
    return torch.zeros_like(x).put(places, x)


def _masked(x: Tensor) -> Tensor:
    rank, at = _rows_by_rank(x)
    return torch.zeros(len(x), *x.shape).masked_scatter(at[..., None].expand(-1, -1, 4), x[rank.argsort()]).sum(1)


@pytest.mark.parametrize("order", [_reduced, _put_in_order, _masked])
def test_rows_written_in_an_order_of_the_batch(order: Callable[[Tensor], Tensor]) -> None:
    params, x = {"w": torch.randn(5, 4)}, torch.randn(N, 4)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(order(x), params["w"]).tanh()[_rows_by_rank(x)[0]].square().sum(1)

    found = per_example_gradients(loss_fn, params, x, batched=True)
    close_trees({"w": found.dense("w")}, every_example(loss_fn, params, x))


@pytest.mark.parametrize("width", [4, 256])
def test_rows_of_a_parameter_for_the_examples_and_a_scale_before_a_large_layer(width: int) -> None:
    params = {"w": torch.randn(width, width) / width**0.5, "rows": torch.randn(9, width), "scale": torch.randn(width)}
    params = {name: p.float() for name, p in params.items()}

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        h = F.linear(x * params["scale"], params["w"]).tanh()
        return torch.einsum("nd,nd->n", h, params["rows"][: len(x)])

    x = torch.randn(N, width).float()
    found = per_example_gradients(loss_fn, params, x, batched=True)
    assert found.captured.layers["w"].rule == "linear"
    expected = every_example(loss_fn, params, x)
    close_trees({name: found.dense(name) for name in params}, expected, 1e-5)


def _lengths_of_rows(params: Params, batch: Any) -> Tensor:
    x, mask = batch
    lengths = [len(row[row]) for row in mask]
    h = F.linear(torch.cat([t[:k] for t, k in zip(x, lengths, strict=True)]), params["w"]).tanh()
    return torch.stack([t.square().sum() for t in h.split(lengths)])


def _shape_of_rows(params: Params, batch: Any) -> Tensor:
    x, mask = batch
    lengths = [row.nonzero().shape[0] for row in mask]
    order = torch.tensor(sorted(range(len(x)), key=lambda k: -lengths[k]))
    return F.linear(x.sum(1)[order], params["w"]).tanh().square().sum(1)[order.argsort()]


def _list_of_numbers(params: Params, batch: Any) -> Tensor:
    x, mask = batch
    rank = mask.sum(1).argsort(stable=True)
    ids = torch.tensor([k for k in rank])  # noqa: C416
    return F.linear(x.sum(1)[ids], params["w"]).tanh().square().sum(1)[rank.argsort()]


def _sparse(params: Params, batch: Any) -> Tensor:
    x, mask = batch
    at = mask.to_sparse().indices()
    rows = F.linear(x[at[0], at[1]], params["w"]).tanh()
    return torch.zeros(len(x), 5).index_add(0, at[0], rows).square().sum(1)


def _bags(params: Params, batch: Any) -> Tensor:
    _, mask = batch
    offsets = F.pad(mask.sum(1).cumsum(0)[:-1], [1, 0])
    ids = torch.arange(mask.numel()) % 5
    return F.embedding_bag(ids, params["w"], offsets, mode="sum").tanh().square().sum(1)


def _by_a_list(params: Params, batch: Any, read: Callable[[Tensor], Any] = Tensor.tolist) -> Tensor:
    x, mask = batch
    rank = mask.sum(1).argsort(stable=True)
    return F.linear(x.sum(1)[read(rank)], params["w"]).tanh().square().sum(1)[rank.argsort()]


def _by_an_array(params: Params, batch: Any) -> Tensor:
    return _by_a_list(params, batch, Tensor.numpy)


def _split_in_two(params: Params, batch: Any) -> Tensor:
    x, mask = batch
    before, after = x.sum(1).tensor_split(mask.sum(1).argmin()[None])
    losses = F.linear(torch.cat([after, before]), params["w"]).tanh().square().sum(1)
    return torch.cat([losses[len(after) :], losses[: len(after)]])


def _length_of_what_is_made(params: Params, batch: Any) -> Tensor:
    x, mask = batch
    lengths = [len(2 * row[row]) for row in mask]
    h = F.linear(torch.cat([t[:k] for t, k in zip(x, lengths, strict=True)]), params["w"]).tanh()
    return torch.stack([t.square().sum() for t in h.split(lengths)])


def _sorted_along_the_last_axis(params: Params, batch: Any) -> Tensor:
    sizes, order = batch[1].sum(1).double()[None].sort(stable=True)
    losses = F.linear(sizes.mT * torch.arange(1.0, 5.0), params["w"]).tanh().square().sum(1)
    return losses[order[0].argsort()]


def _orders_of_one_number(params: Params, batch: Any) -> Tensor:
    x, _ = batch
    same = x.sum().sort().values - x.sum().gather(0, torch.tensor(0))
    return F.linear(x.sum(1), params["w"]).tanh().square().sum(1) + same


def _into_a_tensor_of_its_own(params: Params, batch: Any) -> Tensor:
    x, mask = batch
    counts = x.new_zeros(len(x) + 1)
    torch.cumsum(mask.sum(1).to(x.dtype), 0, out=counts[1:])
    return F.linear(x.sum(1), params["w"]).tanh().square().sum(1) * counts[1:] * len(mask.nonzero())


LEARNED = [_lengths_of_rows, _shape_of_rows, _list_of_numbers, _sparse, _bags, _by_a_list, _by_an_array]
LEARNED += [_into_a_tensor_of_its_own, _split_in_two, _length_of_what_is_made]
LEARNED += [_sorted_along_the_last_axis, _orders_of_one_number]


@pytest.mark.parametrize("loss_fn", LEARNED)
def test_what_python_learns_of_values(loss_fn: LossFn) -> None:
    params = {"w": torch.randn(5, 4)}
    mask = torch.arange(4) < torch.tensor([4, 1, 4, 3])[:, None]
    batch = torch.randn(4, 4, 4), mask
    found = per_example_gradients(loss_fn, params, batch, batched=True)
    close_trees({"w": found.dense("w")}, every_example(loss_fn, params, batch))
