"""Bases for wide layers, of some rank, thin and compact, against explicit complements and full bases."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.measure import peak_allocated
from ekfac_func import (
    DIAGONAL,
    FULL,
    RULES,
    Refresh,
    SecondMoment,
    State,
    adaptive,
    averaged_intra_batch,
    blocks,
    centred,
    compact,
    describe,
    eigh,
    ekfac,
    empirical,
    expand,
    gradient,
    intra_batch,
    keep,
    kfac,
    optim,
    per_example_gradients,
    qr,
    rank,
    reduce,
    reset,
    running_average,
    second_moments,
    solvers,
    staggered,
    thin,
    transport,
)
from ekfac_func.contraction import exact_squares
from ekfac_func.discovery import Options, plan
from ekfac_func.kronecker import positions, written
from ekfac_func.orders import Order, contraction
from ekfac_func.subspace import rescale, rescales_samples
from ekfac_func.types import Basis, Dense, Factored, Layer, Params, Reflections, outside

from .cases import Case, N, and_table, make, wide
from .oracles import blocks as dense_blocks
from .oracles import close, close_trees, loop, same_bits, side, stack

# one of each kind of term: one position, pairs, many, groups, dense, ids, tied, stacks
KINDS = ["mlp", "positions", "pairs of positions", "conv", "conv groups", "not views", "ids", "tied padded", "experts"]


def layers(case: Case, batch: Any, rules: Any = RULES) -> tuple[Layer, ...]:
    return plan(case.loss_fn, case.params, batch, Options(rules)).layers


def completed(Q: Tensor, dim: int) -> tuple[Tensor, int]:
    """A side `[b dim dim]` with its complement written out, and how many columns are inside."""
    if not outside(Q):
        return side(Q, dim), side(Q, dim).shape[-1]
    r = Q.shape[-1] - 1
    whole = torch.linalg.qr(Q[..., :r], mode="complete").Q
    return torch.cat([Q[..., :r], whole[..., r:]], -1), r


def averaged_outside(M: Tensor, inside: tuple[int, int]) -> Tensor:
    """Full coordinates `[b o i k]` with the mean over each complement in its place."""
    q, r = inside
    M = M if q == M.shape[1] else torch.cat([M[:, :q], M[:, q:].mean(1, keepdim=True)], 1)
    return M if r == M.shape[2] else torch.cat([M[:, :, :r], M[:, :, r:].mean(2, keepdim=True)], 2)


def spread(M: Tensor, inside: tuple[int, int], sizes: tuple[int, int]) -> Tensor:
    """The inverse of `averaged_outside` on what is constant over each complement."""
    (q, r), (o, i) = inside, sizes
    M = M if q == o else torch.cat([M[:, :q], M[:, q:].expand(-1, o - q, -1, -1)], 1)
    return M if r == i else torch.cat([M[:, :, :r], M[:, :, r:].expand(-1, -1, i - r, -1)], 2)


def whole(state: State, layer: Layer) -> tuple[Tensor, Tensor, tuple[int, int]]:
    (Q_A, r), (Q_B, q) = (
        completed(Q, dim) for Q, dim in zip(state.bases[layer.weight], layer.sizes[2:0:-1], strict=True)
    )
    return Q_A, Q_B, (q, r)


@pytest.mark.parametrize("r", [1, 2])
@and_table(KINDS)
def test_rank_against_an_explicit_complement(name: str, r: int, rules: Any) -> None:
    """Moment and natural gradient, also in a stale basis and for a power of the moment."""
    case = make(name)
    batches = [case.batch(N) for _ in range(2)]
    step = ekfac(case.loss_fn, damping=1e-2, exponent=-0.7, bases={"*": rank(r)}, basis_every=2, rules=rules)
    state, tall = step.init(case.params, batches[0]), 0
    for batch in batches:
        natural, state, info = step.precondition(case.params, batch, state)
        assert info.kept_bases == 0
        gradients = loop(case.loss_fn, case.params, batch)[1]
        for layer in layers(case, batch, rules):
            Q_A, Q_B, inside = whole(state, layer)
            tall += sum(map(outside, state.bases[layer.weight]))
            close(Q_A.mT @ Q_A, torch.eye(Q_A.shape[-1]).expand_as(Q_A))
            G = dense_blocks(gradients, layer)
            coordinates = torch.einsum("boO,nboik,biI->nbOIk", Q_B, G, Q_A)
            moment = averaged_outside(coordinates.square().mean(0), inside)
            close(state.second_moments[layer.weight].value, moment)
            scale = spread((moment + 1e-2) ** -0.7, inside, (Q_B.shape[-1], Q_A.shape[-1]))
            expected = torch.einsum("boO,bOIk,biI->boik", Q_B, coordinates.mean(0) * scale, Q_A)
            close(dense_blocks({p: v[None] for p, v in natural.items()}, layer)[0], expected)
    assert tall


@pytest.mark.parametrize("r", [1, 2])
@and_table(KINDS)
def test_the_mean_gradient_outside_of_a_rank(name: str, r: int, rules: Any) -> None:
    """Estimators that read it: what it has outside counts as much as inside, and is not taken for zero."""
    case = make(name)
    batches = [case.batch(N) for _ in range(2)]
    settings: dict[str, Any] = {"damping": 1e-2, "bases": {"*": rank(r)}, "basis_every": 2, "rules": rules}
    for estimator in (centred, running_average(0.6)):
        step = ekfac(case.loss_fn, second_moment=estimator, **settings)
        _, old, _ = step.precondition(case.params, batches[0], step.init(case.params, batches[0]))
        _, new, _ = step.precondition(case.params, batches[1], old)
        gradients = loop(case.loss_fn, case.params, batches[1])[1]
        for layer in layers(case, batches[1], rules):
            Q_A, Q_B, inside = whole(new, layer)
            G = torch.einsum("boO,nboik,biI->nbOIk", Q_B, dense_blocks(gradients, layer), Q_A)
            if estimator is centred:
                expected = averaged_outside(G.var(0, correction=0), inside)
            else:
                seen = averaged_outside(N * G.mean(0).square(), inside)
                expected = 0.6 * old.second_moments[layer.weight].value + 0.4 * seen
            close(new.second_moments[layer.weight].value, expected)


@pytest.mark.parametrize("choice", [FULL, rank(2), thin, compact(30)], ids=str)
def test_a_table_in_another_dtype_than_torchs_default(choice: Any) -> None:
    """Its factors divide by counts, which are whole numbers."""
    params, ids = {"t": torch.randn(9, 4)}, torch.randint(0, 9, (5, 6))
    single = {"t": params["t"].float()}
    for estimator in (intra_batch, kfac):
        step = ekfac(
            lambda p, ids: F.embedding(ids, p["t"]).sin().sum(),
            damping=0.1,
            bases={"*": choice},
            second_moment=estimator,
        )
        expected, _, _ = step.precondition(params, ids, step.init(params, ids))
        natural, state, _ = step.precondition(single, ids, step.init(single, ids))
        leaves = pytree.tree_leaves((natural, state))
        assert {leaf.dtype for leaf in leaves if isinstance(leaf, Tensor)} == {torch.float32}
        if estimator is kfac or choice is FULL:  # else the basis is one of a subspace, and not determined so well
            close_trees({"t": natural["t"].double()}, expected, 1e-3)


@pytest.mark.parametrize("s", [1, 3])
@pytest.mark.parametrize("choice", [rank(12), rank(33)], ids=["both sides", "one side"])
def test_rank_of_a_layer_with_few_samples(choice: Any, s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The natural gradient from samples is that from the mean gradient, and with them all inside that of the full."""
    loss_fn, params, batch = wide(3, s)
    found = {}
    for way in ("samples", "mean"):
        if way == "mean":
            monkeypatch.setattr("ekfac_func.rescaling.rescale", lambda mean, *rest: _by_mean(mean, *rest))
        step = ekfac(loss_fn, damping=1e-2, bases={"*": choice})
        found[way], state, _ = step.precondition(params, batch, step.init(params, batch))
    close_trees(found["samples"], found["mean"])
    full = ekfac(loss_fn, damping=1e-2)
    close_trees(found["samples"], full.precondition(params, batch, full.init(params, batch))[0], 1e-8)
    assert state.factors["w"].A.shape == (1, 0, 0)


