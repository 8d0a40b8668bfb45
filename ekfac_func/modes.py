"""What a line may do where it runs: eager on a CPU look at values, in a graph or under a transform not."""

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
