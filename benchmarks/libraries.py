"""What each library does of the workloads, and how one process measures it; `peers.py` starts the processes.

    python -m benchmarks.libraries W1 ekfac_func T1 T2        # one JSON object on the last line

A library is a function from a `Work` to its `Calls`. All take the empirical Fisher of the mean cross-entropy and
change the same parameters, but those peers that read linear and convolutional layers alone leave out the others.
"""

import argparse
import ctypes
import dataclasses
import json
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.workloads import (
    DAMPING,
    TINY,
    WORKLOADS,
    Work,
    forward_backward,
    naive,
    precondition_gradient,
    work,
)
from ekfac_func import State, ekfac, exact_sums, per_example_gradients
from ekfac_func.types import Dense, Factored, OneHot, Params, Term

STEPS = 10  # from one refresh to the next
LEARNING_RATE = 1e-4

Call = Callable[[], Any]


class Calls(NamedTuple):
    """A library's way of each measurement; None where it has none."""

    statistics: Call | None  # T1: factors, eigenbasis and exact moment of one batch
    moment: Call | None  # T2: the exact moment in a known basis
    precondition: Call | None  # T3: one gradient
    steps: Call | None  # T4: `STEPS` training steps, the first with a new basis
    step: Call | None = None  # a whole call of the library's step in a known basis, where it has one


def ours(w: Work, compiled: bool = False) -> Calls:
    """T1 is the whole of `precondition` on a step with a refresh: its rescaling is counted too.

    T2 is capture and `exact_sums` of every layer, which also give the mean gradient and its projection. The basis is
    the identity as a dense matrix, at which every product costs what it does in any basis.
    """
    ekf = ekfac(w.loss_fn, damping=DAMPING, basis_every=STEPS)
    wrap: Callable[[Any], Any] = (lambda f: torch.compile(f, fullgraph=True)) if compiled else (lambda f: f)
    fresh = ekf.init(w.params, w.batch)
    known = dataclasses.replace(fresh, step=1)
    step = wrap(ekf.precondition)
    found = per_example_gradients(w.loss_fn, w.params, w.batch)
    layers, gradient = found.captured.layers, found.mean()
    del found
    observed: list[State] = []

    def moment(params: Params, batch: Any) -> dict[str, Tensor]:
        terms = per_example_gradients(w.loss_fn, params, batch).captured.terms
        moments = {}
        for name in list(terms):
            square = exact_sums(terms[name], known.bases[name]).square
            assert square is not None
            moments[name] = square / len(batch[0])
        return moments

    def precondition(gradient: Params, state: State) -> Params:
        return precondition_gradient(layers, state, gradient, w.params)

    moment_call, precondition_call = wrap(moment), wrap(precondition)

    def rescale() -> Params:
        if not observed:
            observed.append(ekf.precondition(w.params, w.batch, known)[1])
        return precondition_call(gradient, observed[0])

    def steps() -> Params:
        params, state = w.params, fresh
        for _ in range(STEPS):
            natural, state, _ = step(params, w.batch, state)
            params = {name: p - LEARNING_RATE * natural[name] for name, p in params.items()}
        return params

    return Calls(
        lambda: step(w.params, w.batch, fresh),
        lambda: moment_call(w.params, w.batch),
        rescale,
        steps,
        lambda: step(w.params, w.batch, known),
    )


def naively(w: Work) -> Calls:
    """Every example's gradient in memory, then one einsum into the basis; it rescales too."""
    ekf = ekfac(w.loss_fn, damping=DAMPING)
    state = ekf.init(w.params, w.batch)
    return Calls(None, lambda: naive(w, state), None, None)


LIBRARIES: dict[str, Callable[[Work], Calls]] = {
    "ekfac_func": ours,
    "ekfac_func-compiled": lambda w: ours(w, compiled=True),
    "naive": naively,
}

KINDS = {"T1": "statistics", "T2": "moment", "T3": "precondition", "T4": "steps", "step": "step"}


class Times(NamedTuple):
    """Seconds of one kind of call, each beside one of plain forward-backward."""

    call: list[float]
    baseline: list[float]
    first: float  # the first call, with whatever it compiles


def timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(call: Call, baseline: Call, seconds: float, least: int = 3, most: int = 50) -> Times:
    """Both in turn, after one call each to warm up, until so many seconds are spent; a very slow call once more."""
    timed(baseline)
    first = timed(call)
    times: list[float] = []
    base: list[float] = []
    while not times or sum(times) + sum(base) < seconds or (len(times) < least and max(times) < seconds):
        base.append(timed(baseline))
        times.append(timed(call))
        if len(times) == most:
            break
    return Times(times, base, first)


def resident(key: str) -> float:
    """MiB, of Linux."""
    with open("/proc/self/status") as status:
        found = re.search(key + r":\s+(\d+) kB", status.read())
    assert found is not None
    return int(found[1]) / 1024


def peak_resident(call: Call) -> float:
    """MiB that a call adds at its peak to the process, its libraries' scratch memory included."""
    call()  # what is made once stays out
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls left in the allocator is not free memory
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    kept = call()
    peak = resident("VmHWM") - before
    del kept
    return peak


def peak_allocated(call: Call) -> float:
    """MiB of tensors that live at the peak of a call, beyond those before it."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        kept = call()
    del kept
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    live, peak = 0, 0
    for _, size in events:
        live += size
        peak = max(peak, live)
    return peak / 2**20


def least_operations(n: int, b: int, s: int, o: int, i: int, k: int) -> int:
    """Of the moment alone, by the cheapest of the orders: each side of the basis before or after G[n], or pairs."""
    early = {"A": 2 * n * b * s * i * i * k * (i > 1), "B": 2 * n * b * s * o * o * (o > 1)}
    late = {"A": 2 * n * b * o * i * i * k * (i > 1), "B": 2 * n * b * o * o * i * k * (o > 1)}
    form = 2 * n * b * s * o * i * k
    pairs = n * b * s * (s + 1) * o * i * k
    either = sum(min(early[side], late[side]) for side in "AB")
    return min(either + form, sum(early.values()) + pairs)


def operations_of(term: Term) -> int:
    match term:
        case Factored(a, g):
            n, b, s, i, k = a.shape
            return least_operations(n, b, s, g.shape[3], i, k)
        case OneHot(_, _, g):
            n, s, i = g.shape
            return 2 * n * s * i * (i + 1)
        case Dense(G):
            n, b, o, i, k = G.shape
            return 2 * n * b * o * i * k * (o * (o > 1) + i * (i > 1) + 1)


def throughput(size: int = 2048, seconds: float = 1.0) -> float:
    """Operations a second of a product of square float32 matrices, at the best of several."""
    x, y = torch.randn(size, size), torch.randn(size, size)
    times = interleaved(lambda: x @ y, lambda: None, seconds).call
    return 2 * size**3 / min(times)


def floor(w: Work, seconds: float) -> dict[str, float]:
    """The least time of T2: plain forward-backward as it is, and the moment's operations at the measured throughput."""
    terms = per_example_gradients(w.loss_fn, w.params, w.batch).captured.terms
    operations = sum(operations_of(term) for of_layer in terms.values() for term in of_layer)
    del terms
    plain = min(interleaved(lambda: forward_backward(w), lambda: None, seconds).call)
    peak = throughput()
    return {"T0": plain, "operations": operations, "throughput": peak, "floor": 1 + operations / peak / plain}


def measured(name: str, library: str, kinds: list[str], seconds: float, tiny: bool = False) -> dict[str, Any]:
    """Of each kind its times, or the error that the library gave."""
    w = work(name, table=TINY if tiny else WORKLOADS)
    found: dict[str, Any] = {}
    try:
        if "floor" in kinds:
            found["floor"] = floor(w, seconds)
        asked = [kind for kind in kinds if kind != "floor"]
        calls = LIBRARIES[library](w) if asked else None
        for kind in asked:
            call = getattr(calls, KINDS.get(kind, "moment"))
            if call is None:
                continue
            if kind == "memory":
                found[kind] = {"resident": peak_resident(call), "allocated": peak_allocated(call)}
            else:
                times = interleaved(call, lambda: forward_backward(w), seconds)
                steps = STEPS if kind == "T4" else 1
                found[kind] = times._replace(call=[t / steps for t in times.call])._asdict()
    except Exception as error:  # shown in the table
        found["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=TINY)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("kinds", nargs="+", choices=[*KINDS, "memory", "floor"])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(measured(options.workload, options.library, options.kinds, options.seconds, options.tiny)))


if __name__ == "__main__":
    main()
