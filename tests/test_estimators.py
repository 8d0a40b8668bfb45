"""Each estimator against dense per-example gradients, in the basis that the step used."""

import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ekfac_func import (
    DIAGONAL,
    FULL,
    RULES,
    SUA,
    Basis,
    Blocks,
    Contractions,
    Cost,
    Factored,
    Moment,
    Order,
    SecondMoment,
    State,
    averaged_intra_batch,
    blocking,
    describe,
    ekfac,
    exact_squares,
    exact_sums,
    intra_batch,
    keep,
    kfac,
    per_example_gradients,
    rank,
    reset,
    running_average,
    second_moments,
    transport,
)
from ekfac_func import contraction as contraction_room
from ekfac_func.capture import capture
from ekfac_func.discovery import Options, plan
from ekfac_func.factors import factor_sums, mean_factors
from ekfac_func.kronecker import gradient, into_basis
from ekfac_func.orders import FORMED, Contraction, contraction, convolves, early
from ekfac_func.patches import Patches
from ekfac_func.types import Layer, Number, Params, Sums
from ekfac_func.winograd import filtered

from .cases import Case, N, classifier, every_case, every_case_and_table, make
from .oracles import blocks, close, close_trees, loop, side
from .watching import Largest


def dense_blocks(case: Case, batch: Any, layers: Iterable[Layer]) -> dict[str, Tensor]:
    """Per-example gradients of every layer, `[n b o i k]`."""
    gradients = loop(case.loss_fn, case.params, batch)[1]
    return {layer.weight: blocks(gradients, layer) for layer in layers}


def sides(state: State, layer: Layer) -> tuple[Tensor, Tensor]:
    """Q_A `[b i I]` and Q_B `[b o O]` in full."""
    _, o, i, _ = layer.sizes
    return side(state.bases[layer.weight].Q_A, i), side(state.bases[layer.weight].Q_B, o)


def rotated(G: Tensor, state: State, layer: Layer) -> Tensor:
    Q_A, Q_B = sides(state, layer)
    return torch.einsum("boO,nboik,biI->nbOIk", Q_B, G, Q_A)


def layers(case: Case, batch: Any, rules: Any) -> tuple[Layer, ...]:
    return plan(case.loss_fn, case.params, batch, Options(rules)).layers


@every_case_and_table
def test_intra_batch_is_the_exact_moment(name: str, rules: Any) -> None:
    case = make(name)
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2, rules=rules)
    natural, state, info = step.precondition(case.params, batch, step.init(case.params, batch))
    assert list(natural) == list(case.params)
    close(info.loss, loop(case.loss_fn, case.params, batch)[0].mean())
    gradients = dense_blocks(case, batch, state.layers)
    for layer in state.layers:
        G = rotated(gradients[layer.weight], state, layer)
        moment = G.square().mean(0)
        close(state.second_moments[layer.weight].value, moment)
        Q_A, Q_B = sides(state, layer)
        rescaled = torch.einsum("boO,bOIk,biI->boik", Q_B, G.mean(0) / (moment + 1e-2), Q_A)
        expected = blocks({k: v[None] for k, v in natural.items()}, layer)[0]
        close(expected, rescaled)


@every_case
def test_every_order_sums_the_same_moment(name: str) -> None:
    """Of full bases, blocks and some rank, in few bytes and many; the square alone as beside the gradient."""
    case = make(name)
    batch = case.batch(N)
    terms = per_example_gradients(case.loss_fn, case.params, batch).captured.terms
    for bases in ({}, {"*": Blocks(2, 2)}, {"*": rank(2)}):
        step = ekfac(case.loss_fn, damping=1e-2, bases=bases)
        state = step.precondition(case.params, batch, step.init(case.params, batch))[1]
        for weight, of_layer in terms.items():
            basis, taken = state.bases[weight], set()
            for order, max_bytes in itertools.product(Order, (1, 2**26)):
                try:
                    how = contraction(of_layer, basis, order, max_bytes)
                except ValueError:
                    continue
                taken.add(order)
                assert how.order is order
                close(exact_squares(of_layer, basis, how) / N, state.second_moments[weight].value)
                total, projected, square = exact_sums(of_layer, basis, how)
                assert square is not None
                close(square / N, state.second_moments[weight].value)
                close(total, gradient(of_layer))
                close(projected, into_basis(total, basis))
            assert contraction(of_layer, basis).order in taken
            assert len(taken) >= (5 if isinstance(of_layer[0], Factored) else 1)


