"""The trees that flow through a step. Shape comments use the letters of `kronecker.py`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .patches import Patches

Params = dict[str, Tensor]
Batch = Any  # the tree of one example, each tensor with a leading axis n
LossFn = Callable[[Params, Any], Tensor]  # (params, example) -> scalar loss
LossAuxFn = Callable[[Params, Any], tuple[Tensor, Any]]  # (params, example) -> (scalar loss, aux), with has_aux
Number = float | Tensor  # a Python number or a 0-d tensor


def batch_size(batch: Batch) -> int:
    """The examples of a batch, which has a tensor."""
    return pytree.tree_leaves(batch)[0].shape[0]


class Factored(NamedTuple):
    """Per-example gradients `G[n] = sum_s g[n, s] a[n, s]^T`, formed only where that is cheaper."""

    a: Tensor | Patches  # [n b s i k] inputs
    g: Tensor  # [n b s o] output gradients
    x: Tensor | None = None  # [n b p i] samples of the factor A where they are not a's own (SUA)
    counted: Tensor | None = None  # [n b s] which positions of a block are one of its own, where not all are

    @property
    def inputs(self) -> Tensor:
        """a, written out."""
        return self.a.write() if isinstance(self.a, Patches) else self.a


class OneHot(NamedTuple):
    """Per-example gradients `G[n] = sum_s onehot(ids[n, s]) g[n, s]^T` of a table: ids in place of one-hot vectors.

    The letters follow the table's axes, so that the ids lie on o and the gradients on i. b and k are 1.
    """

    ids: Tensor  # [n s]
    size: int  # o, the rows of the table
    g: Tensor  # [n s i] gradients of what was looked up; zero where the id is padding
    counted: Tensor  # [n s] 1, or 0 where the id is padding


class Dense(NamedTuple):
    """Per-example gradients as they are."""

    G: Tensor  # [n b o i k]


Term = Factored | OneHot | Dense
Terms = tuple[Term, ...]  # whose sum a layer's gradients are: at most one Factored and one OneHot, or one Dense


def statistics_dtype(p: Tensor) -> torch.dtype:
    """In which the statistics of a parameter are summed and kept: float32 for half precision."""
    return torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype


class Layer(NamedTuple):
    """One block of the curvature: a weight, the bias that is its last input column, and where their entries lie.

    `weight.reshape(split).permute(order).reshape(sizes)` is `[b o i k]`, before the bias joins i.
    """

    weight: str
    bias: str | None
    sizes: tuple[int, int, int, int]  # b, o, i, k; i counts the bias
    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]  # of the weight
    bias_shape: tuple[int, ...]  # () where there is no bias
    table: bool = False  # o counts the rows of a lookup table: its factor is diagonal
    rule: str | None = None  # the torch functions that a rule read; None where the gradients are taken as they are
    hidden_by: str | None = None  # what kept it from a rule; `NO_CALL` beside a rule: this batch does not use it


NO_CALL = "no call"
"""`Layer.hidden_by` of a parameter that a batch does not use. The layer has a rule too if other batches use it.

In a state, a layer has both if its last refresh fell on a batch that did not use it; the next batch that uses it
refreshes it.
"""


def shapes_of(layers: Iterable[Layer]) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter, by name."""
    found = {}
    for layer in layers:
        found[layer.weight] = layer.shape
        if layer.bias is not None:
            found[layer.bias] = layer.bias_shape
    return found


class Factors(NamedTuple):
    """Kronecker factors of one layer, and the weight of what their moving average has seen: 0 nothing, 1 all."""

    A: Tensor  # [b i i] of the inputs, or its diagonal blocks [b m d d]; [b 0 0] where none is carried
    B: Tensor  # [b o o] of the output gradients, or its diagonal blocks [b m d d]; [b 0 0] where none is carried
    weight: Tensor  # []


class Gram(NamedTuple):
    """A Kronecker factor `x^T x` that is never formed."""

    x: Tensor  # [b samples d]


Factor = Tensor | Gram  # [b d d], or its diagonal blocks [b m d d]


class Means(NamedTuple):
    """Kronecker factors of one batch."""

    A: Factor
    B: Factor
    positions: Number  # uses of the weight by an example, [b] where blocks differ; times A x B it estimates E[G^2]


class Moment(NamedTuple):
    """The second moment of one layer in its eigenbasis, and the weight of what it has seen: 0 nothing, 1 all."""

    value: Tensor  # [b O I k]
    weight: Tensor  # []


class Spectrum(NamedTuple):
    """The second moment of one layer as a damping rule reads it: with how many coordinates each entry stands for."""

    value: Tensor  # [b O I k]
    weight: Tensor  # []
    counts: Tensor  # [O I], all 1 but for what lies outside of a basis of `rank(r)`
    size: int  # coordinates of the layer; those that no entry stands for (`thin`) have a second moment of zero


