"""Models that nobody here wrote: every one exact, on the path of a damping without end, and in one graph."""

import pytest
import torch

pytest.importorskip("transformers")

from ekfac_func import ekfac, per_example_gradients
from ekfac_func.types import Dense

from .models import MODELS, UNCOMPILED, N, make
from .oracles import close, close_trees, loop

pytestmark = [
    pytest.mark.models,
    # of the transformers package, which caches what it knows of its surroundings
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_equal_to_the_loop(name: str) -> None:
    case = make(name)
    batch = case.batch(N)
    losses, expected = loop(case.loss_fn, case.params, batch)
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
    for p, expected in loop(case.loss_fn, case.params, batch)[1].items():
        close(natural[p] * 1e15, expected.mean(0), 1e-8)
        close(info.gradient[p], expected.mean(0))


@torch._dynamo.config.patch(specialize_float=True)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNCOMPILED])
def test_compiled_equals_eager(name: str) -> None:
    case = make(name)
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2)
    initial = step.init(case.params, batch)
    expected, _, info = step.precondition(case.params, batch, initial)
    compiled = torch.compile(step.precondition, fullgraph=True, backend="aot_eager")
    natural, _, report = compiled(case.params, batch, initial)
    close_trees(natural, expected, 1e-8)
    close_trees(report, info, 1e-8)


@every_model
def test_rules_read_what_they_should(name: str) -> None:
    case = make(name)
    captured = per_example_gradients(case.loss_fn, case.params, case.batch(N)).captured
    read: set[str | None] = set()
    for weight, term in captured.terms.items():
        if not isinstance(term[0], Dense):
            read |= {weight, captured.layers[weight].bias}
    assert case.ruled <= read, sorted(case.ruled - read)
