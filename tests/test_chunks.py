"""Chunks of a batch are summed and freed: a step does not depend on them, and its memory not on the batch."""

import gc
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from benchmarks.measure import peak_allocated
from ekfac_func import (
    DIAGONAL,
    FULL,
    Contractions,
    averaged_intra_batch,
    blocks,
    compact,
    eigh,
    ekfac,
    empirical,
    kfac,
    per_example_gradients,
    qr,
    rank,
    reduce,
    running_average,
    sampled,
    second_moments,
    staggered,
    thin,
)
from ekfac_func.draws import Draws
from ekfac_func.types import Params

from .cases import N, classifier, every_case, make
from .oracles import close, close_trees, same_bits

TWICE = Contractions(max_bytes=1)  # a refresh has no room for what the layers are made of


def run(case: Any, steps: int = 2, n: int = N, **settings: Any) -> Any:
    torch.manual_seed(0)
    batches = [case.batch(n) for _ in range(steps)]
    step = ekfac(case.loss_fn, damping=1e-2, **settings)
    state, naturals = step.init(case.params, batches[0]), []
    for batch in batches:
        natural, state, info = step.precondition(case.params, batch, state)
        naturals.append((natural, info.gradient, info.loss))
    return naturals, state.factors, {name: moment.value.sum() for name, moment in state.second_moments.items()}


@every_case
def test_a_second_pass_changes_nothing(name: str) -> None:
    case = make(name)
    whole = run(case)
    close_trees(run(case, chunk_size=4, contractions=TWICE), whole, 1e-7)


SETTINGS: dict[str, dict[str, Any]] = {
    "known basis": {"basis_every": 2},
    "averaged": {"second_moment": averaged_intra_batch(0.5), "factor_decay": 0.5},
    "running": {"second_moment": running_average(0.5), "basis_every": 2},
    "kfac": {"second_moment": kfac},
    "reduce": {"weight_sharing": reduce},
    "blocks": {"bases": {"*": blocks(2)}},
    "rank": {"bases": {"*": rank(2)}, "refresh": qr(30)},
    "thin": {"bases": {"*": thin}},
    "staggered": {"refresh": staggered(2), "basis_every": 2},
    "moment_every": {"basis_every": 2, "moment_every": 2},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["mlp", "conv groups", "tied padded"])
def test_every_setting_adds_up(name: str, setting: str) -> None:
    case, settings = make(name), SETTINGS[setting]  # on so many examples that no eigenvector is arbitrary
    whole = run(case, 3, 120, **settings)
    for how in (Contractions(), TWICE):
        close_trees(run(case, 3, 120, chunk_size=50, contractions=how, **settings), whole, 1e-6)


@pytest.mark.parametrize("choice", [thin, compact(N), rank(4)])
@pytest.mark.parametrize("how", [Contractions(), TWICE])
def test_bases_of_the_samples_add_up(choice: Any, how: Contractions) -> None:
    case = classifier(nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)), 40)
    settings: dict[str, Any] = {"bases": {"*": choice}, "refresh": qr(30) if choice == rank(4) else eigh()}
    naturals, _, moments = run(case, 1, **settings)
    found = run(case, 1, chunk_size=4, contractions=how, **settings)
    close_trees((found[0], found[2]), (naturals, moments), 1e-6)


def test_terms_of_blocks_by_ids_are_counted_as_they_are_written() -> None:
    """For every block: on a step with a refresh they are not kept where they exceed the budget."""
    params, calls = {"w": torch.randn(16, 4, 4)}, itertools.count()

    def loss_fn(params: Any, example: Any) -> Any:
        next(calls)
        x, ids = example
        return torch.bmm(x[:, None], params["w"][ids]).cos().sum()

    batch = torch.randn(8, 5, 4), torch.randint(0, 16, (8, 5))
    whole = 8 * 16 * 5 * (4 + 4) * 8  # bytes
    passes = []
    for limit in (whole // 2, 4 * whole):
        step = ekfac(loss_fn, damping=1e-2, chunk_size=2, contractions=Contractions(max_bytes=limit))
        state = step.init(params, batch)
        before = next(calls)
        step.precondition(params, batch, state)
        passes.append(next(calls) - before)
    assert passes[0] >= passes[1] + 4


def test_a_second_pass_draws_the_same() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    params = {name: p.detach() for name, p in net.named_parameters()}
    batch = torch.randn(9, 6), torch.randint(0, 3, (9,))

    def loss_fn(params: Any, example: Any) -> Any:
        return F.cross_entropy(functional_call(net, params, (example[0],)), example[1])

    model = lambda params, example: functional_call(net, params, (example[0],))  # noqa: E731
    for fisher in (empirical, sampled(model, lambda logits: torch.distributions.Categorical(logits=logits))):
        found = []
        for how in (Contractions(), TWICE):
            torch.manual_seed(0)
            step = ekfac(loss_fn, damping=1e-2, chunk_size=4, contractions=how, fisher=fisher)
            found.append((step.precondition(params, batch, step.init(params, batch)), torch.get_rng_state()))
        (one, generator), (other, generator_after) = found
        close_trees(one, other, 1e-9)
        same_bits(generator, generator_after)


def test_a_recorded_step_has_no_second_pass() -> None:
    """Whose random numbers it could not draw again."""
    with pytest.raises(RuntimeError, match="CUDA graph"):
        Draws([], recorded=True).repeat()


def deep(n: int) -> Any:
    """Linear layers on many positions, so that activations are nearly all of the memory."""
    net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(12)))
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss_fn(params: Any, x: Any) -> Any:
        return functional_call(net, params, (x,)).square().mean()

    return loss_fn, params, torch.randn(n, 64, 32)


