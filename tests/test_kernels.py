"""The GPU kernel in Triton's interpreter, on any machine with the package triton: `pip install triton`.

The interpreter is chosen when the kernel is imported, so the tests run in a process of their own.
"""

import itertools
import os
import subprocess
import sys
from importlib.metadata import version
from typing import NamedTuple

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.func import vmap

from ekfac_func import Basis, Factored, exact_sums, kernels
from ekfac_func.kernels import projected
from ekfac_func.products import aligned

from .oracles import close


def counts() -> bool:
    """Whether the interpreter takes a loop: that of triton 3.6 has numpy read an array of one entry as a number."""
    return Version(version("triton")) >= Version("3.7") or Version(version("numpy")) < Version("2.4")


there = pytest.mark.skipif(not projected.FOUND, reason="the package triton is not there")
inside = pytest.mark.skipif(not projected.INTERPRETED, reason="runs in the process of test_in_the_interpreter")

SIZES = [  # n b s o i k
    (3, 1, 20, 5, 7, 1),
    (5, 2, 9, 33, 18, 1),
    (2, 1, 70, 70, 3, 1),
    (4, 1, 6, 4, 5, 9),
    (1, 1, 1, 1, 1, 1),
    (40, 1, 8, 6, 6, 1),
    (3, 1, 20, 1, 7, 1),
    (1, 1, 20, 5, 1, 1),
]


@there
@pytest.mark.skipif(projected.INTERPRETED, reason="is in it")
@pytest.mark.skipif(
    projected.FOUND and not counts(), reason="a loop in the interpreter of triton 3.6 needs numpy before 2.4"
)
def test_in_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]


