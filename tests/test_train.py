"""The command `python -m ekfac_func train`, run as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from ekfac_func.__main__ import main
from ekfac_func.train.run import heavy_ball
from ekfac_func.train.settings import SECOND_MOMENTS

Losses = dict[str, list[float]]


def run(*program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *program],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def train(*options: str, out: Path) -> subprocess.CompletedProcess[str]:
    return run("-W", "error", "-m", "ekfac_func", "train", *options, "--out", str(out))


def losses(output: str) -> Losses:
    """Training losses of each optimizer in the printed table."""
    found: Losses = {}
    for name, loss in re.findall(r"^(EKFAC|SGD|AdamW) +\d+ +[\d.]+ +(\S+)", output, re.MULTILINE):
        found.setdefault(name, []).append(float(loss))
    return found


@pytest.mark.parametrize("model", ["mlp", "cnn", "autoencoder"])
def test_trains_prints_and_plots(model: str, tmp_path: Path) -> None:
    done = train("--model", model, "--steps", "30", out=tmp_path / "new")
    assert done.returncode == 0, done.stderr
    table = losses(done.stdout)
    assert list(table) == ["EKFAC", "SGD", "AdamW"]
    for values in table.values():
        assert values[0] == table["EKFAC"][0]  # one start
        assert values[-1] < values[0]
    assert "test loss" in done.stdout
    assert ("%" in done.stdout) == (model != "autoencoder")
    assert "step/s, loss=" in done.stderr
    image = imread(tmp_path / "new" / f"digits-{model}.png")
    assert image.shape[0] > 200
    assert image.shape[1] > 400
    assert image[..., :3].std() > 0.01


def test_the_seed_decides_the_losses(tmp_path: Path) -> None:
    options = ("--model", "mlp", "--steps", "6", "--seed")
    first, again = (losses(train(*options, "3", out=tmp_path).stdout) for _ in range(2))
    other = losses(train(*options, "4", out=tmp_path).stdout)
    assert first
    assert first == again
    assert first["EKFAC"] != other["EKFAC"]


def test_every_second_moment_trains_and_divergence_is_reported(tmp_path: Path) -> None:
    code = f"""
from ekfac_func.__main__ import main
for name in {SECOND_MOMENTS[1:]}:
    options = ["--model", "mlp", "--steps", "20", "--sgd-lr", "1e30", "--out", {str(tmp_path)!r}]
    main(["train", *options, "--second-moment", name])
    print("====")
"""
    done = run("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    for part in done.stdout.split("====")[: len(SECOND_MOMENTS) - 1]:
        assert losses(part)["EKFAC"][-1] < losses(part)["EKFAC"][0]
        assert "SGD stopped: its loss is not finite" in part


@pytest.mark.parametrize(
    ("options", "named", "remedy"),
    [
        (["--damping", "-1"], "--damping", "give a number greater than 0"),
        (["--lr", "fast"], "--lr", "give a number greater than 0"),
        (["--momentum", "1"], "--momentum", "from 0 up to"),
        (["--steps", "2.5"], "--steps", "give a whole number"),
        (["--data", "faces"], "--data", "digits"),
        (["--decay", "0.9"], "--decay", "leave --decay out"),
        (["--batch-size", "5000"], "--batch-size", "1438"),
        (["--device", "abacus"], "--device", "give cpu"),
    ],
)
def test_a_bad_option_is_named_with_its_remedy(
    options: list[str], named: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *options, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert f"argument {named}: " in message
    assert remedy in message


def test_an_out_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--out", str(path)])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "argument --out: " in message
    assert "give a directory" in message


def test_a_missing_package_is_named_with_its_extra() -> None:
    done = run("-c", "import sys; sys.modules['sklearn'] = None; from ekfac_func.__main__ import main; main(['train'])")
    assert done.returncode == 1
    assert done.stderr.strip() == 'train needs sklearn, which is not installed: pip install "ekfac_func[train]"'


def test_heavy_ball() -> None:
    velocity, direction = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([10.0, 20.0])}
    assert torch.equal(heavy_ball(velocity, direction, 0.5)["w"], torch.tensor([10.5, 21.0]))
    assert torch.equal(velocity["w"], torch.tensor([1.0, 2.0]))
