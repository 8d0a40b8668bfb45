"""The Triton kernel and the whole step on a CUDA device: checked, then timed.

    pip install triton && python benchmarks/gpu.py                 # writes runs/gpu.json
    python benchmarks/gpu.py --tiles                               # also other sizes of the kernel's tiles
    python benchmarks/gpu.py --compiled                            # also inductor, and CUDA graphs, for minutes a model
    python benchmarks/gpu.py --device cpu --tiny                   # the script's own logic, on any machine

Three tables. The error of each sum against float64, in units of its largest entry, for float32, TF32 and bfloat16
inputs. The kernel's operations a second beside those of a matrix product in the same precision, and beside plain
PyTorch on the same sums. The exact step in a known basis as a multiple of plain forward-backward: with the kernel, by
the PyTorch plan alone, and the naive `vmap(grad)`. On a CPU the plain reference stands in for the kernel, unless
TRITON_INTERPRET=1.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.workloads import DAMPING, ON_GPU, TINY_ON_GPU, Work, forward_backward, naive, work
from ekfac_func import Blocks, ekfac, kernels
from ekfac_func.kernels import projected


class Precision(NamedTuple):
    """What is multiplied, and how exactly float32 is."""

    dtype: torch.dtype
    products: str


PRECISIONS = {
    "float32": Precision(torch.float32, "highest"),
    "tf32": Precision(torch.float32, "high"),
    "bfloat16": Precision(torch.bfloat16, "highest"),
}
SHAPES = {  # n s o i
    "attention, T = 1024": (32, 1024, 768, 768),
    "MLP of a transformer, T = 1024": (32, 1024, 3072, 768),
    "MLP of a transformer, 8 examples": (8, 1024, 3072, 768),
    "convolution 3 x 3, 14 x 14": (128, 196, 256, 2304),
    "convolution 3 x 3, 7 x 7": (128, 49, 512, 4608),
}
TINY_SHAPES = {"tiny": (3, 20, 5, 7)}
TILES = ((128, 128, 8, 3), (128, 128, 8, 5), (128, 64, 4, 4), (64, 128, 4, 4), (64, 128, 4, 3))  # o i warps stages
LEAST = 0.01  # seconds of calls in a row
ROWS_ALONE = {"head.weight": Blocks(outputs=1), "*": Blocks()}
"""A vocabulary of 50,257 has no basis of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--tiles", action="store_true", help="also other sizes of tiles")
    parser.add_argument("--compiled", action="store_true", help="also compiled steps")
    parser.add_argument("--models", nargs="*", choices=ON_GPU, default=list(ON_GPU), help="whose steps are timed")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here: --device cpu --tiny checks the script alone")
    report: dict[str, Any] = {"machine": machine(options.device), "kernel": [], "steps": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for part, row in measured(**{name: value for name, value in vars(options).items() if name != "out"}):
        report[part].append(row)
        options.out.write_text(json.dumps(report, indent=1))  # each time: what an interrupted run measured is not lost
    for rows in (report["kernel"], report["steps"]):
        print(table(rows) + "\n")
    print(json.dumps(report["machine"]), f"\nwrote {options.out}")


def measured(
    device: str, tiny: bool, tiles: bool, compiled: bool, models: list[str], repeats: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of the kernel and of the steps, as soon as each is measured."""
    shapes, works = (TINY_SHAPES, TINY_ON_GPU) if tiny else (SHAPES, ON_GPU)
    for name, sizes in shapes.items():
        for precision in PRECISIONS:
            for row in of_kernel(name, sizes, precision, device, tiles, repeats):
                yield "kernel", row
    for name in models:
        for row in of_steps(name, works, device, compiled, repeats):
            yield "steps", row


def machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    found, interpreted = str(projected.FOUND), str(projected.INTERPRETED)
    return {"device": name, "torch": torch.__version__, "triton": found, "interpreted": interpreted}


def usable(device: str) -> bool:
    """Whether the kernel itself runs."""
    return projected.FOUND and (device == "cuda" or projected.INTERPRETED)


def of_kernel(
    name: str, sizes: tuple[int, int, int, int], precision: str, device: str, tiles: bool, repeats: int
) -> Iterator[dict[str, Any]]:
    """Error and speed of the sums of one layer."""
    n, s, o, i = sizes
    generator = torch.Generator(device).manual_seed(0)
    h, x = (torch.randn(n, 1, d, s, generator=generator, device=device).mT for d in (o, i))  # as the plan projects them
    x = x[..., None]
    exact = kernels.reference(h.double(), x.double())
    low = h.to(PRECISIONS[precision].dtype), x.to(PRECISIONS[precision].dtype)
    operations = 2 * n * s * o * i
    ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"PyTorch": lambda: in_pytorch(*low)}
    if usable(device):
        ways["kernel"] = lambda: kernels.projected_sums(*low)
        for o_, i_, *rest in TILES if tiles else ():
            tile = projected.Tile(o_, i_, projected.ROW_BYTES // low[0].element_size(), *rest)
            ways[f"kernel {tuple(tile)}"] = lambda tile=tile: projected.launch(*low, tile)  # type: ignore[misc]
    with products(precision):
        peak = throughput(PRECISIONS[precision].dtype, device, 64 if max(sizes) < 64 else 8192, repeats)
        for way, call in ways.items():
            row: dict[str, Any] = {"layer": name, "precision": precision, "way": way}
            try:
                total, square = call()
                row |= {"error of the sum": error(total, exact[0]), "error of the square": error(square, exact[1])}
                taken = seconds(recorded(call, device), device, repeats)
                row |= {"ms": 1e3 * taken, "of matmul": operations / taken / peak}
            except Exception as problem:  # too many registers, out of memory: shown in the table
                row["problem"] = type(problem).__name__
            yield row


def recorded(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The same from a CUDA graph, so that what is timed is not the launch."""
    if device != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def in_pytorch(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same sums with every G[n] in memory."""
    G = torch.einsum("nbso,nbsik->nboik", h, x).float()
    return G.sum(0), G.square().sum(0)


def error(found: Tensor, exact: Tensor) -> float:
    """The largest, in units of the largest entry."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


@contextmanager
def products(precision: str) -> Iterator[None]:
    """How exactly float32 is multiplied, inside: by cuDNN too, which takes TF32 unless told not to."""
    before, of_cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(PRECISIONS[precision].products)
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = of_cudnn


def throughput(dtype: torch.dtype, device: str, size: int, repeats: int) -> float:
    """Operations a second of a product of square matrices."""
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: x @ y, device, repeats)


def seconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Median of the means of calls in a row, after a call to warm up and one to see how long it takes."""
    once, again = (_taken(call, device, 1) for _ in range(2))
    in_a_row = max(1, int(LEAST / min(once, again)))  # so that a short call is not its launch
    return median(_taken(call, device, in_a_row) for _ in range(repeats))


def _taken(call: Callable[[], Any], device: str, calls: int) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def of_steps(
    name: str, models: Mapping[str, Any], device: str, compiled: bool, repeats: int
) -> Iterator[dict[str, Any]]:
    """Seconds and memory of one model, in float32 and TF32."""
    for precision in ("float32", "tf32"):
        with products(precision):
            w = work(name, table=models, device=device)
            plain = seconds(lambda w=w: forward_backward(w), device, repeats)  # type: ignore[misc]
            yield {"model": name, "precision": precision, "way": "forward-backward", "ms": 1e3 * plain, "ratio": 1.0}
            for way, call in ways_of(w, compiled).items():
                row: dict[str, Any] = {"model": name, "precision": precision, "way": way}
                try:
                    taken = seconds(call, device, 1 if way == "naive" else repeats)
                    row |= {"ms": 1e3 * taken, "ratio": taken / plain, "MiB": peak(call, device)}
                except Exception as problem:  # a way that does not fit into memory is shown as such
                    row["problem"] = type(problem).__name__
                    if device == "cuda":
                        torch.cuda.empty_cache()
                yield row


def ways_of(w: Work, compiled: bool) -> dict[str, Callable[[], Any]]:
    """One step in a known basis. The identity as a dense matrix costs what any basis does."""
    ekf = ekfac(w.loss_fn, damping=DAMPING, basis_every=10**6, bases=choices(w))
    state = dataclasses.replace(ekf.init(w.params, w.batch), step=1)

    def of(step: Any, kernel: bool = True) -> Callable[[], Any]:
        def call() -> Any:
            with plan(kernel):
                return step(w.params, w.batch, state)

        return call

    ways = {
        "step with the kernel": of(ekf.precondition),
        "step in PyTorch": of(ekf.precondition, kernel=False),
        "naive": lambda: naive(w, state),
    }
    if compiled:
        ways["compiled step"] = of(torch.compile(ekf.precondition, fullgraph=True))
        ways["compiled step, CUDA graphs"] = of(torch.compile(ekf.precondition, fullgraph=True, mode="reduce-overhead"))
    return ways


def choices(w: Work) -> dict[str, Blocks]:
    return {pattern: value for pattern, value in ROWS_ALONE.items() if pattern == "*" or pattern in w.params}


@contextmanager
def plan(kernel: bool) -> Iterator[None]:
    """Whether the plan may choose the kernel, inside."""
    found = projected.FOUND
    projected.FOUND = found and kernel
    try:
        yield
    finally:
        projected.FOUND = found


def peak(call: Callable[[], Any], device: str) -> float | None:
    """MiB of tensors at the peak of a call, beyond those before it; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    found = (torch.cuda.max_memory_allocated() - before) / 2**20
    del kept
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of the same kind, in Markdown."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(x: Any) -> str:
    return "" if x is None else x if isinstance(x, str) else f"{x:.3g}"


if __name__ == "__main__":
    main()
