"""Files that are whole or not there, and Ctrl-C between two steps."""

import os
import signal
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any, BinaryIO

import torch


class Interrupted(Exception):
    """Ctrl-C was pressed, and what was done is in the checkpoint."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file of the same directory, which takes the place of the old one when it is written.

    Whenever the process is killed, `path` is the whole old file or the whole new one.
    """
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write(path: Path, tree: Any) -> None:
    """Save a tree of tensors."""
    with replacing(path) as file:
        torch.save(tree, file)


class Unusable(Exception):
    """The file is nothing that a run can go on from."""


def read(path: Path) -> Any | None:
    """What `write` saved, on the CPU; None where there is nothing. Unusable where there is something else."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # `torch.load` does not look whether the bytes are those written
            if broken := archive.testzip():
                raise zipfile.BadZipFile(broken)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:  # of bytes at random the unpickler raises anything
        raise Unusable(f"{path} is no checkpoint ({type(reason).__name__}): give --restart") from reason


@contextmanager
def interruptible() -> Iterator[Event]:
    """The first Ctrl-C inside sets the event, for the loop to read between two steps; the second one interrupts."""
    stop = Event()

    def after_this_step(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, after_this_step)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