@pytest.mark.parametrize("order", [*FORMED, Order.PAIRS], ids=str)
def test_sums_over_many_examples_keep_their_digits(order: Order) -> None:
    """In float32, where adding one example after another loses more of them the more there are."""
    a, g = torch.randn(8192, 1, 2, 4, 1).float(), torch.randn(8192, 1, 2, 4).float()
    basis = Basis(*(torch.linalg.qr(torch.randn(1, 4, 4))[0].float() for _ in range(2)))
    terms, exact = (Factored(a, g),), (Factored(a.double(), g.double()),)
    square = exact_squares(exact, Basis(*(Q.double() for Q in basis)))
    close(exact_squares(terms, basis, contraction(terms, basis, order)).double(), square, 8e-7)


@pytest.mark.parametrize(("r", "groups"), [(None, 1), (8, 1), (None, 16)])
def test_gradients_of_a_convolution_without_patches(r: int | None, groups: int) -> None:
    """In float32 on a CPU, of many pixels and channels: as in float64, where patches are written; compiled too."""
    first, second = nn.Conv2d(16, 16, 3, groups=groups), nn.Conv2d(16, 16, 3, 2, groups=groups)
    case = classifier(nn.Sequential(first, nn.ReLU(), second, nn.Flatten()), 16, 19, 19)
    params, batch = case.params, case.batch(5)
    terms = per_example_gradients(case.loss_fn, params, batch).captured.terms
    choices: Any = {} if r is None else {"*": rank(r)}
    state = ekfac(case.loss_fn, damping=1e-2, bases=choices).init(params, batch)
    for weight, (term,) in terms.items():
        assert isinstance(term, Factored)
        assert isinstance(term.a, Patches)
        basis = Basis(*(torch.linalg.qr(torch.randn(Q.shape))[0] for Q in state.bases[weight]))
        if r is not None:
            basis = Basis(*(torch.cat([Q[..., :-1], torch.zeros_like(Q[..., :1])], -1) for Q in basis))
        expected = exact_sums((term,), basis, contraction((term,), basis, Order.PROJECT_BOTH))
        a, single = term.a.to(torch.float32), Basis(*(Q.float() for Q in basis))
        of_floats = (Factored(a, term.g.float()),)
        assert a.convolves(of_floats[0].g)
        for order in (Order.FORM_FIRST, Order.PROJECT_OUTPUTS):
            how = contraction(of_floats, single, order)
            # what lies outside of an output side is of the samples: then patches are written, and count for the budget
            assert convolves(of_floats[0], single, order) == (r is None or order is Order.FORM_FIRST)
            torch.compiler.reset()
            for sums in (exact_sums, torch.compile(exact_sums, backend="eager", fullgraph=True)):
                close_trees(pytree.tree_map(Tensor.double, sums(of_floats, single, how)), expected, 1e-4)
            assert expected.square is not None
            close(exact_squares(of_floats, single, how).double(), expected.square, 1e-4)


