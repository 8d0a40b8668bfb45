"""Scalars of a step, to log and to plot."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..basis import counts, real
from ..checks import check_count, check_not_negative
from ..refreshes import EIGH, Refresh, check_refresh, due
from ..types import Info, Number, State
from .norms import dots, squares, total


@torch.no_grad()
def metrics(
    natural: Mapping[str, Tensor],
    info: Info,
    state: State,
    *,
    learning_rate: Number = 1.0,
    basis_every: int | None = None,
    refresh: Refresh = EIGH,
) -> dict[str, Tensor]:
    """Scalars of a step by name, 0-d tensors on the device, for a logger to read when it wants to.

    natural, state, info: what `precondition` returned.
    learning_rate: of the step, for `kl` alone.
    basis_every, refresh: as given to `ekfac`, for `refresh` alone.

    | name | meaning |
    |---|---|
    | loss | mean over the batch |
    | gradient_norm, natural_norm | Euclidean, over all parameters |
    | cosine | of the angle between both; 0 where one of them is zero |
    | kl | divergence of the predictions to second order, `learning_rate^2 natural . gradient / 2` (exponent -1) |
    | damping, damping/LAYER | as used; by layer where a rule gave each its own |
    | effective_rank/LAYER | exponential of the entropy of the shares of `m2`, 1 to their number; 0 without any |
    | condition/LAYER | largest over smallest entry of `m2 + damping` |
    | skipped | 1 where the step was skipped, else 0; loss, norms, cosine and damping then say what was found |
    | refresh | 1 where the clock refreshed the eigenbases of any layer, else 0; where basis_every is given |
    | kept_bases | eigenbases that could not be refreshed |

    Of `thin` layers the state has no moment, and so neither effective rank nor condition.

    The effective rank is that of Roy & Vetterli 2007, https://ieeexplore.ieee.org/document/7098875.
    """
    for argument, value, kind in (("info", info, Info), ("state", state, State)):
        if not isinstance(value, kind):
            raise TypeError(f"{argument} is a {type(value).__name__}: give natural, info and state, in this order")
    check_not_negative("learning_rate", learning_rate)
    gradient_square, natural_square = total(squares(info.gradient)), total(squares(natural))
    product = total(dots(natural, info.gradient))
    lengths = gradient_square.sqrt() * natural_square.sqrt()
    found = {
        "loss": info.loss,
        "gradient_norm": gradient_square.sqrt(),
        "natural_norm": natural_square.sqrt(),
        "cosine": torch.where(lengths > 0, product / lengths, 0.0),
        "kl": learning_rate**2 * product / 2,
        "skipped": info.skipped.to(info.loss.dtype),
        "kept_bases": info.kept_bases,
    }
    if basis_every is not None:
        check_count("basis_every", basis_every)
        check_refresh("refresh", refresh)
        layers = {layer.weight: layer for layer in state.layers}
        refreshed = due(layers, refresh, state.step - 1, basis_every)  # the state's step is the next one
        found["refresh"] = torch.where(info.skipped, 0.0, float(len(refreshed) > 0))
    dampings = info.damping.expand(len(state.layers)).unbind()
    if info.damping.dim() == 0:
        found["damping"] = info.damping
    else:
        found |= {f"damping/{layer.weight}": d for layer, d in zip(state.layers, dampings, strict=True)}
    for layer, damping in zip(state.layers, dampings, strict=True):
        name, basis, m2 = layer.weight, state.bases[layer.weight], state.second_moments[layer.weight].value
        if m2.numel() == 0:
            continue
        inside = real(basis, layer)
        m2, least = torch.where(inside, m2, 0), torch.where(inside, m2, torch.inf).amin()
        found[f"effective_rank/{name}"] = _effective_rank(m2, counts(basis, m2))
        found[f"condition/{name}"] = (m2.amax() + damping) / (least + damping)
    return found


def _effective_rank(m2: Tensor, counts: Tensor) -> Tensor:
    sum = (m2 * counts[..., None]).sum()
    shares = m2 / sum
    entropy = -(torch.special.xlogy(shares, shares) * counts[..., None]).sum()
    return torch.where(sum > 0, entropy.exp(), 0.0)
