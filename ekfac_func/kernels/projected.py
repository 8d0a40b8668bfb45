"""Sums over the examples of G and of its square in one pass, for which no `G[n]` is ever in memory.

A program of the kernel owns a tile of `[o i]` and a part of the examples. For each example it forms that tile of
`G[n] = sum_s h[n, s] x[n, s]^T` in registers, from inputs and output gradients that are in the basis already, and adds
it and its square to two more. What is read is h and x, once for every tile of the other side; what is written is
`[o i]` twice for each part. The package `triton` is needed, and a CUDA device or, to test the logic, Triton's
interpreter (`TRITON_INTERPRET=1`).

Matrix units take float32 as TF32, of 11 bits. Where float32 is to be multiplied as such, h and x are split in two
halves of that many bits, and three of the four products of halves are added up.
"""

import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..products import ALIGNED_BYTES
from ..types import Basis, turns


class Tile(NamedTuple):
    """The part of `[o i]` of one program, and the positions that it multiplies at a time."""

    o: int
    i: int
    s: int
    warps: int
    stages: int


DTYPES = (torch.float32, torch.bfloat16)
ROW_BYTES = 128  # of positions that are multiplied at a time, and what a matrix unit reads
LOW_BITS = 0x1FFF  # of float32, that TF32 does not have

PROGRAMS = 132  # multiprocessors, where there is no device to ask
WRITTEN = 600  # positions that take as long to multiply as two sums of a tile to write
LEAST_POSITIONS = 6  # a product takes a row of positions at a time: of fewer, pairs of positions are less work
EXTRA = 2  # times the operations of the cheapest order that are taken for the memory traffic saved

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # which multiplies the bits of bfloat16 as integers
FOUND = importlib.util.find_spec("triton") is not None

