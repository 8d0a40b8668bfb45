"""Which way each layer's second moment is summed, as data: from sizes and a table of costs, nothing timed.

Orders of `sum_n (Q_B^T G[n] Q_A)^2` for one layer, all exact:

| order | operations | extra memory |
|---|---|---|
| one position, so that the square factors | 2n(o^2 + i^2) + 2noi | none |
| project, then form G[n] | 2ns(o^2 + i^2) + 2nsoi | n o i |
| form G[n], then project | 2nsoi + 2n(o i^2 + o^2 i) | n o i |
| pairs of positions | 2ns(o^2 + i^2) + ns(s+1)oi | ns(s+1)(o + i)/2 |

and those between the second and the third. Blocks of examples bound the extra memory.
"""

from __future__ import annotations

import enum
import fnmatch
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import opt_einsum
import torch
from torch import Tensor

from . import kernels
from .blocking import MAX_BYTES, NOMINAL_N, fitting, nominal
from .checks import check_count
from .kronecker import count
from .modes import opaque
from .patches import Patches
from .subspace import incomplete
from .types import NO_CALL, Basis, Dense, Factored, Layer, OneHot, Terms, constants, is_matrix, outside, turns
from .winograd import POSITIONS, filters


class Order(enum.Enum):
    """What is done in turn, as each value says; a and g are the inputs and output gradients of a layer.

    `ONE_POSITION` is for a weight that an example uses once, `KERNEL` for CUDA devices, `IDS` for lookup tables and
    `AS_GIVEN` for gradients that no rule read.
    """

    ONE_POSITION = "project a and g, multiply the squares"
    PAIRS = "project a and g, multiply pairs of positions"
    PROJECT_BOTH = "project a and g, form G[n]"
    PROJECT_INPUTS = "project a, form G[n], project its outputs"
    PROJECT_OUTPUTS = "project g, form G[n], project its inputs"
    FORM_FIRST = "form G[n], project it"
    KERNEL = "project a and g, sum G[n] and its square in the GPU kernel"
    IDS = "add up ids, project, add rows"
    AS_GIVEN = "project G[n]"


class Cost(NamedTuple):
    """What a device does in a second. Only ratios matter."""

    operations: float  # floating-point, of a large matrix product
    bytes: float  # between memory and processor
    cache: int  # bytes that stay near the processor from one product to the next


Costs = Mapping[tuple[str, torch.dtype], Cost]  # by type of device, and dtype of the statistics

COSTS: Costs = {
    ("cpu", torch.float32): Cost(1.2e11, 1e10, 2**21),
    ("cpu", torch.float64): Cost(6e10, 1e10, 2**21),
    ("cuda", torch.float32): Cost(5e13, 4e12, 0),
    ("cuda", torch.float64): Cost(5e13, 4e12, 0),
}
"""By type of device and dtype of the statistics: two x86-64 cores as measured, a GPU by its data sheet."""


class Contractions(NamedTuple):
    """How the second moments of a model are summed.

    max_bytes: of per-example gradients, or of what is written to sum their squares, that exist at a time; None is a
        quarter of what the layers' inputs and output gradients take, or 64 MiB where that is more. One example is
        never split.
    orders: by a pattern of the weight's name, as of a file's, the order that is taken; the first that fits. The
        cheapest by `costs` where none does.
    costs: of devices and dtypes; of others those of a CPU in float32 hold.
    """

    max_bytes: int | None = None
    orders: Mapping[str, Order] = {}
    costs: Costs = COSTS


DEFAULT_CONTRACTIONS = Contractions()
BLOCK_BYTES = 2**24  # of inputs and output gradients that are projected at a time, in eager mode
ROWS = 512  # or so many positions, where that is more: beside their product the basis takes little time to read
TURNED = 5  # times that minimal filtering reads or writes an entry of patches or of a basis, as the time it takes
CACHE_SPEED = 4  # bytes in cache that are read or written while one of memory is
FORMED = (Order.PROJECT_BOTH, Order.PROJECT_INPUTS, Order.PROJECT_OUTPUTS, Order.FORM_FIRST)


class Step(NamedTuple):
    """One product, of a nominal batch of 256 examples."""

    name: str
    operations: int  # floating-point
    bytes: int  # read from memory and written to it
    side: str = ""  # "a" or "g", where it projects G[n] on Q_A or Q_B


class Contraction(NamedTuple):
    """How the second moment of one layer is summed."""

    order: Order
    steps: tuple[Step, ...]
    block: int | None = None  # examples that are taken at a time, as memory asks for; None is all
    part: int | None = None  # of a block, of which G[n] is formed at a time, as the cache does
    operator: bool = False  # whether a graph has it as one operator, which runs as in eager mode

    @property
    def operations(self) -> int:
        """Floating-point, of a nominal batch."""
        return sum(step.operations for step in self.steps)

    def __str__(self) -> str:
        return ", ".join(step.name for step in self.steps)