def _by_mean(mean: Any, *rest: Any) -> Tensor:
    return rescale(mean._replace(terms=None), *rest)


@pytest.mark.parametrize(("sizes", "r"), [((40, 50), 12), ((29, 60), 29), ((60, 29), 29)], ids=["both", "o", "i"])
def test_samples_and_their_mean_in_a_stale_basis(
    sizes: tuple[int, int], r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two blocks, whose moments outside differ: what other samples have outside of a side, or of both."""
    i, o = sizes
    params, batches = {"w": torch.randn(2, i, o) / i**0.5}, torch.randn(2, 2, 2, 2, i)
    weights = torch.tensor([1.0, 3.0])[:, None, None]

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return (weights * torch.bmm(x, params["w"])).sin().sum()

    step = ekfac(loss_fn, damping=1e-2, bases={"*": rank(r)}, basis_every=2)
    _, state, _ = step.precondition(params, batches[0], step.init(params, batches[0]))
    few = rescales_samples(
        per_example_gradients(loss_fn, params, batches[1]).captured.terms["w"], state.bases["w"], len(batches[1])
    )
    assert few
    of_samples = step.precondition(params, batches[1], state)[0]
    monkeypatch.setattr("ekfac_func.rescaling.rescale", lambda mean, *rest: _by_mean(mean, *rest))
    close_trees(of_samples, step.precondition(params, batches[1], state)[0])


@pytest.mark.parametrize("name", KINDS)
def test_rank_of_the_dimension_is_the_full_basis(name: str) -> None:
    case = make(name)
    batch = case.batch(N)
    full, high = (ekfac(case.loss_fn, damping=1e-2, bases={"*": choice}) for choice in (FULL, rank(1000)))
    same_bits(*(step.precondition(case.params, batch, step.init(case.params, batch)) for step in (full, high)))


def test_rank_of_a_table_that_a_convolution_uses() -> None:
    """Samples of two kinds of terms: the factor that is not averaged is that of the first average."""
    params, ids = {"w": torch.randn(9, 12)}, torch.randint(0, 9, (5, 7))

    def loss_fn(params: Params, ids: Tensor) -> Tensor:
        h = F.embedding(ids, params["w"])
        return F.conv1d(h.T, params["w"][:, :, None]).cos().sum()

    naturals = []
    for factor_decay in (0.0, 0.5):
        step = ekfac(loss_fn, damping=1e-1, bases={"*": rank(4)}, factor_decay=factor_decay, second_moment=kfac)
        naturals.append(step.precondition(params, ids, step.init(params, ids))[0])
    close_trees(naturals[0], naturals[1], 1e-8)


@pytest.mark.parametrize("term", ["gradients", "pairs"])
def test_rank_keeps_to_the_memory_that_it_may_take(term: str) -> None:
    """Inside of the basis and outside, of an example at a time."""
    n, d = 64, 64
    Q = F.pad(torch.linalg.qr(torch.randn(1, d, d)).Q[..., :20], (0, 1))
    basis = Basis(Q, Q)
    terms: dict[str, Any] = {
        "gradients": (Dense(torch.randn(n, 1, d, d, 1)),),
        "pairs": (Factored(torch.randn(n, 1, 16, d, 1), torch.randn(n, 1, 16, d)),),
    }
    order = Order.PAIRS if term == "pairs" else None
    found: list[Tensor] = []
    for max_bytes in (2**26, 1):
        how = contraction(terms[term], basis, order, max_bytes)
        peak = peak_allocated(lambda: found.append(exact_squares(terms[term], basis, how)))  # noqa: B023
    assert peak < 0.6  # MiB, where all examples take 2 and 9
    close(found[0], found[1])


def test_rank_does_not_depend_on_the_defaults_of_torch() -> None:
    params, batch = {"w": torch.randn(40, 60)}, torch.randn(200, 60)
    step = ekfac(lambda p, x: F.linear(x, p["w"]).cos().sum(), damping=1e-2, bases={"*": rank(3)})
    state = step.init(params, batch)
    natural, _, _ = step.precondition(params, batch, state)
    torch.set_default_dtype(torch.float16)
    try:
        same_bits(step.precondition(params, batch, state)[0], natural)
    finally:
        torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        same_bits(step.init(params, batch), state)


def test_rank_finds_the_leading_eigenvectors() -> None:
    """Of an average of the factors too, from any start, in descending order; as fast as the spectrum decays."""
    Q = torch.linalg.qr(torch.randn(30, 30)).Q
    decay = 0.5 ** torch.arange(30.0)
    loss_fn, params, _ = wide(i=29, o=30)
    x = torch.randn(400, 1, 29) @ (Q[:29, :29] * decay[:29])
    for factor_decay in (0.0, 0.5):
        step = ekfac(loss_fn, damping=1e-2, bases={"*": rank(4)}, factor_decay=factor_decay)
        state = step.init(params, x)
        for _ in range(6):
            _, state, info = step.precondition(params, x, state)
        a = torch.cat([x[:, 0], torch.ones(400, 1)], 1)
        A = a.T @ a / 400
        Q_A = state.bases["w"].Q_A[0, :, :4]
        leading = torch.linalg.eigh(A)[1].flip(-1)[:, :4]
        close((leading.T @ Q_A).abs(), torch.eye(4), 1e-6)
        assert info.kept_bases == 0
        if factor_decay:
            close(state.factors["w"].A[0], A)


@pytest.mark.parametrize("n", [3, 12, 20])
def test_rank_of_no_more_samples_than_columns(n: int) -> None:
    """Their eigenvectors at once, and what else there is room for of the basis before."""
    loss_fn, params, before = wide(30)
    step = ekfac(loss_fn, damping=1e-2, bases={"*": rank(12)})
    _, state, _ = step.precondition(params, before, step.init(params, before))
    old = state.bases["w"].Q_A[0, :, :12]
    batch = torch.randn(n, 1, 40)
    _, state, _ = step.precondition(params, batch, state)
    Q = state.bases["w"].Q_A[0, :, :12]
    x = torch.cat([batch[:, 0], torch.ones(n, 1)], 1)
    leading = torch.linalg.svd(x)[2][: min(n, 12)].T
    close((leading.T @ Q[:, : min(n, 12)]).abs(), torch.eye(min(n, 12)), 1e-8)
    for kept in old[:, : max(12 - n, 0)].T:
        close(Q @ (Q.T @ kept), kept, 1e-8)


@pytest.mark.parametrize("factor_decay", [0.0, 0.3])
@pytest.mark.parametrize("name", ["mlp", "positions", "conv groups", "tied padded"])
def test_eigenvalue_product_of_a_rank(name: str, factor_decay: float) -> None:
    """K-FAC's moment of factors whose eigenvalues outside are their mean, whether the factors are formed or not."""
    case = make(name)
    batch = case.batch(N)
    full = ekfac(case.loss_fn, damping=1e-2, second_moment=kfac)
    _, of_full, _ = full.precondition(case.params, batch, full.init(case.params, batch))
    step = ekfac(case.loss_fn, damping=1e-2, second_moment=kfac, bases={"*": rank(1)}, factor_decay=factor_decay)
    _, state, _ = step.precondition(case.params, batch, step.init(case.params, batch))
    for layer in layers(case, batch):
        Q_A, Q_B, inside = whole(state, layer)
        A, B = (side(C, dim) for C, dim in zip(of_full.factors[layer.weight][:2], layer.sizes[2:0:-1], strict=True))
        values = [torch.einsum("bde,bdD,beD->bD", C, Q, Q) for C, Q in ((B, Q_B), (A, Q_A))]
        product = torch.einsum("bO,bI->bOI", *values)[..., None].expand(-1, -1, -1, layer.sizes[3])
        positions = of_full.second_moments[layer.weight].value.sum() / product.sum()
        close(state.second_moments[layer.weight].value, positions * averaged_outside(product, inside))


@pytest.mark.parametrize("at_refresh", [transport, keep, reset])
@pytest.mark.parametrize("estimator", [averaged_intra_batch(0.6), running_average(0.6)], ids=lambda e: e.name)
def test_what_a_refresh_carries_on_of_a_rank(estimator: SecondMoment, at_refresh: Any) -> None:
    """Transport is that of full coordinates with the mean over each complement, and keeps the sum over all of them."""
    loss_fn, params, _ = wide(i=7, o=6)
    n, batches = 20, [torch.randn(20, 2, 7) for _ in range(2)]
    step = ekfac(loss_fn, damping=1e-2, second_moment=estimator, at_refresh=at_refresh, bases={"*": rank(3)})
    _, old, _ = step.precondition(params, batches[0], step.init(params, batches[0]))
    _, new, _ = step.precondition(params, batches[1], old)
    (layer,) = plan(loss_fn, params, batches[0], Options(RULES)).layers
    (P_A, P_B, inside), (Q_A, Q_B, _) = whole(old, layer), whole(new, layer)
    value, weight = old.second_moments["w"]
    if at_refresh is transport:
        spread_out = spread(value, inside, (6, 8))
        moved = torch.einsum("bpO,bpiz,biI->bOIz", (P_B.mT @ Q_B).square(), spread_out, (P_A.mT @ Q_A).square())
        value = averaged_outside(moved, inside)
        close(spread(value, inside, (6, 8)).sum(), spread_out.sum())
    elif at_refresh is reset:
        full = ekfac(loss_fn, damping=1e-2)
        A, B, _ = full.precondition(params, batches[1], full.init(params, batches[1]))[1].factors["w"]
        values = [torch.einsum("bde,bdD,beD->bD", C, Q, Q) for C, Q in ((B, Q_B), (A, Q_A))]
        product = 2 * torch.einsum("bO,bI->bOI", *values)[..., None]  # of two positions
        value, weight = averaged_outside(product, inside), torch.ones(())
    gradients = loop(loss_fn, params, batches[1])[1]
    G = torch.einsum("boO,nboik,biI->nbOIk", Q_B, dense_blocks(gradients, layer), Q_A)
    seen = G.square().mean(0) if estimator.name == "averaged_intra_batch" else n * G.mean(0).square()
    expected = (0.6 * weight * value + 0.4 * averaged_outside(seen, inside)) / (0.6 * weight + 0.4)
    close(new.second_moments["w"].value, expected)


THIN = ["mlp", "positions", "conv", "conv groups", "not views", "ids", "tied padded", "experts", "several groups"]


@and_table(THIN)
def test_thin_is_the_full_basis(name: str, rules: Any) -> None:
    """For one example, for examples that repeat and for more than a side has dimensions; of each weight sharing."""
    case = make(name)
    for n, sharing in ((1, expand), (2, reduce), (2, expand), (40, expand)):
        batch = case.batch(n)
        batch = pytree.tree_map(lambda t: torch.cat([t, t]), batch)
        options = {"damping": 1e-2, "rules": rules, "weight_sharing": sharing}
        found = []
        for choice in (FULL, thin):
            step = ekfac(case.loss_fn, bases={"*": choice}, **options)
            natural, state, info = step.precondition(case.params, batch, step.init(case.params, batch))
            found.append((natural, info.gradient))
            assert info.kept_bases == 0
        close_trees(found[1], found[0], 1e-8)
        assert all(moment.value.numel() == 0 for moment in state.second_moments.values())


@pytest.mark.parametrize("refresh", [qr(), qr(3), adaptive(0.5)], ids=lambda refresh: refresh.name)
def test_thin_bases_start_from_no_old_ones(refresh: Refresh) -> None:
    """Of a span that another batch had, or of arbitrary coordinates in it: beside a layer that has old ones."""
    case = make("mlp")
    bases: list[dict[str, Any]] = [{"*": thin}, {"0.*": thin, "*": FULL}]
    for choices in bases:
        step, state = ekfac(case.loss_fn, damping=1e-2, bases=choices, refresh=refresh), None
        for _ in range(3):
            batch = case.batch(2)
            state = step.init(case.params, batch) if state is None else state
            natural, state, _ = step.precondition(case.params, batch, state)
            full = ekfac(case.loss_fn, damping=1e-2)
            expected, _, _ = full.precondition(case.params, batch, full.init(case.params, batch))
            names = [name for name in natural if choices == {"*": thin} or name.startswith("0.")]
            close_trees({name: natural[name] for name in names}, {name: expected[name] for name in names})


@pytest.mark.parametrize("estimator", [intra_batch, centred, kfac], ids=lambda e: e.name)
def test_thin_with_each_estimator_and_fisher(estimator: SecondMoment) -> None:
    """The gradient of the data may lie outside of the span of another Fisher's."""
    loss_fn, params, _ = wide()
    batch = torch.randn(5, 1, 40)
    other = gradient(lambda p, x: F.linear(x, p["w"], p["b"]).square().sum() + F.linear(x, p["w"])[..., 0].sin().sum())
    for fisher in (empirical, other):
        naturals = []
        for choice in (FULL, thin):
            step = ekfac(loss_fn, damping=0.3, second_moment=estimator, fisher=fisher, bases={"*": choice})
            naturals.append(step.precondition(params, batch, step.init(params, batch))[0])
        close_trees(naturals[1], naturals[0], 1e-8)


def test_a_compiled_step_of_thin_and_full_layers() -> None:
    params, batch = {"w": torch.randn(4, 30), "v": torch.randn(3, 4)}, torch.randn(5, 2, 30)
    step = ekfac(lambda p, x: F.linear(F.linear(x, p["w"]).cos(), p["v"]).sin().sum(), damping=0.1, bases={"w": thin})
    state = step.init(params, batch)
    fast = torch.compile(step.precondition, fullgraph=True, backend="eager")
    close_trees(fast(params, batch, state)[0], step.precondition(params, batch, state)[0], 1e-8)


def test_thin_states_do_not_depend_on_the_batch() -> None:
    """One state for every batch size, eager and compiled; a damping relative to the mean over the whole layer."""
    loss_fn, params, _ = wide()
    options: Any = {"damping": optim.relative(0.5), "exponent": -0.5}
    thin_step, full = ekfac(loss_fn, bases={"*": thin}, **options), ekfac(loss_fn, **options)
    fast = torch.compile(thin_step.precondition, fullgraph=True, backend="eager")
    batches = [torch.randn(n, 1, 40) for n in (4, 50)]
    state = thin_step.init(params, batches[0])
    for batch in batches:
        expected, _, about = full.precondition(params, batch, full.init(params, batch))
        eager, _, info = thin_step.precondition(params, batch, state)
        natural, state, _ = fast(params, batch, state)
        close_trees(eager, expected, 1e-8)
        close_trees(natural, expected, 1e-8)
        close(info.damping, about.damping)
    assert set(optim.metrics(natural, info, state)) >= {"cosine"}
    batch[0] = torch.nan
    natural, state, info = thin_step.precondition(params, batch, state)
    assert info.skipped
    assert all(p.abs().max() == 0 for p in natural.values())


@pytest.mark.parametrize("choice", [FULL, DIAGONAL, blocks(3), thin, rank(2), compact(4)], ids=str)
@pytest.mark.parametrize("of_curvature", [False, True], ids=["data", "curvature"])
def test_a_gradient_that_is_not_finite_where_the_loss_is(choice: Any, of_curvature: bool) -> None:
    """That of an example which the net takes to zero, in whichever basis: the step is skipped."""
    params, batch = {"w": torch.randn(6, 5)}, torch.randn(3, 5)
    batch[1] = 0

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"]).sin().sum() if of_curvature else loss_at_its_kink(params, x)

    fisher = gradient(loss_at_its_kink) if of_curvature else empirical
    step = ekfac(loss_fn, damping=1e-2, bases={"*": choice}, fisher=fisher)
    natural, _, info = step.precondition(params, batch, step.init(params, batch))
    assert torch.isfinite(info.loss)
    assert info.skipped
    assert natural["w"].abs().max() == 0


@pytest.mark.parametrize("refresh", [eigh(), staggered(2)], ids=lambda how: how.name)
@pytest.mark.parametrize("at_refresh", [reset, keep, transport])
@pytest.mark.parametrize("choice", [FULL, rank(2), compact(4)], ids=str)
def test_samples_that_are_not_finite_make_no_basis(choice: Any, at_refresh: Any, refresh: Any) -> None:
    """Of a curvature loss, whose moment they do not reach: that of K-FAC, where it is carried on."""
    params, batch = {"w": torch.randn(6, 5)}, torch.randn(3, 5)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"]).sin().sum()

    settings: dict[str, Any] = {"fisher": gradient(loss_at_its_kink), "second_moment": kfac, "refresh": refresh}
    step = ekfac(loss_fn, damping=1e-2, basis_every=2, at_refresh=at_refresh, bases={"*": choice}, **settings)
    state = step.init(params, batch)
    for _ in range(2):
        _, state, info = step.precondition(params, batch, state)
        assert not info.skipped
    batch[1] = 0
    _, new, info = step.precondition(params, batch, state)
    assert info.skipped
    same_bits(pytree.tree_leaves(new), pytree.tree_leaves(state))


def loss_at_its_kink(params: Params, x: Tensor) -> Tensor:
    return F.linear(x, params["w"]).square().sum().sqrt()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis_every": 2}, "basis_every=2.*rank"),
        ({"factor_decay": 0.5}, "factor_decay=0.5.*rank"),
        ({"factor_decay": torch.tensor(0.0)}, "factor_decay.*rank"),
        ({"second_moment": averaged_intra_batch(0.9)}, "second_moment=averaged_intra_batch.*intra_batch"),
        ({"second_moment": running_average(0.9)}, "second_moment=running_average.*intra_batch"),
        ({"second_moment": kfac, "at_refresh": keep}, "at_refresh.*leave it out"),
    ],
)
def test_what_thin_cannot_be_used_with(options: Any, message: str) -> None:
    loss_fn, _, _ = wide()
    with pytest.raises(ValueError, match=message):
        ekfac(loss_fn, damping=1.0, bases={"v": FULL, "w": thin}, **options)


