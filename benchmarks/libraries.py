"""What each library does of the workloads, one function from a `Work` to its `Calls` each.

All take the empirical Fisher of the mean cross-entropy. The peers know linear and convolutional layers alone and leave
out the other parameters (of the five workloads: the norms and embeddings of W3), ours and the naive one take all.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads import DAMPING, Work, cross_entropy, naive, precondition_gradient
from ekfac_func import State, compact, ekfac, per_example_gradients, qr, rank, second_moments, thin
from ekfac_func.types import Params

STEPS = 10  # from one refresh to the next
LEARNING_RATE = 1e-4

Call = Callable[[], Any]


class Calls(NamedTuple):
    """A library's way of each measurement; None where it has none."""

    statistics: Call | None  # T1: factors, eigenbasis and exact moment of one batch
    moment: Call | None  # T2: the exact moment in a known basis
    precondition: Call | None  # T3: one gradient
    steps: Call | None  # T4: `STEPS` training steps, the first with a new basis
    step: Call | None = None  # a whole call of the library's step in a known basis, where it has one


def ours(w: Work, compiled: bool = False, **settings: Any) -> Calls:
    """T1 is the whole of `precondition` on a step with a refresh: its rescaling is counted too.

    The refreshes are those of a training under way, of which the first can be another. T2 is `second_moments`. The
    basis is the identity as a dense matrix, at which every product costs what it does in any basis. settings: of
    `ekfac`.
    """
    ekf = ekfac(w.loss_fn, **{"damping": DAMPING, "basis_every": STEPS, **settings})
    wrap: Callable[[Any], Any] = (lambda f: torch.compile(f, fullgraph=True)) if compiled else (lambda f: f)
    fresh = ekf.init(w.params, w.batch)
    due, known = dataclasses.replace(fresh, step=STEPS), dataclasses.replace(fresh, step=1)
    step = wrap(ekf.precondition)
    gradient = per_example_gradients(w.loss_fn, w.params, w.batch).mean()
    observed: list[State] = []

    def moment(params: Params, batch: Any) -> dict[str, Tensor]:
        return second_moments(w.loss_fn, params, batch, known.bases)

    def precondition(gradient: Params, state: State) -> Params:
        return precondition_gradient(state, gradient, w.params)

    moment_call, precondition_call = wrap(moment), wrap(precondition)

    def rescale() -> Params:
        if not observed:
            observed.append(ekf.precondition(w.params, w.batch, known)[1])
        return precondition_call(gradient, observed[0])

    def steps() -> Params:
        params, state = w.params, due
        for _ in range(STEPS):
            natural, state, _ = step(params, w.batch, state)
            params = {name: p - LEARNING_RATE * natural[name] for name, p in params.items()}
        return params

    return Calls(
        lambda: step(w.params, w.batch, due),
        lambda: moment_call(w.params, w.batch),
        rescale,
        steps,
        lambda: step(w.params, w.batch, known),
    )


def compactly(w: Work) -> Calls:
    """Full bases as reflections, of the samples of a batch."""
    x, y = w.batch
    if y.dim() > 1 or x.dim() > 2:
        raise ValueError("compact is for layers of fewer samples than dimensions")
    return ours(w, bases={"*": compact(len(x))})


def naively(w: Work) -> Calls:
    """Every example's gradient in memory, then one einsum into the basis; it rescales too."""
    ekf = ekfac(w.loss_fn, damping=DAMPING)
    state = ekf.init(w.params, w.batch)
    return Calls(None, lambda: naive(w, state), None, None)


