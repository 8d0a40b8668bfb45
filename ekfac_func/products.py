"""Large matrix products in float32 on CPUs by oneDNN, those of PyTorch's convolutions and compiled linear layers.

PyTorch's own go to MKL, which takes no 512-bit instructions on processors of other makers than its own: there they
run at half the speed (measured on one of AMD's). It is the operator `torch.ops.ekfac_func.product`, under
`torch.compile` and `vmap`.
"""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
ENTRIES = 2**15  # of the matrix, or of the product, from which on it pays


def rotate(x: Tensor, Q: Tensor) -> Tensor:
    """`x Q` of `[... d]` and `[d e]`."""
    if _takes(x, Q, Q.shape[0] * Q.shape[1]):
        return product(x.reshape(-1, x.shape[-1]), Q).reshape(*x.shape[:-1], Q.shape[1])
    return x @ Q


def outer(x: Tensor, y: Tensor) -> Tensor:
    """`x^T y` of `[... m d]` and `[... m e]`."""
    if x.shape[:-2] == y.shape[:-2] and _takes(x, y, x.shape[-1] * y.shape[-1]):
        return product(x.mT, y)
    return x.mT @ y


def _takes(x: Tensor, y: Tensor, entries: int) -> bool:
    if not AVAILABLE or entries < ENTRIES or not x.dtype == y.dtype == torch.float32 or x.device.type != "cpu":
        return False
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return False
    # a transform may want a derivative, which the operator does not have
    plain = torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0
    return torch.compiler.is_compiling() or plain


@torch.library.custom_op("ekfac_func::product", mutates_args=())
def product(x: Tensor, y: Tensor) -> Tensor:
    """`x y` of `[... m d]` and `[... d e]`, the same axes in front."""
    if x.numel() == 0 or y.numel() == 0:
        return x @ y
    if x.shape[:-2].numel() == 1:
        return _product(x.flatten(0, -2), y.flatten(0, -2)).reshape(*x.shape[:-1], y.shape[-1])
    found = x.new_empty(*x.shape[:-1], y.shape[-1])
    for z, of_x, of_y in zip(found.flatten(0, -3), x.flatten(0, -3), y.flatten(0, -3), strict=True):
        z.copy_(_product(of_x, of_y))
    return found


def _product(x: Tensor, y: Tensor) -> Tensor:
    y = y if y.mT.is_contiguous() else y.contiguous()  # of a matrix with gaps oneDNN takes its reference code
    return torch.ops.mkldnn._linear_pointwise(x, y.mT, None, "none", [], "")


@product.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], y.shape[-1])


@product.register_vmap
def _(info: object, in_dims: tuple[int | None, int | None], x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    x, y = (t if dim is None else t.movedim(dim, 0) for t, dim in zip((x, y), in_dims, strict=True))
    return x @ y, 0


@register_flop_formula(torch.ops.ekfac_func.product)
def _(x: tuple[int, ...], y: tuple[int, ...], **_: object) -> int:
    return 2 * math.prod(x) * y[-1]
