"""compare and the dense references against blocks that are formed in full, from loops over the examples."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, Normal
from torch.func import functional_call
from torch.utils import _pytree as pytree

import ekfac_func.reference as reference
from ekfac_func import (
    ESTIMATORS,
    RULES,
    SUA,
    Estimator,
    Moment,
    Record,
    SecondMoment,
    Seen,
    averaged_intra_batch,
    compare,
    ekfac,
    exact,
    exact_sums,
    fisher_blocks,
    ggn_blocks,
    gradient,
    intra_batch,
    keep,
    kfac,
    own_coordinates,
    running_average,
    sampled,
    split_batch,
    summarise,
)
from ekfac_func.capture import capture
from ekfac_func.discovery import Options
from ekfac_func.types import Basis, Layer, Number, Params

from .cases import Case, every_case, function, make
from .oracles import blocks, close, examples, loop, side

DAMPING = 0.05
SMALL = pytest.mark.parametrize("name", ["mlp", "conv groups", "positions", "transposed", "reused"])


def joined(batches: list[Any]) -> Any:
    return pytree.tree_map(lambda *leaves: torch.cat(leaves), *batches)


def dense(case: Case, batch: Any, layer: Layer) -> Tensor:
    """`[n b d]` by a loop over the examples."""
    return blocks(loop(case.loss_fn, case.params, batch)[1], layer).flatten(2)


def fisher(case: Case, batch: Any, layer: Layer) -> Tensor:
    G = dense(case, batch, layer)
    return torch.stack([G[:, b].T @ G[:, b] / len(G) for b in range(G.shape[1])])


def rotation(basis: Basis, layer: Layer) -> Tensor:
    """`[b d D]`."""
    eye = torch.eye(layer.sizes[3])
    return torch.stack([torch.kron(torch.kron(B, A), eye) for A, B in zip(*sides(basis, layer), strict=True)])


def sides(basis: Basis, layer: Layer) -> tuple[Tensor, Tensor]:
    """Q_A `[b i I]` and Q_B `[b o O]` in full."""
    return side(basis.Q_A, layer.sizes[2]), side(basis.Q_B, layer.sizes[1])


def layers_of(case: Case, batch: Any, rules: Any = RULES) -> dict[str, Layer]:
    return dict(capture(case.loss_fn, case.params, batch, Options(rules)).layers)


@every_case
def test_fisher_blocks(name: str) -> None:
    case = make(name)
    batch = case.batch(6)
    found = fisher_blocks(case.loss_fn, case.params, batch)
    inverse = found.damped_inverse(DAMPING)
    mean = {k: g.mean(0) for k, g in loop(case.loss_fn, case.params, batch)[1].items()}
    natural = inverse.multiply(mean)
    for layer in layers_of(case, batch).values():
        block = fisher(case, batch, layer)
        close(found.matrices[layer.weight], block)
        one = {k: v[None] for k, v in natural.items()}
        got = blocks(one, layer)[0].flatten(1)
        slope = blocks({k: v[None] for k, v in mean.items()}, layer)[0].flatten(1)
        for b, matrix in enumerate(block):
            close(got[b], torch.linalg.solve(matrix + DAMPING * torch.eye(len(matrix)), slope[b]), 1e-7)


def model_of(name: str) -> tuple[Case, Callable[[Params, Any], Tensor]]:
    """A case whose loss is cross-entropy, and its logits."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    params = {key: p.detach() for key, p in net.named_parameters()}

    def model(params: Params, example: Any) -> Tensor:
        return functional_call(net, params, (example[0],))

    def loss_fn(params: Params, example: Any) -> Tensor:
        return F.cross_entropy(model(params, example), example[1])

    return Case(loss_fn, params, lambda n: (torch.randn(n, 4), torch.randint(0, 3, (n,))), frozenset()), model