@pytest.mark.parametrize("max_bytes", [1, 2**26])
@pytest.mark.parametrize("order", FORMED, ids=str)
@pytest.mark.parametrize(
    ("rules", "bases"),
    [(RULES, {}), (RULES, {"*": rank(2)}), ({**RULES, **SUA}, {})],
    ids=["full", "rank", "SUA"],
)
def test_inputs_of_a_convolution_projected_without_patches(
    rules: Any, bases: Any, order: Order, max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By minimal filtering where it pays, in blocks too; not of other kernels, SUA, ranks, or in a transform."""
    net = nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, groups=2, padding=1), nn.ReLU(), nn.Conv2d(4, 3, (3, 1), padding=1), nn.ReLU()),
        *(nn.Conv2d(3, 2, 3, dilation=2, padding=2), nn.Flatten()),
    )
    case = classifier(net, 2, 5, 6)
    batch = case.batch(5)
    terms = per_example_gradients(case.loss_fn, case.params, batch, rules=rules).captured.terms
    state = ekfac(case.loss_fn, damping=1.0, rules=rules, bases=bases).init(case.params, batch)
    counted: list[int] = []

    def sums_of(g: Tensor, term: Factored, basis: Basis, how: Contraction) -> Sums:
        return exact_sums((term._replace(g=g),), basis, how)

    def counting(a: Patches, *rest: Any) -> Tensor:
        counted.append(len(a.x))
        return filtered(a, *rest)

    monkeypatch.setattr(contraction_room, "filtered", counting)
    for weight, (term,) in terms.items():
        if not isinstance(term, Factored):  # a bias beside SUA
            continue
        empty = state.bases[weight]
        basis = empty if bases else Basis(*(torch.linalg.qr(torch.randn(Q.shape))[0] for Q in empty))
        expected = exact_sums((term,), basis, contraction((term,), basis, Order.FORM_FIRST))
        direct = 2 * blocking.NOMINAL_N * math.prod(term.a.shape[1:]) * basis.Q_A.shape[-1]
        for overhead in (0, 10**9):
            monkeypatch.setattr("ekfac_func.winograd.OVERHEAD", overhead)
            how = contraction((term,), basis, order, max_bytes)
            counted.clear()
            close_trees(exact_sums((term,), basis, how), expected)
            fits = weight == "0.weight" and rules is RULES and not bases and not overhead and "a" in early(order)
            assert counted == ([] if not fits else [5] if max_bytes > 1 else [1] * 5)
            operations = {step.name: step.operations for step in how.steps}
            assert operations.get("project a", direct) == (direct * 4 // 9 if fits else direct)
            counted.clear()
            of_g = functools.partial(sums_of, term=term, basis=basis, how=how)
            close_trees(torch.vmap(of_g)(term.g[None]), pytree.tree_map(lambda t: t[None], expected))
            assert not counted


def test_no_more_gradients_exist_than_the_budget_allows() -> None:
    """What is written at a time, whichever order; an example is never split."""
    n, s, o, i = 64, 20, 30, 40
    term = Factored(torch.randn(n, 1, s, i, 1), torch.randn(n, 1, s, o))
    basis = Basis(torch.linalg.qr(torch.randn(1, i, i))[0], torch.linalg.qr(torch.randn(1, o, o))[0])
    for order in (Order.PROJECT_BOTH, Order.PROJECT_INPUTS, Order.PROJECT_OUTPUTS, Order.FORM_FIRST, Order.PAIRS):
        largest = {}
        for max_bytes in (2**17, 2**30):
            how = contraction((term,), basis, order, max_bytes)
            with Largest() as written:
                exact_sums((term,), basis, how)
            largest[max_bytes] = written.nbytes
        assert largest[2**17] <= 2**17 < largest[2**30], order


@pytest.mark.parametrize(
    ("shapes", "order"),
    [
        ((64, 1, 1024, 28, 32), Order.FORM_FIRST),  # a first convolution: many positions, few entries
        ((64, 1, 128, 257, 768), Order.PROJECT_BOTH),  # attention
        ((64, 1, 4, 1024, 1024), Order.PAIRS),  # bound by memory otherwise
        ((64, 1, 1, 1024, 1024), Order.ONE_POSITION),
    ],
)
def test_the_cheapest_order(shapes: tuple[int, ...], order: Order) -> None:
    """Of what was measured, on layers where the orders differ by a factor of two or more; it never reads n."""
    n, b, s, i, o = shapes
    basis = Basis(torch.empty(b, i, i, dtype=torch.float32), torch.empty(b, o, o, dtype=torch.float32))
    for size in (1, n):
        terms = (Factored(torch.empty(size, b, s, i, 1).float(), torch.empty(size, b, s, o).float()),)
        assert contraction(terms, basis).order is order
    without_memory = {("cpu", torch.float32): Cost(operations=1.0, bytes=1e30, cache=0)}
    assert contraction(terms, basis, costs=without_memory).order is not Order.PAIRS  # more arithmetic than the others


def test_contractions_by_pattern() -> None:
    case = make("mlp")
    batch = case.batch(N)
    name = next(iter(case.params))
    chosen = Contractions(orders={name: Order.FORM_FIRST})
    rows = describe(case.loss_fn, case.params, batch, contractions=chosen)
    assert [row.contraction.order for row in rows][:2] == [Order.FORM_FIRST, Order.ONE_POSITION]
    plain, step = (ekfac(case.loss_fn, damping=1e-2, contractions=c) for c in (Contractions(), chosen))
    state = plain.init(case.params, batch)
    close_trees(step.precondition(case.params, batch, state)[0], plain.precondition(case.params, batch, state)[0])
    impossible = ekfac(case.loss_fn, damping=1e-2, contractions=Contractions(orders={name: Order.IDS}))
    with pytest.raises(ValueError, match=f"orders gives Order.IDS to {name}: give one of .*FORM_FIRST"):
        impossible.precondition(case.params, batch, state)
    with pytest.raises(ValueError, match="orders has a pattern 'no such' that fits no layer"):
        ekfac(case.loss_fn, damping=1.0, contractions=Contractions(orders={"no such": Order.IDS})).init(
            case.params, batch
        )
    with pytest.raises(TypeError, match=r"orders\['\*'\] is 'pairs': give one of"):
        ekfac(case.loss_fn, damping=1.0, contractions=Contractions(orders={"*": "pairs"}))  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="max_bytes"):
        ekfac(case.loss_fn, damping=1.0, contractions=Contractions(max_bytes=0))


@every_case
def test_infinite_damping_is_the_plain_gradient(name: str) -> None:
    case = make(name)
    batch = case.batch(N)
    gradients = loop(case.loss_fn, case.params, batch)[1]
    for estimator in (intra_batch, averaged_intra_batch(0.9), running_average(0.9), kfac):
        step = ekfac(case.loss_fn, damping=1e12, second_moment=estimator)
        natural, _, info = step.precondition(case.params, batch, step.init(case.params, batch))
        for p, expected in gradients.items():
            assert natural[p].shape == case.params[p].shape
            assert natural[p].dtype == case.params[p].dtype
            close(natural[p] * 1e12, expected.mean(0), 1e-8)
            close(info.gradient[p], expected.mean(0))


@every_case_and_table
def test_averages_over_batches_and_stale_bases(name: str, rules: Any) -> None:
    """Every estimator's moment over four batches, the basis kept for all, by its own formula."""
    case = make(name)
    batches = [case.batch(N) for _ in range(4)]
    all_layers = layers(case, batches[0], rules)
    gradients = [dense_blocks(case, batch, all_layers) for batch in batches]
    for estimator in (averaged_intra_batch(0.7), running_average(0.7), kfac):
        step = ekfac(case.loss_fn, damping=1e-2, second_moment=estimator, basis_every=10, rules=rules)
        state = step.init(case.params, batches[0])
        expected: dict[str, Tensor] = {}
        for t, batch in enumerate(batches):
            _, state, _ = step.precondition(case.params, batch, state)
            positions = {} if t else captured_positions(case, batch, state, rules)
            for layer in all_layers:
                w = layer.weight
                G = rotated(gradients[t][w], state, layer)
                if estimator.name == "averaged_intra_batch":
                    expected[w] = 0.7 * expected.get(w, 0) + 0.3 * G.square().mean(0)
                    close(state.second_moments[w].value, expected[w] / (1 - 0.7 ** (t + 1)))
                else:
                    start = expected[w] if t else product(state, w, positions[w])
                    new = len(G) * G.mean(0).square()
                    expected[w] = 0.7 * start + 0.3 * new if estimator.name == "running_average" else start
                    close(state.second_moments[w].value, expected[w])


@pytest.mark.parametrize("estimator", [averaged_intra_batch, running_average])
def test_a_decay_of_another_dtype_leaves_that_of_the_state(estimator: Any) -> None:
    params, batch, decay = {"w": torch.randn(3, 4).float()}, torch.randn(N, 4).float(), torch.tensor(0.5)
    moving = {"second_moment": estimator(decay), "factor_decay": decay}
    step = ekfac(lambda p, x: F.linear(x, p["w"]).sin().sum(), damping=1.0, **moving)
    state = step.init(params, batch)
    for x in (batch, batch * torch.nan, batch):
        _, state, _ = step.precondition(params, x, state)
        assert {t.dtype for t in pytree.tree_leaves(state)} == {torch.float32}


def captured_positions(case: Case, batch: Any, state: State, rules: Any) -> dict[str, Any]:
    terms = capture(case.loss_fn, case.params, batch, Options(rules)).terms
    return {name: mean_factors(factor_sums(terms[name], state.bases[name])).positions for name in terms}


def product(state: State, name: str, positions: Any) -> Tensor:
    factors, moment = state.factors[name], state.second_moments[name].value
    a, b = torch.linalg.eigvalsh(factors.A).flatten(1), torch.linalg.eigvalsh(factors.B).flatten(1)
    positions = torch.as_tensor(positions).reshape(-1, 1, 1, 1)  # of all blocks alike, or of each
    return (positions * b[:, :, None, None] * a[:, None, :, None]).expand_as(moment)


@every_case
def test_ekfac_is_at_least_as_near_to_the_fisher_as_kfac(name: str) -> None:
    """||F - EKFAC||_F <= ||F - K-FAC||_F, block by block, on blocks formed in full; norms are the same in the basis."""
    case = make(name)
    batch = case.batch(N)
    moments = {}
    for estimator in (intra_batch, kfac):
        step = ekfac(case.loss_fn, damping=1e-2, second_moment=estimator)
        _, state, _ = step.precondition(case.params, batch, step.init(case.params, batch))
        moments[estimator.name] = state.second_moments
    gradients = dense_blocks(case, batch, state.layers)
    for layer in state.layers:
        G = rotated(gradients[layer.weight], state, layer)
        for b in range(layer.sizes[0]):
            g = G[:, b].flatten(1)
            fisher = g.T @ g / len(g)
            error = {
                name: (fisher - torch.diag(of_layers[layer.weight].value[b].flatten())).norm()
                for name, of_layers in moments.items()
            }
            assert error["intra_batch"] <= error["kfac"] * (1 + 1e-9) + 1e-12


def test_dense_factors_have_the_scale_of_the_moment() -> None:
    """The eigenvalue product of a matrix without a rule sums to the mean squared norm of its gradients."""
    case = make("not views")
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2, second_moment=kfac)
    _, state, _ = step.precondition(case.params, batch, step.init(case.params, batch))
    gradients = loop(case.loss_fn, case.params, batch)[1]
    unruled = [layer.weight for layer in layers(case, batch, RULES) if layer.rule is None]
    assert len(unruled) > 0
    for name in unruled:
        close(state.second_moments[name].value.sum(), gradients[name].square().sum() / N)


