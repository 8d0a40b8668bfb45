"""Which Fisher: each against dense blocks made by enumeration, by J^T H J, or by many draws."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Dirichlet,
    Distribution,
    Exponential,
    Geometric,
    Independent,
    Laplace,
    Normal,
    OneHotCategorical,
)
from torch.func import functional_call
from torch.utils import _pytree as pytree

from benchmarks.measure import peak_allocated
from ekfac_func import (
    DIAGONAL,
    RULES,
    SUA,
    Fisher,
    averaged_intra_batch,
    ekfac,
    empirical,
    exact,
    fisher_blocks,
    gradient,
    kfac,
    running_average,
    sampled,
)
from ekfac_func.discovery import Options, plan
from ekfac_func.types import Params

from .oracles import blocks, close, close_trees, examples, loop, same_bits, side

Model = Callable[[Params, Any], Any]


def mlp(*shape: int, outputs: int = 3) -> tuple[Model, Params, Callable[[int], Any]]:
    """A small net over examples (x, y), which applies to each of its leading positions."""
    net = nn.Sequential(nn.Linear(shape[-1], 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    params = {name: p.detach().clone() for name, p in net.named_parameters()}

    def model(params: Params, example: Any) -> Tensor:
        return functional_call(net, params, (example[0],))

    def batch(n: int = 5) -> Any:
        return torch.randn(n, *shape), torch.randint(0, outputs, (n, *shape[:-1]))

    return model, params, batch


def data_loss(model: Model) -> Callable[[Params, Any], Tensor]:
    return lambda params, example: F.cross_entropy(model(params, example), example[1], reduction="sum")


def conv() -> tuple[Model, Params, Callable[[int], Any]]:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(0), nn.Linear(12, 3)).double()
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    return (
        lambda params, example: functional_call(net, params, (example[0],)),
        params,
        lambda n=5: (torch.randn(n, 2, 4, 4), torch.randint(0, 3, (n,))),
    )


def jacobian(model: Model, params: Params, example: Any) -> Tensor:
    """Of the flat output w.r.t. all parameters in their order, `[outputs, parameters]`, one element at a time."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    flat = torch.cat([leaf.flatten() for leaf in pytree.tree_leaves(model(leaves, example))])
    rows = [torch.autograd.grad(z, list(leaves.values()), retain_graph=True) for z in flat]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def of_labels(
    model: Model, params: Params, batch: Any, likelihood: Callable[[Any], Distribution], values: list[Tensor]
) -> Tensor:
    """The whole Fisher by enumeration: sum over labels of p(label) grad log p grad log p^T, mean over examples."""
    total, n = torch.zeros(()), 0
    for example in examples(batch):
        n += 1
        for y in values:
            leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
            log = likelihood(model(leaves, example)).log_prob(y).sum()
            g = torch.cat([t.flatten() for t in torch.autograd.grad(log, list(leaves.values()))])
            total = total + log.detach().exp() * torch.outer(g, g)
    return total / n


def moments(loss_fn: Any, params: Params, batch: Any, fisher: Fisher, **options: Any) -> tuple[Any, Any, Any]:
    step = ekfac(loss_fn, damping=1e-2, fisher=fisher, **options)
    return step.precondition(params, batch, step.init(params, batch))


def check(whole: Tensor, loss_fn: Any, params: Params, batch: Any, fisher: Fisher, rules: Any = RULES) -> None:
    """The step's moment is the diagonal, in its basis, of each layer's block of a whole Fisher; so is its gradient."""
    natural, state, info = moments(loss_fn, params, batch, fisher, rules=rules)
    selector = {name: torch.zeros(len(whole), *p.shape) for name, p in params.items()}
    offset = 0
    for name, p in params.items():
        selector[name][offset : offset + p.numel()] = torch.eye(p.numel()).reshape(p.numel(), *p.shape)
        offset += p.numel()
    losses, gradients = loop(loss_fn, params, batch)
    close(info.loss, losses.mean())
    curvature_loss = loss_fn if fisher.loss is None else fisher.loss
    for layer in plan(curvature_loss, params, fisher.examples(params, batch), Options(rules)).layers:
        basis, m2 = state.bases[layer.weight], state.second_moments[layer.weight].value
        Q_A, Q_B = side(basis.Q_A, layer.sizes[2]), side(basis.Q_B, layer.sizes[1])
        S = blocks(selector, layer)  # [all, b o i k]: coordinates of the layer
        rotated = torch.einsum("boO,nboik,biI->nbOIk", Q_B, S, Q_A).flatten(1)
        close(m2.flatten(), torch.einsum("nj,nm,mj->j", rotated, whole, rotated), 1e-9)
        projected = torch.einsum("boO,boik,biI->bOIk", Q_B, blocks(gradients, layer).mean(0), Q_A)
        expected = torch.einsum("boO,bOIk,biI->boik", Q_B, projected / (m2 + 1e-2), Q_A)
        close(blocks({k: v[None] for k, v in natural.items()}, layer)[0], expected, 1e-9)
    for name in params:
        close(info.gradient[name], gradients[name].mean(0))


