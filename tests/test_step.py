"""The step as a whole: pure, skipping what is not finite, resumable, under vmap, and without a host round trip."""

import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ekfac_func import (
    EKFAC,
    Contractions,
    Order,
    Ranks,
    Refresh,
    SecondMoment,
    State,
    averaged_intra_batch,
    eigh,
    ekfac,
    intra_batch,
    kfac,
    per_example_gradients,
    qr,
    rank,
    running_average,
    thin,
)
from ekfac_func.types import Params

from .cases import LOOPED, Case, N, classifier, every_batched_case, every_case, make
from .oracles import close, close_trees, loop, same_bits, stack
from .watching import Largest, NoHostRead

ESTIMATORS = pytest.mark.parametrize(
    "estimator", [intra_batch, averaged_intra_batch(0.9), running_average(0.9), kfac], ids=lambda e: e.name
)


def clone(tree: Any) -> Any:
    return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, tree)


@every_case
def test_pure_and_repeatable(name: str) -> None:
    case = make(name)
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2)
    _, state, _ = step.precondition(case.params, batch, step.init(case.params, batch))
    arguments = (case.params, batch, state)
    before = clone(arguments)
    first, second = step.precondition(*arguments), step.precondition(*arguments)
    same_bits(arguments, before)
    same_bits(first, second)
    assert first[1].step == 2


def test_no_derivative_goes_through_a_step_in_any_mode() -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"]).cos().sum()

    def natural(params: Params, batch: Tensor, state: State, damping: Tensor) -> Params:
        return ekfac(loss_fn, damping=damping).precondition(params, batch, state)[0]

    params, batch = {"w": torch.randn(3, 4)}, torch.randn(N, 4)
    arguments = params, batch, ekfac(loss_fn, damping=0.1).init(params, batch), torch.tensor(0.1)
    tangents = pytree.tree_map_only(Tensor, torch.ones_like, arguments)
    primal, tangent, *_ = torch.func.jvp(natural, arguments, tangents)
    assert not tangent["w"].any()
    close_trees(primal, natural(*arguments))
    assert not torch.func.jacrev(natural, argnums=3)(*arguments)["w"].any()

    def of_exponent(exponent: Tensor) -> Tensor:
        step = ekfac(loss_fn, damping=0.1, exponent=exponent)
        return step.precondition(params, batch, arguments[2])[0]["w"]

    assert not torch.func.jvp(of_exponent, (torch.tensor(-0.5),), (torch.tensor(1.0),))[1].any()


def test_init_reads_shapes_alone() -> None:
    case = make("conv")
    x, y = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2)
    state = step.init(case.params, (x * torch.nan, y))
    same_bits(state, step.init(case.params, (x, y)))
    assert state.step == 0
    for name, basis in state.bases.items():
        close(basis.Q_A, torch.eye(basis.Q_A.shape[-1]).expand_as(basis.Q_A))
        assert state.second_moments[name].value.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)).to(dtype)
    params = dict(net.named_parameters())

    def loss_fn(params: Params, example: Any) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (example[0][None],)), example[1][None])

    batch = torch.randn(N, 2, 4, 4, dtype=dtype), torch.randint(0, 3, (N,))
    for estimator in (intra_batch, averaged_intra_batch(0.9), running_average(0.9), kfac):
        step = ekfac(loss_fn, damping=1e-2, second_moment=estimator, factor_decay=0.9)
        state = step.init(params, batch)
        for _ in range(2):
            natural, state, info = step.precondition(params, batch, state)
        for leaf in (*natural.values(), *pytree.tree_leaves(state), info.loss, *info.gradient.values()):
            assert leaf.dtype == dtype
            assert not leaf.requires_grad


BAD = pytest.mark.parametrize("bad", ["nan example", "infinite example", "nan loss"])


def poisoned(case: Case, batch: Any, bad: str) -> tuple[Any, Any]:
    """A loss and a batch of which one example is not finite."""
    x, y = clone(batch)
    if bad == "nan loss":
        x[2] = 77.0

        def loss_fn(params: Params, example: Any) -> Tensor:
            loss = case.loss_fn(params, example)
            return torch.where((example[0] == 77).all(), torch.nan, loss)

        return loss_fn, (x, y)
    x[2] = torch.nan if bad == "nan example" else torch.inf
    return case.loss_fn, (x, y)


