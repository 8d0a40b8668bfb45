"""Bad input gets an error that names the argument, its shape and the remedy."""

import functools
import itertools
import logging
import math
from collections import UserDict
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.rnn import pack_sequence
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from ekfac_func import (
    RULES,
    SUA,
    Basis,
    Blocks,
    Call,
    Contractions,
    Factored,
    Moment,
    Order,
    SecondMoment,
    averaged_intra_batch,
    ekfac,
    exact_sums,
    gradient,
    keep,
    optim,
    per_example_gradients,
    rank,
    running_average,
    second_moments,
)
from ekfac_func.types import Params

from .cases import N, classifier, make
from .oracles import close, close_trees, loop

W = {"w": torch.randn(3, 4, dtype=torch.float64)}


def loss_fn(params: Params, example: Any) -> Tensor:
    x = example["x"] if isinstance(example, dict) else example
    return F.linear(x, params["w"]).cos().sum()


with torch.inference_mode():
    INFERENCE = torch.randn(3, 4, dtype=torch.float64)
LOADER: Any = DataLoader(torch.utils.data.TensorDataset(torch.randn(5, 4)))
JAGGED = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)


@pytest.mark.parametrize("entry", ["init", "precondition", "per_example_gradients"])
@pytest.mark.parametrize(
    ("params", "batch", "error", "message"),
    [
        (
            W,
            {"x": torch.randn(5, 4), "y": torch.randn(4)},
            ValueError,
            r"batch\['y'\].*\(4,\).*4.*5.*same leading size",
        ),
        (W, torch.randn(0, 4), ValueError, r"\(0, 4\).*empty batch.*at least one"),
        (W, {}, ValueError, "batch has no tensors.*leading axis"),
        (W, {"x": torch.randn(5, 4), "k": 3}, TypeError, r"batch\['k'\] is a int.*close over"),
        (W, (torch.randn(5, 4).numpy(),), TypeError, r"batch\[0\] is a ndarray.*torch.as_tensor"),
        (W, UserDict(x=torch.randn(5, 4)), TypeError, r"batch is a UserDict.*pass dict\(batch\)"),
        (W, [UserDict(x=torch.randn(5, 4))], TypeError, r"batch\[0\] is a UserDict.*pass dict\(batch\[0\]\)"),
        (W, LOADER, TypeError, "batch is a DataLoader.*pass one batch of it.*default_collate"),
        ({"w": INFERENCE}, torch.randn(5, 4), RuntimeError, r"'w'.*\(3, 4\).*inference_mode.*no_grad.*clone\(\)"),
        (W, {"x": torch.randn(5, 4), "k": torch.tensor(1.0)}, ValueError, r"batch\['k'\].*shape \(\).*leading axis"),
        ({"w": torch.ones(3, 4, dtype=torch.int64)}, torch.randn(5, 4), TypeError, r"'w'.*\(3, 4\).*int64.*floating"),
        ({"w": torch.ones(3, 4) * 1j}, torch.randn(5, 4), TypeError, r"'w'.*\(3, 4\).*complex.*real"),
        ({"w": torch.ones(3, 4, device="meta")}, torch.randn(5, 4), ValueError, r"'w'.*\(3, 4\).*meta.*materialise"),
        (W, {"x": torch.ones(5, 4, device="meta")}, ValueError, r"batch\['x'\].*\(5, 4\).*meta.*zeros on the device"),
        (W, {"x": JAGGED}, TypeError, r"batch\['x'\] is a nested tensor: pad it"),
        ({"w": torch.ones(3, 4).to_sparse()}, torch.randn(5, 4), TypeError, r"'w'.*\(3, 4\) is sparse.*to_dense"),
        ({"w": nn.UninitializedParameter()}, torch.randn(5, 4), ValueError, "'w'.*no shape yet.*lazy"),
        ({}, torch.randn(5, 4), ValueError, "params is empty"),
        ({"w": [1.0]}, torch.randn(5, 4), TypeError, r"'w'.*list.*tensors"),
        ([torch.ones(3, 4)], torch.randn(5, 4), TypeError, "params is a list.*dict"),
    ],
)
def test_params_and_batch(entry: str, params: Any, batch: Any, error: Any, message: str) -> None:
    step = ekfac(loss_fn, damping=1e-2)
    state = step.init(W, torch.randn(5, 4))
    calls = {
        "init": lambda: step.init(params, batch),
        "precondition": lambda: step.precondition(params, batch, state),
        "per_example_gradients": lambda: per_example_gradients(loss_fn, params, batch),
    }
    with pytest.raises(error, match=message):
        calls[entry]()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"damping": 0.0}, ValueError, "damping=0.0.*positive"),
        ({"damping": -1}, ValueError, "damping=-1.*positive"),
        ({"damping": float("nan")}, ValueError, "damping=nan.*positive"),
        ({"damping": torch.ones(2)}, ValueError, r"damping has shape \(2,\).*0-d"),
        ({"damping": "1"}, TypeError, "damping.*str.*number"),
        ({"damping": True}, TypeError, "damping is a bool.*number"),
        ({"damping": {"w": 0.1}}, TypeError, r"damping is a dict.*rule.*optim\.relative"),
        ({"damping": math.inf}, ValueError, "damping=inf.*positive"),
        ({"basis_every": 0}, ValueError, "basis_every=0.*at least 1"),
        ({"basis_every": 1.5}, ValueError, "basis_every=1.5.*whole"),
        ({"basis_every": True}, ValueError, "basis_every=True.*whole"),
        ({"batched": "yes"}, TypeError, "batched='yes' is a str: give True or False"),
        ({"batched": True, "randomness": "same"}, ValueError, "randomness='same' with batched=True.*leave it out"),
        (
            {"batched": True, "fisher": gradient(lambda p, x: x.sum())},
            ValueError,
            "gradient Fisher with batched=True.*use",
        ),
        ({"second_moment": "kfac"}, TypeError, "second_moment='kfac'.*intra_batch"),
        ({"second_moment": averaged_intra_batch}, TypeError, "second_moment.*averaged_intra_batch"),
        ({"at_refresh": "keep"}, TypeError, "at_refresh='keep'.*transport"),
        ({"factor_decay": 1.5}, ValueError, "factor_decay=1.5"),
        ({"factor_decay": 1.0}, ValueError, "factor_decay=1.0"),
        ({"factor_decay": "0.9"}, TypeError, "factor_decay is a str.*number"),
        ({"exponent": "-1"}, TypeError, "exponent is a str.*number"),
        ({"rules": [F.linear]}, TypeError, "rules is a list.*dict"),
        ({"bases": rank(8)}, TypeError, r"bases is Rank\(r=8\).*dict"),
        ({"contractions": Contractions(orders=Order.PAIRS)}, TypeError, "orders is .*dict"),  # type: ignore[arg-type]
        ({"contractions": Contractions(costs=None)}, TypeError, "costs is None.*dict"),  # type: ignore[arg-type]
        ({"weight_sharing": "reduce"}, TypeError, "weight_sharing='reduce' is not a function: pass expand or reduce"),
        ({"rules": {F.linear: 3}}, TypeError, "rules.*is 3: give a function"),
        ({"rules": {"linear": F.linear}}, TypeError, "rules has 'linear', which no call shows: give a torch function"),
        ({"rules": {nn.Linear: F.linear}}, TypeError, "rules has .*Linear.*which no call shows"),
        ({"damping": Fraction(1, 10)}, TypeError, "damping is a Fraction.*number"),
        ({"bases": {0: rank(8)}}, TypeError, "bases has the pattern 0: give a string"),
        ({"contractions": Contractions(orders={0: Order.PAIRS})}, TypeError, "orders has the pattern 0: give"),  # type: ignore[dict-item]
        ({"chunk_size": 0}, ValueError, "chunk_size=0.*at least 1"),
        ({"randomness": "often"}, ValueError, "randomness='often'.*different"),
    ],
)
def test_settings(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ekfac(loss_fn, **{"damping": 1e-2, **options})


def test_decays() -> None:
    for estimator in (averaged_intra_batch, running_average):
        for decay in (-0.1, 1.5):
            with pytest.raises(ValueError, match=f"decay={decay}"):
                estimator(decay)


def test_an_error_of_the_loss_says_what_it_was_called_on(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(caplog.handler)
    with pytest.raises(RuntimeError) as raised:
        ekfac(loss_fn, damping=1e-2).init(W, torch.randn(5, 7))
    assert raised.value.__notes__ == ["loss_fn was called on one example, whose tensors have the shapes [(7,)]"]
    log.removeHandler(caplog.handler)
    assert not caplog.records


def test_loss_fn_must_be_callable() -> None:
    with pytest.raises(TypeError, match="loss_fn is a int"):
        ekfac(3, damping=1e-2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss_fn is a int"):
        per_example_gradients(3, W, torch.randn(5, 4))  # type: ignore[arg-type]


def test_the_loss_of_a_fisher_is_told_from_that_of_the_data() -> None:
    step = ekfac(loss_fn, damping=1e-2, fisher=gradient(lambda p, x: F.linear(x, p["w"])))
    with pytest.raises(ValueError, match=r"shape \(3,\).*scalar") as raised:
        step.init(W, torch.randn(5, 4))
    assert "the curvature loss of the gradient Fisher" in raised.value.__notes__[-1]


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda p, x: F.linear(x, p["w"]), ValueError, r"shape \(3,\).*scalar"),
        (lambda p, x: F.linear(x, p["w"]).sum()[None], ValueError, r"shape \(1,\).*scalar"),
        (lambda p, x: 3.0, TypeError, "float"),
        (lambda p, x: F.linear(x, p["w"]).sum().long(), TypeError, "int64"),
        (lambda p, x: (F.linear(x, p["w"]).sum(), x), TypeError, "tuple"),
    ],
)
def test_the_loss_is_a_scalar(loss: Any, error: Any, message: str) -> None:
    step = ekfac(loss, damping=1e-2)
    with pytest.raises(error, match=message):
        step.init(W, torch.randn(5, 4))
    with pytest.raises(error, match=message):
        per_example_gradients(loss, W, torch.randn(5, 4))