@pytest.mark.parametrize("rules", [RULES, {**RULES, **SUA}], ids=["rules", "sua"])
@pytest.mark.parametrize("make", [lambda: mlp(4), conv], ids=["mlp", "conv"])
def test_exact_categorical_by_enumeration(make: Any, rules: Any) -> None:
    model, params, batch = make()
    given = batch(5)
    whole = of_labels(model, params, given, lambda z: Categorical(logits=z), list(torch.arange(3)))
    check(whole, data_loss(model), params, given, exact(model, lambda z: Categorical(logits=z)), rules)


def test_exact_at_each_position_is_the_fisher_of_all_labels_at_once() -> None:
    model, params, batch = mlp(2, 4)
    given = batch(4)
    every = [torch.tensor([a, b]) for a in range(3) for b in range(3)]
    whole = of_labels(model, params, given, lambda z: Categorical(logits=z), every)
    check(whole, data_loss(model), params, given, exact(model, lambda z: Categorical(logits=z)))


def test_exact_bernoulli_and_binomial_by_enumeration() -> None:
    model, params, batch = mlp(4, outputs=2)
    given = batch(5)
    pairs = [torch.tensor([a, b], dtype=torch.float64) for a in range(2) for b in range(2)]
    whole = of_labels(model, params, given, lambda z: Bernoulli(logits=z), pairs)
    for likelihood in (lambda z: Bernoulli(logits=z), lambda z: Independent(Bernoulli(logits=z), 1)):
        check(whole, data_loss(model), params, given, exact(model, likelihood))
    triples = [torch.tensor([a, b], dtype=torch.float64) for a in range(4) for b in range(4)]
    whole = of_labels(model, params, given, lambda z: Binomial(3, logits=z), triples)
    check(whole, data_loss(model), params, given, exact(model, lambda z: Binomial(3, logits=z)))


def test_exact_bernoulli_where_the_model_is_sure() -> None:
    x = torch.ones(3, 1, dtype=torch.float32)
    for logit in (17.0, -17.0):
        params = {"w": torch.full((1, 1), logit, dtype=torch.float32)}
        fisher = exact(lambda p, x: F.linear(x, p["w"]), lambda z: Bernoulli(logits=z))
        found = fisher_blocks(lambda p, x: F.linear(x, p["w"]).sum(), params, x, fisher=fisher).matrices["w"]
        close(found.double().flatten(), torch.tensor([17.0]).sigmoid() * torch.tensor([-17.0]).sigmoid(), 1e-5)


def test_exact_normal_is_the_gauss_newton_matrix_of_squared_error() -> None:
    model, params, batch = mlp(2, 4)
    given = batch(5)

    def squared(z: Tensor) -> Tensor:
        return (z - 0.3).square().sum() / 2 / 0.7**2

    whole = torch.zeros(())
    for example in examples(given):
        J, z = jacobian(model, params, example), model(params, example)
        H = torch.autograd.functional.hessian(squared, z.detach()).reshape(z.numel(), z.numel())
        whole = whole + J.T @ H @ J / 5
    check(whole, data_loss(model), params, given, exact(model, lambda z: Normal(z, 0.7)))
    found = exact(model, lambda z: Normal(z, 0.7)).examples(params, given)
    assert len(found[1]) == 5 * 6  # the scale is no function of the output and costs nothing


