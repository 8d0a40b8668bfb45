"""On a CUDA device: the same numbers, no host round trip, graphs of inductor and of CUDA, the kernel. Else skipped.

pytest -n 6 tests/test_cuda.py
"""

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from benchmarks.workloads import TINY, TINY_ON_GPU, Work, work
from ekfac_func import (
    Contractions,
    EKFACOptimizer,
    adaptive,
    averaged_intra_batch,
    blocks,
    compact,
    eigh,
    ekfac,
    empirical,
    intra_batch,
    kernels,
    per_example_gradients,
    qr,
    rank,
    running_average,
    sampled,
    thin,
)
from ekfac_func.__main__ import main
from ekfac_func.optim import apply_updates, chain, clip_kl, learning_rate, metrics, momentum, relative, weight_decay
from ekfac_func.orders import Order

from .cases import Case, N, classifier, every_case, made_on, make
from .oracles import close, close_trees, same_bits
from .test_kernels import SIZES

DEVICE = os.environ.get("EKFAC_FUNC_TEST_DEVICE", "cuda")  # another one tries the logic of most of these tests
pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]
real = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
WORKS = {name: table for table in (TINY, TINY_ON_GPU) for name in table}


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Matrix products of float32 as exact as on a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    torch.set_float32_matmul_precision("highest")


def tiny(name: str, n: int | None = None) -> Work:
    torch.set_default_dtype(torch.float32)
    return work(name, n, table=WORKS[name], device=DEVICE)


@contextlib.contextmanager
def no_host_reads() -> Iterator[None]:
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def clone(tree: Any) -> Any:
    return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, tree)


SETTINGS: dict[str, dict[str, Any]] = {
    "intra_batch": {},
    "averaged": {"second_moment": averaged_intra_batch(0.9), "factor_decay": 0.9},
    "running": {"second_moment": running_average(0.9)},
    "chunks": {"chunk_size": 2},
    "compact": {"bases": {"*": compact(1024)}},
    "rank": {"bases": {"*": rank(3)}},
}


@real
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", WORKS)
def test_a_step_without_a_refresh_never_waits(name: str, setting: str) -> None:
    w = tiny(name)
    step = ekfac(w.loss_fn, damping=1e-2, basis_every=100, **SETTINGS[setting])
    _, state, _ = step.precondition(w.params, w.batch, step.init(w.params, w.batch))
    step.precondition(w.params, w.batch, state)
    with no_host_reads():
        natural, state, info = step.precondition(w.params, w.batch, state)
        metrics(natural, info, state)


def training(w: Work, **settings: Any) -> tuple[Any, Any]:
    """A training step of params, optimizer and state, and where it starts."""
    method = ekfac(w.loss_fn, damping=1e-1, **settings)
    optimizer = chain(clip_kl(1e-2, 0.1), momentum(0.9), weight_decay(1e-4), learning_rate(0.1))

    def step(params: Any, opt_state: Any, state: Any, batch: Any) -> Any:
        natural, state, info = method.precondition(params, batch, state)
        updates, opt_state = optimizer.update(natural, opt_state, params, info)
        return apply_updates(params, updates), opt_state, state, metrics(natural, info, state)

    return step, (w.params, optimizer.init(w.params), method.init(w.params, w.batch))


@real
def test_a_training_step_never_waits() -> None:
    step, carried = training(w := tiny("W2"), basis_every=100)
    for _ in range(2):
        *carried, _ = step(*carried, w.batch)
    with no_host_reads():
        step(*carried, w.batch)


GRAPHS = [
    ("W1", None, {"basis_every": 3}),
    ("W2", None, {"basis_every": 3}),
    ("W3", None, {"basis_every": 3}),
    ("W2", "reduce-overhead", {"basis_every": 100}),
    ("W3", "reduce-overhead", {"basis_every": 100}),
    ("W1", "reduce-overhead", {"basis_every": 2, "refresh": qr(1)}),
    ("W2", "reduce-overhead", {"basis_every": 2, "refresh": qr(1)}),
]


