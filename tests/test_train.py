"""The command `python -m ekfac_func train`, in a process of its own where that matters."""

import copy
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch.utils import _pytree as pytree

from ekfac_func import averaged_intra_batch
from ekfac_func.__main__ import main
from ekfac_func.optim import momentum
from ekfac_func.train import checkpoint, data, models, report, run
from ekfac_func.train.settings import SECOND_MOMENTS

Losses = dict[str, list[float]]


def train(*options: str, out: Path) -> None:
    torch.set_default_dtype(torch.float32)
    main(["train", *options, "--out", str(out)])


def losses(output: str) -> Losses:
    """Training losses of each optimizer in the printed table."""
    found: Losses = {}
    for name, loss in re.findall(r"^(EKFAC|SGD|AdamW) +\d+ +[\d.]+ +(\S+)", output, re.MULTILINE):
        found.setdefault(name, []).append(float(loss))
    return found


@pytest.mark.parametrize("model", ["mlp", "cnn", "autoencoder"])
def test_trains_prints_and_plots(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("--model", model, "--steps", "30", out=tmp_path / "new")
    output, bars = capsys.readouterr()
    table = losses(output)
    assert list(table) == ["EKFAC", "SGD", "AdamW"]
    for values in table.values():
        assert values[0] == table["EKFAC"][0]  # one start
        assert values[-1] < values[0]
    assert "test loss" in output
    assert ("%" in output) == (model != "autoencoder")
    assert "step/s, loss=" in bars
    image = imread(tmp_path / "new" / f"digits-{model}.png")
    assert image.shape[0] > 200
    assert image.shape[1] > 400
    assert image[..., :3].std() > 0.01


def test_the_seed_decides_the_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for seed in ("3", "3", "4"):
        train("--model", "mlp", "--steps", "6", "--seed", seed, out=tmp_path)
        found.append(losses(capsys.readouterr().out))
    first, again, other = found
    assert first
    assert first == again
    assert first["EKFAC"] != other["EKFAC"]


@pytest.mark.parametrize("name", list(SECOND_MOMENTS)[1:])
def test_every_second_moment_trains_and_divergence_is_reported(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", "mlp", "--steps", "20", "--sgd-lr", "1e30")
    train(*options, "--second-moment", name, out=tmp_path)
    output = capsys.readouterr().out
    assert losses(output)["EKFAC"][-1] < losses(output)["EKFAC"][0]
    assert f"exponent {-1 if name == 'kfac' else -0.5}" in output
    assert "SGD stopped: its loss is not finite" in output


@pytest.mark.parametrize(
    ("options", "named", "remedy"),
    [
        (["--damping", "-1"], "--damping", "give a number greater than 0"),
        (["--exponent", "1"], "--exponent", "give a number less than 0"),
        (["--lr", "fast"], "--lr", "give a number greater than 0"),
        (["--momentum", "1"], "--momentum", "from 0 up to"),
        (["--steps", "2.5"], "--steps", "give a whole number"),
        (["--data", "faces"], "--data", "digits"),
        (["--decay", "0.9"], "--decay", "leave --decay out"),
        (["--batch-size", "5000"], "--batch-size", "1438"),
        (["--device", "abacus"], "--device", "give cpu"),
        (["--device", "meta"], "--device", "give cpu"),
        (["--seed", str(2**64)], "--seed", "64 bits"),
        (["--out", __file__], "--out", "give a directory that can be written"),
        pytest.param(
            *(["--out", "/proc"], "--out", "give a directory that can be written"),
            marks=pytest.mark.skipif(not Path("/proc").is_dir(), reason="a directory in which nobody makes a file"),
        ),
    ],
)
def test_a_bad_option_is_named_with_its_remedy(
    options: list[str], named: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--out", str(tmp_path), *options])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert f"argument {named}: " in message
    assert remedy in message


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "digits-mlp.checkpoint.pt"
    other = io.BytesIO()
    torch.save(torch.ones(2), other)
    broken = bytearray(other.getvalue())
    broken[broken.index(torch.ones(2).numpy().tobytes()) + 3] ^= 0x80  # the sign of a number
    unfinished = io.BytesIO()
    torch.save({"about": {}}, unfinished)
    for content in (b"", b"half", b"PK\x03\x04", other.getvalue(), bytes(broken), unfinished.getvalue()):
        path.write_bytes(content)
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--model", "mlp", "--out", str(tmp_path)])
        assert stopped.value.code == 2
        assert f"{path} is no checkpoint" in capsys.readouterr().err


def test_ctrl_c_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, seed: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", load)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--out", str(tmp_path)])
    assert stopped.value.code == 130


def test_a_missing_package_is_named_with_its_extra() -> None:
    program = "import sys; sys.modules['sklearn'] = None; from ekfac_func.__main__ import main; main(['train'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.strip() == 'train needs sklearn, which is not installed: pip install "ekfac_func[train]"'


def interrupted(number: int, row: str, out: Path, *options: str) -> subprocess.Popen[str]:
    """A training that got the signal after that row of its metrics."""
    program = [sys.executable, "-W", "error", "-m", "ekfac_func", "train", *options, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=out.parent
    )
    metrics = out / "digits-mlp-metrics.csv"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and row in metrics.read_text()):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(number)
    return running