@pytest.mark.parametrize("estimator", [averaged_intra_batch(0.6), running_average(0.6)])
@pytest.mark.parametrize("at_refresh", [reset, keep, transport])
def test_what_a_refresh_does_to_the_average(estimator: SecondMoment, at_refresh: Any) -> None:
    case = make("mlp")
    batches = [case.batch(40) for _ in range(4)]
    step = ekfac(case.loss_fn, damping=1e-2, second_moment=estimator, basis_every=2, at_refresh=at_refresh)
    state = step.init(case.params, batches[0])
    for batch in batches[:2]:
        _, state, _ = step.precondition(case.params, batch, state)
    _, new, _ = step.precondition(case.params, batches[2], state)
    gradients = dense_blocks(case, batches[2], new.layers)
    for layer in new.layers:
        w = layer.weight
        G = rotated(gradients[w], new, layer)
        seen = G.square().mean(0) if estimator.name == "averaged_intra_batch" else len(G) * G.mean(0).square()
        old, weight = state.second_moments[w]
        if at_refresh is reset:
            old, weight = product(new, w, 1), torch.ones(())
        elif at_refresh is transport:
            R_A = (state.bases[w].Q_A.mT @ new.bases[w].Q_A).square()
            R_B = (state.bases[w].Q_B.mT @ new.bases[w].Q_B).square()
            moved = torch.stack([R_B.mT @ old[..., k] @ R_A for k in range(old.shape[-1])], dim=-1)
            close(moved.sum(), old.sum())
            old = moved
        total = 0.6 * weight + 0.4
        close(new.second_moments[w].value, (0.6 * weight * old + 0.4 * seen) / total)
        close(new.second_moments[w].weight, total)


