"""How a basis is found: finite and orthonormal whatever the factor and the eigensolver, by every kind of refresh."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ekfac_func import (
    EKFAC,
    FULL,
    Refresh,
    SecondMoment,
    State,
    adaptive,
    averaged_intra_batch,
    blocks,
    compact,
    eigh,
    ekfac,
    expand,
    intra_batch,
    kfac,
    qr,
    rank,
    reduce,
    refreshes,
    solvers,
    staggered,
    thin,
)
from ekfac_func import basis as eigenbasis
from ekfac_func.factors import symmetric
from ekfac_func.types import Basis, Factors, Gram, Layer, Means, Params

from .cases import Case, N, every_case_and_table, make, wide
from .oracles import close, close_trees, same_bits

HARD = Path(__file__).parent / "data" / "hard_factors.pt"


def low_rank(rank: int, dim: int) -> Tensor:
    X = torch.randn(rank, dim)
    return X.T @ X


def dead_units() -> Tensor:
    X = torch.randn(50, 24).relu() * (torch.arange(24) % 3 > 0)
    return X.T @ X / 50


FACTORS: dict[str, Callable[[], Tensor]] = {
    "file": lambda: torch.load(HARD, weights_only=True)["nan"],
    "zero": lambda: torch.zeros(16, 16),
    "rank one": lambda: low_rank(1, 16),
    "tiny": lambda: low_rank(20, 16) * 1e-30,
    "huge": lambda: low_rank(20, 16).float() * 1e30,
    "repeated": lambda: torch.diag(torch.tensor([2.0] * 8 + [1.0] * 8)),
    "identity": lambda: torch.eye(16),
    "dead units": dead_units,
    "asymmetric": lambda: low_rank(20, 16) + 1e-9 * torch.randn(16, 16),
    "not finite": lambda: low_rank(20, 16).index_fill(0, torch.tensor([3]), torch.nan),
    "infinite": lambda: low_rank(20, 16).index_fill(1, torch.tensor([3]), torch.inf),
}


def assert_orthonormal(Q: Tensor) -> None:
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype).expand_as(Q)
    assert torch.isfinite(Q).all()
    assert (Q.mT @ Q - eye).abs().max() < 100 * torch.finfo(Q.dtype).eps


class Counted:
    """An eigensolver that counts the matrices that it solves."""

    def __init__(self) -> None:
        self.solved: list[tuple[int, torch.dtype]] = []

    def __call__(self, C: Tensor) -> Any:
        self.solved += [(C.shape[-1], C.dtype)] * C.shape[:-2].numel()
        return torch.linalg.eigh(C)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    solver = Counted()
    monkeypatch.setattr(solvers, "eigensolver", solver)
    return solver


def refresh(C: Tensor) -> tuple[Basis, int]:
    C = C[None] if C.dim() == 2 else C
    b, dim, _ = C.shape
    layer = Layer("w", None, (b, dim, dim, 1), (b, dim, dim, 1), (0, 1, 2, 3), (b, dim, dim), ())
    old = eigenbasis.identity(layer, eigenbasis.FULL, C)
    bases, kept = refreshes.refresh_bases({"w": Factors(C, C, torch.ones(()))}, {"w": old})
    return bases["w"], int(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FACTORS)
def test_hard_factors(name: str, dtype: torch.dtype) -> None:
    C = FACTORS[name]().to(dtype)
    basis, kept = refresh(C)
    assert kept == 0
    assert basis.Q_A.dtype == dtype
    assert_orthonormal(basis.Q_A)
    if torch.isfinite(C).all() and C.abs().max() > 0:
        C = C.double() / C.abs().max().double()
        D = basis.Q_A[0].double().T @ ((C + C.T) / 2) @ basis.Q_A[0].double()
        assert (D - torch.diag(D.diagonal())).abs().max() < 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("d", [1, 255, 256, 801])
def test_a_symmetric_product_in_strips(d: int) -> None:
    x = torch.randn(2, 40, d)
    close(symmetric(x), x.mT @ x)
    close(symmetric(x.float()).double(), x.mT @ x, 1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_matrices_of_all_sizes_together(threads: int) -> None:
    """Each as by itself, in its dtype, whether it has a thread of its own, all of them, or is one of a batch."""
    torch.set_num_threads(threads)
    sizes = [(3, 2, 2), (120, 120), (2, 100, 100), (7, 7), (0, 5, 5), (260, 260), (110, 110), (1, 1)]
    factors = [C + C.mT for C in (torch.randn(size) for size in sizes)]
    factors[3] = factors[3].float()
    for C, U in zip(factors, solvers.eigenvectors(factors), strict=True):
        assert U.shape == C.shape
        assert U.dtype == C.dtype
        if C.numel():
            assert_orthonormal(U)
            D = U.mT @ C @ U
            assert (D - torch.diag_embed(D.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-5
    assert torch.get_num_threads() == threads


def test_what_float32_cannot_solve_is_solved_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor by itself; the others of its batch stay in float32, and a dtype that is asked for is the first."""
    solved = []

    def solver(C: Tensor) -> tuple[Tensor, Tensor]:
        solved.append((C.dtype, C.shape[:-2].numel()))
        values, vectors = torch.linalg.eigh(C)
        bad = (C.dtype is torch.float32) & (C.amax((-2, -1), keepdim=True) == C[..., :1, :1])
        return values, torch.where(bad, torch.nan, vectors)

    monkeypatch.setattr(solvers, "eigensolver", solver)
    first_is_largest, other = (torch.diag(torch.tensor(d)).float() for d in ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]))
    (U,) = solvers.eigenvectors([torch.stack([first_is_largest, other])])
    assert U.dtype is torch.float32
    assert_orthonormal(U)
    assert solved == [(torch.float32, 2), (torch.float32, 1), (torch.float64, 1), (torch.float32, 1)]