def layers_of(w: Work) -> dict[str, nn.Module]:
    """The layers that the peers know."""
    return {name: m for name, m in w.net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def alternate(w: Work, statistics: Call, moment: Call, precondition: Callable[[list[Tensor]], Any]) -> Call:
    """T4 of a library whose passes give no gradient: a plain one beside them."""

    def steps() -> None:
        for step in range(STEPS):
            (moment if step else statistics)()
            precondition(mean_gradient(w))

    return steps


def mean_gradient(w: Work) -> list[Tensor]:
    """Of the known layers' parameters."""
    parameters = [p for m in layers_of(w).values() for p in m.parameters()]
    return list(torch.autograd.grad(cross_entropy(w.net(w.batch[0]), w.batch[1]), parameters))


def curvlinops(w: Work) -> Calls:
    """A sequence is a row of logits a token, for it takes outputs of two axes alone."""
    from curvlinops import EKFACLinearOperator, FisherType

    parameters = [p for m in layers_of(w).values() for p in m.parameters()]
    net, (x, y) = w.net, w.batch
    net = nn.Sequential(net, nn.Flatten(0, 1)) if y.dim() > 1 else net
    rest: dict[str, Any] = {"check_deterministic": False, "separate_weight_and_bias": False}
    rest |= {"fisher_type": FisherType.EMPIRICAL, "num_data": len(x), "num_per_example_loss_terms": y[0].numel()}

    def made() -> Any:
        return EKFACLinearOperator(net, nn.CrossEntropyLoss(), parameters, [(x, y.flatten())], **rest)

    operator = made()
    operator.compute_eigenvalue_correction()
    gradient = mean_gradient(w)

    def statistics() -> None:
        made().compute_eigenvalue_correction()

    def moment() -> None:
        operator._corrected_eigenvalues = {}
        operator.compute_eigenvalue_correction()

    def precondition(gradient: list[Tensor]) -> Any:
        inverse = operator.inverse(damping=DAMPING) if hasattr(operator, "inverse") else None
        if inverse is None:
            from curvlinops import KFACInverseLinearOperator

            inverse = KFACInverseLinearOperator(operator, damping=DAMPING, use_exact_damping=True)
        return inverse @ gradient

    return Calls(statistics, moment, lambda: precondition(gradient), alternate(w, statistics, moment, precondition))


def nngeometry(w: Work) -> Calls:
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatEKFAC, PVector

    collection = LayerCollection()
    for module in layers_of(w).values():
        collection.add_layer_from_model(w.net, module)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(w.net(x).flatten(0, -2), y.flatten(), reduction="none")
        return each.reshape(len(x), -1).mean(1, keepdim=True)

    backend = TorchHooksJacobianBackend(model=w.net, function=losses, layer_collection=collection)
    matrix = PMatEKFAC(generator=backend, examples=w.batch)
    matrix.update_diag(w.batch)

    def statistics() -> None:
        PMatEKFAC(generator=backend, examples=w.batch).update_diag(w.batch)

    def precondition(gradient: list[Tensor]) -> Any:
        left = iter(gradient)
        named = {
            name: (next(left),) if layer.bias is None else (next(left), next(left))
            for name, layer in collection.layers.items()
        }
        return matrix.solvePVec(PVector(collection, dict_repr=named), regul=DAMPING)

    gradient = mean_gradient(w)
    moment = lambda: matrix.update_diag(w.batch)  # noqa: E731
    return Calls(statistics, moment, lambda: precondition(gradient), alternate(w, statistics, moment, precondition))


def kronfluence(w: Work) -> Calls:
    """Its factors in memory, without its files; its rescaling belongs to influence scores and is left out."""
    from accelerate.state import PartialState
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition
    from kronfluence.task import Task
    from kronfluence.utils.state import State as Processes
    from torch.utils.data import DataLoader, TensorDataset

    PartialState(cpu=True)

    class Likelihood(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            return cross_entropy(model(x), y) * len(x)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task, processes = Likelihood(), Processes(cpu=True)
    model = prepare_model(copy.deepcopy(w.net), task)
    arguments = FactorArguments(use_empirical_fisher=True, use_iterative_lambda_aggregation=True)
    loader = DataLoader(TensorDataset(*w.batch), batch_size=len(w.batch[0]))

    def basis() -> Any:
        fitted = fit_covariance_matrices_with_loader(model, processes, task, loader, arguments, disable_tqdm=True)
        return perform_eigendecomposition(fitted[1], model, processes, arguments, disable_tqdm=True)

    def moment(known: Any) -> Any:
        return fit_lambda_matrices_with_loader(
            model, processes, task, loader, arguments, eigen_factors=known, disable_tqdm=True
        )

    known = basis()
    return Calls(lambda: moment(basis()), lambda: moment(known), None, None)


LIBRARIES: dict[str, Callable[[Work], Calls]] = {
    "ekfac_func": ours,
    "ekfac_func-compiled": lambda w: ours(w, compiled=True),
    "ekfac_func-qr": lambda w: ours(w, refresh=qr()),
    "ekfac_func-rank": lambda w: ours(w, bases={"*": rank(256)}),
    "ekfac_func-thin": lambda w: ours(w, bases={"*": thin}, basis_every=1)._replace(moment=None, precondition=None),
    "ekfac_func-compact": compactly,
    "naive": naively,
    "curvlinops": curvlinops,
    "nngeometry": nngeometry,
    "kronfluence": kronfluence,
}