def test_relative_damping_and_metrics_of_a_rank() -> None:
    """Means over all coordinates of the layer, those outside too."""
    loss_fn, params, batch = wide(20)
    found = {}
    for name, choice in (("rank", rank(5)), ("full", FULL)):
        step = ekfac(loss_fn, damping=optim.relative(0.5), bases={"*": choice})
        natural, state, info = step.precondition(params, batch, step.init(params, batch))
        found[name] = info.damping, optim.metrics(natural, info, state)
    close(found["rank"][0], found["full"][0])  # a trace is that of any orthonormal basis
    (layer,) = plan(loss_fn, params, batch, Options(RULES)).layers
    step = ekfac(loss_fn, damping=1.0, bases={"*": rank(5)})
    natural, state, info = step.precondition(params, batch, step.init(params, batch))
    spread_out = spread(state.second_moments["w"].value, whole(state, layer)[2], (30, 41))
    shares = spread_out / spread_out.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    close(optim.metrics(natural, info, state)["effective_rank/w"], entropy.exp())


@pytest.mark.parametrize("sizes", [[60], pytest.param([60, 50, 70], marks=pytest.mark.slow)])
def test_rank_compiled(sizes: list[int]) -> None:
    """Three graphs, two more for another batch size, and the naturals of eager steps."""
    loss_fn, params, _ = wide(s=2)
    step = ekfac(
        loss_fn,
        damping=0.1,
        bases={"*": rank(5)},
        basis_every=3,
        second_moment=averaged_intra_batch(0.5),
    )
    torch._dynamo.utils.counters.clear()
    fast = torch.compile(step.precondition, fullgraph=True, backend="eager")
    state = step.init(params, torch.randn(20, 2, 40))
    for n in sizes:
        for _ in range(5):
            batch, before = torch.randn(n, 2, 40), state
            natural, state, _ = fast(params, batch, before)
        close_trees(natural, step.precondition(params, batch, before)[0], 1e-8)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (3 if n == sizes[0] else 5)


