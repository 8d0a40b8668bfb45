"""What will be done with each parameter, as data and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from . import basis as eigenbasis
from .basis import Choice, Choices, Thin, check_choices, check_patterns, choose, factor_shapes, moment_shape
from .capture import Captured, shapes
from .checks import check_batch, check_decay, check_params
from .discovery import Way, checked_options
from .factors import averages
from .kronecker import positions
from .orders import DEFAULT_CONTRACTIONS, Contraction, Contractions, check_contractions, contraction_of
from .rules import RULES, Rules
from .spans import compress, in_span
from .types import Basis, Batch, Layer, LossAuxFn, LossFn, Number, Terms, statistics_dtype


class Row(NamedTuple):
    """One parameter, or a weight with the bias that is its last input.

    name, bias: of the weight, and of the bias that is joined to it.
    rule: the torch functions that a rule read; None where gradients are taken as they are.
    hidden_by: then what kept it from a rule: torch functions, or that no call shows its use.
    b, s, i, o, k: independent blocks, positions that share the weight, inputs with the bias, outputs, kernel offsets
        left unrotated.
    factor_A, factor_B, basis_A, basis_B: shapes, as the state has them. There is no factor of thin and compact bases,
        and none of `rank(r)` without an average.
    factor_bytes, basis_bytes, moment_bytes: what of the state is this layer's.
    contraction: how its second moment is summed, each product with its operations and bytes.
    """

    name: str
    bias: str | None
    rule: str | None
    hidden_by: str | None
    b: int
    s: int
    i: int
    o: int
    k: int
    factor_A: tuple[int, ...]
    factor_B: tuple[int, ...]
    basis_A: tuple[int, ...]
    basis_B: tuple[int, ...]
    factor_bytes: int
    basis_bytes: int
    moment_bytes: int
    contraction: Contraction


LOOPED = "the loss runs for one example after another, which takes longer: vmap cannot run it, batched=True may"
_HEAD = ("parameter", "read by", "b s i o k", "Q_A", "Q_B", "factors", "basis", "moment", "second moment", "operations")


class Description(tuple[Row, ...]):
    """Rows in the order of params; `str` is a table.

    looped: whether the loss runs for one example after another, which takes longer, for `vmap` cannot run it.
    """

    looped = False

    def __str__(self) -> str:
        lines = [_HEAD, *map(_cells, self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*table, *[LOOPED] * self.looped])

    __repr__ = __str__


def describe(
    loss_fn: LossFn | LossAuxFn,
    params: Mapping[str, Tensor],
    batch: Batch,
    *,
    rules: Rules = RULES,
    bases: Choices | None = None,
    factor_decay: Number = 0.0,
    has_aux: bool = False,
    batched: bool = False,
    contractions: Contractions = DEFAULT_CONTRACTIONS,
) -> Description:
    """Print, and return as data, which rule reads each parameter, its axes, its memory and how its moment is summed.

    The options are those of `ekfac` that decide it. Reads shapes alone, but of a batched loss that looks at values.
    """
    check_params(params)
    check_batch(batch)
    check_decay("factor_decay", factor_decay)
    options = checked_options(rules, "different", None, has_aux, batched)
    choices = {} if bases is None else bases
    check_choices(choices)
    captured, way = shapes(loss_fn, params, batch, options)
    check_contractions(contractions)
    layers = captured.layers
    check_patterns("bases", layers.values(), choices)
    check_patterns("orders", layers.values(), contractions.orders)
    chosen = choose(layers.values(), choices)
    averaged = averages(factor_decay)
    rows = Description(
        _row(layer, captured, chosen[name], params[name], averaged, contractions) for name, layer in layers.items()
    )
    rows.looped = way is Way.LOOPED
    print(rows)
    return rows


def _given(layer: Layer, terms: Terms, chosen: Choice) -> tuple[Terms, Basis]:
    """The terms that the moment is summed of, and the basis; of a thin layer both in the span of the samples."""
    if not isinstance(chosen, Thin):
        return terms, eigenbasis.without_values(layer, chosen)
    terms, span = compress(terms)
    return terms, eigenbasis.without_values(in_span(layer, span), eigenbasis.FULL)


def _row(
    layer: Layer, captured: Captured, chosen: Choice, p: Tensor, averaged: bool, contractions: Contractions
) -> Row:
    b, o, i, k = layer.sizes
    terms = captured.terms[layer.weight]
    how = contraction_of(layer, *_given(layer, terms, chosen), contractions, captured.bytes_each)
    A, B = factor_shapes(layer, chosen, averaged)
    Q_A, Q_B = eigenbasis.shapes(layer, chosen)
    size = statistics_dtype(p).itemsize
    factors = size * (math.prod(A) + math.prod(B))
    basis = size * sum(t.numel() for t in pytree.tree_leaves(eigenbasis.without_values(layer, chosen)))
    moment = size * math.prod(moment_shape(layer, chosen))
    head = (layer.weight, layer.bias, layer.rule, layer.hidden_by, b, sum(map(positions, terms)), i, o, k)
    return Row(*head, A, B, Q_A, Q_B, factors, basis, moment, how)


def _cells(row: Row) -> tuple[str, ...]:
    axes = " ".join(str(size) for size in (row.b, row.s, row.i, row.o, row.k))
    rule = row.rule or f"no rule: {row.hidden_by}"
    sides = ("x".join(map(str, shape)) for shape in (row.basis_A, row.basis_B))
    memory = map(_bytes, (row.factor_bytes, row.basis_bytes, row.moment_bytes))
    name = row.name if row.bias is None else f"{row.name}, {row.bias.rpartition('.')[2]}"
    return (name, rule, axes, *sides, *memory, str(row.contraction), f"{row.contraction.operations:.1e}")


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
