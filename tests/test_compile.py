"""One graph for the whole step: compiled equals eager, and the graphs are few."""

import functools
import itertools
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributions import Bernoulli
from torch.func import functional_call
from torch.utils import _pytree as pytree

from benchmarks.workloads import TINY, work
from ekfac_func import (
    DIAGONAL,
    EKFAC,
    RULES,
    SUA,
    Blocks,
    Contractions,
    Factored,
    Order,
    SecondMoment,
    averaged_intra_batch,
    ekfac,
    empirical,
    exact,
    intra_batch,
    keep,
    kfac,
    per_example_gradients,
    rank,
    reset,
    running_average,
    transport,
)
from ekfac_func.capture import capture
from ekfac_func.contraction import sums_arguments
from ekfac_func.discovery import Options
from ekfac_func.orders import FORMED, Contraction
from ekfac_func.patches import Patches
from ekfac_func.types import LossFn, Params

from .cases import BATCHED, N, classifier, make
from .oracles import close, close_trees, loop, stack

ESTIMATORS = [intra_batch, averaged_intra_batch(0.9), running_average(0.9), kfac]


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Any:
    return torch.compile(function, fullgraph=True, backend=backend)


def in_part(values: Iterable[Any], in_full: Container[Any] = (), traced: Container[Any] = ()) -> list[Any]:
    """Some values through AOT autograd, some traced alone; both of every value behind the marker."""
    return [
        pytest.param(value, backend, marks=[] if value in among else [pytest.mark.slow])
        for value in values
        for backend, among in (("eager", traced), ("aot_eager", in_full))
    ]


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def _counted_anew() -> None:
    counters.clear()


# one of each kind, and kinds whose tracing differs; what is traced alone takes a third of the time
IN_FULL = {"mlp", "conv groups"}
TRACED = {"bag offsets", "experts", "in place", "penalty", "script", "slices", "strided"}
TRACED |= {"lookups", "tied padded"}
NO_GRAPH = {"recurrent", "recurrent projected", "recurrent tanh"}  # torch's modules by `functional_call`
EVERY_BACKEND = [
    case for case in in_part(BATCHED, IN_FULL, TRACED) if case.values[1] == "eager" or case.values[0] not in NO_GRAPH
]


# Dynamo traces a graph with 0-d float64 tensors twice to see whether they are Python floats
@torch._dynamo.config.patch(specialize_float=True, allow_rnn=True)
@pytest.mark.parametrize(("name", "backend"), EVERY_BACKEND)
def test_compiled_equals_eager(name: str, backend: str) -> None:
    """On one batch: the null space of a rank-deficient factor is arbitrary, and shows on the next one."""
    case = make(name)
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2)
    initial = step.init(case.params, batch)
    natural, state, info = step.precondition(case.params, batch, initial)
    found, other, report = compiled(step.precondition, backend)(case.params, batch, initial)
    close_trees(found, natural, 1e-8)
    close_trees(report, info, 1e-8)
    assert other.step == state.step
    close_trees(other.factors, state.factors, 1e-8)