def test_a_failing_solver_keeps_the_old_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    loss_fn, params, batch = wide(20)
    step = ekfac(loss_fn, damping=1e-2, bases={"*": rank(5)})
    _, good, _ = step.precondition(params, batch, step.init(params, batch))
    monkeypatch.setattr(solvers, "eigensolver", lambda C: (C, C * torch.nan))
    natural, state, info = step.precondition(params, torch.randn(20, 1, 40), good)
    assert info.kept_bases == 2
    same_bits(state.bases, good.bases)
    assert natural["w"].isfinite().all()
    monkeypatch.undo()
    nothing = ekfac(lambda p, x: 0 * loss_fn(p, x), damping=1e-2, bases={"*": rank(5)})
    _, state, info = nothing.precondition(params, batch, good)
    assert info.kept_bases == 0
    same_bits(state.bases["w"].Q_B, good.bases["w"].Q_B)  # a factor of zero says nothing


def test_a_state_of_another_factor_decay_is_refused() -> None:
    loss_fn, params, batch = wide(20)
    state = ekfac(loss_fn, damping=1.0, bases={"*": rank(5)}).init(params, batch)
    other = ekfac(loss_fn, damping=1.0, bases={"*": rank(5)}, factor_decay=0.5)
    with pytest.raises(ValueError, match=r"factors of shapes .* for the layer 'w', bases and factor_decay"):
        other.precondition(params, batch, state)
    with pytest.raises(ValueError, match="r=0"):
        rank(0)