def test_exact_normal_with_a_scale_of_the_output() -> None:
    """Against the expectation of the score's square by Gauss-Hermite quadrature."""
    model, params, batch = mlp(4, outputs=2)
    given = batch(3)
    nodes, weights = (torch.tensor(t) for t in np.polynomial.hermite_e.hermegauss(20))

    def likelihood(z: Tensor) -> Distribution:
        return Normal(z[0], z[1].exp())

    whole = torch.zeros(())
    for example in examples(given):
        J, z = jacobian(model, params, example), model(params, example).detach().requires_grad_()
        for node, weight in zip(nodes, weights / weights.sum(), strict=True):
            y = (z[0] + z[1].exp() * node).detach()
            (score,) = torch.autograd.grad(likelihood(z).log_prob(y), z)
            whole = whole + weight * torch.outer(J.T @ score, J.T @ score) / 3
    check(whole, data_loss(model), params, given, exact(model, likelihood))


def test_several_outputs_and_distributions() -> None:
    model, params, batch = mlp(4, outputs=5)
    given = batch(4)

    def two(params: Params, example: Any) -> Any:
        z = model(params, example)
        return {"class": z[:3], "value": z[3:]}

    def likelihood(outputs: Any) -> Any:
        return {"class": Categorical(logits=outputs["class"]), "value": Normal(outputs["value"], 1.0)}

    whole = torch.zeros(())
    for example in examples(given):
        J = jacobian(two, params, example)
        p = torch.softmax(model(params, example)[:3], 0)
        H = torch.block_diag(torch.diag(p) - torch.outer(p, p), torch.eye(2))
        whole = whole + J.T @ H @ J / 4
    check(whole, data_loss(model), params, given, exact(two, likelihood))
    moments(data_loss(model), params, given, sampled(two, likelihood, 2))


class Smoothed(Categorical):
    """Half of it uniform."""

    def log_prob(self, value: Tensor) -> Tensor:
        uniform = self.logits.shape[-1]
        return (super().log_prob(value).exp() / 2 + 1 / (2 * uniform)).log()


def test_exact_of_a_distribution_of_ones_own() -> None:
    """Whose probabilities are not those of the logits."""
    model, params, batch = mlp(4)
    given = batch(4)

    def likelihood(z: Tensor) -> Distribution:
        return Smoothed(logits=z)

    whole = of_labels(model, params, given, likelihood, list(torch.arange(3)))
    check(whole, data_loss(model), params, given, exact(model, likelihood))


@pytest.mark.parametrize("pick", [lambda a, k: a[int(k)], lambda a, k: a[torch.arange(4) == k][0]])
def test_exact_of_a_model_that_branches_on_values(pick: Any) -> None:
    """Its rows cannot be told from shapes; the same model without a branch has them from shapes."""
    params = {"a": torch.randn(4, 3, 5)}
    batch = torch.randn(5, 5), torch.randint(0, 4, (5,))

    def picked(params: Params, example: Any) -> Tensor:
        x, k = example
        return pick(params["a"], k) @ x

    def gathered(params: Params, example: Any) -> Tensor:
        x, k = example
        return params["a"].index_select(0, k[None])[0] @ x

    def run(model: Any) -> Any:
        fisher = exact(model, lambda z: Normal(z, 1.0))
        step = ekfac(lambda p, e: model(p, e).square().sum(), damping=0.1, fisher=fisher)
        return step.precondition(params, batch, step.init(params, batch))

    (natural, state, _), (expected, gathered_state, _) = run(picked), run(gathered)
    close_trees(natural, expected)
    close(state.second_moments["a"].value, gathered_state.second_moments["a"].value)


