"""A check of a capture: its gradients against those of each example alone, by plain autograd."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .capture import capture
from .checks import check_loss
from .discovery import Options
from .kronecker import dense, unpack_all
from .types import Batch, LossAuxFn, LossFn, Params, batch_size

TF32 = 2.0**-10  # precision of a product of float32 that matrix units take as TF32


def certify(loss_fn: LossFn | LossAuxFn, params: Mapping[str, Tensor], batch: Batch, options: Options) -> None:
    """Raise ValueError for the first parameter whose captured gradients differ from those of the examples alone.

    One backward pass an example, for a batch of a few. The loss must draw no random numbers. The distance allowed is
    the root of the dtype's precision, relative to the parameter's own gradients, and for those that are zero but for
    rounding a hundred times the precision, relative to the whole gradient; for float32 on a CUDA device the root of
    the precision of TF32, and that precision itself.
    """
    params = dict(params)
    captured = capture(loss_fn, params, batch, options)
    gradients_of = {name: dense(terms) for name, terms in captured.terms.items()}
    found = unpack_all(captured.layers.values(), gradients_of, params)
    expected = _alone(loss_fn, params, batch, options)
    size = torch.stack([g.double().square().sum() for g in expected.values()]).sum().sqrt()
    if not size.isfinite():
        raise ValueError(
            "the gradients of the examples of this batch are not finite, so that they cannot be compared: check the "
            "capture on a batch of finite losses"
        )
    remedy = _BATCHED if options.batched else _SINGLE
    for name, g in expected.items():
        distances = (found[name] - g).double().reshape(len(g), -1).norm(dim=1)
        own, eps = g.double().norm(), torch.finfo(g.dtype).eps
        allowed, rounding = eps**0.5, min(100 * eps, eps**0.5)
        if g.is_cuda and g.dtype is torch.float32:  # which cuDNN takes as TF32 by default
            allowed, rounding = TF32**0.5, TF32
        if not distances.norm() <= allowed * own + rounding * size:
            raise ValueError(
                f"the gradients captured of {name!r}, of shape {tuple(g.shape)}, differ from those of each example "
                f"alone, of norm {own:.1e}, by {distances.norm():.1e}, most for example {int(distances.argmax())}: "
                f"{remedy}"
            )


def _alone(loss_fn: LossFn | LossAuxFn, params: Params, batch: Batch, options: Options) -> Params:
    """The gradients of each example's loss, `[n ...]`, by plain autograd."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    gradients = []
    for k in range(batch_size(batch)):
        # a batch of one has no statistics, two of the same have
        example = pytree.tree_map(lambda t, k=k: t[[k, k]] if options.batched else t[k], batch)
        with torch.enable_grad():
            loss, _ = check_loss(loss_fn(leaves, example), options.has_aux, 2 if options.batched else None)
            gradients.append(torch.autograd.grad(loss.mean(), list(leaves.values()), materialize_grads=True))
    return dict(zip(params, map(torch.stack, zip(*gradients, strict=True)), strict=True))


_SINGLE = "its rule reads its calls wrongly, or the loss draws random numbers: check with dropout off"
_BATCHED = (
    "with batched=True this means that the examples are coupled, as by BatchNorm in training mode, or that an axis of "
    "a layer's input holds them in another order than (n s)"
)
