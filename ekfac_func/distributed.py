"""The one place where processes meet that step together, each on its share of the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from .factors import FactorSums


class Ranks(NamedTuple):
    """Processes that step together. See `ranks`.

    sum: one tensor of each process to the sum of them, `[m]`, the same bits in all.
    first: whether this process is the one whose eigenbases all take.
    """

    sum: Callable[[Tensor], Tensor]
    first: bool


def ranks(group: dist.ProcessGroup | None = None) -> Ranks:
    """The processes of a group of `torch.distributed`, by default of the world, for `ekfac(..., ranks=ranks())`.

    Each steps on its own share of a batch, of any size from one example on, from the same params and state, which is to
    be seen to at the start. All then have the natural gradient, state and info of the whole batch, to rounding and but
    for what null spaces are (factors are formed here); `info.aux`, and with `batched=True` the statistics of BatchNorm,
    are of the share. A step is one collective for each dtype, and three more where a basis is refreshed; an error in
    one process leaves the others waiting. Random numbers, of dropout or of a sampled Fisher, are each process's own:
    seed them apart. RuntimeError where there is no process group, ValueError where this process is not in it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("there is no process group: call torch.distributed.init_process_group before ranks()")
    of_group = dist.get_rank(group)
    if of_group < 0:
        raise ValueError("this process is not in group: call ranks(group) in the processes of the group alone")
    return Ranks(functools.partial(_all_reduce, group), of_group == 0)


def check_ranks(value: object) -> None:
    """Refuse what is neither None nor processes."""
    if value is not None and not isinstance(value, Ranks):
        raise TypeError(f"ranks is a {type(value).__name__}: pass ranks(), or ranks(group), called")


def _all_reduce(group: dist.ProcessGroup | None, t: Tensor) -> Tensor:
    dist.all_reduce(t, group=group)
    return t


def total(tree: Any, among: Ranks | None) -> Any:
    """The sums over the processes of a tree of tensors and numbers, which become tensors; of one process as it is."""
    if among is None:
        return tree
    leaves, spec = pytree.tree_flatten(tree)
    like = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
    tensors = {k: like.new_full((), leaf) if isinstance(leaf, int | float) else leaf for k, leaf in enumerate(leaves)}
    kinds: dict[Any, list[int]] = {}
    for k, t in tensors.items():
        if t is not None:
            kinds.setdefault((t.dtype, t.device), []).append(k)
    for members in kinds.values():
        shapes = [tensors[k].shape for k in members]
        sums = among.sum(torch.cat([tensors[k].flatten() for k in members]))
        parts = sums.split([shape.numel() for shape in shapes])
        tensors |= {k: part.reshape(shape) for k, part, shape in zip(members, parts, shapes, strict=True)}
    return pytree.tree_unflatten(tensors.values(), spec)


def total_factors(
    sums: Mapping[str, tuple[FactorSums, ...]], among: Ranks | None, share: float
) -> Mapping[str, tuple[FactorSums, ...]]:
    """Those of all processes, by layer.

    share: of an example in each pseudo-example, of which processes may have made more or fewer.
    """
    if among is None:
        return sums
    # uses of the weight add up, positions are their mean
    uses = {name: tuple(s._replace(positions=s.positions * s.n) for s in terms) for name, terms in sums.items()}
    if share != 1:
        uses = pytree.tree_map(lambda leaf: leaf * share, uses)
    found: dict[str, tuple[FactorSums, ...]] = total(uses, among)
    return {name: tuple(s._replace(positions=s.positions / s.n) for s in terms) for name, terms in found.items()}


def of_first(tree: Any, among: Ranks | None) -> Any:
    """The tensors of the first process, for others may be of another machine, whose eigenvectors are others."""
    if among is None or among.first:
        return total(tree, among)
    return total(pytree.tree_map_only(Tensor, torch.zeros_like, tree), among)
