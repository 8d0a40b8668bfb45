"""The benchmark's own logic, at sizes that take no time."""

import time
from typing import Any

import pytest
import torch

from benchmarks.libraries import LIBRARIES
from benchmarks.measure import Times, interleaved, least_operations, operations_of, peak_allocated
from benchmarks.peers import Measured, tables, value
from benchmarks.workloads import TINY, naive, work
from ekfac_func import per_example_gradients
from ekfac_func.kronecker import dense

from .oracles import close


@pytest.mark.parametrize("name", TINY)
def test_every_call_of_a_workload(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    w = work(name, table=TINY)
    calls = LIBRARIES["ekfac_func"](w)
    assert calls.statistics
    assert calls.moment
    assert calls.precondition
    assert calls.steps
    assert calls.step
    natural, state, _ = calls.step()
    moments = calls.moment()
    found = per_example_gradients(w.loss_fn, w.params, w.batch).captured
    for key, terms in found.terms.items():
        close(moments[key], state.second_moments[key].value, 1e-12)
        close(moments[key], dense(terms).square().mean(0), 1e-9)  # the basis is the identity
    for key, tensor in calls.precondition().items():
        close(tensor, natural[key], 1e-9)
    for key, tensor in naive(w, state).items():
        close(tensor, natural[key], 1e-9)
    assert calls.steps().keys() == w.params.keys()


def test_least_operations() -> None:
    one = least_operations(n=2, b=1, s=1, o=3, i=5, k=1)
    assert one == 2 * 2 * (3 * 3 + 5 * 5 + 3 * 5)  # both projected, then the product of the squares
    many = least_operations(n=2, b=1, s=100, o=3, i=5, k=1)
    assert many == 2 * 2 * (100 * 3 * 5 + 3 * 5 * 5 + 3 * 3 * 5)  # G[n] first
    few = least_operations(n=1, b=1, s=2, o=100, i=100, k=1)
    assert few == 2 * 2 * (100**2 + 100**2) + 2 * 2 * 100 * 100
    w = work("W2", table=TINY)
    terms = per_example_gradients(w.loss_fn, w.params, w.batch).captured.terms
    assert all(operations_of(term) > 0 for of_layer in terms.values() for term in of_layer)


def test_interleaved() -> None:
    called: list[str] = []
    times = interleaved(lambda: called.append("call"), lambda: called.append("base"), seconds=0.0, once=False)
    assert called == ["base", "call"] * 2
    assert len(times.call) == len(times.baseline) == 1
    slow = interleaved(lambda: time.sleep(0.01), lambda: None, seconds=0.0005)
    assert slow.call == [slow.first]


def test_peak_of_the_tensors() -> None:
    def call() -> torch.Tensor:
        x = torch.zeros(2**20, dtype=torch.float32)
        y = x + 1
        del x
        return y + 1

    assert peak_allocated(call) == pytest.approx(8, abs=0.1)


def test_tables() -> None:
    def process(T2: float, plain: float) -> dict[str, Any]:
        return {
            "T1": Times([9.0], [plain, 2 * plain], 50.0)._asdict(),
            "T2": Times([T2, 3 * T2], [2 * plain], 9.0)._asdict(),
            "memory": {"resident": 12.3, "allocated": 12.0},
            "floor": {"T0": 0.1, "operations": 5e9, "throughput": 1e11, "floor": 1.5},
        }

    ours = [process(3.0, 1.0), process(4.0, 2.0), process(3.2, 1.0)]
    assert value(ours[0], "T2") == 3.0  # over the shortest baseline of the process
    found: Measured = {
        "ekfac_func": {"W1": ours},
        "ekfac_func-compiled": {"W1": [{"T2": process(2.0, 1.0)["T2"] | {"of_eager": 0.9}}]},
        "curvlinops": {"W1": [{"error": "ValueError: no"}]},
    }
    text = tables(found)
    assert "| T2 | ekfac_func | 3.00 |" in text
    assert "| T2 | bar | 2.1 |" in text
    assert "| W1 | 100.0 | 5.0 | 100 | 1.50 | 2.00 |" in text
    assert "| W1 | T2 | 0.90 | 9 |" in text
    assert "curvlinops W1: ValueError: no" in text
    assert "| of it in tensors, MiB | ekfac_func | 12.0 |" in text
    assert "T4" not in text
