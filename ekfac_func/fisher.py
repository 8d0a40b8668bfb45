"""Which gradients make the moment, each a value: those of the data's loss, or those of a Fisher of the model's own.

A Fisher is a curvature loss and the pseudo-examples that it is differentiated on, such that the block of the curvature
is the mean over pseudo-examples of `G G^T`. So every stage after capture stays as it is.
"""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Bernoulli, Binomial, Categorical, Distribution, Independent, Normal, OneHotCategorical
from torch.utils import _pytree as pytree

from .checks import check_count, check_function
from .draws import undrawn
from .layout import Flat, filled, specs
from .second_moment import SecondMoment
from .tap import unchecked
from .types import Batch, LossFn, Params, batch_size, statistics_dtype
from .watch import DATA_DEPENDENT

Model = Callable[[Params, Any], Any]
"""(params, example) -> output of one example, a tensor or a tree of tensors"""

Likelihood = Callable[[Any], Any]
"""(output of one example) -> a `torch.distributions.Distribution`, or a tree of independent ones"""


class Fisher(NamedTuple):
    """Which per-example gradients make the factors and the second moment.

    loss: the curvature loss of one pseudo-example; None takes the loss of the data.
    examples: `(params, batch) -> pseudo-examples`, a tree with a leading axis; those of one example are adjacent.
    draws: whether the mean of the gradients is that of independent draws, which `running_average` relies on.
    """

    name: str
    loss: LossFn | None
    examples: Callable[[Mapping[str, Tensor], Batch], Batch]
    draws: bool = True


def check_fisher(fisher: object, name: str = "fisher") -> None:
    """Refuse what is no Fisher. name: of the argument, with what a message begins with."""
    if not isinstance(fisher, Fisher):
        raise TypeError(
            f"{name}={fisher!r} is not a Fisher: pass empirical, sampled(model, likelihood), exact(model, likelihood), "
            "gradient(loss) or a Fisher"
        )


def check_estimator(where: str, second_moment: object, fisher: Fisher, at_refresh: object) -> None:
    """Refuse what is no estimator, or none of this Fisher. where: what a message begins with."""
    if not isinstance(second_moment, SecondMoment):
        raise TypeError(
            f"{where}second_moment={second_moment!r} is not an estimator: pass intra_batch, "
            "averaged_intra_batch(decay), running_average(decay), kfac or a SecondMoment"
        )
    check_fisher(fisher, f"{where}fisher")
    if second_moment.reads_mean and not fisher.draws:
        raise ValueError(
            f"{where}second_moment={second_moment.name} reads the mean of gradients that are draws, which the "
            f"{fisher.name} Fisher does not have: use sampled(model, likelihood) with it, or another estimator"
        )
    if at_refresh is not None and not callable(at_refresh):
        raise TypeError(f"{where}at_refresh={at_refresh!r} is not a function: pass reset, keep or transport")


