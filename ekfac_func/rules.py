"""Which torch calls are layers: one function and one row each.

A rule reads a call of a torch function and says where its weight's gradient comes from. Whatever no rule
recognises is differentiated as it is: rules are speed and a better basis, never correctness.
"""

import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .patches import Patches
from .types import Factored, OneHot


class Call(NamedTuple):
    """One reading of a call (letters as in `kronecker.py`).

    `letters` names each axis of `weight.reshape(split)`, or of the weight itself, as b, o, i or k. `read(input,
    output_gradient)` takes both with a leading axis n and returns the term of the weight's per-example gradients. A
    bias must add to the output along `(b o)`; a rule that leaves it out (None) makes it a block of its own.
    """

    weight: Tensor
    letters: str
    input: Any  # a tensor or a tree of them
    read: Callable[[Any, Tensor], Factored | OneHot]
    bias: Tensor | None = None
    split: tuple[int, ...] | None = None
    table: bool = False  # read returns OneHot
    mixes: tuple[int, ...] = ()  # axes of the input, -1 the last, that the output mixes: no examples lie along them


Rule = Callable[..., Call | Sequence[Call] | None]  # several readings where either operand may be the weight
Rules = Mapping[Callable[..., Any], Rule]


def readings(rules: Rules, func: Any, args: Any, kwargs: Any) -> Sequence[Call]:
    """The readings of a call by the rule of its function: none, one, or one for each operand that may be the weight."""
    found = rules[func](*args, **kwargs)
    if found is None:
        return []
    return [found] if isinstance(found, Call) else found


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
    """`F.linear` with any leading dimensions: each is a position s."""
    s = _LETTERS[: input.dim() - 1]
    return _product(f"{s}y", "zy", f"{s}z", input, weight, bias)


def matmul(*operands: Tensor, **named: Any) -> list[Call]:
    """`torch.matmul`, `@`, `mm`, `bmm` with a parameter of two or more axes on either side; batch axes are blocks."""
    tensors = [t for t in (*operands, *_by_name(named)) if isinstance(t, Tensor)]
    if len(tensors) != 2:
        return []
    x, y = tensors
    dims = max(x.dim(), y.dim()) - 2
    lead, row, column = _LETTERS[: max(dims, 0)], "y" * (x.dim() > 1), "z" * (y.dim() > 1)
    x_letters, y_letters = (lead[dims - t.dim() + 2 :] for t in (x, y))
    return _either(f"{x_letters}{row}x", f"{y_letters}x{column}", f"{lead}{row}{column}", x, y)


def addmm(*operands: Tensor, beta: float = 1, alpha: float = 1, **named: Any) -> list[Call]:
    """`torch.addmm` and `torch.baddbmm`; a vector added to `input @ weight` is its bias."""
    first = [named.pop("input")] if "input" in named else []
    tensors = [*first, *operands, *_by_name(named)]
    bias, calls = tensors[0], matmul(*tensors[1:])
    if alpha != 1:
        return []
    return [call._replace(bias=bias) if call.letters == "io" and beta == 1 else call for call in calls]


def _by_name(named: Mapping[str, Any]) -> list[Any]:
    """Operands in their order, which is that of their names: mat1, mat2; batch1, batch2; input, mat2 or other."""
    return [named[name] for name in sorted(named)]


def einsum(equation: Any, *operands: Any) -> list[Call]:
    """`torch.einsum` of two operands, of which either may be the weight.

    Axes that only the weight shares with the output are o, but its first axis is b where it has three or more (an
    expert dimension); axes that all three share are b; axes that are summed against the input are i.
    """
    if not isinstance(equation, str):
        return []
    if "->" not in equation:  # then what stands once is left, in the order of the alphabet
        once = (letter for letter in sorted(set(equation)) if letter.isalpha() and equation.count(letter) == 1)
        equation = f"{equation}->{'...' if '...' in equation else ''}{''.join(once)}"
    operands = tuple(operands[0]) if len(operands) == 1 and not isinstance(operands[0], Tensor) else operands
    inputs, output = equation.replace(" ", "").split("->")
    parts = inputs.split(",")
    if len(operands) != 2 or len(parts) != 2:
        return []
    spare = "".join(letter for letter in _LETTERS if letter not in equation)
    dots = [t.dim() - len(part) + 3 if "..." in part else 0 for part, t in zip(parts, operands, strict=True)]
    lead = spare[: max(dots)]
    left, right = (part.replace("...", lead[len(lead) - count :]) for part, count in zip(parts, dots, strict=True))
    return _either(left, right, output.replace("...", lead), *operands)


def tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: Tensor | None = None) -> list[Call]:
    """`torch.tensordot`, as `einsum`."""
    if not isinstance(dims, int | list | tuple):
        return []
    over = (range(a.dim() - dims, a.dim()), range(dims)) if isinstance(dims, int) else dims
    of_a, of_b = ([axis] if isinstance(axis, int) else list(axis) for axis in over)
    if len({axis % a.dim() for axis in of_a}) < len(of_a) or len({axis % b.dim() for axis in of_b}) < len(of_b):
        return []
    left, right = list(_LETTERS[: a.dim()]), list(_LETTERS[a.dim() :][: b.dim()])
    output = [*left, *right]
    for x, y in zip(of_a, of_b, strict=True):
        output.remove(left[x])
        output.remove(right[y])
        right[y] = left[x]
    return einsum(f"{''.join(left)},{''.join(right)}->{''.join(output)}", a, b)


def inner(input: Tensor, other: Tensor, out: Tensor | None = None) -> list[Call]:
    """`torch.inner`, as `einsum`."""
    return tensordot(input, other, ([-1], [-1])) if input.dim() and other.dim() else []


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    """`F.bilinear`: the input is the outer product of both."""

    def read(inputs: tuple[Tensor, Tensor], g: Tensor) -> Factored:
        x, y, g = (t[:, None].flatten(1, -2)[:, None] for t in (*inputs, g))
        return Factored(torch.einsum("nbsi,nbsj->nbsij", x, y).flatten(3)[..., None], g)

    return Call(weight, "oii", (input1, input2), read, bias)


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Call:
    """`F.conv1d`, `F.conv2d`, `F.conv3d`: inputs are patches over `(c/groups kernel)`, an output pixel a position."""
    nd = weight.dim() - 2

    def read(x: Tensor, g: Tensor) -> Factored:
        a = _patches(_batched(x, nd), weight, stride, dilation, groups, padding)
        return Factored(a, _pixels(_batched(g, nd), groups))

    split = (groups, weight.shape[0] // groups, *weight.shape[1:])
    return Call(weight, "boi" + "i" * nd, input, read, bias, split, mixes=_under_the_kernel(weight))


def _under_the_kernel(weight: Tensor) -> tuple[int, ...]:
    """The spatial axes along which a kernel mixes pixels: those where it is longer than 1."""
    return tuple(axis for axis in range(2 - weight.dim(), 0) if weight.shape[axis] > 1)


def conv_sua(input: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry: Any, **named: Any) -> Call:
    """Convolutions under the spatially uncorrelated activations assumption: `A` over channels alone.

    Grosse & Martens 2016, https://arxiv.org/abs/1602.01407. `A` is the mean over examples and all pixels of the
    convolution's input, and the kernel offsets stay apart (k). The per-example gradients and their moment stay exact.
    The bias is a block of its own.
    """
    nd = weight.dim() - 2
    dense = conv(input, weight, None, *geometry, **named)

    def read(x: Tensor, g: Tensor) -> Factored:
        term = dense.read(x, g)
        assert isinstance(term, Factored)
        assert isinstance(term.a, Patches)
        return Factored(replace(term.a, apart=True), term.g, _pixels(_batched(x, nd), term.g.shape[1]))

    return dense._replace(letters="boi" + "k" * nd, read=read)


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> Call:
    """`F.conv_transpose1d`, `2d`, `3d`: a convolution of the input, spread out by the stride, with a turned kernel.

    Inputs are patches of that over `(c/groups kernel)`, an output pixel is a position, so that the bias joins them.
    """
    nd, kernel = weight.dim() - 2, weight.shape[2:]
    strides, pads, extra, reach = (per_axis(v, nd) for v in (stride, padding, output_padding, dilation))

    def read(x: Tensor, g: Tensor) -> Factored:
        x = _batched(x, nd)
        for axis, (k, s, p, e, d) in enumerate(zip(kernel, strides, pads, extra, reach, strict=True)):
            inner, side = [0, 0] * (nd - 1 - axis), d * (k - 1) - p
            x = F.pad(x.unsqueeze(4 + axis), [*inner, 0, s - 1]).flatten(3 + axis, 4 + axis)  # s - 1 zeros after each
            x = F.pad(x, [*inner, side, side + e - (s - 1)])
        spatial = [-1 - axis for axis in range(nd)]  # inputs and pixels are flipped, in place of the kernel
        a = _patches(x.flip(spatial), weight, 1, dilation, groups)
        return Factored(a, _pixels(_batched(g, nd).flip(spatial), groups))

    split = (groups, weight.shape[0] // groups, *weight.shape[1:])
    return Call(weight, "bio" + "i" * nd, input, read, bias, split, mixes=_under_the_kernel(weight))


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call | None:
    """`F.embedding`: ids in place of one-hot inputs."""
    if max_norm is not None or scale_grad_by_freq:
        return None
    padding = None if padding_idx is None else padding_idx % len(weight)

    def read(ids: Tensor, g: Tensor) -> OneHot:
        ids, g = ids[:, None].flatten(1), g[:, None].flatten(1, -2)
        counted = torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding
        return OneHot(ids, len(weight), torch.where(counted[..., None], g, 0), counted)

    return Call(weight, "oi", input, read, table=True)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Call | None:
    """`F.layer_norm`: the scale and shift of a feature are a block of two."""

    def normalise(x: Tensor) -> Tensor:
        return F.layer_norm(_in_float(x), normalized_shape, None, None, eps)

    return _scale(input, weight, bias, normalise, len(normalized_shape))


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Call | None:
    """`F.rms_norm`: a block for the scale of each feature."""
    return _scale(F.rms_norm(input, normalized_shape, None, eps), weight, None, last=len(normalized_shape))


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Call | None:
    """`F.group_norm`: the scale and shift of a channel are a block of two, pixels are positions."""
    return _scale(input, weight, bias, lambda x: F.group_norm(_in_float(x), num_groups, None, None, eps))


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Call | None:
    """`F.instance_norm`, as `group_norm`."""
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _scale(input, weight, bias, lambda x: F.instance_norm(x, eps=eps))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Call | None:
    """`F.batch_norm`, as `group_norm`; with the statistics of the batch in a batched capture alone."""
    if training or running_mean is None or running_var is None:
        return _scale(F.batch_norm(input, None, None, None, None, True, 0.0, eps), weight, bias)
    return _scale(standardised(input, running_mean, running_var, eps), weight, bias)


_LETTERS = string.ascii_letters


def _either(x_letters: str, y_letters: str, output: str, x: Tensor, y: Tensor) -> list[Call]:
    """An einsum of two tensors, a letter for each axis, read as a layer of each that may be its weight."""
    calls = _product(x_letters, y_letters, output, x, y), _product(y_letters, x_letters, output, y, x)
    return [call for call in calls if call is not None]


def _product(
    x_letters: str, w_letters: str, output: str, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Call | None:
    """An einsum of an input and a weight, likewise; None if it is no layer."""
    if weight.dim() < 2 or len(w_letters) != weight.dim() or len(x_letters) != input.dim():
        return None  # a vector, or what torch refuses
    sizes: dict[str, int] = {}
    for letters, t in ((x_letters, input), (w_letters, weight)):
        for letter, size in zip(letters, t.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                return None  # broadcast from size 1
    if any(len(set(letters)) < len(letters) for letters in (x_letters, w_letters, output)):
        return None  # a diagonal
    if any(letter not in x_letters + output for letter in w_letters):
        return None  # summed before it meets the input
    kinds = "".join("i" if c not in output else "b" if c in x_letters else "o" for c in w_letters)
    if kinds == "oo" or set(kinds) == {"i"}:
        return None  # of which one side would have as many dimensions as the weight has entries
    if len(kinds) > 2 and kinds[0] == "o" and "o" in kinds[1:]:  # experts that all see the same input
        kinds = "b" + kinds[1:]
    b, o, i = ("".join(c for c, kind in zip(w_letters, kinds, strict=True) if kind == want) for want in "boi")
    s = "".join(letter for letter in output if letter not in w_letters)
    n = next(letter for letter in _LETTERS if letter not in x_letters + output + w_letters)

    def read(x: Tensor, g: Tensor) -> Factored:
        seen = "".join(c for c in b if c in x_letters)
        a = torch.einsum(f"{n}{x_letters}->{n}{seen}{s}{i}", x)
        if len(seen) < len(b):
            a = a.unsqueeze(1).expand(-1, sizes[w_letters[0]], *a.shape[1:])
        g = torch.einsum(f"{n}{output}->{n}{b}{s}{o}", g)
        return Factored(_grouped(a, (len(b), len(s), len(i)))[..., None], _grouped(g, (len(b), len(s), len(o))))

    return Call(weight, kinds, input, read, bias)


def _grouped(t: Tensor, counts: Sequence[int]) -> Tensor:
    """`[n ...]` with each run of so many axes joined into one, of size 1 where the run is empty."""
    shape, at = [t.shape[0]], 1
    for count in counts:
        shape.append(math.prod(t.shape[at : at + count]))
        at += count
    return t.reshape(shape)


def _scale(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: Callable[[Tensor], Tensor] | None = None,
    last: int | None = None,
) -> Call | None:
    """The call of a norm: a scale, and a shift, for each feature.

    normalise: from an input of several examples to what the scale multiplies; None where the input is that already.
    last: how many last axes are the features; None where they are the channels, axis 1.
    """
    if weight is None:
        return None

    def read(x: Tensor, g: Tensor) -> Factored:
        if last is None:  # [n m c ...]
            x = x if normalise is None else normalise(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            x, g = (t.movedim(2, 1).flatten(2) for t in (x, g))
        else:
            x = x if normalise is None else normalise(x)
            x, g = (t.flatten(-last).unsqueeze(1).flatten(1, -2).mT for t in (x, g))
        return Factored(x[..., None, None], g[..., None])

    normalised_over = 0 if normalise is None else last or input.dim() - 1
    return Call(weight, "b" * weight.dim(), input, read, bias, mixes=tuple(range(-normalised_over, 0)))


def standardised(input: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """The input standardised by the mean and variance of each channel, axis 1."""
    of_channels = (-1, *(1,) * (input.dim() - 2))
    return (input - mean.reshape(of_channels)) * (variance + eps).rsqrt().reshape(of_channels)


def _in_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _pixels(x: Tensor, groups: int) -> Tensor:
    """`[n m (b c) ...]` to `[n b p c]`."""
    return rearrange(x, "n m (b c) ... -> n b (m ...) c", b=groups)


def _batched(x: Tensor, nd: int) -> Tensor:
    """`[n (m) c ...]` with the convolution's own batch axis m written out."""
    return x.unsqueeze(1) if x.dim() == nd + 2 else x


def _patches(
    x: Tensor, weight: Tensor, stride: Any, dilation: Any, groups: int, padding: str | int | tuple[int, ...] = 0
) -> Patches:
    """What each output pixel sees of an input `[n m (b c) ...]`."""
    kernel = tuple(weight.shape[2:])
    x = x.unflatten(2, (groups, -1)).movedim(3, -1)
    sides = margins(kernel, padding, dilation)
    x = (F.pad(x, [0, 0, *sides]) if any(sides) else x).contiguous()  # a pass that pads has turned it already
    return Patches(x, kernel, tuple(per_axis(stride, len(kernel))), tuple(per_axis(dilation, len(kernel))))


def margins(
    kernel: tuple[int, ...], padding: str | int | tuple[int, ...], dilation: int | tuple[int, ...]
) -> list[int]:
    """The padding as `F.pad` takes it: both sides of each spatial axis, the last axis first."""
    if padding == "same":  # an odd reach pads the end once more
        reach = [d * (k - 1) for k, d in zip(kernel, per_axis(dilation, len(kernel)), strict=True)]
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        sides = [(p, p) for p in per_axis(0 if padding == "valid" else padding, len(kernel))]
    return [p for side in reversed(sides) for p in side]


def per_axis(value: Any, nd: int) -> list[int]:
    """A setting of a convolution as one number for each of nd spatial axes."""
    values = [value] if isinstance(value, int) else list(value)
    return values * nd if len(values) == 1 else values


RULES: Rules = {
    F.linear: linear,
    F.bilinear: bilinear,
    F.conv1d: conv,
    F.conv2d: conv,
    F.conv3d: conv,
    F.conv_transpose1d: conv_transpose,
    F.conv_transpose2d: conv_transpose,
    F.conv_transpose3d: conv_transpose,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,  # as which Dynamo sees it
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.batch_norm: batch_norm,
    torch.einsum: einsum,
    torch.tensordot: tensordot,
    **dict.fromkeys((torch.inner, Tensor.inner), inner),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), matmul),
    **dict.fromkeys((Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm), matmul),
    **dict.fromkeys((torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm), addmm),
}
SUA: Rules = {F.conv1d: conv_sua, F.conv2d: conv_sua, F.conv3d: conv_sua}