@pytest.mark.parametrize(("name", "mode", "settings"), GRAPHS)
def test_a_compiled_training_step(name: str, mode: str | None, settings: Any) -> None:
    """With inductor, and with CUDA graphs where a step neither solves eigenproblems nor is the first."""
    w = tiny(name, 64)
    eager, start = training(w, **settings)
    carried = eager(*start, w.batch)[:3]
    fast = torch.compile(eager, fullgraph=True, mode=mode)
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        found, expected = clone(fast(*carried, w.batch)), eager(*carried, w.batch)
        close_trees(found[3]["loss"], expected[3]["loss"], 1e-4)
        moved = [{key: p - carried[0][key] for key, p in new.items()} for new in (found[0], expected[0])]
        close_trees(moved[0], moved[1], 1e-2)
        carried = found[:3]


@real
def test_cuda_graphs_are_really_taken() -> None:
    from torch._dynamo.utils import counters

    w = tiny("W2")
    eager, start = training(w, basis_every=2, refresh=qr(1))
    carried = eager(*start, w.batch)[:3]
    fast = torch.compile(eager, fullgraph=True, mode="reduce-overhead")
    counters.clear()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        carried = clone(fast(*carried, w.batch))[:3]
    assert counters["inductor"]["cudagraph_skips"] == 0


@real
def test_an_eager_step_inside_a_cuda_graph() -> None:
    w = tiny("W2")
    step = ekfac(w.loss_fn, damping=1e-2, basis_every=100)
    _, state, _ = step.precondition(w.params, w.batch, step.init(w.params, w.batch))
    expected, _, _ = step.precondition(w.params, w.batch, state)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step.precondition(w.params, w.batch, state)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        natural, _, _ = step.precondition(w.params, w.batch, state)
    graph.replay()
    close_trees(natural, expected, 1e-4)


LARGER = [(300, 1, 8, 6, 6, 1), (2, 3, 49, 130, 140, 1), (16, 1, 196, 256, 600, 1), (4, 1, 1024, 300, 129, 1)]
BOUNDS = {"highest": 1e-5, "high": 3e-3, "bfloat16": 3e-6}  # of bfloat16 against itself


@real
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("sizes", [*SIZES, *LARGER])
def test_the_kernel_equals_the_reference(sizes: tuple[int, ...], precision: str) -> None:
    n, b, s, o, i, k = sizes
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    h, x = (torch.randn(n, b, s, *rest, device=DEVICE).to(dtype) for rest in ((o,), (i, k)))
    if precision == "high":
        torch.set_float32_matmul_precision("high")
    exact = kernels.reference(h.double(), x.double())
    turned = h.mT.contiguous().mT
    for of_h in (h, turned):
        for found, expected in zip(kernels.projected_sums(of_h, x), exact, strict=True):
            assert torch.isfinite(found).all()
            assert (found - expected).abs().max() <= BOUNDS[precision] * expected.abs().max()
    same_bits(kernels.projected_sums(h, x), kernels.projected_sums(h, x))


@real
def test_the_kernel_passes_on_what_is_not_finite() -> None:
    h, x = torch.randn(3, 1, 20, 9, device=DEVICE).float(), torch.randn(3, 1, 20, 8, 1, device=DEVICE).float()
    for bad in (torch.nan, torch.inf):
        h[1, 0, 3, 4] = bad
        total, square = kernels.projected_sums(h, x)
        assert not torch.isfinite(total[0, 4]).any()
        assert not torch.isfinite(square[0, 4]).any()
        assert torch.isfinite(total[0, 5]).all()


@real
def test_the_kernel_under_vmap_and_in_a_graph() -> None:
    h, x = torch.randn(3, 2, 20, 9, device=DEVICE).float(), torch.randn(3, 2, 20, 8, 1, device=DEVICE).float()
    alone = kernels.projected_sums(h, x)
    found = vmap(torch.ops.ekfac_func.projected_sums, (2, None))(torch.stack([h, 2 * h], 2), x)
    for at, (of_all, of_one) in enumerate(zip(found, alone, strict=True)):
        close(of_all[0], of_one, 1e-5)
        close(of_all[1], 2 ** (at + 1) * of_one, 1e-5)
    close_trees(torch.compile(kernels.projected_sums, fullgraph=True)(h, x), alone, 1e-5)