if FOUND:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def _kernel(
        h: "Any",
        x: "Any",
        total: "Any",
        square: "Any",
        n: "Any",
        blocks: "Any",
        rows: "Any",
        o: "Any",
        i: "Any",
        n_of_part: "Any",
        TILE_O: tl.constexpr,
        TILE_I: tl.constexpr,
        TILE_S: tl.constexpr,
        PRODUCTS: tl.constexpr,
        WIDEN: tl.constexpr,
    ) -> None:
        tiles_i = tl.cdiv(i, TILE_I)
        first_o, first_i = tl.program_id(0) // tiles_i * TILE_O, tl.program_id(0) % tiles_i * TILE_I
        block, part = tl.program_id(1), tl.program_id(2)
        begin = part * n_of_part
        of_one = rows * PRODUCTS
        sums = tl.zeros((TILE_O, TILE_I), dtype=tl.float32)
        squares = tl.zeros((TILE_O, TILE_I), dtype=tl.float32)
        G = tl.zeros((TILE_O, TILE_I), dtype=tl.float32)
        for step in range(tl.minimum(n_of_part, n - begin) * of_one):  # one loop, so that loads run ahead of an example
            row_h = (begin + step // of_one) * blocks + block
            row_x = row_h
            at = step % of_one
            if PRODUCTS == 3:  # those with low halves first, since each sum is rounded at its size so far
                row_h += tl.where(at // rows == 0, n * blocks, 0)
                row_x += tl.where(at // rows == 1, n * blocks, 0)
            of_h = h.load([row_h, first_o, at % rows * TILE_S]).reshape(TILE_O, TILE_S)
            of_x = x.load([row_x, first_i, at % rows * TILE_S]).reshape(TILE_I, TILE_S)
            if WIDEN:
                of_h, of_x = of_h.to(tl.float32), of_x.to(tl.float32)
            G = tl.dot(of_h, of_x.T, G)
            if at == of_one - 1:
                sums += G
                squares += G * G
                G = tl.zeros((TILE_O, TILE_I), dtype=tl.float32)
        outputs, inputs = first_o + tl.arange(0, TILE_O), first_i + tl.arange(0, TILE_I)
        to = ((part * blocks + block).to(tl.int64) * o + outputs[:, None]) * i + inputs[None, :]
        inside = (outputs < o)[:, None] & (inputs < i)[None, :]
        tl.store(total + to, sums, mask=inside)
        tl.store(square + to, squares, mask=inside)


def takes(g: Tensor, a: Tensor, basis: Basis) -> bool:
    """Whether the kernel should sum a layer's inputs `[n b s i k]` and output gradients `[n b s o]`.

    On a CUDA device with triton, unless there are few positions (pairs of them are less work) or so many that G[n] is
    cheaper formed before it is projected than after. Of the sizes of one example, never of n.
    """
    if not FOUND or g.device.type != "cuda" or g.dtype not in DTYPES:
        return False
    s, o, i = g.shape[2], g.shape[3], a.shape[3] * a.shape[4]
    turn_i, turn_o = map(turns, basis)
    form, early, late = s * o * i, s * (o * turn_o + i * turn_i), o * i * (turn_o + turn_i)
    return s >= LEAST_POSITIONS and form + early <= EXTRA * (form + min(early, late))


@torch.library.custom_op("ekfac_func::projected_sums", mutates_args=())
def projected_sums(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """`sum_n G[n]` and `sum_n G[n]^2`, `[b O I k]` in float32, with `G[n] = sum_s h[n, s] x[n, s]^T`.

    h: output gradients in the basis, `[n b s O]`, in float32 or bfloat16. x: inputs in the basis, `[n b s I k]`, in
    the same dtype. Read as they are where positions are the last axis in memory, copied so elsewhere. Products of
    float32 are as exact as `torch.set_float32_matmul_precision` asks: TF32 unless it is "highest", the default. All
    sums are in float32.

    ValueError where shapes or dtypes do not fit; RuntimeError without triton.
    """
    if h.dtype != x.dtype or h.dtype not in DTYPES:
        raise ValueError(f"h is {h.dtype} and x is {x.dtype}: give both in float32 or both in bfloat16")
    if h.dim() != 4 or x.dim() != 5 or h.shape[:3] != x.shape[:3]:
        raise ValueError(f"h is {tuple(h.shape)} and x is {tuple(x.shape)}: give [n b s O] and [n b s I k]")
    if not FOUND:
        raise RuntimeError("projected_sums needs the package triton: pip install triton, or use `reference`")
    return launch(h, x, tile_of(h.shape[3], x.shape[3] * x.shape[4], h.dtype))


def tile_of(o: int, i: int, dtype: torch.dtype) -> Tile:
    """As large as three of it fit into registers, and no larger than a side asks for."""
    wide_o, wide_i = (128 if size > 64 else 64 for size in (o, i))
    return Tile(wide_o, wide_i, ROW_BYTES // dtype.itemsize, 8 if wide_o + wide_i > 192 else 4, 5)


def launch(h: Tensor, x: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """`projected_sums` with tiles of a given size."""
    n, b, s, o = h.shape
    i, k = x.shape[3:]
    exact = h.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    tiles = -(-o // tile.o) * -(-(i * k) // tile.i)
    n_of_part = examples_of_part(n, s, tiles * b, _programs(h.device))
    parts = -(-n // n_of_part)
    made = torch.empty if s else torch.zeros
    total, square = (made(parts, b, o, i, k, dtype=torch.float32, device=h.device) for _ in range(2))
    if s and total.numel():
        rows_h, rows_x = (_in_rows(t, exact) for t in (h, x.flatten(3)))
        with torch.cuda.device_of(h):
            _kernel[(tiles, b, parts)](
                TensorDescriptor.from_tensor(rows_h, [1, tile.o, tile.s]),
                TensorDescriptor.from_tensor(rows_x, [1, tile.i, tile.s]),
                *(total, square, n, b, -(-s // tile.s), o, i * k, n_of_part),
                TILE_O=tile.o,
                TILE_I=tile.i,
                TILE_S=tile.s,
                PRODUCTS=3 if exact else 1,
                WIDEN=INTERPRETED,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
    return (total[0], square[0]) if parts == 1 else (total.sum(0), square.sum(0))


def _programs(device: torch.device) -> int:
    """That run at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROGRAMS


def examples_of_part(n: int, s: int, tiles: int, programs: int) -> int:
    """Examples that a program sums: few where tiles alone are too few to fill a device, for each part is written."""

    def positions(size: int) -> float:
        parts = -(-n // size)
        return -(-tiles * parts // programs) * (size * s + WRITTEN) + (parts > 1) * tiles * parts * WRITTEN / programs

    return min(range(1, n + 1), key=positions, default=1)


def _in_rows(t: Tensor, exact: bool) -> Tensor:
    """`[n b s d]` as rows of positions `[(n b) d s]`, filled up with zeros; exact: high halves, then low ones."""
    rows = t.flatten(0, 1).mT
    unit, s = ALIGNED_BYTES // t.element_size(), rows.shape[2]
    there = rows.stride(2) == 1 and not any(size % unit for size in (rows.storage_offset(), *rows.stride()[:2]))
    if there and not exact:
        return rows
    filled = rows.new_empty(1 + exact, *rows.shape[:2], s + -s % unit)
    filled[..., s:] = 0
    high = filled[0, ..., :s].copy_(rows)
    if exact:
        high.view(torch.int32).bitwise_and_(~LOW_BITS)
        torch.sub(rows, high, out=filled[1, ..., :s])
    return filled.flatten(0, 1)


@projected_sums.register_fake
def _(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    shape = (h.shape[1], h.shape[3], *x.shape[3:])
    return h.new_empty(shape, dtype=torch.float32), h.new_empty(shape, dtype=torch.float32)


@projected_sums.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, int | None], h: Tensor, x: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """What is mapped over is one more block."""
    h, x = (
        t.movedim(dim, 1) if dim is not None else t[:, None].expand(-1, info.batch_size, *t.shape[1:])
        for t, dim in zip((h, x), in_dims, strict=True)
    )
    total, square = projected_sums(h.flatten(1, 2), x.flatten(1, 2))
    return (total.unflatten(0, h.shape[1:3]), square.unflatten(0, h.shape[1:3])), (0, 0)


def reference(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """`projected_sums` in plain PyTorch, one example after another, in the dtype of h."""
    shape = (h.shape[1], h.shape[3], *x.shape[3:])
    total, square = h.new_zeros(shape), h.new_zeros(shape)
    for of_h, of_x in zip(h, x, strict=True):
        G = torch.einsum("bso,bsik->boik", of_h, of_x)
        total, square = total + G, square + G * G
    return total, square
