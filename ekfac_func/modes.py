"""What a line may do where it runs: eager on a CPU look at values, in a graph or transform not; and its draws."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def transformed() -> bool:
    """Whether a trace or a transform of `torch.func` is under way."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def where(good: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`torch.where` of what is nearly always true: without the pass over memory where it can be seen at no cost."""
    if transformed() or good.device.type != "cpu" or _get_current_dispatch_mode() is not None:
        return torch.where(good, new, old)
    return new if bool(good if good.dim() == 0 else good.all()) else torch.where(good, new, old)


class Draws(NamedTuple):
    """The states of the random number generators before a pass, from which another one draws the same."""

    states: list[tuple[torch.device, Tensor]]
    recorded: bool = False  # into a CUDA graph, where the states of the devices cannot be had

    def repeat(self) -> None:
        """Go back to them."""
        if self.recorded:
            raise RuntimeError(
                "a step that a CUDA graph records wanted a second pass with the same random numbers: call it once "
                "before, and record steps without chunk_size or a refresh"
            )
        for device, state in self.states:
            torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state, device)


def draws(tensors: Iterable[Tensor]) -> Draws:
    """Of the CPU, and of the CUDA devices of these tensors."""
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    recorded = len(devices) > 0 and torch.cuda.is_current_stream_capturing()
    of_cuda = [] if recorded else [(device, torch.cuda.get_rng_state(device)) for device in devices]
    return Draws([(torch.device("cpu"), torch.get_rng_state()), *of_cuda], recorded)