@real
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_with_the_kernel_equals_one_without(compiled: bool) -> None:
    net = nn.Sequential(nn.Linear(40, 70), nn.Tanh(), nn.Linear(70, 33)).float().to(DEVICE)
    params = {name: p.detach() for name, p in net.named_parameters()}
    batch = torch.randn(9, 24, 40, device=DEVICE).float()

    def loss_fn(params: Any, x: Tensor) -> Tensor:
        return functional_call(net, params, (x,)).cos().sum()

    found: list[Any] = []
    for order in (Order.KERNEL, Order.PROJECT_BOTH):
        how = Contractions(orders={"*": order})
        step = ekfac(loss_fn, damping=1e-1, basis_every=10, contractions=how)
        state = found[0][1] if found else step.precondition(params, batch, step.init(params, batch))[1]
        call = torch.compile(step.precondition, fullgraph=True) if compiled else step.precondition
        found.append((call(params, batch, state), state))
    (natural, new, _), (other, other_new, _) = found[0][0], found[1][0]
    close_trees(natural, other, 1e-4)
    close_trees(new.second_moments, other_new.second_moments, 1e-4)


REFRESHES = {"eigh": eigh(), "eigh float32": eigh(torch.float32), "qr": qr(20)}
LEFT = {"eigh": 1e-8, "eigh float32": 1e-3, "qr": 0.2}  # beside the diagonal, of the norm


@pytest.mark.parametrize("refresh", REFRESHES)
@pytest.mark.parametrize("name", ["mlp", "conv groups", "tied padded", "products", "attention self"])
def test_refreshes_diagonalise(name: str, refresh: str) -> None:
    """Of averaged factors of many examples: bases of orthonormal vectors that leave nothing beside the diagonal."""
    case = pair(name)[1]
    step = ekfac(case.loss_fn, damping=1e-2, refresh=REFRESHES[refresh], factor_decay=0.5)
    state = step.init(case.params, case.batch(64))
    for _ in range(3):
        _, state, info = step.precondition(case.params, case.batch(64), state)
    assert not info.skipped
    for weight, basis in state.bases.items():
        for Q, C in zip(basis, state.factors[weight][:2], strict=True):
            one = torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype).expand_as(Q.mT @ Q)
            close(Q.mT @ Q, one, 1e-4)
            if Q.shape[-1] > 1:
                D = Q.mT @ C.reshape(Q.shape[:-2] + C.shape[-2:]) @ Q
                rest = D - torch.diag_embed(D.diagonal(dim1=-2, dim2=-1))
                assert rest.norm() <= LEFT[refresh] * D.norm()


@pytest.mark.parametrize("choice", [thin, compact(N), rank(4)])
def test_bases_of_some_columns(choice: Any) -> None:
    """The natural gradient of those that span all samples is that of a full basis."""
    with torch.device(DEVICE):
        case = classifier(nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)), 40)
        batch = case.batch(N)
    natural = {}
    for bases in ({}, {"*": choice}):
        step = ekfac(case.loss_fn, damping=1e-2, bases=bases, refresh=qr(30) if choice == rank(4) else eigh())
        natural[len(bases)], _, info = step.precondition(case.params, batch, step.init(case.params, batch))
        assert not info.skipped
    if choice != rank(4):
        close_trees(natural[1], natural[0], 1e-7)


@pytest.mark.parametrize("kind", ["dropout", "sampled"])
def test_a_second_pass_draws_the_same(kind: str) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)).to(DEVICE)
    params = {name: p.detach() for name, p in net.named_parameters()}
    batch = torch.randn(9, 6, device=DEVICE), torch.randint(0, 3, (9,), device=DEVICE)

    def loss_fn(params: Any, example: Any) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (example[0],)), example[1])

    model = lambda params, example: functional_call(net, params, (example[0],))  # noqa: E731
    fisher = empirical if kind == "dropout" else sampled(model, lambda y: torch.distributions.Categorical(logits=y))
    found = []
    for how in (Contractions(), Contractions(max_bytes=1)):
        torch.manual_seed(0)
        step = ekfac(loss_fn, damping=1e-2, chunk_size=4, contractions=how, fisher=fisher)
        found.append((step.precondition(params, batch, step.init(params, batch)), torch.rand(3, device=DEVICE)))
    close_trees(found[0], found[1], 1e-9)