def check_contractions(chosen: Contractions) -> None:
    """contractions: a budget of at least a byte, and orders."""
    if not isinstance(chosen, Contractions):
        raise TypeError(f"contractions is a {type(chosen).__name__}: give Contractions(max_bytes, orders, costs)")
    if chosen.max_bytes is not None:
        check_count("max_bytes", chosen.max_bytes)
    if not isinstance(chosen.orders, Mapping):
        raise TypeError(f"orders is {chosen.orders!r}: give a dict from patterns of names to orders")
    if not isinstance(chosen.costs, Mapping) or not all(isinstance(cost, Cost) for cost in chosen.costs.values()):
        raise TypeError(f"costs is {chosen.costs!r}: give a dict from (type of device, dtype) to Cost")
    for pattern, order in chosen.orders.items():
        if not isinstance(pattern, str):
            raise TypeError(f"orders has the pattern {pattern!r}: give a string, as of a file's name")
        if not isinstance(order, Order):
            raise TypeError(f"orders[{pattern!r}] is {order!r}: give one of {', '.join(map(str, Order))}")


def budget(chosen: Contractions, of_batch: int) -> int:
    """max_bytes. of_batch: bytes of the layers' inputs and output gradients."""
    return max(MAX_BYTES, of_batch // 4) if chosen.max_bytes is None else chosen.max_bytes


def contraction_of(layer: Layer, terms: Terms, basis: Basis, chosen: Contractions, bytes_each: int) -> Contraction:
    """How the moment of a layer is summed. ValueError where an order that is asked for cannot do it.

    A layer that the batch does not use has gradients of zero as they are, whatever order its calls are to have.

    bytes_each: bytes of an example of all layers' inputs and output gradients.
    """
    (order,) = (None,) if layer.hidden_by == NO_CALL else _order(layer.weight, (chosen.orders,))
    most = budget(chosen, bytes_each * nominal(count(terms)))
    return contraction(terms, basis, order, most, chosen.costs, layer.weight)


@torch.compiler.assume_constant_result
def _order(name: str, orders: tuple[Mapping[str, Order]]) -> tuple[Order | None]:
    fits = (order for pattern, order in orders[0].items() if fnmatch.fnmatchcase(name, pattern))
    return (next(fits, None),)


def contraction(
    terms: Terms,
    basis: Basis,
    order: Order | None = None,
    max_bytes: int = MAX_BYTES,
    costs: Costs = COSTS,
    name: str = "this layer",
) -> Contraction:
    """How the moment of one layer is summed, from its shapes: in this order, or in the cheapest."""
    match terms:
        case (OneHot(g=g),):
            _check(order, [Order.IDS], name)
            s, i = g.shape[1:]
            of_ids = Step("add up ids, project, add rows", 2 * NOMINAL_N * s * i * (turns(basis.Q_A) + 2), 0)
            return Contraction(Order.IDS, (of_ids,))
        case (Dense(G=G),):
            _check(order, [Order.AS_GIVEN], name)
            entries = math.prod(G.shape[1:])  # of one example
            operations = 2 * NOMINAL_N * entries * (sum(map(turns, basis)) + 1)
            step = Step("project G[n]", operations, 4 * NOMINAL_N * entries * G.element_size())
            few = _limit(max_bytes, _cost(G, costs).cache, not torch.compiler.is_compiling())
            return Contraction(Order.AS_GIVEN, (step,), fitting(entries * G.element_size(), few))
        case (Factored() as factored, OneHot(g=h)):
            of_factored = contraction((factored,), basis, order, max_bytes, costs, name)
            s, i = h.shape[1:]
            operations = 2 * NOMINAL_N * s * i * (factored.g.shape[2] + turns(basis.Q_A) + 3)
            cross = Step("ids and their product with it", operations, 0)
            return of_factored._replace(steps=(*of_factored.steps, cross))
        case (Factored() as factored,):
            possible = [*FORMED, Order.PAIRS]
            if factored.g.shape[2] == 1:
                possible.append(Order.ONE_POSITION)
            if isinstance(factored.a, Tensor) and kernels.takes(factored.g, factored.a, basis):
                possible.append(Order.KERNEL)
            _check(order, possible, name)
            wanted = [one for one in possible if _sensible(one, basis)] if order is None else [order]
            return _of_factored(factored, basis, wanted, max_bytes, _cost(factored.g, costs))
    raise AssertionError(f"no contraction for {[type(term).__name__ for term in terms]}")


def _check(order: Order | None, possible: Sequence[Order], name: str) -> None:
    if order is not None and order not in possible:
        raise ValueError(f"orders gives {order} to {name}: give one of {', '.join(map(str, possible))}")


class Sizes(NamedTuple):
    """Of one example and its basis, all that the choice reads."""

    b: int
    s: int
    i: int
    k: int
    o: int
    A: int  # products of each entry that a side turns
    B: int
    rest_A: bool  # a side with a complement, whose squares are wanted too
    rest_B: bool
    unwritten: bool  # inputs that are patches
    filtered: bool  # of which `filters` projects them
    itemsize: int


def _sizes(term: Factored, basis: Basis) -> Sizes:
    b, s, i, k = term.a.shape[1:]
    (A, rest_A), (B, rest_B) = ((turns(Q), outside(Q) > 0) for Q in basis)
    unwritten, itemsize = isinstance(term.a, Patches), term.g.element_size()
    return Sizes(b, s, i, k, term.g.shape[3], A, B, rest_A, rest_B, unwritten, filters_inputs(term, basis), itemsize)


def _sensible(order: Order, basis: Basis) -> bool:
    """Whether a side that is not one matrix, which costs little, is early, and two sides with complements together."""
    first = early(order)
    apart = len(first) == 1 and all(outside(Q) for Q in basis)
    return not apart and all(side in first or is_matrix(Q) for side, Q in zip("ag", basis, strict=True))


@torch.compiler.assume_constant_result
def _cheapest(possible: tuple[Order, ...], given: tuple[int, ...], cost: Cost) -> tuple[Order, tuple[Step, ...]]:
    """The order and its products."""
    sizes = Sizes(*given)  # type: ignore[arg-type]  # a plain tuple, for Dynamo's constants
    found = ((order, _products(order, sizes, cost)) for order in possible)
    return min(found, key=lambda pair: _seconds(pair[1], cost))


def _seconds(steps: Iterable[Step], cost: Cost) -> float:
    """Each product is bound by arithmetic or by memory."""
    return sum(max(step.operations / cost.operations, step.bytes / cost.bytes) for step in steps)


def early(order: Order) -> str:
    """The sides that are projected before G[n] is formed."""
    return {Order.PROJECT_INPUTS: "a", Order.PROJECT_OUTPUTS: "g", Order.FORM_FIRST: ""}.get(order, "ag")


def _of_factored(term: Factored, basis: Basis, possible: Sequence[Order], max_bytes: int, cost: Cost) -> Contraction:
    sizes = _sizes(term, basis)
    for only in (Order.ONE_POSITION, Order.KERNEL):
        if only in possible:
            traced = torch.compiler.is_compiling()  # whose sizes may be symbols, of `thin`
            return Contraction(only, () if traced else _products(only, sizes, cost))
    order, steps = _cheapest(tuple(possible), constants(sizes), cost)
    of_G = sizes.itemsize * sizes.b * sizes.o * sizes.i * sizes.k
    operator = order in FORMED and as_operator(term, basis, of_G * NOMINAL_N > max_bytes)
    eager = operator or not torch.compiler.is_compiling()
    return Contraction(order, steps, *_blocks(term, basis, order, max_bytes, cost, eager), operator)


def _blocks(
    term: Factored, basis: Basis, order: Order, max_bytes: int, cost: Cost, eager: bool
) -> tuple[int | None, int | None]:
    """`block` and `part` of a contraction, from the bytes that each example takes."""
    (b, s, i, k), o, size = term.a.shape[1:], term.g.shape[3], term.g.element_size()
    unwritten, of_G = isinstance(term.a, Patches), size * b * o * i * k
    few = _limit(max_bytes, cost.cache, eager)
    if order is Order.PAIRS:
        return fitting(size * b * s * (s + 1) // 2 * (o + i * k), few), None
    if not (eager or unwritten):  # blocks are filled up with zeros, on which a projection would waste its work
        return None, fitting(of_G, few)
    if not eager or order in (Order.PROJECT_OUTPUTS, Order.FORM_FIRST):
        of_inputs = 0
        if isinstance(term.a, Patches):
            of_inputs = math.prod((term.a.x if eager and convolves(term, basis, order) else term.a).shape[1:])
        return fitting(of_G + size * of_inputs, few), None
    of_samples = size * b * s * (i * k * (1 + unwritten) + o)
    enough = max(BLOCK_BYTES, of_samples * -(-(POSITIONS if filters_inputs(term, basis) else ROWS) // s))
    return fitting(of_samples, min(max_bytes, enough)), fitting(of_G, few)


def as_operator(term: Factored, basis: Basis, in_blocks: bool) -> bool:
    """Whether a graph has the sums as one operator, which runs as in eager mode: those over patches or in blocks.

    The blocks that a graph has itself are those of a nominal batch, mostly zeros where the batch is smaller.
    """
    x = term.a.x if isinstance(term.a, Patches) else term.a if in_blocks else None
    return x is not None and all(isinstance(Q, Tensor) for Q in basis) and opaque(term.g, x)


def convolves(term: Factored, basis: Basis, order: Order) -> bool:
    """Whether an order forms G[n] without patches, in eager mode: a graph would fix the number of groups, n b.

    Where outputs are projected early and have a complement, the patches are needed.
    """
    first = early(order)
    if not isinstance(term.a, Patches) or "a" in first or ("g" in first and outside(basis.Q_B)):
        return False
    return term.a.convolves(term.g)


def filters_inputs(term: Factored, basis: Basis, n: int | None = None) -> bool:
    """Whether inputs that are projected early are so without patches, in eager mode.

    What lies outside of a basis is read from the patches. n: examples at a time, by default as many as pay.
    """
    if not is_matrix(basis.Q_A) or incomplete(basis) or not isinstance(term.a, Patches):
        return False
    return filters(term.a, -(-POSITIONS // term.a.shape[2]) if n is None else n)


def _limit(max_bytes: int, cache: int, eager: bool) -> int:
    """Bytes that are written at a time: in eager mode no more than the cache holds."""
    return min(max_bytes, cache) if cache and eager else max_bytes


def _cost(t: Tensor, costs: Costs) -> Cost:
    return costs.get((t.device.type, t.dtype), COSTS["cpu", torch.float32])


@functools.lru_cache
def _products(order: Order, sizes: Sizes, cost: Cost) -> tuple[Step, ...]:
    """The products of an order. An entry of `[o i]` that does not stay in cache is written, and read by the next."""
    b, s, i, k, o, A, B, rest_A, rest_B, unwritten, filtered, size = sizes
    n = NOMINAL_N
    of_a, of_g, of_G = n * b * s * i * k, n * b * s * o, n * b * o * i * k
    cached = b * o * i * k * size <= cost.cache
    form = Step("form G[n]", 2 * of_a * o, size * (of_a * (not unwritten) + of_g + of_G * (not cached)))
    of_side = {
        "a": [Step("project a", 2 * of_a * A, size * (of_a * (2 + 2 * unwritten) + i * A))],
        "g": [Step("project g", 2 * of_g * B, size * (2 * of_g + o * B))],
    }
    if filtered:
        of_side["a"] = [
            Step("turn pixels and filters", 12 * (of_a + i * A), TURNED * size * (of_a + i * A)),
            Step("project a", 2 * of_a * A * 4 // 9, size * (2 * of_a + i * A)),
        ]
    first = [step for side in early(order) for step in of_side[side]]
    for side, norms in (("a", rest_A), ("g", rest_B)):
        if norms and side in early(order):
            of_pairs = 2 * n * b * s * min(s * (i * k + o), o * i * k)
            (project,) = of_side[side]
            first.append(Step(f"norms outside of {side}", project.operations + of_pairs, 2 * project.bytes))
    if order is Order.ONE_POSITION:
        return (*first, Step("multiply the squares", 2 * of_G, 2 * size * (of_a + of_g)))
    if order is Order.KERNEL:
        return (*first, form._replace(bytes=size * (of_a + of_g)))
    if order is Order.PAIRS:
        pairs = n * b * s * (s + 1) // 2
        products = Step("multiply pairs", 2 * pairs * o * i * k, 2 * size * pairs * (o + i * k))
        return (*first, products, form._replace(name="sum G", bytes=size * (of_a + of_g)))
    late = []
    for side, operations in _late(o, i, A, B, tuple(side for side in "ag" if side not in early(order))):
        of_Q = size * (i * A if side == "a" else o * B)
        again = of_Q * of_G * size // cost.cache if cached and of_Q > cost.cache else 0  # of Q, for every part
        traffic = again if cached else 2 * size * of_G
        name, rest = ("Q_A", rest_A) if side == "a" else ("Q_B", rest_B)
        turns = 1 + rest  # into the basis, and out again for what lies outside
        late.append(Step(f"project G[n] {name}", turns * n * b * k * operations, turns * traffic, side))
    total = Step("add up", 4 * of_G, 3 * size * of_G // (CACHE_SPEED if cached else 1))
    return (*first, form, *late, total)


def _late(o: int, i: int, A: int, B: int, sides: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """The order in which `opt_einsum` projects G[n] on these sides, and the operations of each product."""
    if not sides:
        return ()
    size = {"o": o, "i": i, "O": B, "I": A}
    parts = ["oi", *({"a": "iI", "g": "oO"}[side] for side in sides)]
    out = f"{'O' if 'g' in sides else 'o'}{'I' if 'a' in sides else 'i'}"
    shapes = [tuple(size[letter] for letter in part) for part in parts]
    equation = f"{','.join(parts)}->{out}"
    _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    found = []
    for contracted in info.contraction_list:
        letters = set(contracted[2]) & size.keys()
        found.append(("a" if {"i", "I"} <= letters else "g", 2 * math.prod(size[letter] for letter in letters)))
    return tuple(found)
