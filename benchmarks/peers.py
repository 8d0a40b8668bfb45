"""One step and its parts beside other libraries, as ratios to plain forward-backward on the same work.

    python benchmarks/peers.py                                                    # everything, an hour
    python benchmarks/peers.py --workloads W1 W2 --libraries ekfac_func --repeats 3 --only T2
    python benchmarks/peers.py --env /tmp/peers                                   # where the peers are installed

T0 plain forward-backward, T1 statistics of one batch (factors, eigenbasis, exact moment), T2 the exact moment in a
known basis, T3 one gradient preconditioned, T4 a training step with a new basis every 10 (mean of 10); `step` is our
whole call in a known basis, the rescaling included. Memory is what T2 adds at its peak to the resident process, and of
that the tensors.

Every workload, library, repetition and kind (T1 to T4 together, memory) has a process of its own, on two threads. In
it each call is timed in turn with forward-backward; the ratio is that of the shortest times, since other programs
only add time; the table shows the median of the processes. On a machine in other use, `--busy` counts processor time
of both threads in place of wall time: it misses what parallel work gains. Writes runs/peers.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
WORKLOADS = {
    "W1": "MLP 784-1024-1024-10, batch 256",
    "W2": "10-layer CNN on 3x32x32, batch 128",
    "W3": "4-layer GPT, d = 256, T = 128, vocabulary 1000, batch 16",
    "W4": "linear layer 4096x4096, batch 64",
    "W5": "ResNet-18 without BatchNorm on 3x32x32, batch 32",
}
PEERS = {"curvlinops": "curvlinops-for-pytorch", "nngeometry": "nngeometry", "kronfluence": "kronfluence"}
VARIANTS = ["ekfac_func-qr", "ekfac_func-rank", "ekfac_func-thin", "ekfac_func-compact"]  # refresh, bases (r = 256)
LIBRARIES = ["ekfac_func", *VARIANTS, "naive", *PEERS]
TIMED = ["T1", "T2", "T3", "T4", "step"]
KINDS = [*TIMED, "memory", "floor"]
BARS: dict[str, dict[str, float]] = {  # set from what the best of the peers took on two cores: aims, not results
    "T1": {"W1": 20.3, "W2": 5.2, "W3": 6.3, "W4": 93, "W5": 30.6},
    "T2": {"W1": 2.1, "W2": 2.9, "W3": 2.2, "W4": 1.5, "W5": 3.0},
    "T4": {"W1": 6.5, "W2": 3.5, "W3": 2.6, "W4": 28, "W5": 6.0},
    "memory": {"W1": 19, "W2": 250, "W3": 275, "W4": 70, "W5": 240},
}
TORCH = "torch==2.13.0"

Measured = dict[str, dict[str, list[dict[str, Any]]]]  # library -> workload -> what each process found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--libraries", nargs="+", choices=[*LIBRARIES, "ekfac_func-compiled"], default=LIBRARIES)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, of each kind in each process")
    parser.add_argument("--compiled", action="store_true", help="also compiled by inductor, from an empty cache")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="processor time, where other programs use the machine")
    parser.add_argument("--tiny", action="store_true", help="a smoke run on small sizes")
    parser.add_argument("--env", type=Path, default=Path("runs/peers-env"), help="virtual environment of the peers")
    parser.add_argument("--out", type=Path, default=Path("runs/peers.json"))
    options = parser.parse_args()
    libraries = options.libraries + (["ekfac_func-compiled"] if options.compiled else [])
    pythons = {library: environment(options.env) if library in PEERS else sys.executable for library in libraries}
    found: Measured = {library: {name: [] for name in options.workloads} for library in libraries}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for repeat in range(options.repeats):
        for name in options.workloads:
            for library in libraries:
                kinds = [kind for kind in options.only if kind != "floor" or library == "ekfac_func"]
                process: dict[str, Any] = {}
                for group in ([k for k in kinds if k != "memory"], [k for k in kinds if k == "memory"]):
                    if group:
                        process |= run(pythons[library], name, library, group, options)
                found[library][name].append(process)
                print(f"{repeat + 1} {name} {library}: {line(process)}", file=sys.stderr, flush=True)
                options.out.write_text(json.dumps(found, indent=1))
    print(tables(found))
    print(f"\nwrote {options.out}")


def run(python: str, name: str, library: str, kinds: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """What one process finds; its error where it dies."""
    arguments = [name, library, *kinds, "--seconds", str(options.seconds), "--threads", str(options.threads)]
    arguments += [flag for flag, given in (("--busy", options.busy), ("--tiny", options.tiny)) if given]
    with tempfile.TemporaryDirectory() as cache:
        variables = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(options.threads),
            **({"OMP_WAIT_POLICY": "passive"} if options.busy else {}),  # a thread that waits uses no processor time
            "TORCHINDUCTOR_CACHE_DIR": cache,  # compiled from nothing
        }
        done = subprocess.run(
            [python, "-m", "benchmarks.measure", *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=variables,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"error": last[:200]}
    return json.loads(done.stdout.splitlines()[-1])


def environment(folder: Path) -> str:
    """The Python of a virtual environment with the peers, made where there is none."""
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        constraints = folder / "constraints.txt"
        constraints.write_text(TORCH + "\n")
        pip = [str(python), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, TORCH], check=True)  # first and alone: an unpinned one pulls CUDA packages
        subprocess.run([*pip, "-c", str(constraints), *PEERS.values(), "einops", "opt_einsum"], check=True)
    return str(python)


def value(process: dict[str, Any], kind: str) -> float | None:
    """A ratio to forward-backward, or MiB."""
    if kind == "tensors":
        return process["memory"]["allocated"] if "memory" in process else None
    if kind not in process:
        return None
    if kind == "memory":
        return process[kind]["resident"]
    if kind == "floor":
        return process[kind]["floor"]
    plain = min(min(process[kind]["baseline"]) for kind in process if kind in TIMED)
    return min(process[kind]["call"]) / plain


def line(process: dict[str, Any]) -> str:
    """One process in short."""
    parts = [f"{kind} {number(value(process, kind))}" for kind in KINDS if kind in process]
    return "  ".join(parts + ([process["error"]] if "error" in process else []))


def number(x: float | None) -> str:
    return "-" if x is None else f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def median_of(processes: list[dict[str, Any]], kind: str) -> float | None:
    values = [found for process in processes if (found := value(process, kind)) is not None]
    return median(values) if values else None


def tables(found: Measured) -> str:
    """The medians beside the bars, the floors, the compiled steps and the errors."""
    names = list(next(iter(found.values())))
    lines = ["| | library | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for kind in (*TIMED, "memory", "tensors"):
        for library, of in found.items():
            row = [median_of(of[name], kind) for name in names]
            if any(x is not None for x in row):
                lines.append(f"| {label(kind)} | {library} | " + " | ".join(map(number, row)) + " |")
        if kind in BARS and any(kind in p for of in found.values() for ps in of.values() for p in ps):
            lines.append(f"| {label(kind)} | bar | " + " | ".join(str(BARS[kind][name]) for name in names) + " |")
    lines += floors(found.get("ekfac_func", {})) + compiled(found)
    for library, of in found.items():
        for name, processes in of.items():
            errors = {process["error"]: None for process in processes if "error" in process}
            lines += [f"{library} {name}: {error}" for error in errors]
    return "\n".join(lines)


def label(kind: str) -> str:
    return {"memory": "peak memory of T2, MiB", "tensors": "of it in tensors, MiB"}.get(kind, kind)


def floors(of: dict[str, list[dict[str, Any]]]) -> list[str]:
    """T2 beside the least time of its operations."""
    lines = ["", "| | T0, ms | operations, G | matmul, G/s | floor of T2 | T2 / floor |", "|---|---|---|---|---|---|"]
    for name, processes in of.items():
        seen = [process["floor"] for process in processes if "floor" in process]
        if not seen:
            continue
        floor, T2 = median(f["floor"] for f in seen), median_of(processes, "T2")
        plain, peak = 1e3 * median(f["T0"] for f in seen), median(f["throughput"] for f in seen) / 1e9
        ratio = number(None if T2 is None else T2 / floor)
        lines.append(
            f"| {name} | {plain:.1f} | {seen[0]['operations'] / 1e9:.1f} | {peak:.0f} | {floor:.2f} | {ratio} |"
        )
    return lines if len(lines) > 3 else []


def compiled(found: Measured) -> list[str]:
    """Compiled beside eager in one process, and the seconds of the first call."""
    lines = ["", "| | | compiled / eager | first call, s |", "|---|---|---|---|"]
    for name, processes in found.get("ekfac_func-compiled", {}).items():
        for kind in TIMED:
            seen = [process[kind] for process in processes if kind in process]
            if seen:
                ratio, first = (median(times[key] for times in seen) for key in ("of_eager", "first"))
                lines.append(f"| {name} | {kind} | {number(ratio)} | {first:.0f} |")
    return lines if len(lines) > 3 else []


if __name__ == "__main__":
    main()
