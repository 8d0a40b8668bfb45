"""Models that nobody here wrote: every one exact, on the path of a damping without end, and in one graph."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

pytest.importorskip("transformers")

from ekfac_func import ekfac, per_example_gradients
from ekfac_func.types import Dense, Params

from .models import MODELS, UNCOMPILED, N, images, make, plain, residual_net
from .oracles import close, close_trees, loop

pytestmark = [
    pytest.mark.models,
    # of the transformers package, which caches what it knows of its surroundings
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]
TRACED = {"gpt2"}  # the others behind the marker
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_equal_to_the_loop(name: str) -> None:
    case = make(name)
    batch = case.batch(N)
    losses, expected = loop(plain(name), case.params, batch)
    found = per_example_gradients(case.loss_fn, case.params, batch)
    close(found.losses, losses)
    for p in case.params:
        close(found.dense(p), expected[p])


@every_model
def test_infinite_damping_is_the_plain_gradient(name: str) -> None:
    case = make(name)
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e15)
    natural, _, info = step.precondition(case.params, batch, step.init(case.params, batch))
    for p, expected in loop(plain(name), case.params, batch)[1].items():
        close(natural[p] * 1e15, expected.mean(0), 1e-8)
        close(info.gradient[p], expected.mean(0))


@torch._dynamo.config.patch(specialize_float=True, allow_rnn=True)
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=[] if backend == "eager" and name in TRACED else [pytest.mark.slow])
        for name in MODELS
        if name not in UNCOMPILED
        for backend in ("eager", "aot_eager")
        if backend == "eager" or name != "lstm"  # torch's recurrent modules and `functional_call` are no graph
    ],
)
def test_compiled_equals_eager(name: str, backend: str) -> None:
    case = make(name)
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2)
    initial = step.init(case.params, batch)
    expected, _, info = step.precondition(case.params, batch, initial)
    compiled = torch.compile(step.precondition, fullgraph=True, backend=backend)
    natural, _, report = compiled(case.params, batch, initial)
    close_trees(natural, expected, 1e-8)
    close_trees(report, info, 1e-8)


def test_a_resnet_coupled_by_its_batch_norms() -> None:
    """In training mode: the mean is the gradient of the batch's loss, rules read every weight, eager = compiled."""
    net = residual_net().double().train()
    params = {name: p.detach().clone() for name, p in net.named_parameters()}

    def losses(params: Params, batch: Any) -> Any:
        x, y = batch
        buffers = {name: b.clone() for name, b in net.named_buffers()}
        return F.cross_entropy(functional_call(net, {**params, **buffers}, (x,)), y, reduction="none"), buffers

    batch = images(N, 3, 8)
    found = per_example_gradients(losses, params, batch, batched=True, has_aux=True)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    expected = torch.autograd.grad(losses(leaves, batch)[0].mean(), list(leaves.values()))
    for p, gradient in zip(params, expected, strict=True):
        close(found.mean()[p], gradient)
    assert all(layer.rule for layer in found.captured.layers.values())
    step = ekfac(losses, damping=1e-2, batched=True, has_aux=True)
    state = step.init(params, batch)
    natural, _, info = step.precondition(params, batch, state)
    other, _, report = torch.compile(step.precondition, fullgraph=True, backend="eager")(params, batch, state)
    close_trees(other, natural, 1e-8)
    close_trees(report.aux, info.aux, 1e-8)


@every_model
def test_rules_read_what_they_should(name: str) -> None:
    case = make(name)
    captured = per_example_gradients(case.loss_fn, case.params, case.batch(N)).captured
    read: set[str | None] = set()
    for weight, term in captured.terms.items():
        if not isinstance(term[0], Dense):
            read |= {weight, captured.layers[weight].bias}
    assert case.ruled <= read, sorted(case.ruled - read)
