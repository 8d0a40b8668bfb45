"""`ekfac`: its options, checked, and the pair of functions that they make."""

from __future__ import annotations  # Dynamo does not evaluate those of functions made while it traces

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .basis import Choices, check_choices, check_patterns, choose, warn_of_large
from .capture import separate
from .certify import certify
from .checks import check_batch, check_count, check_damping, check_decay, check_exponent, check_loss_fn, check_params
from .discovery import checked_options, plan
from .distributed import Ranks, check_ranks
from .factors import WeightSharing, averages, expand
from .fisher import Fisher, blaming, check_estimator, empirical
from .modes import depth
from .orders import DEFAULT_CONTRACTIONS, Contractions, check_contractions
from .refreshes import EIGH, Refresh, check_refresh
from .rules import RULES, Rules
from .second_moment import AtRefresh, SecondMoment, intra_batch
from .spans import check_of_samples
from .states import check_kind_of_state, initial_state
from .step import Method, step
from .types import Batch, Damping, Info, LossAuxFn, LossFn, Number, Params, State


class Init(Protocol):
    """`EKFAC.init`."""

    def __call__(self, params: Mapping[str, Tensor], batch: Batch, *, check: bool = False) -> State: ...


class Precondition(Protocol):
    """`EKFAC.precondition`."""

    def __call__(self, params: Mapping[str, Tensor], batch: Batch, state: State) -> tuple[Params, State, Info]: ...


class EKFAC(NamedTuple):
    """A pair of pure functions.

    `init(params, batch, check=False) -> state` reads the batch for its shapes alone and computes nothing; of a batched
    loss that looks at values it runs the loss on them. With `check=True` it first certifies the capture on this batch,
    at one backward pass an example: ValueError names the first parameter whose captured gradients differ from those of
    each example alone (a rule that reads its calls wrongly, examples that are coupled). The loss may then draw no
    random numbers.
    `precondition(params, batch, state) -> (natural, state, info)` changes nothing of its arguments. What it returns is
    constant to autograd: no derivative goes through a step, w.r.t. damping or anything else. Neither it nor
    `init` is thread-safe: tracing sets flags of torch that all threads read.
    """

    init: Init
    precondition: Precondition