def test_wide_layers_described() -> None:
    loss_fn, params, batch = wide()
    (row,) = describe(loss_fn, params, batch, bases={"*": rank(5)})
    assert (row.factor_A, row.basis_A, row.basis_B) == ((1, 0, 0), (1, 41, 6), (1, 30, 6))
    assert row.moment_bytes == 6 * 6 * 8
    (row,) = describe(loss_fn, params, batch, bases={"*": rank(5)}, factor_decay=0.5)
    assert row.factor_bytes == 8 * (41**2 + 30**2)
    (row,) = describe(loss_fn, params, batch, bases={"*": thin})
    assert row.factor_bytes == row.basis_bytes == row.moment_bytes == 0


@pytest.mark.parametrize("name", ["mlp", "not views"])
def test_vmap_over_states_of_every_refresh(name: str) -> None:
    case = make(name)
    batch = case.batch(N)
    params = [case.params, {name: 1.1 * p for name, p in case.params.items()}]
    for options in ({"refresh": adaptive(0.1)}, {"refresh": qr()}, {"bases": {"*": rank(2)}}, {"bases": {"*": thin}}):
        step = ekfac(case.loss_fn, damping=1e-2, **options)
        states = [step.precondition(case.params, case.batch(N), step.init(case.params, batch))[1] for _ in range(2)]
        stacked = stack(*zip(params, states, strict=True))
        together = torch.vmap(lambda p, s, step=step: step.precondition(p, batch, s)[0])(*stacked)
        for at, state in enumerate(states):
            alone = step.precondition(params[at], batch, state)[0]
            close_trees({name: p[at] for name, p in together.items()}, alone, 1e-8)