@pytest.mark.parametrize("refreshing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_batch(refreshing: bool) -> None:
    peaks = []
    for n in (32, 128):
        loss_fn, params, batch = deep(n)
        step = ekfac(loss_fn, damping=1e-2, basis_every=2, chunk_size=16, contractions=Contractions(max_bytes=2**18))
        state = step.init(params, batch)
        if not refreshing:
            state = step.precondition(params, batch, state)[1]
        peaks.append(peak_allocated(lambda: step.precondition(params, batch, state)))  # noqa: B023
    assert peaks[1] < 1.2 * peaks[0]


def test_layers_are_freed_within_the_backward_pass() -> None:
    """Beside the inputs that autograd holds anyway, the output gradients of all layers would be as many again."""
    loss_fn, params, batch = deep(256)
    step = ekfac(loss_fn, damping=1e-2, basis_every=2, contractions=Contractions(max_bytes=2**20))
    state = step.precondition(params, batch, step.init(params, batch))[1]
    of_layer = batch.numel() * batch.element_size() / 2**20
    assert peak_allocated(lambda: step.precondition(params, batch, state)) < (12 + 6) * of_layer
    assert peak_allocated(lambda: second_moments(loss_fn, params, batch, state.bases)) < (12 + 6) * of_layer


def _turned_conv(params: Params, x: Tensor) -> Tensor:
    return F.conv_transpose2d(x, params["w"], stride=2, padding=1).tanh().square().sum()


def _conv(params: Params, x: Tensor) -> Tensor:
    return F.conv2d(x, params["w"], padding=2).tanh().square().sum()


@pytest.mark.parametrize("choice", [FULL, DIAGONAL, blocks(64)], ids=str)
@pytest.mark.parametrize("loss_fn", [_conv, _turned_conv])
def test_the_patches_of_a_batch_are_never_all_there(loss_fn: Any, choice: Any) -> None:
    size = 31 if loss_fn is _conv else 16
    params, batch = {"w": torch.randn(16, 16, 4, 4).float()}, torch.randn(16, 16, size, size).float()
    patches = 16 * (32 * 32) * (16 * 4 * 4) * 4 / 2**20
    bases, how = {"*": choice}, Contractions(max_bytes=2**20)
    step = ekfac(loss_fn, damping=1e-2, basis_every=2, bases=bases, contractions=how)
    state = step.init(params, batch)
    assert peak_allocated(lambda: step.precondition(params, batch, state)) < 0.7 * patches
    assert peak_allocated(lambda: second_moments(loss_fn, params, batch, state.bases, contractions=how)) < 0.7 * patches


@every_case
def test_second_moments_are_those_of_a_step(name: str) -> None:
    case = make(name)
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2)
    _, state, _ = step.precondition(case.params, batch, step.init(case.params, batch))
    found = second_moments(case.loss_fn, case.params, batch, state.bases, chunk_size=4)
    assert list(found) == list(state.second_moments)
    for weight, moment in found.items():
        close(moment, state.second_moments[weight].value, 1e-9)


def test_second_moments_of_another_basis_are_refused() -> None:
    case, other = make("mlp"), make("linear")
    state = ekfac(other.loss_fn, damping=1.0).init(other.params, other.batch(N))
    with pytest.raises(ValueError, match=r"bases has no layer '0.weight'.*init"):
        second_moments(case.loss_fn, case.params, case.batch(N), state.bases)


