"""Sums over the examples of G and of its square in one pass, for which no `G[n]` is ever in memory.

A program of the kernel owns a tile of `[o i]`. For each example it forms that tile of `G[n] = sum_s h[n, s] x[n, s]^T`
in registers, from inputs and output gradients that are in the basis already, and adds it and its square to two more.
What is read is h and x, once for every tile of the other side; what is written is `[o i]` twice. The package `triton`
is needed, and a CUDA device or, to test the logic, Triton's interpreter (`TRITON_INTERPRET=1`).
"""

import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..types import Basis


class Tile(NamedTuple):
    """The part of `[o i]` of one program, and the positions that it multiplies at a time."""

    o: int
    i: int
    s: int
    warps: int
    stages: int


TILES = {torch.float32: Tile(64, 64, 32, 4, 3), torch.bfloat16: Tile(128, 64, 64, 8, 3)}
"""By the dtype of what is multiplied; float32 also in TF32."""

PROGRAMS = 512  # below this many tiles the examples are split too, up to it, each part into sums of its own
LEAST_POSITIONS = 6  # products take 16 positions at a time: up to here pairs of positions are less work
EXTRA = 2  # times the operations of the cheapest order that are taken for the memory traffic saved

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # it would multiply the bits of bfloat16 as integers
FOUND = importlib.util.find_spec("triton") is not None

if FOUND:
    import triton
    import triton.language as tl

    @triton.jit
    def _kernel(
        h: "Any",
        x: "Any",
        total: "Any",
        square: "Any",
        n: "Any",
        s: "Any",
        o: "Any",
        i: "Any",
        n_of_part: "Any",
        TILE_O: tl.constexpr,
        TILE_I: tl.constexpr,
        TILE_S: tl.constexpr,
        PRECISION: tl.constexpr,
        WIDEN: tl.constexpr,
    ) -> None:
        tiles_i = tl.cdiv(i, TILE_I)
        outputs = tl.program_id(0) // tiles_i * TILE_O + tl.arange(0, TILE_O)
        inputs = tl.program_id(0) % tiles_i * TILE_I + tl.arange(0, TILE_I)
        block, blocks, part = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
        sums = tl.zeros((TILE_O, TILE_I), dtype=tl.float32)
        squares = tl.zeros((TILE_O, TILE_I), dtype=tl.float32)
        for example in range(part * n_of_part, tl.minimum((part + 1) * n_of_part, n)):
            first = (example * blocks + block).to(tl.int64) * s
            G = tl.zeros((TILE_O, TILE_I), dtype=tl.float32)
            for at in range(0, s, TILE_S):
                positions = at + tl.arange(0, TILE_S)
                rows, there = (first + positions)[:, None], (positions < s)[:, None]
                of_h = tl.load(h + rows * o + outputs[None, :], mask=there & (outputs < o)[None, :], other=0.0)
                of_x = tl.load(x + rows * i + inputs[None, :], mask=there & (inputs < i)[None, :], other=0.0)
                if WIDEN:
                    of_h, of_x = of_h.to(tl.float32), of_x.to(tl.float32)
                G = tl.dot(tl.trans(of_h), of_x, G, input_precision=PRECISION)
            sums += G
            squares += G * G
        to = ((part * blocks + block).to(tl.int64) * o + outputs[:, None]) * i + inputs[None, :]
        inside = (outputs < o)[:, None] & (inputs < i)[None, :]
        tl.store(total + to, sums, mask=inside)
        tl.store(square + to, squares, mask=inside)


def takes(g: Tensor, a: Tensor, basis: Basis) -> bool:
    """Whether the kernel should sum a layer's inputs `[n b s i k]` and output gradients `[n b s o]`.

    On a CUDA device with triton, unless there are few positions (pairs of them are less work) or so many that G[n] is
    cheaper formed before it is projected than after. Of the sizes of one example, never of n.
    """
    if not FOUND or g.device.type != "cuda" or g.dtype not in TILES:
        return False
    s, o, i = g.shape[2], g.shape[3], a.shape[3] * a.shape[4]
    turn_i, turn_o = (Q.shape[-1] if Q.shape[-1] > 1 else 0 for Q in basis)
    form, early, late = s * o * i, s * (o * turn_o + i * turn_i), o * i * (turn_o + turn_i)
    return s >= LEAST_POSITIONS and form + early <= EXTRA * (form + min(early, late))


@torch.library.custom_op("ekfac_func::projected_sums", mutates_args=())
def projected_sums(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """`sum_n G[n]` and `sum_n G[n]^2`, `[b O I k]` in float32, with `G[n] = sum_s h[n, s] x[n, s]^T`.

    h: output gradients in the basis, `[n b s O]`, in float32 or bfloat16. x: inputs in the basis, `[n b s I k]`, in
    the same dtype. Products of float32 are as exact as `torch.set_float32_matmul_precision` asks: TF32 unless it is
    "highest", the default. All sums are in float32.

    ValueError where shapes or dtypes do not fit; RuntimeError without triton.
    """
    if h.dtype != x.dtype or h.dtype not in TILES:
        raise ValueError(f"h is {h.dtype} and x is {x.dtype}: give both in float32 or both in bfloat16")
    if h.dim() != 4 or x.dim() != 5 or h.shape[:3] != x.shape[:3]:
        raise ValueError(f"h is {tuple(h.shape)} and x is {tuple(x.shape)}: give [n b s O] and [n b s I k]")
    if not FOUND:
        raise RuntimeError("projected_sums needs the package triton: pip install triton, or use `reference`")
    return launch(h, x, TILES[h.dtype])


def launch(h: Tensor, x: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """`projected_sums` with tiles of a given size."""
    n, b, s, o = h.shape
    i, k = x.shape[3:]
    tiles = -(-o // tile.o) * -(-(i * k) // tile.i) * b
    n_of_part = max(1, n // max(1, PROGRAMS // max(1, tiles)))
    parts = max(1, -(-n // n_of_part))
    total, square = (torch.empty(parts, b, o, i, k, dtype=torch.float32, device=h.device) for _ in range(2))
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if total.numel():
        _kernel[(tiles // b, b, parts)](
            *(h.contiguous(), x.contiguous(), total, square),
            *(n, s, o, i * k, n_of_part),
            TILE_O=tile.o,
            TILE_I=tile.i,
            TILE_S=tile.s,
            PRECISION=precision,
            WIDEN=INTERPRETED,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return (total[0], square[0]) if parts == 1 else (total.sum(0), square.sum(0))


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
