"""The curvature as an operator, against `Q diag(m2) Q^T` by explicit Kronecker products, and against curvlinops."""

import dataclasses
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ekfac_func import (
    DIAGONAL,
    RULES,
    SUA,
    Basis,
    Blocks,
    Curvature,
    Reflections,
    blocks,
    compact,
    curvature,
    ekfac,
    exact,
    fisher_blocks,
    optim,
    per_example_gradients,
    rank,
    thin,
)
from ekfac_func.kronecker import positions, written
from ekfac_func.types import Params, State

from .cases import SPATIAL, Case, make
from .oracles import blocks as entries
from .oracles import close, close_trees, side, stack

DAMPING = 0.03
CHOICES: dict[str, dict[str, Any]] = {
    "full": {},
    "sua": {"rules": {**RULES, **SUA}},
    "diagonal": {"bases": {"*": DIAGONAL}},
    "blocks": {"bases": {"*": blocks(2)}},  # 2 divides few of the sides, so that most are filled up
    "one side": {"bases": {"*": Blocks(inputs=4)}},
}


def stepped(case: Case, batch: Any, **options: Any) -> State:
    step = ekfac(case.loss_fn, damping=DAMPING, **options)
    return step.precondition(case.params, batch, step.init(case.params, batch))[1]


def dense(state: State, params: Params) -> Tensor:
    """`[p p]` over the parameters one after another, from the state's tensors and explicit Kronecker products."""
    places = dict(
        zip(params, torch.arange(sum(map(torch.numel, params.values()))).split([*sizes(params)]), strict=True)
    )
    F = torch.zeros(2 * (sum(sizes(params)),))
    for layer in state.layers:
        names = (layer.weight,) if layer.bias is None else (layer.weight, layer.bias)
        where = {name: places[name].reshape(1, *params[name].shape) for name in names}
        b, o, i, k = layer.sizes
        index = entries(where, layer)[0].reshape(b, o * i * k)
        basis, value = state.bases[layer.weight], state.second_moments[layer.weight].value
        Q_A, Q_B = side(basis.Q_A, i), side(basis.Q_B, o)
        for n in range(b):
            Q = torch.kron(torch.kron(Q_B[n].contiguous(), Q_A[n].contiguous()), torch.eye(k))
            F[index[n][:, None], index[n][None, :]] = Q @ torch.diag(value[n].flatten()) @ Q.T
    return F


def sizes(tree: Params) -> list[int]:
    return [t.numel() for t in tree.values()]


def flat(tree: Params, like: Params) -> Tensor:
    """`[... p]`."""
    return torch.cat(
        [tree[name].flatten(-p.dim()) if p.dim() else tree[name][..., None] for name, p in like.items()], -1
    )


def matrix_power(F: Tensor, exponent: float) -> Tensor:
    values, Q = torch.linalg.eigh(F)
    return Q @ torch.diag(values**exponent) @ Q.T


# few parameters, for the matrix of all of them is formed and solved
SMALL = (
    *("mlp", "no bias", "positions", "reused", "conv1d", "layer norm", "rms norm", "ids padded", "tied padded", "bag"),
    *("two biases", "bilinear", "experts", "slices", "frozen", "vector weight", "no outputs", "recurrent", "products"),
    *("transposed conv1d", "conv stride", "both ways", "attention extra keys", "instance norm"),
)