SAMPLES: dict[str, Callable[[], Tensor]] = {
    "few": lambda: torch.randn(2, 5, 24),
    "as many": lambda: torch.randn(1, 24, 24),
    "more": lambda: torch.randn(1, 40, 24),
    "repeated": lambda: torch.randn(1, 3, 24).repeat(1, 4, 1),
    "zero": lambda: torch.zeros(2, 5, 24),
    "one zero": lambda: torch.randn(1, 5, 24).index_fill(1, torch.tensor([2]), 0.0),
    "tiny": lambda: torch.randn(1, 5, 24) * 1e-30,
    "not finite": lambda: torch.randn(1, 5, 24).index_fill(2, torch.tensor([3]), torch.nan),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SAMPLES)
def test_eigenvectors_from_samples(name: str, dtype: torch.dtype) -> None:
    """As those of the factor: orthonormal, ascending, and diagonal in them."""
    x = SAMPLES[name]().to(dtype)
    old = torch.eye(24, dtype=dtype).repeat(len(x), 1, 1)
    bases, kept = refreshes.refresh_bases({"w": Means(Gram(x), Gram(x), 1)}, {"w": Basis(old, old)})
    basis = bases["w"]
    assert kept == 0
    assert_orthonormal(basis.Q_A)
    if torch.isfinite(x).all() and x.abs().max() > 0:
        x = x.double() / x.abs().max().double()
        C = x.mT @ x
        D = basis.Q_A.double().mT @ C @ basis.Q_A.double()
        values = D.diagonal(dim1=1, dim2=2)
        assert (D - torch.diag_embed(values)).abs().max() < 1e3 * torch.finfo(dtype).eps
        close(values, torch.linalg.eigvalsh(C), 1e3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("estimator", [intra_batch, kfac], ids=["intra_batch", "kfac"])
@every_case_and_table
def test_a_step_from_samples(name: str, rules: Any, estimator: SecondMoment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a factor is left as its samples, however many, the step is that where each is multiplied out."""
    case = make(name)
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2, second_moment=estimator, rules=rules)
    initial = step.init(case.params, batch)
    found = {}
    for few in (0, math.inf):
        monkeypatch.setattr("ekfac_func.factors.FEW", few)
        found[few] = step.precondition(case.params, batch, initial)
        assert found[few][2].kept_bases == 0
    (natural, state, _), (other, new, _) = found.values()
    close_trees(other, natural, 1e-8)
    close_trees(new.factors, state.factors, 1e-12)


@pytest.mark.parametrize("factor_decay", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_wide_layer_solves_no_more_than_its_samples(factor_decay: float, counted: Counted) -> None:
    """Of 400 inputs and 5 examples; an average of factors has more, and is solved whole. Compiled as eager."""
    params = {"w": torch.randn(4, 400) / 20}
    step = ekfac(lambda p, x: (p["w"] @ x).cos().sum(), damping=1e-2, factor_decay=factor_decay, basis_every=2)
    state = step.init(params, torch.randn(5, 400))
    fast = torch.compile(step.precondition, fullgraph=True, backend="eager")
    for n in (5, 7, 256):
        batch = torch.randn(n, 400)
        close_trees(fast(params, batch, state)[0], step.precondition(params, batch, state)[0], 1e-7)
        _, state, _ = step.precondition(params, batch, state)
    sizes = {d for d, _ in counted.solved}
    assert (400 in sizes) == (factor_decay > 0)
    assert (5 in sizes) == (factor_decay == 0)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("choice", "sharing"),
    [(FULL, expand), (FULL, reduce), (rank(2), expand), (thin, expand), (compact(5), expand)],
    ids=["full", "full, reduce", "rank", "thin", "compact"],
)
@pytest.mark.parametrize("i", [3, 300])
def test_a_layer_that_no_position_uses(i: int, choice: Any, sharing: Any, compiled: bool) -> None:
    """The others step as without it."""

    def loss_fn(params: Params, example: Any) -> Tensor:
        unused, used = example
        return F.linear(unused, params["w"]).cos().sum() + F.linear(used, params["v"]).cos().sum()

    params, batch = {"w": torch.randn(4, i), "v": torch.randn(2, 3)}, (torch.randn(5, 0, i), torch.randn(5, 3))
    step = ekfac(loss_fn, damping=1e-2, bases={"w": choice}, weight_sharing=sharing)
    call = torch.compile(step.precondition, fullgraph=True, backend="eager") if compiled else step.precondition
    natural, state, info = call(params, batch, step.init(params, batch))
    assert not info.skipped
    assert natural["w"].abs().max() == 0
    if choice is FULL and sharing is expand:  # there are no samples, not even zeros
        assert torch.equal(state.bases["w"].Q_A[0], torch.eye(i))
    alone = ekfac(lambda p, x: F.linear(x, p["v"]).cos().sum(), damping=1e-2)
    only = {"v": params["v"]}
    close(natural["v"], alone.precondition(only, batch[1], alone.init(only, batch[1]))[0]["v"])


def test_a_wide_layer_under_vmap() -> None:
    """An ensemble equals its members, each with the eigenvectors of its own samples."""
    params, batches = {"w": torch.randn(2, 4, 300) / 17}, torch.randn(2, 5, 300)
    step = ekfac(lambda p, x: (p["w"] @ x).cos().sum(), damping=1e-2)
    state = step.init({"w": params["w"][0]}, batches[0])

    def natural(params: Params, batch: Tensor) -> Params:
        return step.precondition(params, batch, state)[0]

    found = torch.vmap(natural)(params, batches)
    for member in range(2):
        close(found["w"][member], natural({"w": params["w"][member]}, batches[member])["w"])


def nan_vectors(C: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(C)
    return values, vectors * torch.nan


def skewed_vectors(C: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(C)
    return values, vectors + 1e-3


def raises(C: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("linalg.eigh: the algorithm failed to converge")


def raises_on_near_ones(C: Tensor) -> tuple[Tensor, Tensor]:
    """Fails for a batch as a whole, and again for the one matrix in it whose entries are all near 1."""
    return raises(C) if C.dim() == 3 or C.min() > 0.9 else torch.linalg.eigh(C)


@pytest.mark.parametrize("solver", [nan_vectors, skewed_vectors, raises])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_a_failing_solver_keeps_the_old_basis(solver: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("conv groups")
    batch = case.batch(N)
    step = ekfac(case.loss_fn, damping=1e-2)
    precondition = (
        torch.compile(step.precondition, fullgraph=True, backend="aot_eager") if compiled else step.precondition
    )
    _, good, _ = precondition(case.params, batch, step.init(case.params, batch))
    monkeypatch.setattr(solvers, "eigensolver", solver)
    natural, state, info = precondition(case.params, batch, good)
    assert not info.skipped
    assert info.kept_bases == 2 * 2 + 2  # A and B of two groups, and of the head
    same_bits(state.bases, good.bases)
    assert all(torch.isfinite(p).all() for p in natural.values())
    first, state, info = precondition(case.params, batch, step.init(case.params, batch))
    same_bits(state.bases, step.init(case.params, batch).bases)
    assert all(torch.isfinite(p).all() for p in first.values())


def test_one_failing_block_does_not_take_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "eigensolver", raises_on_near_ones)
    C = torch.stack([low_rank(20, 8), 1 - 1e-3 * (1 - torch.eye(8)), low_rank(20, 8)])
    basis, kept = refresh(C)
    assert kept == 2  # the second block, on both sides
    assert_orthonormal(basis.Q_A)
    close(basis.Q_A[1], torch.eye(8))
    D = basis.Q_A[0].T @ C[0] @ basis.Q_A[0]
    assert (D - torch.diag(D.diagonal())).abs().max() < 1e-12 * D.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_of_one(dtype: torch.dtype) -> None:
    case = make("conv")
    params = {name: p.to(dtype) for name, p in case.params.items()}
    x, y = case.batch(1)

    def loss_fn(params: Any, example: Any) -> Tensor:
        return case.loss_fn(params, (example[0].to(dtype), example[1]))

    step = ekfac(loss_fn, damping=1e-2)
    natural, state, info = step.precondition(params, (x, y), step.init(params, (x, y)))
    assert not info.skipped
    assert info.kept_bases == 0
    for basis in state.bases.values():
        assert_orthonormal(basis.Q_A)
        assert_orthonormal(basis.Q_B)
    assert all(torch.isfinite(p).all() for p in natural.values())


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_extreme_gradients_in_float32(scale: float) -> None:
    """Factors of 1e-30 and 1e30, whose product of eigenvalues leaves the range of float32."""
    params = {"w": torch.randn(8, 6).float()}

    def loss_fn(params: Any, x: Tensor) -> Tensor:
        return scale * torch.nn.functional.linear(x * scale, params["w"]).sum()

    batch = torch.randn(10, 6).float()
    step = ekfac(loss_fn, damping=1e-2, second_moment=kfac)
    natural, state, info = step.precondition(params, batch, step.init(params, batch))
    assert info.kept_bases == 0
    for value in (natural["w"], state.second_moments["w"].value, state.bases["w"].Q_A):
        assert torch.isfinite(value).all()


def run(step: EKFAC, case: Case, batches: list[Any], compiled: bool = False) -> list[State]:
    precondition = step.precondition
    if compiled:
        precondition = torch.compile(precondition, fullgraph=True, backend="eager")
    states = [step.init(case.params, batches[0])]
    for batch in batches:
        states.append(precondition(case.params, batch, states[-1])[1])
    return states


def off_diagonal(C: Tensor, Q: Tensor) -> float:
    D = Q.mT @ C @ Q
    return float((D - torch.diag_embed(D.diagonal(dim1=-2, dim2=-1))).norm() / D.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigh_in_a_dtype(dtype: torch.dtype, counted: Counted) -> None:
    case = make("conv groups")
    batch = case.batch(40)
    _, state = run(ekfac(case.loss_fn, damping=1e-2, refresh=eigh(dtype)), case, [batch])
    assert {of for _, of in counted.solved} == {dtype}
    for name, (Q_A, _) in state.bases.items():
        assert off_diagonal(state.factors[name].A, Q_A) < (1e-5 if dtype is torch.float32 else 1e-12)


def test_qr_converges_and_stays_in_place(counted: Counted) -> None:
    """From an eigh at the first step; to the eigenvectors of a factor that holds still, each where it was."""
    case = make("mlp")
    first, then = case.batch(60), case.batch(60)
    step = ekfac(case.loss_fn, damping=1e-2, refresh=qr(iterations=3))
    states = run(step, case, [first, *[then] * 80])
    assert len(counted.solved) == 4
    for name in states[-1].bases:
        for Q, C in zip(states[-1].bases[name], states[-1].factors[name][:2], strict=True):
            close(Q.mT @ Q, torch.eye(Q.shape[-1]).expand_as(Q))
            assert off_diagonal(C, Q) < 1e-5
    still = run(step, case, [first] * 3)
    for name in still[1].bases:
        for old, new, C in zip(still[1].bases[name], still[3].bases[name], still[3].factors[name][:2], strict=True):
            values = torch.linalg.eigvalsh(C)
            full_rank = values[0] > 1e-9 * values[0, -1]
            close((old * new).sum(-2).abs()[0, full_rank], torch.ones(int(full_rank.sum())))


def test_qr_puts_each_column_back_where_it_was() -> None:
    """Also where the order of the eigenvalues, here a cycle of three, is not its own inverse."""
    C = torch.diag(torch.tensor([1.0, 3.0, 2.0])) + 0.01
    (Q,) = qr(4).solve([C], [torch.eye(3)], False)
    assert torch.equal(Q.abs().argmax(0), torch.arange(3))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_adaptive_solves_what_the_old_basis_does_not_diagonalise(compiled: bool, counted: Counted) -> None:
    case = make("mlp")
    batch = case.batch(60)
    other = case.batch(60)
    step = ekfac(case.loss_fn, damping=1e-2, refresh=adaptive(0.05))
    torch._dynamo.utils.counters.clear()
    states = run(step, case, [batch, batch], compiled)
    assert len(counted.solved) == 4
    same_bits(states[1].bases, states[2].bases)
    solved = 0
    new = step.precondition(case.params, other, states[2])[1]
    for name, basis in states[2].bases.items():
        for Q, now, C in zip(basis, new.bases[name], new.factors[name][:2], strict=True):
            stale = off_diagonal(C, Q) > 0.05
            solved += stale
            assert stale == (not torch.equal(Q, now))
            assert off_diagonal(C, now) <= 0.05
    assert 0 < solved == len(counted.solved) - 4


@pytest.mark.parametrize("choice", [FULL, rank(3), compact(6)], ids=str)
@pytest.mark.parametrize("how", [eigh(torch.float64), adaptive(0.0, torch.float64)], ids=lambda how: how.name)
def test_a_state_in_float32_of_what_is_solved_in_float64(how: Refresh, choice: Any, counted: Counted) -> None:
    loss_fn, params, batch = wide()
    params, batch = {name: p.float() for name, p in params.items()}, batch.float()
    step = ekfac(loss_fn, damping=1e-2, refresh=how, bases={"*": choice})
    _, state, _ = step.precondition(params, batch, step.init(params, batch))
    made = step.precondition(params, batch, state)
    assert made[2].kept_bases == 0
    assert {of for _, of in counted.solved} == {torch.float64}
    assert {t.dtype for t in pytree.tree_leaves(made[:2]) if isinstance(t, Tensor)} == {torch.float32}


def test_adaptive_solves_no_wide_layer_again(counted: Counted) -> None:
    """Whose factors would else be left to a problem in the span of their samples."""
    loss_fn, params, batch = wide()
    step = ekfac(loss_fn, damping=1e-2, refresh=adaptive(0.05))
    _, state, _ = step.precondition(params, batch, step.init(params, batch))
    assert [d for d, _ in counted.solved] == [41, 30]
    step.precondition(params, batch, state)
    assert len(counted.solved) == 2


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("of", [eigh(), qr(), adaptive(0.0)], ids=["eigh", "qr", "adaptive"])
def test_staggered(of: Refresh, compiled: bool) -> None:
    """All layers at the first step, then each of them once in basis_every steps, no step all; few graphs."""
    case = make("deep")
    batches = [case.batch(20) for _ in range(20)]
    step = ekfac(
        case.loss_fn, damping=1e-1, second_moment=averaged_intra_batch(0.5), basis_every=6, refresh=staggered(3, of)
    )
    torch._dynamo.utils.counters.clear()
    states = run(step, case, batches, compiled)
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
    fresh: dict[int, set[str]] = {}
    for t, (old, new) in enumerate(itertools.pairwise(states)):
        fresh[t] = {name for name in new.bases if not torch.equal(old.factors[name].A, new.factors[name].A)}
        changed = {name for name in new.bases if not torch.equal(old.bases[name].Q_A, new.bases[name].Q_A)}
        assert changed <= fresh[t]
        assert all(new.second_moments[name].weight > 0.49 for name in new.bases)
    assert fresh[0] == set(case.params) - {name for name in case.params if name.endswith("bias")}
    for t in range(1, 20):
        assert fresh[t] == fresh[t % 6 or 6]
        assert (len(fresh[t]) > 0) == (t % 2 == 0)
    assert fresh[2] | fresh[4] | fresh[6] == fresh[0]
    assert sum(len(fresh[t]) for t in (2, 4, 6)) == len(fresh[0])
    assert max(len(fresh[t]) for t in (2, 4, 6)) <= 3


@pytest.mark.slow
def test_number_of_graphs_of_staggered_refreshes() -> None:
    """The first step, none, and one for each group; one more once the step number is not a constant."""
    case = make("mlp")
    batches = [case.batch(20) for _ in range(20)]
    step = ekfac(case.loss_fn, damping=1e-1, basis_every=4, refresh=staggered(2))
    torch._dynamo.utils.counters.clear()
    states = run(step, case, batches, compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5
    for old, new in zip(states, run(step, case, batches), strict=True):
        close_trees(old.factors, new.factors, 1e-8)


def test_a_group_with_nothing_to_rotate_beside_a_compact_layer() -> None:
    params = {"w": torch.randn(20, 20), "s": torch.randn(())}
    batch = torch.randn(4, 20)
    step = ekfac(
        lambda p, x: F.linear(x, p["w"]).cos().sum() * p["s"],
        damping=1e-1,
        basis_every=2,
        refresh=staggered(2),
        bases={"w": compact(4)},
    )
    state = step.init(params, batch)
    for _ in range(3):
        _, state, info = step.precondition(params, batch, state)
        assert info.kept_bases == 0


def test_staggered_groups_are_even() -> None:
    sizes = [("a", (1, 100, 100, 1)), ("b", (1, 80, 80, 1)), ("c", (1, 80, 60, 1)), ("d", (2, 50, 60, 1))]
    groups = refreshes._grouped(tuple(sizes), 2)
    cost = [sum(b * (o**3 + i**3) for name, (b, o, i, _) in sizes if name in group) for group in groups]
    assert max(cost) < 1.3 * min(cost)


@pytest.mark.parametrize("refresh", [eigh(torch.float32), qr(2), adaptive(0.0), staggered(2)], ids=lambda r: r.name)
def test_every_refresh_keeps_what_it_cannot_solve(refresh: Refresh, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("conv groups")
    batches = [case.batch(N) for _ in range(2)]
    step = ekfac(case.loss_fn, damping=1e-2, refresh=refresh, basis_every=2, bases={"0.*": blocks(3)})
    state = step.init(case.params, batches[0])
    _, good, info = step.precondition(case.params, batches[0], state)
    assert info.kept_bases == 0
    monkeypatch.setattr(solvers, "eigensolver", lambda C: (C, C * torch.nan))
    monkeypatch.setattr(torch.linalg, "qr", lambda C, _=torch.linalg.qr: _(C * torch.nan))
    good = State(2, good.factors, good.bases, good.second_moments)
    natural, state, info = step.precondition(case.params, batches[1], good)
    assert info.kept_bases > 0
    same_bits(state.bases, good.bases)
    assert all(p.isfinite().all() for p in natural.values())


def test_what_is_no_refresh() -> None:
    loss_fn, _, _ = wide()
    for make_one, message in (
        (lambda: qr(0), "iterations=0"),
        (lambda: adaptive(1.0), "tolerance=1.0"),
        (lambda: adaptive("much"), "tolerance='much'"),  # type: ignore[arg-type]
        (lambda: staggered(5), "groups=5.*2 to 4"),
        (lambda: eigh(torch.int64), "dtype=torch.int64"),
        (lambda: ekfac(loss_fn, damping=1.0, refresh=staggered(3), basis_every=2), "basis_every >= 3"),
    ):
        with pytest.raises(ValueError, match=message):
            make_one()
    with pytest.raises(TypeError, match=r"refresh=.*eigh\(\)"):
        ekfac(loss_fn, damping=1.0, refresh=eigh)  # type: ignore[arg-type]
