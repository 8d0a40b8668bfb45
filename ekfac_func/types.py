"""The trees that flow through a step. Shape comments use the letters of `kronecker.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Params = dict[str, Tensor]
Batch = Any  # the tree of one example, each tensor with a leading axis n
LossFn = Callable[[Params, Any], Tensor]  # (params, example) -> scalar loss
Number = float | Tensor  # a Python number or a 0-d tensor


class Factored(NamedTuple):
    """Per-example gradients `G[n] = sum_s g[n, s] a[n, s]^T`, never formed."""

    a: Tensor  # [n b s i k] inputs
    g: Tensor  # [n b s o] output gradients
    x: Tensor | None = None  # [n b p i] samples of the factor A where they are not a's own (SUA)


class Dense(NamedTuple):
    """Per-example gradients as they are."""

    G: Tensor  # [n b o i k]


Term = Factored | Dense


class Layer(NamedTuple):
    """One block of the curvature: a weight, the bias that is its last input column, and its sizes."""

    weight: str
    bias: str | None
    sizes: tuple[int, int, int, int]  # b, o, i, k; i counts the bias


class Factors(NamedTuple):
    """Kronecker factors of one layer, and the weight of what their moving average has seen: 0 nothing, 1 all."""

    A: Tensor  # [b i i] of the inputs
    B: Tensor  # [b o o] of the output gradients
    weight: Tensor  # []


class Moment(NamedTuple):
    """The second moment of one layer in its eigenbasis, and the weight of what it has seen: 0 nothing, 1 all."""

    value: Tensor  # [b O I k]
    weight: Tensor  # []


class Basis(NamedTuple):
    """Kronecker-factored eigenbasis (KFE) of one layer: orthonormal columns."""

    Q_A: Tensor  # [b i I]
    Q_B: Tensor  # [b o O]


class Sums(NamedTuple):
    """What the batch says of one layer: sums over examples, or after one division their means."""

    gradient: Tensor  # [b o i k] of G
    projected: Tensor  # [b O I k] of Q_B^T G Q_A
    square: Tensor | None  # [b O I k] of (Q_B^T G Q_A)^2, where the estimator asks for it


@dataclass(frozen=True)
class State:
    """What one step hands to the next, by the name of each layer's weight. Never mutated."""

    step: int
    factors: dict[str, Factors]
    bases: dict[str, Basis]
    second_moments: dict[str, Moment]


class Info(NamedTuple):
    """What a step learned and does not carry on."""

    loss: Tensor  # [] mean over the batch
    gradient: Params  # mean gradient, a tree like params
    skipped: Tensor  # [] bool: a loss, gradient or statistic was not finite, nothing was learned
    kept_bases: Tensor  # [] number of eigenbases that could not be refreshed, the old ones serve on
    damping: Tensor  # [] as used


_CHILDREN = ("factors", "bases", "second_moments")

pytree.register_pytree_node(
    State,
    lambda state: ([getattr(state, field) for field in _CHILDREN], state.step),
    lambda children, step: State(step, *children),
    serialized_type_name="ekfac_func.State",
    flatten_with_keys_fn=lambda state: (
        [(pytree.GetAttrKey(field), getattr(state, field)) for field in _CHILDREN],
        state.step,
    ),
)
torch.serialization.add_safe_globals([State, Factors, Basis, Moment])