def blaming(fisher: Fisher, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of the curvature loss; a note to its errors, which speak of loss_fn, says whose loss that is."""
    if fisher.loss is None or torch.compiler.is_compiling():
        return function(*args)
    try:
        return function(*args)
    except Exception as error:
        if any("loss_fn" in said for said in (str(error), *getattr(error, "__notes__", ()))):
            error.add_note(
                f"The loss_fn of this error is the curvature loss of the {fisher.name} Fisher, not that of ekfac."
            )
        raise


def _check_functions(model: object, likelihood: object) -> None:
    check_function("model", model, "(params, example) -> output")
    check_function("likelihood", likelihood, "from an output to its distribution")


def _as_they_are(params: Mapping[str, Tensor], batch: Batch) -> Batch:
    return batch


empirical = Fisher("empirical", None, _as_they_are)
"""The gradients of the data's loss, with the labels of the batch."""


def gradient(loss: LossFn) -> Fisher:
    """The gradients of a curvature loss of your own, `(params, example) -> scalar`, on the examples of the batch."""
    check_function("loss", loss, "(params, example) -> scalar")
    return Fisher("gradient", loss, _as_they_are)


def sampled(model: Model, likelihood: Likelihood, samples: int = 1) -> Fisher:
    """The Fisher with labels drawn from the model: `mean over n and draws of G G^T`, G of `-log p(label | example)`.

    model: `(params, example) -> output`, as the loss computes it.
    likelihood: the output of one example to its distribution, `lambda logits: Categorical(logits=logits)`; an output
        of many elements or positions is as many independent labels, a tree of distributions likewise.
    samples: draws for each example; the pseudo-examples are `n samples`, so cost and memory grow with it.

    The draws come from torch's generator, so its seed reproduces them; those of distributions that `vmap` does not
    know, such as MultivariateNormal and Laplace, are made in a loop over the examples. The loss is the sum over all
    labels of an example: of a data loss that is their mean over T positions the moment is T^2 times smaller.
    Martens & Grosse 2015, https://arxiv.org/abs/1503.05671, section 5.
    """
    _check_functions(model, likelihood)
    check_count("samples", samples)

    def loss(params: Params, example: Any) -> Tensor:
        outputs, poison = _cleaned(model(params, example))
        with unchecked():
            found = _distributions(likelihood(outputs))
            drawn = [distribution.sample().detach() for distribution in found]
            logs = [d.log_prob(y).sum() for d, y in zip(found, drawn, strict=True)]
        return poison - torch.stack(logs).sum()

    def examples(params: Mapping[str, Tensor], batch: Batch) -> Batch:
        return pytree.tree_map(lambda leaf: _repeated(leaf, samples), batch)

    return Fisher("sampled", loss, examples)


def exact(model: Model, likelihood: Likelihood) -> Fisher:
    """The Fisher as the expectation over the model's own distribution; no label is read and nothing is drawn.

    model, likelihood: as in `sampled`. Distributions with a finite support (Categorical, OneHotCategorical) are
    enumerated, element by element; Bernoulli and Binomial give `sqrt(variance) grad logits`; a Normal gives
    `grad loc / scale` and, where its scale depends on the output, `sqrt(2) grad scale / scale`. `Independent` of these
    too. Others raise TypeError: use `sampled`.

    This is the generalised Gauss-Newton matrix of `-log p`: with `Normal(output, 1)` that of half the squared error
    (Martens 2020, https://arxiv.org/abs/1412.1193). An example becomes as many pseudo-examples as its distributions
    have values: classes times positions, elements of a Normal or Bernoulli. A step whose outputs make no distribution,
    by negative probabilities or scales, is skipped.
    """
    _check_functions(model, likelihood)

    def loss(params: Params, example: Any) -> Tensor:
        part, row, weight = example
        outputs, poison = _cleaned(model(params, part))
        with unchecked():
            rows = torch.cat(_rows(likelihood(outputs)))
        return poison + weight * rows.gather(0, row[None])[0]

    @torch.compiler.assume_constant_result
    def rows_of_shapes(param_specs: Any, example: Flat) -> tuple[int, ...]:
        """`_live_rows` without values, as a constant of a graph."""
        with undrawn([]), FakeTensorMode(allow_non_fake_inputs=True):
            without_values = filled((param_specs, pytree.tree_unflatten(*example)))
            return tuple(sorted(_live_rows(model, likelihood, *without_values)))

    def examples(params: Mapping[str, Tensor], batch: Batch) -> Batch:
        param_specs, example = specs(params, batch)
        n = batch_size(batch)
        try:
            rows = rows_of_shapes(param_specs, example)
        except DATA_DEPENDENT:  # branches on values, by which examples may differ
            with undrawn(pytree.tree_leaves((params, batch))):
                each = (pytree.tree_map(lambda leaf, k=k: leaf[k], batch) for k in range(n))
                found = (_live_rows(model, likelihood, dict(params), one) for one in each)
                rows = tuple(sorted(set().union(*found)))
        if not rows:
            raise ValueError(
                "likelihood gave distributions that do not depend on the output of the model: their Fisher is zero, "
                "make them of the output"
            )
        row = torch.tensor(rows, device=next(iter(params.values())).device).expand(n, len(rows)).flatten()
        dtype = functools.reduce(torch.promote_types, map(statistics_dtype, params.values()))
        weight = torch.full_like(row, math.sqrt(len(rows)), dtype=dtype)
        return pytree.tree_map(lambda leaf: _repeated(leaf, len(rows)), batch), row, weight

    return Fisher("exact", loss, examples, draws=False)


def _live_rows(model: Model, likelihood: Likelihood, params: Params, example: Any) -> set[int]:
    """Which of an example's `_rows` depend on the output."""
    leaves, tree = pytree.tree_flatten(model(params, example))
    real = _real(leaves)
    live: list[bool] = []

    def parts(*of: Tensor) -> list[Tensor]:
        given = dict(zip(real, of, strict=True))
        with unchecked():
            found = _rows(likelihood(pytree.tree_unflatten([given.get(k, x) for k, x in enumerate(leaves)], tree)))
        live.extend(part.requires_grad for part in found for _ in range(len(part)))
        return found

    with torch.enable_grad():
        torch.func.vjp(parts, *(leaves[k] for k in real))
    return {row for row, needed in enumerate(live) if needed}


def _rows(distributions: Any) -> list[Tensor]:
    """Flat tensors whose gradients w.r.t. the output make its Fisher: `F = sum_r grad r grad r^T`.

    NaN for parameters that a distribution cannot have, which torch's own checks are not there to refuse.
    """
    return [part for distribution in _distributions(distributions) for part in _rows_of(distribution)]


def _rows_of(distribution: Distribution) -> list[Tensor]:
    match distribution:
        case Independent():
            return _rows_of(distribution.base_dist)
        case Normal():
            loc, scale = distribution.loc, distribution.scale
            scale = torch.where(scale > 0, scale, torch.nan)
            return [(loc / scale.detach()).flatten(), (math.sqrt(2) * scale.log()).flatten()]
        case Bernoulli() | Binomial():  # every value's gradient is a multiple of that of the logits
            logits = distribution.logits
            count = distribution.total_count if isinstance(distribution, Binomial) else 1
            variance = count * logits.sigmoid() * (-logits).sigmoid()  # torch's is 0 where p rounds to 1
            p = distribution.probs
            variance = torch.where((p >= 0) & (p <= 1), variance, torch.nan)
            return [(variance.detach().sqrt() * logits).flatten()]
        case Distribution(has_enumerate_support=True):
            logs = _log_probabilities(distribution)
            p = logs.detach().exp()
            p = torch.where((getattr(distribution, "probs", p) >= 0).all(), p, torch.nan)
            return [torch.where(p > 0, p.sqrt() * logs, 0).flatten()]
    raise TypeError(
        f"likelihood gave a {type(distribution).__name__}, whose Fisher is not known in closed form: use "
        "sampled(model, likelihood, samples)"
    )


def _log_probabilities(distribution: Distribution) -> Tensor:
    """Of the values that it can take, the first axis."""
    if type(distribution) is Categorical or type(distribution) is OneHotCategorical:  # and no subclass of a user
        return distribution.logits.movedim(-1, 0)  # from `log_prob` the gradient takes classes^2 for each output
    return distribution.log_prob(distribution.enumerate_support())


def _distributions(tree: Any) -> list[Distribution]:
    found = pytree.tree_leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Distribution))
    if not found:
        raise ValueError(
            "likelihood gave no distribution: return a torch.distributions.Distribution, or a tree of them"
        )
    for leaf in found:
        if not isinstance(leaf, Distribution):
            raise TypeError(
                f"likelihood gave a {type(leaf).__name__}: return a torch.distributions.Distribution, such as "
                "Categorical(logits=output)"
            )
    return found


def _cleaned(outputs: Any) -> tuple[Any, Tensor]:
    """Outputs that a distribution can be made of, and 0, or NaN where they were not: samplers raise on NaN."""
    leaves, tree = pytree.tree_flatten(outputs)
    poison = []
    for k in _real(leaves):
        bad = leaves[k].isnan() | (leaves[k] == torch.inf)
        poison.append(torch.where(bad.detach().any(), torch.nan, 0.0).to(leaves[k].dtype))
        leaves[k] = torch.where(bad, 0, leaves[k])
    return pytree.tree_unflatten(leaves, tree), torch.stack(poison).sum()


def _real(leaves: Sequence[Any]) -> list[int]:
    """Which leaves of an output have gradients; others, such as masks, are handed on."""
    real = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not real:
        raise TypeError("model returned no floating-point tensor: return what likelihood makes a distribution of")
    return real


def _repeated(leaf: Tensor, times: int) -> Tensor:
    """Each example as many times, one after the other."""
    return leaf[:, None].expand(leaf.shape[0], times, *leaf.shape[1:]).flatten(0, 1)