def test_parameters_in_half_precision() -> None:
    """The data's gradient meets the statistics in float32: the Fisher of the data's own loss is the empirical one."""
    params = {"w": torch.randn(3, 4).bfloat16()}
    batch = torch.randn(8, 4).bfloat16(), torch.randint(0, 3, (8,))

    def model(params: Params, example: Any) -> Tensor:
        return F.linear(example[0], params["w"])

    def loss(params: Params, example: Any) -> Tensor:
        return F.cross_entropy(model(params, example), example[1])

    def run(fisher: Fisher) -> Params:
        step = ekfac(loss, damping=0.1, fisher=fisher)
        natural, state, info = step.precondition(params, batch, step.init(params, batch))
        assert natural["w"].dtype == info.gradient["w"].dtype == torch.bfloat16
        assert state.second_moments["w"].value.dtype == torch.float32
        return natural

    same_bits(run(gradient(loss)), run(empirical))
    likelihoods = lambda z: Categorical(logits=z.float())  # noqa: E731
    for fisher in (exact(model, likelihoods), sampled(model, likelihoods)):
        assert run(fisher)["w"].isfinite().all()


def test_a_curvature_loss_of_ones_own() -> None:
    """The data's loss reads a weight on a second path, the curvature loss does not: the layers are the latter's."""
    model, params, batch = mlp(4)
    given = batch(6)

    def penalised(params: Params, example: Any) -> Tensor:
        return data_loss(model)(params, example) + (params["0.weight"] ** 4).sum()

    G = torch.cat([g.flatten(1) for g in loop(data_loss(model), params, given)[1].values()], dim=1)
    check(G.T @ G / 6, penalised, params, given, gradient(data_loss(model)))
    same = moments(data_loss(model), params, given, gradient(data_loss(model)))
    close_trees(same, moments(data_loss(model), params, given, empirical))


@pytest.mark.parametrize(
    ("likelihood", "outputs"),
    [
        (lambda z: Categorical(logits=z), 3),
        (lambda z: Bernoulli(logits=z), 3),
        (lambda z: Normal(z, 0.5), 3),
        (lambda z: Normal(z[..., 0], z[..., 1].exp()), 2),
    ],
    ids=["categorical", "bernoulli", "normal", "scale"],
)
@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=["one", "positions"])
def test_sampled_converges_to_exact(likelihood: Any, outputs: int, shape: tuple[int, ...]) -> None:
    """In one basis; the error falls as one over the root of the draws."""
    model, params, batch = mlp(*shape, outputs=outputs)
    given = batch(4)
    exactly = moments(data_loss(model), params, given, exact(model, likelihood), basis_every=10)[1]
    errors = {}
    for samples in (50, 5000):
        step = ekfac(
            data_loss(model), damping=1e-2, fisher=sampled(model, likelihood, samples), basis_every=10
        )  # steps from 1 on keep the exact Fisher's basis
        _, state, _ = step.precondition(params, given, exactly)
        errors[samples] = max(
            ((state.second_moments[n].value - m.value).norm() / m.value.norm()).item()
            for n, m in exactly.second_moments.items()
        )
    assert errors[5000] < 0.1
    assert errors[5000] < 0.3 * errors[50]


def test_factors_and_eigenvalues_are_the_fishers_own() -> None:
    """B is of the Fisher's gradients, A does not see them; K-FAC's moment is the product of their eigenvalues."""
    model, params, batch = mlp(4)
    given = batch(6)
    fisher = exact(model, lambda z: Categorical(logits=z))
    _, state, info = moments(data_loss(model), params, given, fisher, second_moment=kfac)
    assert not info.skipped
    _, plain, _ = moments(data_loss(model), params, given, empirical)
    G = torch.zeros(3, 3)
    for example in examples(given):
        p = torch.softmax(model(params, example), 0)
        G += (torch.diag(p) - torch.outer(p, p)) / 6
    close(state.factors["2.weight"].B[0], G)
    close(state.factors["0.weight"].A, plain.factors["0.weight"].A)
    for name, (A, B, _) in state.factors.items():  # both layers have one position
        product = torch.outer(torch.linalg.eigvalsh(B[0]), torch.linalg.eigvalsh(A[0]))
        close(state.second_moments[name].value[0, :, :, 0], product)


def test_the_seed_decides_the_draws() -> None:
    model, params, batch = mlp(4)
    given = batch(6)
    fisher = sampled(model, lambda z: Categorical(logits=z), 3)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(moments(data_loss(model), params, given, fisher))
    same_bits(found[0], found[1])
    assert not torch.equal(found[0][0]["0.weight"], found[2][0]["0.weight"])


