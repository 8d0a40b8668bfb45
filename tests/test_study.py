"""The command `python -m ekfac_func study`, in a process of its own too, and its page in a real browser."""

import csv
import html
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from matplotlib.image import imread

from ekfac_func import Record
from ekfac_func.__main__ import main
from ekfac_func.train.data import ALPHABET, LENGTH, load
from ekfac_func.train.models import make

PICTURES = ("error_by_layer", "eigenvalues", "batch_size", "refresh", "step_quality")
SMALL = ("--model", "mlp", "--examples", "96", "--batch-size", "32", "--stages", "0", "3", "--seed", "7")


def study(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "ekfac_func", "study", *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    done = study(*SMALL, "--estimators", "intra_batch", "kfac", "running 0.9", "exact", "--out", str(path))
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with (path / "records.csv").open() as file:
        return list(csv.DictReader(file))


def test_records(out: Path) -> None:
    found = rows(out)
    assert list(found[0]) == ["part", "stage", *Record._fields]
    main_part = [row for row in found if row["part"] == "batches"]
    assert {row["stage"] for row in main_part} == {"0", "3"}
    assert {row["estimator"] for row in main_part} == {"intra_batch", "kfac", "running 0.9", "exact"}
    assert len(main_part) == 2 * 4 * 3 * 4  # stages, estimators, batches, layers and the whole
    assert all(math.isfinite(float(row["fisher_error"])) for row in found)
    sizes = {row["examples"] for row in found if row["part"] == "batch size"}
    assert sizes == {"16", "96"}
    refreshed = [row for row in found if row["part"] == "refresh"]
    assert {row["since_refresh"] for row in refreshed} == {"0", "1", "2", "3"}
    assert {"reset", "keep", "transport"} < {row["estimator"] for row in refreshed}


def test_the_theorem_holds_on_all_the_data(out: Path) -> None:
    """||F - EKFAC|| <= ||F - K-FAC|| in one basis, on every layer at every stage."""
    errors = {
        (row["stage"], row["layer"], row["estimator"]): float(row["fisher_error"])
        for row in rows(out)
        if row["part"] == "all data"
    }
    pairs = [(e, errors[stage, layer, "kfac"]) for (stage, layer, name), e in errors.items() if name == "intra_batch"]
    assert len(pairs) == 8
    assert all(exact <= product * (1 + 1e-9) for exact, product in pairs)
    assert "nearer or equal on 6 of 6 pairs" in (out / "report.html").read_text()


def test_pictures(out: Path) -> None:
    for name in PICTURES:
        image = imread(out / f"{name}.png")
        assert min(image.shape[:2]) > 200
        assert image[..., :3].std() > 0.01


@pytest.mark.slow
def test_the_command_on_the_page_repeats_the_study(out: Path, tmp_path: Path) -> None:
    page = (out / "report.html").read_text()
    found = re.search(r"<code id='command'>(.*?)</code>", page)
    assert found is not None
    words = shlex.split(html.unescape(found.group(1)))
    assert words[:4] == ["python", "-m", "ekfac_func", "study"]
    assert "Seed 7." in page
    done = study(*words[4:-1], str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "records.csv").read_text() == (out / "records.csv").read_text()


PROBE = """
<script>
const errors = [];
window.onerror = (message) => { errors.push(message); };
window.addEventListener("load", () => {
  const pictures = [...document.images].filter((i) => i.naturalWidth > 200).length;
  const told = {errors, pictures, tables: 0, wrong: []};
  for (const table of document.querySelectorAll("table")) {
    told.tables += 1;
    for (const th of table.querySelectorAll("th")) for (const sign of [1, -1]) {
      th.click();
      const cells = [...table.tBodies[0].rows].map((row) => row.cells[th.cellIndex]);
      const values = cells.map((c) => c.dataset.value === undefined ? c.textContent : Number(c.dataset.value));
      for (let k = 1; k < values.length; k++)
        if (sign > 0 ? values[k - 1] > values[k] : values[k - 1] < values[k]) told.wrong.push(th.textContent);
    }
  }
  const pre = document.createElement("pre");
  pre.id = "told";
  pre.textContent = JSON.stringify(told);
  document.body.append(pre);
});
</script>
"""


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for found in map(shutil.which, names) if found), None)


