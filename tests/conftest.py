import gc
from collections.abc import Iterator

import pytest
import torch

gc.freeze()  # the objects of torch's modules, which every collection would walk again
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def _numeric() -> Iterator[None]:
    """float64 by default, a fixed seed, one thread, and no compiled code of another test."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    torch.compiler.reset()
