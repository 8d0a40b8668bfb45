"""Large matrix products at the speed of the machine.

In float32, on CPUs that are not Intel's, products are those of oneDNN, by which PyTorch convolves. PyTorch's own are
MKL's, which uses 512-bit instructions on Intel's CPUs alone: on an AMD it had half the speed, on an Intel oneDNN was up
to 2.5 times slower (measured). In graphs and under dispatch modes the product is the operator
`torch.ops.ekfac_func.product`.

On CUDA devices rows are padded to a multiple of 16 bytes. Without it a side of 769, of 768 inputs and a bias, goes to
kernels for any alignment, at a third of the speed (measured on an H100).
"""

import math
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from .memory import LARGE_BYTES, Rooms, empty, writable
from .modes import depth, differentiated, transformed


def _of_intel() -> bool:
    """Whether MKL was made for this processor."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return any("GenuineIntel" in line for line in cpuinfo)
    except OSError:  # not on Linux
        return "GenuineIntel" in platform.processor()


ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
FASTER = ONEDNN and torch.backends.cpu.get_cpu_capability() == "AVX512" and not _of_intel()
ENTRIES = 2**15  # of the matrix, or of the product, from which on other ways than PyTorch's own pay
MULTIPLICATIONS = 2**23  # from which on they pay for a smaller matrix too, if it has many rows
NARROW, WIDE = 16, 1024  # columns of two matrices up to which their product adds up its rows in turn
ROWS = 4096  # that are added up at a time
ALIGNED_BYTES = 16  # of which the rows of a matrix are a multiple, for fast kernels
MANY_ROWS, MANY_ENTRIES = 1024, 2**18  # of two matrices, from which on it pays to copy the second into columns


def rotate(x: Tensor, Q: Tensor, rooms: Rooms | None = None) -> Tensor:
    """`x Q` of `[... d]` and `[d e]`. rooms: where it may be written."""
    many = not torch.compiler.is_compiling() and x.numel() * Q.shape[1] >= MULTIPLICATIONS
    if (many or Q.shape[0] * Q.shape[1] >= ENTRIES) and _fits(x, Q) and not differentiated(x, Q):
        return _product(x.reshape(-1, x.shape[-1]), Q).reshape(*x.shape[:-1], Q.shape[1])
    return matmul(x, Q, rooms)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of a weight `[e d]` and a bias `[e]`, in eager mode; faster where neither is differentiated."""
    own = [t for t in (weight, bias) if t is not None]
    # depth, for a loss is told that it is traced
    plain = depth() == 0 and _get_current_dispatch_mode() is None and not torch.is_autocast_enabled("cpu")
    large = weight.numel() >= ENTRIES and x.numel() > 0
    if not (large and plain) or any(t.requires_grad or not _fits(x, t) for t in own):
        return F.linear(x, weight, bias)
    # of a bias with gaps oneDNN reads the wrong entries
    y: Tensor = _Linear.apply(x, weight, None if bias is None else bias.contiguous())
    return y