NET = functools.partial(
    nn.Sequential, nn.Conv2d(2, 3, 3, stride=2), nn.Tanh(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(12, 3)
)


RUNS = list(itertools.product(ESTIMATORS, [RULES, {**RULES, **SUA}]))


@pytest.mark.parametrize(
    ("of", "backend"),
    [
        *in_part(RUNS, traced=RUNS[1:2]),
        *(pytest.param(of, "inductor", marks=pytest.mark.slow) for of in RUNS),
    ],
)
def test_a_run_with_dropout(of: tuple[SecondMoment, Any], backend: str) -> None:
    """Full-rank factors, several batches, stale bases, the same seed."""
    estimator, rules = of
    case = classifier(NET(), 2, 6, 6)
    batches = [case.batch(40) for _ in range(3 if backend == "eager" else 5)]
    every = 3 if backend == "eager" else 2
    step = ekfac(case.loss_fn, damping=1e-1, second_moment=estimator, basis_every=every, rules=rules, factor_decay=0.5)

    def run(precondition: Any) -> list[Params]:
        torch.manual_seed(3)
        params, state, found = case.params, step.init(case.params, batches[0]), []
        for batch in batches:
            natural, state, _ = precondition(params, batch, state)
            found.append(natural)
            params = {name: p - 0.01 * natural[name] for name, p in params.items()}
        return found

    close_trees(run(compiled(step.precondition, backend)), run(step.precondition), 1e-7)
    assert graphs() <= 3


@pytest.mark.parametrize(
    ("estimator", "backend"),
    [
        *(pytest.param(estimator, "aot_eager", marks=pytest.mark.slow) for estimator in ESTIMATORS),
        (intra_batch, "inductor"),
    ],
)
def test_float32_with_damping(estimator: SecondMoment, backend: str) -> None:
    """Damping at least 1e-2 of the largest moment."""
    net = nn.Linear(6, 3).float()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss_fn(params: Params, example: Any) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (example[0][None],)), example[1][None])

    batch = torch.randn(64, 6).float(), torch.randint(0, 3, (64,))
    torch.set_default_dtype(torch.float32)  # inductor of torch 2.11 takes constants for others
    step = ekfac(loss_fn, damping=2e-2, second_moment=estimator)
    initial = step.init(params, batch)
    natural, state, _ = step.precondition(params, batch, initial)
    assert max(float(moment.value.max()) for moment in state.second_moments.values()) <= 2
    found, _, _ = compiled(step.precondition, backend)(params, batch, initial)
    close_trees(found, natural, 1e-4)


def regression(n: int) -> Any:
    return torch.randn(n, 5), torch.randn(n, 3)


def regression_step(**options: Any) -> tuple[EKFAC, Params]:
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss_fn(params: Params, example: Any) -> Tensor:
        return F.mse_loss(functional_call(net, params, (example[0],)), example[1])

    return ekfac(loss_fn, damping=1e-2, **options), params


@pytest.mark.parametrize(
    ("of", "backend"),
    in_part(itertools.product(ESTIMATORS, [10, 1]), traced=[(running_average(0.9), 10)]),
)
def test_number_of_graphs(of: tuple[SecondMoment, int], backend: str) -> None:
    """Three for a constant batch size, two more for another, none for further ones."""
    step, params = regression_step(second_moment=of[0], basis_every=of[1])
    precondition, state = compiled(step.precondition, backend), step.init(params, regression(8))
    for size, most in ((16, 3), (24, 5), (9, 5), (33, 5)):
        for _ in range(30):
            _, state, _ = precondition(params, regression(size), state)
        assert graphs() <= most


@dataclass
class Labelled:
    x: Tensor
    y: Tensor


pytree.register_dataclass(Labelled)


def of_logits(z: Tensor) -> Bernoulli:
    return Bernoulli(logits=z)


@pytest.mark.parametrize("fisher", [empirical, exact(lambda p, e: F.linear(e.x, p["w"]), of_logits)])
def test_a_batch_of_a_node_of_ones_own(fisher: Any) -> None:
    params, batch = {"w": torch.randn(3, 4)}, Labelled(torch.randn(N, 4), torch.randn(N, 3))
    step = ekfac(lambda p, e: F.mse_loss(F.linear(e.x, p["w"]).sigmoid(), e.y), damping=1e-2, fisher=fisher)
    state = step.init(params, batch)
    close_trees(compiled(step.precondition)(params, batch, state)[0], step.precondition(params, batch, state)[0])


def convolutional() -> nn.Module:
    pools = nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), *pools, nn.Flatten(), nn.Linear(12, 3))


def normalised() -> nn.Module:
    channels = nn.GroupNorm(3, 3), nn.InstanceNorm2d(3, affine=True), nn.BatchNorm2d(3).eval()
    up = nn.ConvTranspose2d(2, 3, 3, padding=1)
    last = nn.LayerNorm(16), nn.LayerNorm((3, 16), elementwise_affine=False), nn.RMSNorm(16)
    return nn.Sequential(up, *channels, nn.Flatten(2), *last, nn.Flatten(), nn.Linear(48, 3))


