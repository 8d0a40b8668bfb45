"""The states of random number generators, restored before another pass over the same examples."""

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_WITH_STATES = ("cuda", "mps", "xpu")


Kept = tuple[Callable[[Any], Any], Any]
"""(how the state of a generator is set, what it was)"""


class Draws(NamedTuple):
    """The states of the random number generators before a pass, so that another pass can draw the same numbers."""

    states: list[Kept]
    recorded: bool = False  # a CUDA graph is being recorded, in which the states of devices cannot be read

    def repeat(self) -> None:
        """Restore these states."""
        if self.recorded:
            raise RuntimeError(
                "a step that a CUDA graph records wanted a second pass with the same random numbers: call it once "
                "before, and record steps without chunk_size or a refresh"
            )
        for set_state, state in self.states:
            set_state(state)

    def followed(self, tensors: Iterable[Tensor]) -> bool:
        """Whether a generator of torch has been used since, on the CPU or where these tensors are."""
        now = draws(tensors).states
        pairs = [(old, new) for (_, old), (_, new) in zip(self.states, now, strict=False) if isinstance(old, Tensor)]
        return any(not torch.equal(old, new) for old, new in pairs)


def host_draws() -> Draws:
    """The states of Python's and numpy's generators, whose draws are the same for all examples of a batch."""
    states: list[Kept] = [(random.setstate, random.getstate())]
    if numpy := sys.modules.get("numpy"):
        states.append((numpy.random.set_state, numpy.random.get_state()))
    return Draws(states)


def draws(tensors: Iterable[Tensor]) -> Draws:
    """The states of torch's generators, on the CPU and where these tensors are, and of Python's and numpy's."""
    states: list[Kept] = [(torch.set_rng_state, torch.get_rng_state()), *host_draws().states]
    devices = {t.device for t in tensors if t.device.type in _WITH_STATES}
    recorded = any(d.type == "cuda" for d in devices) and torch.cuda.is_current_stream_capturing()
    for d in () if recorded else devices:
        module = torch.get_device_module(d)
        which = {} if d.type == "mps" else {"device": d}  # of mps there is one
        states.append((functools.partial(module.set_rng_state, **which), module.get_rng_state(**which)))
    return Draws(states, recorded)


@contextlib.contextmanager
def undrawn(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the random states on exit."""
    before = draws(tensors)
    try:
        yield
    finally:
        before.repeat()