def test_a_refresh_does_not_wipe_the_running_average_unless_asked() -> None:
    case = make("mlp")
    batches = [case.batch(40) for _ in range(6)]
    weights = {}
    for at_refresh in (keep, transport, reset):
        step = ekfac(case.loss_fn, damping=1e-2, second_moment=averaged_intra_batch(0.9), at_refresh=at_refresh)
        state = step.init(case.params, batches[0])
        for batch in batches:
            _, state, _ = step.precondition(case.params, batch, state)
        weights[at_refresh] = state.second_moments["0.weight"].weight
    close(weights[keep], torch.tensor(1 - 0.9**6))
    close(weights[transport], torch.tensor(1 - 0.9**6))
    close(weights[reset], torch.tensor(1.0))


def test_factors_are_a_bias_corrected_average_over_refreshes() -> None:
    case = make("conv groups")
    batches = [case.batch(N) for _ in range(4)]
    single, sums = [], ekfac(case.loss_fn, damping=1e-2, factor_decay=0.8, basis_every=1)
    alone = ekfac(case.loss_fn, damping=1e-2)
    state = sums.init(case.params, batches[0])
    for batch in batches:
        _, state, _ = sums.precondition(case.params, batch, state)
        single.append(alone.precondition(case.params, batch, alone.init(case.params, batch))[1].factors)
    for name in state.factors:
        for field in ("A", "B"):
            total = sum(0.2 * 0.8 ** (3 - t) * getattr(f[name], field) for t, f in enumerate(single))
            close(getattr(state.factors[name], field), total / (1 - 0.8**4))