def test_ggn_blocks_are_the_exact_fisher_and_the_explicit_product() -> None:
    torch.manual_seed(0)
    case, model = model_of("mlp")
    batch = case.batch(5)
    losses: list[tuple[Any, Any]] = [
        (lambda z, example: F.cross_entropy(z, example[1]), lambda z: Categorical(logits=z)),
        (lambda z, example: (z - 1).square().sum() / 2, lambda z: Normal(z, 1.0)),
    ]
    for loss, likelihood in losses:
        found = ggn_blocks(model, loss, case.params, batch)
        of_fisher = fisher_blocks(case.loss_fn, case.params, batch, fisher=exact(model, likelihood))
        total = dict.fromkeys(found.matrices, torch.zeros(()))
        for example in examples(batch):
            leaves = {k: p.clone().requires_grad_() for k, p in case.params.items()}
            z = model(leaves, example)
            H = torch.autograd.functional.hessian(lambda y, e=example, of=loss: of(y, e), z.detach())
            rows = [torch.autograd.grad(e, list(leaves.values()), retain_graph=True) for e in z]
            jacobians = dict(zip(leaves, (torch.stack(column) for column in zip(*rows, strict=True)), strict=True))
            for name, layer in found.layers.items():
                J = blocks(jacobians, layer).flatten(1)
                total[name] = total[name] + J.T @ H @ J / 5
        for name in found.matrices:
            close(found.matrices[name][0], total[name])
            close(of_fisher.matrices[name][0], total[name])


def test_ggn_blocks_of_one_tensor_and_one_number() -> None:
    params, x = {"w": torch.randn(3, 2)}, torch.randn(4, 2)
    with pytest.raises(TypeError, match="model returned a tuple: return one tensor"):
        ggn_blocks(lambda p, x: (F.linear(x, p["w"]),), lambda z, x: z.sum(), params, x)
    with pytest.raises(ValueError, match=r"returned a tensor of shape \(3,\).*scalar"):
        ggn_blocks(lambda p, x: F.linear(x, p["w"]), lambda z, x: z.square(), params, x)
    with pytest.raises(TypeError, match="rules is a list: pass a dict"):
        ggn_blocks(lambda p, x: F.linear(x, p["w"]), lambda z, x: z.sum(), params, x, rules=[])  # type: ignore[arg-type]


def test_blocks_that_are_too_large_are_refused() -> None:
    params, batch = {"w": torch.zeros(200, 100)}, torch.randn(2, 100)
    with pytest.raises(ValueError, match=r"'w' have shape \(1, 20000, 20000\) and need 3.0 GiB .* use compare"):
        fisher_blocks(lambda p, x: F.linear(x, p["w"]).sum(), params, batch)


