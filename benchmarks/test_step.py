"""One step by estimator and model, as ratios to plain forward-backward and to the naive reading of the idea.

pytest benchmarks/test_step.py                     eager, a few minutes
pytest benchmarks/test_step.py -m "slow or not slow"   also compiled
"""

import subprocess
import sys
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch

from ekfac_func import intra_batch

from .workloads import ESTIMATORS, SMALL, WORKLOADS, forward_backward, known_basis, naive, work

torch.set_num_threads(2)


def seconds(function: Any, rounds: int, warmup: int = 2) -> float:
    """Median wall time after some calls to warm up."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(rounds):
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return median(times)


@pytest.fixture(scope="module")
def baselines() -> dict[str, dict[str, float]]:
    """Seconds of the two baselines by model, in this process."""
    found = {}
    for name in SMALL:
        w = work(name)
        _, state = known_basis(w, intra_batch)
        found[name] = {
            "forward_backward": seconds(lambda w=w: forward_backward(w), 15),
            "naive": seconds(lambda w=w, state=state: naive(w, state), 1 if name == "mlp" else 3, 0),
        }
    return found


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", SMALL)
def test_step(benchmark: Any, baselines: Any, name: str, estimator: str, mode: str) -> None:
    w = work(name)
    step, state = known_basis(w, ESTIMATORS[estimator])
    precondition = torch.compile(step.precondition, fullgraph=True) if mode == "compiled" else step.precondition
    benchmark.group = name
    benchmark.pedantic(precondition, args=(w.params, w.batch, state), rounds=15, warmup_rounds=2)
    time = benchmark.stats.stats.median
    ratios = {"of_" + key: round(time / base, 3) for key, base in baselines[name].items()}
    benchmark.extra_info.update(ratios)
    print(
        f"\n{name} {estimator} {mode}: {1e3 * time:.1f} ms, "
        f"{ratios['of_forward_backward']:.2f} x forward-backward, 1/{1 / ratios['of_naive']:.0f} of naive"
    )
    if name == "mlp" and estimator == "intra_batch":
        assert time <= baselines[name]["naive"] / 20


def test_same_work_as_naive() -> None:
    """The ratio compares equal results."""
    for name in SMALL:
        w = work(name, 8)
        step, state = known_basis(w, intra_batch)
        found, _, _ = step.precondition(w.params, w.batch, state)
        for key, expected in naive(w, state).items():
            torch.testing.assert_close(found[key], expected, rtol=1e-3, atol=1e-5)


PEAK = """
import sys, torch
from benchmarks.measure import peak_resident
from benchmarks.workloads import *
torch.set_num_threads(2)
kind, name, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
w = work(name, n)
step, state = known_basis(work(name, 2), intra_batch)
calls = {"step": lambda: step.precondition(w.params, w.batch, state), "naive": lambda: naive(w, state),
         "forward_backward": lambda: forward_backward(w)}
print(peak_resident(calls[kind]))
"""


def peak_mib(kind: str, name: str, n: int) -> float:
    """MiB that a call adds at its peak, in a process of its own (Linux)."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK, kind, name, str(n)], capture_output=True, text=True, check=True, timeout=600
    )
    return float(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SMALL)
def test_peak_memory(name: str) -> None:
    n = WORKLOADS[name].n
    for kind in ("forward_backward", "step", "naive"):
        print(f"\n{name} {kind} peak {peak_mib(kind, name, n):.0f} MiB", end="")


def test_memory_does_not_grow_as_n_o_i() -> None:
    """From 256 to 2048 examples the largest layer's n o i would take 7 GiB more."""
    growth = peak_mib("step", "mlp", 2048) - peak_mib("step", "mlp", 256)
    n_o_i = 1792 * 1024 * 1025 * 4 / 2**20
    print(f"\nmlp step, 256 to 2048 examples: {growth:.0f} MiB more; n o i of its largest layer: {n_o_i:.0f} MiB more")
    assert 0 < growth < n_o_i / 20
