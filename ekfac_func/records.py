"""What `compare` finds of an estimator, as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from .truth import Truth


class Record(NamedTuple):
    """One estimator on one layer after one batch, against the reference Fisher F over all the data.

    Norms are Frobenius norms over the layer's blocks. The exact moment is that of all the data in the estimator's own
    basis. A ratio 0 / 0 is 0.

    estimator, layer: its name, and that of the layer's weight; "all" is the whole model as block-diagonal.
    step, since_refresh: which batch, from 0, and how many since the basis was refreshed.
    examples: in the batch.
    moment_error: ||m2 - exact|| / ||exact||.
    fisher_error: ||F - estimate|| / ||F||.
    fisher_distance: ||F - estimate||, in loss^2 / parameter^2.
    off_diagonal: share of ||F||^2 off the diagonal in the basis.
    effective_rank: of the estimate, (sum m2)^2 / sum m2^2.
    fisher_rank: of F, trace^2 / ||F||^2.
    signal_to_noise: median over eigen-directions of mean^2 / variance of the data's gradient, of one example.
    signal_share: share of eigen-directions in which the batch's mean exceeds its standard error.
    cosine: of the natural gradient (of all the data's gradient) to the target.
    natural_distance: ||natural - target|| / ||target||.
    target: "dense", the natural gradient of the damped dense F, or "ekfac", that of the exact moment in the basis of
        all the data (`dense_limit` of `compare`).
    decrease: of the loss over all the data, by the best step along this layer's natural gradient; 0 without
        step_sizes.
    step_size: the best one; 0 where none decreases the loss.
    """

    estimator: str
    layer: str
    step: int
    since_refresh: int
    examples: int
    moment_error: float
    fisher_error: float
    fisher_distance: float
    off_diagonal: float
    effective_rank: float
    fisher_rank: float
    signal_to_noise: float
    signal_share: float
    cosine: float
    natural_distance: float
    target: str
    decrease: float
    step_size: float


FIGURES = tuple(field for field, kind in get_type_hints(Record).items() if kind is float)


def summarise(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Mean and standard error over the batches of every figure, one row for each estimator and layer.

    The standard error is that of independent batches; an average over steps has fewer. Not a number for one batch.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.estimator, record.layer), []).append(record)
    rows = []
    for (estimator, layer), group in groups.items():
        row: dict[str, Any] = {"estimator": estimator, "layer": layer, "batches": len(group)}
        for field in FIGURES:
            values = torch.tensor([getattr(record, field) for record in group], dtype=torch.float64)
            row[field] = values.mean().item()
            row[f"{field}_se"] = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan
        rows.append(row)
    return rows


def sums_of(estimate: Tensor, exact: Tensor, truth: Truth, natural: Tensor) -> dict[str, float]:
    """The sums of one layer whose ratios are its figures; added up over the layers, those of the whole model."""
    m, e, v, target = (x.to(torch.float64) for x in (estimate, exact, natural, truth.natural))
    return {
        "error": (m - e).square().sum().item(),
        "exact": e.square().sum().item(),
        "norm": truth.square_norm,
        # ||F - Q diag(m) Q^T||^2 = ||F||^2 - ||e||^2 + ||m - e||^2, e the diagonal of Q^T F Q
        "off": max(truth.square_norm - e.square().sum().item(), 0.0),
        "sum": m.sum().item(),
        "square": m.square().sum().item(),
        "trace": truth.trace,
        "dot": (v * target).sum().item(),
        "natural": v.square().sum().item(),
        "target": target.square().sum().item(),
        "apart": (v - target).square().sum().item(),
    }


def figures(parts: Sequence[Mapping[str, float]], ratio: Tensor, examples: int) -> dict[str, float]:
    """The figures of one layer, or of all of them, from their sums. ratio: `signal_to_noise` of these."""
    s = {key: sum(part[key] for part in parts) for key in parts[0]}
    distance = math.sqrt(s["off"] + s["error"])
    return {
        "moment_error": _ratio(math.sqrt(s["error"]), math.sqrt(s["exact"])),
        "fisher_error": _ratio(distance, math.sqrt(s["norm"])),
        "fisher_distance": distance,
        "off_diagonal": _ratio(s["off"], s["norm"]),
        "effective_rank": _ratio(s["sum"] ** 2, s["square"]),
        "fisher_rank": _ratio(s["trace"] ** 2, s["norm"]),
        "signal_to_noise": ratio.median().item() if len(ratio) else math.nan,
        "signal_share": (examples * ratio > 1).double().mean().item() if len(ratio) else math.nan,
        "cosine": _ratio(s["dot"], math.sqrt(s["natural"] * s["target"])),
        "natural_distance": _ratio(math.sqrt(s["apart"]), math.sqrt(s["target"])),
    }


def signal_to_noise(noise: tuple[Tensor, Tensor] | None) -> Tensor:
    """`mean^2 / variance` of one example's gradient in each eigen-direction with noise, flat."""
    if noise is None or noise[1].numel() == 0:
        return torch.empty(0, dtype=torch.float64)
    mean, square = (x.to(torch.float64).flatten() for x in noise)
    variance, eps = square - mean.square(), torch.finfo(noise[1].dtype).eps
    live = (variance > eps * square) & (square > (100 * eps) ** 2 * square.max())  # the rest is rounding
    return (mean.square() / variance)[live].cpu()


def _ratio(x: float, y: float) -> float:
    """`x / y`, with `0 / 0 = 0`."""
    return 0.0 if x == 0 else (x / y if y else math.inf)
