"""The logic of `benchmarks/gpu.py` at sizes that take no time, without a GPU."""

from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.workloads import TINY_ON_GPU


def test_the_whole_script() -> None:
    torch.set_default_dtype(torch.float32)
    report: dict[str, list[dict[str, Any]]] = {"kernel": [], "steps": []}
    for part, row in gpu.measured("cpu", True, tiles=False, compiled=False, models=list(TINY_ON_GPU), repeats=1):
        report[part].append(row)
    assert not [row for rows in (report["kernel"], report["steps"]) for row in rows if "problem" in row]
    errors = {row["precision"]: row["error of the square"] for row in report["kernel"]}
    assert errors["float32"] < 1e-5 < errors["bfloat16"] < 3e-2
    ways = [row["way"] for row in report["steps"]]
    assert ways == 2 * 3 * ["forward-backward", "step with the kernel", "step in PyTorch", "naive"]
    assert all(row["ratio"] > 0 for row in report["steps"])
    text = gpu.table(report["steps"])
    assert text.count("\n") == len(ways) + 1
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_way_that_fails_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "naive", out_of_memory)
    rows = list(gpu.of_steps("MLP 4096", TINY_ON_GPU, "cpu", compiled=False, repeats=1))
    assert [row.get("problem") for row in rows if row["way"] == "naive"] == 2 * ["OutOfMemoryError"]
    assert "OutOfMemoryError" in gpu.table(rows)