@there
@pytest.mark.skipif(projected.INTERPRETED, reason="an interpreted kernel cannot be compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize("sides", [(768, 768), (50, 768), (50, 50)])
@pytest.mark.parametrize(("dtype", "products"), [("fp32", 3), ("fp32", 1), ("bf16", 1)])
def test_compiles_for_a_gpu_that_is_not_there(dtype: str, products: int, sides: tuple[int, int]) -> None:
    """Down to the machine code of compute capability 9.0: matrix units, copies of tiles, nothing left in memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    tile = projected.tile_of(*sides, torch.float32 if dtype == "fp32" else torch.bfloat16)
    constants = {"TILE_O": tile.o, "TILE_I": tile.i, "TILE_S": tile.s, "PRODUCTS": products, "WIDEN": False}
    types = {"h": f"tensordesc<{dtype}[1, {tile.o}, {tile.s}]>", "x": f"tensordesc<{dtype}[1, {tile.i}, {tile.s}]>"}
    types |= {"total": "*fp32", "square": "*fp32"} | dict.fromkeys(constants, "constexpr")
    names = projected._kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("total", "square", "o", "i")}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(projected._kernel, {name: types.get(name, "i32") for name in names}, fixed, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma.mma_async" in made.asm["ptx"]
    assert "cp.async.bulk.tensor" in made.asm["ptx"]
    assert ".local" not in made.asm["ptx"]
    assert made.asm["cubin"]


def sides(n: int, b: int, s: int, o: int, i: int, k: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, b, s, o, dtype=torch.float32), torch.randn(n, b, s, i, k, dtype=torch.float32)


def error(found: tuple[Tensor, Tensor], h: Tensor, x: Tensor) -> float:
    """The largest, in units of the largest entry of each sum."""
    exact = kernels.reference(h.double(), x.double())
    return max(float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, exact, strict=True))


@inside
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_reference(sizes: tuple[int, int, int, int, int, int]) -> None:
    h, x = sides(*sizes)
    assert error(kernels.projected_sums(h, x), h, x) < 1e-6
    low = h.bfloat16(), x.bfloat16()
    assert error(kernels.projected_sums(*low), *low) < 1e-6  # products and sums are in float32
    assert error(kernels.projected_sums(*low), h, x) < 2e-2


@inside
def test_tiles_and_parts_do_not_change_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    h, x = sides(7, 1, 33, 40, 50, 1)
    expected = kernels.reference(h.double(), x.double())
    for tile in (projected.Tile(16, 16, 16, 4, 2), projected.Tile(64, 32, 32, 4, 2)):
        for programs in (1, 8, 64, 10**6):
            monkeypatch.setattr(projected, "PROGRAMS", programs)
            for found, sums in zip(projected.launch(h, x, tile), expected, strict=True):
                torch.testing.assert_close(found.double(), sums, rtol=1e-5, atol=1e-4)


@inside
def test_strided_inputs() -> None:
    h, x = sides(3, 1, 20, 5, 7, 1)
    turned = h.mT.contiguous().mT
    assert not turned.is_contiguous()
    for found, expected in zip(kernels.projected_sums(turned, x), kernels.projected_sums(h, x), strict=True):
        torch.testing.assert_close(found, expected)


@inside
def test_vmap() -> None:
    h, x = sides(3, 2, 20, 5, 7, 1)
    many = torch.stack([h, 2 * h, -h], dim=2)
    found = vmap(torch.ops.ekfac_func.projected_sums, (2, None))(many, x)
    for at, factor in enumerate((1, 2, -1)):
        for of_all, alone in zip(found, kernels.projected_sums(factor * h, x), strict=True):
            torch.testing.assert_close(of_all[at], alone)


@inside
def test_as_an_operator() -> None:
    h, x = sides(3, 1, 20, 5, 7, 1)
    torch.library.opcheck(torch.ops.ekfac_func.projected_sums.default, (h, x))
    compiled = torch.compile(kernels.projected_sums, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(h, x), kernels.projected_sums(h, x), strict=True):
        torch.testing.assert_close(found, expected)


@inside
def test_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """`exact_sums` gives the same whichever way it goes, with full bases and with blocks that are filled up."""
    torch.set_default_dtype(torch.float32)
    a, g = torch.randn(4, 1, 20, 7, 1), torch.randn(4, 1, 20, 5)
    full = Basis(torch.linalg.qr(torch.randn(1, 7, 7))[0], torch.linalg.qr(torch.randn(1, 5, 5))[0])
    filled = torch.linalg.qr(torch.randn(1, 2, 4, 4))[0]
    filled[:, 1] = torch.eye(4)
    for basis in (full, Basis(filled, full.Q_B)):
        expected = exact_sums((Factored(a, g),), basis)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "takes", lambda g, a, basis: True)
            found = exact_sums((Factored(a, g),), basis)
        for one, other in zip(found, expected, strict=True):
            assert one is not None
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@inside
@pytest.mark.parametrize(
    ("h", "x", "message"),
    [
        (torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4, 1, dtype=torch.bfloat16), "float32 or both in bfloat16"),
        (torch.zeros(2, 1, 3, 4).float(), torch.zeros(2, 1, 4, 4, 1).float(), r"\[n b s O\]"),
    ],
)
def test_errors(h: Tensor, x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.projected_sums(h, x)


@pytest.mark.parametrize("shape", [(5, 7, 9), (4, 8, 12), (8, 3, 4), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("lead", [((), ()), ((3,), (3,)), ((2, 3), ()), ((1,), (3,))], ids=str)
def test_products_of_filled_up_rows(shape: tuple[int, int, int], lead: tuple[tuple[int, ...], ...]) -> None:
    """Of matrices as they are, turned, with gaps between their rows, and one for all."""
    m, d, e = shape
    for turned_x, turned_y, gaps in itertools.product((False, True), repeat=3):
        x, y = torch.randn(*lead[0], m, d), torch.randn(*lead[1], d, e)
        x, y = (t.mT.contiguous().mT if turned else t for t, turned in ((x, turned_x), (y, turned_y)))
        x = torch.cat([x, x], -1)[..., :d] if gaps else x
        x = x.expand(3, -1, -1) if lead[0] == (1,) else x
        close(aligned(x, y), x @ y)
        close(aligned(x.float(), y.float()), x.float() @ y.float(), 1e-5)


class OnCuda(NamedTuple):
    """What `takes` reads of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cuda")


@pytest.mark.parametrize(
    ("s", "o", "i", "taken"),
    [
        (1024, 768, 768, True),
        (1024, 3072, 768, True),
        (4, 768, 768, False),  # pairs of positions
        (3136, 64, 576, False),  # far more positions than entries: G[n] first
        (49, 512, 4608, True),
    ],
)
def test_takes(s: int, o: int, i: int, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projected, "FOUND", True)
    g, a = OnCuda((8, 1, s, o)), OnCuda((8, 1, s, i, 1))
    basis = Basis(torch.empty(1, i, i, device="meta"), torch.empty(1, o, o, device="meta"))
    assert kernels.takes(g, a, basis) is taken  # type: ignore[arg-type]
    rows = Basis(basis.Q_A, torch.empty(1, o, 1, 1, device="meta"))
    assert kernels.takes(g, a, rows) is (s >= 6 and s < 3136)  # type: ignore[arg-type]
    assert not kernels.takes(torch.zeros(8, 1, s, 1).float(), torch.zeros(8, 1, s, 1, 1).float(), basis)