@pytest.mark.parametrize(
    ("name", "choice"),
    [(name, choice) for name in SMALL for choice in CHOICES if choice != "sua" or name in SPATIAL],
)
def test_against_the_dense_matrix(name: str, choice: str) -> None:
    case = make(name)
    state = stepped(case, case.batch(4), **CHOICES[choice])
    F = dense(state, case.params)
    estimate = curvature(state)
    damped, shifted = estimate.damped(DAMPING), F + DAMPING * torch.eye(len(F))
    one = {key: torch.randn_like(p) for key, p in case.params.items()}
    many = {key: torch.randn(2, 3, *p.shape) for key, p in case.params.items()}
    for operator, matrix in (
        (estimate, F),
        (damped, shifted),
        (damped.power(-1), torch.linalg.inv(shifted)),
        (damped.power(-0.5), matrix_power(shifted, -0.5)),
    ):
        product = operator @ one
        assert list(product) == list(case.params)
        close(flat(product, case.params), matrix @ flat(one, case.params))
        close(flat(operator @ many, case.params), flat(many, case.params) @ matrix)
        close(flat(operator.diagonal(), case.params), matrix.diagonal())
        values = torch.cat([*operator.eigenvalues().values()])
        close(values.sort().values, torch.linalg.eigvalsh(matrix))
        close(operator.trace(), matrix.trace())
        close(operator.frobenius_norm(), matrix.norm())
        scaled = {name: torch.where(operator.real[name], 1e-200 * v, 1) for name, v in operator.values.items()}
        tiny = dataclasses.replace(operator, values=scaled)
        close(1e200 * tiny.frobenius_norm(), matrix.norm())
    close(damped.logdet(), torch.linalg.slogdet(shifted).logabsdet)
    for key, block in damped.dense().matrices.items():
        layer = next(layer for layer in state.layers if layer.weight == key)
        places = {k: torch.arange(p.numel()).reshape(1, *p.shape) for k, p in case.params.items()}
        assert block.shape == (layer.sizes[0], *2 * (layer.sizes[1] * layer.sizes[2] * layer.sizes[3],))
        if layer.bias is None:
            index = entries(places, layer)[0].flatten(1)
            offset = sum(p.numel() for k, p in list(case.params.items())[: list(case.params).index(key)])
            for n, one_block in enumerate(block):
                close(one_block, shifted[offset + index[n][:, None], offset + index[n][None, :]])


@pytest.mark.parametrize("name", ["mlp", "conv groups", "tied"])
def test_dense_is_a_matrix_on_trees(name: str) -> None:
    case = make(name)
    estimate = curvature(stepped(case, case.batch(5), bases={"*": blocks(4)})).damped(DAMPING)
    tree = {key: torch.randn_like(p) for key, p in case.params.items()}
    close_trees(estimate.dense().multiply(tree), estimate @ tree)
    many = {key: torch.randn(2, *p.shape) for key, p in case.params.items()}
    close_trees(estimate.dense().multiply(many), estimate @ many)
    with pytest.raises(KeyError, match="give one tensor for each"):
        estimate.dense().multiply({})
    name = next(iter(tree))
    with pytest.raises(ValueError, match=f"'{name}' of the tree has shape"):
        estimate.dense().multiply({**tree, name: tree[name].flatten()})