@every_case
def test_norm_and_natural_gradient_by_identities(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From coordinates, from the Gram matrix, and the norm alone from its tiles; in slices of one example too."""
    case = make(name)
    batches = [case.batch(n) for n in (4, 3, 1)]
    captures = [capture(case.loss_fn, case.params, batch, Options(RULES)) for batch in batches]
    for key, layer in captures[0].layers.items():
        if 0 in layer.sizes:
            continue
        terms = [captured.terms[key] for captured in captures]
        block = fisher(case, joined(batches), layer)
        slope = torch.randn(layer.sizes)
        eye = torch.eye(block.shape[-1])
        natural = torch.linalg.solve(block + DAMPING * eye, slope.flatten(1)).reshape(slope.shape)
        gram = torch.einsum("nbd,mbd->bnm", *2 * (dense(case, joined(batches), layer),))
        close(torch.cat([torch.cat([reference.gram(x, y) for y in terms], 2) for x in terms], 1), gram)
        for limit in (10**6, 8, 2):
            found = reference.exact_block(terms, layer, slope, DAMPING, limit)
            close(found.square_norm, block.square().sum())
            assert (found.natural is None) == (limit == 2 and block.shape[-1] > 2)
            if found.natural is not None:
                close(found.natural, natural, 1e-8)
        monkeypatch.setattr(reference, "MAX_BYTES", 1)
        sliced = reference.exact_block(terms, layer, slope, DAMPING, 8)
        monkeypatch.undo()
        close(sliced.square_norm, block.square().sum())
        assert sliced.natural is not None
        close(sliced.natural, natural, 1e-8)


def _comparing(params: Params, x: Tensor) -> Tensor:
    return x @ params["w"].mT.sum(1) if torch.allclose(x, x) else x.sum()


@pytest.mark.parametrize("kind", ["custom", "branch"])
def test_losses_that_vmap_cannot_run(kind: str) -> None:
    case = make("custom") if kind == "custom" else function(_comparing, {"w": torch.randn(3, 4)}, 4, ruled=set())
    records = compare(case.loss_fn, case.params, [case.batch(3)], damping=DAMPING, progress=False)
    assert all(math.isfinite(record.decrease) for record in records)


def test_parameters_in_half_precision() -> None:
    """Are judged by statistics in float32, but that the loss along a direction has the digits of a parameter."""
    params = {"w": torch.randn(4, 3).bfloat16(), "b": torch.randn(4).bfloat16()}

    def loss_fn(params: Params, x: Tensor) -> Tensor:
        return F.linear(x.to(params["w"].dtype), params["w"], params["b"]).float().square().sum()

    batches = [torch.randn(6, 3).bfloat16() for _ in range(2)]
    options: Any = {"damping": DAMPING, "progress": False, "estimators": {"kfac": Estimator(kfac)}}
    found = compare(loss_fn, params, batches, **options)
    single = {name: p.float() for name, p in params.items()}
    for low, high in zip(found, compare(loss_fn, single, [b.float() for b in batches], **options), strict=True):
        assert low.fisher_error == pytest.approx(high.fisher_error, rel=0.1)
        assert low.cosine == pytest.approx(high.cosine, rel=0.1)
        assert low.decrease > 0


def seen_by(case: Case, batches: list[Any], estimators: Any, **options: Any) -> tuple[list[Record], dict[Any, Seen]]:
    seen: dict[Any, Seen] = {}

    def watch(s: Seen) -> None:
        seen[s.estimator, s.layer, s.step] = s

    records = compare(
        case.loss_fn,
        options.pop("params", case.params),
        batches,
        damping=DAMPING,
        estimators=estimators,
        progress=False,
        watch=watch,
        **options,
    )
    return records, seen


STEPPED: dict[str, tuple[Estimator, dict[str, Any]]] = {
    "intra": (Estimator(), {}),
    "kfac": (Estimator(kfac), {"second_moment": kfac}),
    "averaged": (
        Estimator(averaged_intra_batch(0.7), basis_every=2),
        {"second_moment": averaged_intra_batch(0.7), "basis_every": 2},
    ),
    "running": (
        Estimator(running_average(0.7), basis_every=2, at_refresh=keep, factor_decay=0.5),
        {"second_moment": running_average(0.7), "basis_every": 2, "at_refresh": keep, "factor_decay": 0.5},
    ),
    "sua": (Estimator(rules={**RULES, **SUA}), {"rules": {**RULES, **SUA}}),
}


@SMALL
def test_every_figure_against_blocks_formed_in_full(name: str) -> None:
    """The states are those of `ekfac` itself; the figures come from dense matrices."""
    case = make(name)
    batches = [case.batch(n) for n in (5, 4, 6)]
    everything = joined(batches)
    losses, gradients = loop(case.loss_fn, case.params, everything)
    records, seen = seen_by(case, batches, {key: estimator for key, (estimator, _) in STEPPED.items()})
    by = {(r.estimator, r.layer, r.step): r for r in records}
    for key, (estimator, options) in STEPPED.items():
        step = ekfac(case.loss_fn, damping=DAMPING, **options)
        state = step.init(case.params, batches[0])
        for t, batch in enumerate(batches):
            _, state, _ = step.precondition(case.params, batch, state)
            squares = torch.zeros(2)
            for layer in layers_of(case, batch, estimator.rules).values():
                w = layer.weight
                r, m = by[key, w, t], state.second_moments[w].value
                close(seen[key, w, t].estimate, m, 1e-8)
                block, Q = fisher(case, everything, layer), rotation(state.bases[w], layer)
                inside = Q.mT @ block @ Q
                diagonal = inside.diagonal(dim1=1, dim2=2)
                close(seen[key, w, t].exact.flatten(1), diagonal, 1e-8)
                estimate = Q @ torch.diag_embed(m.flatten(1)) @ Q.mT
                expected = {
                    "moment_error": (m.flatten(1) - diagonal).norm() / diagonal.norm(),
                    "fisher_distance": (block - estimate).norm(),
                    "fisher_error": (block - estimate).norm() / block.norm(),
                    "off_diagonal": (inside - torch.diag_embed(diagonal)).square().sum() / block.square().sum(),
                    "effective_rank": m.sum() ** 2 / m.square().sum(),
                    "fisher_rank": block.diagonal(dim1=1, dim2=2).sum() ** 2 / block.square().sum(),
                }
                squares += torch.stack([(block - estimate).square().sum(), block.square().sum()])
                mean = blocks(gradients, layer).mean(0).flatten(1)
                eye = torch.eye(block.shape[-1])
                target = torch.linalg.solve(block + DAMPING * eye, mean)
                natural = torch.linalg.solve(estimate + DAMPING * eye, mean)
                expected["cosine"] = (natural * target).sum() / natural.norm() / target.norm()
                expected["natural_distance"] = (natural - target).norm() / target.norm()
                for field, value in expected.items():
                    assert getattr(r, field) == pytest.approx(value.item(), rel=1e-7, abs=1e-9), (key, w, t, field)
                assert r.target == "dense"
                assert (r.examples, r.since_refresh) == (
                    len(batch[0]) if isinstance(batch, tuple) else len(batch),
                    t % estimator.basis_every,
                )
            total = (squares[0] / squares[1]).sqrt().item()
            assert by[key, "all", t].fisher_error == pytest.approx(total, rel=1e-7)
    best_of(case, everything, losses.mean(), by, batches)


def best_of(case: Case, everything: Any, loss: Tensor, by: Any, batches: list[Any]) -> None:
    """The joint step of the whole model, again by loops."""
    step = ekfac(case.loss_fn, damping=DAMPING)
    _, state, _ = step.precondition(case.params, batches[1], step.init(case.params, batches[1]))
    natural = {}
    gradients = {k: g.mean(0)[None] for k, g in loop(case.loss_fn, case.params, everything)[1].items()}
    for layer in layers_of(case, everything).values():
        basis, m = state.bases[layer.weight], state.second_moments[layer.weight].value
        G = blocks(gradients, layer)[0]
        Q_A, Q_B = sides(basis, layer)
        inside = torch.einsum("boO,boik,biI->bOIk", Q_B, G, Q_A) / (m + DAMPING)
        M = torch.einsum("boO,bOIk,biI->boik", Q_B, inside, Q_A)
        if layer.bias is not None:
            natural[layer.bias] = M[:, :, -1].reshape(case.params[layer.bias].shape)
            M = M[:, :, :-1]
        M = M.reshape([layer.split[axis] for axis in layer.order]).permute(torch.tensor(layer.order).argsort().tolist())
        natural[layer.weight] = M.reshape(case.params[layer.weight].shape)
    decreases = {0.0: 0.0}
    for size in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
        moved = {k: p - size * natural[k] for k, p in case.params.items()}
        decreases[size] = (loss - loop(case.loss_fn, moved, everything)[0].mean()).item()
    best = max(decreases, key=lambda size: decreases[size])
    found = by["intra", "all", 1]
    assert found.step_size == best
    assert found.decrease == pytest.approx(decreases[best], rel=1e-7)


def test_signal_to_noise() -> None:
    case = make("mlp")
    batches = [case.batch(20), case.batch(10)]
    records, _ = seen_by(case, batches, {"own": Estimator(basis=own_coordinates)})
    gradients = loop(case.loss_fn, case.params, joined(batches))[1]
    layer = layers_of(case, batches[0])["2.weight"]
    G = blocks(gradients, layer).flatten(1)
    ratio = G.mean(0) ** 2 / G.var(0, unbiased=False)
    found = next(r for r in records if r.layer == "2.weight" and r.step == 1)
    assert found.signal_to_noise == pytest.approx(ratio.median().item())
    assert found.signal_share == pytest.approx((10 * ratio > 1).double().mean().item())


def test_bases_of_the_parameters_and_of_one_half() -> None:
    case = make("conv groups")
    batch = case.batch(9)
    estimators = {
        "own": Estimator(basis=own_coordinates),
        "own kfac": Estimator(kfac, basis=own_coordinates),
        "split": Estimator(basis=split_batch),
    }
    _, seen = seen_by(case, [batch], estimators)
    first, second = (pytree.tree_map(lambda t, s=s: t[s], batch) for s in (slice(4), slice(4, None)))
    step = ekfac(case.loss_fn, damping=DAMPING)
    _, whole, _ = step.precondition(case.params, batch, step.init(case.params, batch))
    _, state, _ = step.precondition(case.params, first, step.init(case.params, first))
    for layer in layers_of(case, batch).values():
        w = layer.weight
        close(seen["own", w, 0].estimate.flatten(1), dense(case, batch, layer).square().mean(0))
        close(seen["own", w, 0].exact, seen["own", w, 0].estimate)
        A, B = (getattr(whole.factors[w], side).diagonal(dim1=1, dim2=2) for side in "AB")
        s = 16 if w == "0.weight" else 1
        close(seen["own kfac", w, 0].estimate[..., 0], s * torch.einsum("bo,bi->boi", B, A))
        G = blocks(loop(case.loss_fn, case.params, second)[1], layer)
        basis = state.bases[w]
        moment = torch.einsum("boO,nboik,biI->nbOIk", basis.Q_B, G, basis.Q_A).square().mean(0)
        close(seen["split", w, 0].estimate, moment)


def test_fishers_against_a_reference_fisher() -> None:
    case, model = model_of("mlp")
    batches = [case.batch(8) for _ in range(3)]
    likelihood = lambda z: Categorical(logits=z)  # noqa: E731
    truth = exact(model, likelihood)
    records, seen = seen_by(
        case,
        batches,
        {
            "exact": Estimator(fisher=truth),
            "empirical": Estimator(),
            "sampled": Estimator(fisher=sampled(model, likelihood, 2)),
            "split draws": Estimator(fisher=sampled(model, likelihood, 2), basis=split_batch),
            "own loss": Estimator(fisher=gradient(case.loss_fn)),
        },
        reference=truth,
    )
    dense_truth = fisher_blocks(case.loss_fn, case.params, joined(batches), fisher=truth)
    for record in records:
        if record.layer != "all":
            block = dense_truth.matrices[record.layer]
            rank = block.diagonal(dim1=1, dim2=2).sum() ** 2 / block.square().sum()
            assert record.fisher_rank == pytest.approx(rank.item())
    errors = {row["estimator"]: row["moment_error"] for row in summarise(records) if row["layer"] == "all"}
    assert errors["exact"] < min(errors["empirical"], errors["sampled"])
    for layer in dense_truth.layers:
        close(seen["own loss", layer, 2].estimate, seen["empirical", layer, 2].estimate)


def test_a_trajectory_is_judged_where_it_is() -> None:
    case = make("mlp")
    batches = [case.batch(10) for _ in range(3)]
    points = [{k: p + 0.3 * t for k, p in case.params.items()} for t in range(3)]
    estimators = {"stale": Estimator(basis_every=10), "fresh": Estimator()}
    records, seen = seen_by(case, batches, estimators, params=points)
    step = ekfac(case.loss_fn, damping=DAMPING, basis_every=10)
    state = step.init(points[0], batches[0])
    for t, batch in enumerate(batches):
        _, state, _ = step.precondition(points[t], batch, state)
        there = Case(case.loss_fn, points[t], case.batch, case.ruled)
        for layer in layers_of(case, batch).values():
            close(seen["stale", layer.weight, t].estimate, state.second_moments[layer.weight].value)
            block, Q = fisher(there, joined(batches), layer), rotation(state.bases[layer.weight], layer)
            exact_moment = (Q.mT @ block @ Q).diagonal(dim1=1, dim2=2)
            close(seen["stale", layer.weight, t].exact.flatten(1), exact_moment)
    stale = [r.since_refresh for r in records if r.estimator == "stale" and r.layer == "all"]
    assert stale == [0, 1, 2]


def test_where_the_dense_does_not_fit_the_target_is_ekfac_on_all_the_data() -> None:
    case = make("mlp")
    batch = case.batch(30)
    records, _ = seen_by(case, [batch], {"intra": intra_batch, "own": Estimator(basis=own_coordinates)}, dense_limit=2)
    for record in records:
        assert record.target == "ekfac"
        if record.estimator == "intra":
            assert record.natural_distance < 1e-8
            assert record.cosine == pytest.approx(1)
        elif record.layer == "all":
            assert record.natural_distance > 1e-3


def test_an_estimator_of_ones_own_takes_part() -> None:
    def shrunk(moment: Moment, mean: Any, n: Number) -> Moment:
        level = mean.square.mean()
        return Moment((mean.square + level) / 2, torch.ones_like(moment.weight))

    own = SecondMoment("shrunk", exact_sums, shrunk, keep)
    case = make("mlp")
    batch = case.batch(12)
    _, seen = seen_by(case, [batch], {"shrunk": own, "intra": intra_batch})
    for layer in layers_of(case, batch):
        m = seen["intra", layer, 0].estimate
        close(seen["shrunk", layer, 0].estimate, (m + m.mean()) / 2)


@pytest.mark.parametrize(
    "name", ["recurrent", "frozen", "unused", "no outputs", "tree", "vector weight", "constant input"]
)
def test_every_default_estimator_on_every_kind_of_use(name: str) -> None:
    case = make(name)
    records = compare(case.loss_fn, case.params, [case.batch(6), case.batch(4)], damping=DAMPING, progress=False)
    assert {r.estimator for r in records} == set(ESTIMATORS)
    for record in records:
        for field, value in record._asdict().items():
            nothing = field in ("signal_to_noise", "signal_share")
            assert isinstance(value, str) or nothing or math.isfinite(value), (record.estimator, record.layer, field)
        assert record.decrease >= 0


def test_mean_and_standard_error() -> None:
    case = make("mlp")
    records, _ = seen_by(case, [case.batch(9) for _ in range(4)], {"intra": intra_batch})
    rows = summarise(records)
    assert [row["layer"] for row in rows] == ["0.weight", "2.weight", "all"]
    values = torch.tensor([r.moment_error for r in records if r.layer == "all"])
    assert rows[2]["moment_error"] == pytest.approx(values.mean().item())
    assert rows[2]["moment_error_se"] == pytest.approx((values.std() / 2).item())
    assert math.isnan(summarise(records[:1])[0]["cosine_se"])


def test_an_exact_reference_over_batches_of_other_lengths() -> None:
    """Whose pseudo-examples of an example are of another number in each batch."""
    params = {"w": torch.randn(4, 3)}

    def model(params: Params, example: Any) -> Tensor:
        return example[0] @ params["w"]

    def loss_fn(params: Params, example: Any) -> Tensor:
        return F.cross_entropy(model(params, example), example[1], reduction="sum")

    batches = [(torch.randn(6, s, 4), torch.randint(0, 3, (6, s))) for s in (2, 8)]
    fisher = exact(model, lambda z: Categorical(logits=z))
    matrices = [fisher_blocks(loss_fn, params, batch, fisher=fisher).matrices["w"] for batch in batches]
    norm = ((matrices[0] + matrices[1]) / 2).norm()
    for estimator in (Estimator(fisher=fisher), Estimator(intra_batch)):
        records = compare(
            loss_fn, params, batches, damping=0.1, estimators={"x": estimator}, reference=fisher, progress=False
        )
        for record in records:
            assert record.fisher_distance / record.fisher_error == pytest.approx(norm.item())


def test_batches_of_one_kind_in_another_order() -> None:
    params = {"w": torch.randn(3, 5)}
    first, second = ({"x": torch.randn(4, 5), "y": torch.randint(0, 3, (4,))} for _ in range(2))

    def loss(p: Params, example: Any) -> Tensor:
        return F.cross_entropy(F.linear(example["x"], p["w"]), example["y"].long())

    def found(other: Any) -> list[Record]:
        return compare(loss, params, [first, other], damping=0.1, estimators={"e": intra_batch}, progress=False)

    assert found({"y": second["y"].int(), "x": second["x"]}) == found(second)


def test_bad_arguments() -> None:
    case, model = model_of("mlp")
    batch = case.batch(4)

    def run(batches: Any = (batch,), params: Any = case.params, damping: float = 1.0, **estimators: Any) -> None:
        compare(case.loss_fn, params, batches, damping=damping, estimators=estimators or ESTIMATORS, progress=False)

    with pytest.raises(TypeError, match=r"estimators\['x'\] is a str: pass an Estimator"):
        run(x="kfac")
    wrong: Any
    for wrong, message in (
        (Estimator("kfac"), "second_moment='kfac' is not an estimator"),  # type: ignore[arg-type]
        (Estimator(fisher="exact"), r"^estimators\['x'\]: fisher='exact' is not a Fisher"),  # type: ignore[arg-type]
        (Estimator(basis=1), "basis=1 is not a function"),  # type: ignore[arg-type]
        (Estimator(at_refresh="keep"), "at_refresh='keep' is not a function"),  # type: ignore[arg-type]
        (Estimator(rules=1), "rules is a int"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=message):
            compare(case.loss_fn, case.params, [case.batch(3)], damping=1.0, estimators={"x": wrong})
    for argument, wrong in (("reference", "exact"), ("step_sizes", 0.1)):
        with pytest.raises(TypeError, match=f"^{argument}"):
            compare(case.loss_fn, case.params, [case.batch(3)], damping=1.0, **{argument: wrong})
    with pytest.raises(ValueError, match="batches is empty"):
        run(batches=())
    with pytest.raises(TypeError, match="batches is a dict: pass a list of batches"):
        run(batches={"x": batch})
    with pytest.raises(ValueError, match=r"batches\[1\] has tensors of another kind than batches\[0\]: .*\[batch\]"):
        compare(case.loss_fn, case.params, batch, damping=1.0)
    with pytest.raises(ValueError, match="estimators is empty: pass at least one"):
        compare(case.loss_fn, case.params, [batch], damping=1.0, estimators={})
    with pytest.raises(TypeError, match="estimators is a list: pass a dict"):
        compare(case.loss_fn, case.params, [batch], damping=1.0, estimators=["kfac"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="params has 2 trees for 1 batches"):
        run(params=[case.params, case.params])
    with pytest.raises(ValueError, match="damping=-1"):
        run(damping=-1)
    with pytest.raises(ValueError, match=r"'x'. cannot split: give at least 2"):
        run(batches=[case.batch(1)], x=Estimator(basis=split_batch))
    with pytest.raises(ValueError, match="use sampled"):
        run(x=Estimator(running_average(0.5), fisher=exact(model, lambda z: Categorical(logits=z))))

    def penalised(params: Params, example: Any) -> Tensor:
        return case.loss_fn(params, example) + params["0.weight"].square().sum()

    with pytest.raises(ValueError, match="give a reference whose loss uses them alike"):
        run(x=Estimator(fisher=gradient(penalised)))


def test_signal_to_noise_does_not_count_rounding() -> None:
    """Directions in which a softmax has no gradient have moments of 1e-32 and no ratio of their own."""
    params = {"w": torch.randn(3, 5)}
    batches = [(torch.randn(40, 5), torch.randint(0, 3, (40,)))]

    def loss(p: Params, example: Any) -> Tensor:
        return F.cross_entropy(F.linear(example[0], p["w"]), example[1])

    found = []
    for eps in (0.0, 1e-15, 2e-15, 3e-15):
        (record, _) = compare(loss, {"w": params["w"] * (1 + eps)}, batches, damping=0.1, estimators={"e": intra_batch})
        found.append(torch.tensor([record.signal_to_noise, record.signal_share]))
    for other in found[1:]:
        close(other, found[0], 1e-8)