@pytest.mark.parametrize(
    ("case", "backend"),
    in_part(
        [(convolutional, RULES), (convolutional, {**RULES, **SUA}), (normalised, RULES)],
        traced=[(convolutional, RULES), (normalised, RULES)],
    ),
)
def test_number_of_graphs_of_a_classifier(case: tuple[Any, Any], backend: str) -> None:
    """Convolutions, pools, norms and class-index losses, whose rules under vmap would fix the batch size: seven."""
    make, rules = case
    of = classifier(make(), 2, 4, 4)
    step = ekfac(of.loss_fn, damping=1e-2, basis_every=10, rules=rules)
    precondition, state = compiled(step.precondition, backend), step.init(of.params, of.batch(8))
    for size, most in ((16, 3), (24, 5), (9, 5), (33, 5), (12, 5), (64, 5), (7, 5)):
        for _ in range(12):
            _, state, _ = precondition(of.params, of.batch(size), state)
        assert graphs() <= most


def of_rows(params: Params, x: Tensor) -> Tensor:
    """What is made of the rows of a matrix."""
    h, ids = F.linear(x, params["w"]), torch.tensor([2, 0, 1])  # [5 3]
    named: Any = torch  # whose types know no axis
    found = [
        torch.cat([h[:1], torch.ones(2, 3), h], -2).cos(),
        torch.cat([h, torch.zeros(0), h], dim=1).tanh(),
        named.gather(h, axis=1, index=ids[None]),
        h.gather(1, h.argmax(-1, keepdim=True)),
        torch.gather(h, -2, ids[None]),
        h.index_select(-1, ids).sin(),
        h[0].log_softmax(-1).gather(0, h[1].argmax()),
        h[0].scatter_add(0, h[1].argmax(), h[2, 0]),
        h.cos() * torch.zeros(5, dtype=torch.bool).index_add(0, ids, ids > 0)[:, None],
        torch.zeros(5, 3).index_add(1, ids, h, alpha=2),
        torch.index_add(torch.ones(4, 3), 0, h[:, 0].argsort() // 2, h),
        h.scatter_add(0, h.argsort(0)[:2], h[:2].exp()),
        F.kl_div(h.log_softmax(-1), h.detach().softmax(-1), reduction="batchmean"),
        F.kl_div(h.log_softmax(-1), h.cos().log_softmax(-1), reduction="sum", log_target=True),
        F.binary_cross_entropy(h.sigmoid(), h.detach().cos().abs(), torch.arange(3.0)),
        F.cross_entropy(h, torch.tensor([0, 1, -100, 2, 2]), label_smoothing=0.1),
        F.cross_entropy(h, torch.tensor([0, 1, 5, 2, 2]), ignore_index=5, label_smoothing=0.1, reduction="none"),
    ]
    return torch.stack([part.square().mean() for part in found]).sum()


def of_pixels(params: Params, x: Tensor) -> Tensor:
    """What is made of images."""
    h = F.linear(x, params["w"])[None, None] * torch.arange(1.0, 3.0)[None, :, None, None]  # [1 2 5 3]
    found = [
        F.pad(h, (1, 1), value=2.0).cos(),
        F.pad(h, (1, 2, 0, 0), mode="circular"),
        F.interpolate(h, scale_factor=2),
        F.interpolate(h, size=(4, 7), mode="bilinear", align_corners=True).tanh(),
        F.interpolate(h[0], 5, mode="linear"),
        F.adaptive_avg_pool2d(h, (2, None)),
        F.adaptive_avg_pool2d(h[0], 1).sin(),
        F.adaptive_max_pool2d(h, 2),
        F.adaptive_max_pool1d(h[0], 2).cos(),
        F.avg_pool1d(h[0], 2),
        F.max_pool2d(h, 2),
        F.max_pool2d(h, 2, 1, return_indices=True)[0].sin(),
        F.conv_transpose2d(h, params["v"], stride=2),
        F.group_norm(h, 2),
    ]
    return torch.stack([part.square().mean() for part in found]).sum()


@pytest.mark.parametrize(("loss_fn", "backend"), in_part([of_rows, of_pixels], traced=[of_rows, of_pixels]))
def test_number_of_graphs_of_other_functions(loss_fn: Any, backend: str) -> None:
    """Whose rules under vmap would fix the batch size: they are those of torch, and share two graphs."""
    params = {"w": torch.randn(3, 4), "v": torch.randn(2, 3, 2, 2)}
    step = compiled(functools.partial(found_gradients, loss_fn), backend)
    for size in (16, 24, 9, 33, 12, 64, 7):
        batch = torch.randn(size, 5, 4)
        losses, gradients = loop(loss_fn, params, batch)
        found, G = step(params, batch)
        close(found, losses)
        close_trees(G, gradients)
    assert graphs() <= 2


@pytest.mark.parametrize(
    "net", [nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)]
)
def test_number_of_graphs_of_a_batched_loss(net: nn.Module) -> None:
    """Of inputs with three axes, whose bias torch joins to the product by a rule that reads the batch size."""
    params = {name: p.detach() for name, p in net.double().named_parameters()}
    step = ekfac(lambda p, x: functional_call(net, p, (x,)).square().sum((1, 2)), damping=1e-2, batched=True)
    precondition, state = compiled(step.precondition), step.init(params, torch.randn(8, 5, 4))
    for size in (16, 16, 24, 9, 33):
        _, state, _ = precondition(params, torch.randn(size, 5, 4), state)
    assert graphs() <= 3