def test_what_a_step_returned_is_freed_with_it() -> None:
    """Without the garbage collector: a cycle that held it would keep the memory of one step through the next.

    So it is with what it was given.
    """
    case = make("mlp")
    step = ekfac(case.loss_fn, damping=1e-2)
    state = step.init(case.params, case.batch(N))
    gc.collect()
    gc.disable()
    try:
        params, batch = {name: p.clone() for name, p in case.params.items()}, case.batch(N)
        held = [StorageWeakRef(t.untyped_storage()) for t in pytree.tree_leaves((params, batch))]
        _, new, info = step.precondition(params, batch, state)
        moments = second_moments(case.loss_fn, params, batch, new.bases)
        returned = new.second_moments["0.weight"].value, info.gradient["0.weight"], moments["0.weight"]
        held += [StorageWeakRef(t.untyped_storage()) for t in returned]
        del new, info, moments, _, returned, params, batch
        assert all(memory.expired() for memory in held)
    finally:
        gc.enable()


def test_a_compiled_step_in_chunks() -> None:
    case = make("mlp")
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2, chunk_size=4, contractions=TWICE)
    state = step.init(case.params, batch)
    fast = torch.compile(step.precondition, fullgraph=True, backend="eager")
    close_trees(fast(case.params, batch, state)[0], step.precondition(case.params, batch, state)[0], 1e-7)


@pytest.mark.parametrize("retried", ["stale plan", "looped"])
def test_an_attempt_that_is_given_up_draws_nothing(retried: str) -> None:
    """The second pass would draw what the first attempt drew, and the result be of two dropout masks."""
    dropping = {"now": True}

    def loss_fn(params: Any, x: Any) -> Any:
        h = params["w"] @ x
        h = torch.as_strided_scatter(h, h[:1].sin(), (1,), (1,), 1) if retried == "looped" else h
        return (F.dropout(h, 0.5) if dropping["now"] else h).square().sum()

    params, batch, found = {"w": torch.randn(5, 4)}, torch.randn(9, 4), []
    for how in (Contractions(), TWICE):
        step = ekfac(loss_fn, damping=1e-2, chunk_size=4, contractions=how)
        if retried == "stale plan":
            dropping["now"] = False
            step.precondition(params, batch, step.init(params, batch))
            dropping["now"] = True
        torch.manual_seed(0)
        found.append((step.precondition(params, batch, step.init(params, batch)), torch.get_rng_state()))
    close_trees(found[0][0], found[1][0], 1e-9)
    same_bits(found[0][1], found[1][1])


def test_gradients_without_a_rule_count_as_what_a_refresh_holds() -> None:
    peaks = []
    for n in (64, 512):
        params, batch = {"w": torch.randn(24, 24)}, torch.randn(n, 24)
        step = ekfac(
            lambda p, x: ((p["w"] * 2) @ x).square().sum(),
            damping=1e-2,
            chunk_size=16,
            contractions=Contractions(max_bytes=2**12),
        )
        state = step.init(params, batch)
        peaks.append(peak_allocated(lambda: step.precondition(params, batch, state)))  # noqa: B023
    assert peaks[1] < 1.5 * peaks[0]


def test_second_moments_of_what_has_no_basis_or_no_chunks_are_refused() -> None:
    case = make("mlp")
    batch = case.batch(N)
    bases = ekfac(case.loss_fn, damping=1.0, bases={"*": thin}).init(case.params, batch).bases
    with pytest.raises(ValueError, match=r"basis of '0.weight'.*thin bases has none"):
        second_moments(case.loss_fn, case.params, batch, bases)
    with pytest.raises(ValueError, match=r"chunk_size=2.*batched=True"):
        second_moments(case.loss_fn, case.params, batch, bases, batched=True, chunk_size=2)
    with pytest.raises(ValueError, match=r"chunk_size=2.*batched=True"):
        per_example_gradients(case.loss_fn, case.params, batch, batched=True, chunk_size=2)


def test_a_copy_of_entries_is_of_the_chunk_that_made_it() -> None:
    """Columns that ids pick are a copy, whose strides depend on how many examples `vmap` maps over."""
    params = {"w": torch.randn(4, 4)}

    def loss_fn(params: Params, example: Any) -> Tensor:
        x, ids = example
        return (F.linear(x, params["w"]) + params["w"].T[:, ids].T.detach()).sin().sum()

    batch = torch.randn(5, 3, 4), torch.randint(0, 3, (5, 3))
    whole, chunked = (per_example_gradients(loss_fn, params, batch, chunk_size=size) for size in (None, 2))
    assert chunked.captured.layers["w"].rule is not None
    close(chunked.dense("w"), whole.dense("w"))
