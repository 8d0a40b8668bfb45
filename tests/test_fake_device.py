"""What a step does on an accelerator that no machine need have: on tensors without values, from which nothing is read.

Nothing comes back to the CPU, and a graph holds no tensor of it, as CUDA graphs ask. Each test is a process of its own,
`python -m tests.test_fake_device some|steps|graphs`, for a device stays registered.
"""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.workloads import TINY, work
from ekfac_func import averaged_intra_batch, ekfac, qr
from ekfac_func.optim import metrics

from .cases import CASES, N, made_on, make
from .test_compile import IN_FULL, TRACED
from .test_cuda import training

DEVICE = "absent"
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
AVERAGED: dict[str, Any] = {"second_moment": averaged_intra_batch(0.9), "factor_decay": 0.9}
WITHOUT = ("attention", "filled", "dot")  # torch asks an accelerator for a kernel of these, or reads `dims` from it
READS = {"script": "aten._to_copy", "messages": "aten.new_empty_strided"}  # their own constants


@pytest.mark.parametrize(
    "kind", ["some", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("steps", "graphs"))]
)
def test_nothing_is_read_from_a_device(kind: str) -> None:
    command = [sys.executable, "-m", "tests.test_fake_device", kind]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["0 of them"], done.stdout + done.stderr[-3000:]
    assert done.returncode == 0


def register() -> None:
    from torch.utils import backend_registration

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend(DEVICE, Module())


def moved(tree: Any) -> Any:
    made: dict[Tensor, Tensor] = {}  # what is one tensor stays one
    with FAKE:
        return pytree.tree_map_only(Tensor, lambda t: made.setdefault(t, _like(t)), tree)


def _like(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE)


class Left(TorchDispatchMode):
    """Which functions took a tensor off the device."""

    def __init__(self) -> None:
        super().__init__()
        self.by: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if DEVICE in devices((args, kwargs)) and "cpu" in devices(found):
            self.by.add(str(func))
        return found


def devices(tree: Any) -> set[str]:
    return {t.device.type for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)}


def steps(names: Iterable[str] = CASES) -> Iterator[str]:
    """What is read in a step of each case, in a known basis, with its metrics."""
    torch.set_default_dtype(torch.float64)
    for name in names:
        if name.startswith(WITHOUT):
            continue
        case, twin = make(name), make(name)
        on_device(twin.loss_fn)
        losses = case.loss_fn, made_on(DEVICE, twin.loss_fn)
        here, there = (ekfac(loss_fn, damping=1e-2, basis_every=10, **AVERAGED) for loss_fn in losses)
        batch = case.batch(N)
        _, state, _ = here.precondition(case.params, batch, here.init(case.params, batch))
        given = moved((twin.params, batch, state))
        with FAKE:
            with Left():  # the layers are found, once
                there.precondition(*given)
            with Left() as left:
                natural, state, info = there.precondition(*given)
                metrics(natural, info, state)
        yield from (f"{name}: {by}" for by in left.by if not by.startswith(READS.get(name, "nothing")))


def some() -> Iterator[str]:
    """Of the cases that are compiled."""
    return steps(sorted(IN_FULL | TRACED))


def on_device(loss_fn: Any) -> None:
    """What the modules own that a loss closes over."""
    for cell in getattr(loss_fn, "__closure__", None) or ():
        if isinstance(cell.cell_contents, nn.Module):
            owned = [of for m in cell.cell_contents.modules() for of in (m._buffers, m._parameters)]
            for old, new in zip(owned, moved([dict(of) for of in owned]), strict=True):
                old.update(new)


def graphs() -> Iterator[str]:
    """Tensors of the CPU in the graphs of training steps, of those that refresh the basis by `qr` and that do not."""
    found: list[str] = []

    def look(graph: Any, inputs: Any) -> Any:
        found.extend(f"{node.op} {node.target}" for node in graph.graph.nodes if "cpu" in devices(node.meta.get("val")))
        return graph

    for name, settings in (("W1", {"basis_every": 2, "refresh": qr()}), ("W2", {})):
        w = work(name, None, table=TINY)
        step, start = training(w, **{"basis_every": 100, **AVERAGED, **settings})
        *carried, _ = step(*start, w.batch)
        carried, batch = moved((carried, w.batch))
        compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=look))
        with FAKE:
            for _ in range(2 if settings else 1):
                *carried, _ = compiled(*carried, batch)
        yield from (f"{name}: {what}" for what in found)
        found.clear()


if __name__ == "__main__":
    register()
    torch.manual_seed(0)
    with torch.autograd.set_multithreading_enabled(False):  # the thread of a device and this one race for fake tensors
        problems = list({"some": some, "steps": steps, "graphs": graphs}[sys.argv[1]]())
    print("\n".join(problems))
    print(f"{len(problems)} of them")
