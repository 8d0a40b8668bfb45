"""What the commands share: types of their options, the check for optional packages, and the output directory."""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

EXTRA = ("numpy", "sklearn", "mlxtend", "matplotlib", "tqdm")  # modules of the optional dependencies "train"


def seed(text: str) -> int:
    """A whole number that a `torch.Generator` takes."""
    try:
        number = int(text)
    except ValueError:
        number = 2**64
    if not -(2**63) <= number < 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} will not do: give a whole number of 64 bits")
    return number


def positive(text: str) -> float:
    """A finite number greater than 0, in float32 too."""
    return _number(text, lambda x: 2**-126 <= x < float("inf"), "give a number greater than 0 in float32")


def negative(text: str) -> float:
    """A finite number less than 0."""
    return _number(text, lambda x: -float("inf") < x < 0, "give a number less than 0")


def share(text: str) -> float:
    """A number in [0, 1)."""
    return _number(text, lambda x: 0 <= x < 1, "give a number from 0 up to, but not, 1")


def count(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def steps(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def threads(text: str) -> int:
    """A number of threads that torch takes."""
    return int(_number(text, lambda x: 1 <= x < 2**31 and x == int(x), "give a whole number, at least 1, of 32 bits"))


@contextmanager
def extra(command: str) -> Iterator[None]:
    """Leave with the remedy where an import inside needs an optional package that is not installed."""
    try:
        yield
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        raise SystemExit(
            f'{command} needs {package}, which is not installed: pip install "ekfac_func[train]"'
        ) from None


def make_directory(path: Path, error: Callable[[str], NoReturn]) -> None:
    """Make the directory of `--out` where there is none; `error` reports one that cannot be, or be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as reason:
        error(f"argument --out: {reason}: give a directory that can be written")


def _whole(text: str, least: int) -> int:
    """The whole number that an option gives."""
    remedy = f"give a whole number, at least {least}"
    return int(_number(text, lambda x: least <= x < float("inf") and x == int(x), remedy))


def _number(text: str, allowed: Callable[[float], bool], remedy: str) -> float:
    """The number that an option gives; the error of one that is not allowed ends with the remedy."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not allowed(number):
        raise argparse.ArgumentTypeError(f"{text!r} will not do: {remedy}")
    return number