@pytest.mark.skipif(browser() is None, reason="no chromium or chrome on the PATH: apt-get install chromium")
def test_the_page_in_a_browser(out: Path, tmp_path: Path) -> None:
    page = (out / "report.html").read_text()
    assert "http" not in re.sub(r"base64,[^']*", "", page)  # nothing is fetched
    (tmp_path / "probed.html").write_text(page.replace("<head>", "<head>" + PROBE))
    program = browser()
    assert program is not None
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    done = subprocess.run(
        [program, *options, "--virtual-time-budget=20000", "--dump-dom", (tmp_path / "probed.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout)
    assert found is not None, done.stderr
    told = json.loads(html.unescape(found.group(1)))
    assert told["errors"] == []
    assert told["pictures"] == len(PICTURES)
    assert told["tables"] == 2 * 2 + 4
    assert told["wrong"] == []


@pytest.mark.parametrize("model", ["cnn", pytest.param("autoencoder", marks=pytest.mark.slow)])
def test_other_models_from_saved_parameters(model: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    net = make(model, load("digits", 0).train[0], 3).net
    torch.save(net.state_dict(), tmp_path / "net.pt")
    main([
        "study", "--model", model, "--examples", "32", "--batch-size", "16", "--stages", "0",
        "--load", str(tmp_path / "net.pt"), "--estimators", "intra_batch", "kfac", "sampled",
        "--out", str(tmp_path / "new"),
    ])  # fmt: skip
    assert {row["stage"] for row in rows(tmp_path / "new")} == {"0"}
    assert "--load" in (tmp_path / "new" / "report.html").read_text()


@pytest.mark.slow
def test_a_transformer_on_text(tmp_path: Path) -> None:
    main([
        "study", "--model", "transformer", "--data", "text", "--examples", "24", "--batch-size", "12", "--stages", "0",
        "--estimators", "intra_batch", "kfac", "sampled", "--step-sizes", "--stride", "2", "--refresh-batch", "8",
        "--out", str(tmp_path),
    ])  # fmt: skip
    found = rows(tmp_path)
    assert {row["examples"] for row in found if row["part"] == "refresh"} == {"8"}
    assert {row["decrease"] for row in found} == {"0.0"}
    assert "--step-sizes --stride 2" in (tmp_path / "report.html").read_text()
    names = {row["layer"] for row in found}
    assert {"characters.weight", "blocks.0.qkv.weight", "blocks.1.down.weight", "norm.weight", "head.weight"} < names


def test_text_is_that_of_the_help_topics() -> None:
    ids, following = load("text", 0).train
    assert ids.shape == following.shape
    assert ids.shape[1] == LENGTH
    assert torch.equal(ids[:, 1:], following[:, :-1])
    pieces = ["".join(ALPHABET[k] for k in row) for row in ids[:50].tolist()]
    text = "".join(c if c in ALPHABET else "?" for topic in topics.values() for c in topic)
    assert sum(piece in text for piece in pieces) > 45  # all but those across two topics


@pytest.mark.parametrize(
    ("options", "named", "remedy"),
    [
        (["--damping", "-1"], "--damping", "give a number greater than 0"),
        (["--stages", "5", "0"], "--stages", "give each number once, in turn"),
        (["--estimators", "best"], "--estimators", "intra_batch"),
        (["--examples", "5000"], "--examples", "1438"),
        (["--batch-size", "300"], "--batch-size", "two batches"),
        (["--examples", "65", "--batch-size", "16"], "--batch-size", "the estimator split cannot halve"),
        (["--data", "text"], "--data", "give text with transformer"),
        (["--load", "nowhere.pt"], "--load", "torch.save"),
        (["--load", __file__], "--load", "no parameters of cnn on digits"),
    ],
)
def test_a_bad_option_is_named_with_its_remedy(
    options: list[str], named: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["study", *options, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert f"argument {named}: " in message
    assert remedy in message