Damping = Callable[[Mapping[str, Spectrum]], Mapping[str, Number]]
"""second moment of each layer -> damping of each, a number or `[]`"""


class Reflections(NamedTuple):
    """A full orthonormal side `Q = (I - V W^T) diag(E, I)`, `[b d d]` unwritten: reflections, and a rotation of r axes.

    The compact form of r Householder reflections: Schreiber & Van Loan 1989, https://doi.org/10.1137/0910005.
    """

    V: Tensor  # [b d r]
    W: Tensor  # [b d r]
    E: Tensor  # [b r r]

    @property
    def shape(self) -> tuple[int, int, int]:
        b, d, _ = self.V.shape
        return b, d, d

    def dim(self) -> int:
        return 3


Side = Tensor | Reflections


class Basis(NamedTuple):
    """Kronecker-factored eigenbasis (KFE) of one layer: orthonormal columns.

    A side is full, `[b i I]`, or block-diagonal, `[b m d D]` of m blocks: the last one is filled up with zeros where d
    does not divide the side, so that I and O are m d. Blocks of d = 1 leave the side as it is. A side of `rank(r)` has
    I = r + 1 < i: r orthonormal columns, and a column of zeros whose coordinate stands for all that lies outside of
    them, in the moment for its mean. Of a `thin` layer the state has no columns. A side of `compact(samples)` is full.
    """

    Q_A: Any  # Side, any but `compact` a tensor: [b i I] or [b m d D]
    Q_B: Any  # [b o O] or [b m d D]


def constants(sizes: Iterable[int]) -> tuple[int, ...]:
    """Sizes as Python numbers. Those of a second model are symbols to Dynamo; `range` makes it guard their values."""
    return tuple(len(range(size)) for size in sizes)


def outside(Q: Side) -> int:
    """Dimensions that a side of `rank(r)` leaves to its complement; 0 of any other."""
    return Q.shape[-2] - Q.shape[-1] + 1 if Q.shape[-1] < Q.shape[-2] else 0


def turns(Q: Side) -> int:
    """Multiplications for each entry that a side turns; 0 for a side that turns nothing."""
    return 2 * Q.E.shape[-1] if isinstance(Q, Reflections) else Q.shape[-1] if Q.shape[-1] > 1 else 0


def is_matrix(Q: Side) -> bool:
    """Whether a side is one matrix: neither reflections nor blocks, nor left in its own coordinates."""
    return isinstance(Q, Tensor) and Q.dim() == 3 and Q.shape[-1] > 1


class Sums(NamedTuple):
    """What the batch says of one layer: sums over examples, or after one division their means."""

    gradient: Tensor  # [b o i k] of G
    projected: Tensor  # [b O I k] of Q_B^T G Q_A
    square: Tensor | None  # [b O I k] of (Q_B^T G Q_A)^2, where the estimator asks for it


@dataclass(frozen=True, repr=False)
class State:
    """What one step hands to the next, by the name of each layer's weight. Never mutated.

    step: how many steps were taken.
    factors, bases, second_moments: of a layer with o outputs and i inputs (its bias one of them) in the full basis
        together `2 (o^2 + i^2) + o i` numbers; `describe` prints those of a model.
    layers: for readers of a state; `precondition` finds them anew.
    """

    step: int
    factors: dict[str, Factors]
    bases: dict[str, Basis]
    second_moments: dict[str, Moment]
    layers: tuple[Layer, ...] = ()

    def __repr__(self) -> str:
        moments = {name: tuple(moment.value.shape) for name, moment in self.second_moments.items()}
        return f"State(step={self.step}, second_moments of shapes {moments})"


class Info(NamedTuple):
    """What a step learned and does not carry on.

    loss, gradient: means over the batch; gradient is a tree like params.
    skipped: a bool: something was not finite, or there is no second moment yet; nothing was learned.
    kept_bases: how many eigenbases could not be refreshed; the old ones serve on.
    damping: as used; `[layers]` of a rule.
    aux: what the loss returned beside, with has_aux.
    """

    loss: Tensor  # []
    gradient: Params
    skipped: Tensor  # []
    kept_bases: Tensor  # []
    damping: Tensor  # [] or [layers]
    aux: Any = ()


_CHILDREN = ("factors", "bases", "second_moments")


def _unflattened(children: Iterable[Any], constants: Any) -> State:
    (step, layers), (factors, bases, second_moments) = constants, children
    return State(step, factors, bases, second_moments, layers)


pytree.register_pytree_node(
    State,
    lambda state: ([getattr(state, field) for field in _CHILDREN], (state.step, state.layers)),
    _unflattened,
    serialized_type_name="ekfac_func.State",
    flatten_with_keys_fn=lambda state: (
        [(pytree.GetAttrKey(field), getattr(state, field)) for field in _CHILDREN],
        (state.step, state.layers),
    ),
)
torch.serialization.add_safe_globals([State, Factors, Basis, Reflections, Moment, Layer])