def test_buffers_stay_those_of_the_model() -> None:
    """Also where `functional_call` had put others in the places of some."""
    net = Remembering(first=False)
    net.register_buffer("other", torch.zeros(2))
    before = dict(net.named_buffers())

    def loss(replaced: str, params: Params, x: Tensor) -> Tensor:
        return F.linear(functional_call(net, {replaced: torch.ones(4)}, (x,))[None], params["w"]).sum()

    with pytest.raises(RuntimeError, match="another tensor into the buffer 'seen'"):
        per_example_gradients(functools.partial(loss, "other"), W, torch.randn(5, 4))
    per_example_gradients(functools.partial(loss, "seen"), W, torch.randn(5, 4))
    assert list(dict(net.named_buffers())) == ["seen", "other"]
    assert all(b is before[name] for name, b in net.named_buffers())


def test_a_buffer_that_is_moved_to_where_it_is() -> None:
    class Moving(Remembering):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen.to(x.device)
            return x + self.seen

    net = Moving(first=False)
    seen = net.seen
    loss, batch = _of_module(net), torch.randn(5, 4)
    close(per_example_gradients(loss, W, batch).dense("w"), loop(loss, W, batch)[1]["w"])
    assert net.seen is seen


def test_a_buffer_that_is_filled_once() -> None:
    """Is refused though another run of the loss would find it filled."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))
            self.filled = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.filled:
                self.filled, self.seen = True, x.detach().abs()
            return x * self.seen

    for branches in (False, True):
        net = Scaled()

        def loss(params: Params, x: Tensor) -> Tensor:
            y = _of_module(net)(params, x)  # noqa: B023
            return y if not branches or y > 0 else 2 * y  # noqa: B023

        with pytest.raises(RuntimeError, match="another tensor into the buffer 'seen'"):
            per_example_gradients(loss, W, torch.randn(5, 4))


def test_a_batched_loss_that_changes_a_buffer() -> None:
    """Is refused before anything changes it."""
    net = nn.BatchNorm1d(3)
    with pytest.raises(RuntimeError, match=r"changes a tensor that it did not make.*has_aux=True"):
        per_example_gradients(lambda p, x: net(_linear(p, x)).sum(1), W, torch.randn(5, 4), batched=True)
    assert net.num_batches_tracked == 0
    assert net.running_mean is not None
    assert not net.running_mean.any()


def test_aux_is_of_tensors() -> None:
    loss = lambda p, x: (F.linear(x, p["w"]).sum(), {"correct": 3})  # noqa: E731
    with pytest.raises(TypeError, match="a int in aux"):
        ekfac(loss, damping=1e-2, has_aux=True).init(W, torch.randn(5, 4))


BATCH_COUPLED: dict[str, Any] = {
    "train": lambda: nn.BatchNorm2d(3),
    "no statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(),
    "not affine": lambda: nn.BatchNorm2d(3, affine=False),
    "one axis": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Unflatten(1, (3, 16))),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", BATCH_COUPLED)
def test_batch_statistics(kind: str, compiled: bool) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), BATCH_COUPLED[kind](), nn.Flatten(), nn.Linear(48, 3))
    case = classifier(net, 2, 6, 6)
    net.train(kind != "no statistics")
    before = {name: t.clone() for name, t in net.state_dict().items()}
    names = [name for name in case.params if name.startswith("1.")]
    message = f"{names[0]!r}.*eval\\(\\).*GroupNorm" if names else r"no parameters.*eval\(\).*GroupNorm"
    step = ekfac(case.loss_fn, damping=1e-2)
    call = torch.compile(step.init, backend="eager") if compiled else step.init
    with pytest.raises(Exception, match=message):
        call(case.params, case.batch(N))
    with pytest.raises(ValueError, match=message):
        per_example_gradients(case.loss_fn, case.params, case.batch(N))
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_batch_statistics_switched_on_later() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3)).eval()
    case = classifier(net, 2, 6, 6)
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2)
    _, state, _ = step.precondition(case.params, batch, step.init(case.params, batch))
    net.train()
    with pytest.raises(ValueError, match=r"'1.weight' and '1.bias'.*eval\(\)"):
        step.precondition(case.params, batch, state)


TABLE = {"table": torch.randn(6, 3)}


def _linear(params: Params, x: Tensor) -> Tensor:
    return F.linear(x[None], params["w"])


def _counting(change: Callable[[Tensor, Tensor], Any]) -> Any:
    count = torch.zeros(4)

    def loss(params: Params, x: Tensor) -> Tensor:
        change(count, x)
        return _linear(params, x).sum()

    return loss


class Remembering(nn.Module):
    """Its buffers are given other tensors in each call, or made in the first."""

    seen: Tensor

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        if not first:
            self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if not self.first:
            self.seen = 0.9 * self.seen + 0.1 * x
        elif "seen" not in self._buffers:
            self.register_buffer("seen", torch.ones(4))
        return x * self.seen


def _of_module(net: nn.Module) -> Any:
    return lambda params, x: F.linear(functional_call(net, {}, (x,)).sum() * x[None], params["w"]).sum()


LABEL = torch.tensor([1])
ALONE: dict[str, tuple[Any, str]] = {
    "detached": (lambda p, x: _linear(p, x).detach().sum(), r"does not depend on params"),
    "other parameters": (lambda p, x: (x * W["w"]).sum(), r"does not depend on params"),
    "class weights": (
        lambda p, x: F.cross_entropy(_linear(p, x), LABEL, torch.ones(3)),
        r"cross_entropy.*\(3,\).*reduction='sum'",
    ),
    "class weights of nll": (
        lambda p, x: F.nll_loss(_linear(p, x), LABEL, weight=torch.ones(3)),
        r"nll_loss.*\(3,\).*reduction='sum'",
    ),
    "running statistics": (
        lambda p, x: F.instance_norm(_linear(p, x)[None], torch.zeros(1), torch.ones(1)).sum(),
        r"instance_norm.*\(1, 1, 3\).*batched=True",
    ),
    "counter": (_counting(lambda count, x: count.add_(x)), r"changes a tensor.*add_.*\(4,\).*has_aux.*batched=True"),
    "counter by out": (
        _counting(lambda count, x: torch.add(count, 1, out=count)),
        r"changes a tensor.*torch.add.*\(4,\).*has_aux.*batched=True",
    ),
    "spectral norm": (
        _of_module(spectral_norm(nn.Linear(4, 3))),
        r"changes a tensor.*normalize.*\(3,\).*eval\(\).*batched=True",
    ),
    "assigned buffer": (
        _of_module(Remembering(first=False)),
        r"another tensor into the buffer 'seen' of Remembering.*has_aux.*batched=True",
    ),
    "new buffer": (_of_module(Remembering(first=True)), r"into the buffer 'seen'.*call the model once before"),
}


@pytest.mark.parametrize("batched", [False, True])
def test_an_example_changed_in_place(batched: bool) -> None:
    batch = torch.randn(5, 4) if batched else torch.randn(5, 1, 4)
    with pytest.raises(RuntimeError, match=r"changes a tensor of its example.*x = x \+ y"):
        per_example_gradients(
            lambda p, x: F.linear(x.mul_(2), p["w"]).sum(-1 if batched else ()), W, batch, batched=batched
        )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ALONE)
def test_what_one_example_cannot_mean(kind: str, compiled: bool) -> None:
    loss, message = ALONE[kind]
    step = ekfac(loss, damping=1e-2)
    call = torch.compile(step.init, backend="eager") if compiled else step.init
    with pytest.raises(Exception, match=message):
        call(W, torch.randn(5, 4))
    with pytest.raises((ValueError, RuntimeError), match=message):
        per_example_gradients(loss, W, torch.randn(5, 4))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_comes_after_a_derivative_is_refused_too(compiled: bool) -> None:
    """Which discovery has not seen."""

    def loss(params: Params, x: Tensor) -> Tensor:
        slopes = torch.func.jacrev(lambda x: _linear(params, x).sin())(x)
        return slopes.square().sum() + F.cross_entropy(_linear(params, x), LABEL, torch.ones(3))

    call = ekfac(loss, damping=1e-2).precondition
    state = ekfac(lambda p, x: _linear(p, x).sum(), damping=1e-2).init(W, torch.randn(5, 4))
    with pytest.raises(Exception, match="cross_entropy with weight of shape"):
        (torch.compile(call, backend="eager", fullgraph=True) if compiled else call)(W, torch.randn(5, 4), state)


@pytest.mark.parametrize("lookup", [F.embedding, F.embedding_bag])
@pytest.mark.parametrize("batched", [False, True])
def test_a_lookup_that_changes_its_table(lookup: Any, batched: bool) -> None:
    before = TABLE["table"].clone()
    with pytest.raises(ValueError, match=r"embedding.*max_norm=1.0.*'table'.*\(6, 3\).*between steps"):
        per_example_gradients(
            lambda p, ids: lookup(ids if ids.dim() == 2 else ids[None], p["table"], max_norm=1.0).flatten(1).sum(1),
            TABLE,
            torch.randint(0, 6, (5, 2)),
            batched=batched,
        )
    assert torch.equal(TABLE["table"], before)


@pytest.mark.filterwarnings("ignore:size_average")
def test_weights_of_several_labels_are_weights() -> None:
    """The mean over an example's own labels is what it says, and a sum by torch's old options is a sum."""
    weights, x = torch.tensor([1.0, 3.0, 1.0]), torch.randn(5, 2, 4)
    for labels, options in ((torch.tensor([0, 1]), {}), (LABEL, {"size_average": False})):

        def loss(p: Params, x: Tensor, labels: Tensor = labels, options: Any = options) -> Tensor:
            return F.cross_entropy(F.linear(x[: len(labels)], p["w"]), labels, weights, **options)

        close(per_example_gradients(loss, W, x).dense("w"), loop(loss, W, x)[1]["w"])


def test_a_whole_basis_of_many_dimensions_is_named() -> None:
    params = {"head": torch.randn(9000, 2)}
    step = ekfac(lambda p, x: F.linear(x, p["head"]).sum(), damping=1.0)
    with pytest.warns(UserWarning, match=r"'head'.*9000.*outputs.*0.3 GiB.*rank\(256\).*Blocks\(outputs=1\)"):
        step.init(params, torch.randn(2, 2))
    ekfac(lambda p, x: F.linear(x, p["head"]).sum(), damping=1.0, bases={"head": Blocks(outputs=1)}).init(
        params, torch.randn(2, 2)
    )


def test_a_state_of_another_dtype() -> None:
    step = ekfac(loss_fn, damping=1e-2)
    state = step.init(W, torch.randn(5, 4))
    half = {"w": W["w"].float()}
    with pytest.raises(TypeError, match=r"float64.*'w'.*float32.*init\(params, batch\)"):
        step.precondition(half, torch.randn(5, 4, dtype=torch.float32), state)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_inside_the_loss(reentrant: bool) -> None:
    def loss(params: Params, x: Tensor) -> Tensor:
        h = checkpoint(lambda x: F.linear(x, params["w"]).cos(), x, use_reentrant=reentrant)
        return h.sum()

    step = ekfac(loss, damping=1e-2)
    with pytest.raises(ValueError, match=r"checkpoint.*remove it.*chunk_size"):
        step.init(W, torch.randn(5, 4))


def test_a_state_of_something_else() -> None:
    small, wide, conv = make("mlp"), make("deep"), make("conv")
    step = ekfac(small.loss_fn, damping=1e-2)
    elsewhere = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), step.init(small.params, small.batch(N)))
    with pytest.raises(ValueError, match=r"state has the layer '0.weight' on meta, params on cpu: move it"):
        step.precondition(small.params, small.batch(N), elsewhere)
    with pytest.raises(TypeError, match=r"state is a dict.*init"):
        step.precondition(small.params, small.batch(N), {})  # type: ignore[arg-type]
    other = ekfac(wide.loss_fn, damping=1e-2).init(wide.params, wide.batch(N))
    with pytest.raises(ValueError, match=r"\(1, 4, 5, 1\).*'0.weight'.*\(1, 5, 5, 1\).*init"):
        step.precondition(small.params, small.batch(N), other)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Linear(3, 3))
    more = classifier(net, 4)
    larger = ekfac(more.loss_fn, damping=1e-2).init(more.params, more.batch(N))
    with pytest.raises(ValueError, match=r"state has a layer '3.weight' that params has not: make it with init"):
        step.precondition(small.params, small.batch(N), larger)
    biased, x = {"w": torch.randn(3, 4), "b": torch.randn(3)}, torch.randn(N, 4)
    alone = ekfac(lambda p, x: (p["b"].cos() * x.sum()).sum(), damping=1.0).init(biased, x)
    joined = ekfac(lambda p, x: F.linear(x, p["w"], p["b"]).cos().sum(), damping=1.0)
    with pytest.raises(ValueError, match=r"state has a layer 'b' that is now the bias of another"):
        joined.precondition(biased, x, alone)
    less = step.init(small.params, small.batch(N))
    with pytest.raises(ValueError, match=r"state has no layer '3.weight'"):
        ekfac(more.loss_fn, damping=1e-2).precondition(more.params, more.batch(N), less)
    plain = ekfac(conv.loss_fn, damping=1e-2, rules=RULES).init(conv.params, conv.batch(N))
    with pytest.raises(ValueError, match=r"\(1, 3, 37, 1\).*'0.weight'.*\(1, 3, 4, 9\)"):
        ekfac(conv.loss_fn, damping=1e-2, rules={**RULES, **SUA}).precondition(conv.params, conv.batch(N), plain)


def test_an_unknown_name() -> None:
    with pytest.raises(KeyError, match=r"'v' is not in params.*'w'"):
        per_example_gradients(loss_fn, W, torch.randn(5, 4)).dense("v")


@pytest.mark.parametrize("damping", [torch.tensor(-1.0), torch.tensor(0.0), optim.relative(torch.tensor(0.0))])
def test_a_damping_that_cannot_be_checked_skips_the_step(damping: Any) -> None:
    batch = torch.randn(5, 4)
    step = ekfac(loss_fn, damping=damping)
    natural, _, info = step.precondition(W, batch, step.init(W, batch))
    assert not isinstance(damping, Tensor) or info.damping == damping
    assert info.skipped
    assert not natural["w"].any()
    with pytest.raises(TypeError, match=r"relative was called with a dict.*damping=relative\(fraction\)"):
        ekfac(loss_fn, damping=optim.relative).precondition(W, batch, step.init(W, batch))  # type: ignore[arg-type]


def test_dropout_modes() -> None:
    def noisy(params: Params, x: Tensor) -> Tensor:
        return F.dropout(F.linear(x, params["w"]), 0.5).sum()

    batch = torch.ones(64, 4)
    assert per_example_gradients(noisy, W, batch).losses.unique().numel() > 1

    def in_a_loop(params: Params, x: Tensor) -> Tensor:
        return noisy(params, x) if float(x.sum()) > 0 else x.sum()

    for loss_fn, chunk_size in itertools.product((noisy, in_a_loop), (None, 20)):
        torch.manual_seed(0)
        found = per_example_gradients(loss_fn, W, batch, randomness="same", chunk_size=chunk_size)
        assert found.losses.unique().numel() == 1
        after = torch.rand(())
        torch.manual_seed(0)
        per_example_gradients(noisy, W, batch, randomness="same")
        assert after == torch.rand(())  # what is drawn next is that of the batch at once
    for loss_fn in (noisy, in_a_loop):
        with pytest.raises(RuntimeError, match="randomness"):
            per_example_gradients(loss_fn, W, batch, randomness="error")
    per_example_gradients(lambda p, x: in_a_loop(p, x - 2), W, batch, randomness="error")  # draws nothing


@pytest.mark.parametrize(
    ("term", "error", "message"),
    [
        (lambda x, g: (x, g), TypeError, r"rule of a call of 'w' gave a tuple: .* Factored\(a, g\)"),
        (lambda x, g: Factored(x, g), ValueError, r"'w' gave a of shape \(5, 4\) and g of shape \(5, 3\)"),
        (
            lambda x, g: Factored(g[:, None, None, :, None], x[:, None, None]),
            ValueError,
            r"a \[n b s i k\] and g \[n b s o\], of the letters .* b = 1, i = 4, o = 3",
        ),
    ],
)
def test_a_rule_that_gives_other_axes_than_it_named(term: Any, error: Any, message: str) -> None:
    rules = {F.linear: lambda x, weight: Call(weight, "oi", x, term)}
    with pytest.raises(error, match=message):
        per_example_gradients(loss_fn, W, torch.randn(5, 4), rules=rules)


@pytest.mark.parametrize(
    ("update", "error", "message"),
    [
        (lambda moment, mean, n: mean.square, TypeError, "second_moment=own.*gave a Tensor for the layer 'w'.*Moment"),
        (lambda moment, mean, n: Moment(mean.square, None), TypeError, "gave a Moment.*of two tensors"),  # type: ignore[arg-type]
        (
            lambda moment, mean, n: Moment(mean.square.sum(1), moment.weight),
            ValueError,
            r"moment of shape \(1, 4, 1\) and a weight of shape \(\).*as they are given, \(1, 3, 4, 1\) and \(\)",
        ),
    ],
)
def test_an_estimator_that_gives_no_moment(update: Any, error: Any, message: str) -> None:
    own, batch = SecondMoment("own", exact_sums, update, keep), torch.randn(5, 4)
    step = ekfac(loss_fn, damping=1e-2, second_moment=own)
    with pytest.raises(error, match=message):
        step.precondition(W, batch, step.init(W, batch))


def test_bases_of_second_moments() -> None:
    batch = torch.randn(5, 4)
    state = ekfac(loss_fn, damping=1e-2).init(W, batch)
    with pytest.raises(TypeError, match=r"bases is a State: pass .* state\.bases"):
        second_moments(loss_fn, W, batch, state)  # type: ignore[arg-type]
    whole = state.bases["w"]
    for columns in (1, 2):
        cut = {"w": Basis(whole.Q_A[..., :columns], whole.Q_B)}
        with pytest.raises(ValueError, match=rf"side of shape \(1, 4, {columns}\).*ends with one"):
            second_moments(loss_fn, W, batch, cut)


@pytest.mark.parametrize(("wrong", "worst"), [(7.0, 2), (math.nan, 0)])
def test_the_check_weighs_each_parameter_by_its_own_gradient(wrong: float, worst: int) -> None:
    """A rule that is wrong on a parameter whose gradients are far below another's."""

    def times(x: Tensor, weight: Tensor) -> Call:
        return Call(weight, "oi", x, lambda x, g: Factored(wrong * x[:, None, None, :, None], g[:, None, None]))

    def loss(params: Params, x: Tensor) -> Tensor:
        return 3e4 * (params["w"] * x).square().sum() + F.linear(x, params["v"]).sum()

    params = {"w": torch.randn(3, 4).float(), "v": torch.randn(2, 4).float()}
    batch = torch.randn(4, 4).float() * torch.tensor([0.3, 0.3, 1.0, 0.3]).float()[:, None]
    step = ekfac(loss, damping=1e-2, rules={F.linear: times})
    with pytest.raises(ValueError, match=rf"captured of 'v', of shape \(4, 2, 4\).*most for example {worst}"):
        step.init(params, batch, check=True)