FISHERS: dict[str, Callable[[Model], Fisher]] = {
    "sampled": lambda model: sampled(model, lambda z: Categorical(logits=z), 2),
    "exact": lambda model: exact(model, lambda z: Categorical(logits=z)),
    "bernoulli": lambda model: sampled(model, lambda z: Bernoulli(logits=z), 2),
    "normal": lambda model: exact(model, lambda z: Normal(z, 1.0)),
    "gradient": lambda model: gradient(lambda p, e: model(p, e).square().sum()),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name != "sampled" else []) for name in FISHERS],
)
@pytest.mark.parametrize("make", [pytest.param(lambda: mlp(4), id="mlp"), pytest.param(conv, marks=pytest.mark.slow)])
def test_compiled_equals_eager_with_few_graphs(name: str, make: Any) -> None:
    model, params, batch = make()
    loss_fn, fisher = data_loss(model), FISHERS[name](model)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def step(params: Params, batch: Any, state: Any, damping: Tensor) -> Any:
        return ekfac(
            loss_fn, damping=damping, basis_every=3, fisher=fisher, second_moment=averaged_intra_batch(0.5)
        ).precondition(params, batch, state)

    batches = [batch(40) for _ in range(3)]  # of full rank: what is not is arbitrary in a stale basis
    state = ekfac(loss_fn, damping=1.0, fisher=fisher).init(params, batches[0])
    runs = []
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        torch.manual_seed(3)
        carried, naturals = state, []
        for t, given in enumerate(batches):
            natural, carried, info = run(params, given, carried, torch.tensor(1.0 / (t + 1)))
            naturals.append((natural, info.loss))
        runs.append(naturals)
    close_trees(runs[1], runs[0], 1e-7)
    assert len(graphs) == 2  # the first step, and one without a refresh


