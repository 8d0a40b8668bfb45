"""Processes of uneven shares step as one process does on the whole batch."""

import datetime
import functools
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.func import functional_call
from torch.multiprocessing.spawn import spawn
from torch.utils import _pytree as pytree

from ekfac_func import (
    RULES,
    SUA,
    EKFACOptimizer,
    Fisher,
    Ranks,
    averaged_intra_batch,
    blocks,
    compact,
    ekfac,
    exact,
    kfac,
    qr,
    rank,
    ranks,
    reduce,
    running_average,
    staggered,
    thin,
)
from ekfac_func.distributed import _all_reduce, of_first
from ekfac_func.optim import relative
from ekfac_func.types import Params, State

from .cases import Case, classifier, make
from .oracles import close_trees, same_bits

N, STEPS = 64, 5  # samples enough for factors of full rank, whose eigenbases are the same in every program
SHARES = (27, 37)

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "averages": {"second_moment": averaged_intra_batch(0.8), "factor_decay": 0.7, "refresh": qr(), "moment_every": 2},
    "running": {"second_moment": running_average(0.8), "damping": relative(0.1), "exponent": -0.5},
    "kfac": {"second_moment": kfac, "weight_sharing": reduce, "bases": {"*": blocks(3)}},
    "rank": {"bases": {"*": rank(2)}, "refresh": staggered(2)},
    "chunks": {"chunk_size": 5, "rules": {**RULES, **SUA}},
}
CASES = ("positions", "conv", "tied", "experts by ids", "layer norm", "penalty", "einsum")
SINGULAR = ("deep", "conv groups", "conv depthwise")  # whose null spaces are a matter of rounding: with new bases


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def of_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def scaled_loss(model: nn.Module, batch: Any) -> Tensor:
    return of_loss(model, batch) * model.get_buffer("scale")


def batches(case: Case) -> list[Any]:
    torch.manual_seed(1)
    return [case.batch(N) for _ in range(STEPS)]


def shared(batch: Any, of: int | None) -> Any:
    """What a process sees of a batch; None is all."""
    start = 0 if of is None else sum(SHARES[:of])
    length = N if of is None else SHARES[of]
    return pytree.tree_map(lambda leaf: leaf[start : start + length], batch)


def steps(
    case: Case, of: int | None, options: dict[str, Any], compiled: bool = False, nan_at: int | None = None
) -> tuple[list[Any], State]:
    """Naturals, gradients, losses and second moments of some steps."""
    step = ekfac(case.loss_fn, **{"damping": 0.1, "basis_every": 2, **options}, ranks=None if of is None else ranks())
    precondition = torch.compile(step.precondition, fullgraph=True, backend="eager") if compiled else step.precondition
    params, found = case.params, []
    state = step.init(params, shared(batches(case)[0], of))
    for t, batch in enumerate(batches(case)):
        share = shared(batch, of)
        if t == nan_at and of == 1:
            share = pytree.tree_map(lambda leaf: leaf * torch.nan if leaf.is_floating_point() else leaf, share)
        natural, state, info = precondition(params, share, state)
        found.append((natural, info.gradient, info.loss, info.skipped, state.second_moments))
        params = {name: p - 0.01 * natural[name] for name, p in params.items()}
    return found, state


def exact_fisher() -> Fisher:
    module = net()

    def model(params: Params, example: Any) -> Tensor:
        logits: Tensor = functional_call(module, params, (example[0],))
        return logits

    return exact(model, lambda z: Categorical(logits=z))


def lengths(of: int | None) -> Any:
    """The trace of an exact Fisher where the examples of one process are shorter than those of the other."""

    def model(params: Params, example: Any) -> Tensor:
        return example[0] @ params["w"]

    def loss_fn(params: Params, example: Any) -> Tensor:
        return F.cross_entropy(model(params, example), example[1], reduction="sum")

    torch.manual_seed(2)
    params, x, y = {"w": torch.randn(4, 3)}, torch.randn(N, 6, 4), torch.randint(0, 3, (N, 6))
    x[: SHARES[0], 2:] = 0  # has no gradient, so that one process may see it
    share = shared((x, y), of)
    if of == 0:
        share = pytree.tree_map(lambda leaf: leaf[:, :2], share)
    fisher = exact(model, lambda z: Categorical(logits=z))
    step = ekfac(loss_fn, damping=0.1, fisher=fisher, ranks=None if of is None else ranks())
    _, state, info = step.precondition(params, share, step.init(params, share))
    return state.second_moments["w"].value.sum(), info.gradient