def ekfac(
    loss_fn: LossFn | LossAuxFn,
    *,
    damping: Number | Damping,
    exponent: Number = -1.0,
    second_moment: SecondMoment = intra_batch,
    fisher: Fisher = empirical,
    basis_every: int = 1,
    refresh: Refresh = EIGH,
    moment_every: int = 1,
    at_refresh: AtRefresh | None = None,
    factor_decay: Number = 0.0,
    weight_sharing: WeightSharing = expand,
    bases: Choices | None = None,
    rules: Rules = RULES,
    has_aux: bool = False,
    batched: bool = False,
    randomness: str = "different",
    chunk_size: int | None = None,
    contractions: Contractions = DEFAULT_CONTRACTIONS,
    ranks: Ranks | None = None,
) -> EKFAC:
    """Natural gradients in the Kronecker-factored eigenbasis, from exact per-example gradients.

    George et al. 2018, https://arxiv.org/abs/1806.03884: for each layer
    `natural = Q_B [ (Q_B^T mean(G) Q_A) / (m2 + damping) ] Q_A^T`.

    loss_fn: pure function `(params, example) -> loss` of a dict of tensors and one example, any tree of tensors; the
        loss is a scalar. Its layers are found when it is first met with tensors of some shapes: make it once, not anew
        for each step in eager mode.
    damping: added to the second moment, in loss^2 / parameter^2; positive. A Python number or a 0-d tensor, or a rule
        from the second moments of all layers to the damping of each, as `optim.relative(fraction)`. Of a tensor nobody
        reads the value: where it is not positive the step is skipped.
    exponent: of `m2 + damping`, negative: -1 is the natural gradient, -1/2 a step as that of Adam and SOAP
        (https://arxiv.org/abs/2409.11321) in the eigenbasis.
    second_moment: the estimator of `m2`: `intra_batch`, `averaged_intra_batch(decay)`, `running_average(decay)`,
        `kfac`, or a `SecondMoment` of your own.
    fisher: which gradients make the factors and the moment: `empirical`, `sampled(model, likelihood, samples)`,
        `exact(model, likelihood)`, `gradient(loss)`, or a `Fisher` of your own. The gradient that is rescaled is
        always that of `loss_fn`. Under `torch.compile`, make it outside the compiled function.
    basis_every: steps from one refresh of factors and eigenbases to the next; the first step is one.
    refresh: how a basis is refreshed: `eigh(dtype)`, `qr(iterations)` from the old one, `adaptive(tolerance)` where the
        old one does not do, `staggered(groups, of)` some layers at a time.
    moment_every: steps from one update of the second moment to the next, on a clock of its own; a refresh is always
        one too. Steps between need the gradient alone.
    at_refresh: what becomes of the moment when the basis changes: `reset`, `keep` or `transport`; by default the
        estimator's own.
    factor_decay: weight of the past in a bias-corrected moving average of the factors over the refreshes; 0 takes
        them from the batch of the refresh alone.
    weight_sharing: what a sample of the factors is where an example uses a weight at several positions: `expand`, each
        position, or `reduce`, the example. The moment is exact in both.
    bases: by a pattern of the weight's name, as of a file's, how much of each factor is kept: `FULL`, the default,
        `DIAGONAL`, `blocks(max_dim)`, or `Blocks(inputs, outputs)` for each side, `rank(r)`, `thin` or
        `compact(samples)` for wide layers; the first that fits.
    rules: which torch calls are layers, e.g. `{**RULES, **SUA}`.
    has_aux: `loss_fn` returns a pair (loss, aux); the tree of tensors aux, with an axis n in front, is in `info.aux`.
    batched: `loss_fn` takes the batch as it is and returns the losses `[n]`; aux is returned as it is. It is for models
        that couple their examples, BatchNorm in training mode: the gradient of an example is then that of the batch's
        loss through the example's own activations, as in hook-based K-FAC; w.r.t. a parameter without a rule, and of
        layers on rows that values picked, as by a mask, of the example's own loss through all activations. For
        independent examples it is the same as without, and does without `vmap`. An axis of a layer's input that holds
        several positions of each example must have those of an example one after another, `(n s)`.
    randomness: of dropout and the like inside `loss_fn`, as in `torch.func.vmap`.
    chunk_size: examples (of a Fisher of its own pseudo-examples) differentiated at a time, whose sums add; None takes
        the batch at once. A step with a refresh needs the bases before the moment: what a layer is made of stays until
        then where that of all layers fits into `contractions.max_bytes`, else the batch is differentiated twice, with
        the same random numbers. `thin` and `compact` bases keep the samples of the batch in any case, a compiled step
        everything; there every batch size costs graphs of its own.
    contractions: how the moments are summed, `Contractions(max_bytes, orders, costs)`: the memory that it may take, and
        the order of the products, which changes the cost alone.
    ranks: the processes that step together, each on its share of the batch: `ranks()` of a process group. Factors are
        then formed, and `thin` and `compact` bases refused, for both are of the samples of one process.

    Parameters in half precision have their statistics, and so the state, in float32.

    A batch whose loss, gradient or statistic is not finite is skipped: every tensor of the state stays as it was,
    the step number advances, `natural` is zero and `info.skipped` is true. So is every step without a second moment,
    until there is one: those after a skipped first step, to the next update (`moment_every`) or refresh (`kfac`).

    Arguments that cannot be right raise ValueError or TypeError before anything is computed.
    """
    check_loss_fn(loss_fn)
    check_estimator("", second_moment, fisher, at_refresh)
    if not callable(damping):
        check_damping(damping)
    check_exponent("exponent", exponent)
    check_count("basis_every", basis_every)
    check_count("moment_every", moment_every)
    check_decay("factor_decay", factor_decay)
    if not callable(weight_sharing):
        raise TypeError(f"weight_sharing={weight_sharing!r} is not a function: pass expand or reduce")
    options = checked_options(rules, randomness, chunk_size, has_aux, batched)
    if batched and fisher.loss is not None:
        raise ValueError(
            f"the {fisher.name} Fisher with batched=True: its loss is of one example, where the batch is taken as it "
            "is, use empirical"
        )
    check_refresh("refresh", refresh)
    check_contractions(contractions)
    if refresh.groups > basis_every:
        raise ValueError(
            f"refresh={refresh.name} in {refresh.groups} groups with basis_every={basis_every!r}: groups take turns, "
            f"give basis_every >= {refresh.groups}"
        )
    choices = {} if bases is None else bases
    check_choices(choices)
    check_ranks(ranks)
    check_of_samples(choices, ranks is not None, basis_every, factor_decay, second_moment, at_refresh)
    how = Method(
        loss_fn=loss_fn,
        options=options,
        curvature_loss=loss_fn if fisher.loss is None else fisher.loss,
        of_curvature=options if fisher.loss is None else options._replace(has_aux=False),
        fisher=fisher,
        damping=damping,
        exponent=exponent.detach() if isinstance(exponent, Tensor) else exponent,
        second_moment=second_moment,
        at_refresh=second_moment.at_refresh if at_refresh is None else at_refresh,
        moment_every=moment_every,
        basis_every=basis_every,
        refresh=refresh,
        bases=choices,
        factor_decay=factor_decay,
        averaged=averages(factor_decay),
        weight_sharing=weight_sharing,
        contractions=contractions,
        ranks=ranks,
    )

    def init(params: Mapping[str, Tensor], batch: Batch, *, check: bool = False) -> State:
        check_params(params)
        check_batch(batch)
        if check:
            certify(loss_fn, params, batch, options)
        examples = fisher.examples(params, batch)
        layers = blaming(fisher, plan, how.curvature_loss, separate(params), examples, how.of_curvature).layers
        check_patterns("bases", layers, choices)
        check_patterns("orders", layers, contractions.orders)
        chosen = choose(layers, choices)
        if not torch.compiler.is_compiling():
            warn_of_large(layers, chosen)
        return initial_state(layers, chosen, params, how.averaged)

    @torch.no_grad()
    def precondition(params: Mapping[str, Tensor], batch: Batch, state: State) -> tuple[Params, State, Info]:
        check_params(params)
        count = check_batch(batch)
        check_kind_of_state(state)
        in_transform = not torch.compiler.is_compiling() and depth() > 0
        if in_transform:  # which may be forward mode
            params, batch, state = _constant((dict(params), batch, state))
        stepped = step(how, params, batch, state, count)
        return _constant(stepped) if in_transform else stepped

    return EKFAC(init, precondition)


def _constant(tree: Any) -> Any:
    """The tensors detached."""
    return pytree.tree_map_only(Tensor, Tensor.detach, tree)
