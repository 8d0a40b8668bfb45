"""What one process measures of a workload by a library; `peers.py` starts the processes.

python -m benchmarks.measure W1 ekfac_func T1 T2        # one JSON object on the last line
"""

import argparse
import ctypes
import json
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.libraries import LIBRARIES, STEPS, Call
from benchmarks.workloads import TINY, WORKLOADS, Work, forward_backward, work
from ekfac_func import per_example_gradients
from ekfac_func.products import rotate
from ekfac_func.types import Dense, Factored, OneHot, Term

KINDS = {"T1": "statistics", "T2": "moment", "T3": "precondition", "T4": "steps", "step": "step"}

Clock = Callable[[], float]


class Times(NamedTuple):
    """Seconds of one kind of call, each beside one of plain forward-backward."""

    call: list[float]
    baseline: list[float]
    first: float  # the first call, with whatever it compiles


def timed(call: Call, clock: Clock = time.perf_counter) -> float:
    start = clock()
    call()
    return clock() - start


def interleaved(
    call: Call, baseline: Call, seconds: float, clock: Clock = time.perf_counter, once: bool = True
) -> Times:
    """Both in turn, after a call each to warm up, until so many seconds are spent.

    At most 50 times, and at least 3 if no call takes that long.

    once: a first call that took ten times as long is the only one; not where it also compiles.
    """
    timed(baseline, clock)
    first = timed(call, clock)
    times, base = ([first], [timed(baseline, clock)]) if once and first > 10 * seconds else ([], [])
    while not times or sum(times) + sum(base) < seconds or (len(times) < 3 and max(times) < seconds):
        base.append(timed(baseline, clock))
        times.append(timed(call, clock))
        if len(times) == 50:
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
    results = profile.profiler.kineto_results
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


def throughput(clock: Clock, size: int = 2048, seconds: float = 1.0) -> float:
    """Operations a second of a product of square float32 matrices, at the best of several, by the faster library."""
    x, y = torch.randn(size, size), torch.randn(size, size)
    times = interleaved(lambda: rotate(x, y), lambda: None, seconds, clock).call
    return 2 * size**3 / min(times)


def floor(w: Work, seconds: float, clock: Clock) -> dict[str, float]:
    """The least time of T2: plain forward-backward as it is, and the moment's operations at the measured throughput."""
    terms = per_example_gradients(w.loss_fn, w.params, w.batch).captured.terms
    operations = sum(operations_of(term) for of_layer in terms.values() for term in of_layer)
    del terms
    plain = min(interleaved(lambda: forward_backward(w), lambda: None, seconds, clock).call)
    peak = throughput(clock)
    return {"T0": plain, "operations": operations, "throughput": peak, "floor": 1 + operations / peak / plain}


def measured(
    name: str, library: str, kinds: list[str], seconds: float, clock: Clock, tiny: bool = False
) -> dict[str, Any]:
    """Of each kind its times, or the error that the library gave."""
    w = work(name, table=TINY if tiny else WORKLOADS)
    found: dict[str, Any] = {}
    try:
        if "floor" in kinds:
            found["floor"] = floor(w, seconds, clock)
        asked = [kind for kind in kinds if kind != "floor"]
        calls = LIBRARIES[library](w) if asked else None
        for kind in asked:
            call = getattr(calls, KINDS.get(kind, "moment"))
            if call is None:
                continue
            if kind == "memory":
                found[kind] = {"resident": peak_resident(call), "allocated": peak_allocated(call)}
            else:
                times = interleaved(call, lambda: forward_backward(w), seconds, clock, "compiled" not in library)
                steps = STEPS if kind == "T4" else 1
                found[kind] = times._replace(call=[t / steps for t in times.call])._asdict()
                if library == "ekfac_func-compiled":
                    eager = getattr(LIBRARIES["ekfac_func"](w), KINDS[kind])
                    pairs = interleaved(call, eager, 2 * seconds, clock)
                    found[kind]["of_eager"] = min(pairs.call) / min(pairs.baseline)
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
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.busy else time.perf_counter
    found = measured(options.workload, options.library, options.kinds, options.seconds, clock, options.tiny)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