@BAD
@ESTIMATORS
@pytest.mark.parametrize("refreshing", [True, False], ids=["refresh", "between"])
def test_a_batch_that_is_not_finite_is_skipped(bad: str, estimator: SecondMoment, refreshing: bool) -> None:
    case = make("conv groups")
    batch = case.batch(N)
    loss_fn, bad_batch = poisoned(case, batch, bad)
    step = ekfac(loss_fn, damping=1e-2, second_moment=estimator, basis_every=1 if refreshing else 10)
    _, state, info = step.precondition(case.params, batch, step.init(case.params, batch))
    assert not info.skipped
    natural, new, info = step.precondition(case.params, bad_batch, state)
    assert info.skipped
    assert new.step == state.step + 1
    same_bits(pytree.tree_leaves(new), pytree.tree_leaves(state))
    assert all(p.abs().max() == 0 for p in natural.values())
    natural, _, info = step.precondition(case.params, batch, new)
    assert not info.skipped
    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for p in natural.values())


@ESTIMATORS
def test_a_first_batch_that_is_not_finite(estimator: SecondMoment) -> None:
    """Until the next refresh the basis is the identity; without an estimate of the moment steps are skipped."""
    case = make("mlp")
    batch = case.batch(N)
    _, bad_batch = poisoned(case, batch, "nan example")
    step = ekfac(case.loss_fn, damping=1e-2, second_moment=estimator, basis_every=3)
    _, state, _ = step.precondition(case.params, bad_batch, step.init(case.params, batch))
    natural, state, info = step.precondition(case.params, batch, state)
    assert info.skipped == (estimator is kfac)
    for name, basis in state.bases.items():
        close(basis.Q_A[0], torch.eye(basis.Q_A.shape[-1]))
        moved = natural[name].abs().max() > 0
        assert moved != (estimator is kfac)
    _, state, _ = step.precondition(case.params, batch, state)
    natural, state, info = step.precondition(case.params, batch, state)
    assert not info.skipped
    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for p in natural.values())


@ESTIMATORS
def test_a_first_batch_that_is_not_finite_between_updates(estimator: SecondMoment) -> None:
    """No step before the next update of the moment has one to rescale with."""
    case = make("mlp")
    batch = case.batch(N)
    _, bad_batch = poisoned(case, batch, "nan example")
    step = ekfac(case.loss_fn, damping=1e-2, second_moment=estimator, basis_every=6, moment_every=3)
    _, state, _ = step.precondition(case.params, bad_batch, step.init(case.params, batch))
    skipped = []
    for _ in range(6):
        natural, state, info = step.precondition(case.params, batch, state)
        assert info.skipped != any(p.abs().max() > 0 for p in natural.values())
        skipped.append(bool(info.skipped))
    assert skipped == [True, True, estimator is kfac, estimator is kfac, estimator is kfac, False]


def run(step: EKFAC, case: Case, state: State, params: Params, batches: list[Any]) -> tuple[Params, State]:
    for batch in batches:
        natural, state, _ = step.precondition(params, batch, state)
        params = {name: p - 0.05 * natural[name] for name, p in params.items()}
    return params, state


@ESTIMATORS
def test_a_resumed_run_has_the_same_bits(estimator: SecondMoment) -> None:
    case = classifier(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)), 4)
    batches = [case.batch(20) for _ in range(6)]
    step = ekfac(case.loss_fn, damping=1e-2, second_moment=estimator, basis_every=4)
    torch.manual_seed(1)
    straight = run(step, case, step.init(case.params, batches[0]), case.params, batches)
    torch.manual_seed(1)
    params, state = run(step, case, step.init(case.params, batches[0]), case.params, batches[:3])
    file = io.BytesIO()
    torch.save({"params": params, "state": state, "random": torch.get_rng_state()}, file)
    file.seek(0)
    torch.manual_seed(2)
    saved = torch.load(file, weights_only=True)
    assert isinstance(saved["state"], State)
    torch.set_rng_state(saved["random"])
    again = ekfac(case.loss_fn, damping=1e-2, second_moment=estimator, basis_every=4)
    same_bits(run(again, case, saved["state"], saved["params"], batches[3:]), straight)


@every_case
def test_every_state_survives_a_checkpoint(name: str) -> None:
    case = make(name)
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2)
    _, state, _ = step.precondition(case.params, batch, step.init(case.params, batch))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded.step == state.step
    same_bits(loaded, state)