def test_the_check_takes_what_is_zero_but_for_rounding_for_zero() -> None:
    """A bias of keys moves all scores of a query alike."""

    def loss(params: Params, x: Tensor) -> Tensor:
        keys = F.linear(x, params["w"], params["b"])
        return (F.linear(x, params["q"]) @ keys.T).softmax(-1).square().sum()

    params = {"q": torch.randn(5, 4), "w": torch.randn(5, 4), "b": torch.randn(5)}
    ekfac(loss, damping=1.0).init(params, torch.randn(4, 6, 4), check=True)


def changed_in_place(how: Callable[[Tensor], Any]) -> Callable[[Params, Tensor], Tensor]:
    def loss(params: Params, x: Tensor) -> Tensor:
        with torch.no_grad():
            how(params["w"])
        return loss_fn(params, x)

    return loss


@pytest.mark.parametrize(
    "how",
    [
        lambda w: w.clamp_(-0.1, 0.1),
        lambda w: w.data.clamp_(-0.1, 0.1),
        lambda w: w.detach().add_(1),
        lambda w: w.view(-1)[:2].zero_(),
        lambda w: nn.init.zeros_(w),
    ],
)
def test_a_loss_that_changes_params(how: Any) -> None:
    params, batch = {"w": torch.randn(3, 4)}, torch.randn(5, 4)
    before = params["w"].clone()
    with pytest.raises(RuntimeError, match=r"changes the parameter 'w', of shape \(3, 4\), in place: params are not"):
        per_example_gradients(changed_in_place(how), params, batch)
    assert torch.equal(params["w"], before)