def test_the_step_is_the_damped_inverse_times_the_gradient() -> None:
    case = make("conv")
    batch = case.batch(6)
    step = ekfac(case.loss_fn, damping=DAMPING, exponent=-0.75)
    natural, state, info = step.precondition(case.params, batch, step.init(case.params, batch))
    close_trees(curvature(state).damped(DAMPING).power(-0.75) @ info.gradient, natural)
    rule = ekfac(case.loss_fn, damping=optim.relative(0.1))
    natural, state, info = rule.precondition(case.params, batch, rule.init(case.params, batch))
    by_name = dict(zip(state.second_moments, info.damping, strict=True))
    for dampings in (by_name, info.damping):
        damped = curvature(state).damped(dampings)
        close_trees(damped.power(-1) @ info.gradient, natural)
        expected = sum(m2.value.sum() + by_name[name] * m2.value.numel() for name, m2 in state.second_moments.items())
        close(damped.trace(), expected)
    for wrong, message in (
        (torch.ones(len(by_name) + 1), r"shape \(3,\).*0-d"),
        (dict(list(by_name.items())[1:]), "no number for the layer '0.weight'.*for each"),
        (optim.relative(0.1), "is a partial: give a"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            curvature(state).damped(wrong)  # type: ignore[arg-type]


def test_in_its_own_coordinates_the_estimate_is_the_diagonal_of_the_fisher() -> None:
    case = make("mlp")
    batch = case.batch(6)
    found = curvature(stepped(case, batch, bases={"*": DIAGONAL})).dense().matrices
    for key, block in fisher_blocks(case.loss_fn, case.params, batch).matrices.items():
        close(found[key], torch.diag_embed(block.diagonal(dim1=1, dim2=2)))


@pytest.mark.parametrize("choice", ["full", "blocks"])
def test_samples(choice: str) -> None:
    """Their covariance, within six standard errors, and their seed."""
    case = make("mlp")
    inverse = curvature(stepped(case, case.batch(5), **CHOICES[choice])).damped(0.3).power(-1)
    seeded = torch.Generator().manual_seed(5)
    draws = inverse.sample(seeded, 40_000)
    X = flat(draws, case.params)
    identity = torch.eye(X.shape[1])
    C = torch.stack([flat(inverse @ unflatten(row, case.params), case.params) for row in identity])
    error = (C.diagonal()[:, None] * C.diagonal() + C.square()).sqrt() / len(X) ** 0.5
    assert ((X.T @ X / len(X) - C).abs() < 6 * error).all()
    again = inverse.sample(torch.Generator().manual_seed(5), 40_000)
    close_trees(draws, again, 0.0)
    single = inverse.sample(seeded)
    assert {key: t.shape for key, t in single.items()} == {key: p.shape for key, p in case.params.items()}


def unflatten(row: Tensor, like: Params) -> Params:
    parts = row.split(sizes(like), -1)
    return {name: part.reshape(p.shape) for (name, p), part in zip(like.items(), parts, strict=True)}


def test_scipy() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    case = make("conv groups")
    state = stepped(case, case.batch(5), bases={"*": blocks(4)})
    estimate = curvature(state)
    F = dense(state, estimate.diagonal())  # whose order it has
    operator = estimate.scipy()
    assert operator.shape == F.shape
    assert operator.dtype == np.float64
    X = torch.randn(len(F), 3)
    close(torch.tensor(operator @ X.numpy()), F @ X)
    close(torch.tensor(operator @ X[:, 0].numpy()), F @ X[:, 0])
    close(torch.tensor(operator.T @ X[:, :1].numpy()), F @ X[:, :1])
    found = torch.tensor(operator @ (X + 2j * X.flip(0)).numpy())
    close(torch.view_as_real(found), torch.stack([F @ X, F @ (2 * X.flip(0))], -1))
    top = linalg.eigsh(operator, k=3, return_eigenvectors=False, v0=np.ones(len(F)))
    close(torch.tensor(top).sort().values, torch.linalg.eigvalsh(F)[-3:], 1e-8)
    found, failed = linalg.cg(estimate.damped(DAMPING).scipy(), X[:, 0].numpy(), rtol=1e-12)
    assert failed == 0
    close(torch.tensor(found), torch.linalg.solve(F + DAMPING * torch.eye(len(F)), X[:, 0]), 1e-8)


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("mlp")
    estimate = curvature(stepped(case, case.batch(3)))
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scipy"):
        estimate.scipy()


def test_half_precision() -> None:
    case = make("mlp")
    params = {key: p.bfloat16() for key, p in case.params.items()}
    x, y = case.batch(5)
    small = Case(lambda p, e: case.loss_fn({k: t.double() for k, t in p.items()}, e), params, case.batch, case.ruled)
    estimate = curvature(stepped(small, (x, y))).damped(DAMPING)
    assert {t.dtype for t in (estimate @ params).values()} == {torch.bfloat16}
    assert estimate.trace().dtype == estimate.diagonal()["0.weight"].dtype == torch.float32
    assert estimate.scipy().dtype == np.float32


def test_vmap_over_states() -> None:
    case = make("mlp")
    states = [stepped(case, case.batch(5)) for _ in range(3)]
    stacked = stack(*states)
    tree = {key: torch.randn_like(p) for key, p in case.params.items()}

    def solved(state: State) -> Any:
        inverse = curvature(state).damped(DAMPING).power(-1)
        return inverse @ tree, inverse.logdet(), inverse.diagonal()

    close_trees(torch.vmap(solved)(stacked), stack(*map(solved, states)))


def test_a_state_says_its_layers_after_a_checkpoint(tmp_path: Any) -> None:
    case = make("conv groups")
    state = stepped(case, case.batch(5))
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded.layers == state.layers
    close_trees(curvature(loaded).diagonal(), curvature(state).diagonal(), 0.0)


def test_what_cannot_be_is_refused() -> None:
    case = make("mlp")
    batch = case.batch(4)
    step = ekfac(case.loss_fn, damping=DAMPING)
    initial = step.init(case.params, batch)
    with pytest.raises(ValueError, match="its step is 0: pass what precondition returned"):
        curvature(initial)
    with pytest.raises(TypeError, match="state is a dict"):
        curvature({})  # type: ignore[arg-type]
    for leaf, message in ((torch.ones(3, 4) * 1j, "has dtype torch.complex128"), (3.0, "is a float")):
        with pytest.raises(TypeError, match=f"of the tree {message}: give real floating-point tensors"):
            curvature(stepped(case, batch)) @ dict.fromkeys(case.params, leaf)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the tree is a Tensor: give a dict"):
        curvature(stepped(case, batch)) @ batch[0]
    for exponent, error, message in (
        (torch.ones(2), ValueError, r"exponent has shape \(2,\).*0-d"),
        (math.nan, ValueError, "exponent=nan.*finite"),
        (True, TypeError, "exponent is a bool"),
    ):
        with pytest.raises(error, match=message):
            curvature(stepped(case, batch)).power(exponent)
    with pytest.raises(ValueError, match="count=0: give a whole number"):
        curvature(stepped(case, batch)).sample(torch.Generator(), 0)
    with pytest.raises(TypeError, match="fisher='exact' is not a Fisher"):
        fisher_blocks(case.loss_fn, case.params, batch, fisher="exact")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="give one tensor for each"):
        curvature(stepped(case, batch)) @ {"0.weight": case.params["0.weight"]}
    with pytest.raises(
        ValueError, match=r"'0.bias' of the tree has shape \(5,\), of params \(5,\).*'0.weight' has \(2,\)"
    ):
        curvature(stepped(case, batch)) @ {**case.params, "0.weight": torch.zeros(2, 5, 4)}
    x, y = batch
    _, skipped, _ = step.precondition(case.params, (x * torch.nan, y), initial)
    assert curvature(skipped).trace().isnan()


def curvlinops_nets() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    return {
        "linear": (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), (5,)),
        "conv": (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)), (2, 4, 4)),
    }