@pytest.mark.parametrize("choice", [rank(2), compact(1), blocks(2), FULL], ids=str)
def test_vmap_of_init(choice: Any) -> None:
    """Every member of an ensemble starts as it does alone."""
    params, batch = {"w": torch.randn(2, 6, 5)}, torch.randn(N, 5)

    def loss_fn(p: Params, x: Tensor) -> Tensor:
        return F.linear(x, p["w"]).square().sum()

    step = ekfac(loss_fn, damping=0.1, bases={"*": choice})
    states = torch.vmap(lambda w: step.init({"w": w}, batch))(params["w"])
    same_bits(pytree.tree_map(lambda t: t[1], states), step.init({"w": params["w"][1]}, batch))


def test_vmap_of_second_moments() -> None:
    batch, weights = torch.randn(N, 5), torch.randn(3, 6, 5)

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"]).sin().sum()

    bases = ekfac(loss_fn, damping=1.0).init({"w": weights[0]}, batch).bases
    found = torch.vmap(lambda w: second_moments(loss_fn, {"w": w}, batch, bases)["w"])(weights)
    for k, w in enumerate(weights):
        close(found[k], second_moments(loss_fn, {"w": w}, batch, bases)["w"])


# one position, several, groups, dilation, norms, a weight used twice: each with a side twice as wide as two examples
WIDE = [
    "in turn",
    "attention causal",
    "conv groups",
    "conv depthwise",
    "conv dilation",
    "layer norm",
    "same tensor twice",
]


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("estimator", [intra_batch, averaged_intra_batch(0.8), running_average(0.8), kfac, centred])
def test_compact_is_the_full_basis_that_it_stands_for(name: str, estimator: SecondMoment) -> None:
    """Stale and fresh steps, by the same step with the basis written out; a refresh finds eigenvectors."""
    case = make(name)
    batch = case.batch(2)
    found = per_example_gradients(case.loss_fn, case.params, batch).captured
    samples = 2 * max(positions(term) for terms in found.terms.values() for term in terms)
    settings: dict[str, Any] = {"damping": 0.1, "second_moment": estimator, "basis_every": 2, "at_refresh": keep}
    small = ekfac(case.loss_fn, bases={"*": compact(samples)}, **settings)
    full = ekfac(case.loss_fn, **settings)
    state = small.init(case.params, batch)
    assert any(isinstance(Q, Reflections) for basis in state.bases.values() for Q in basis)
    for n in (2, 2, 1, 2):
        batch = case.batch(n)
        same = dataclasses.replace(
            state,
            factors=full.init(case.params, batch).factors,
            bases={weight: Basis(*map(written, basis)) for weight, basis in state.bases.items()},
        )
        natural, new, _ = small.precondition(case.params, batch, state)
        if state.step % 2:
            close_trees(natural, full.precondition(case.params, batch, same)[0])
        else:
            factors = full.precondition(case.params, batch, same)[1].factors
            for weight, basis in new.bases.items():
                for Q, C in zip(map(written, basis), factors[weight][:2], strict=True):
                    if Q.dim() == 3 and Q.shape[-1] > 1:
                        D = Q.mT @ C @ Q
                        close(Q.mT @ Q, torch.eye(Q.shape[-1]).expand_as(D))
                        close(D, torch.diag_embed(D.diagonal(dim1=-2, dim2=-1)))
        state = new