class Twice(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * out if func is F.linear else out


def test_tensors_that_override_torch_functions() -> None:
    batch = torch.randn(5, 4)
    with pytest.raises(TypeError, match=r"params\['w'\] of shape \(3, 4\) is a Twice.*as_subclass"):
        per_example_gradients(loss_fn, {"w": W["w"].as_subclass(Twice)}, batch)
    with pytest.raises(TypeError, match=r"batch of shape \(5, 4\) is a Twice.*as_subclass"):
        per_example_gradients(loss_fn, W, batch.as_subclass(Twice))


def test_names_are_strings() -> None:
    with pytest.raises(TypeError, match="params has the name 0, a int"):
        per_example_gradients(loss_fn, {0: W["w"]}, torch.randn(5, 4))  # type: ignore[dict-item]


class Altered(TorchFunctionMode):
    """Of the caller, around the call: it makes other layers of those that the loss calls."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return 2 * func(3 * args[0], args[1].tanh(), **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def test_a_function_mode_of_the_caller() -> None:
    batch = torch.randn(5, 4)
    with Altered():
        losses, expected = loop(loss_fn, W, batch)
        found = per_example_gradients(loss_fn, W, batch)
        assert isinstance(_get_current_function_mode(), Altered)
    close(found.losses, losses)
    close(found.dense("w"), expected["w"])


def test_anomaly_mode_changes_nothing() -> None:
    batch = torch.randn(5, 4)
    step = ekfac(loss_fn, damping=1e-2)
    natural, state, _ = step.precondition(W, batch, step.init(W, batch))
    with torch.autograd.set_detect_anomaly(True):
        anew = ekfac(lambda params, x: loss_fn(params, x), damping=1e-2)
        found, of_anew, _ = anew.precondition(W, batch, anew.init(W, batch))
    close_trees(found, natural)
    assert of_anew.layers == state.layers


def test_a_packed_sequence_runs_in_a_loop() -> None:
    net = nn.GRU(4, 3)
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return functional_call(net, params, (pack_sequence([x]),))[1].square().sum()

    batch = torch.randn(N, 3, 4)
    found = per_example_gradients(loss_fn, params, batch)
    for name, expected in loop(loss_fn, params, batch)[1].items():
        close(found.dense(name), expected)


def test_inference_mode_is_refused() -> None:
    """Every gradient would be zero there; what is compiled leaves it by itself."""
    case = make("mlp")
    batch = case.batch(2)
    step = ekfac(case.loss_fn, damping=0.1)
    state = step.init(case.params, batch)
    natural, _, _ = step.precondition(case.params, batch, state)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
        step.precondition(case.params, batch, state)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
        per_example_gradients(case.loss_fn, case.params, batch)

    def teacher(params: Params, example: Any) -> Tensor:
        with torch.inference_mode():
            target = F.linear(example, params["w"]).cos()
        return (F.linear(example, params["w"]) - target).square().sum(-1)

    with pytest.raises(RuntimeError, match=r"made in torch\.inference_mode.*torch\.no_grad"):
        per_example_gradients(teacher, W, torch.randn(5, 4))
    assert per_example_gradients(teacher, W, torch.randn(5, 4), batched=True).dense("w").any()
    with torch.inference_mode():
        features = torch.randn(5, 4)  # of a frozen backbone
    for loss in (loss_fn, lambda params, x: loss_fn(params, x[None])):
        close(per_example_gradients(loss, W, features).dense("w"), loop(loss, W, features.clone())[1]["w"])
    compiled = torch.compile(step.precondition, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        close_trees(compiled(case.params, batch, state)[0], natural)