def test_goes_on_after_a_kill_and_after_ctrl_c(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed, resumed, stopped by Ctrl-C, resumed: the metrics are those of one go, byte for byte."""
    options = ("--model", "mlp", "--steps", "42", "--checkpoint-every", "7", "--metrics-every", "4")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*options, out=whole)
    done = losses(capsys.readouterr().out)
    expected = (whole / "digits-mlp-metrics.csv").read_bytes()
    assert expected.count(b"refresh") == 42 // 4
    assert not (whole / "digits-mlp.checkpoint.pt").exists()

    killed = interrupted(signal.SIGKILL, "SGD,20,loss", parts, *options)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    saved = checkpoint.read(parts / "digits-mlp.checkpoint.pt")
    assert saved is not None
    assert saved["training"] == "SGD"
    (parts / "digits-mlp.checkpoint.pt.part").write_bytes(b"half")  # of a write that was killed
    with (parts / "digits-mlp-metrics.csv").open("a") as file:
        file.write("SGD,99,lo")

    stopped = interrupted(signal.SIGINT, "AdamW,12,loss", parts, *options)
    output, errors = stopped.communicate()
    assert stopped.returncode == 130, errors
    assert "by the same command" in output
    assert "Traceback" not in errors

    with pytest.raises(SystemExit, match="2"):
        train(*options, "--lr", "0.02", out=parts)
    assert "with lr 0.01, here it is 0.02: give that, --restart" in capsys.readouterr().err

    train(*options, out=parts)
    assert losses(capsys.readouterr().out) == done
    assert (parts / "digits-mlp-metrics.csv").read_bytes() == expected
    assert imread(parts / "digits-mlp-metrics.png").std() > 0.01


def test_a_checkpoint_stays_until_all_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But not beside the metrics of another training."""
    program = ("--model", "mlp", "--steps", "6", "--metrics-every", "1")
    saved, metrics = tmp_path / "digits-mlp.checkpoint.pt", tmp_path / "digits-mlp-metrics.csv"

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    runs = []
    with monkeypatch.context() as killed:
        killed.setattr(report, "plot", interrupt)
        for _ in range(2):
            with pytest.raises(SystemExit, match="130"):
                train(*program, "--checkpoint-every", "6", out=tmp_path)
            runs.append((metrics.read_bytes(), "EKFAC" in capsys.readouterr().err))
    expected, _ = runs[0]
    assert runs == [(expected, True), (expected, False)]  # no bar of it: its steps are done

    with monkeypatch.context() as killed:
        killed.setattr(torch.optim, "SGD", None)  # after the steps of EKFAC, before a checkpoint
        with pytest.raises(TypeError):
            train(*program, "--lr", "0.5", "--restart", out=tmp_path)
    assert not saved.exists()
    train(*program, "--checkpoint-every", "6", out=tmp_path)
    assert metrics.read_bytes() == expected
    assert not saved.exists()


def test_a_training_that_diverged_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", "mlp", "--steps", "6", "--sgd-lr", "1e30", "--checkpoint-every", "1")
    train(*options, out=tmp_path / "whole")
    expected = capsys.readouterr().out
    with monkeypatch.context() as killed:
        killed.setattr(torch.optim, "AdamW", None)  # after the end of SGD
        with pytest.raises(TypeError):
            train(*options, out=tmp_path / "parts")
    capsys.readouterr()
    train(*options, out=tmp_path / "parts")
    resumed = capsys.readouterr().out
    assert str(losses(resumed)) == str(losses(expected))  # with NaN in it
    found, whole = ((tmp_path / part / "digits-mlp-metrics.csv").read_text() for part in ("parts", "whole"))
    assert found == whole


def test_ekfac_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Between two refreshes, with momentum: parameters, velocity and state have the bits of an uninterrupted run."""
    torch.set_default_dtype(torch.float32)
    loaded = data.load("digits", 0)
    task = models.make("mlp", loaded.train[0], 0)

    def trainer() -> run.NaturalGradient:
        return run.NaturalGradient(
            task,
            momentum(0.9),
            lr=0.1,
            damping=0.3,
            exponent=-1.0,
            basis_every=4,
            second_moment=averaged_intra_batch(0.9),
        )

    whole, before, after = trainer(), trainer(), trainer()
    for batch in run.batches(loaded.train, 500, 9, 1):
        whole.step(batch)
    for batch in run.batches(loaded.train, 500, 6, 1):
        before.step(batch)
    checkpoint.write(tmp_path / "file", before.state_dict())
    saved = checkpoint.read(tmp_path / "file")
    assert saved is not None
    after.load_state_dict(saved)
    for batch in run.batches(loaded.train, 500, 9, 1, start=6):
        after.step(batch)
    found, expected = (pytree.tree_leaves(t.state_dict()) for t in (after, whole))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_the_points_are_those_of_a_plain_loop() -> None:
    """Of all training and all test examples, after steps on batches of one size."""
    torch.set_default_dtype(torch.float32)
    loaded = data.load("digits", 0)
    task = models.make("mlp", loaded.train[0], 0)
    net = copy.deepcopy(task.net)
    trainer = run.TorchOptimizer(task, lambda p: torch.optim.SGD(p, lr=0.1))
    given = list(run.batches(loaded.train, 400, 5, 1))
    found = run.record("SGD", trainer, iter(given), 5, task, loaded, None, lambda now, loss: None)
    assert [point.step for point in found.points] == [0, 1, 2, 3, 4, 5]
    for (step, _, *seen), (x, y) in zip(found.points, [*given, given[0]], strict=True):
        assert len(x) == 400, step
        on_train, on_test = (F.cross_entropy(net(images), labels).item() for images, labels in loaded)
        right = (net(loaded.test[0]).argmax(1) == loaded.test[1]).double().mean().item()
        assert seen == pytest.approx([on_train, on_test, right], rel=1e-4)
        slopes = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
        with torch.no_grad():
            for p, slope in zip(net.parameters(), slopes, strict=True):
                p.sub_(0.1 * slope)


def test_a_checkpoint_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    assert checkpoint.read(path) is None
    checkpoint.write(path, {"x": torch.ones(3)})

    def half(tree: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("killed")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="killed"):
        checkpoint.write(path, {"x": torch.zeros(3)})
    saved = checkpoint.read(path)
    assert saved is not None
    assert torch.equal(saved["x"], torch.ones(3))


def test_a_picture_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(figure: object, file: BinaryIO, **options: object) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "plot.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(KeyboardInterrupt):
        report.plot({"SGD": [run.Point(0, 0.0, 1.0, 1.0, None)]}, "title", path)
    assert path.read_bytes() == b"old"