@every_case
def test_twice_the_same_batch_has_the_same_factors_and_natural_gradient(name: str) -> None:
    """All are means over the examples, not sums."""
    case = make(name)
    batch = case.batch(N)
    double = pytree.tree_map(lambda t: torch.cat([t, t]), batch)
    step = ekfac(case.loss_fn, damping=1e-2)
    once = step.precondition(case.params, batch, step.init(case.params, batch))
    twice = step.precondition(case.params, double, step.init(case.params, double))
    close_trees(once[1].factors, twice[1].factors)
    close_trees(once[0], twice[0], 1e-7)


def test_an_estimator_of_ones_own() -> None:
    def variance(moment: Moment, mean: Any, n: Number) -> Moment:
        return Moment(mean.square - mean.projected**2, torch.ones_like(moment.weight))

    centred = SecondMoment("centred", exact_sums, variance, keep)
    case = make("conv")
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2, second_moment=centred)
    _, state, _ = step.precondition(case.params, batch, step.init(case.params, batch))
    gradients = dense_blocks(case, batch, state.layers)
    for layer in state.layers:
        G = rotated(gradients[layer.weight], state, layer)
        close(state.second_moments[layer.weight].value, G.var(0, unbiased=False))


def natural_of(case: Case, params: Params, batch: Any, **options: Any) -> Params:
    step = ekfac(case.loss_fn, damping=1e-2, **options)
    return step.precondition(params, batch, step.init(params, batch))[0]


@every_case
def test_the_order_of_the_batch_and_chunks_do_not_matter(name: str) -> None:
    case = make(name)
    batch = case.batch(N)
    turned = pytree.tree_map(lambda t: t.flip(0), batch)
    expected = natural_of(case, case.params, batch)
    close_trees(natural_of(case, case.params, turned), expected, 1e-7)
    close_trees(natural_of(case, case.params, batch, chunk_size=4), expected, 1e-7)


