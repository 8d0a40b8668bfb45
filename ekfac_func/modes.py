"""What a line may do where it runs: eager on a CPU look at values, in a graph or transform not; and its draws."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def transformed() -> bool:
    """Whether a trace or a transform of `torch.func` is under way."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def where(good: Tensor, new: Tensor, old: Tensor | float) -> Tensor:
    """`torch.where` of what is nearly always true: without the pass over memory where it can be seen at no cost."""
    if transformed() or good.device.type != "cpu" or _get_current_dispatch_mode() is not None:
        return torch.where(good, new, old)
    return new if bool(good.all()) else torch.where(good, new, old)


class Draws(NamedTuple):
    """The states of the random number generators before a pass, from which another one draws the same."""

    states: list[tuple[torch.device, Tensor]]

    def repeat(self) -> None:
        """Go back to them."""
        for device, state in self.states:
            torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state, device)


def draws(tensors: Iterable[Tensor]) -> Draws:
    """Of the CPU, and of the CUDA devices of these tensors."""
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    of_cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices]
    return Draws([(torch.device("cpu"), torch.get_rng_state()), *of_cuda])