@pytest.mark.parametrize("kind", ["empirical", "type-2"])
@pytest.mark.parametrize("net", curvlinops_nets())
def test_against_curvlinops(net: str, kind: str) -> None:
    """Its EKFAC is of the mean loss of the data, with its bias joint on demand; its factors come from the same data.

    Per example: our F is the mean over examples of `G G^T`, theirs with reduction="mean" likewise. Its `type-2` is our
    `exact`. Its vector holds the parameters one after another, in the order of its list.
    """
    curvlinops = pytest.importorskip(
        "curvlinops", reason="pip install curvlinops-for-pytorch==3.0.1 torchvision==0.28.0"
    )
    module, shape = curvlinops_nets()[net]
    params = {name: p.detach() for name, p in module.named_parameters()}
    x, y = torch.randn(8, *shape), torch.randint(0, 3, (8,))

    def model(params: Params, example: Any) -> Tensor:
        return functional_call(module, params, (example[0][None],))[0]

    def loss_fn(params: Params, example: Any) -> Tensor:
        return F.cross_entropy(model(params, example), example[1])

    options = (
        {} if kind == "empirical" else {"fisher": exact(model, lambda z: torch.distributions.Categorical(logits=z))}
    )
    estimate: Curvature = curvature(stepped(Case(loss_fn, params, lambda n: None, frozenset()), (x, y), **options))
    theirs = curvlinops.EKFACLinearOperator(
        module,
        nn.CrossEntropyLoss(reduction="mean"),
        list(module.parameters()),
        [(x, y)],
        fisher_type=kind,
        separate_weight_and_bias=False,
    )
    found = torch.stack([theirs @ row for row in torch.eye(theirs.shape[0])])
    ours = torch.stack([flat(estimate @ unflatten(row, params), params) for row in torch.eye(theirs.shape[0])])
    close(ours, found.detach(), 1e-8)
    close(estimate.trace(), theirs.trace.detach(), 1e-8)
    close(estimate.frobenius_norm(), theirs.frobenius_norm.detach(), 1e-8)
    close(estimate.damped(DAMPING).logdet(), torch.linalg.slogdet(found + DAMPING * torch.eye(len(found)))[1], 1e-8)