def test_autocast() -> None:
    w = tiny("W2", 16)
    step = ekfac(w.loss_fn, damping=1e-1)
    expected, _, _ = step.precondition(w.params, w.batch, step.init(w.params, w.batch))
    with torch.autocast(DEVICE, torch.bfloat16):
        natural, state, info = step.precondition(w.params, w.batch, step.init(w.params, w.batch))
    assert not info.skipped
    assert {leaf.dtype for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)} == {torch.float32}
    flat = [torch.cat([p.flatten() for p in tree.values()]) for tree in (natural, expected)]
    assert F.cosine_similarity(flat[0], flat[1], dim=0) > 0.9


def test_the_drop_in_optimizer() -> None:
    w = tiny("W2", 32)
    net = copy.deepcopy(w.net)
    optimizer = EKFACOptimizer(net, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), lr=0.1, damping=0.3)
    losses = [float(optimizer.step(w.batch)) for _ in range(12)]
    assert losses[-1] < losses[0]


def test_the_train_command(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    torch.set_default_dtype(torch.float32)
    main(["train", "--model", "mlp", "--steps", "6", "--device", DEVICE, "--out", str(tmp_path)])


@real
@pytest.mark.parametrize("estimator", [intra_batch, averaged_intra_batch(0.9)], ids=lambda e: e.name)
def test_memory_does_not_grow_with_the_batch(estimator: Any) -> None:
    net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(12))).float().to(DEVICE)
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss_fn(params: Any, x: Tensor) -> Tensor:
        return functional_call(net, params, (x,)).square().mean()

    peaks = []
    for n in (64, 512):
        batch = torch.randn(n, 256, 32, device=DEVICE).float()
        how = Contractions(max_bytes=2**20)
        step = ekfac(loss_fn, damping=1e-2, chunk_size=16, contractions=how, second_moment=estimator)
        state = step.init(params, batch)
        step.precondition(params, batch, state)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.precondition(params, batch, state)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 1.2 * peaks[0]


def moved(tree: Any) -> Any:
    made: dict[Tensor, Tensor] = {}  # what is one tensor stays one
    return pytree.tree_map_only(Tensor, lambda t: made.setdefault(t, t.to(DEVICE)), tree)


def pair(name: str) -> tuple[Case, Case]:
    """A case on the CPU and the same values on the device, of a module that the loss closes over too."""
    case, twin = make(name), make(name)
    for cell in getattr(twin.loss_fn, "__closure__", None) or ():
        if isinstance(cell.cell_contents, nn.Module):
            cell.cell_contents.to(DEVICE)

    return case, Case(made_on(DEVICE, twin.loss_fn), moved(twin.params), lambda n: moved(case.batch(n)), twin.ruled)


@every_case
def test_gradients_are_those_of_the_cpu(name: str) -> None:
    case, twin = pair(name)
    batch = case.batch(N)
    expected = per_example_gradients(case.loss_fn, case.params, batch)
    found = per_example_gradients(twin.loss_fn, twin.params, moved(batch))
    close(found.losses.cpu(), expected.losses)
    for p in case.params:
        assert found.dense(p).device.type == torch.device(DEVICE).type
        close(found.dense(p).cpu(), expected.dense(p))