def test_blocks_of_examples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("conv groups")
    batch = case.batch(N)
    expected = natural_of(case, case.params, batch)
    split = blocking.split
    sizes = set()

    def counted(t: Any, most: int | None) -> Any:
        found = split(t, most)
        sizes.add(len(found))
        return found

    monkeypatch.setattr(blocking, "split", counted)  # of the factors
    monkeypatch.setattr(contraction_room, "split", counted)  # of the moment
    monkeypatch.setattr(blocking, "CACHE_BYTES", 1)
    close_trees(natural_of(case, case.params, batch, contractions=Contractions(max_bytes=1)), expected)
    assert N in sizes


@pytest.mark.parametrize("choice", [FULL, rank(4)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_positions_that_cancel_in_float32(choice: Any, masked: bool) -> None:
    """Inputs nearly alike with output gradients of opposite sign, as of a preference; a large one that a loss masks."""
    params = {"w": torch.randn(48, 64) / 8}
    x = torch.randn(6, 2, 64) if masked else torch.randn(6, 1, 64) + 1e-3 * torch.randn(6, 2, 64)
    if masked:
        x = torch.cat([x, torch.full((6, 1, 64), -9999.0)], 1)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        z = F.linear(x, params["w"]).tanh()
        return (z[0] - z[1]).sum()

    step = ekfac(loss_fn, damping=1.0, bases={"*": choice})
    _, state, _ = step.precondition(params, x, step.init(params, x))
    few, bases = pytree.tree_map(Tensor.float, (params, state.bases))
    how = Contractions(orders={"*": Order.PAIRS})
    exact = second_moments(loss_fn, params, x, pytree.tree_map(Tensor.double, bases), contractions=how)["w"]
    close(second_moments(loss_fn, few, x.float(), bases, contractions=how)["w"].double(), exact, 1e-3)
    norms = per_example_gradients(loss_fn, params, x).dense("w").flatten(1).norm(dim=1)
    close(per_example_gradients(loss_fn, few, x.float()).norms().double(), norms, 1e-3)


def test_no_moment_is_negative_where_positions_cancel() -> None:
    """The square of a sum that is zero, from pairs: a rounding of what cancels."""
    params = {"w": torch.randn(64, 64).float(), "b": torch.zeros(64).float()}
    batch = torch.randn(32, 1, 64).float().expand(32, 4, 64).contiguous(), torch.randn(32, 4, 64).float()

    def loss_fn(params: Params, example: Any) -> Tensor:
        z = F.linear(example[0], params["w"], params["b"])
        return ((z - z.mean(0)) * example[1]).sum()

    how = Contractions(orders={"*": Order.PAIRS})
    step = ekfac(loss_fn, damping=1e-6, exponent=-0.5, bases={"*": DIAGONAL}, contractions=how)
    _, state, info = step.precondition(params, batch, step.init(params, batch))
    assert not info.skipped
    assert (state.second_moments["w"].value >= 0).all()
    assert torch.isfinite(per_example_gradients(loss_fn, params, batch).norms()).all()


@pytest.mark.parametrize("twice", [False, True])
def test_sums_of_an_estimator_of_ones_own_stay_as_they_are(twice: bool) -> None:
    """It may hold them, or give one tensor twice; those of the package's own are divided in place."""
    case = make("mlp")
    batch = case.batch(N)
    held: list[Any] = []

    def sums(terms: Any, basis: Any, how: Any) -> Any:
        found = exact_sums(terms, basis, how)
        held.append(found._replace(square=found.projected) if twice else found)
        return held[-1]

    step = ekfac(case.loss_fn, damping=1.0, second_moment=intra_batch._replace(sums=sums))
    _, state, info = step.precondition(case.params, batch, step.init(case.params, batch))
    for name, of_layer in zip(state.second_moments, held, strict=True):
        assert torch.equal(state.second_moments[name].value, of_layer.square / N)
    exact = ekfac(case.loss_fn, damping=1.0).precondition(case.params, batch, step.init(case.params, batch))[2]
    close_trees(info.gradient, exact.gradient)