def test_a_loaded_state_needs_no_init(tmp_path: Any) -> None:
    """In a process that has seen no other step."""
    program = """
import torch, ekfac_func, sys
import torch.nn.functional as F
torch.set_default_dtype(torch.float64)
loss_fn = lambda params, x: F.linear(x, params["w"], params["b"]).cos().sum()
step = ekfac_func.ekfac(loss_fn, damping=1e-2, basis_every=2)
*arguments, expected = torch.load(sys.argv[1], weights_only=True)
natural, state, _ = step.precondition(*arguments)
assert state.step == 2 and all(torch.equal(natural[k], expected[k]) for k in expected)
"""
    params, batch = {"w": torch.randn(3, 4), "b": torch.randn(3)}, torch.randn(8, 4)
    step = ekfac(lambda p, x: F.linear(x, p["w"], p["b"]).cos().sum(), damping=1e-2, basis_every=2)
    _, state, _ = step.precondition(params, batch, step.init(params, batch))
    path = tmp_path / "state.pt"
    torch.save((params, batch, state, step.precondition(params, batch, state)[0]), path)
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=120)


def at(tree: Any, k: int) -> Any:
    return pytree.tree_map(lambda t: t[k], tree)


@every_batched_case
def test_the_three_vmaps(name: str) -> None:
    """Over damping, over stacked states, and over an ensemble of stacked params and states."""
    case = make(name)
    batch, other = case.batch(N), case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2)
    initial = step.init(case.params, batch)

    def damped(damping: Tensor) -> Any:
        return ekfac(case.loss_fn, damping=damping).precondition(case.params, batch, initial)

    dampings = torch.tensor([1e-1, 1e-2])
    natural, state, info = torch.vmap(damped)(dampings)
    assert state.step == 1
    for k, damping in enumerate(dampings):
        close_trees((at(natural, k), at(info, k)), damped(damping)[::2], 1e-8)

    states = [step.precondition(case.params, b, initial)[1] for b in (batch, other)]
    natural, _, _ = torch.vmap(lambda s: step.precondition(case.params, batch, s))(stack(*states))
    for k, state in enumerate(states):
        close_trees(at(natural, k), step.precondition(case.params, batch, state)[0], 1e-8)

    ensemble = [case.params, {n: 1.1 * p for n, p in case.params.items()}]
    natural, _, _ = torch.vmap(lambda p, s: step.precondition(p, batch, s))(stack(*ensemble), stack(*states))
    for k in range(2):
        close_trees(at(natural, k), step.precondition(ensemble[k], batch, states[k])[0], 1e-7)