def test_ids_and_a_number_of_the_cpu() -> None:
    """As torch takes them beside tensors of a device."""
    ids, two = torch.tensor([0, 2, 1]), torch.tensor(2.0)

    def loss(params: dict[str, Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
        x, y = example
        scale = x.new_zeros(4)
        scale[y] = two
        h = torch.einsum("i,bij->bj", x, params["experts"][ids]) + params["positions"][ids]
        return (h.cos() * scale).sum()

    params = {"experts": torch.randn(3, 4, 4), "positions": torch.randn(5, 4)}
    batch = torch.randn(6, 4), torch.randint(0, 4, (6,))
    expected = per_example_gradients(loss, params, batch)
    found = per_example_gradients(loss, moved(params), moved(batch))
    for name in params:
        close(found.dense(name).cpu(), expected.dense(name))


@pytest.mark.parametrize("name", ["W1", "W2"])
def test_a_check_of_the_capture_allows_for_tf32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    w = tiny(name, 4)
    ekfac(w.loss_fn, damping=1.0).init(w.params, w.batch, check=True)


@every_case
@pytest.mark.parametrize("setting", ["intra_batch", "averaged", "chunks"])
def test_a_step_is_that_of_the_cpu(name: str, setting: str) -> None:
    """From a state that the CPU made, in its basis: nothing in it is arbitrary."""
    case, twin = pair(name)
    settings: dict[str, Any] = {"damping": 1e-2, "basis_every": 10, **SETTINGS[setting]}
    here, there = (ekfac(of.loss_fn, **settings) for of in (case, twin))
    first, batch = case.batch(N), case.batch(N)
    _, state, _ = here.precondition(case.params, first, here.init(case.params, first))
    natural, new, info = here.precondition(case.params, batch, state)
    found, other, report = there.precondition(twin.params, moved(batch), moved(state))
    devices = {t.device.type for t in pytree.tree_leaves((found, other, report)) if isinstance(t, Tensor)}
    assert devices == {torch.device(DEVICE).type}
    on_cpu = pytree.tree_map_only(Tensor, Tensor.cpu, (found, other.second_moments, report))
    close_trees(on_cpu, (natural, new.second_moments, info), 1e-9)


CHOICES: dict[str, dict[str, Any]] = {
    "full": {},
    "blocks": {"*": blocks(3)},
    "rank": {"*": rank(2)},
}


@pytest.mark.parametrize("refresh", [eigh(), qr(3), adaptive(0.1)], ids=lambda how: how.name)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ["linear", "conv", "conv groups", "ids", "tied padded"])
def test_every_refresh_of_every_basis(name: str, choice: str, refresh: Any) -> None:
    """Of averaged factors of full rank: finite, and what the CPU finds."""
    case, twin = pair(name)
    settings: dict[str, Any] = {"damping": 1e-1, "bases": CHOICES[choice], "refresh": refresh, "factor_decay": 0.5}
    batches = [case.batch(64) for _ in range(2)]
    found = []
    for of, move in ((case, lambda tree: tree), (twin, moved)):
        step = ekfac(of.loss_fn, **settings)
        state = step.init(of.params, move(batches[0]))
        for batch in batches:
            natural, state, info = step.precondition(of.params, move(batch), state)
        assert not info.skipped
        assert info.kept_bases == 0
        assert all(torch.isfinite(leaf).all() for leaf in pytree.tree_leaves((natural, state)) if torch.is_tensor(leaf))
        found.append({key: p.cpu() for key, p in natural.items()})
    close_trees(found[1], found[0], 0.1 if refresh.name.startswith("qr") else 1e-5)  # which has not converged


def categorical(logits: Tensor) -> Any:
    return torch.distributions.Categorical(logits=logits)


WAITS: dict[str, Any] = {
    "relative damping": lambda model: {"damping": relative(0.1)},
    "sampled": lambda model: {"fisher": sampled(model, categorical)},
    "second passes": lambda model: {"chunk_size": 2, "contractions": Contractions(max_bytes=1)},
    "moment_every": lambda model: {"moment_every": 3},
}


@real
@pytest.mark.parametrize("setting", WAITS)
def test_a_step_of_other_settings_never_waits(setting: str) -> None:
    w = tiny("W1")
    model = lambda params, example: functional_call(w.net, params, (example[0],))  # noqa: E731
    settings = {"damping": 1e-2, "basis_every": 100, **WAITS[setting](model)}
    step = ekfac(w.loss_fn, **settings)
    state = step.init(w.params, w.batch)
    for _ in range(2):
        _, state, _ = step.precondition(w.params, w.batch, state)
    with no_host_reads():
        natural, state, info = step.precondition(w.params, w.batch, state)
        metrics(natural, info, state)


@real
@pytest.mark.parametrize("damping", [0.3, None], ids=["number", "default"])
def test_the_drop_in_optimizer_never_waits(damping: float | None) -> None:
    w = tiny("W1")
    net = copy.deepcopy(w.net)
    loss = lambda net, batch: F.cross_entropy(net(batch[0]), batch[1])  # noqa: E731
    optimizer = EKFACOptimizer(net, loss, damping=damping, basis_every=100)
    for _ in range(2):
        optimizer.step(w.batch)
    with no_host_reads():
        optimizer.step(w.batch)