def test_compact_of_a_stack() -> None:
    """As many reflections as matrices."""

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return torch.bmm(x[:, None], params["w"]).sin().sum()

    params, batch = {"w": torch.randn(2, 9, 8)}, torch.randn(3, 2, 9)
    small, full = (ekfac(loss_fn, damping=0.1, bases={"w": choice}) for choice in (compact(3), FULL))
    natural, state, _ = small.precondition(params, batch, small.init(params, batch))
    assert all(isinstance(Q, Reflections) for Q in state.bases["w"])
    close_trees(natural, full.precondition(params, batch, full.init(params, batch))[0])


def test_compact_transports_an_averaged_moment_and_compiles() -> None:
    case = make("mlp")
    batch = case.batch(2)
    settings: dict[str, Any] = {"damping": 0.1, "second_moment": averaged_intra_batch(0.8), "basis_every": 2}
    step = ekfac(case.loss_fn, bases={"*": compact(2)}, **settings)
    state = step.init(case.params, batch)
    compiled = torch.compile(step.precondition, fullgraph=True, backend="eager")
    assert any(isinstance(Q, Reflections) for basis in state.bases.values() for Q in basis)
    again = state
    for _ in range(4):
        natural, state, info = step.precondition(case.params, batch, state)
        other, again, _ = compiled(case.params, batch, again)
        close_trees(other, natural)
        assert not info.skipped
        assert info.kept_bases == 0
    moments = {name: moment.value.sum() for name, moment in state.second_moments.items()}
    full = ekfac(case.loss_fn, damping=0.1)
    _, fresh, _ = full.precondition(case.params, batch, full.init(case.params, batch))
    for name, total in moments.items():  # the same batch throughout: E||G||^2, whatever the basis
        close(total, fresh.second_moments[name].value.sum())