@pytest.mark.parametrize("name", FISHERS)
def test_a_batch_that_is_not_finite_is_skipped(name: str) -> None:
    model, params, batch = mlp(4)
    step = ekfac(data_loss(model), damping=1e-2, fisher=FISHERS[name](model))
    x, y = batch(5)
    _, state, _ = step.precondition(params, (x, y), step.init(params, (x, y)))
    bad = x.clone()
    bad[1] = torch.nan
    natural, new, info = step.precondition(params, (bad, y), state)
    assert info.skipped
    same_bits(pytree.tree_leaves(new), pytree.tree_leaves(state))
    assert all(p.abs().max() == 0 for p in natural.values())
    same_bits(step.init(params, (bad, y)), step.init(params, (x, y)))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("likelihood", "may_be_one"),
    [
        (lambda z: Categorical(probs=z), True),
        (lambda z: OneHotCategorical(probs=z), True),
        (lambda z: Bernoulli(probs=z), True),
        (lambda z: Binomial(3, probs=z), True),
        (lambda z: Normal(z, -1.0), False),
        (lambda z: Normal(z, z), False),
        (lambda z: Independent(Normal(z, -1.0), 1), False),
    ],
    ids=["categorical", "one hot", "bernoulli", "binomial", "normal", "scale", "independent"],
)
def test_outputs_that_make_no_distribution_are_skipped(likelihood: Any, may_be_one: bool, compiled: bool) -> None:
    """Raw outputs in the place of probabilities, which torch's checks would refuse where values can be looked at."""
    params, x = {"w": torch.eye(3)}, torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.7, -0.4]])

    def model(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"])

    step = ekfac(lambda p, x: model(p, x).sum(), damping=1e-2, fisher=exact(model, likelihood))
    call = torch.compile(step.precondition, fullgraph=True, backend="eager") if compiled else step.precondition
    assert call(params, x, step.init(params, x))[2].skipped
    if may_be_one:
        assert not call(params, x[:1], step.init(params, x))[2].skipped


@pytest.mark.parametrize("of", [Categorical, OneHotCategorical])
def test_many_classes_take_no_more_than_their_gradients(of: Any) -> None:
    params, x, classes = {"w": torch.randn(40, 3)}, torch.randn(4, 3), 40

    def model(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"])

    def run() -> Tensor:
        blocks = fisher_blocks(lambda p, x: model(p, x).sum(), params, x, fisher=exact(model, lambda z: of(logits=z)))
        return blocks.matrices["w"]

    gradients = 8 * len(x) * classes * classes * 3  # bytes, [pseudo-examples o i]
    assert peak_allocated(run) < 4 * gradients / 2**20  # classes^2 for each pseudo-example would be 13 times as much
    p = F.linear(x, params["w"]).softmax(-1)
    expected = torch.einsum("noO,ni,nI->oiOI", torch.diag_embed(p) - p[:, :, None] * p[:, None], x, x) / len(x)
    close(run()[0], expected.reshape(120, 120))


def test_the_weight_of_a_row_is_not_rounded_to_the_dtype_of_another_parameter() -> None:
    weights = {"a": torch.randn(10, 5).bfloat16(), "w": torch.randn(10, 5)}

    def model(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"]) + F.linear(x.bfloat16(), params["a"]).double()

    fisher, x = exact(model, lambda z: Categorical(logits=z)), torch.randn(16, 5)
    found = []
    for names in ("aw", "wa"):
        params = {name: weights[name] for name in names}
        found.append(fisher_blocks(lambda p, x: model(p, x).sum(), params, x, fisher=fisher).matrices["w"])
    close(found[0], found[1])


def test_a_running_average_of_draws_starts_at_the_eigenvalues_and_tends_to_the_moment() -> None:
    model, params, batch = mlp(4)
    given = batch(6)
    likelihood = lambda z: Categorical(logits=z)  # noqa: E731
    with pytest.raises(ValueError, match=r"running_average reads the mean .* use sampled"):
        ekfac(data_loss(model), damping=1e-2, second_moment=running_average(0.9), fisher=exact(model, likelihood))
    exactly = moments(data_loss(model), params, given, exact(model, likelihood), basis_every=10**6)[1]
    step = ekfac(
        data_loss(model),
        damping=1e-2,
        second_moment=running_average(0.99),
        fisher=sampled(model, likelihood, 4),
        basis_every=10**6,
    )
    state = exactly
    for _ in range(500):
        _, state, _ = step.precondition(params, given, state)
    for name, m in exactly.second_moments.items():
        assert (state.second_moments[name].value - m.value).norm() < 0.3 * m.value.norm()


def test_outputs_beside_those_that_have_gradients() -> None:
    """A mask reaches the likelihood as it is."""
    params, batch = {"w": torch.randn(1, 5)}, (torch.randn(4, 6, 5), torch.rand(4, 6) < 0.5)
    model = lambda params, example: (F.linear(example[0], params["w"])[:, 0], example[1], 1.0)  # noqa: E731
    likelihood = lambda outputs: Normal(outputs[0] * ~outputs[1], outputs[2])  # noqa: E731
    x, mask = batch
    expected = (torch.einsum("nsi,nsj,ns->ij", x, x, (~mask).double()) / 4)[None]
    loss_fn = lambda params, example: model(params, example)[0].sum()  # noqa: E731
    close(fisher_blocks(loss_fn, params, batch, fisher=exact(model, likelihood)).matrices["w"], expected)
    draws = fisher_blocks(loss_fn, params, batch, fisher=sampled(model, likelihood, 4000)).matrices["w"]
    assert (draws - expected).norm() < 0.1 * expected.norm()


def test_exact_under_vmap() -> None:
    model, params, batch = mlp(4)
    given, fisher = batch(5), FISHERS["exact"](model)
    state = ekfac(data_loss(model), damping=1.0, fisher=fisher).init(params, given)

    def damped(damping: Any) -> Any:
        return ekfac(data_loss(model), damping=damping, fisher=fisher).precondition(params, given, state)[0]

    many = torch.vmap(damped)(torch.tensor([0.1, 0.2]))
    for k, damping in enumerate((0.1, 0.2)):
        close_trees({name: p[k] for name, p in many.items()}, damped(damping))


@pytest.mark.parametrize(
    "likelihood",
    [lambda z: Laplace(z, 1.0), lambda z: Geometric(logits=z), lambda z: Dirichlet(z.exp())],
    ids=["laplace", "geometric", "dirichlet"],
)
def test_draws_that_vmap_cannot_make(likelihood: Any) -> None:
    """Each example by itself, from the same generator."""
    model, params, batch = mlp(4)
    given = batch(5)
    torch.manual_seed(0)
    fisher = sampled(model, likelihood)
    step = ekfac(data_loss(model), damping=1e-2, fisher=fisher, bases={"*": DIAGONAL})
    state = step.init(params, given)
    torch.manual_seed(0)
    _, state, info = step.precondition(params, given, state)
    assert not info.skipped
    assert all(layer.rule for layer in state.layers)
    torch.manual_seed(0)
    squares = []
    for example in examples(given):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        found = likelihood(model(leaves, example))
        logs = found.log_prob(found.sample().detach()).sum()
        squares.append(torch.autograd.grad(logs, [leaves["2.weight"]])[0].square())
    moment = state.second_moments["2.weight"].value[0, :, :, 0]
    close(moment[:, :-1], torch.stack(squares).mean(0))


def test_a_likelihood_that_branches_does_so_for_each_example() -> None:
    x = torch.cat([torch.ones(1, 3), -torch.ones(1, 3)])
    params = {"w": torch.full((2, 3), 0.3)}
    model = lambda params, x: F.linear(x, params["w"])  # noqa: E731
    fisher = exact(model, lambda z: Normal(z, 1.0) if z.sum() > 0 else Normal(z, z.exp()))
    found = [
        fisher_blocks(lambda p, x: model(p, x).sum(), params, batch, fisher=fisher).matrices["w"]
        for batch in (x, x.flip(0))
    ]
    close(found[0][0].diagonal(), (1 + torch.tensor(1.8).exp() + 2).expand(6) / 2)  # outputs of 0.9 and -0.9
    close(found[0], found[1])


def test_what_has_no_closed_form_is_refused_by_name() -> None:
    model, params, batch = mlp(4)
    given, before = batch(3), Distribution._validate_args
    step = ekfac(data_loss(model), damping=1e-2, fisher=exact(model, lambda z: Exponential(z.exp())))
    with pytest.raises(TypeError, match=r"Exponential.*use sampled"):
        step.init(params, given)
    with pytest.raises(TypeError, match=r"likelihood gave a Tensor: return a torch.distributions"):
        ekfac(data_loss(model), damping=1e-2, fisher=sampled(model, lambda z: z)).init(params, given)
    for kind in (exact, sampled):
        with pytest.raises(ValueError, match="likelihood gave no distribution: return a"):
            ekfac(data_loss(model), damping=1e-2, fisher=kind(model, lambda z: [])).init(params, given)
        wrong = kind(lambda params, example: example[1], lambda z: Categorical(logits=z))
        with pytest.raises(TypeError, match="model returned no floating-point tensor"):
            ekfac(data_loss(model), damping=1e-2, fisher=wrong).init(params, given)
    constant = exact(model, lambda z: Normal(torch.zeros(3), 1.0))
    with pytest.raises(ValueError, match="do not depend on the output of the model"):
        ekfac(data_loss(model), damping=1e-2, fisher=constant).init(params, given)
    wrong_model: Any
    wrong_likelihood: Any
    for wrong_model, wrong_likelihood, message in (
        (1, Categorical, "model is a int: pass a function"),
        (model, "normal", "likelihood is a str: pass a function"),
    ):
        for kind in (exact, sampled):
            with pytest.raises(TypeError, match=message):
                kind(wrong_model, wrong_likelihood)
    with pytest.raises(TypeError, match="loss is a NoneType: pass a function"):
        gradient(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is not a Fisher: pass empirical"):
        ekfac(data_loss(model), damping=1e-2, fisher=exact)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples=0"):
        sampled(model, lambda z: Categorical(logits=z), 0)
    assert Distribution._validate_args == before


def test_draws_as_vectors_of_a_one_keep_the_rules() -> None:
    params, x = {"w": torch.randn(3, 4)}, torch.randn(7, 4)

    def model(params: Params, x: Tensor) -> Tensor:
        return F.linear(x, params["w"])

    step = ekfac(
        lambda p, x: model(p, x).cos().sum(), damping=0.1, fisher=sampled(model, lambda z: OneHotCategorical(logits=z))
    )
    assert [layer.rule for layer in step.init(params, x).layers] == ["linear"]