def optimized(kind: str, of_all: list[Any], of: int | None) -> Any:
    """Losses and model of an optimizer whose process, the second, begins with another model than the first has."""
    model = net()
    model.register_buffer("scale", torch.ones(()))
    model.register_buffer("seen", torch.tensor(True))
    model.register_buffer("small", torch.tensor([3, 4], dtype=torch.int16))
    model.register_buffer("one", torch.ones(1).expand(3))
    model.register_buffer("phase", torch.tensor([1 + 2j]))
    next(model.parameters()).requires_grad_(kind != "frozen")
    optimizer = EKFACOptimizer(model, scaled_loss, lr=0.1, damping=0.1, ranks=None if of is None else ranks())
    if kind == "loaded":
        before = EKFACOptimizer(net().train(), of_loss, lr=0.1, damping=0.1)
        before.step(of_all[0])
        optimizer.load_state_dict(before.state_dict())
    if of == 1:
        for t in (*model.parameters(), model.get_buffer("scale"), model.get_buffer("phase")):
            t.data = torch.randn_like(t)
        model.get_buffer("seen").logical_not_()
        model.get_buffer("small").neg_()
    losses = [optimizer.step(shared(batch, of)) for batch in of_all]
    return losses, pytree.tree_map(lambda t: torch.view_as_real(t) if t.is_complex() else t, dict(model.state_dict()))


def everything(of: int | None) -> dict[str, Any]:
    """All that the tests look at, from one process of several or from one alone."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, key in zip(CASES, itertools.cycle(OPTIONS), strict=False):
        found[f"{name}, {key}"] = steps(make(name), of, OPTIONS[key])[0]
    for name in SINGULAR:
        found[name] = steps(make(name), of, {"basis_every": 1})[0]
    case = classifier(net(), 4)
    found["exact"] = steps(case, of, {"fisher": exact_fisher(), "chunk_size": 8})[0]
    found["lengths"] = lengths(of)
    found["compiled"] = steps(case, of, {"second_moment": averaged_intra_batch(0.9)}, compiled=of == 0)[0]
    found["skipped"] = steps(case, of, {}, nan_at=2)
    for kind in ("trained", "frozen", "loaded"):
        found[f"optimizer, {kind}"] = optimized(kind, batches(case), of)
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), found)


def process(of: int, at: str) -> None:
    meeting, limit = f"file://{at}/meeting", datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=meeting, rank=of, world_size=len(SHARES), timeout=limit)
    torch.save(everything(of), f"{at}/{of}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    at = tmp_path_factory.mktemp("ranks")
    spawn(process, (str(at),), nprocs=len(SHARES))
    return [torch.load(at / f"{of}.pt", weights_only=False) for of in range(len(SHARES))]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return everything(None)


def test_every_process_has_what_one_has_of_the_whole_batch(found: list[Any], alone: dict[str, Any]) -> None:
    for key, expected in alone.items():
        if key != "skipped":
            for one in found:
                close_trees(one[key], expected, 1e-8)


def test_a_share_that_is_not_finite_skips_the_step_in_every_process(found: list[Any], alone: dict[str, Any]) -> None:
    for one in found:
        at_steps, state = one["skipped"]
        assert [bool(skipped) for *_, skipped, _ in at_steps] == [False, False, True, False, False]
        assert state.step == STEPS
        close_trees(at_steps[:2], alone["skipped"][0][:2], 1e-8)
        natural, *_, moments = at_steps[2]
        assert not any(p.any() for p in natural.values())
        same_bits(moments, at_steps[1][-1])


def test_all_processes_have_the_same_bits(found: list[Any]) -> None:
    same_bits(*(pytree.tree_map_only(Tensor, torch.nan_to_num, one) for one in found))


def test_bases_are_those_of_the_first_process() -> None:
    tree = {"Q": torch.randn(2, 3), "kept": torch.tensor(1)}
    same_bits(of_first(tree, Ranks(lambda t: t, first=True)), tree)
    same_bits(of_first(tree, Ranks(lambda t: t, first=False)), pytree.tree_map(torch.zeros_like, tree))


def test_kept_bases_are_those_of_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that is not the first, in a world without others, so that nothing is kept."""
    case = make("deep")
    monkeypatch.setattr("ekfac_func.solvers.eigensolver", lambda C: (C, C * torch.nan))
    for first, kept in ((True, True), (False, False)):
        step = ekfac(case.loss_fn, damping=0.1, ranks=Ranks(lambda t: t, first))
        _, _, info = step.precondition(case.params, case.batch(4), step.init(case.params, case.batch(4)))
        assert bool(info.kept_bases > 0) == kept


def test_ranks_of_the_world_are_pickled() -> None:
    world = Ranks(functools.partial(_all_reduce, None), first=True)
    assert pickle.loads(pickle.dumps(world)).first


def test_refusals(tmp_path: Path) -> None:
    case = make("deep")
    with pytest.raises(RuntimeError, match=r"no process group: call torch\.distributed\.init_process_group"):
        ranks()
    with pytest.raises(TypeError, match=r"ranks is a function: pass ranks\(\)"):
        ekfac(case.loss_fn, damping=0.1, ranks=ranks)  # type: ignore[arg-type]
    one = Ranks(lambda t: t, first=True)
    for choice in (thin, compact(4)):
        with pytest.raises(ValueError, match=r"thin or compact bases: .*of one process"):
            ekfac(case.loss_fn, damping=0.1, bases={"*": choice}, ranks=one)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"this process is not in group: call ranks\(group\)"):
            ranks(dist.GroupMember.NON_GROUP_MEMBER)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"DistributedDataParallel.*pass model\.module and ranks="):
            EKFACOptimizer(nn.parallel.DistributedDataParallel(net()), of_loss)
    finally:
        dist.destroy_process_group()