HEADS: dict[str, tuple[dict[str, tuple[int, ...]], Callable[[Params, Tensor, str], Tensor]]] = {
    "linear": ({"w": (3, 4), "b": (3,)}, lambda p, h, head: F.linear(h, p[f"{head}w"], p[f"{head}b"])),
    "table": ({"w": (6, 4)}, lambda p, h, head: F.embedding((h > 0).long().cumsum(0), p[f"{head}w"])),
    "norm": ({"w": (4,), "b": (4,)}, lambda p, h, head: F.layer_norm(h, (4,), p[f"{head}w"], p[f"{head}b"])),
    "conv": ({"w": (2, 1, 2), "b": (2,)}, lambda p, h, head: F.conv1d(h[None], p[f"{head}w"], p[f"{head}b"])),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_layer_that_some_batches_use(kind: str) -> None:
    """As a head of each task, or layers that are dropped: from the first batch that uses it on it is a layer."""
    shapes, head = HEADS[kind]
    task = ["one"]

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        assert all(p.is_floating_point() and p.stride() for p in params.values())  # which is no use of them
        h = F.linear(x, params["body"])
        return head(params, h, task[0]).sin().sum() + h.cos().sum()

    params = {"body": torch.randn(4, 5)}
    params |= {f"{of}{name}": torch.randn(*shape) for of in ("one", "two") for name, shape in shapes.items()}
    settings: Any = {"damping": 1e-2, "basis_every": 1}
    step = ekfac(loss_fn, **settings)
    batch = torch.randn(N, 5)
    state = step.init(params, batch)
    for task[0] in ("one", "two", "two", "one"):
        used = {name: p for name, p in params.items() if name.startswith(("body", task[0]))}
        alone = ekfac(loss_fn, **settings)
        expected = alone.precondition(used, batch, alone.init(used, batch))[0]
        natural, state, info = step.precondition(params, batch, state)
        close_trees({name: natural[name] for name in used}, expected, 1e-8)
        assert not any(natural[name].any() for name in params.keys() - used.keys())
        assert not info.skipped
    assert len(state.layers) == 3
    assert all(layer.rule for layer in state.layers)


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("way", ["eager", "compiled", "vmapped"])
def test_natural_gradients_have_the_dtypes_of_their_parameters(way: str, skipped: bool) -> None:
    """Of a number too, whatever the dtype of the loss."""

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return (F.linear(x.float(), params["w"]) * params["scale"].exp()).double().cos().sum()

    params = {"w": torch.randn(3, 5).float(), "scale": torch.tensor(0.5).float()}
    batch = torch.randn(N, 5) / (0 if skipped else 1)
    step = ekfac(loss_fn, damping=0.1)
    state = step.init(params, batch)
    take: Any = step.precondition
    if way == "compiled":
        take = torch.compile(take, fullgraph=True, backend="aot_eager")
    elif way == "vmapped":
        params, state = pytree.tree_map_only(Tensor, lambda t: torch.stack([t, t]), (params, state))
        take = torch.vmap(step.precondition, in_dims=(0, None, 0))
    natural, _, info = take(params, batch, state)
    assert bool(info.skipped.all()) == skipped
    assert all(p.dtype is torch.float32 for p in natural.values())


@pytest.mark.parametrize("refresh", [eigh(), qr()], ids=lambda refresh: refresh.name)
def test_refreshes_that_fell_on_batches_without_a_layer(refresh: Refresh) -> None:
    """Are made up for by the next batch that uses it, as its first one is; they are no part of the state then."""
    task = [0]

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        h = F.linear(x, params["body"])
        return F.linear(h, params[f"w{task[0]}"], params[f"b{task[0]}"]).sin().sum()

    params = {"body": torch.randn(4, 5), "w0": torch.randn(3, 4), "b0": torch.randn(3)}
    params |= {"w1": torch.randn(3, 4), "b1": torch.randn(3)}
    batch = torch.randn(N, 5)
    step = ekfac(loss_fn, damping=1e-2, second_moment=kfac, basis_every=2, refresh=refresh)
    states = [step.init(params, batch)]
    for t in range(5):
        task[0] = t % 2
        weight, alone = f"w{t % 2}", ekfac(loss_fn, damping=1e-2, second_moment=kfac)
        used = {name: p for name, p in params.items() if name in ("body", weight, f"b{t % 2}")}
        natural, state, _ = step.precondition(params, batch, states[-1])
        close(natural[weight], alone.precondition(used, batch, alone.init(used, batch))[0][weight], 1e-8)
        states.append(state)
    pytree.tree_map(torch.add, replace(states[2], step=4), states[4])  # one tree, though of batches of both


def test_processes_that_use_different_layers_are_refused() -> None:
    """For what they add up is then not of the same layers."""
    used = [True]

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["body"]).sin().sum() + (F.linear(x, params["w"]).sum() if used[0] else 0.0)

    params, batch = {"body": torch.randn(4, 5), "w": torch.randn(3, 5)}, torch.randn(N, 5)
    step = ekfac(loss_fn, damping=1e-2, ranks=Ranks(lambda t: t, True))
    state = step.init(params, batch)
    used[0] = False
    with pytest.raises(ValueError, match=r"does not use the layer 'w', which it used.*with ranks, let it use each"):
        step.precondition(params, batch, state)


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 2},
        {"bases": {"*": thin}},
        {"bases": {"*": rank(1)}},
        {"contractions": Contractions(orders={"w": Order.FORM_FIRST})},
    ],
    ids=str,
)
@ESTIMATORS
def test_options_where_some_batches_use_a_layer(estimator: SecondMoment, options: Any) -> None:
    if "bases" in options and options["bases"]["*"] is thin and estimator not in (intra_batch, kfac):
        pytest.skip("thin takes no average")
    task = [0]

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        h = F.linear(x, params["body"])
        return F.linear(h, params["w"], params["b"]).sin().sum() if task[0] else h.cos().sum()

    params, batch = {"body": torch.randn(4, 5), "w": torch.randn(3, 4), "b": torch.randn(3)}, torch.randn(N, 5)
    step = ekfac(loss_fn, damping=1e-2, second_moment=estimator, **options)
    state = step.init(params, batch)
    for task[0] in (0, 1, 0, 1):
        natural, state, info = step.precondition(params, batch, state)
        assert not info.skipped
        assert bool(natural["w"].any()) == bool(task[0])


