"""A basis is always finite and orthonormal, whatever the factor and the eigensolver."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ekfac_func import (
    FULL,
    SecondMoment,
    compact,
    ekfac,
    expand,
    intra_batch,
    kfac,
    rank,
    reduce,
    refreshes,
    thin,
)
from ekfac_func import basis as eigenbasis
from ekfac_func.kronecker import symmetric
from ekfac_func.types import Basis, Factors, Gram, Layer, Means, Params

from .cases import N, every_case_and_table, make
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
    for C, U in zip(factors, refreshes.eigenvectors(factors), strict=True):
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

    monkeypatch.setattr(refreshes, "eigensolver", solver)
    first_is_largest, other = (torch.diag(torch.tensor(d)).float() for d in ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]))
    (U,) = refreshes.eigenvectors([torch.stack([first_is_largest, other])])
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
        monkeypatch.setattr("ekfac_func.kronecker.FEW", few)
        found[few] = step.precondition(case.params, batch, initial)
        assert found[few][2].kept_bases == 0
    (natural, state, _), (other, new, _) = found.values()
    close_trees(other, natural, 1e-8)
    close_trees(new.factors, state.factors, 1e-12)


@pytest.mark.parametrize("factor_decay", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_wide_layer_solves_no_more_than_its_samples(factor_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 inputs and 5 examples; an average of factors has more, and is solved whole. Compiled as eager."""
    solved = []

    def solver(C: Tensor) -> tuple[Tensor, Tensor]:
        solved.append(C.shape[-1])
        return torch.linalg.eigh(C)

    monkeypatch.setattr(refreshes, "eigensolver", solver)
    params = {"w": torch.randn(4, 400) / 20}
    step = ekfac(lambda p, x: (p["w"] @ x).cos().sum(), damping=1e-2, factor_decay=factor_decay, basis_every=2)
    state = step.init(params, torch.randn(5, 400))
    fast = torch.compile(step.precondition, fullgraph=True, backend="eager")
    for n in (5, 7, 256):
        batch = torch.randn(n, 400)
        close_trees(fast(params, batch, state)[0], step.precondition(params, batch, state)[0], 1e-7)
        _, state, _ = step.precondition(params, batch, state)
    assert (400 in solved) == (factor_decay > 0)
    assert (5 in solved) == (factor_decay == 0)


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
    monkeypatch.setattr(refreshes, "eigensolver", solver)
    natural, state, info = precondition(case.params, batch, good)
    assert not info.skipped
    assert info.kept_bases == 2 * 2 + 2  # A and B of two groups, and of the head
    same_bits(state.bases, good.bases)
    assert all(torch.isfinite(p).all() for p in natural.values())
    first, state, info = precondition(case.params, batch, step.init(case.params, batch))
    same_bits(state.bases, step.init(case.params, batch).bases)
    assert all(torch.isfinite(p).all() for p in first.values())


def test_one_failing_block_does_not_take_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refreshes, "eigensolver", raises_on_near_ones)
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