@pytest.mark.parametrize("choice", [rank(2), thin])
def test_a_basis_of_few_columns_is_refused_with_the_remedy(choice: Any) -> None:
    case = make("mlp")
    with pytest.raises(ValueError, match=r"'0.weight'.*columns.*blocks"):
        curvature(stepped(case, case.batch(5), bases={"*": choice}))


@pytest.mark.parametrize("name", ["in turn", "layer norm", "conv groups"])
def test_a_compact_basis_is_the_one_that_it_stands_for(name: str) -> None:
    case = make(name)
    batch = case.batch(2)
    terms = per_example_gradients(case.loss_fn, case.params, batch).captured.terms
    samples = 2 * max(positions(term) for of_layer in terms.values() for term in of_layer)
    state = stepped(case, batch, bases={"*": compact(samples)})
    assert any(isinstance(Q, Reflections) for basis in state.bases.values() for Q in basis)
    bases = {weight: Basis(*map(written, basis)) for weight, basis in state.bases.items()}
    one, other = curvature(state).damped(DAMPING), curvature(dataclasses.replace(state, bases=bases)).damped(DAMPING)
    many = {key: torch.randn(2, 3, *p.shape) for key, p in case.params.items()}
    close_trees(one.power(-1) @ many, other.power(-1) @ many)
    close_trees(one.diagonal(), other.diagonal())
    close_trees(one.dense().matrices, other.dense().matrices)
    seed = torch.Generator()
    close_trees(one.sample(seed.manual_seed(0), 2), other.sample(seed.manual_seed(0), 2))


def test_scipy_of_a_scalar_and_of_nothing() -> None:
    pytest.importorskip("scipy")
    params = {"w": torch.randn(2, 3), "scale": torch.randn(()), "none": torch.randn(0, 2)}
    batch = torch.randn(5, 3)
    step = ekfac(
        lambda p, x: F.linear(F.linear(x, p["w"]).sin() * p["scale"], p["none"]).sum() + (p["w"] @ x).sum(), damping=1.0
    )
    estimate = curvature(step.precondition(params, batch, step.init(params, batch))[1]).damped(DAMPING)
    whole = torch.from_numpy(estimate.scipy() @ np.eye(7))
    close(whole.diagonal(), torch.cat([d.flatten() for d in estimate.diagonal().values()]))


@pytest.mark.parametrize("how", ["full", "diagonal"])
def test_eigenvalues_of_stacked_states(how: str) -> None:
    case = make("mlp")
    states = [stepped(case, case.batch(9), **CHOICES[how]) for _ in range(2)]
    stacked = stack(*states)
    found = torch.vmap(lambda state: curvature(state).eigenvalues())(stacked)
    for k, state in enumerate(states):
        close_trees({name: v[k] for name, v in found.items()}, curvature(state).eigenvalues())