@pytest.mark.parametrize("name", sorted(name for name in LOOPED if "custom" not in name))  # which no `vmap` takes
def test_a_loop_over_the_examples_within_a_vmap_of_the_callers_own(name: str) -> None:
    """Over what the loss does not depend on."""
    case = make(name)
    batch = case.batch(N)
    state = ekfac(case.loss_fn, damping=1.0).init(case.params, batch)

    def damped(damping: Tensor) -> Params:
        return ekfac(case.loss_fn, damping=damping).precondition(case.params, batch, state)[0]

    dampings = torch.tensor([1e-1, 1e-2])
    natural = torch.vmap(damped)(dampings)
    for k, damping in enumerate(dampings):
        close_trees(at(natural, k), damped(damping), 1e-8)


@ESTIMATORS
def test_a_step_without_a_refresh_does_not_read_back(estimator: SecondMoment) -> None:
    case = make("conv groups")
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=torch.tensor(1e-2), second_moment=estimator, basis_every=2)
    _, state, _ = step.precondition(case.params, batch, step.init(case.params, batch))
    with NoHostRead():
        step.precondition(case.params, batch, state)
    with pytest.raises(AssertionError, match="reads back"), NoHostRead():
        bool(torch.ones(()) > 0)


@ESTIMATORS
def test_one_position_forms_no_gradient_of_an_example(estimator: SecondMoment) -> None:
    n, o, i = 32, 48, 40
    params, batch = {"w": torch.randn(o, i)}, torch.randn(n, i)
    step = ekfac(lambda p, x: F.linear(x, p["w"]).cos().sum(), damping=1e-2, second_moment=estimator)
    initial = step.init(params, batch)
    with Largest() as largest:
        step.precondition(params, batch, initial)
        per_example_gradients(lambda p, x: F.linear(x, p["w"]).cos().sum(), params, batch).norms()
    assert 0 < largest.entries <= max(o * i, o * o, n * o, n * i)


def test_channels_last_and_buffers() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)).eval()
    net[1].running_mean.normal_()  # type: ignore[operator]
    case = classifier(net, 2, 6, 6)
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2)
    expected, _, _ = step.precondition(case.params, batch, step.init(case.params, batch))
    last = {name: p.to(memory_format=torch.channels_last) if p.dim() == 4 else p for name, p in case.params.items()}
    natural, _, _ = step.precondition(last, batch, step.init(last, batch))
    close_trees(natural, expected, 1e-8)


def test_two_hundred_layers() -> None:
    params = {f"w{k}": torch.eye(4) + 0.01 * torch.randn(4, 4) for k in range(200)}

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        for w in params.values():
            x = F.linear(x, w)
        return x.square().sum()

    batch = torch.randn(N, 4)
    step = ekfac(loss_fn, damping=1e-2)
    _, state, info = step.precondition(params, batch, step.init(params, batch))
    assert len(state.bases) == 200
    assert not info.skipped


def test_what_half_precision_does_not_reach_is_skipped() -> None:
    params, batch = {"w": torch.randn(3, 4).half()}, torch.randn(N, 4).half()
    step = ekfac(lambda p, x: 1e-6 * F.linear(x, p["w"]).sum(), damping=1e-14)
    natural, _, info = step.precondition(params, batch, step.init(params, batch))
    assert info.skipped
    assert not natural["w"].any()


@pytest.mark.parametrize("name", ["mlp", "custom"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_aux_has_the_examples_in_their_order(name: str, chunk_size: int | None) -> None:
    case = make(name)
    batch = case.batch(N)

    def loss_fn(params: Params, example: Any) -> Any:
        loss = case.loss_fn(params, example)
        return loss, {"loss": loss, "parts": [pytree.tree_leaves(example)[0], loss.new_ones(2)]}

    step = ekfac(loss_fn, damping=1e-2, has_aux=True, chunk_size=chunk_size)
    _, _, info = step.precondition(case.params, batch, step.init(case.params, batch))
    losses, _ = loop(case.loss_fn, case.params, batch)
    close_trees(info.aux, {"loss": losses, "parts": [pytree.tree_leaves(batch)[0], torch.ones(N, 2)]})
    assert not info.aux["loss"].requires_grad