class _Linear(torch.autograd.Function):
    """`F.linear` by oneDNN, in which only the input is differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        y = _of_matrices(x.reshape(-1, x.shape[-1]), weight.mT, bias)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        return rotate(gradients[0], weight) if ctx.needs_input_grad[0] else None, None, None


def outer(x: Tensor, y: Tensor, rooms: Rooms | None = None) -> Tensor:
    """`x^T y` of `[... m d]` and `[... m e]`. rooms: where it may be written."""
    if _sums_in_turn(x, y):
        cut = x.shape[-2] - x.shape[-2] % ROWS
        parts = (t[..., :cut, :].unflatten(-2, (-1, ROWS)) for t in (x, y))
        return outer(*parts).sum(-3) + outer(x[..., cut:, :], y[..., cut:, :])
    large = x.shape[:-2] == y.shape[:-2] and x.shape[-1] * y.shape[-1] >= ENTRIES
    if large and _fits(x, y) and not differentiated(x, y):
        return _product(x.mT, y)
    return matmul(x.mT, y, rooms)


def _sums_in_turn(x: Tensor, y: Tensor) -> bool:
    """Whether a CPU would add up many rows one after another, which loses digits with their number."""
    if x.device.type != "cpu" or transformed():  # first, for Dynamo sorts no symbols
        return False
    few, many = sorted((x.shape[-1], y.shape[-1]))
    return few <= NARROW and many <= WIDE and x.shape[:-2] == y.shape[:-2] and x.shape[-2] >= 2 * ROWS


def matmul(x: Tensor, y: Tensor, rooms: Rooms | None = None) -> Tensor:
    """`x y` of `[... m d]` and `[... d e]`. rooms: where it may be written."""
    if x.device.type == "cuda" and x.itemsize <= 4 and y.shape[-2] * y.shape[-1] >= ENTRIES and _plain():
        return aligned(x, y)
    large = max(x.shape[:-2].numel(), y.shape[:-2].numel()) * x.shape[-2] * y.shape[-1] * x.itemsize >= LARGE_BYTES
    if (rooms is None and not large) or not writable(x, y):
        return x @ y
    shape = (*torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])
    return torch.matmul(x, y, out=empty(shape, x) if rooms is None else rooms.take(shape, x))


def aligned(x: Tensor, y: Tensor) -> Tensor:
    """`x y`, the axis of each that is last in memory padded with zeros to a multiple of `ALIGNED_BYTES`."""
    unit = ALIGNED_BYTES // x.itemsize
    m, e = x.shape[-2], y.shape[-1]
    transposed_x, transposed_y = _is_transposed(x), _is_transposed(y)
    inner = 0 if transposed_x and not transposed_y else -x.shape[-1] % unit
    outer_x, outer_y = (-m % unit if transposed_x else 0), -e % unit
    if not (inner or outer_x or outer_y):
        return x @ y
    return (_filled(x, outer_x, inner, transposed_x) @ _filled(y, inner, outer_y, transposed_y))[..., :m, :e]


def _is_transposed(x: Tensor) -> bool:
    """Whether a matrix lies in memory as its transpose."""
    return x.stride(-2) == 1 and x.stride(-1) != 1


def _filled(x: Tensor, rows: int, columns: int, transposed: bool) -> Tensor:
    """Padded with zeros, with the same axis last in memory."""
    if not (rows or columns):
        return x
    if x.dim() == 3 and x.stride(0) == 0:  # one matrix for all
        return _filled(x[0], rows, columns, transposed).expand(x.shape[0], -1, -1)
    return F.pad(x.mT, (0, rows, 0, columns)).mT if transposed else F.pad(x, (0, columns, 0, rows))


def _fits(x: Tensor, y: Tensor) -> bool:
    """Whether oneDNN can multiply these, and is faster than PyTorch's own."""
    return FASTER and x.dtype == y.dtype == torch.float32 and x.device.type == "cpu" and _plain()


def _plain() -> bool:
    """Whether no transform is active: it might want a derivative, which the operator lacks, or hide the strides."""
    return torch.compiler.is_compiling() or depth() == 0


def _product(x: Tensor, y: Tensor) -> Tensor:
    """The implementation directly; the operator in graphs and under dispatch modes."""
    plain = not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None
    return _multiplied(x, y) if plain else product(x, y)


def _multiplied(x: Tensor, y: Tensor) -> Tensor:
    """`x y` of `[... m d]` and `[... d e]`, the same axes in front."""
    if x.numel() == 0 or y.numel() == 0:
        return x @ y
    if x.shape[:-2].numel() == 1:
        return _of_matrices(x.flatten(0, -2), y.flatten(0, -2)).reshape(*x.shape[:-1], y.shape[-1])
    found = x.new_empty(*x.shape[:-1], y.shape[-1])
    for z, of_x, of_y in zip(found.flatten(0, -3), x.flatten(0, -3), y.flatten(0, -3), strict=True):
        z.copy_(_of_matrices(of_x, of_y))
    return found


def _of_matrices(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    if not y.mT.is_contiguous():
        unaligned = y.shape[1] * y.itemsize % ALIGNED_BYTES > 0  # rows, which oneDNN reads at four fifths of the speed
        pays = unaligned and x.shape[0] >= MANY_ROWS and y.numel() >= MANY_ENTRIES
        y = y.mT.contiguous().mT if pays else y.contiguous()  # with gaps it takes its reference code
    return torch.ops.mkldnn._linear_pointwise(x, y.mT, bias, "none", [], "")


product = torch.library.custom_op("ekfac_func::product", _multiplied, mutates_args=())


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
