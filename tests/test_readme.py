"""The README's code runs as it stands, block after block, and its order of reading is that of the imports."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ekfac_func import ekfac, intra_batch, per_example_gradients

from .oracles import close, loop

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the README's Python blocks define."""
    for package in ("transformers", "lightning"):
        pytest.importorskip(package)
    torch.set_default_dtype(torch.float32)
    defined: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
            patch.setenv(name, value)  # as torchrun does
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
            exec(compile(block, "README.md", "exec"), defined)
    return defined


def test_every_block_runs(names: dict[str, Any]) -> None:
    assert names["naturals"]["0.weight"].shape == (3, 32, 64)
    assert not names["info"].skipped
    assert names["natural"].keys() == names["params"].keys()


def test_the_dense_truth(names: dict[str, Any]) -> None:
    assert names["F_dense"].matrices["2.weight"].shape == (1, 330, 330)
    assert names["truth"].keys() == names["params"].keys()
    blocks = names["ekfac_func"].fisher_blocks(names["loss_fn"], names["double"], names["small"], fisher=names["exact"])
    for name, block in blocks.matrices.items():
        close(names["gauss_newton"].matrices[name], block, 1e-9)


def test_the_rule(names: dict[str, Any]) -> None:
    def loss_fn(params: Any, x: Any) -> Any:
        return names["square_linear"](x, params["w"]).cos().sum()

    params, batch = {"w": torch.randn(3, 4)}, torch.randn(6, 5, 4)
    found = per_example_gradients(loss_fn, params, batch, rules=names["rules"])
    assert found.captured.layers["w"].rule == "square_linear"
    close(found.dense("w"), loop(loss_fn, params, batch)[1]["w"])
    step = ekfac(loss_fn, damping=1e-2, rules=names["rules"])
    state = step.init(params, batch, check=True)
    compiled = torch.compile(step.precondition, fullgraph=True, backend="aot_eager")
    close(compiled(params, batch, state)[0]["w"], step.precondition(params, batch, state)[0]["w"], 1e-8)


def test_the_mean_over_the_tokens_of_a_batch(names: dict[str, Any]) -> None:
    x, y, mask, _ = (t.double() if t.is_floating_point() else t for t in names["tokens"])
    net = names["net"].double()
    leaves = {name: p.detach().double().requires_grad_() for name, p in names["params"].items()}
    losses = torch.nn.functional.cross_entropy(
        torch.func.functional_call(net, leaves, (x.flatten(0, 1),)), y.flatten(), reduction="none"
    )
    expected = torch.autograd.grad((losses * mask.flatten()).sum() / mask.sum(), list(leaves.values()))
    step, params = names["sentences"], {name: p.detach() for name, p in leaves.items()}
    batch = tuple(t.double() if t.is_floating_point() else t for t in names["tokens"])
    _, _, info = step.precondition(params, batch, step.init(params, batch))
    for name, gradient in zip(leaves, expected, strict=True):
        close(info.gradient[name], gradient, 1e-7)


def test_the_estimator(names: dict[str, Any]) -> None:
    """It is the exact moment halfway to its mean."""
    params, batch = {"w": torch.randn(4, 3)}, torch.randn(6, 3)
    moments = []
    for estimator in (intra_batch, names["shrunk"]):
        step = ekfac(lambda p, x: (p["w"] @ x).cos().sum(), damping=1e-2, second_moment=estimator)
        _, state, _ = step.precondition(params, batch, step.init(params, batch))
        moments.append(state.second_moments["w"].value)
    close(moments[1], (moments[0] + moments[0].mean()) / 2)


def test_the_loops_of_frameworks(names: dict[str, Any]) -> None:
    assert torch.isfinite(names["mean_loss"])
    assert names["plain"].ekfac_state.step == 8
    losses = names["language_losses"]
    assert losses[-1] < 0.8 * losses[0]
    assert names["trainer"].global_step == 8
    assert torch.isfinite(names["trainer"].callback_metrics["loss"])
    assert names["lit"].optimizers().optimizer.ekfac_state.step == 8


def test_the_order_of_reading_is_that_of_the_imports() -> None:
    package = Path(__file__).parents[1] / "ekfac_func"
    order = re.findall(r"`(\w+)`", README.split("Reading order is")[1].split("##")[0])
    assert {file.stem for file in package.glob("*.py")} <= {*order, "__init__", "__main__"}
    for at, name in enumerate(order):
        files = [package / f"{name}.py", *(package / name).rglob("*.py")]
        for file in filter(Path.exists, files):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == len(file.relative_to(package).parts):
                    used = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
                    assert set(used) <= set(order[:at]), (file, used)