def test_compact_over_an_ensemble_and_on_disk(tmp_path: Any) -> None:
    case = make("mlp")
    batch = case.batch(2)
    step = ekfac(case.loss_fn, damping=0.1, bases={"*": compact(2)}, basis_every=2)
    state = step.init(case.params, batch)
    states = pytree.tree_map(lambda t: torch.stack([t, t]), state)
    params = {name: torch.stack([p, 1.1 * p]) for name, p in case.params.items()}
    both, _, _ = torch.func.vmap(step.precondition, (0, None, 0))(params, batch, states)
    for k in range(2):
        alone, new, _ = step.precondition({name: p[k] for name, p in params.items()}, batch, state)
        close_trees({name: d[k] for name, d in both.items()}, alone)
    torch.save(new, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    same_bits(step.precondition(case.params, batch, loaded)[0], step.precondition(case.params, batch, new)[0])


def test_compact_refuses_what_it_cannot_hold() -> None:
    case = make("mlp")
    step = ekfac(case.loss_fn, damping=0.1, bases={"*": compact(2)})
    state = step.init(case.params, case.batch(2))
    with pytest.raises(ValueError, match=r"of '0.weight' has 3 samples.*compact\(2\).*with compact\(3\)"):
        step.precondition(case.params, case.batch(3), state)
    flat = ekfac(lambda p, x: F.linear(x, p["w"]).cos().sum(), damping=0.1, bases={"*": compact(2)})
    narrow = {"w": torch.randn(9, 3)}  # whose inputs are a full side
    with pytest.raises(ValueError, match=r"has 3 samples.*compact\(2\)"):
        flat.precondition(narrow, torch.randn(3, 3), flat.init(narrow, torch.randn(2, 3)))
    with pytest.raises(ValueError, match=r"factor_decay=0\.9 with compact bases"):
        ekfac(case.loss_fn, damping=0.1, bases={"*": compact(2)}, factor_decay=0.9)
    with pytest.raises(ValueError, match="samples=0"):
        compact(0)


@pytest.mark.parametrize("sharing", [expand, reduce])
def test_a_tied_table_in_chunks_with_other_samples_on_each_use(sharing: Any) -> None:
    """The lookup's are then formed and the head's are not."""
    params = {"table": torch.randn(7, 6)}
    batch = torch.randint(0, 7, (5, 3)), torch.randint(0, 7, (5,))

    def loss_fn(params: Params, example: Any) -> Tensor:
        h = F.embedding(example[0], params["table"]).tanh().mean(0)
        return F.cross_entropy(F.linear(h, params["table"]), example[1])

    found = []
    for chunk_size in (None, 2):
        step = ekfac(loss_fn, damping=0.1, bases={"*": rank(2)}, chunk_size=chunk_size, weight_sharing=sharing)
        found.append(step.precondition(params, batch, step.init(params, batch))[0])
    close_trees(found[1], found[0], 1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_basis_of_some_rank_finds_inputs_that_the_old_one_has_no_part_in(decay: float) -> None:
    d, r, params = 200, 16, {"w": torch.randn(5, 200)}

    def batch(first: int) -> Any:
        return F.one_hot(torch.randint(first, first + 10, (64,)), d).double(), torch.randint(0, 5, (64,))

    def loss_fn(params: Params, example: Any) -> Tensor:
        return F.cross_entropy(F.linear(example[0], params["w"]), example[1])

    step = ekfac(loss_fn, damping=1e-3, bases={"*": rank(r)}, factor_decay=decay)
    state = step.init(params, batch(0))
    for first in (0, 100, 100, 100, 100):
        given = batch(first)
        _, state, _ = step.precondition(params, given, state)
    U = state.bases["w"].Q_A[0, :, :-1]
    close(U.T @ U, torch.eye(r))
    seen = given[0].unique(dim=0)
    close(seen @ U @ U.T, seen, 1e-6 if decay == 0 else 1e-2)