@pytest.mark.parametrize(
    "pick",
    [
        lambda h, ids: h.gather(1, ids[:, None]),
        lambda h, ids: h.index_select(0, ids),
        lambda h, ids: torch.zeros(5, 3).index_add(0, ids, h),
        lambda h, ids: torch.zeros(5, 3).scatter_add(1, ids[:, None], h[:, :1]),
    ],
)
def test_a_negative_index_does_not_count_from_the_end(pick: Any) -> None:
    """Which such functions of torch refuse."""

    def loss_fn(params: Params, example: Any) -> Tensor:
        x, ids = example
        return pick(F.linear(x, params["w"]), ids).square().sum()

    params, batch = {"w": torch.randn(3, 4)}, (torch.randn(2, 5, 4), torch.tensor([[0, 1, 2, 0, -1]] * 2))
    with pytest.raises(IndexError, match="out of bounds"):
        compiled(functools.partial(found_gradients, loss_fn))(params, batch)


def found_gradients(loss_fn: LossFn, params: Params, batch: Any) -> tuple[Tensor, Params]:
    found = per_example_gradients(loss_fn, params, batch)
    return found.losses, {name: found.dense(name) for name in params}


@pytest.mark.parametrize(
    "name", ["W3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("W1", "W2", "W4", "W5"))]
)
def test_number_of_graphs_of_the_workloads(name: str) -> None:
    """A GPT, and the others: seven batch sizes."""
    params, loss_fn = work(name, table=TINY).params, work(name, table=TINY).loss_fn
    step = ekfac(loss_fn, damping=0.1, basis_every=2)
    precondition, state = compiled(step.precondition, "eager"), None
    for size in (4, 5, 5, 6, 7, 8, 9, 10):
        batch = work(name, size, TINY).batch
        state = step.init(params, batch) if state is None else state
        _, state, _ = precondition(params, batch, state)
    assert graphs() <= 3


@pytest.mark.slow
@pytest.mark.parametrize("operators", [True, False])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_number_of_graphs_with_blocks_of_examples(
    backend: str, operators: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven batch sizes, each in four blocks, as an operator and as on a GPU."""
    if not operators:
        monkeypatch.setattr("ekfac_func.orders.opaque", lambda *tensors: False)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(2), nn.Linear(16, 5), nn.Flatten(), nn.Linear(15, 3))
    case = classifier(net, 2, 4, 4)
    few = Contractions(256 * 5 * 17 * 8 // 4, {"2.weight": Order.FORM_FIRST})
    step = ekfac(case.loss_fn, damping=1e-2, basis_every=10, contractions=few)
    precondition, state = compiled(step.precondition, backend), step.init(case.params, case.batch(8))
    for size in (16, 24, 9, 33, 12, 64, 7):
        for _ in range(12):
            before, batch = state, case.batch(size)
            natural, state, _ = precondition(case.params, batch, before)
        close_trees(natural, step.precondition(case.params, batch, before)[0], 1e-8)
    assert graphs() <= 5


def test_blocks_of_examples_hold_no_more_than_the_batch() -> None:
    """Where blocks of a nominal batch, filled up with zeros, would be most of the work."""
    params, batch = {"w": torch.randn(5, 4)}, torch.randn(3, 6, 4)
    how = Contractions(max_bytes=1, orders={"*": Order.PROJECT_BOTH})
    step = ekfac(lambda p, x: F.linear(x, p["w"]).cos().sum(), damping=0.1, contractions=how)
    state = step.init(params, batch)
    made: list[Any] = []

    def keep(graph: Any, examples: Any) -> Any:
        made.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    fast = torch.compile(step.precondition, fullgraph=True, backend=keep)
    close_trees(fast(params, batch, state)[0], step.precondition(params, batch, state)[0], 1e-8)
    assert made.count(torch.ops.ekfac_func.formed_sums.default) == 1


FAKE = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("rules", [RULES, {**RULES, **SUA}], ids=["rules", "sua"])
@pytest.mark.parametrize("name", ["conv groups", "conv depthwise", "conv stride", "conv3d", "positions"])
def test_operators_are_what_a_graph_takes_them_for(name: str, rules: Any) -> None:
    """Shapes and strides of what they return, for every order and several bases."""
    case = make(name)
    batch = case.batch(N)
    terms = capture(case.loss_fn, case.params, batch, Options(rules)).terms
    for bases in ({}, {"*": Blocks(2, 2)}, {"*": rank(2)}, {"*": DIAGONAL}):
        state = ekfac(case.loss_fn, damping=1.0, rules=rules, bases=bases).init(case.params, batch)
        for weight, (term, *_) in terms.items():
            if not isinstance(term, Factored):
                continue
            basis = state.bases[weight]
            if isinstance(term.a, Patches) and term.x is None:
                torch.library.opcheck(torch.ops.ekfac_func.patch_gram, term.a.parts(), test_utils=FAKE)
            for order, total in itertools.product(FORMED, (False, True)):
                given = sums_arguments(term, basis, Contraction(order, (), block=2, part=1))
                torch.library.opcheck(torch.ops.ekfac_func.formed_sums, (*given, total), test_utils=FAKE)


def test_operators_on_any_layout_are_what_a_graph_takes_them_for() -> None:
    """Of what is one for all examples: heads within positions, channels last, turned."""
    heads, images, logs = (
        torch.randn(2, 5, 3, 4).transpose(1, 2),
        torch.randn(2, 5, 5, 4).movedim(-1, 1),
        torch.randn(3, 6),
    )
    turned, labels = torch.rand(3, 4).mT, torch.randint(0, 3, (6,))
    calls: dict[str, tuple[Any, ...]] = {
        "attention": (heads, heads, heads, None, False, None, False),
        "conv": (images, torch.randn(6, 2, 3, 3), [1, 1], [1, 1], [1, 1], 2, None),
        "group_norm": (images, 2, 1e-5),
        "avg_pool2d": (images, [2, 2], [2, 2], [0, 0], False, True, None),
        "interpolate": (images, [3, 3], None, "bilinear", False, None, False),
        "layer_norm": (turned, [3], 1e-5),
        "binary_cross_entropy": (turned, torch.rand(4, 3)),
        "nll": (logs.mT.log_softmax(1), labels, -100),
        "cat": ([turned, turned], 1),
        "householder": (torch.randn(2, 3, 5).mT,),
        "eigenvectors": ([turned.mT[:, :3].expand(2, 3, 3).transpose(0, 1)],),
    }
    for name, given in calls.items():
        torch.library.opcheck(getattr(torch.ops.ekfac_func, name), given, test_utils=FAKE)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("conv1d", "conv3d", "conv dilation", "conv stride", "conv groups")
    ],
)
def test_convolutions_without_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a graph has their sums in full."""
    for room in ("patch_gram", "orders"):
        monkeypatch.setattr(f"ekfac_func.{room}.opaque", lambda *tensors: False)
    case = make(name)
    step = ekfac(case.loss_fn, damping=1e-2)
    precondition = compiled(step.precondition, "eager")
    for n in (N, N + 3, N + 5):
        batch = case.batch(n)
        state = step.init(case.params, batch)
        found = precondition(case.params, batch, state)
        close_trees(found[0], step.precondition(case.params, batch, state)[0], 1e-8)
    assert graphs() <= 2


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_second_model_in_one_process(backend: str) -> None:
    """Whose sizes Dynamo takes for symbols, as it has seen others in their place."""
    for name in ("linear", "conv groups"):
        case = make(name)
        step = ekfac(case.loss_fn, damping=1e-2)
        batch = case.batch(N)
        state = step.init(case.params, batch)
        found = compiled(step.precondition, backend)(case.params, batch, state)
        close_trees(found[0], step.precondition(case.params, batch, state)[0], 1e-8)


@pytest.mark.parametrize(("at_refresh", "backend"), in_part([transport, keep, reset]))
def test_number_of_graphs_at_refresh(at_refresh: Any, backend: str) -> None:
    step, params = regression_step(second_moment=running_average(0.9), basis_every=10, at_refresh=at_refresh)
    precondition, state = compiled(step.precondition, backend), step.init(params, regression(8))
    for _ in range(30):
        _, state, _ = precondition(params, regression(16), state)
    assert graphs() <= 3


@pytest.mark.parametrize(("kind", "backend"), in_part(["number", "tensor"]))
def test_a_schedule_costs_no_graph(kind: str, backend: str) -> None:
    """Nor does a number, of which AOT autograd makes a constant wherever a tensor is filled with it."""
    case = make("keywords")
    batch = case.batch(N)
    state = ekfac(case.loss_fn, damping=1.0, basis_every=10).init(case.params, batch)

    def step(params: Params, batch: Any, state: Any, damping: Any, decay: Any) -> Any:
        estimator = averaged_intra_batch(decay)
        return ekfac(case.loss_fn, damping=damping, second_moment=estimator, basis_every=10).precondition(
            params, batch, state
        )

    fast = compiled(step, backend)
    for t in range(30):
        damping, decay = 1 / (t + 1), 1 - 1 / (t + 2)
        given = (damping, decay) if kind == "number" else (torch.tensor(damping), torch.tensor(decay))
        before = state
        natural, state, info = fast(case.params, batch, state, *given)
        close(info.damping, torch.tensor(damping))
    close_trees(natural, step(case.params, batch, before, *given)[0], 1e-7)
    assert graphs() <= 3


@pytest.mark.parametrize(("name", "backend"), in_part(["positions", "conv groups", "two forms", "penalty"]))
def test_the_three_vmaps(name: str, backend: str) -> None:
    case = make(name)
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2)
    initial = step.init(case.params, batch)

    def damped(damping: Tensor) -> Any:
        natural, state, info = ekfac(case.loss_fn, damping=damping).precondition(case.params, batch, initial)
        return natural, state.factors, info  # in the null space a basis is arbitrary

    dampings = torch.tensor([1e-1, 1e-2])
    close_trees(compiled(torch.vmap(damped), backend)(dampings), torch.vmap(damped)(dampings), 1e-8)
    states = stack(*[step.precondition(case.params, b, initial)[1] for b in (batch, case.batch(N))])
    over_states = torch.vmap(lambda s: step.precondition(case.params, batch, s)[0])
    close_trees(compiled(over_states, backend)(states), over_states(states), 1e-8)
    params = stack(case.params, {n: 1.1 * p for n, p in case.params.items()})
    over_ensemble = torch.vmap(lambda p, s: step.precondition(p, batch, s)[0])
    close_trees(compiled(over_ensemble, backend)(params, states), over_ensemble(params, states), 1e-8)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_layer_that_some_batches_do_not_use_is_refused(biased: bool, first: bool) -> None:
    """Without a bias too, where its statistics have the shapes of those of a parameter without a rule."""
    used = [first]

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        h = F.linear(x, params["body"])
        return h.cos().sum() + (F.linear(h, params["w"], params.get("b")).sin().sum() if used[0] else 0.0)

    params, batch = {"body": torch.randn(4, 5), "w": torch.randn(3, 4)}, torch.randn(N, 5)
    params |= {"b": torch.randn(3)} if biased else {}
    step = ekfac(loss_fn, damping=0.1, second_moment=averaged_intra_batch(0.9))
    fast = compiled(step.precondition, "eager")
    _, state, _ = fast(params, batch, step.init(params, batch))
    used[0] = not first
    with pytest.raises(Exception, match=r"use[s]? the layer 'w', which it (used|did not use).*takes it in eager"):
        fast(params, batch, state)


@pytest.mark.parametrize("groups", [1, 2])
def test_an_ensemble_that_convolves_a_constant(groups: int) -> None:
    """Then an example has nothing of its own in the call, and a member its kernel alone."""
    image = torch.randn(1, 4, 6)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        y = F.conv1d(image, params["w"], groups=groups) + F.conv_transpose1d(image, params["w"], groups=groups).mean()
        return (y * x).square().sum()

    batch = torch.randn(N, 4, 4)
    dense = torch.vmap(lambda p: found_gradients(loss_fn, p, batch)[1])
    params = {"w": torch.randn(3, 4, 4 // groups, 3)}
    close_trees(compiled(dense, "eager")(params), dense(params))


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_every_kind_of_loss_inside_a_compiled_step(backend: str) -> None:
    case = make("keywords")
    batch = case.batch(N)
    state = ekfac(case.loss_fn, damping=1.0).init(case.params, batch)

    class Loss(nn.Module):
        def forward(self, params: Params, example: Any) -> Tensor:
            return case.loss_fn(params, example)

    def scaled(scale: float, params: Params, example: Any) -> Tensor:
        return scale * case.loss_fn(params, example)

    expected = ekfac(case.loss_fn, damping=1e-2).precondition(case.params, batch, state)[0]
    module = Loss()
    losses: tuple[LossFn, ...] = (
        module,
        module.forward,
        functools.partial(scaled, 1.0),
        lambda p, e: case.loss_fn(p, e),
    )
    for loss_fn, inside in zip(losses, (True, False, True, False), strict=True):
        if loss_fn in losses[:2] and torch.__version__ < "2.12":  # for whose Dynamo no module is a constant
            continue

        def step(params: Params, batch: Any, state: Any, loss_fn: Any = loss_fn) -> Any:
            return ekfac(loss_fn, damping=1e-2).precondition(params, batch, state)

        made = step if inside else ekfac(loss_fn, damping=1e-2).precondition
        close_trees(compiled(made, backend)(case.params, batch, state)[0], expected, 1e-8)


def test_per_example_gradients_compile() -> None:
    case = make("conv groups")
    batch = case.batch(N)

    def norms(params: Params, batch: Any) -> Any:
        found = per_example_gradients(case.loss_fn, params, batch)
        return found.norms(), found.dense("0.weight"), found.mean()

    close_trees(compiled(norms)(case.params, batch), norms(case.params, batch))


def test_methods_of_a_tensor_and_places_by_a_label() -> None:
    """`unflatten` is a method of Python; a label, a list behind a slice and a mask are where something is written."""

    def loss_fn(params: Params, example: Any) -> Tensor:
        x, y = example
        h, t = F.linear(x, params["w"]), torch.zeros(2, 4)
        t[0, y] = 1.0
        if torch.__version__ < "2.14":  # whose Dynamo does not show writing to a mode
            t[:, x.argsort()] = h.unflatten(-1, (2, 2)).repeat(1, 2)
            t[t > 1] = 0.5
        return (h * t).square().sum()

    params, batch = {"w": torch.randn(4, 4)}, (torch.randn(N, 4), torch.randint(0, 4, (N,)))

    def dense(params: Params, batch: Any) -> Tensor:
        return per_example_gradients(loss_fn, params, batch).dense("w")

    close(compiled(dense, "eager")(params, batch), loop(loss_fn, params, batch)[1]["w"])


def test_a_loop_over_the_examples_is_no_graph() -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"])[x > 0].square().sum()

    params, batch = {"w": torch.randn(4, 4)}, torch.randn(N, 4)
    with pytest.raises(Exception, match=r"one example after another, which a graph cannot: describe says"):
        compiled(lambda *given: per_example_gradients(loss_fn, *given).dense("w"), "eager")(params, batch)


@pytest.mark.slow
def test_a_step_compiled_in_parts() -> None:
    """Where the loss branches on values Dynamo leaves the step to run as it is."""
    params, batch = {"w": torch.randn(3, 4)}, torch.randn(N, 4)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        h = F.linear(x, params["w"])
        return (h if h.sum() > 0 else 2 * h).sin().sum()

    step = ekfac(loss_fn, damping=1.0)
    state = step.init(params, batch)
    found = torch.compile(step.precondition, backend="eager")(params, batch, state)
    close_trees(found[0], step.precondition(params, batch, state)[0], 1e-8)


def test_a_skipped_step() -> None:
    step, params = regression_step()
    x, y = regression(N)
    fast = compiled(step.precondition, "eager")
    _, state, _ = fast(params, (x, y), step.init(params, (x, y)))
    x[1] = torch.nan
    natural, new, info = fast(params, (x, y), state)
    assert info.skipped
    assert all(p.abs().max() == 0 for p in natural.values())
    for old, kept in zip(pytree.tree_leaves(state), pytree.tree_leaves(new), strict=True):
        assert torch.equal(old, kept)


def test_a_place_in_memory_is_counted_from_its_start() -> None:
    """In graphs, where Dynamo does not tell where a view starts, it is refused."""

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return (x * params["v"][1:].as_strided((3,), (2,), 5)).sin().sum()

    params, batch = {"v": torch.randn(4, 4)}, torch.randn(N, 3)
    found = per_example_gradients(loss_fn, params, batch)
    for n, x in enumerate(batch):
        v = params["v"].clone().requires_grad_()
        torch.testing.assert_close(found.dense("v")[n], torch.autograd.grad(loss_fn({"v": v}, x), v)[0])
    with pytest.raises(Exception, match=r"storage_offset=5 in a compiled step.*x\[1:\]"):
        compiled(lambda *given: per_example_gradients(loss_fn, *given).dense("v"), "eager")(params, batch)


def test_a_picked_matrix_that_is_turned_out_of_sight() -> None:
    """Dynamo does not show `.mT`: the ids are those that picked the weight, where it was picked once."""

    def loss_fn(params: Params, example: Any, both: bool = False) -> Tensor:
        x, y = example
        h = x @ params["w"][y].mT
        return (h @ params["w"][1 - y].mT if both else h).sin().sum()

    params, batch = {"w": torch.randn(2, 4, 4)}, (torch.randn(N, 3, 4), torch.randint(0, 2, (N,)))

    def dense(loss_fn: LossFn, batch: Any) -> Tensor:
        return per_example_gradients(loss_fn, params, batch).dense("w")

    twice = functools.partial(loss_fn, both=True)
    for each in (loss_fn, twice):
        close(dense(each, batch), loop(each, params, batch)[1]["w"])
    close(compiled(functools.partial(dense, loss_fn), "eager")(batch), dense(loss_fn, batch))
    with pytest.raises(Exception, match=r"of a call of 'w'.*write w\[ids\]\.transpose\(-2, -1\)"):
        compiled(functools.partial(dense, twice), "eager")(batch)
