"""A smoke run of benchmarks/convergence.py, and its SOAP against closed forms."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import convergence, soap


def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    options = ["--quick", "--task", "tabular", "--out", str(tmp_path), "--optimizer", *convergence.grids("tabular")]
    convergence.main(options)
    table, lines = capsys.readouterr().out, (tmp_path / "convergence.jsonl").read_text()
    assert all(f"| {name} |" in table for name in convergence.grids("tabular"))
    assert (tmp_path / "convergence-tabular.png").stat().st_size > 1000
    runs = [json.loads(line) for line in lines.splitlines()]
    assert len(runs) == 7 * 3 + 2  # two settings and one seed; of the defaults one setting
    assert all(run["points"][-1][0] == 2 and run["points"][-1][2] > 0 for run in runs)

    (tmp_path / "convergence.jsonl").write_text(lines + '{"task": "tab')  # killed while it wrote
    convergence.main(options)
    assert capsys.readouterr().out == table
    assert (tmp_path / "convergence.jsonl").read_text() == lines


def test_soap_is_adam_in_the_eigenbasis_of_the_first_gradient() -> None:
    """The first step of Adam is the sign; in its own singular vectors the diagonal of a gradient is positive."""
    G, g = torch.randn(4, 4), torch.randn(5)
    params = {"w": torch.zeros(4, 4), "b": torch.zeros(5)}
    direction, _ = soap.update({"w": G, "b": g}, soap.init(params), beta=0.9)
    U, _, Vh = torch.linalg.svd(G)
    found = (U.T @ direction["w"] @ Vh.T).diagonal()
    assert torch.allclose(found, torch.ones(4))
    assert torch.allclose(direction["b"], g.sign())


def test_soap_keeps_its_bases_orthonormal_and_descends() -> None:
    target, w = torch.randn(6, 3), torch.zeros(6, 3, requires_grad=True)
    optimizer = soap.Optimizer([w], lr=0.02, beta=0.95, every=5)
    for _ in range(200):
        w.grad = (w - target).detach()
        optimizer.step()
    assert (w - target).norm() < 0.1 * target.norm()
    for side in optimizer.soap.sides["0"]:
        assert torch.allclose(side.Q.T @ side.Q, torch.eye(len(side.Q)), atol=1e-8)
